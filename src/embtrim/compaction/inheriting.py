"""Weights that a compact model inherits from the full one: kept rows and columns, and the axes that read them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from embtrim.errors import PlanError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import TablePlan
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.packing import CHUNK_ROWS


@torch.no_grad()
def inherit_weights(full: CTRModel, small: CTRModel) -> None:
    """Copy the kept part of `full` into `small`: rows and columns of tables, and the axes that read them."""
    plan = small.tables.plan
    assert isinstance(plan, SizePlan), "a plan without rows does not say what is kept"
    full.tables.settle()
    for table in plan.tables:
        _inherit_table(full.tables, small.tables, table)
    kept_S = small.kept_inputs("concat")
    if small.tables.layout.has_projections:
        selection_SD = small.tables.projection.new_zeros(len(kept_S), small.tables.width)
        selection_SD[torch.arange(len(kept_S)), kept_S % small.tables.width] = 1.0
        small.tables.projection.copy_(selection_SD[small.tables.projected_S])

    reads: dict[str, dict[int, Tensor]] = {}
    for read in small.reads():
        sizes = [len(full.kept_inputs(part)) for part in read.parts]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        index = torch.cat([small.kept_inputs(part) + start for part, start in zip(read.parts, starts, strict=True)])
        reads.setdefault(read.parameter, {})[read.axis] = index
    theirs = {**dict(full.named_parameters()), **dict(full.named_buffers())}
    for name, value in [*small.named_parameters(), *small.named_buffers()]:
        if name.startswith("tables."):
            continue
        source = theirs[name]
        for axis, index in reads.get(name, {}).items():
            source = source.index_select(axis, index.to(source.device))
        value.copy_(source)
    small.fold_dropped(full)


def _inherit_table(full: EmbeddingTables, small: EmbeddingTables, table: TablePlan) -> None:
    """Copy the kept rows and columns, and the first-order weights of the kept rows, of one table."""
    check_inheritable(table)
    for kept_rows, compact_ids in kept_rows_of(table):
        if table.output_width:
            values_ND = full.get_rows(table.name, kept_rows)[0][1]
            small.set_rows(table.name, compact_ids, values_ND[:, list(table.columns)])
        if small.first_order is not None and full.first_order is not None:
            source = torch.from_numpy(full.storage_rows(table.name, kept_rows))
            small.first_order[torch.from_numpy(small.storage_rows(table.name, compact_ids))] = full.first_order[source]


def check_inheritable(table: TablePlan) -> None:
    """Raise PlanError if the plan of a table counts its kept columns without saying which."""
    if table.only_counts:
        raise PlanError(f"plan for table {table.name!r} says how many columns, not which; use init='scratch'")


def kept_rows_of(table: TablePlan) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Kept rows of a table, ascending, and their compact ids, in chunks: rows of a table may fill the memory."""
    for start in range(0, table.num_rows, CHUNK_ROWS):
        chunk = range(start, min(start + CHUNK_ROWS, table.num_rows))
        rows, compact_ids = np.arange(chunk.start, chunk.stop), table.id_map(chunk)
        if compact_ids is None:
            yield rows, rows
            continue
        kept = np.flatnonzero(compact_ids != table.dropped_id) if table.has_dropped else slice(None)
        if len(rows[kept]):
            yield rows[kept], compact_ids[kept]
