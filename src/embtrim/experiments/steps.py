"""The steps of a run: train the full model, search, verify, compact, retrain, quantise; `run` and commands call them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embtrim.compaction.compacting import made_compact
from embtrim.compaction.verification import Verification, verify
from embtrim.config import Config
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import BudgetError, DataError
from embtrim.experiments.records import FoundPlan, Trained, make_record, started_as
from embtrim.experiments.settings import RunConfig, method_config, starts_of
from embtrim.experiments.sweep import chosen_l2
from embtrim.methods import method_named, search
from embtrim.methods.curves import least_within
from embtrim.methods.guided import Start
from embtrim.methods.readings import Readings, read
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.budget import AUTO
from embtrim.plan.budget_limits import target_settings
from embtrim.plan.plan import SizePlan
from embtrim.serving.bundle import load_bundle
from embtrim.system.files import read_json, write_then_rename
from embtrim.system.memory import peak_memory
from embtrim.system.progress import stage
from embtrim.system.unfinished import claim
from embtrim.tables.code_training import CodeGate
from embtrim.tables.kernels import kernels_expected
from embtrim.tasks.ctr_task import CTRTask
from embtrim.training.callbacks import Callback
from embtrim.training.checkpoint import CheckpointFolder
from embtrim.training.fitting import fit, training_settings
from embtrim.training.recoding import data_for
from embtrim.training.settings import FitResult, Hooks, TrainConfig
from embtrim.training.state import checksum
from embtrim.training.teaching import taught, teaching_settings

logger = logging.getLogger(__name__)

# Most epochs in which a trained compact model learns to be read as its codes, their learning rate as a part of that of
# training, and how often in an epoch the scales of the codes follow the tables.
FINISHING_EPOCHS, FINISHING_RATE, CODE_FITS_PER_EPOCH = 8, 0.05, 4


# --- single steps ---------------------------------------------------------------------------------------------------


def train_full(
    data: EncodedDataset,
    config: RunConfig,
    progress: bool = False,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Train the full model of a run, with the run's first seed, and record it; see `fit` for checkpoint and callbacks.

    Without `train.embedding_l2` it is trained with 0; see `train_full_swept`.
    """
    with peak_memory() as peak, stage("full model", progress):
        model = build(config.model, data.schema, **{**config.hparams, "seed": config.seed})
        train = config.train.replace(seed=config.seed)
        result = fit(model, data, train, progress=progress, checkpoint=checkpoint, callbacks=callbacks)
    epoch_seconds = data.num_rows("train") / max(result.rows_per_second, 1e-9)
    record = make_record(model, data, config, result, peak_bytes=peak.bytes, epoch_seconds=epoch_seconds)
    if result.best_epoch == 1 and len(result.history) > 1:
        logger.warning(
            "the full model was at its best after its first epoch: more training made it worse, as it does where tables "
            "overfit, and smaller models may then do better for that reason alone; it was trained with embedding_l2 = %g",
            config.train.embedding_l2 or 0.0,
        )
    return Trained(model, record)


