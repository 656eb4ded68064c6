"""Estimates for dry runs: table bytes before and after, and the longest time that the work may take."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

from embtrim.data.dataset import EncodedDataset
from embtrim.experiments.settings import RunConfig, check_run, split_control, starts_of
from embtrim.experiments.tolerance import BISECTIONS, MOST_TRAININGS
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.budget import Budget
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.training.devices import device_of, fast_matmul
from embtrim.training.evaluation import logloss_of_batch
from embtrim.training.fitting import make_optimizers
from embtrim.training.settings import TrainConfig

# Training steps that an estimate times, after one that warms up.
TIMED_STEPS = 5


def dry_run(data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """Estimate a run: its resolved settings, table bytes before and after, and its longest time.

    A few training steps of the full model are timed. The longest time assumes that every model trains all epochs; early
    stopping usually ends training well before.
    """
    check_run(data, config)
    config = config.replace(bits=config.stored_bits)
    model = build(config.model, data.schema, **config.hparams)
    # A control has settings of its own: the defaults.
    runs = [config, *(config.replace(search={}) for _ in config.controls)]
    methods = [config.method, *(split_control(control)[0] for control in config.controls)]
    models = 1 + sum(len(starts_of(run)) if name == "guided" else 1 for name, run in zip(methods, runs, strict=True))
    models += 0 if config.max_loss is None else (MOST_TRAININGS if config.method == "guided" else BISECTIONS) - 1
    training = longest_training(model, data, config.train)
    return {
        "config": config.model_dump(mode="json"),
        **_bytes_of_search(model.tables.plan, config, config.limit),
        "seconds_per_step": training["seconds_per_step"],
        "seconds_at_most": training["seconds_at_most"] * models * config.seeds,
    }


def estimate_training(data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """Estimate the training of a full model: its table bytes and its longest time."""
    model = build(config.model, data.schema, **{**config.hparams, "seed": config.seed})
    return {"table_bytes": model.tables.plan.num_bytes(), **longest_training(model, data, config.train)}


def estimate_search(model: CTRModel, data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """Estimate a search in a trained full model: table bytes before and allowed, and the time of an epoch."""
    epoch = longest_training(model, data, config.train.replace(epochs=1))
    return {
        **_bytes_of_search(model.tables.plan, config, config.limit),
        "seconds_per_epoch": epoch["seconds_at_most"],
    }


def estimate_curve(model: CTRModel, data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """Estimate a curve: bytes of the full tables, and the time of an epoch, which is more than the model's readings take."""
    epoch = longest_training(model, data, config.train.replace(epochs=1))
    return {"table_bytes": model.tables.plan.num_bytes(config.target), "seconds_per_epoch": epoch["seconds_at_most"]}


def estimate_compacting(
    model: CTRModel, plan: SizePlan, data: EncodedDataset, config: RunConfig, retrain: bool = True
) -> dict[str, Any]:
    """Estimate the use of a plan: table bytes before and after, and the longest time of retraining."""
    return {
        "table_bytes_before": model.tables.plan.num_bytes(plan.target),
        "table_bytes_after": plan.num_bytes(plan.target),
        **(longest_training(model, data, config.train) if retrain else {}),
    }


def longest_training(model: CTRModel, data: EncodedDataset, train: TrainConfig) -> dict[str, float]:
    """Seconds of a training step, and of training for all epochs; early stopping usually ends well before."""
    step = seconds_per_step(model, data, train)
    steps = data.num_batches("train", train.batch_size) * train.epochs
    return {"seconds_per_step": step, "seconds_at_most": step * steps}


def _bytes_of_search(full: PlanShape, config: RunConfig, budget: Budget | None) -> dict[str, int]:
    """Table bytes before a search, and those that a budget allows; without a budget, at the fewest bits per value."""
    stored = full.with_bits(4 if config.stored_bits == "mixed" else config.stored_bits)
    most = stored.num_bytes(config.target)
    allowed = most if budget is None else int(min(most, stored.max_bytes(budget, config.target)))
    return {"table_bytes_before": full.num_bytes(config.target), "table_bytes_allowed": allowed}


def seconds_per_step(model: CTRModel, data: EncodedDataset, train: TrainConfig) -> float:
    """Median wall time of a few training steps of a model; its weights change a little."""
    device = device_of(train)
    model.to(device).train()
    optimizers = make_optimizers(model, train)
    seconds = []
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
            seconds.append(time.perf_counter() - started)
    timed = sorted(seconds[1:] or seconds)
    return timed[len(timed) // 2]
