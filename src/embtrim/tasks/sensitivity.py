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
from embtrim.tasks.sites import Site
from embtrim.tasks.task import Task


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
            num_rows += task.weight_of(batch)
            for number, rows_U, gradient_UD in task.row_gradients(batch, place):
                _add_products(sites[number], rows_U, gradient_UD, found)
    num_rows = float(task.summed(torch.tensor(num_rows, dtype=torch.float64)))
    if not num_rows:
        raise ModelError("there are no valid batches to read; give some that can be read again")
    return {name: task.summed(total_DD) / num_rows for name, total_DD in found.items()}


def _add_products(site: Site, rows_U: Tensor, gradient_UD: Tensor, found: dict[str, Tensor]) -> None:
    """Add the sum of g g^T over the rows of each table to what was found before."""
    ends = torch.tensor(site.num_rows, device=rows_U.device).cumsum(0)
    cuts = torch.searchsorted(rows_U.long(), ends).tolist()  # distinct rows ascend
    sizes = [end - start for start, end in itertools.pairwise([0, *cuts])]
    for name, part in zip(site.names, gradient_UD.double().split(sizes), strict=True):
        found[name] += (part.T @ part).cpu()
