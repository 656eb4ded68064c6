"""Estimates for dry runs: ranges of time, memory and disk, from a few measured steps of the model on the data.

The least time takes training to stop as early as it can, the most time takes it to use all epochs. The first is what the
quickest step gives, the second what the slowest one gives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from embtrim.data.dataset import EncodedDataset
from embtrim.experiments.settings import RunConfig, check_run, method_config, split_control, starts_of
from embtrim.experiments.steps import FINISHING_EPOCHS
from embtrim.experiments.sweep import sweep_passes
from embtrim.experiments.tolerance import BISECTIONS, MOST_TRAININGS
from embtrim.methods import method_named
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.budget import Budget
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.system.memory import peak_memory
from embtrim.training.devices import device_of, fast_matmul
from embtrim.training.evaluation import logloss_of_batch, rows_per_batch
from embtrim.training.fitting import make_optimizers
from embtrim.training.settings import TrainConfig

# Training steps and batches of forward passes that an estimate times, each after one that warms up.
TIMED_STEPS, TIMED_PASSES = 8, 2
# A machine that is shared slows down by about so much for a while; steps of a compact model take at least this part of the
# full model's; writing and reading files, seconds of a model.
SLOWER, COMPACT_PART, FILE_SECONDS = 1.5, 0.3, 2.0
# Weights of the full model that are in memory at once beside those of its training, at most: the best ones, a copy that
# searches, two in float64 that verify, and the compact model with its optimisers.
MORE_COPIES, MORE_BYTES = 8, 256 << 20


@dataclass(frozen=True)
class Range:
    """The least and the most that something may take."""

    least: float
    most: float

    def __add__(self, other: Range) -> Range:
        return Range(self.least + other.least, self.most + other.most)

    def __mul__(self, other: Range) -> Range:
        return Range(self.least * other.least, self.most * other.most)

    def to_dict(self, digits: int | None = None) -> dict[str, float]:
        """The range as JSON-able values, rounded to so many digits; to whole numbers with None."""
        return {"least": round(self.least, digits), "most": round(self.most, digits)}


ZERO = Range(0.0, 0.0)


@dataclass(frozen=True)
class Measured:
    """What a few steps of a full model took.

    Attributes:
        step: Seconds of a training step, the quickest and the slowest one.
        row: Seconds of a row in a forward pass.
        peak_bytes: Anonymous memory of this process at the peak; 0 where the system does not tell.
        model_bytes: Bytes of the model's weights.
    """

    step: Range
    row: Range
    peak_bytes: int
    model_bytes: int

    def epochs(self, data: EncodedDataset, train: TrainConfig, count: Range, share: float = 1.0) -> Range:
        """Seconds of so many epochs with their validation.

        Args:
            data: The data.
            train: Settings of training.
            count: Number of epochs.
            share: Share of the training rows that an epoch reads.
        """
        steps = max(1, round(share * data.num_batches("train", train.batch_size)))
        valid = data.num_rows("valid") if "valid" in data.splits else 0
        return count * (self.step * Range(steps, steps) + self.row * Range(valid, valid))


def measure(model: CTRModel, data: EncodedDataset, train: TrainConfig) -> Measured:
    """Time a few training steps and forward passes of a model; its weights change a little."""
    device = device_of(train)
    model.to(device).train()
    with peak_memory() as peak:
        optimizers, steps, rows = make_optimizers(model, train), [], []
        with fast_matmul(train.precision, device) as (autocast, _):
            for batch in islice(data.batches("train", train.batch_size), TIMED_STEPS + 1):
                started = time.perf_counter()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                with autocast():
                    loss = logloss_of_batch(model, batch.to(device))
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                float(loss.detach())  # waits for a GPU
                steps.append(time.perf_counter() - started)
        model.eval()
        with torch.no_grad(), fast_matmul("fp32", device):
            for batch in islice(data.batches("train", rows_per_batch(device)), TIMED_PASSES + 1):
                started = time.perf_counter()
                batch = batch.to(device)
                float(model(batch.ids_BC, batch.dense_BE).sum())
                rows.append((time.perf_counter() - started) / len(batch))
    steps, rows = steps[1:] or steps, rows[1:] or rows
    return Measured(
        Range(min(steps), SLOWER * max(steps)),
        Range(min(rows), SLOWER * max(rows)),
        peak.bytes or 0,
        sum(value.nbytes for value in model.state_dict().values()),
    )


def dry_run(data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """Estimate a run: its resolved settings, table bytes before and after, and ranges of its time, memory and disk."""
    check_run(data, config)
    config = config.replace(bits=config.stored_bits)
    model = build(config.model, data.schema, **config.hparams)
    full, measured = model.tables.plan, measure(model, data, config.train)
    shrunk = [config]
    for control in config.controls:
        name, bits = split_control(control)  # a control has settings of its own: the defaults
        own = {"search": {}, "bits": bits or config.bits, "budget": config.limit or "100%", "max_loss": None}
        shrunk.append(config.replace(method=name, **own))
    seconds = sum((compact_seconds(measured, data, each) for each in shrunk), full_seconds(measured, data, config))
    seeds = Range(config.seeds, config.seeds)
    allowed = [_bytes_of_search(full, each, config.limit)["table_bytes_allowed"] for each in shrunk]
    return {
        "config": resolved(config, model),
        **_bytes_of_search(full, config, config.limit),
        "seconds_per_step": measured.step.to_dict(4),
        "seconds": (seconds * seeds).to_dict(1),
        "memory_bytes": memory_bytes(measured).to_dict(),
        "disk_bytes": (disk_bytes(measured, data, full, allowed) * seeds + unfinished_bytes(measured)).to_dict(),
    }


def resolved(config: RunConfig, model: CTRModel) -> dict[str, Any]:
    """All settings of a run, with those that the model and the search method take by default."""
    values = config.model_dump(mode="json")
    return {**values, "hparams": dict(model.hparams), "search": method_config(config).model_dump(mode="json")}


def estimate_training(data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """Estimate the training of a full model: its table bytes, and ranges of its time, memory and disk."""
    config = config.replace(train=config.train.replace(embedding_l2=config.train.embedding_l2 or 0.0))
    model = build(config.model, data.schema, **{**config.hparams, "seed": config.seed})
    measured = measure(model, data, config.train)
    return {
        "config": resolved(config, model),
        "table_bytes": model.tables.plan.num_bytes(),
        "seconds_per_step": measured.step.to_dict(4),
        "seconds": full_seconds(measured, data, config).to_dict(1),
        "memory_bytes": memory_bytes(measured).to_dict(),
        "disk_bytes": (disk_bytes(measured, data, model.tables.plan, ()) + unfinished_bytes(measured)).to_dict(),
    }


def estimate_search(model: CTRModel, data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """Estimate a search in a trained full model: table bytes before and allowed, and the time of an epoch."""
    return {**_bytes_of_search(model.tables.plan, config, config.limit), **_epoch(model, data, config)}


def estimate_curve(model: CTRModel, data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """Estimate a curve: bytes of the full tables, and the time of an epoch, which is more than the model's readings take."""
    return {"table_bytes": model.tables.plan.num_bytes(config.target), **_epoch(model, data, config)}


