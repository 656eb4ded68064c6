"""What a budget allows: the least that any plan needs, and what depends on a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np

from embtrim.errors import BudgetError
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.plan import PlanShape, PlanT, SizePlan
from embtrim.plan.table import Bits, Block, BlockShape, TableShape, Target

# What a method adds to a plan until the budget is used: a column of a table, a row, or the next size of a row.
Unit = Literal["columns", "rows", "sizes"]


# A percentage was rounded when it was printed: a plan may exceed it by this factor.
ROUNDED = 1 + 1e-9


def counts_vocabulary(budget: Budget | None, target: Target | None) -> bool:
    """Whether a budget includes the vocabulary: a budget in bytes does where a target is named."""
    return target is not None and budget is not None and budget.kind == "bytes"


def target_settings(budget: Budget | None, target: Target | None) -> dict[str, Any]:
    """Settings that depend on a target, by which interrupted work is recognised. No target is written as "torch"."""
    return {"target": target or "torch", "vocabulary in the budget": counts_vocabulary(budget, target)}


def check_budget(
    full: SizePlan, budget: Budget, bits: Bits = 32, target: Target | None = None, adds: tuple[Unit, ...] = ()
) -> None:
    """Raise BudgetError for a budget in which no search could keep anything.

    Args:
        full: The plan that keeps everything.
        budget: The budget of the search.
        bits: Bits per stored value; see `search`.
        target: Where the tables will be served; see `search`.
        adds: Units that the method adds, see Method; the check then holds for methods that add only these units.
    """
    units: list[Literal["columns", "rows"]] = [unit for unit in adds if unit != "sizes"]
    least = min(least_amount(full, budget, bits, target, unit) for unit in units or (None,))
    if least > budget.amount * ROUNDED:
        whose = f"a method that keeps {' or '.join(units)}" if units else "any method"
        raise BudgetError(
            f"budget of {budget} is below the smallest plan of {whose}, {budget.words_for(least)}; give at least that"
        )


def least_amount(
    full: SizePlan, budget: Budget, bits: Bits, target: Target | None, unit: Literal["columns", "rows"] | None = None
) -> float:
    """The smallest amount of a budget in which one unit can be kept; see `least_plans` and `amount_of`."""
    return min(
        amount_of(in_fewest_bytes(plan, budget) if bits == "mixed" else plan.with_bits(bits), budget, target)
        for plan in least_plans(full, unit)
    )


def amount_of(plan: PlanShape, budget: Budget, target: Target | None) -> float:
    """The smallest amount, in the unit of a budget, that allows a plan; a percentage is given as a share."""
    if budget.kind == "params":
        return plan.num_params
    unit = 1 if budget.kind == "bytes" else BYTES_PER_PARAM * plan.num_full_params
    return budget.amount + (plan.num_bytes(target) - plan.max_bytes(budget, target)) / unit


def least_plans(full: SizePlan, unit: Literal["columns", "rows"] | None = None) -> Iterator[PlanShape]:
    """Plans that keep as little as possible of one table, and nothing of the other tables.

    Args:
        full: The plan that keeps everything.
        unit: What is kept of a table: one column, or one row. Without a unit it is one column of the first row, which needs
            no id map; no plan keeps less. A whole
            table may cost less than one of these, because they also need a DROPPED row.
    """
    for number, table in enumerate(full.tables):
        whole = Block(table.num_rows, tuple(range(table.width)))
        if unit == "columns":  # no row goes, nor its first-order weight
            least = dataclasses.replace(table, blocks=(Block(table.num_rows, (0,), "concat"),))
        elif unit == "rows":  # any row: its id may need a map
            least = dataclasses.replace(table.shape(), blocks=(BlockShape(1, whole.columns, "concat"),))
        else:
            least = dataclasses.replace(table, blocks=(Block(1, (0,), "concat", np.zeros(1, np.int32)),))
        for kept in (least, dataclasses.replace(table, blocks=(whole,))):
            tables: list[TableShape] = [
                dataclasses.replace(other, blocks=(Block(other.num_rows, ()),) if unit == "columns" else ())
                for other in full.tables
            ]
            tables[number] = kept
            yield dataclasses.replace(full.shape(), tables=tuple(tables))


def full_limit(full: PlanShape, budget: Budget) -> int:
    """Parameters that a budget leaves beside the first-order weights of all rows; 0 if the weights alone exceed it."""
    try:
        return full.max_params(budget)
    except BudgetError:
        return 0


# Bits that a table may have in a plan of mixed bits; 32 bits gained nothing measurable over 16.
LEVELS = (4, 8, 16)


def in_fewest_bytes(plan: PlanT, budget: Budget) -> PlanT:
    """The plan with the bits for each table that take the fewest bytes of a budget."""

    def num_bytes(table: TableShape, bits: int) -> int:
        return plan.table_bytes(dataclasses.replace(table, bits=bits), budget=budget)

    return plan.with_bits({t.name: min(LEVELS, key=partial(num_bytes, t)) for t in plan.tables})
