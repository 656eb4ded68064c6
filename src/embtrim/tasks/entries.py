"""Single entries of tables: weights drawn anew, and gradients by every entry, of the rows that a process holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embtrim.tables.packing import CHUNK_ROWS
from embtrim.tasks.sites import Site, gate_sites
from embtrim.training.evaluation import check_finite

# Values that torch draws from a normal distribution together.
TOGETHER = 16


class Entries(NamedTuple):
    """Values of rows of a table, one after the other.

    Attributes:
        first: First row.
        num_rows: Rows of the whole table, V.
        values_ND: The values.
    """

    first: int
    num_rows: int
    values_ND: Tensor


def normal_chunks(num_rows: int, width: int, std: float, generator: torch.Generator) -> Iterator[tuple[slice, Tensor]]:
    """Normal numbers for a table (V, D), some rows at a time: those that one call of `normal_` for the whole table draws.

    torch draws sixteen numbers together, and the last sixteen of a tensor anew if some are left over.
    """
    assert CHUNK_ROWS % TOGETHER == 0
    starts = list(range(0, num_rows, CHUNK_ROWS))
    if len(starts) > 1 and num_rows - starts[-1] < TOGETHER:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], num_rows], strict=True):
        yield slice(start, stop), torch.empty(stop - start, width).normal_(0, std, generator=generator)


@torch.no_grad()
def draw_weights(sites: Sequence[Site], std: float, seed: int) -> None:
    """Draw all embeddings with one standard deviation; rows that start at zero (OOV, padding) stay zero."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        for weight_VD in site.weights():
            num_rows, width = weight_VD.shape
            for rows, noise_RD in normal_chunks(num_rows, width, std, generator):
                part_RD = weight_VD[rows]
                part_RD.copy_(noise_RD.to(part_RD).mul_(part_RD.any(1, keepdim=True)))


def whole_tables(sites: Sequence[Site]) -> list[Entries]:
    """The weights of every table, in the order of the sites."""
    return [Entries(0, len(weight_VD), weight_VD) for site in sites for weight_VD in site.weights()]


def summed_gradients(
    sites: Sequence[Site], batches: Iterable[tuple[int, Any, float]], loss_of: Callable[[Any], Tensor]
) -> list[Tensor]:
    """Sums over batches of the gradients of a loss by the entries of each table (V, D), in the order of the sites.

    Args:
        sites: Sites of a model.
        batches: Place, batch, and factor of its gradient.
        loss_of: Loss of a batch.
    """
    weights_of = [site.weights() for site in sites]
    sums = [weights[0].new_zeros(sum(map(len, weights)), weights[0].shape[1]) for weights in weights_of]
    leaves: list[tuple[int, Tensor, Tensor]] = []

    def reader(number: int) -> Callable[[Tensor, Tensor], Tensor]:
        def read(rows_U: Tensor, found_UD: Tensor) -> Tensor:
            leaves.append((number, rows_U, found_UD.detach().requires_grad_()))
            return leaves[-1][2]

        return read

    for place, batch, factor in batches:
        leaves.clear()
        with gate_sites(sites, rows=[reader(n) for n in range(len(sites))]):
            loss = loss_of(batch)
        check_finite(loss, "loss", "train", place)
        found = torch.autograd.grad(loss, [leaf for *_, leaf in leaves], allow_unused=True)
        for (site, rows_U, _), grad_UD in zip(leaves, found, strict=True):
            if grad_UD is not None:
                check_finite(grad_UD, "gradient by the embeddings", "train", place)
                sums[site].index_add_(0, rows_U.long(), grad_UD, alpha=factor)
    return [part for site, total in zip(sites, sums, strict=True) for part in total.split(site.num_rows)]