def estimate_compacting(
    model: CTRModel, plan: SizePlan, data: EncodedDataset, config: RunConfig, retrain: bool = True
) -> dict[str, Any]:
    """Estimate the use of a plan: table bytes before and after, and a range of the time of retraining."""
    facts: dict[str, Any] = {
        "table_bytes_before": model.tables.plan.num_bytes(plan.target),
        "table_bytes_after": plan.num_bytes(plan.target),
    }
    if retrain:
        measured = measure(model, data, config.train)
        facts["seconds"] = retraining_seconds(measured, data, config, plan.is_quantized).to_dict(1)
    return facts


# --- parts of an estimate -------------------------------------------------------------------------------------------


def epochs_of(train: TrainConfig) -> Range:
    """Epochs of a training: early stopping ends it after `patience` worse ones, at the soonest."""
    return Range(min(train.epochs, 1 + train.patience) if train.patience else train.epochs, train.epochs)


def full_seconds(measured: Measured, data: EncodedDataset, config: RunConfig) -> Range:
    """Seconds of a full model: the sweep of `embedding_l2` unless it is given, training and evaluation."""
    seconds = (
        Range(0.0, FILE_SECONDS) + measured.epochs(data, config.train, epochs_of(config.train)) + _tests(measured, data)
    )
    if config.train.embedding_l2 is None:
        share, least, most = sweep_passes(data, config)
        seconds += measured.epochs(data, config.train, Range(least, most), share)
    return seconds


