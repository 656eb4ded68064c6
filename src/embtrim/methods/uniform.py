"""uniform: one width for all fields, as far as the budget goes; the baseline that every method must beat.

The floor width for all, then one more column in random order of the tables until nothing fits. Below width 1 the most
frequent rows of all tables at width 1; the others share their table's DROPPED row.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from embtrim.budget import Budget
from embtrim.config import Config
from embtrim.errors import BudgetError
from embtrim.methods.registry import register
from embtrim.methods.selection import slot_costs
from embtrim.plan import Alignment, Block, SizePlan, TablePlan
from embtrim.schema import OOV
from embtrim.sites import Task, alignment_of


class UniformConfig(Config):
    """Settings of the uniform control.

    Attributes:
        align: how narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    align: Literal["scatter", "project"] = "scatter"


@register("uniform", UniformConfig, needs="nothing")
def search_uniform(task: Task, config: UniformConfig, budget: Budget, seed: int) -> SizePlan:
    """Give every table the same width."""
    full = task.full_plan()
    alignment = alignment_of(task, config.align)
    limit = full.max_params(budget)
    details = {"config": config.model_dump(), "budget": str(budget), "seed": seed}
    costs = slot_costs(full, alignment)
    starts = np.cumsum([0, *(t.width for t in full.tables)])[:-1]
    column_costs = costs[starts]
    widths = np.zeros(len(full.tables), np.int64)
    most = np.array([t.width for t in full.tables])
    while True:
        grown = np.minimum(widths + 1, most)
        if np.array_equal(grown, widths) or int(grown @ column_costs) > limit:
            break
        widths = grown
    if not widths.any():
        return most_frequent_rows(task, full, limit, details, alignment)
    left = limit - int(widths @ column_costs)
    for table in np.random.default_rng(seed).permutation(len(widths)):
        if widths[table] < most[table] and column_costs[table] <= left:
            widths[table] += 1
            left -= int(column_costs[table])
    columns = {t.name: range(w) for t, w in zip(full.tables, widths.tolist(), strict=True)}
    return full.with_columns(columns, "uniform", details, alignment)


def most_frequent_rows(
    task: Task, full: SizePlan, limit: int, details: dict[str, object], alignment: Alignment
) -> SizePlan:
    """Width 1 for as many of the most frequent rows as fit, OOV rows and one DROPPED row a table first."""
    counts = task.row_counts()
    if counts is None:
        raise BudgetError(
            f"budget allows {limit:,} embedding parameters, fewer than one column a table, and this task does not "
            "know which rows are frequent; raise the budget"
        )
    fixed = sum(min(2, t.num_rows) for t in full.tables)
    fixed += len(full.tables) * full.width if alignment == "project" else 0
    if fixed > limit:
        raise BudgetError(f"budget allows {limit:,} embedding parameters, the smallest uniform plan has {fixed:,}")
    # A table of n rows keeps at most n - 2 rows beside OOV and DROPPED for one parameter each; its last row, which
    # takes the place of DROPPED, is then free.
    order = [(-int(c), i, row) for i, t in enumerate(full.tables) for row, c in enumerate(counts[t.name]) if row != OOV]
    order.sort()
    kept: list[list[int]] = [[OOV] for _ in full.tables]
    left = limit - fixed
    for _, table, row in order:
        last = len(kept[table]) == full.tables[table].num_rows - 1
        if left > 0 or last:
            kept[table].append(row)
            left -= not last
    tables = []
    for t, rows in zip(full.tables, kept, strict=True):
        block = Block(len(rows), (0,), alignment, np.array(sorted(rows), np.int32) if len(rows) < t.num_rows else None)
        tables.append(TablePlan(t.name, t.num_rows, t.width, (block,)))
    return dataclasses.replace(full, tables=tuple(tables), method="uniform", details=details)
