"""The steps of a run: train the full model, search, verify, compact, retrain, quantise; `run` and commands call them."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import Verification, verify
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import BudgetError, DataError, EmbtrimError
from embtrim.experiments.records import FoundPlan, Trained, make_record
from embtrim.experiments.settings import RunConfig, method_config
from embtrim.methods import method_named, search
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.budget_limits import target_settings
from embtrim.plan.plan import SizePlan
from embtrim.serving.bundle import load_bundle
from embtrim.system.files import write_then_rename
from embtrim.system.memory import peak_memory
from embtrim.system.unfinished import claim
from embtrim.tasks.task import CTRTask
from embtrim.training.checkpoint import CheckpointFolder
from embtrim.training.fitting import fit, training_settings
from embtrim.training.recoding import data_for
from embtrim.training.settings import FitResult, Hooks
from embtrim.training.state import checksum
from embtrim.training.teaching import taught, teaching_settings

logger = logging.getLogger(__name__)

# Bisection over budgets for `max_loss`: the smallest budget tried, and how many budgets are tried at most.
SMALLEST_SHARE = 0.01
BISECTIONS = 6


# --- single steps ---------------------------------------------------------------------------------------------------


def train_full(
    data: EncodedDataset, config: RunConfig, progress: bool = False, checkpoint: Path | None = None
) -> Trained:
    """Train the full model of a run, with the run's first seed, and record it; see `fit` for the checkpoint."""
    with peak_memory() as peak:
        model = build(config.model, data.schema, **{**config.hparams, "seed": config.seed})
        train = config.train.replace(seed=config.seed)
        result = fit(model, data, train, progress=progress, checkpoint=checkpoint)
    epoch_seconds = data.num_rows("train") / max(result.rows_per_second, 1e-9)
    record = make_record(model, data, config, result, peak_bytes=peak.bytes, epoch_seconds=epoch_seconds)
    return Trained(model, record)


def load_full(folder: Path, data: EncodedDataset) -> CTRModel:
    """The full model in a bundle.

    Raises:
        DataError: The bundle holds a compact model, or one of another schema than the data's.
    """
    model = load_bundle(folder).model
    plan = model.tables.plan
    if plan.num_params < plan.num_full_params:
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
    progress: bool = False,
    unfinished: Path | None = None,
    **claimed: Any,
) -> FoundPlan:
    """Search for a plan, with the method, budget, bits, target and first seed of a run.

    Args:
        model: The trained full model.
        data: Encoded data that the full model was trained on.
        config: Method, search, budget, bits, target, train and seed are read here.
        progress: Show progress bars on stderr.
        unfinished: Folder for the state of the search. A search that was interrupted is continued from it, and the plan
            of a finished search is read from it. If its state is of other settings, it is emptied.
        claimed: Further settings on which the folder's contents depend.
    """
    task = CTRTask(model, data, config.train.replace(seed=config.seed))
    task.progress = progress
    if unfinished is not None:
        claim(unfinished, {**search_settings(task, config), **claimed})
        if (cost_path := unfinished / "search.json").exists():  # written after the plan
            cost = json.loads(cost_path.read_text("utf-8"))
            return FoundPlan(SizePlan.load(unfinished / "plan.json"), cost["seconds"], cost["peak_bytes"])
        task.checkpoints = CheckpointFolder(unfinished, task.config.checkpoint_seconds)
    with peak_memory() as peak:
        started = time.perf_counter()
        plan = search(task, method_config(config), config.budget, config.seed, config.stored_bits, config.target)
        seconds = time.perf_counter() - started
    if task.checkpoints is not None:
        seconds += task.checkpoints.spent_seconds
    found = FoundPlan(plan, seconds, peak.above_start)
    if unfinished is not None:
        _keep_plan(found, unfinished)
    return found


def search_settings(task: CTRTask, config: RunConfig) -> dict[str, Any]:
    """The settings that a search depends on; its unfinished state is known by them."""
    return {
        "method": method_named(config.method).name,
        **{f"search.{key}": value for key, value in method_config(config).model_dump(mode="json").items()},
        "budget": config.budget.text,
        "search_seed": config.seed,
        "bits": config.stored_bits,
        # State of earlier releases has no word of a vocabulary, and their searches counted none.
        **{name: value for name, value in target_settings(config.budget, config.target).items() if value},
        **training_settings(task.model, task.data, task.config),
        "weights": checksum(task.model),
    }


