"""Sizes of single feature values within a budget: which values reach which bucket, and the plan that says so.

    d_v     = number of v's entries among the top K of all entries                                     (capacity)
    d_v     bucketed down to {0, 1, 2, 4, 8, .., D};  K as large as the budget allows

Processes may share the tables: each then has the scores of its own rows, and gets the sizes of these. What is counted over
all rows is summed, and the border between two thresholds is found without gathering scores.

Axes: V rows of a table, N rows of it that this process holds, D its width, L buckets of a table apart from 0, R rows of all
tables that this process holds, T tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from embtrim.methods.selection import largest
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Block, BlockShape, TablePlan, TableShape, block_rows, map_params
from embtrim.tasks.joint_order import JointOrder, OwnOrder
from embtrim.tasks.sharing import ALONE, OneProcess

# Steps from size to size that are counted at a time.
CHUNK_STEPS = 1 << 20


class Shares(NamedTuple):
    """What this process holds of the tables.

    Attributes:
        firsts: First row of each table; None if it holds all of them.
        group: The processes that share the tables.
    """

    firsts: Sequence[int] | None = None
    group: OneProcess = ALONE

    def summed(self, counts: np.ndarray) -> np.ndarray:
        """Sums of numbers over all processes, int64."""
        return self.group.summed(torch.from_numpy(counts.astype(np.int64))).numpy()

    def total(self, number: int) -> int:
        """Sum of a number over all processes."""
        return int(self.summed(np.array([number]))[0])


WHOLE = Shares()


def buckets(width: int) -> list[int]:
    """Sizes that a value may have, apart from 0: powers of two below D, and D."""
    return [*(2**k for k in range(width.bit_length()) if 2**k < width), width]


def bucket_scores(full: SizePlan, ranked: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The score at which a value reaches each bucket but 0, by table (V, L): its s-th largest one for a bucket of s.

    (capacity): d_v >= s where v's s-th largest entry is among the top K.
    """
    return [scores[:, np.array(buckets(t.width)) - 1] for t, scores in zip(full.tables, ranked, strict=True)]


def fill_sizes(
    full: SizePlan, reached: Sequence[np.ndarray], limit: int, row_cost: int = 0, shares: Shares = WHOLE
) -> list[np.ndarray]:
    """The size of each value (N,), by table: its entries above the lowest threshold that fits, bucketed down.

    A value reaches bucket s when its s-th largest entry passes the threshold. Such steps are taken in order of their
    thresholds until one does not fit. The parameters left over go to the next steps that still fit.

    Args:
        full: The plan that keeps everything.
        reached: For each table the `bucket_scores` (N, L), which fall along each row.
        limit: Parameters allowed.
        row_cost: Cost of a compact row beside its size.
        shares: The rows that the scores are of.
    """
    steps = _Steps(full, reached, shares, row_cost)

    def fits(prefix: int) -> bool:
        return steps.cost_of(steps.kept_few(steps.rows_of_levels(prefix))) <= limit

    # Keeping everything needs no projections, so it may fit although a little less does not.
    number = steps.joint.total
    taken = number if fits(number) else largest(number, fits)
    level_R = steps.keep_few(steps.levels(taken))
    is_later = np.arange(len(steps.order)) >= steps.joint.own(taken)
    later = steps.order[is_later], steps.joint.part(is_later)
    while True:
        changed_R = _spend_rest(steps, level_R, later, limit)
        if not shares.total(int((changed_R != level_R).sum())):
            levels = np.split(level_R, steps.first_row[1:-1])
            return [sizes[level_N] for sizes, level_N in zip(steps.size_of, levels, strict=True)]
        level_R = changed_R


def _spend_rest(steps: _Steps, level_R: np.ndarray, later: tuple[np.ndarray, OwnOrder], limit: int) -> np.ndarray:
    """Levels after the next steps that fit into what is left of the limit.

    A step to the next size that its table already has changes only its own row.

    Args:
        steps: The steps.
        level_R: Levels of the values.
        later: Steps beyond the threshold, and their order.
        limit: Parameters allowed.
    """
    shares, sizes_TL, table_R = steps.shares, steps.sizes_TL, steps.table_R
    rows_of_levels = steps.rows_at(level_R)
    target_TL = next_levels(rows_of_levels, sizes_TL.shape[1])
    left = limit - steps.cost_of(rows_of_levels)
    step, order = later
    chosen = steps.level_of[step] == target_TL[table_R, level_R][steps.row_of[step]]
    step, order = step[chosen], order.part(chosen)
    row, level = steps.row_of[step], steps.level_of[step]
    cost = (sizes_TL[table_R[row], level] - sizes_TL[table_R[row], level_R[row]]).astype(np.int64)
    wider = wider_map(steps.full, rows_of_levels)[table_R[row]]
    cost += np.where(level_R[row] == 0, wider + steps.row_cost, 0)
    chosen = cost <= left
    row, level, order = row[chosen], level[chosen], order.part(chosen)
    spent = np.concatenate([[0], np.cumsum(cost[chosen])])

    def after(num: int) -> np.ndarray:
        changed_R, own = level_R.copy(), order.own(num)
        changed_R[row[:own]] = level[:own]
        return steps.keep_few(changed_R)

    number = largest(order.total, lambda num: shares.total(spent[order.own(num)]) <= left)
    if steps.full.standalone:  # all steps together may need a wider id map than any one alone
        number = largest(number, lambda num: steps.cost_of(steps.rows_at(after(num))) <= limit)
    return after(number)


