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
from embtrim.plan.table import Alignment, Block, TablePlan, block_rows, map_params
from embtrim.tasks.row_scores import NOTHING, Cut, RowScores, before, key_bounds, lowest


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
    scores: Mapping[str, RowScores],
    columns: Mapping[str, Sequence[int]],
    limit: int,
    alignment: Alignment,
) -> SizePlan:
    """The plan that keeps the rows with the highest scores over all tables while they fit, and drops the others.

    A table keeps more rows if they take no more parameters: the whole table, or all rows up to the last kept one in a
    foreign model, which then needs no id map.

    Args:
        full: The plan that keeps everything.
        scores: Scores of the rows, by table name. Of equal scores, rows of the first tables come first.
        columns: Kept columns of the rows, by table name.
        limit: Parameters allowed; never exceeded.
        alignment: How narrow tables reach the full width.
    """
    tables = [scores[t.name] for t in full.tables]

    def cheapest(number: int, count: int, last: int) -> tuple[int, int, bool]:
        """Parameters of a table that keeps its `count` best rows, the rows it then keeps, and whether they are the first."""
        t, width = full.tables[number], len(columns[full.tables[number].name])
        if not count:
            return 0, 0, True
        choices = [
            (rows_cost(full, t, count, width), count, False),
            (rows_cost(full, t, last + 1, width, first=True), last + 1, True),
            (t.num_rows * width, t.num_rows, True),
        ]
        cost, kept, are_first = min(choices, key=lambda choice: (choice[0], -choice[1]))
        projection = width * t.width if alignment == "project" and width < t.width else 0
        return cost + projection, kept, are_first

    def costs(cuts: Sequence[Cut]) -> list[int]:
        return [cheapest(number, *pair)[0] for number, pair in enumerate(zip(*before(tables, cuts), strict=True))]

    cuts = _joint_cuts(tables, lambda cuts: sum(costs(cuts)) <= limit)
    left = limit - sum(costs(cuts))
    # The next best row of a narrower table may still fit in the rest.
    for number, table in enumerate(tables):
        if left < len(columns[full.tables[number].name]) and not full.standalone:
            continue  # parameters come in whole rows

        def cost(cut: Cut, number: int = number, table: RowScores = table) -> int:
            return cheapest(number, *(part[0] for part in before([table], [cut])))[0]

        now = cost(cuts[number])
        cuts[number] = _extended(table, cuts[number], lambda cut, cost=cost, most=now + left: cost(cut) <= most)
        left -= cost(cuts[number]) - now
    counts, lasts = before(tables, cuts)
    found = []
    for number, (t, cut) in enumerate(zip(full.tables, cuts, strict=True)):
        _, kept, are_first = cheapest(number, counts[number], lasts[number])
        first = None if kept == t.num_rows else range(kept)
        stored = first if are_first else block_rows(tables[number].rows_between(NOTHING, cut), t.num_rows)
        blocks = (Block(kept, tuple(columns[t.name]), alignment, stored),) if kept else ()
        found.append(dataclasses.replace(t, blocks=blocks))
    return dataclasses.replace(full, tables=tuple(found))


def _joint_cuts(tables: Sequence[RowScores], fits: Callable[[Sequence[Cut]], bool]) -> list[Cut]:
    """Cuts in all tables behind as many of the best rows as fit; nothing is assumed to fit."""
    low, high = key_bounds(tables)
    key = lowest(low - 1, high, lambda key: fits([Cut(key)] * len(tables)))
    cuts = [Cut(key)] * len(tables)
    if key < low:
        return cuts
    whole = [Cut(key, table.num_rows) for table in tables]  # of equal scores, all rows of the first tables
    number = largest(len(tables), lambda n: fits([*whole[:n], *cuts[n:]]))
    cuts[:number] = whole[:number]
    if number < len(tables):
        others = cuts[number + 1 :]
        last = largest(tables[number].num_rows, lambda n: fits([*cuts[:number], Cut(key, n - 1), *others]))
        cuts[number] = Cut(key, last - 1)
    return cuts


def _extended(table: RowScores, cut: Cut, fits: Callable[[Cut], bool]) -> Cut:
    """The cut of one table behind as many of its best rows as fit; those before a cut are known to fit."""
    low = key_bounds([table])[0]
    if cut.key < low:
        return cut
    key = lowest(low - 1, cut.key, lambda key: fits(Cut(key)))
    if key < low:
        return Cut(key)
    return Cut(key, largest(table.num_rows, lambda n: fits(Cut(key, n - 1))) - 1)


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
