"""Rows of tables on shards: the part of each table that a rank reads alone, its counts, and changes to tables for a while.

A rank reads the rows that it holds. Two kinds of tables are *exchanged*: of a table that is cut by columns no rank holds whole
rows, so that each rank takes an equal range of rows, and a copy of them; of a table that every rank has a copy of, the first
rank reads all rows. Changes to exchanged tables are sent to all ranks, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embtrim.tables.packing import CHUNK_ROWS
from embtrim.tasks.table_parts import Change, chunks_of
from embtrim.torchrec.ranks import gathered, largest, num_ranks, own_rank, summed
from embtrim.torchrec.sites import CollectionSite, Shard, gathered_rows, put_rows


class ShardedTable(NamedTuple):
    """A table and what this rank holds of it.

    Attributes:
        name: Its name in plans.
        num_rows: Its rows, V.
        width: Its columns, D.
        shards: The pieces that this rank holds.
        is_exchanged: See the module docstring; the same on all ranks.
        first: First row that this rank reads alone.
        weight_ND: Values of the rows that this rank reads alone; a view, unless the table is exchanged.
    """

    name: str
    num_rows: int
    width: int
    shards: list[Shard]
    is_exchanged: bool
    first: int
    weight_ND: Tensor

    @property
    def rows(self) -> slice:
        """Rows that this rank reads alone."""
        return slice(self.first, self.first + len(self.weight_ND))


def sharded_tables(
    sites: Sequence[CollectionSite], values_of: Callable[[Shard], Tensor] | None = None
) -> list[ShardedTable]:
    """The searched tables with this rank's part of each; all ranks call it.

    Args:
        sites: Sites of a model.
        values_of: Gives other values (R, C) of a piece of a table, which take the place of its weights.
    """
    found: list[tuple[str, int, int, list[Shard]]] = []
    for site in sites:
        shards_of = {config.name: [] for config in site.configs}
        for shard in site.shards():
            taken = shard if values_of is None else replace(shard, weight_RC=values_of(shard))
            shards_of[shard.table].append(taken)
        found += [
            (site.by_config[config.name], config.num_embeddings, config.embedding_dim, shards_of[config.name])
            for config in site.configs
        ]
    kinds = [
        (len(own) > 1 or any(s.columns.stop - s.columns.start < width for s in own), any(not s.counts for s in own))
        for *_, width, own in found
    ]
    known = largest(torch.tensor(kinds, dtype=torch.int32)).bool().tolist()
    return [_table(*table, *kind) for table, kind in zip(found, known, strict=True)]


def _table(name: str, num_rows: int, width: int, shards: list[Shard], is_cut: bool, has_copies: bool) -> ShardedTable:
    if is_cut:
        first, stop = (num_rows * rank // num_ranks() for rank in (own_rank(), own_rank() + 1))
        weight_ND = torch.empty(stop - first, width, device=shards[0].weight_RC.device if shards else None)
        for start in range(0, num_rows, CHUNK_ROWS):
            rows_N = torch.arange(start, min(start + CHUNK_ROWS, num_rows))
            values_ND = gathered_rows(shards, rows_N, width)
            here = slice(max(start, first), min(start + len(rows_N), stop))
            if here.stop > here.start:
                weight_ND[here.start - first : here.stop - first] = values_ND[here.start - start : here.stop - start]
        return ShardedTable(name, num_rows, width, shards, True, first, weight_ND)
    own = [shard for shard in shards if shard.counts]
    first = own[0].rows.start if own else 0
    weight_ND = own[0].weight_RC if own else torch.empty(0, width)
    return ShardedTable(name, num_rows, width, shards, has_copies, first, weight_ND)


@contextmanager
def changed(tables: Sequence[ShardedTable], changes: Mapping[str, Change]) -> Iterator[None]:
    """Change tables in place inside a `with` block; all ranks enter it with functions of their own parts."""
    tables = [table for table in tables if table.name in changes]
    kept = [(shard, shard.weight_RC.clone()) for table in tables for shard in table.shards]
    try:
        with torch.no_grad():
            for table in tables:
                new = changes[table.name]
                if table.is_exchanged:
                    _exchange(table, new)
                else:
                    for rows, part in chunks_of(table.weight_ND):
                        part.copy_(new(part, rows))
        yield
    finally:
        with torch.no_grad():
            for shard, values in kept:
                shard.weight_RC.copy_(values)


def _exchange(table: ShardedTable, new: Change) -> None:
    own = table.weight_ND.clone()  # of a table with copies it is a view of what changes
    for start in range(0, table.num_rows, CHUNK_ROWS):
        rows_N = torch.arange(start, min(start + CHUNK_ROWS, table.num_rows))
        values_ND = torch.zeros(len(rows_N), table.width)
        here = slice(max(start, table.rows.start), min(start + len(rows_N), table.rows.stop))
        if here.stop > here.start:
            places = slice(here.start - table.first, here.stop - table.first)
            values_ND[here.start - start : here.stop - start] = new(own[places], places).float().cpu()
        put_rows(table.shards, rows_N, summed(values_ND))


def count_rows(
    rows_of: Mapping[str, tuple[int, slice]], batches: Iterable[Mapping[str, Sequence[Tensor]]]
) -> dict[str, np.ndarray]:
    """How often the batches of all ranks read each row of a rank's parts, int64 (N,) by table.

    Every rank gets the ids of all ranks' batches, one batch at a time, and counts those of its own rows.

    Args:
        rows_of: Rows of each table, and those to count.
        batches: The ids that each batch of this rank reads of each table; equally many batches on all ranks.
    """
    starts = dict(zip(rows_of, np.cumsum([0, *(rows for rows, _ in rows_of.values())]).tolist(), strict=False))
    counts = {name: torch.zeros(own.stop - own.start, dtype=torch.int64) for name, (_, own) in rows_of.items()}
    for read in batches:
        own = [ids.flatten().cpu().long() + starts[name] for name, parts in read.items() for ids in parts]
        ids_N = torch.cat([torch.zeros(0, dtype=torch.int64), *own])
        every = torch.cat(gathered(ids_N))
        for name, (_, rows) in rows_of.items():
            low, high = starts[name] + rows.start, starts[name] + rows.stop
            here = every[(every >= low) & (every < high)] - low
            counts[name].index_add_(0, here, torch.ones_like(here))
    return {name: count.numpy() for name, count in counts.items()}
