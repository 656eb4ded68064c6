"""A model of clicks as a stranger might write it, and its task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from embtrim.tasks.task import Task

WIDTH = 4


class Clicks(nn.Module):
    """Three fields, of which the last is noise."""

    def __init__(self, embedding: Callable[[int, int], nn.Module] = nn.Embedding) -> None:
        super().__init__()
        self.user, self.item, self.noise = (embedding(50, WIDTH) for _ in range(3))
        self.head = nn.Linear(3 * WIDTH, 1)

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) logits."""
        fields = (self.user, self.item, self.noise)
        return self.head(torch.cat([field(ids_BC[:, n]) for n, field in enumerate(fields)], 1)).squeeze(1)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(5):
        ids_BC = torch.randint(50, (64, 3), generator=generator)
        found.append((ids_BC, ((ids_BC[:, 0] % 2) ^ (ids_BC[:, 1] % 2)).float()))
    return found


def task_of(model: nn.Module, loss: Callable[..., Any] = loss_of, **given: Any) -> Task:
    rows = batches()
    makes = {"optimizer": lambda m: torch.optim.Adam(m.parameters(), 0.01), "fresh": lambda seed: copy.deepcopy(model)}
    return Task(model, loss, rows[:4], rows[4:], **{**makes, **given})


def clicks(make: Callable[[], nn.Module] = Clicks) -> nn.Module:
    torch.manual_seed(0)
    return make()


class InLightning(nn.Module):
    """A module that holds the model in an attribute, as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BC: Tensor) -> Tensor:
        return self.model(ids_BC)
