"""Rows by threshold, and one width per table by evolution, within a budget: a pure solver that knows no model.

A candidate is a tuple of widths, one per table; a table without rows has width 0, any other table at least 1. Costs are
the parameters of the candidate's plan.

Axes: T tables, D width of the full table, V rows of a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from embtrim.errors import BudgetError
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment, Block, TablePlan, block_rows

Widths = tuple[int, ...]

# Tables whose widening is scored one by one.
MOST_SCORED = 100
Score = Callable[[Sequence[Widths]], list[float]]


class EvolutionConfig(Protocol):
    """The settings that `evolve` reads; see OptEmbedConfig."""

    population: int
    mutations: int
    mutation_rate: float
    crossovers: int
    num_elite: int


class Space:
    """The candidates that are possible with a set of kept rows.

    Args:
        full: The plan that keeps everything.
        alignment: How narrow tables reach the full width in the candidates' plans.
        kept: Rows that each table keeps, bool (V,).
        budget: Budget that candidates are repaired to; None allows every width.

    Attributes:
        least_T: Smallest widths: 1, or 0 for a table that keeps no row.
        most_T: Largest widths.
        limit: Parameters allowed; None without a budget.

    Raises:
        BudgetError: Not even the smallest widths fit.
    """

    def __init__(
        self, full: SizePlan, alignment: Alignment, kept: Sequence[np.ndarray], budget: Budget | None = None
    ) -> None:
        self.full, self.kept = full, kept
        self.alignment: Alignment = alignment
        num_kept = [int(rows_V.sum()) for rows_V in kept]
        self.most_T = np.array([t.width if num else 0 for t, num in zip(full.tables, num_kept, strict=True)])
        self.least_T = np.minimum(1, self.most_T)
        self.limit: int | None = None
        if budget is not None:
            narrowest = self.plan(tuple(self.least_T))
            self.limit = narrowest.max_params(budget)
            if narrowest.num_params > self.limit:
                raise BudgetError(
                    f"budget allows {self.limit:,} embedding parameters, width 1 of all kept rows takes "
                    f"{narrowest.num_params:,}; raise the budget"
                )

    @cached_property
    def costs(self) -> list[np.ndarray]:
        """Parameters of each table by its width, int64 (D + 1,)."""
        return [
            np.array([table_cost(self.full, t, v, d, self.alignment) for d in range(t.width + 1)], np.int64)
            for t, v in zip(self.full.tables, self.kept, strict=True)
        ]

    @cached_property
    def spares(self) -> list[np.ndarray]:
        """What each table can save at most by a smaller width, by its width, int64 (D + 1,); 0 below its smallest width."""
        found = []
        for cost, low in zip(self.costs, self.least_T.tolist(), strict=True):
            spare = np.zeros_like(cost)
            spare[low:] = cost[low:] - np.minimum.accumulate(cost[low:])
            found.append(spare)
        return found

    def plan(self, widths: Widths) -> SizePlan:
        """The plan of a candidate."""
        tables = [
            table_plan(table, rows_V, int(width), self.alignment)
            for table, rows_V, width in zip(self.full.tables, self.kept, widths, strict=True)
        ]
        return dataclasses.replace(self.full, tables=tuple(tables))

    def cost(self, widths: Sequence[int] | np.ndarray) -> int:
        """Parameters of a candidate's plan."""
        return sum(int(cost[width]) for cost, width in zip(self.costs, widths, strict=True))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Widths (T,), each uniform in 1..D."""
        return rng.integers(self.least_T, self.most_T + 1)

    def repair(self, widths_T: np.ndarray, rng: np.random.Generator) -> Widths:
        """Lower widths until the budget holds.

        A table is drawn in proportion to its cost beyond width 1. If it can save the excess alone, it gets the largest
        width that does; otherwise it gets a smaller width at random.
        """
        widths_T = widths_T.copy()
        if self.limit is None:
            return tuple(widths_T.tolist())
        excess = self.cost(widths_T) - self.limit
        spare_T = np.array([spare[width] for spare, width in zip(self.spares, widths_T, strict=True)], np.float64)
        while excess > 0:
            table = int(rng.choice(len(widths_T), p=spare_T / spare_T.sum()))
            cost, width, low = self.costs[table], int(widths_T[table]), int(self.least_T[table])
            enough = [d for d in range(low, width) if cost[width] - cost[d] >= excess]
            smaller = [d for d in range(low, width) if cost[d] < cost[width]]
            lowered = max(enough) if enough else int(rng.choice(smaller))
            excess -= int(cost[width] - cost[lowered])
            widths_T[table], spare_T[table] = lowered, self.spares[table][lowered]
        return tuple(widths_T.tolist())

    def widest(self, widths: Sequence[int], table: int, spent: int) -> int:
        """The largest width of a table that fits beside the other widths.

        Args:
            widths: The present widths.
            table: Number of the table.
            spent: Parameters of the present widths; see `cost`.
        """
        assert self.limit is not None
        cost = self.costs[table]
        left = self.limit - spent + int(cost[widths[table]])
        return max(d for d in range(widths[table], int(self.most_T[table]) + 1) if cost[d] <= left)


def evolve(
    space: Space, score: Score, config: EvolutionConfig, rng: np.random.Generator, generations: Iterable[int]
) -> list[Widths]:
    """The best candidates, best first, after a first population and one generation for each item of `generations`."""
    best = ranked([space.repair(space.draw(rng), rng) for _ in range(config.population)], score)[: config.num_elite]
    for _ in generations:
        parents = np.array(best)
        children = [mutate(space, parents[rng.integers(len(best))], config, rng) for _ in range(config.mutations)]
        for _ in range(config.crossovers):
            left, right = rng.integers(len(best), size=2)
            children.append(crossover(parents[left], parents[right], rng))
        best = ranked([*best, *(space.repair(child, rng) for child in children)], score)[: config.num_elite]
    return best


def ranked(candidates: Sequence[Widths], score: Score) -> list[Widths]:
    """Distinct candidates by falling score; candidates of equal score in order of their widths."""
    distinct = list(dict.fromkeys(candidates))
    scores = dict(zip(distinct, score(distinct), strict=True))
    return sorted(distinct, key=lambda widths: (-scores[widths], widths))


def mutate(space: Space, parent_T: np.ndarray, config: EvolutionConfig, rng: np.random.Generator) -> np.ndarray:
    """A copy of a candidate in which each width is drawn again with the chance of the mutation rate."""
    return np.where(rng.random(len(parent_T)) < config.mutation_rate, space.draw(rng), parent_T)


def crossover(left_T: np.ndarray, right_T: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The widths of the first tables from one parent and the rest from the other."""
    point = rng.integers(1, len(left_T)) if len(left_T) > 1 else 1
    return np.concatenate([left_T[:point], right_T[point:]])


