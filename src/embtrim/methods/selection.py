"""Fill a budget with slots: a pure solver, apart from models and tables.

A slot is a (table, column) pair and costs the table's rows; projected tables pay D more a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from embtrim.errors import BudgetError
from embtrim.plan import Alignment, SizePlan


def slot_costs(plan: SizePlan, alignment: Alignment) -> np.ndarray:
    """int64 (S,): parameters that each slot costs, table by table, column by column."""
    extra = 1 if alignment == "project" else 0
    return np.concatenate([np.full(t.width, t.num_rows + extra * plan.width, np.int64) for t in plan.tables])


def fill_budget(ranking: np.ndarray, costs: np.ndarray, limit: int, tables: np.ndarray, min_dim: int = 0) -> np.ndarray:
    """Accept slots in order of rank while they fit, skipping those that do not.

    Args:
        ranking: slots (S,), best first.
        costs: parameters a slot costs (S,).
        limit: parameters allowed; never exceeded.
        tables: number of each slot's table (S,).
        min_dim: columns that every table gets first, its best ones.

    Returns:
        bool (S,): the slots accepted.

    Raises:
        BudgetError: the minimum does not fit.
    """
    accepted = np.zeros(len(costs), bool)
    if min_dim:
        of_table = tables[ranking]
        for table in np.unique(tables):
            accepted[ranking[of_table == table][:min_dim]] = True
        floor = int(costs[accepted].sum())
        if floor > limit:
            raise BudgetError(
                f"budget allows {limit:,} embedding parameters, but {min_dim} column(s) in every table take {floor:,}; "
                "raise the budget or set min_dim = 0"
            )
    left = limit - int(costs[accepted].sum())
    for slot in ranking:
        if not accepted[slot] and costs[slot] <= left:
            accepted[slot] = True
            left -= int(costs[slot])
    return accepted


def columns_by_table(plan: SizePlan, accepted: np.ndarray) -> Mapping[str, Sequence[int]]:
    """Kept columns by table name, from accepted slots (S,)."""
    ends = np.cumsum([t.width for t in plan.tables])
    parts = np.split(accepted, ends[:-1])
    return {t.name: np.flatnonzero(part).tolist() for t, part in zip(plan.tables, parts, strict=True)}


def slot_tables(plan: SizePlan) -> np.ndarray:
    """int64 (S,): number of each slot's table."""
    return np.repeat(np.arange(len(plan.tables)), [t.width for t in plan.tables])