def compact_seconds(measured: Measured, data: EncodedDataset, config: RunConfig) -> Range:
    """Seconds of the models that a search method takes in a run: searches, retraining and verification."""
    trained = len(starts_of(config)) if config.method == "guided" else 1
    if config.max_loss is not None:
        trained *= MOST_TRAININGS if config.method == "guided" else BISECTIONS
    settings = method_config(config).model_dump()
    own = float(settings.get("epochs", 0)) + float(settings.get("warmup_epochs", 0))
    needs_model = method_named(config.method).needs != "nothing"
    # A pass at most beside the epochs of a method, which may take twice as long with gates; another one verifies.
    search = measured.epochs(data, config.train, Range(own, 2 * own + needs_model + 1.0))
    one = search + retraining_seconds(measured, data, config, config.stored_bits != 32)
    return Range(1, trained) * one


def retraining_seconds(measured: Measured, data: EncodedDataset, config: RunConfig, quantized: bool) -> Range:
    """Seconds of a compact model's training, with the teacher's predictions and the training of its codes."""
    epochs = epochs_of(config.train)
    if config.teacher:
        rows = data.num_rows("train")
        if quantized:
            finishing = epochs_of(config.train.replace(epochs=min(FINISHING_EPOCHS, config.train.epochs)))
            epochs += finishing
        lesson = measured.row * Range(rows, rows)
    else:
        lesson = ZERO
    training = measured.epochs(data, config.train, epochs) * Range(COMPACT_PART, 1.0)
    return training + lesson + _tests(measured, data) + Range(0.0, FILE_SECONDS)


def memory_bytes(measured: Measured) -> Range:
    """Anonymous memory of a process that trains, searches and verifies; memory-mapped data do not count."""
    return Range(measured.peak_bytes, measured.peak_bytes + MORE_COPIES * measured.model_bytes + MORE_BYTES)


def disk_bytes(measured: Measured, data: EncodedDataset, full: PlanShape, allowed: Iterable[int]) -> Range:
    """Bytes of the bundles of a full model and of compact ones.

    Args:
        measured: Bytes of the full model.
        data: Data with the vocabulary that every bundle holds at most.
        full: Sizes of the full tables.
        allowed: Most bytes of the tables of each compact model.
    """
    if data.folder is None:
        return ZERO  # data made in memory have no bundles
    vocabulary = sum(path.stat().st_size for path in data.folder.glob("*.parquet"))
    dense = max(0, measured.model_bytes - full.num_bytes())
    compact = [Range(0.5 * dense, dense + most + vocabulary) for most in allowed]
    whole = Range(measured.model_bytes, measured.model_bytes) + Range(vocabulary, vocabulary)
    return sum(compact, whole) * Range(1.0, 1.1)


def unfinished_bytes(measured: Measured) -> Range:
    """Bytes of a checkpoint, which is there while a model trains: weights, the best ones, and two moments of each."""
    return Range(0, 4 * measured.model_bytes)


def _tests(measured: Measured, data: EncodedDataset) -> Range:
    rows = sum(data.num_rows(name) for name in ("valid", "test") if name in data.splits)
    return measured.row * Range(rows, rows)


def _epoch(model: CTRModel, data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    measured = measure(model, data, config.train)
    return {"seconds_per_epoch": measured.epochs(data, config.train, Range(1, 1)).to_dict(1)}


def _bytes_of_search(full: PlanShape, config: RunConfig, budget: Budget | None) -> dict[str, int]:
    """Table bytes before a search, and those that a budget allows; without a budget, at the fewest bits per value."""
    stored = full.with_bits(4 if config.stored_bits == "mixed" else config.stored_bits)
    most = stored.num_bytes(config.target)
    allowed = most if budget is None else int(min(most, stored.max_bytes(budget, config.target)))
    return {"table_bytes_before": full.num_bytes(config.target), "table_bytes_allowed": allowed}
