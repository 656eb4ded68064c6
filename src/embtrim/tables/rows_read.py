"""The tables of a model with nothing but the rows that one batch reads, at another precision: for exact comparisons.

What takes an id to a storage row and a row to its columns of `concat` is that of the tables themselves. Only the storage
rows are numbered anew.

Axes: B batch, C id columns, U distinct rows of the batch, W width of a row.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from embtrim.tables.embedding_tables import EmbeddingTables

# Takes storage rows (U,) of the tables and values (U, W) there, and returns what is read in their place.
Reading = Callable[[Tensor, Tensor], Tensor]


class RowsRead(EmbeddingTables):
    """Tables of the rows that one batch reads; `rows_read` makes them.

    Attributes:
        rows_U: int32 storage rows of the tables that these were made from, ascending.
    """

    rows_U: Tensor

    def storage_ids(self, ids_BC: Tensor) -> Tensor:
        """(B, C) rows here of a batch of ids; see EmbeddingTables."""
        return torch.searchsorted(self.rows_U, super().storage_ids(ids_BC), out_int32=True)

    def gathers_elements(self, batch_rows: int) -> bool:
        """Never: the addresses of single elements are those of the tables that these were made from."""
        del batch_rows
        return False


@torch.no_grad()
def rows_read(
    tables: EmbeddingTables,
    ids_BC: Tensor,
    dtype: torch.dtype,
    values: Reading | None = None,
    first_order: Reading | None = None,
) -> EmbeddingTables:
    """Tables for inference on the CPU that give what `tables` give for one batch, computed in `dtype`.

    Args:
        tables: Tables in fp32.
        ids_BC: Ids of the batch, PAD = -1.
        dtype: Floating type of the rows and projections.
        values: What is read in the place of rows, in `dtype`; None for the rows themselves.
        first_order: The same for first-order weights (U, 1).
    """
    tables.settle()
    rows_U = torch.unique(tables.storage_ids(ids_BC.to(tables.shift_C.device)))
    edges = torch.searchsorted(rows_U, tables.group_starts).tolist()

    def read(source_RW: Tensor, rows_R: Tensor, start: int, given: Reading | None) -> Tensor:
        found = source_RW.index_select(0, rows_R - start).to("cpu", dtype)
        return found if given is None else given(rows_R.cpu(), found)

    found = copy.copy(tables)
    found.__class__ = RowsRead
    assert isinstance(found, RowsRead)
    found._parameters, found._buffers = {}, dict(tables._buffers)
    found._modules = {name: module for name, module in tables._modules.items() if name != "shared_projections"}
    groups, parts, element = [], [], 0
    for group, (low, high) in zip(tables.groups, itertools.pairwise(edges), strict=True):
        rows_g = rows_U[low:high]
        parts.append(read(tables.group_view(group), rows_g, group.start, values).flatten())
        mixed_start = low + int(torch.searchsorted(rows_g, group.mixed_start))
        groups.append(
            dataclasses.replace(group, start=low, num_rows=high - low, offset=element, mixed_start=mixed_start)
        )
        element += (high - low) * group.width
    found.layout = dataclasses.replace(tables.layout, groups=tuple(groups))
    for name, buffer in tables._buffers.items():
        if buffer is not None:
            found._buffers[name] = buffer.to("cpu", dtype if buffer.is_floating_point() else buffer.dtype)
    found.rows_U = rows_U.cpu()
    found.group_starts = torch.tensor(edges, dtype=torch.int32)
    found.weight = nn.Parameter(torch.cat(parts), requires_grad=False)
    found.first_order = None
    if tables.first_order is not None:
        first_U1 = read(tables.first_order[:, None], rows_U, 0, first_order)
        found.first_order = nn.Parameter(first_U1.flatten(), requires_grad=False)
    if tables.layout.has_projections:
        found.projection = nn.Parameter(tables.projection.to("cpu", dtype), requires_grad=False)
    found.shared_projections = nn.ParameterDict(
        {
            width: nn.Parameter(projection.to("cpu", dtype), requires_grad=False)
            for width, projection in tables.shared_projections.items()
        }
    )
    found.training = False
    return found
