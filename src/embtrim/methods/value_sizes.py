"""Sizes of single feature values within a budget: which values reach which bucket, and the plan that says so.

    d_v     = number of v's entries among the top K of all entries                                     (capacity)
    d_v     bucketed down to {0, 1, 2, 4, 8, .., D};  K as large as the budget allows

Axes: V rows of a table, D its width, L buckets of a table apart from 0, R rows of all tables, T tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from embtrim.methods.selection import largest
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Block, BlockShape, TablePlan, TableShape, block_rows, map_params

# Steps from size to size that are counted at a time.
CHUNK_STEPS = 1 << 20


def buckets(width: int) -> list[int]:
    """Sizes that a value may have, apart from 0: powers of two below D, and D."""
    return [*(2**k for k in range(width.bit_length()) if 2**k < width), width]


def bucket_scores(full: SizePlan, ranked: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The score at which a value reaches each bucket but 0, by table (V, L): its s-th largest one for a bucket of s.

    (capacity): d_v >= s where v's s-th largest entry is among the top K.
    """
    return [scores[:, np.array(buckets(t.width)) - 1] for t, scores in zip(full.tables, ranked, strict=True)]


def fill_sizes(full: SizePlan, reached: Sequence[np.ndarray], limit: int, row_cost: int = 0) -> list[np.ndarray]:
    """The size of each value (V,), by table: its entries above the lowest threshold that fits, bucketed down.

    A value reaches bucket s when its s-th largest entry passes the threshold. Such steps are taken in order of their
    thresholds until one does not fit. The parameters left over go to the next steps that still fit.

    Args:
        full: The plan that keeps everything.
        reached: For each table the `bucket_scores` (V, L), which fall along each row.
        limit: Parameters allowed.
        row_cost: Cost of a compact row beside its size.
    """
    steps = _Steps(full, reached)
    first_row, size_of = steps.first_row, [np.array([0, *buckets(t.width)], np.int32) for t in full.tables]

    def count(rows_of_levels: Sequence[np.ndarray]) -> int:
        """Cost of the plan with so many rows at each level, by table."""
        plan = counted_plan(full, [dict(zip(*pair, strict=True)) for pair in zip(size_of, rows_of_levels, strict=True)])
        return plan.num_params + row_cost * sum(t.num_compact_rows for t in plan.tables)

    def count_levels(level_R: np.ndarray) -> int:
        parts = zip(np.split(level_R, first_row[1:-1]), size_of, strict=True)
        return count([np.bincount(level_V, minlength=len(sizes)) for level_V, sizes in parts])

    def lifted(rows_L: np.ndarray, sizes: np.ndarray) -> int:
        """The level that values of size 0 get if it takes less than the vector they would share; 0 for none."""
        used = np.flatnonzero(rows_L[1:]) + 1
        return int(used[0]) if len(used) and rows_L[0] * sizes[used[0]] <= sizes[used[-1]] else 0

    def keep_few(level_R: np.ndarray) -> np.ndarray:
        for level_V, sizes in zip(np.split(level_R, first_row[1:-1]), size_of, strict=True):
            level_V[level_V == 0] = lifted(np.bincount(level_V, minlength=len(sizes)), sizes)
        return level_R

    def fits(prefix: int) -> bool:
        rows_of_levels = steps.rows_of_levels(prefix)
        for rows_L, sizes in zip(rows_of_levels, size_of, strict=True):
            level = lifted(rows_L, sizes)
            rows_L[0], rows_L[level] = (0, rows_L[0] + rows_L[level]) if level else (rows_L[0], rows_L[0])
        return count(rows_of_levels) <= limit

    def stepped(level_R: np.ndarray, row: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Levels after as many of the steps as fit: all steps together may need a wider id map than any one alone."""

        def after(num: int) -> np.ndarray:
            changed_R = level_R.copy()
            changed_R[row[:num]] = level[:num]
            return keep_few(changed_R)

        most = largest(len(row), lambda num: count_levels(after(num)) <= limit) if full.standalone else len(row)
        return after(most)

    # Keeping everything needs no projections, so it may fit although a little less does not.
    number = len(steps.order)
    taken = number if fits(number) else largest(number, fits)
    level_R = keep_few(steps.levels(taken))
    later = steps.order[taken:]
    table_R = np.repeat(np.arange(len(full.tables), dtype=np.int32), np.diff(first_row))
    most_levels = max(map(len, size_of))
    size_TL = np.array([np.pad(sizes, (0, most_levels - len(sizes))) for sizes in size_of])
    while True:
        # A step to the next size that its table already has changes only its own row.
        levels = np.split(level_R, first_row[1:-1])
        target_TL = next_levels(levels, most_levels)
        left = limit - count_levels(level_R)
        step = later[steps.level_of[later] == target_TL[table_R, level_R][steps.row_of[later]]]
        row = steps.row_of[step]
        cost = (size_TL[table_R[row], steps.level_of[step]] - size_TL[table_R[row], level_R[row]]).astype(np.int64)
        cost += np.where(level_R[row] == 0, wider_map(full, levels)[table_R[row]] + row_cost, 0)
        step, row, cost = (part[cost <= left] for part in (step, row, cost))

        fitting = np.cumsum(cost) <= left
        changed_R = stepped(level_R, row[fitting], steps.level_of[step[fitting]])
        if (changed_R == level_R).all():
            return [sizes[part] for sizes, part in zip(size_of, levels, strict=True)]
        level_R = changed_R


class _Steps:
    """The steps of all values from one bucket to the next, in falling order of the scores that they need.

    Args:
        full: The plan that keeps everything.
        reached: The `bucket_scores` of each table.

    Attributes:
        first_row: First value of each table among all values, and their number R.
        order: Numbers of the steps in order. Steps are numbered table by table, value by value, level by level.
        row_of: Value of each step, int32.
        level_of: Level to which each step leads, int8.
    """

    def __init__(self, full: SizePlan, reached: Sequence[np.ndarray]) -> None:
        num_levels = [scores.shape[1] for scores in reached]
        self.num_rows = [t.num_rows for t in full.tables]
        self.first_row = np.cumsum([0, *self.num_rows])
        falling = np.concatenate([scores.ravel() for scores in reached])
        np.negative(falling, out=falling)
        dtype = np.int32 if len(falling) <= np.iinfo(np.int32).max else np.int64
        self.order = np.argsort(falling, kind="stable").astype(dtype)
        del falling
        row_R = np.arange(self.first_row[-1], dtype=np.int32)
        parts = zip(np.split(row_R, self.first_row[1:-1]), num_levels, strict=True)
        self.row_of = np.concatenate([np.repeat(row_V, levels) for row_V, levels in parts])
        tiled = [np.tile(np.arange(1, n + 1, dtype=np.int8), t) for n, t in zip(num_levels, self.num_rows, strict=True)]
        self.level_of = np.concatenate(tiled)
        # The kind of a step is its table and level.
        self._first_kind = np.cumsum([0, *num_levels])
        first_step = np.cumsum([0, *(n * t for n, t in zip(num_levels, self.num_rows, strict=True))])
        kind_of = np.empty(len(self.order), np.int32)
        for start, stop, kind in zip(first_step, first_step[1:], self._first_kind, strict=False):
            kind_of[start:stop] = kind + self.level_of[start:stop] - 1
        self._kinds = kind_of[self.order]
        self._taken = {0: np.zeros(self._first_kind[-1], np.int64)}

    def rows_of_levels(self, prefix: int) -> list[np.ndarray]:
        """How many values have each level after the first `prefix` steps, by table."""
        if prefix not in self._taken:  # a bisection asks for ever smaller parts beyond a prefix that it knows
            known = max(number for number in self._taken if number < prefix)
            taken = self._taken[known].copy()
            for start in range(known, prefix, CHUNK_STEPS):
                taken += np.bincount(self._kinds[start : min(start + CHUNK_STEPS, prefix)], minlength=len(taken))
            self._taken[prefix] = taken
        # A value takes its steps in the order of their levels, so those at a level or above took the step to it.
        above = np.split(self._taken[prefix], self._first_kind[1:-1])
        return [
            np.concatenate([[num_rows], taken_L]) - np.append(taken_L, 0)
            for num_rows, taken_L in zip(self.num_rows, above, strict=True)
        ]

    def levels(self, prefix: int) -> np.ndarray:
        """The level of each value (R,), int8, after the first `prefix` steps."""
        level_R = np.zeros(self.first_row[-1], np.int8)
        for start in range(0, prefix, CHUNK_STEPS):
            step = self.order[start : min(start + CHUNK_STEPS, prefix)]
            level_R[self.row_of[step]] = self.level_of[step]  # the last step of a value leads to its level
        return level_R


def next_levels(levels: Sequence[np.ndarray], num_levels: int) -> np.ndarray:
    """For each table and level (T, num_levels) the next level that rows of the table have; -1 if there is none."""
    target_TL = np.full((len(levels), num_levels), -1, np.int8)
    for table, level_V in enumerate(levels):
        used = np.flatnonzero(np.bincount(level_V))
        for level in range(num_levels):
            target_TL[table, level] = min(used[used > level], default=-1)
    return target_TL


def wider_map(full: SizePlan, levels: Sequence[np.ndarray]) -> np.ndarray:
    """Cost of one more row for each table (T,) because the table's id map then needs more bytes per entry."""
    kept = [int((level_V > 0).sum()) for level_V in levels]
    return np.array(
        [
            map_params(t.num_rows, n + 2) - map_params(t.num_rows, n + 1) if full.standalone else 0
            for t, n in zip(full.tables, kept, strict=True)
        ]
    )


def sized_plan(full: SizePlan, sizes: Sequence[np.ndarray]) -> SizePlan:
    """The plan that gives each value its size (V,), by table."""
    tables = []
    for table, size_V in zip(full.tables, sizes, strict=True):
        blocks = []
        for block in sized_blocks(table, dict(enumerate(np.bincount(size_V).tolist()))):
            rows = block_rows(np.flatnonzero(size_V == block.width), table.num_rows)
            blocks.append(Block(block.num_rows, block.columns, block.alignment, rows))
        tables.append(TablePlan(table.name, table.num_rows, table.width, tuple(blocks)))
    return dataclasses.replace(full, tables=tuple(tables))


def counted_plan(full: SizePlan, rows_by_size: Sequence[Mapping[int, int]]) -> PlanShape:
    """The plan with so many values of each size, by table, without its rows: enough to count its parameters."""
    tables = tuple(
        TableShape(table.name, table.num_rows, table.width, tuple(sized_blocks(table, rows)))
        for table, rows in zip(full.tables, rows_by_size, strict=True)
    )
    return dataclasses.replace(full.shape(), tables=tables)


def sized_blocks(table: TablePlan, rows_by_size: Mapping[int, int]) -> list[BlockShape]:
    """One block for each size that values of a table have, the largest first."""
    return [
        # (lookup): W_s is the identity at s = D
        BlockShape(int(rows), tuple(range(size)) if size == table.width else int(size), "project")
        for size, rows in sorted(rows_by_size.items(), reverse=True)
        if size and rows
    ]
