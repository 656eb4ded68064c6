"""The one training loop, with three hooks: of zoo models and of any Task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.data.dataset import Batch
from embtrim.errors import DataError, EmbtrimError
from embtrim.system.memory import freed_pages_kept
from embtrim.system.progress import progress_bar
from embtrim.tables.row_optimizers import RowOptimizer
from embtrim.training.checkpoint import Checkpoint
from embtrim.training.devices import fast_matmul
from embtrim.training.settings import FitResult, Hooks, Optimizer, TrainConfig
from embtrim.training.state import (
    optimizer_states,
    own_values,
    random_states,
    set_optimizer_states,
    set_own_values,
    set_random_states,
    set_weights,
    weights_of,
)

log = logging.getLogger(__name__)


@dataclass
class _Position:
    """Where a training is, between two steps."""

    epoch: int = 1
    batches: int = 0
    rows: int = 0
    total_loss: float = 0.0
    epoch_seconds: float = 0.0
    step: int = 0
    stopped: bool = False
    bad_epochs: int = 0
    factor: float = 1.0
    train_seconds: float = 0.0
    train_rows: int = 0

    def next_epoch(self) -> None:
        self.epoch, self.batches, self.rows, self.total_loss, self.epoch_seconds = self.epoch + 1, 0, 0, 0.0, 0.0


def train_loop(
    model: nn.Module,
    *,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Callable[[int, int], Iterable[Any]],
    num_rows: int | None,
    optimizers: Sequence[Optimizer],
    score: Callable[[], float] | None,
    config: TrainConfig,
    hooks: Hooks,
    monitor: str = "score",
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """The one training loop: of zoo models (`fit`) and of any Task.

    Args:
        model: trained in place.
        loss: mean loss of a batch, a scalar tensor.
        batches: (epoch from 1, number of batches to skip) -> the batches of an epoch.
        num_rows: rows an epoch, if known; for the progress bar.
        optimizers: stepped together; those over tables are detached at the end.
        score: validation score, higher is better; None trains all epochs.
        config: epochs, patience, reduce_lr, precision and seed are read here; and whether the first step compiles.
        hooks: see Hooks.
        monitor: what the score is, for the progress bar.
        progress: show a progress bar.
        checkpoint: where the state is kept, if anywhere.
    """
    optimizers = [*optimizers, *(hooks.param_groups(model) if hooks.param_groups else ())]
    result, at = FitResult(), _Position()
    best_state: dict[str, Tensor] | None = None
    started, compiles = time.perf_counter(), config.compile
    device = next(iter(model.parameters())).device
    forked = [device] if device.type == "cuda" else []
    saved = None if checkpoint is None else checkpoint.load()
    with (
        fast_matmul(config.precision, device) as (autocast, result.precision),
        freed_pages_kept(),
        torch.random.fork_rng(forked),
        released(optimizers, model),
    ):
        torch.manual_seed(config.seed)
        epoch_random = random_states(device)  # a loader may draw the order of its batches from these
        if saved is not None:
            result, at, best_state = FitResult(**saved["result"]), _Position(**saved["position"]), saved["best_state"]
            result.restored_seconds = result.seconds
            started -= result.seconds
            set_weights(model, saved["weights"])
            set_own_values(optimizers, model, saved["own_values"])
            if hooks.state is not None:
                hooks.state.load_state_dict(saved["hooks_state"])
            if not saved["ended"]:
                set_optimizer_states(optimizers, saved["optimizers"])
                epoch_random = saved["epoch_random"]

        def write(ended: bool = False) -> None:
            assert checkpoint is not None
            result.seconds = time.perf_counter() - started
            state = {
                "ended": ended,
                "weights": weights_of(model),
                "own_values": own_values(optimizers, model),
                "result": vars(result),
                "position": vars(at),
                "best_state": None if ended else best_state,
                "hooks_state": None if hooks.state is None else hooks.state.state_dict(),
            }
            if not ended:
                state["optimizers"] = optimizer_states(optimizers)
                state["epoch_random"] = epoch_random
                state["random"] = random_states(device, hooks.generators)
            checkpoint.save(state)

        with progress_bar(progress) as bar:
            task = bar.add_task(f"epoch {at.epoch}", total=num_rows)
            while saved is None or not saved["ended"]:
                if at.stopped or at.epoch > config.epochs:
                    break
                model.train()
                bar.reset(task, total=num_rows, completed=at.rows)
                epoch_started = time.perf_counter() - at.epoch_seconds
                total_loss = torch.full((), at.total_loss, device=device)
                # Here, not where the last epoch ended: a loader of the validation rows may draw, too.
                if saved is not None:
                    set_random_states(epoch_random, device)
                else:
                    epoch_random = random_states(device)
                found = iter(batches(at.epoch, at.batches))
                if saved is not None:
                    set_random_states(saved["random"], device, hooks.generators)
                    saved = None
                for batch in found:
                    step_started = time.perf_counter()
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    with autocast():
                        batch_loss = loss(model, batch)
                    if hooks.extra_loss is not None:
                        batch_loss = batch_loss + hooks.extra_loss(model, batch)
                    batch_loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
                    if compiles:
                        compiles, step_seconds = False, time.perf_counter() - step_started
                        result.compile_seconds += step_seconds
                        epoch_started += step_seconds
                        at.train_rows -= len(batch)
                    at.step += 1
                    total_loss += batch_loss.detach()
                    at.batches += 1
                    at.rows += len(batch) if isinstance(batch, Batch) else 0
                    bar.advance(task, len(batch) if hasattr(batch, "__len__") else 1)
                    at.stopped = hooks.on_step is not None and bool(hooks.on_step(at.step))
                    if at.stopped:
                        break
                    if checkpoint is not None and checkpoint.is_due:
                        at.total_loss, at.epoch_seconds = float(total_loss), time.perf_counter() - epoch_started
                        write()
                if at.batches == 0:
                    raise DataError("there are no training rows")
                seconds = time.perf_counter() - epoch_started
                at.train_seconds, at.train_rows = at.train_seconds + seconds, at.train_rows + at.rows
                mean_loss = float(total_loss) / at.batches
                if not np.isfinite(mean_loss):
                    raise EmbtrimError(f"training loss is {mean_loss} in epoch {at.epoch}; lower learning_rate")
                record = {"epoch": at.epoch, "loss": mean_loss, "lr_factor": at.factor, "seconds": seconds}
                result.history.append(record)
                epoch = at.epoch
                at.next_epoch()
                if score is None:
                    result.best_epoch = epoch
                    continue
                record["score"] = score()
                bar.update(task, description=f"epoch {epoch + 1} (valid {monitor} {abs(record['score']):.4f})")
                if result.best_score is None or record["score"] > result.best_score:
                    result.best_score, result.best_epoch, at.bad_epochs = record["score"], epoch, 0
                    best_state = {name: value.detach().clone() for name, value in model.state_dict().items()}
                    continue
                at.bad_epochs += 1
                if config.patience and at.bad_epochs >= config.patience:
                    break
                at.factor *= config.reduce_lr
                scale_learning_rates(optimizers, config.reduce_lr)
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    if saved is not None:  # it had ended before
        return result
    result.seconds = time.perf_counter() - started
    result.rows_per_second = at.train_rows / max(at.train_seconds, 1e-9)
    if checkpoint is not None:
        write(ended=True)
    # Trainings inside a search, which stop at no score, are many.
    level = logging.DEBUG if score is None else logging.INFO
    log.log(level, "trained %d epochs in %.1f s (%s)", len(result.history), result.seconds, result.precision)
    return result


@contextmanager
def released(optimizers: Sequence[Optimizer], model: nn.Module) -> Iterator[None]:
    """Leave the model to others after a `with` block, also where it was interrupted: no table is owned, no gradient kept."""
    try:
        yield
    finally:
        for optimizer in optimizers:
            if isinstance(optimizer, RowOptimizer):
                optimizer.detach()
        for parameter in model.parameters():
            parameter.grad = None


def scale_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply every learning rate by `factor`."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            for group in optimizer.param_groups:
                group["lr"] *= factor
        else:
            optimizer.lr *= factor  # type: ignore[attr-defined]