def fill(space: Space, widths: Widths, score: Score) -> Widths:
    """Widen tables as far as the budget allows, first the table whose widening alone scores best.

    Of more than MOST_SCORED tables only those are scored whose widening takes most parameters; the others follow, since
    every score takes a forward pass.
    """
    spent, wide = space.cost(widths), list(widths)
    widest = [space.widest(wide, table, spent) for table in range(len(wide))]
    taken = [int(cost[w] - cost[d]) for cost, w, d in zip(space.costs, widest, wide, strict=True)]
    by_size = sorted(range(len(wide)), key=lambda table: -taken[table])
    scored = sorted(by_size[:MOST_SCORED])
    scores = score([(*widths[:table], widest[table], *widths[table + 1 :]) for table in scored])
    gain = dict(zip(scored, scores, strict=True))
    order = [*sorted(scored, key=lambda table: -gain[table]), *by_size[MOST_SCORED:]]
    changed = True
    while changed:  # a table at full width needs no projection, which leaves room for others
        changed = False
        for table in order:
            cost, width = space.costs[table], space.widest(wide, table, spent)
            if width != wide[table]:
                spent += int(cost[width] - cost[wide[table]])
                wide[table], changed = width, True
    return tuple(wide)


def kept_rows(
    full: SizePlan,
    alignment: Alignment,
    margins: Sequence[np.ndarray],
    reserved: Sequence[int | None],
    widths: Sequence[int],
    raised: float = 0.0,
) -> list[np.ndarray]:
    """Rows of each table whose margin exceeds `raised`, bool (V,); all rows if fewer save nothing at `widths`."""
    found = []
    for table, margin_V, row, width in zip(full.tables, margins, reserved, widths, strict=True):
        kept_V = margin_V > raised
        if row is not None:
            kept_V[row] = False
            kept_V[row] = kept_V.any()
        all_V = np.ones_like(kept_V)
        saves = table_cost(full, table, kept_V, width, alignment) < table_cost(full, table, all_V, width, alignment)
        found.append(kept_V if saves else all_V)
    return found


def fits(full: SizePlan, alignment: Alignment, kept: Sequence[np.ndarray], budget: Budget) -> bool:
    """Whether the kept rows fit the budget at width 1."""
    try:
        Space(full, alignment, kept, budget)
    except BudgetError:
        return False
    return True


def raise_thresholds(
    full: SizePlan,
    alignment: Alignment,
    margins: Sequence[np.ndarray],
    reserved: Sequence[int | None],
    budget: Budget,
) -> tuple[list[np.ndarray], float]:
    """Raise all thresholds by the smallest common amount at which width 1 everywhere fits the budget.

    Returns:
        The kept rows of each table, bool (V,), and the amount.
    """
    levels = np.unique(np.concatenate([np.zeros(1, np.float32), *(m[m > 0] for m in margins)]))
    ones = [min(1, t.width) for t in full.tables]

    def rows_at(level: int) -> list[np.ndarray]:
        return kept_rows(full, alignment, margins, reserved, ones, float(levels[level]))

    low, high = 0, len(levels) - 1  # at the last level no row is left
    while low < high:
        middle = (low + high) // 2
        if fits(full, alignment, rows_at(middle), budget):
            high = middle
        else:
            low = middle + 1
    return rows_at(low), float(levels[low])


def table_plan(table: TablePlan, kept_V: np.ndarray, width: int, alignment: Alignment) -> TablePlan:
    """The plan of a table that keeps some rows and its first columns."""
    rows = np.flatnonzero(kept_V)
    if not len(rows):
        return dataclasses.replace(table, blocks=())
    stored = block_rows(rows, table.num_rows)
    return dataclasses.replace(table, blocks=(Block(len(rows), tuple(range(width)), alignment, stored),))


def table_cost(full: SizePlan, table: TablePlan, kept_V: np.ndarray, width: int, alignment: Alignment) -> int:
    """Parameters of a table that keeps some rows and its first columns."""
    return dataclasses.replace(full, tables=(table_plan(table, kept_V, width, alignment),)).num_params
