"""uniform: one width for all fields, the largest that the budget allows; the baseline that every method must beat.

All tables get the largest width that fits. One more column then goes to tables in random order until nothing fits. If not
even width 1 fits, the most frequent rows of all tables are kept at width 1; the other rows share their table's DROPPED row.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from embtrim.config import Config
from embtrim.methods.selection import columns_cost, field_plan, filled, largest, row_plan
from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import full_limit
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment
from embtrim.tasks.task import Task, alignment_of


class UniformConfig(Config):
    """Settings of the uniform control.

    Attributes:
        align: How narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    align: Literal["scatter", "project"] = "scatter"


def search_uniform(task: Task, config: UniformConfig, budget: Budget, seed: int) -> SizePlan:
    """Give every table the same width."""
    full = task.full_plan()
    alignment = alignment_of(task, config.align)
    details = {"config": config.model_dump()}
    plan = equal_widths(full, full_limit(full, budget), alignment, seed)
    if plan is None:
        counts, columns = task.count_scores(), {t.name: range(min(1, t.width)) for t in full.tables}
        plan = filled(full, budget, lambda limit: row_plan(full, counts, columns, limit, alignment))
    return plan.made_by("uniform", budget, seed, details)


def equal_widths(full: SizePlan, limit: int, alignment: Alignment, seed: int) -> SizePlan | None:
    """The largest width that fits for all tables, and one more column, in random order of the tables, wherever it fits.

    Returns:
        The plan; None if not even width 1 fits.
    """

    def cost(width: int) -> int:
        return sum(columns_cost(full, t, min(width, t.width), alignment) for t in full.tables)

    floor = largest(full.width, lambda width: cost(width) <= limit)
    if not floor:
        return None
    # Column 0 of all tables, then column 1 and so on, each in random order of the tables. The round after the floor is cut
    # short by the budget.
    order = np.random.default_rng(seed).permutation(len(full.tables))
    place = {full.tables[table].name: rank for rank, table in enumerate(order)}
    round_S = np.concatenate([np.arange(t.width) for t in full.tables])
    rank_S = np.concatenate([np.arange(t.width) * len(order) + place[t.name] for t in full.tables])
    ranking = np.argsort(rank_S)
    return field_plan(full, ranking[round_S[ranking] <= floor], limit, alignment)