def _keep_plan(found: FoundPlan, unfinished: Path) -> None:
    """Write a plan and the cost of its search; remove the checkpoints of trainings within the search."""
    found.plan.save(unfinished / "plan.json")
    text = json.dumps({"seconds": found.seconds, "peak_bytes": found.peak_bytes})
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
    lessons: EncodedDataset | None = None,
    progress: bool = False,
    checkpoint: Path | None = None,
) -> Compacted:
    """Build the compact model of a plan, retrain it in fp32, and quantise it if the plan says so.

    Args:
        model: The trained full model.
        plan: Plan made for the model.
        data: The full model's data.
        config: Init, teacher, the settings of training and the first seed are read here.
        retrain: False keeps the weights that `init` gives.
        lessons: The data with the labels to train on, `taught` by the model; None makes them.
        progress: Show a progress bar on stderr.
        checkpoint: File for the state of retraining; see `fit`.
    """
    small = compact(model, plan, init=config.init, seed=config.seed)
    training = None
    if retrain:
        if lessons is None:
            lessons = taught(data, model, config.teacher, config.train)
        hooks = None if checkpoint is None else Hooks(settings=teaching_settings(model, config.teacher))
        train = config.train.replace(seed=config.seed)
        training = fit(small, lessons.recode(plan), train, hooks=hooks, progress=progress, checkpoint=checkpoint)
    if plan.is_quantized:
        small.tables.quantize()
    return Compacted(small, data.recode(plan), training)


# --- all steps after the full model ---------------------------------------------------------------------------------


def shrink(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    *,
    label: str | None = None,
    progress: bool = False,
    unfinished: Path | None = None,
) -> Trained:
    """Search, verify, compact, retrain and quantise within one budget, and record the result.

    Args:
        full: The trained full model.
        data: Encoded data that the full model was trained on.
        config: Method, search, budget, bits, target, init, teacher, train and seed are read here; `max_loss` and
            `controls` are not.
        label: The record's variant, if it is not the name of the method.
        progress: Show progress bars on stderr.
        unfinished: Folder for the state of search and training. Interrupted work of the same settings is continued from
            it.
    """
    checkpoint = None if unfinished is None else unfinished / "retraining.safetensors"
    claimed: dict[str, Any] = {"init": config.init}
    if config.teacher:  # state of earlier releases names no teacher, and trains on clicks
        claimed["teacher"] = config.teacher
    with peak_memory() as peak:
        found = find_plan(full.model, data, config, progress=progress, unfinished=unfinished, **claimed)
        verification = verify_plan(full.model, found.plan, data)
        if config.teacher not in full.lessons:
            full.lessons[config.teacher] = taught(data, full.model, config.teacher, config.train)
        small = compact_and_retrain(
            full.model, found.plan, data, config,
            lessons=full.lessons[config.teacher], progress=progress, checkpoint=checkpoint,
        )  # fmt: skip
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


def with_search_seconds(best: Trained, seconds: float) -> Trained:
    """The best of several models; all their `seconds` count as its search, except those of its own training."""
    record = best.record
    seconds -= record.train_seconds
    epochs = seconds * record.search_epochs / max(record.search_seconds, 1e-9)
    best.record = record.replace(search_seconds=seconds, search_epochs=epochs)
    return best


def smallest_within(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    *,
    progress: bool = False,
    unfinished: Path | None = None,
) -> Trained:
    """The smallest plan whose validation AUC is at most `config.max_loss` below the full model's.

    Bisects the share of the full tables on a log scale, on the assumption that a larger budget does no harm. The result
    is measured, whether or not the assumption holds.

    Args:
        full, data, config, progress, unfinished: Arguments of `shrink`; the budget is not read.

    Raises:
        EmbtrimError: Not even the largest budget tried is within the tolerance.
    """
    assert config.max_loss is not None
    seconds = 0.0
    wanted = full.record.valid["auc"] - config.max_loss
    low, high = SMALLEST_SHARE, 1.0
    best: Trained | None = None
    for _ in range(BISECTIONS):
        share = (low * high) ** 0.5
        budget = f"{share:.4%}"
        work = None if unfinished is None else unfinished / budget
        try:
            trained = shrink(full, data, config.replace(budget=budget), progress=progress, unfinished=work)
        except BudgetError as error:  # so small that the method keeps nothing
            logger.info("budget %.2f%%: %s", share * 100, error)
            low = share
            continue
        seconds += trained.record.search_seconds + trained.record.train_seconds
        logger.info("budget %.2f%%: validation AUC %.4f, wanted %.4f", share * 100, trained.record.valid["auc"], wanted)
        if trained.record.valid["auc"] >= wanted:
            best, high = trained, share
        else:
            low = share
    if best is None:
        raise EmbtrimError(
            f"no plan of method {config.method!r} up to {low:.0%} of the tables is within {config.max_loss} of the full "
            f"model's validation AUC {full.record.valid['auc']:.4f}; allow more loss, or name a budget"
        )
    return with_search_seconds(best, seconds)