class _Steps:
    """The steps of all values from one bucket to the next, in falling order of the scores that they need.

    Args:
        full: The plan that keeps everything.
        reached: The `bucket_scores` of each table.
        shares: The rows that the scores are of.
        row_cost: Cost of a compact row beside its size.

    Attributes:
        size_of: Size of each level of a table, by table; `sizes_TL` has them in one array.
        table_R: Table of each value.
        first_row: First value of each table among the values of this process, and their number R.
        order: Numbers of the steps of this process in order. Steps are numbered table by table, value by value, level by
            level.
        joint: The same steps among those of all processes.
        row_of: Value of each step, int32.
        level_of: Level to which each step leads, int8.
    """

    def __init__(self, full: SizePlan, reached: Sequence[np.ndarray], shares: Shares, row_cost: int) -> None:
        num_levels = [scores.shape[1] for scores in reached]
        own_rows = list(map(len, reached))
        self.full, self.shares, self.row_cost = full, shares, row_cost
        self.num_rows = [t.num_rows for t in full.tables]
        self.size_of = [np.array([0, *buckets(t.width)], np.int32) for t in full.tables]
        most = max(map(len, self.size_of))
        self.sizes_TL = np.array([np.pad(sizes, (0, most - len(sizes))) for sizes in self.size_of])
        self.table_R = np.repeat(np.arange(len(full.tables), dtype=np.int32), own_rows)
        self.first_row = np.cumsum([0, *own_rows])
        falling = np.concatenate([scores.ravel() for scores in reached])
        np.negative(falling, out=falling)
        dtype = np.int32 if len(falling) <= np.iinfo(np.int32).max else np.int64
        self.order = np.argsort(falling, kind="stable").astype(dtype)
        first_step = np.cumsum([0, *(n * t for n, t in zip(num_levels, own_rows, strict=True))])
        missing = sum(n * t for n, t in zip(num_levels, self.num_rows, strict=True)) - len(falling)
        if int(shares.group.largest(torch.tensor(missing))):
            firsts = shares.firsts or [0] * len(reached)
            before = np.cumsum([0, *(n * t for n, t in zip(num_levels, self.num_rows, strict=True))])
            shift = [before[t] + firsts[t] * n - first_step[t] for t, n in enumerate(num_levels)]
            places = np.arange(len(falling)) + np.repeat(shift, np.diff(first_step))
            self.joint: OwnOrder = JointOrder(falling[self.order], places[self.order], shares.group)
        else:
            self.joint = OwnOrder(len(falling))
        del falling
        row_R = np.arange(self.first_row[-1], dtype=np.int32)
        parts = zip(np.split(row_R, self.first_row[1:-1]), num_levels, strict=True)
        self.row_of = np.concatenate([np.repeat(row_N, levels) for row_N, levels in parts])
        tiled = [np.tile(np.arange(1, n + 1, dtype=np.int8), t) for n, t in zip(num_levels, own_rows, strict=True)]
        self.level_of = np.concatenate(tiled)
        # The kind of a step is its table and level.
        self._first_kind = np.cumsum([0, *num_levels])
        kind_of = np.empty(len(self.order), np.int32)
        for start, stop, kind in zip(first_step, first_step[1:], self._first_kind, strict=False):
            kind_of[start:stop] = kind + self.level_of[start:stop] - 1
        self._kinds = kind_of[self.order]
        self._taken = {0: np.zeros(self._first_kind[-1], np.int64)}

    def rows_of_levels(self, prefix: int) -> list[np.ndarray]:
        """How many values have each level after the first `prefix` steps, by table."""
        own = self.joint.own(prefix)
        if own not in self._taken:  # a bisection asks for ever smaller parts beyond a prefix that it knows
            known = max(number for number in self._taken if number < own)
            taken = self._taken[known].copy()
            for start in range(known, own, CHUNK_STEPS):
                taken += np.bincount(self._kinds[start : min(start + CHUNK_STEPS, own)], minlength=len(taken))
            self._taken[own] = taken
        # A value takes its steps in the order of their levels, so those at a level or above took the step to it.
        above = np.split(self.shares.summed(self._taken[own]), self._first_kind[1:-1])
        return [
            np.concatenate([[num_rows], taken_L]) - np.append(taken_L, 0)
            for num_rows, taken_L in zip(self.num_rows, above, strict=True)
        ]

    def rows_at(self, level_R: np.ndarray) -> list[np.ndarray]:
        """How many values of all processes have each level, by table, where those of this process have `level_R`."""
        sizes = np.diff(self._first_kind) + 1
        parts = zip(np.split(level_R, self.first_row[1:-1]), sizes, strict=True)
        counts = np.concatenate([np.bincount(level_N, minlength=levels) for level_N, levels in parts])
        return np.split(self.shares.summed(counts), np.cumsum(sizes)[:-1])

    def cost_of(self, rows_of_levels: Sequence[np.ndarray]) -> int:
        """Cost of the plan with so many rows at each level, by table."""
        pairs = zip(self.size_of, rows_of_levels, strict=True)
        plan = counted_plan(self.full, [dict(zip(*pair, strict=True)) for pair in pairs])
        return plan.num_params + self.row_cost * sum(t.num_compact_rows for t in plan.tables)

    def kept_few(self, rows_of_levels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`rows_of_levels` after `keep_few`."""
        found = [rows_L.copy() for rows_L in rows_of_levels]
        for rows_L, level in zip(found, self._lifted(found), strict=True):
            if level:
                rows_L[level] += rows_L[0]
                rows_L[0] = 0
        return found

    def keep_few(self, level_R: np.ndarray) -> np.ndarray:
        """Lift values of size 0, in place, where their own rows take less than the vector that they would share."""
        levels = self._lifted(self.rows_at(level_R))
        for level_N, level in zip(np.split(level_R, self.first_row[1:-1]), levels, strict=True):
            level_N[level_N == 0] = level
        return level_R

    def _lifted(self, rows_of_levels: Sequence[np.ndarray]) -> list[int]:
        """The level that values of size 0 of each table get; 0 where they share a vector."""
        found = []
        for rows_L, sizes in zip(rows_of_levels, self.size_of, strict=True):
            used = np.flatnonzero(rows_L[1:]) + 1
            few = len(used) and rows_L[0] * sizes[used[0]] <= sizes[used[-1]]
            found.append(int(used[0]) if few else 0)
        return found

    def levels(self, prefix: int) -> np.ndarray:
        """The level of each value (R,), int8, after the first `prefix` steps of all processes."""
        level_R, own = np.zeros(self.first_row[-1], np.int8), self.joint.own(prefix)
        for start in range(0, own, CHUNK_STEPS):
            step = self.order[start : min(start + CHUNK_STEPS, own)]
            level_R[self.row_of[step]] = self.level_of[step]  # the last step of a value leads to its level
        return level_R


def next_levels(rows_of_levels: Sequence[np.ndarray], num_levels: int) -> np.ndarray:
    """For each table and level (T, num_levels) the next level that rows of the table have; -1 if there is none."""
    target_TL = np.full((len(rows_of_levels), num_levels), -1, np.int8)
    for table, rows_L in enumerate(rows_of_levels):
        used = np.flatnonzero(rows_L)
        for level in range(num_levels):
            target_TL[table, level] = min(used[used > level], default=-1)
    return target_TL


def wider_map(full: SizePlan, rows_of_levels: Sequence[np.ndarray]) -> np.ndarray:
    """Cost of one more row for each table (T,) because the table's id map then needs more bytes per entry."""
    kept = [int(rows_L[1:].sum()) for rows_L in rows_of_levels]
    return np.array(
        [
            map_params(t.num_rows, n + 2) - map_params(t.num_rows, n + 1) if full.standalone else 0
            for t, n in zip(full.tables, kept, strict=True)
        ]
    )


def sized_plan(full: SizePlan, sizes: Sequence[np.ndarray], shares: Shares = WHOLE) -> SizePlan:
    """The plan that gives each value its size (N,), by table; every process gets the rows of all."""
    tables = []
    for number, (table, size_N) in enumerate(zip(full.tables, sizes, strict=True)):
        first, blocks = shares.firsts[number] if shares.firsts else 0, []
        rows_by_size = shares.summed(np.bincount(size_N, minlength=table.width + 1))
        for block in sized_blocks(table, dict(enumerate(rows_by_size.tolist()))):
            own = torch.from_numpy(np.flatnonzero(size_N == block.width) + first)
            rows = block_rows(np.sort(shares.group.gathered(own).numpy()), table.num_rows)
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