def train_full_swept(
    data: EncodedDataset,
    config: RunConfig,
    progress: bool = False,
    unfinished: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """`train_full`, with `embedding_l2` chosen by a sweep where it is not given; the record holds the choice.

    Args:
        data: Encoded data with splits train, valid and test.
        config: Settings of the run.
        progress: Show progress bars on stderr.
        unfinished: Folder for the state of sweep and training. Interrupted work is continued from it.
        callbacks: Objects that are told of each epoch of the full model; those of the sweep are not told.
    """
    checkpoint = None if unfinished is None else unfinished / "full.safetensors"
    if config.train.embedding_l2 is not None:
        return train_full(data, config, progress, checkpoint, callbacks)
    sweep = chosen_l2(data, config, None if unfinished is None else unfinished / "embedding_l2.json", progress)
    full = train_full(data, with_l2(config, sweep.embedding_l2), progress, checkpoint, callbacks)
    full.record = full.record.replace(l2_sweep=sweep.model_dump(mode="json"))
    share = sweep.seconds / max(full.record.train_seconds, 1e-9)
    logger.info("the sweep of embedding_l2 took %.2f times as long as the training of the full model", share)
    return full


def with_l2(config: RunConfig, embedding_l2: float) -> RunConfig:
    """The settings with a value of `embedding_l2`."""
    return config.replace(train=config.train.replace(embedding_l2=embedding_l2))


def load_full(folder: Path, data: EncodedDataset) -> CTRModel:
    """The full model in a bundle.

    Raises:
        DataError: The bundle holds a compact model, or one of another schema than the data's.
    """
    model = load_bundle(folder).model
    plan = model.tables.plan
    if plan.num_params < plan.num_full_params or plan.is_quantized:
        raise DataError(
            f"{folder} holds a compact model ({plan.method}); give the bundle of a full one, see `embtrim train`"
        )
    data_for(model, data)
    return model


def find_plan(
    model: CTRModel,
    data: EncodedDataset,
    config: RunConfig,
    *,
    readings: Readings | None = None,
    progress: bool = False,
    unfinished: Path | None = None,
    **claimed: Any,
) -> FoundPlan:
    """Search for a plan, with the method, budget, bits, target and first seed of a run.

    With the budget "auto" it is the least one that is predicted to be within the tolerance, for the better start.

    Args:
        model: The trained full model.
        data: Encoded data that the full model was trained on.
        config: Method, search, init, budget, tolerance, bits, target, train and seed are read here.
        readings: Readings of the model that were made before; without them `guided` reads it.
        progress: Show progress bars on stderr.
        unfinished: Folder for the state of the search. A search that was interrupted is continued from it, and the plan
            of a finished search is read from it. If its state is of other settings, it is emptied.
        claimed: Further settings on which the folder's contents depend.
    """
    config = config.replace(max_loss=None)  # which is not a search's
    task = search_task(model, data, config, progress)
    if unfinished is not None:
        claim(unfinished, {**search_settings(task, config), **claimed})
        if (cost_path := unfinished / "search.json").exists():  # written after the plan
            cost = _Cost.parse(read_json(cost_path), where=str(cost_path))
            return FoundPlan(SizePlan.load(unfinished / "plan.json"), cost.seconds, cost.peak_bytes)
        task.checkpoints = CheckpointFolder(unfinished, task.config.checkpoint_seconds)
    with peak_memory() as peak, stage("search", progress):
        started = time.perf_counter()
        if config.method == "guided":
            task.readings = readings or read(task)
        if config.limit is None:
            config = with_predicted_budget(task, task.readings, config, config.tolerance).config
        assert config.limit is not None
        plan = search(task, method_config(config), config.limit, config.seed, config.stored_bits, config.target)
        seconds = time.perf_counter() - started
    if task.checkpoints is not None:
        seconds += task.checkpoints.spent_seconds
    found = FoundPlan(plan, seconds, peak.above_start, task.readings)
    if unfinished is not None:
        _keep_plan(found, unfinished)
    return found


def search_task(model: CTRModel, data: EncodedDataset, config: RunConfig, progress: bool) -> CTRTask:
    """The task of a run's search."""
    task = CTRTask(model, data, config.train.replace(seed=config.seed))
    task.progress = progress
    return task


class Predicted(NamedTuple):
    """A budget that was found by prediction.

    Attributes:
        config: The settings of the run with this budget, and with the start of its plan if the search may choose it.
        loss: Predicted loss of the validation score.
        num_bytes: Bytes of the plan's tables.
    """

    config: RunConfig
    loss: float
    num_bytes: int


def with_predicted_budget(task: CTRTask, readings: Readings, config: RunConfig, loss: float) -> Predicted:
    """The settings of a run with the least budget that is predicted to lose at most `loss`.

    Args:
        task: Task of the trained full model.
        readings: Readings of the model.
        config: Settings of a run whose method is `guided`; search, init, bits and target are read here.
        loss: Largest predicted loss of the validation score.

    Raises:
        BudgetError: Not even the full tables are predicted to lose so little.
    """
    budget, start, found = least_within(task, readings, starts_of(config), loss, config.stored_bits, config.target)
    num_bytes = found.plan.num_bytes(config.target)
    logger.info("budget %s (%s bytes): predicted loss %.5f, allowed %.5f", budget, f"{num_bytes:,}", found.loss, loss)
    search = {**config.search, "start": start} if len(starts_of(config)) > 1 else config.search
    return Predicted(config.replace(budget=budget, max_loss=None, search=search), found.loss, num_bytes)


def readings_of(full: Trained, data: EncodedDataset, config: RunConfig, progress: bool = False) -> Readings:
    """The readings of a full model, which are made once."""
    if full.readings is None:
        full.readings = read(search_task(full.model, data, config, progress))
    return full.readings


def search_settings(task: CTRTask, config: RunConfig) -> dict[str, Any]:
    """The settings that a search depends on; its unfinished state is known by them."""
    return {
        "method": method_named(config.method).name,
        **{f"search.{key}": value for key, value in method_config(config).model_dump(mode="json").items()},
        **({"budget": config.limit.text} if config.limit else {"budget": AUTO, "tolerance": config.tolerance}),
        "search_seed": config.seed,
        "bits": config.stored_bits,
        # State of earlier releases has no word of a vocabulary, and their searches counted none.
        **{name: value for name, value in target_settings(config.limit, config.target).items() if value},
        **training_settings(task.model, task.data, task.config, kernels_expected),
        "weights": checksum(task.model),
    }


class _Cost(Config):
    """What search.json holds beside a plan."""

    seconds: float
    peak_bytes: int | None = None


def _keep_plan(found: FoundPlan, unfinished: Path) -> None:
    """Write a plan and the cost of its search; remove the checkpoints of trainings within the search."""
    found.plan.save(unfinished / "plan.json")
    text = _Cost(seconds=found.seconds, peak_bytes=found.peak_bytes).model_dump_json()
    write_then_rename(unfinished / "search.json", lambda file: file.write(text.encode()))
    for path in unfinished.glob("training-*.safetensors"):
        path.unlink()


def verify_plan(model: CTRModel, plan: SizePlan, data: EncodedDataset) -> Verification:
    """Compare the compact model of a plan with the masked full one, on the validation rows if there are any.

    Raises:
        EmbtrimError: The two models differ.
    """
    verification = verify(model, plan, data, split="valid" if "valid" in data.splits else "train")
    verification.require()
    return verification


@dataclass(frozen=True)
class Compacted:
    """A compact model.

    Attributes:
        model: The compact model, quantised if its plan says so.
        data: The data in the compact model's ids, with clicks as labels.
        training: The cost and the history of retraining; None if the model was not retrained.
    """

    model: CTRModel
    data: EncodedDataset
    training: FitResult | None


def compact_and_retrain(
    model: CTRModel,
    plan: SizePlan,
    data: EncodedDataset,
    config: RunConfig,
    *,
    retrain: bool = True,
    lessons: dict[float, EncodedDataset] | None = None,
    progress: bool = False,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Compacted:
    """Build the compact model of a plan, retrain it in fp32, and quantise it if the plan says so.

    Args:
        model: The trained full model.
        plan: Plan made for the model.
        data: The full model's data.
        config: Init, teacher, the settings of training and the first seed are read here.
        retrain: False keeps the weights that `init` gives.
        lessons: Data that the model has `taught` before, by the teacher's share; what is missing is added.
        progress: Show a progress bar on stderr.
        checkpoint: File for the state of retraining; see `fit`.
        callbacks: Objects that are told of each epoch of retraining.
    """
    lessons = {} if lessons is None else lessons
    init, train = started_as(plan, config.init), config.train.replace(seed=config.seed)
    task = search_task(model, data, config, progress) if init == "low_rank" else None
    small = made_compact(model, plan, init, config.seed, task=task)  # type: ignore[arg-type]
    recoded, trainings, shown = data.recode(plan), [], {"progress": progress, "callbacks": callbacks}
    counts = recoded.value_counts() if plan.is_quantized else {}
    if retrain:
        lesson = _lesson(lessons, data, model, config.teacher, config.train)
        settings = {} if checkpoint is None else teaching_settings(model, config.teacher)
        # Steps at the full rate first take a trained start back. Most trainings end above it, but not all.
        hooks = Hooks(keeps_start=init == "low_rank", settings=settings)
        with stage("retraining", progress):
            trainings.append(fit(small, lesson.recode(plan), train, hooks=hooks, checkpoint=checkpoint, **shown))
    if retrain and config.teacher and plan.is_quantized:
        path = None if checkpoint is None else checkpoint.with_stem("finishing")
        trainings.append(_finish(small, model, data, counts, config, lessons, checkpoint=path, **shown))
    if plan.is_quantized:
        small.tables.quantize_(counts)
    return Compacted(small, recoded, _one_result(trainings))


def _finish(
    small: CTRModel,
    model: CTRModel,
    data: EncodedDataset,
    counts: Mapping[str, np.ndarray],
    config: RunConfig,
    lessons: dict[float, EncodedDataset],
    *,
    progress: bool,
    checkpoint: Path | None,
    callbacks: Sequence[Callback],
) -> FitResult:
    """Train a compact model for some more epochs with its tables read as their codes.

    Steps are small, and the tables decay no longer: the model is trained, and learns to live with the rounding. The
    weights before the first step are kept if no epoch scores better.
    """
    train = config.train.replace(
        seed=config.seed,
        epochs=min(FINISHING_EPOCHS, config.train.epochs),
        learning_rate=FINISHING_RATE * config.train.learning_rate,
        embedding_l2=0.0,
    )
    lesson = _lesson(lessons, data, model, config.teacher, train).recode(small.tables.plan)  # type: ignore[arg-type]
    settings = teaching_settings(model, config.teacher) if checkpoint is not None else {}
    hooks = Hooks(keeps_start=True, start_to_beat=True, settings=settings)
    steps_per_fit = max(1, data.num_rows("train") // train.batch_size // CODE_FITS_PER_EPOCH)
    gate = CodeGate(small.tables, steps_per_fit, counts)
    if gate.coded:
        hooks = dataclasses.replace(hooks, on_step=gate.on_step, state=gate)
    with small.tables.gated(row_gate=gate), stage("training the codes", progress):
        return fit(small, lesson, train, hooks=hooks, progress=progress, checkpoint=checkpoint, callbacks=callbacks)


def _lesson(
    lessons: dict[float, EncodedDataset], data: EncodedDataset, model: CTRModel, share: float, train: TrainConfig
) -> EncodedDataset:
    """The data as `taught` by the model, made once for each share of the teacher."""
    if share not in lessons:
        lessons[share] = taught(data, model, share, train)
    return lessons[share]


def _one_result(trainings: list[FitResult]) -> FitResult | None:
    """The result of several trainings of one model: the last one's, with the history and the time of all."""
    if not trainings:
        return None
    return dataclasses.replace(
        trainings[-1],
        history=[entry for result in trainings for entry in result.history],
        seconds=sum(result.seconds for result in trainings),
        restored_seconds=sum(result.restored_seconds for result in trainings),
    )


# --- all steps after the full model ---------------------------------------------------------------------------------


def shrink(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    *,
    label: str | None = None,
    progress: bool = False,
    unfinished: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Search, verify, compact, retrain and quantise within one budget, and record the result.

    Args:
        full: The trained full model.
        data: Encoded data that the full model was trained on.
        config: Method, search, budget, tolerance, bits, target, init, teacher, train and seed are read here; `max_loss`
            and `controls` are not.
        label: The record's variant, if it is not the name of the method.
        progress: Show progress bars on stderr.
        unfinished: Folder for the state of search and training. Interrupted work of the same settings is continued from
            it.
        callbacks: Objects that are told of each epoch of retraining; trainings within a search are not told.
    """
    config, shown = config.replace(max_loss=None), {"label": label, "progress": progress, "callbacks": callbacks}
    if config.limit is None:
        return _shrink_predicted(full, data, config, unfinished=unfinished, **shown)
    if config.method == "guided" and len(ways := starts_of(config)) > 1:
        return _best_start(full, data, config, ways, unfinished=unfinished, **shown)
    checkpoint = None if unfinished is None else unfinished / "retraining.safetensors"
    claimed: dict[str, Any] = {"init": config.init}
    if config.teacher:  # state of earlier releases names no teacher, and trains on clicks
        claimed["teacher"] = config.teacher
    with peak_memory() as peak, stage(label or config.method, progress):
        found = find_plan(
            full.model, data, config, readings=full.readings, progress=progress, unfinished=unfinished, **claimed
        )
        with stage("verify", progress):
            verification = verify_plan(full.model, found.plan, data)
        small = compact_and_retrain(
            full.model, found.plan, data, config,
            lessons=full.lessons, progress=progress, checkpoint=checkpoint, callbacks=callbacks,
        )  # fmt: skip
    full.readings = full.readings or found.readings
    assert small.training is not None
    record = make_record(
        small.model,
        small.data,
        config,
        small.training,
        peak_bytes=peak.bytes,
        epoch_seconds=full.record.data["num_rows"]["train"] / max(full.record.rows_per_second, 1e-9),
        label=label,
        found=found,
        verification=verification,
    )
    return Trained(small.model, record, found.plan)


def _shrink_predicted(
    full: Trained, data: EncodedDataset, config: RunConfig, *, progress: bool, **shown: Any
) -> Trained:
    """Shrink within the least budget whose predicted loss is within the tolerance. Finding it counts as search."""
    started = time.perf_counter()
    task, readings = search_task(full.model, data, config, progress), readings_of(full, data, config, progress)
    predicted = with_predicted_budget(task, readings, config, config.tolerance)
    seconds = time.perf_counter() - started
    # The start is left open: it is chosen by the scores of trained models.
    trained = shrink(full, data, config.replace(budget=predicted.config.budget), progress=progress, **shown)
    return with_search_seconds(trained, seconds + trained.record.search_seconds + trained.record.train_seconds)


def _best_start(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    ways: tuple[Start, ...],
    *,
    unfinished: Path | None,
    **shown: Any,
) -> Trained:
    """The model with the best validation score of several starts, each with its own plan.

    A model within the run's tolerance of the full one ends the trials. The time of all trials counts as search.
    """
    trials: list[Trained] = []
    for way in ways:
        work = None if unfinished is None else unfinished / way
        settings = config.replace(init=way, search={**config.search, "start": way})
        try:
            with stage(f"start {way}", False):
                small = shrink(full, data, settings, unfinished=work, **shown)
        except BudgetError as error:  # projections may take all of a small budget
            if way == ways[-1] and not trials:
                raise
            logger.info("%s: %s", way, error)
            continue
        trials.append(small)
        logger.info("%s: validation AUC %.4f", way, small.record.valid["auc"])
        if small.record.valid["auc"] >= full.record.valid["auc"] - config.tolerance:
            break
    best = max(trials, key=lambda trained: trained.record.valid["auc"])
    seconds = sum(t.record.search_seconds + t.record.train_seconds for t in trials)
    best.record = best.record.replace(init=config.init, search=method_config(config).model_dump(mode="json"))
    return with_search_seconds(best, seconds)


def with_search_seconds(best: Trained, seconds: float) -> Trained:
    """The best of several models; all their `seconds` count as its search, except those of its own training."""
    record = best.record
    seconds -= record.train_seconds
    epochs = seconds * record.search_epochs / max(record.search_seconds, 1e-9)
    best.record = record.replace(search_seconds=seconds, search_epochs=epochs)
    return best
