"""Parts of tables: the rows that each process of a job reads alone, with their counts, and changes to tables for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embtrim.tables.packing import CHUNK_ROWS
from embtrim.tasks.sites import ModuleSite, Site, weights_by_table

# Rows (N, D) of a part, and their places in it -> the same rows as they are changed.
Change = Callable[[Tensor, slice], Tensor]


# Begins the names of first-order weights where those of tables are keys too.
FIRST_ORDER = "first-order weights of "


class FirstOrder(NamedTuple):
    """First-order weights of a model.

    Attributes:
        weights: The weights of each table by its name, (V,); views that change the model.
        sensitivity: Loss of a mean squared error of 1 in the weights that a field reads, times 2; see
            embtrim.tasks.sensitivity.
    """

    weights: Mapping[str, Tensor]
    sensitivity: float


class TablePart(NamedTuple):
    """Rows of a table, one after the other.

    Attributes:
        name: Name of the table.
        first: First row.
        num_rows: Rows of the whole table, V.
        weight_ND: Their embeddings, without gradient.
        count_N: How often they occur in the training data; padding rows count 0.
    """

    name: str
    first: int
    num_rows: int
    weight_ND: Tensor
    count_N: np.ndarray


def whole_parts(sites: Sequence[Site], counts: Mapping[str, np.ndarray]) -> dict[str, TablePart]:
    """All rows of every table by its name.

    Args:
        sites: Sites of a model.
        counts: Occurrences of their rows in the training data; those of padding rows become 0.
    """
    for site in sites:
        if isinstance(site, ModuleSite):
            for name, row in zip(site.names, site.reserved_rows, strict=True):
                if row is not None:
                    counts[name][row] = 0  # padding reads zeros or is left out of its bag, at any bits
    weights = weights_by_table(sites)
    return {name: TablePart(name, 0, len(weight), weight, counts[name]) for name, weight in weights.items()}


@contextmanager
def changed_weights(live: Mapping[str, Tensor], changes: Mapping[str, Change]) -> Iterator[None]:
    """Change the weights (V, D) of tables in place inside a `with` block, some rows at a time."""
    kept = {name: live[name].clone() for name in changes}
    try:
        with torch.no_grad():
            for name, new in changes.items():
                for rows, part in chunks_of(live[name]):
                    part.copy_(new(part, rows))
        yield
    finally:
        with torch.no_grad():
            for name, values in kept.items():
                live[name].copy_(values)


def chunks_of(weight_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time: their places, and views of them."""
    for start in range(0, len(weight_ND), CHUNK_ROWS):
        part = weight_ND[start : start + CHUNK_ROWS]
        yield slice(start, start + len(part)), part
