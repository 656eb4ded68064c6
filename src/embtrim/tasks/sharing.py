"""What the processes of one job exchange while they share a search. A Task of one process exchanges nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embtrim.plan.plan import SizePlan
from embtrim.training.settings import Optimizer


class OneProcess:
    """The exchange of a process that shares its work with no other; a Task of several processes overrides it."""

    def summed(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes that share the work."""
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum of a tensor over all processes that share the work."""
        return values

    def gathered(self, values_N: Tensor) -> Tensor:
        """The values (N,) of all processes that share the work, one after the other; N may differ."""
        return values_N

    def agreed(self, plan: SizePlan) -> SizePlan:
        """The plan that all processes take which share the search."""
        return plan

    def averaged(self, values: Tensor, batch: Any) -> Tensor:
        """Mean of values over all processes that share a step, by the weights of their batches."""
        del batch
        return values

    def average_gradients(self, optimizers: Sequence[Optimizer]) -> None:
        """Give what optimisers train the mean of the gradients of all processes that share a step."""

    def summed_parts(self, part: Tensor) -> Tensor:
        """Sum of the parts of a term of a step's loss that each process computes; its gradient is that of the own part."""
        return part

    def unshared(self, rows_U: Tensor) -> Tensor:
        """Which rows of a step's batch no process before this one reads, bool (U,)."""
        return torch.ones_like(rows_U, dtype=torch.bool)

    def place_of(self, num_samples: int) -> tuple[int, int]:
        """Number of a step's samples in the processes before this one, and in all of them."""
        return 0, num_samples


ALONE = OneProcess()
