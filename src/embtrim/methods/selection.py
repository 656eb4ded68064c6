"""Fill a budget with slots or rows: a pure solver that knows no model.

A slot is a (table, column) pair. It costs the table's rows; a column of a projected table costs D more. Costs are the
parameters that SizePlan counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from embtrim.errors import BudgetError
from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import full_limit
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment, Block, TablePlan, map_params


def slot_costs(plan: SizePlan, alignment: Alignment, kept: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """Parameters that each slot costs, int64 (S,), table by table, column by column; see `field_plan`."""
    kept = kept or {}
    costs = []
    for t in plan.tables:
        rows = len(kept[t.name]) + 1 if t.name in kept else t.num_rows
        costs.append(np.full(t.width, rows + (t.width if alignment == "project" else 0), np.int64))
    return np.concatenate(costs)


def rank_slots(margin_S: np.ndarray, costs_S: np.ndarray, mask_S: np.ndarray, by: str) -> np.ndarray:
    """Slots (S,), best first: those in use, then the others.

    Args:
        margin_S: Score a of each slot, less the threshold.
        costs_S: Parameters that each slot costs.
        mask_S: Slots in use, bool (S,).
        by: "plain" ranks by the margin. "per_cost" divides the margin by the cost; for slots that are not in use, whose
            margins are negative, it multiplies, since a quotient would put the dearest slots first.
    """
    key_S = np.where(mask_S, margin_S / costs_S, margin_S * costs_S) if by == "per_cost" else margin_S
    return np.lexsort((-key_S, ~mask_S))


def lowest_threshold(a_S: Tensor, share_S: Tensor, target: float) -> float:
    """The lowest value tau of a such that the slots with a >= tau take at most `target` of the parameters.

    If not even the best slots, which may be tied, fit, tau lies above all values.
    """
    values, place_S = torch.unique(a_S, return_inverse=True)
    share_of_value = torch.zeros(len(values), dtype=share_S.dtype, device=a_S.device).index_add(0, place_S, share_S)
    kept = share_of_value.flip(0).cumsum(0)
    num_fit = int((kept <= target + 1e-12).sum())
    return float(values[-num_fit]) if num_fit else float(torch.nextafter(values[-1], values.new_tensor(math.inf)))


def columns_by_table(plan: SizePlan, accepted: np.ndarray) -> Mapping[str, Sequence[int]]:
    """Kept columns by table name, from accepted slots (S,)."""
    ends = np.cumsum([t.width for t in plan.tables])
    parts = np.split(accepted, ends[:-1])
    return {t.name: np.flatnonzero(part).tolist() for t, part in zip(plan.tables, parts, strict=True)}


def slot_tables(plan: SizePlan) -> np.ndarray:
    """The number of each slot's table, int64 (S,)."""
    return np.repeat(np.arange(len(plan.tables)), [t.width for t in plan.tables])


def field_plan(
    full: SizePlan,
    ranking: np.ndarray,
    limit: int,
    alignment: Alignment,
    min_dim: int = 0,
    kept: Mapping[str, np.ndarray] | None = None,
) -> SizePlan:
    """The plan that accepts slots in order of rank while they fit, skipping those that do not.

    No table costs more than the whole table: if d columns of some rows, with their projection and id map, would cost more,
    the table keeps all columns of all rows instead.

    Args:
        full: The plan that keeps everything, with rows and widths.
        ranking: All slots or a part of them, best first; slots run table by table, column by column.
        limit: Parameters allowed; never exceeded.
        alignment: How narrow tables reach the full width.
        min_dim: Columns that every table gets before others; its best ones.
        kept: Ids of the rows that a table keeps, ascending, by table name; other tables keep all rows.

    Raises:
        BudgetError: The columns of `min_dim` do not fit.
    """
    kept = kept or {}
    accepted = np.zeros(sum(t.width for t in full.tables), bool)
    of_slot = slot_tables(full)
    widths = np.zeros(len(full.tables), np.int64)
    floor = [slot for t in range(len(widths)) for slot in ranking[of_slot[ranking] == t][:min_dim]] if min_dim else []
    left = limit

    def cost(table: TablePlan, width: int) -> int:
        return columns_cost(full, table, width, alignment, kept)

    for slot in [*floor, *ranking]:
        if accepted[slot]:
            continue
        table, width = full.tables[of_slot[slot]], int(widths[of_slot[slot]])
        more = cost(table, width + 1) - cost(table, width)
        if more <= left:
            accepted[slot] = True
            widths[of_slot[slot]] += 1
            left -= more
        elif widths[of_slot[slot]] < min_dim:
            needed = sum(cost(t, min(min_dim, t.width)) for t in full.tables)
            raise BudgetError(
                f"budget allows {limit:,} embedding parameters, but {min_dim} column(s) in every table take {needed:,}; "
                "raise the budget or set min_dim = 0"
            )
    for number, t in enumerate(full.tables):
        if widths[number] and cost(t, int(widths[number])) == t.num_rows * t.width:
            accepted[of_slot == number] = (
                True  # all its columns are paid for, even if the ranking ends before the last one
            )
    plan = full.with_columns(columns_by_table(full, accepted), alignment)
    tables = []
    for t in plan.tables:
        if t.name in kept and t.output_width and cost(t, t.output_width) < t.num_rows * t.width:
            t = dataclasses.replace(t, blocks=(Block(len(kept[t.name]), t.columns, alignment, kept[t.name]),))
        tables.append(t)
    return dataclasses.replace(plan, tables=tuple(tables))


