"""The state of a training: its position and result, and weights, optimiser and random states, read and set."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from embtrim.tables.row_optimizers import RowOptimizer
from embtrim.training.callbacks import Callback
from embtrim.training.settings import FitResult, Hooks, Optimizer, TrainConfig


@dataclass(frozen=True)
class Training:
    """What the training loop trains, and how.

    Attributes:
        model: The model, trained in place.
        loss: (model, batch) -> mean loss of the batch, a scalar tensor.
        batches: (epoch from 1, number of batches to skip) -> batches of the epoch.
        optimizers: Optimisers that step together.
        config: Settings of the loop. It reads epochs, patience, reduce_lr, precision, seed and compile.
        hooks: Additions of a search method.
        score: Gives the validation score, higher is better; None trains all epochs.
        monitor: Name of the score in the progress bar.
        num_rows: Rows per epoch for the progress bar, or None where unknown.
        callbacks: Objects that are told of each epoch.
        after_backward: Called with the optimisers between the backward pass and their step; None does nothing.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[int, int], Iterable[Any]]
    optimizers: Sequence[Optimizer]
    config: TrainConfig
    hooks: Hooks
    score: Callable[[], float] | None = None
    monitor: str = "score"
    num_rows: int | None = None
    callbacks: Sequence[Callback] = ()
    after_backward: Callable[[Sequence[Optimizer]], None] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(iter(self.model.parameters())).device


@dataclass
class Position:
    """Where a training stands between two steps. Checkpoints store these attributes by name.

    Attributes:
        epoch: Current epoch, from 1.
        batches: Batches of the epoch done.
        rows: Rows of the epoch done.
        total_loss: Sum of the losses of these batches.
        epoch_seconds: Seconds spent in the epoch.
        step: Steps done in all epochs.
        stopped: Whether a hook has ended the training.
        score_to_beat: Score of the last epoch that counted as an improvement; None before the first.
        bad_epochs: Epochs since then.
        factor: Product of all reductions of the learning rate.
        train_seconds: Seconds of all finished epochs, without validation.
        train_rows: Rows of all finished epochs.
    """

    epoch: int = 1
    batches: int = 0
    rows: int = 0
    total_loss: float = 0.0
    epoch_seconds: float = 0.0
    step: int = 0
    stopped: bool = False
    score_to_beat: float | None = None
    bad_epochs: int = 0
    factor: float = 1.0
    train_seconds: float = 0.0
    train_rows: int = 0

    def start_next_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.epoch, self.batches, self.rows, self.total_loss, self.epoch_seconds = self.epoch + 1, 0, 0, 0.0, 0.0


@dataclass
class TrainingState:
    """How far a training has come.

    Attributes:
        compiles: Whether the next step compiles the model.
        started: Time at which the training would have started had it never been interrupted, by `time.perf_counter`.
        result: What `fit` returns.
        position: Where the training stands.
        best_weights: State dict of the best epoch; None without a score, and after a last epoch that is the best.
        epoch_random: Random states at the start of the epoch.
        restored_random: Random states of a checkpoint, until the first step after it.
        had_ended: Whether the checkpoint holds the result of a finished training.
    """

    compiles: bool = False
    started: float = field(default_factory=time.perf_counter)
    result: FitResult = field(default_factory=FitResult)
    position: Position = field(default_factory=Position)
    best_weights: dict[str, Tensor] | None = None
    epoch_random: list[Tensor] = field(default_factory=list)
    restored_random: list[Tensor] | None = None
    had_ended: bool = False


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, without copies. Rows keep the decay that they still owe."""
    return {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def checksum(model: nn.Module) -> int:
    """CRC-32 of the weights; the same on every machine and for any number of threads."""
    found = 0
    for value in weights_of(model).values():
        whole = torch.empty(value.shape, dtype=value.dtype).copy_(value)  # an expanded tensor has strides of zero
        found = zlib.crc32(whole.view(-1).view(torch.uint8).numpy().data, found)
    return found


@torch.no_grad()
def set_weights(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set the weights that `weights_of` gave."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        _set(value, values[name])


def check_weights(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Raise KeyError or ValueError unless these are all weights of the model's state dict, by name and shape."""
    held, given = weights_of(model), dict(values.items())
    if missing := sorted(model.state_dict().keys() - given.keys()):
        raise KeyError(missing[0])
    for name, value in given.items():
        _check_shape(held[name], value)


def _set(target: torch.Tensor, value: torch.Tensor) -> None:
    _check_shape(target, value)
    target.copy_(value)


def _check_shape(target: torch.Tensor, value: torch.Tensor) -> None:
    if target.shape != value.shape:  # which `copy_` would stretch
        raise ValueError(f"a weight of shape {tuple(value.shape)} stands where {tuple(target.shape)} is needed")


def own_values(optimizers: Sequence[Any], model: nn.Module) -> list[torch.Tensor]:
    """Parameters that optimisers train beside the model, such as those of a search."""
    inside = {id(p) for p in model.parameters()}
    groups = [group for o in optimizers if isinstance(o, torch.optim.Optimizer) for group in o.param_groups]
    return [p.detach() for group in groups for p in group["params"] if id(p) not in inside]


@torch.no_grad()
def set_own_values(optimizers: Sequence[Any], model: nn.Module, values: Sequence[torch.Tensor]) -> None:
    """Set the parameters that `own_values` gave."""
    for target, value in zip(own_values(optimizers, model), values, strict=True):
        _set(target, value)


def optimizer_states(optimizers: Sequence[Any]) -> list[dict[str, Any]]:
    """State of each optimiser."""
    return [o.owing_state() if isinstance(o, RowOptimizer) else o.state_dict() for o in optimizers]


def set_optimizer_states(optimizers: Sequence[Any], states: Sequence[dict[str, Any]]) -> None:
    """Set the states that `optimizer_states` gave."""
    for optimizer, state in zip(optimizers, states, strict=True):
        if isinstance(optimizer, RowOptimizer):
            optimizer.load_owing_state(state)
        else:
            optimizer.load_state_dict(state)


def random_states(device: torch.device, generators: Sequence[torch.Generator] = ()) -> list[torch.Tensor]:
    """States of torch's random generators (the CPU's, and a CUDA device's), then of the given ones."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states + [generator.get_state() for generator in generators]


def set_random_states(
    states: Sequence[torch.Tensor], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> None:
    """Set the states that `random_states` gave."""
    first, *more = states
    torch.set_rng_state(first)
    if device.type == "cuda":
        torch.cuda.set_rng_state(more.pop(0), device)
    for generator, state in zip(generators, more, strict=True):
        generator.set_state(state)
