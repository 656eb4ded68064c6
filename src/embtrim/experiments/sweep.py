"""Choose the full model's `embedding_l2` by short trainings on a sample, scored on the validation rows.

Tables of many ids overfit within an epoch or two. A full model that nothing holds back then loses to any smaller one, and
its loss says nothing about the sizes. The values lie a factor of ten apart. Two of them are tried first, and smaller ones
only where the smaller one of the last two did better: two to four trainings.

The sample has an eighth of the training rows, but LEAST_ROWS to MOST_ROWS where there are as many. A training makes a few
passes over it, in which too little regularisation shows, and stops after two passes without a gain. A sample overfits
sooner than all rows do, which favours larger values; the largest one is therefore moderate.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from embtrim.config import Config
from embtrim.data.dataset import EncodedDataset
from embtrim.experiments.settings import RunConfig
from embtrim.models import build
from embtrim.system.files import read_json, write_then_rename
from embtrim.training.fitting import fit

logger = logging.getLogger(__name__)

VALUES = (0.1, 0.01, 0.001, 0.0)
PASSES = 3
# The sample is copied into memory.
SAMPLE_PART, LEAST_ROWS, MOST_ROWS = 1 / 8, 1 << 17, 1 << 20


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
    """

    embedding_l2: float
    trials: tuple[L2Trial, ...]
    rows: int
    seconds: float


def chosen_l2(data: EncodedDataset, config: RunConfig, path: Path | None = None, progress: bool = False) -> L2Sweep:
    """Choose `embedding_l2` for the full model of a run.

    Args:
        data: Encoded data with splits train and valid.
        config: Settings of the run, whose `train.embedding_l2` is not read.
        path: JSON file that keeps the choice: a sweep that finds it there is not made again.
        progress: Show progress bars on stderr.
    """
    if path is not None and path.exists():
        return L2Sweep.parse(read_json(path), where=str(path))
    started = time.perf_counter()
    sample = data.sampled("train", sample_rows(data), config.seed)
    trials: list[L2Trial] = []
    for value in VALUES:
        trials.append(_trial(sample, config, value, progress))
        if len(trials) > 1 and trials[-1].score <= trials[-2].score:
            break
    best = max(trials, key=lambda trial: trial.score)
    sweep = L2Sweep(
        embedding_l2=best.embedding_l2,
        trials=tuple(trials),
        rows=sample.num_rows("train"),
        seconds=time.perf_counter() - started,
    )
    logger.info("%s", describe_sweep(sweep, config.train.monitor))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_then_rename(path, lambda file: file.write(sweep.model_dump_json(indent=1).encode()))
    return sweep


def sample_rows(data: EncodedDataset) -> int:
    """Training rows in the sample of a sweep."""
    rows = data.num_rows("train")
    return min(rows, MOST_ROWS, max(int(SAMPLE_PART * rows), LEAST_ROWS))


def _trial(sample: EncodedDataset, config: RunConfig, value: float, progress: bool) -> L2Trial:
    model = build(config.model, sample.schema, **{**config.hparams, "seed": config.seed})
    train = config.train.replace(
        seed=config.seed, embedding_l2=value, epochs=min(PASSES, config.train.epochs), patience=2, compile=False
    )
    result = fit(model, sample, train, progress=progress)
    assert result.best_score is not None
    return L2Trial(
        embedding_l2=value, score=result.best_score, best_epoch=result.best_epoch, epochs=len(result.history)
    )


def describe_sweep(sweep: L2Sweep, monitor: str) -> str:
    """A sweep in one line."""
    tried = ", ".join(f"{trial.embedding_l2:g}: {abs(trial.score):.4f}" for trial in sweep.trials)
    return (
        f"embedding_l2 is not given; {sweep.embedding_l2:g} is chosen (valid {monitor} after up to {PASSES} passes over "
        f"{sweep.rows:,} rows: {tried}), in {sweep.seconds:.1f} s"
    )
