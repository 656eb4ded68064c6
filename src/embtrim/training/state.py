"""The state of a training: weights, optimisers and random sources, read and put back."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from embtrim.tables.row_optimizers import RowOptimizer


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as they are, decay that is owed not settled; no copies."""
    return {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def checksum(model: nn.Module) -> int:
    """CRC-32 of the weights: the same on every machine and for any number of threads."""
    found = 0
    for value in weights_of(model).values():
        whole = torch.empty(value.shape, dtype=value.dtype).copy_(value)  # an expanded one has strides of zero
        found = zlib.crc32(whole.view(-1).view(torch.uint8).numpy().data, found)
    return found


@torch.no_grad()
def set_weights(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put back what `weights_of` gave."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        value.copy_(values[name])


def own_values(optimizers: Sequence[Any], model: nn.Module) -> list[torch.Tensor]:
    """What optimisers train beside the model: parameters of a search."""
    inside = {id(p) for p in model.parameters()}
    groups = [group for o in optimizers if isinstance(o, torch.optim.Optimizer) for group in o.param_groups]
    return [p.detach() for group in groups for p in group["params"] if id(p) not in inside]


@torch.no_grad()
def set_own_values(optimizers: Sequence[Any], model: nn.Module, values: Sequence[torch.Tensor]) -> None:
    """Put back what `own_values` gave."""
    for target, value in zip(own_values(optimizers, model), values, strict=True):
        target.copy_(value)


def optimizer_states(optimizers: Sequence[Any]) -> list[dict[str, Any]]:
    """The state of each optimiser."""
    return [o.owing_state() if isinstance(o, RowOptimizer) else o.state_dict() for o in optimizers]


def set_optimizer_states(optimizers: Sequence[Any], states: Sequence[dict[str, Any]]) -> None:
    """Put back what `optimizer_states` gave."""
    for optimizer, state in zip(optimizers, states, strict=True):
        if isinstance(optimizer, RowOptimizer):
            optimizer.load_owing_state(state)
        else:
            optimizer.load_state_dict(state)


def random_states(device: torch.device, generators: Sequence[torch.Generator] = ()) -> list[torch.Tensor]:
    """States of torch's random sources (CPU, and the device's own), then of the generators given."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states + [generator.get_state() for generator in generators]


def set_random_states(
    states: Sequence[torch.Tensor], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> None:
    """Put back what `random_states` gave."""
    first, *more = states
    torch.set_rng_state(first)
    if device.type == "cuda":
        torch.cuda.set_rng_state(more.pop(0), device)
    for generator, state in zip(generators, more, strict=True):
        generator.set_state(state)
