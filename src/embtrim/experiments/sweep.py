"""Choose the full model's `embedding_l2` by short trainings of a smaller model on a sample, scored on the validation rows.

Tables of many ids overfit within an epoch or two. A full model that nothing holds back then loses to any smaller one, and
its loss says nothing about the sizes. The values are tried from the largest one down, as long as the score rises by MARGIN:
two or three trainings.

A training is of low fidelity, as in FABOLAS (Klein et al. 2017, arXiv 1605.07079): it makes three passes over a quarter of
the training rows, with a network of one narrow layer and batches that are smaller by as much as the rows are fewer, so that a
pass has as many steps. The tables, which overfit, keep their widths. All trainings together read at most 2.25 times as many
rows as there are training rows, and a full training reads them three times or more. The choice is an approximation: a value
that needs many epochs to win is not found.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from embtrim.config import Config
from embtrim.data.dataset import EncodedDataset
from embtrim.experiments.settings import RunConfig
from embtrim.models import arguments, build
from embtrim.system.files import read_json, write_then_rename
from embtrim.system.progress import stage
from embtrim.training.fitting import fit

logger = logging.getLogger(__name__)

# A value of 0.001 scores within the noise of 0.
VALUES = (0.1, 0.01, 0.0)
PASSES = 3
# The sample is copied into memory. Batches of fewer rows would take longer.
SAMPLE_PART, LEAST_ROWS, MOST_ROWS, LEAST_BATCH = 1 / 4, 1 << 14, 1 << 20, 256
NARROW = (32,)
# A smaller value is taken only for a gain beyond noise: it overfits in longer trainings.
MARGIN = 0.002


class L2Trial(Config):
    """One short training of a sweep.

    Attributes:
        embedding_l2: The value tried.
        score: Best validation score; the negative logloss where that is monitored.
        best_epoch: Pass over the sample, from 1, after which the score was best.
        epochs: Passes made.
    """

    embedding_l2: float
    score: float
    best_epoch: int
    epochs: int


class L2Sweep(Config):
    """How `embedding_l2` was chosen.

    Attributes:
        embedding_l2: The value chosen.
        trials: The trainings, in the order in which they were made.
        rows: Training rows of the sample.
        seconds: Wall time of all trainings.
        hidden_units: Layers of the network that was trained; None if it was the full model's own.
    """

    embedding_l2: float
    trials: tuple[L2Trial, ...]
    rows: int
    seconds: float
    hidden_units: tuple[int, ...] | None = None


class _Unfinished(Config):
    """What a sweep has come to: its trainings, and what they took."""

    trials: tuple[L2Trial, ...] = ()
    seconds: float = 0.0


def chosen_l2(data: EncodedDataset, config: RunConfig, path: Path | None = None, progress: bool = False) -> L2Sweep:
    """Choose `embedding_l2` for the full model of a run.

    Args:
        data: Encoded data with splits train and valid.
        config: Settings of the run, whose `train.embedding_l2` is not read.
        path: JSON file that keeps the choice: a sweep that finds it there is not made again. Beside it lie the finished
            trainings of an interrupted sweep, and the checkpoint of the training at hand.
        progress: Show progress bars on stderr.
    """
    if path is not None and path.exists():
        return L2Sweep.parse(read_json(path), where=str(path))
    unfinished = None if path is None else path.with_name(f"{path.stem}-trials.json")
    done = _Unfinished()
    if unfinished is not None and unfinished.exists():
        done = _Unfinished.parse(read_json(unfinished), where=str(unfinished))
    sample = data.sampled("train", sample_rows(data), config.seed)
    best: L2Trial | None = None
    for number, value in enumerate(VALUES):
        if number == len(done.trials):
            checkpoint = None if path is None else path.with_name(f"{path.stem}-{value:g}.safetensors")
            trial, seconds = _trial(data, sample, config, value, checkpoint, progress)
            done = _Unfinished(trials=(*done.trials, trial), seconds=done.seconds + seconds)
            if unfinished is not None:
                _write(done, unfinished)
            if checkpoint is not None:
                checkpoint.unlink(missing_ok=True)
        trial = done.trials[number]
        if best is not None and trial.score <= best.score + MARGIN:
            break
        best = trial
    assert best is not None
    sweep = L2Sweep(
        embedding_l2=best.embedding_l2,
        trials=done.trials,
        rows=sample.num_rows("train"),
        seconds=done.seconds,
        hidden_units=NARROW if "hidden_units" in arguments(config.model) else None,
    )
    logger.info("%s", describe_sweep(sweep, config.train.monitor))
    if path is not None:
        _write(sweep, path)
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    return sweep


def _write(content: Config, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_then_rename(path, lambda file: file.write(content.model_dump_json(indent=1).encode()))


def sample_rows(data: EncodedDataset) -> int:
    """Training rows in the sample of a sweep."""
    rows = data.num_rows("train")
    return min(rows, MOST_ROWS, max(int(SAMPLE_PART * rows), LEAST_ROWS))


def sweep_passes(data: EncodedDataset, config: RunConfig) -> tuple[float, int, int]:
    """Cost of a sweep: the share of the training rows in its sample, and the least and the most passes over the sample."""
    passes = min(PASSES, config.train.epochs)
    return sample_rows(data) / data.num_rows("train"), 2 * passes, len(VALUES) * passes


def _trial(
    data: EncodedDataset,
    sample: EncodedDataset,
    config: RunConfig,
    value: float,
    checkpoint: Path | None,
    progress: bool,
) -> tuple[L2Trial, float]:
    """One training on a sample of the data, and its seconds, those of an interrupted start included."""
    started = time.perf_counter()
    share = sample.num_rows("train") / data.num_rows("train")
    narrow = {"hidden_units": NARROW} if "hidden_units" in arguments(config.model) else {}
    model = build(config.model, sample.schema, **{**config.hparams, **narrow, "seed": config.seed})
    train = config.train.replace(
        seed=config.seed,
        embedding_l2=value,
        epochs=min(PASSES, config.train.epochs),
        batch_size=min(config.train.batch_size, max(LEAST_BATCH, round(share * config.train.batch_size))),
        patience=0,
        reduce_lr=1.0,
        compile=False,
    )
    with stage(f"sweep, embedding_l2 = {value:g}", progress):
        result = fit(model, sample, train, progress=progress, checkpoint=checkpoint)
    assert result.best_score is not None
    trial = L2Trial(
        embedding_l2=value, score=result.best_score, best_epoch=result.best_epoch, epochs=len(result.history)
    )
    return trial, time.perf_counter() - started + result.restored_seconds


def describe_sweep(sweep: L2Sweep, monitor: str) -> str:
    """A sweep in one line."""
    tried = ", ".join(f"{trial.embedding_l2:g}: {abs(trial.score):.4f}" for trial in sweep.trials)
    network = (
        "" if sweep.hidden_units is None else f" with a network of {', '.join(map(str, sweep.hidden_units))} units"
    )
    return (
        f"embedding_l2 is not given; {sweep.embedding_l2:g} is chosen, in {sweep.seconds:.1f} s (valid {monitor} after up to "
        f"{PASSES} passes over {sweep.rows:,} rows{network}: {tried}); longer trainings may prefer another value"
    )
