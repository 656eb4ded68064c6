"""What a run would take: bytes before and after, and an estimate of its longest time."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

from embtrim.data.dataset import EncodedDataset
from embtrim.experiments.run import check_run
from embtrim.experiments.settings import RunConfig
from embtrim.experiments.steps import BISECTIONS, TRIED_BITS, allowed_bytes
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.training.devices import device_of, fast_matmul
from embtrim.training.evaluation import logloss_of_batch
from embtrim.training.fitting import make_optimizers
from embtrim.training.settings import TrainConfig

# Steps timed for the estimate of a dry run, after one that warms up.
TIMED_STEPS = 5


def dry_run(data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """What a run would do: the resolved settings, bytes before and after, and an estimate of its longest time.

    The estimate times a few training steps of the full model and assumes every model trains all epochs; early stopping
    usually ends well before.
    """
    check_run(data, config)
    model = build(config.model, data.schema, **config.hparams)
    plan = model.tables.plan
    step_seconds = seconds_per_step(model, data, config.train)
    models = len(dict.fromkeys((config.method, *config.controls)))
    models += 0 if config.max_loss is None else BISECTIONS - 1
    models = 1 + models * (len(TRIED_BITS) if config.bits == "auto" else 1)
    steps = data.num_batches("train", config.train.batch_size) * config.train.epochs
    return {
        "config": config.model_dump(mode="json"),
        "table_bytes_before": plan.num_bytes(config.target),
        "table_bytes_allowed": allowed_bytes(plan, config, None if config.max_loss is not None else config.budget),
        "seconds_per_step": step_seconds,
        "seconds_at_most": step_seconds * steps * models * config.seeds,
    }


def seconds_per_step(model: CTRModel, data: EncodedDataset, train: TrainConfig) -> float:
    """Wall time of one training step of a model, the median of a few; moves its weights a little."""
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
            float(loss.detach())  # a GPU is waited for
            seconds.append(time.perf_counter() - started)
    timed = sorted(seconds[1:] or seconds)
    return timed[len(timed) // 2]
