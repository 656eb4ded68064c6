"""The steps of a run: train the full model, search, compact, verify, retrain, quantise."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.config import Config
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import BudgetError, EmbtrimError
from embtrim.experiments.records import Trained, make_record
from embtrim.experiments.settings import RunConfig
from embtrim.methods import method_named, method_of, search
from embtrim.models import build
from embtrim.plan.budget import Budget
from embtrim.plan.limits import target_settings
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Bits, Target
from embtrim.system.files import write_then_rename
from embtrim.system.memory import peak_memory
from embtrim.system.unfinished import claim
from embtrim.tasks.task import CTRTask
from embtrim.training.checkpoint import CheckpointFolder
from embtrim.training.fitting import fit, training_settings
from embtrim.training.state import checksum

log = logging.getLogger(__name__)


# Bisection over budgets for `max_loss`: the smallest budget tried, and how many budgets are tried at most.
SMALLEST_SHARE = 0.01


BISECTIONS = 6


# What bits = "auto" tries. Codes of 8 bits lose nothing that AUC shows (docs/results.md), so that more would be wasted.
TRIED_BITS: tuple[Bits, ...] = (8, "mixed", 4)


def train_full(
    data: EncodedDataset, config: RunConfig, seed: int, progress: bool = False, checkpoint: Path | None = None
) -> Trained:
    """Train the full model of a run and record it; see `fit` for the checkpoint."""
    with peak_memory() as peak:
        model = build(config.model, data.schema, **{**config.hparams, "seed": seed})
        result = fit(model, data, config.train.replace(seed=seed), progress=progress, checkpoint=checkpoint)
    epoch_seconds = data.num_rows("train") / max(result.rows_per_second, 1e-9)
    record = make_record("full", model, data, config, result, seed, peak.bytes, epoch_seconds=epoch_seconds)
    return Trained(model, record)


def shrink(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    method: str,
    settings: dict[str, Any],
    budget: str,
    seed: int,
    progress: bool = False,
    label: str | None = None,
    unfinished: Path | None = None,
) -> Trained:
    """Search, verify, compact, retrain and quantise within one budget, and record it.

    Args:
        full: the trained full model.
        data: its data.
        config: init, bits and the settings of training are read here.
        method: name of the search method.
        settings: its settings.
        budget: such as "10%".
        seed: of the search and of retraining.
        progress: show progress bars on stderr.
        label: the record's variant, if that is not the name of the method.
        unfinished: folder for the state of search and training, from which an interrupted one of the same settings goes
            on.
    """
    bits = config.bits
    if bits == "auto":

        def shrink_to(bits: Bits) -> Trained:
            work = None if unfinished is None else unfinished / f"{bits}-bits"
            return shrink(full, data, config.replace(bits=bits), method, settings, budget, seed, progress, label, work)

        return best_precision(shrink_to)
    train = config.train.replace(seed=seed)
    found = method_named(method)
    parsed = found.parse(settings)
    task = CTRTask(full.model, data, train)
    task.progress = progress
    if unfinished is not None:
        of_search = search_settings(task, parsed, budget, seed, bits, config.target)
        claim(unfinished, {**of_search, "init": config.init})
    with peak_memory() as peak:
        plan, search_seconds, search_peak = _searched(task, parsed, budget, seed, bits, config.target, unfinished)
        verification = verify(full.model, plan, data)
        verification.require()
        small = compact(full.model, plan, init=config.init, seed=seed)
        recoded = data.recode(plan)
        checkpoint = None if unfinished is None else unfinished / "retraining.safetensors"
        result = fit(small, recoded, train, progress=progress, checkpoint=checkpoint)
        if plan.is_quantized:
            small.tables.quantize()
    record = make_record(
        label or method,
        small,
        recoded,
        config,
        result,
        seed,
        peak.bytes,
        method=method if label else None,
        search=parsed.model_dump(mode="json"),
        budget=budget,
        bits=bits,
        search_seconds=search_seconds,
        search_peak_bytes=search_peak,
        epoch_seconds=full.record.data["num_rows"]["train"] / max(full.record.rows_per_second, 1e-9),
        verification=verification,
    )
    return Trained(small, record, plan)


def allowed_bytes(full: PlanShape, config: RunConfig, budget: str | None) -> int:
    """Bytes that compact tables may take within a budget, or without one: at the fewest bits that a table may get."""
    stored = full.with_bits(4 if config.bits in ("mixed", "auto") else config.bits)
    most = stored.num_bytes(config.target)
    return most if budget is None else int(min(most, stored.max_bytes(Budget.parse(budget), config.target)))


def best_precision(shrink_to: Callable[[Bits], Trained]) -> Trained:
    """Of the compact models at 8, mixed and 4 bits the one of the best validation AUC."""
    trials: list[Trained] = []
    for bits in TRIED_BITS:
        trials.append(shrink_to(bits))
        log.info("%s bits: validation AUC %.4f", bits, trials[-1].record.valid["auc"])
    best = max(trials, key=lambda trained: trained.record.valid["auc"])
    return with_search_seconds(best, sum(t.record.search_seconds + t.record.train_seconds for t in trials))


def with_search_seconds(best: Trained, seconds: float) -> Trained:
    """The model that was kept of several, all of whose `seconds` but those of its own training were search."""
    record = best.record
    seconds -= record.train_seconds
    epochs = seconds * record.search_epochs / max(record.search_seconds, 1e-9)
    best.record = record.replace(search_seconds=seconds, search_epochs=epochs)
    return best


def search_settings(
    task: CTRTask, config: Config, budget: str, seed: int, bits: Bits, target: Target | None
) -> dict[str, Any]:
    """What a search depends on: of its unfinished state, to tell it by."""
    return {
        "method": method_of(config).name,
        **{f"search.{key}": value for key, value in config.model_dump(mode="json").items()},
        "budget": budget,
        "search_seed": seed,
        "bits": bits,
        # What earlier releases left says nothing of a vocabulary, and counted none.
        **{name: value for name, value in target_settings(budget, target).items() if value},
        **training_settings(task.model, task.data, task.config),
        "weights": checksum(task.model),
    }


def _searched(
    task: CTRTask, config: Config, budget: str, seed: int, bits: Bits, target: Target | None, unfinished: Path | None
) -> tuple[SizePlan, float, int | None]:
    """A plan, the seconds of its search, and the peak memory above the start's; out of `unfinished` if it is there."""
    if unfinished is not None:
        plan_path, cost_path = unfinished / "plan.json", unfinished / "search.json"
        if cost_path.exists():  # written last
            cost = json.loads(cost_path.read_text("utf-8"))
            return SizePlan.load(plan_path), cost["seconds"], cost["peak_bytes"]
        task.checkpoints = CheckpointFolder(unfinished, task.config.checkpoint_seconds)
    with peak_memory() as peak:
        started = time.perf_counter()
        plan = search(task, config, budget, seed, bits, target)
        seconds = time.perf_counter() - started
    if unfinished is not None:
        assert task.checkpoints is not None
        seconds += task.checkpoints.spent_seconds
        plan.save(plan_path)
        text = json.dumps({"seconds": seconds, "peak_bytes": peak.above_start})
        write_then_rename(cost_path, lambda file: file.write(text.encode()))
        for path in unfinished.glob("training-*.safetensors"):
            path.unlink()
    return plan, seconds, peak.above_start