def columns_cost(
    full: SizePlan, table: TablePlan, width: int, alignment: Alignment, kept: Mapping[str, np.ndarray] | None = None
) -> int:
    """Parameters of `width` columns of a table's kept rows, with their DROPPED row, projection and id map.

    They are at most the parameters of the whole table, and 0 for a table that keeps nothing.
    """
    if not width:
        return 0
    rows = (kept or {}).get(table.name)
    if rows is None:
        stored = table.num_rows * width
    else:
        stored = rows_cost(full, table, len(rows), width, first=bool(rows[-1] == len(rows) - 1))
    projection = table.width if alignment == "project" else 0
    return min(stored + width * projection, table.num_rows * table.width)


def row_plan(
    full: SizePlan,
    scores: Mapping[str, np.ndarray],
    columns: Mapping[str, Sequence[int]],
    limit: int,
    alignment: Alignment,
) -> SizePlan:
    """The plan that keeps the rows with the highest scores over all tables while they fit, and drops the others.

    A table keeps more rows if they take no more parameters: the whole table, or all rows up to the last kept one in a
    foreign model, which then needs no id map.

    Args:
        full: The plan that keeps everything.
        scores: Scores of the rows (V,), by table name.
        columns: Kept columns of the rows, by table name.
        limit: Parameters allowed; never exceeded.
        alignment: How narrow tables reach the full width.
    """
    sizes = [t.num_rows for t in full.tables]
    table_of = np.repeat(np.arange(len(sizes)), sizes)
    row_of = np.concatenate([np.arange(n) for n in sizes])
    order = np.argsort(-np.concatenate([scores[t.name] for t in full.tables]), kind="stable")
    table_of, row_of = table_of[order], row_of[order]

    by_table = [row_of[table_of == number] for number in range(len(sizes))]
    last = [np.maximum.accumulate(rows) for rows in by_table]

    def cheapest(number: int, count: int) -> tuple[int, int, bool]:
        """Parameters of a table that keeps its `count` best rows, the rows it then keeps, and whether they are the first."""
        t, width = full.tables[number], len(columns[full.tables[number].name])
        if not count:
            return 0, 0, True
        first = int(last[number][count - 1]) + 1
        choices = [
            (rows_cost(full, t, count, width), count, False),
            (rows_cost(full, t, first, width, first=True), first, True),
            (t.num_rows * width, t.num_rows, True),
        ]
        cost, kept, are_first = min(choices, key=lambda choice: (choice[0], -choice[1]))
        projection = width * t.width if alignment == "project" and width < t.width else 0
        return cost + projection, kept, are_first

    def count(prefix: int) -> list[int]:
        return np.bincount(table_of[:prefix], minlength=len(sizes)).tolist()

    def cost(counts: Sequence[int]) -> int:
        return sum(cheapest(number, n)[0] for number, n in enumerate(counts))

    counts = count(largest(len(order), lambda prefix: cost(count(prefix)) <= limit))
    left = limit - cost(counts)
    # The next best row of a narrower table may still fit in the rest.
    for number, size in enumerate(sizes):
        while counts[number] < size:
            more = cheapest(number, counts[number] + 1)[0] - cheapest(number, counts[number])[0]
            if more > left:
                break
            counts[number] += 1
            left -= more
    tables = []
    for number, (t, n) in enumerate(zip(full.tables, counts, strict=True)):
        _, kept, are_first = cheapest(number, n)
        rows = np.arange(kept) if are_first else np.sort(by_table[number][:n])
        stored = None if kept == t.num_rows else rows.astype(np.int32)
        blocks = (Block(kept, tuple(columns[t.name]), alignment, stored),) if kept else ()
        tables.append(dataclasses.replace(t, blocks=blocks))
    return dataclasses.replace(full, tables=tuple(tables))


def rows_cost(full: SizePlan, table: TablePlan, count: int, width: int, first: bool = False) -> int:
    """Parameters of `count` rows at a width, their DROPPED row, and the id map that a foreign table needs.

    A table that keeps its `first` rows needs no map.
    """
    mapped = full.standalone and not first
    return (count + 1) * width + (map_params(table.num_rows, count + 1) if mapped else 0)


def filled(full: SizePlan, budget: Budget, make: Callable[[int], SizePlan]) -> SizePlan:
    """The plan that `make` returns for as many parameters as a budget allows.

    A budget in bytes includes first-order weights, and a plan that drops rows has fewer of them. The parameters left for
    the tables are therefore known only once there is a plan.

    Args:
        full: The plan that keeps everything.
        budget: Budget in percent, parameters or bytes.
        make: Function of a limit of parameters that returns a plan within it; a larger limit gives no smaller plan.

    Raises:
        BudgetError: The first-order weights alone exceed a number of bytes.
    """
    if budget.kind != "bytes" or not full.first_order:
        return make(full.max_params(budget))

    def fits(limit: int) -> bool:
        plan = make(limit)
        return plan.num_params <= full_limit(plan, budget)

    plan = make(largest(full.num_full_params, fits))
    plan.max_params(budget)  # raises if nothing fits
    return plan


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number in 0..most that fits; 0 is assumed to fit, and so is every number below one that fits."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
