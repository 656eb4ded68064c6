"""Gradients of a loss by the rows that a batch reads, through gates that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from embtrim.tables.embedding_tables import RowGate
from embtrim.tasks.sites import Site, gate_sites
from embtrim.training.evaluation import check_finite

# Number of a site, distinct rows of it (U,) in ascending order, and their gradients (U, D).
RowGradients = tuple[int, Tensor, Tensor]


def row_gradients(sites: Sequence[Site], loss_of: Callable[[], Tensor], place: int) -> list[RowGradients]:
    """Gradients of a loss by the rows that it reads.

    Args:
        sites: Sites of the model.
        loss_of: Computes the loss.
        place: Number of the validation batch, for messages.
    """
    leaves: list[RowGradients] = []
    with torch.enable_grad(), gate_sites(sites, rows=[_recorded(n, leaves) for n in range(len(sites))]):
        loss = loss_of()
    check_finite(loss, "loss", "valid", place)
    gradients = torch.autograd.grad(loss, [leaf for *_, leaf in leaves], allow_unused=True)
    found = []
    for (number, rows_U, _), gradient_UD in zip(leaves, gradients, strict=True):
        if gradient_UD is not None:
            check_finite(gradient_UD, "gradient by the embeddings", "valid", place)
            found.append((number, rows_U, gradient_UD))
    return found


def _recorded(number: int, leaves: list[RowGradients]) -> RowGate:
    """A row gate that changes nothing and notes the rows read, with a leaf whose gradient is that of their embeddings."""

    def gate(rows_U: Tensor, found_UD: Tensor) -> Tensor:
        leaf = torch.zeros_like(found_UD, requires_grad=True)
        leaves.append((number, rows_U, leaf))
        return found_UD.detach() + leaf

    return gate
