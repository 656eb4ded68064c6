"""Sensitivity: how much the loss of a trained model feels errors in the embeddings of each table.

    G_f = 1/N sum_b g_b g_b^T,   g_b = dl_b / de_b                    (D x D)

g_b is the gradient of one sample's loss with respect to the embedding that the sample reads from table f. G_f is the
empirical Fisher matrix of the embedding, averaged over N validation rows: an error d of the embedding costs about
d^T G_f d / 2 in mean loss, to second order, where the trained model has no gradient on average.

The gradients are read row by row of a table, summed over the samples of a batch that read the row. Gradients of different
samples are uncorrelated at an optimum, so the square of the sum is the sum of the squares on average.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from embtrim.errors import ModelError
from embtrim.system.modules import evaluating
from embtrim.tables.embedding_tables import RowGate
from embtrim.tasks.sites import Site, gate_sites
from embtrim.tasks.task import Task
from embtrim.training.evaluation import check_finite, loss_weight


def sensitivities(task: Task) -> dict[str, Tensor]:
    """G_f of every table by its name, float64 (D, D), from one forward and backward pass over the validation batches.

    Raises:
        ModelError: The task has no validation batches that can be read again.
    """
    sites = task.sites(task.model)
    found = {
        name: torch.zeros(width, width, dtype=torch.float64)
        for site in sites
        for name, width in zip(site.names, site.widths, strict=True)
    }
    num_rows = 0.0
    with evaluating(task.model):
        for place, batch in enumerate(task.tracked_batches("valid", "reading sensitivities")):
            leaves: list[tuple[int, Tensor, Tensor]] = []
            with torch.enable_grad(), gate_sites(sites, rows=[_recorded(n, leaves) for n in range(len(sites))]):
                weight = loss_weight(batch)
                loss = weight * task.loss(task.model, batch)
            check_finite(loss, "loss", "valid", place)
            num_rows += weight
            gradients = torch.autograd.grad(loss, [leaf for _, _, leaf in leaves], allow_unused=True)
            for (number, rows_U, _), gradient_UD in zip(leaves, gradients, strict=True):
                if gradient_UD is None:
                    continue
                check_finite(gradient_UD, "gradient by the embeddings", "valid", place)
                _add_products(sites[number], rows_U, gradient_UD, found)
    if not num_rows:
        raise ModelError("there are no valid batches to read; give some that can be read again")
    return {name: total_DD / num_rows for name, total_DD in found.items()}


def _add_products(site: Site, rows_U: Tensor, gradient_UD: Tensor, found: dict[str, Tensor]) -> None:
    """Add the sum of g g^T over the rows of each table to what was found before."""
    ends = torch.tensor(site.num_rows, device=rows_U.device).cumsum(0)
    cuts = torch.searchsorted(rows_U.long(), ends).tolist()  # distinct rows ascend
    sizes = [end - start for start, end in itertools.pairwise([0, *cuts])]
    for name, part in zip(site.names, gradient_UD.double().split(sizes), strict=True):
        found[name] += (part.T @ part).cpu()


def _recorded(number: int, leaves: list[tuple[int, Tensor, Tensor]]) -> RowGate:
    """A row gate that changes nothing and notes the rows read, with a leaf whose gradient is that of their embeddings."""

    def gate(rows_U: Tensor, found_UD: Tensor) -> Tensor:
        leaf = torch.zeros_like(found_UD, requires_grad=True)
        leaves.append((number, rows_U, leaf))
        return found_UD.detach() + leaf

    return gate
