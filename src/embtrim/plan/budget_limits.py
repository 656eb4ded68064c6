"""What a budget allows: the least that any plan needs, and what depends on a target."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np

from embtrim.errors import BudgetError
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Bits, Block, BlockShape, TablePlan, TableShape, Target

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
    """The smallest amount of a budget in which one unit can be kept: one table keeps least, the others nothing.

    Args:
        full: The plan that keeps everything.
        budget: The budget; its unit is that of the amount.
        bits: Bits per stored value; see `search`.
        target: Where the tables will be served; see `search`.
        unit: What is kept of a table, see `least_tables`.
    """
    plan = full.shape()

    def amount(table: TableShape) -> int:
        stored = _in_fewest_bytes(plan, table, budget) if bits == "mixed" else dataclasses.replace(table, bits=bits)
        return _table_amount(plan, stored, budget, target)

    sizes = Counter((table.num_rows, table.width) for table in full.tables)
    one_of_each = {(table.num_rows, table.width): table for table in full.tables}
    nothing = {s: amount(_without_columns(t.shape(), keeps_rows=unit == "columns")) for s, t in one_of_each.items()}
    least = {size: min(map(amount, least_tables(table, unit))) for size, table in one_of_each.items()}
    more = min(least[size] - nothing[size] for size in sizes)
    return (sum(count * nothing[size] for size, count in sizes.items()) + more) / _unit_bytes(plan, budget)


def amount_of(plan: PlanShape, budget: Budget, target: Target | None) -> float:
    """The smallest amount, in the unit of a budget, that allows a plan; a percentage is given as a share."""
    shared = plan.num_shared_projection_params * (1 if budget.kind == "params" else BYTES_PER_PARAM)
    total = shared + sum(_table_amount(plan, table, budget, target) for table in plan.tables)
    return total / _unit_bytes(plan, budget)


def _table_amount(plan: PlanShape, table: TableShape, budget: Budget, target: Target | None) -> int:
    """What one table adds to the amount of a budget: parameters, or bytes."""
    return plan.table_params(table) if budget.kind == "params" else plan.table_bytes(table, target, budget)


def _unit_bytes(plan: PlanShape, budget: Budget) -> int:
    """Parameters or bytes in one unit of a budget; the unit of a percentage is the full tables."""
    return BYTES_PER_PARAM * plan.num_full_params if budget.kind == "percent" else 1


def least_tables(table: TablePlan, unit: Literal["columns", "rows"] | None = None) -> Iterator[TableShape]:
    """Layouts that keep as little as possible of a table, the whole table among them.

    The whole table may cost less than the other one, which also needs a DROPPED row.

    Args:
        table: The full table.
        unit: What is kept: one column, or one row. Without a unit it is one column of the first row, which needs no id map;
            no layout keeps less.
    """
    whole = Block(table.num_rows, tuple(range(table.width)))
    if unit == "columns":  # no row goes, nor its first-order weight
        yield dataclasses.replace(table, blocks=(Block(table.num_rows, (0,), "concat"),))
    elif unit == "rows":  # any row: its id may need a map
        yield dataclasses.replace(table.shape(), blocks=(BlockShape(1, whole.columns, "concat"),))
    else:
        yield dataclasses.replace(table, blocks=(Block(1, (0,), "concat", np.zeros(1, np.int32)),))
    yield dataclasses.replace(table, blocks=(whole,))


def _without_columns(table: TableShape, *, keeps_rows: bool) -> TableShape:
    """A table that keeps no column; its rows may stay, for their first-order weights."""
    return dataclasses.replace(table, blocks=(BlockShape(table.num_rows, ()),) if keeps_rows else ())


def full_limit(full: PlanShape, budget: Budget) -> int:
    """Parameters that a budget leaves beside the first-order weights of all rows; 0 if the weights alone exceed it."""
    try:
        return full.max_params(budget)
    except BudgetError:
        return 0


# Bits that a table may have in a plan of mixed bits; 32 bits gained nothing measurable over 16.
LEVELS = (2, 3, 4, 8, 16)


def _in_fewest_bytes(plan: PlanShape, table: TableShape, budget: Budget) -> TableShape:
    """A table with the bits that take the fewest bytes of a budget."""
    stored = [dataclasses.replace(table, bits=bits) for bits in LEVELS]
    return min(stored, key=partial(plan.table_bytes, budget=budget))