def smallest_within(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    seed: int,
    max_loss: float,
    progress: bool = False,
    unfinished: Path | None = None,
) -> Trained:
    """The smallest plan whose validation AUC is at most `max_loss` below the full model's.

    Bisects the share of the full tables on a log scale, on the assumption that more budget does no harm; what comes
    back was measured, whether or not that holds.

    Args:
        full, data, config, seed, progress, unfinished: see `shrink`.
        max_loss: of validation AUC.

    Raises:
        BudgetError: not even the largest budget tried is within the tolerance.
    """
    seconds = 0.0
    wanted = full.record.valid["auc"] - max_loss
    low, high = SMALLEST_SHARE, 1.0
    best: Trained | None = None
    for _ in range(BISECTIONS):
        share = (low * high) ** 0.5
        budget = f"{share:.4%}"
        try:
            trained = shrink(
                full, data, config, config.method, config.search, budget, seed, progress,
                unfinished=None if unfinished is None else unfinished / budget,
            )  # fmt: skip
        except BudgetError as error:  # so small that the method keeps nothing
            log.info("budget %.2f%%: %s", share * 100, error)
            low = share
            continue
        seconds += trained.record.search_seconds + trained.record.train_seconds
        log.info("budget %.2f%%: validation AUC %.4f, wanted %.4f", share * 100, trained.record.valid["auc"], wanted)
        if trained.record.valid["auc"] >= wanted:
            best, high = trained, share
        else:
            low = share
    if best is None:
        raise EmbtrimError(
            f"no plan of method {config.method!r} up to {low:.0%} of the tables is within {max_loss} of the full model's "
            f"validation AUC {full.record.valid['auc']:.4f}; allow more loss, or name a budget"
        )
    return with_search_seconds(best, seconds)
