"""The solvers of a budget, and the methods that are rules without training, by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from embtrim.errors import BudgetError
from embtrim.methods import (
    FrequencyConfig,
    MagnitudeConfig,
    MDEConfig,
    UniformConfig,
    search,
)
from embtrim.methods.selection import field_plan, largest, row_plan, rows_cost
from embtrim.models import FNN, DeepFM
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import TablePlan
from embtrim.schema import Schema
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.row_scores import RowScores
from embtrim.testing.toys import (
    foreign_batches,
    foreign_task,
)


def hand_plan(*sizes: int, width: int = 4) -> SizePlan:
    return SizePlan.full(Schema.from_sizes(sizes), width)


def test_field_plan_by_hand():
    full = hand_plan(5, 3, width=2)  # slots: f0 columns at 5, f1 columns at 3
    ranking = np.array([2, 0, 1, 3])

    def columns(limit: int, alignment="scatter", min_dim: int = 0) -> list[tuple[int, ...]]:
        return [t.columns for t in field_plan(full, ranking, limit, alignment, min_dim).tables]

    assert columns(10) == [(0,), (0,)]
    assert columns(7) == [(), (0, 1)]  # 5 does not fit beside 3 and is skipped
    assert columns(13) == [(0, 1), (0,)]
    assert columns(8, min_dim=1) == [(0,), (0,)]
    with pytest.raises(BudgetError, match="take 8"):
        columns(7, min_dim=1)
    # Projected: one column of f1 takes 3 + 2, both without projection 6; one of f0 takes 7, both 10.
    assert columns(5, "project") == [(), (0,)]
    assert columns(6, "project") == [(), (0, 1)]
    assert columns(15, "project") == [(0, 1), (0,)]
    assert columns(16, "project") == [(0, 1), (0, 1)]
    # First columns alone are ranked: f1's takes 2 + 2 projected, which is what the whole table takes without projection.
    first = field_plan(hand_plan(5, 2, width=2), np.array([2, 0]), 11, "project")
    assert [t.columns for t in first.tables] == [(0,), (0, 1)]
    assert first.num_params == 11


def test_row_plan_by_hand():
    full = hand_plan(4, 3, width=2)
    scores = {"f0": RowScores(np.array([9, 1, 8, 7])), "f1": RowScores(np.array([6, 5, 0]))}
    columns = {"f0": (0, 1), "f1": (1,)}

    def kept(limit: int) -> list[list[int] | None]:
        plan = row_plan(full, scores, columns, limit, "scatter")
        assert plan.num_params <= limit
        return [None if b.rows is None else list(b.rows) for t in plan.tables for b in t.blocks]

    assert kept(1) == []
    assert kept(3) == [None]  # only f1, of one column, fits
    assert kept(4) == [[0]]  # the row and DROPPED
    assert kept(6) == [[0, 2]]
    assert kept(8) == [None]  # the last row takes the place of DROPPED
    assert kept(10) == [None, [0]]
    assert kept(11) == [None, None]


def naive_row_plan(full: SizePlan, scores: dict[str, np.ndarray], width: int, limit: int) -> list[int]:
    """Rows kept of each table: one after the other while their parameters fit, then of each table while one more fits."""

    def cost(table: TablePlan, rows: list[int]) -> int:
        if not rows:
            return 0
        first, whole = max(rows) + 1, table.num_rows * width
        return min(rows_cost(full, table, len(rows), width), rows_cost(full, table, first, width, first=True), whole)

    taken: list[list[int]] = [[] for _ in full.tables]
    total = lambda: sum(map(cost, full.tables, taken))  # noqa: E731
    ordered = sorted((-s, t, row) for t, table in enumerate(full.tables) for row, s in enumerate(scores[table.name]))
    for _, t, row in ordered:
        taken[t].append(row)
        if total() > limit:
            taken[t].pop()
            break
    for t in range(len(full.tables)):
        for row in [row for _, other, row in ordered if other == t][len(taken[t]) :]:
            taken[t].append(row)
            if total() > limit:
                taken[t].pop()
                break
    return list(map(cost, full.tables, taken))


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("kind", ["counts", "floats", "falling", "equal"])
def test_row_plans_are_those_of_one_row_after_the_other(kind: str, standalone: bool):
    rng = np.random.default_rng(len(kind) + standalone)
    draw = {
        "counts": lambda n: rng.geometric(0.3, n) - 1,
        "floats": lambda n: rng.normal(0, 1, n),
        "falling": lambda n: np.sort(rng.geometric(0.1, n))[::-1],
        "equal": lambda n: np.zeros(n),
    }[kind]
    for _ in range(8):
        full = dataclasses.replace(hand_plan(*rng.integers(1, 40, 3), width=3), standalone=standalone)
        scores = {table.name: draw(table.num_rows) for table in full.tables}
        limit = int(rng.integers(0, full.num_params + 3))
        columns = {table.name: (0, 2) for table in full.tables}
        plan = row_plan(full, {name: RowScores(s) for name, s in scores.items()}, columns, limit, "scatter")
        assert [plan.table_params(table) for table in plan.tables] == naive_row_plan(full, scores, 2, limit)
        assert plan.num_params <= limit


def test_largest():
    assert [largest(9, lambda n, most=most: n <= most) for most in (-1, 0, 4, 9, 20)] == [0, 0, 4, 9, 9]


def test_uniform_by_hand(data):
    model = FNN(data.schema, embedding_dim=8, hidden_units=(4,))
    plan = search(CTRTask(model, data), UniformConfig(), "30%", seed=1)
    widths = [t.output_width for t in plan.tables]
    # 30% of 2050 x 8 is 4920 = 2 x 2050 + 820: width 2 for all; the small tables get a third column, noise does not.
    assert widths == [3, 3, 2]


@pytest.mark.parametrize("foreign", [False, True])
def test_uniform_below_width_one_keeps_the_most_frequent_rows(data, foreign):
    task = foreign_task() if foreign else CTRTask(FNN(data.schema, embedding_dim=8, hidden_units=(4,)), data)
    plan = search(task, UniformConfig(), "33 params" if foreign else "3%")
    assert plan.num_params <= plan.max_params(Budget.parse("33 params" if foreign else "3%"))
    counts = task.row_counts()
    cut = [t for t in plan.tables if t.has_dropped and t.blocks]
    assert bool(cut) != foreign  # the map of a foreign table costs as much as a column
    for table in cut:
        kept = table.blocks[0].rows
        dropped = np.setdiff1d(np.arange(table.num_rows), kept)
        assert counts[table.name][kept].min() >= counts[table.name][dropped].max()
        assert table.output_width == 1


def test_frequency_keeps_the_most_frequent_values_of_all_fields(data):
    task = CTRTask(FNN(data.schema, embedding_dim=8, hidden_units=(4,)), data)
    plan = search(task, FrequencyConfig(), "5%")
    counts = task.row_counts()
    kept = {t.name: t.blocks[0].rows if t.has_dropped else np.arange(t.num_rows) for t in plan.tables if t.blocks}
    lowest = min(counts[name][rows].min() for name, rows in kept.items())
    for t in plan.tables:
        dropped = np.setdiff1d(np.arange(t.num_rows), kept.get(t.name, []))
        assert counts[t.name][dropped].max(initial=0) <= lowest
    assert all(t.output_width in (0, 8) for t in plan.tables)


def test_foreign_task_counts_its_rows():
    counts = foreign_task().row_counts()
    ids = torch.cat([ids for ids, _ in foreign_batches()])
    assert counts["user"].tolist() == torch.bincount(ids[:, 0], minlength=40).tolist()
    assert counts["item"].tolist() == torch.bincount(ids[:, 1:].flatten(), minlength=25).tolist()


def test_magnitude_by_hand(data):
    model = FNN(data.schema, embedding_dim=2, hidden_units=(4,))
    task = CTRTask(model, data)
    strong, weak, noise = task.sites(model)[0].weights()
    for weight, scale in ((strong, (1.0, 3.0)), (weak, (2.0, 0.5)), (noise, (0.1, 0.2))):
        weight.copy_(torch.tensor(scale).expand_as(weight))

    def columns(**settings) -> list[tuple[int, ...]]:
        return [t.columns for t in search(task, MagnitudeConfig(**settings), "50 params").tables]

    # Norms: 1 and 3 times sqrt(30), 2 and 0.5 times sqrt(20), 0.1 and 0.2 times sqrt(2000): 5.5 16.4 8.9 2.2 4.5 8.9.
    assert columns() == [(1,), (0,), ()]
    assert [t.columns for t in search(task, MagnitudeConfig(), "2040 params").tables] == [(1,), (), (1,)]
    # Per parameter: 0.18 0.55 0.45 0.11 0.002 0.004.
    assert columns(cost_aware=True) == [(1,), (0,), ()]
    strong[4] = 9.0
    rows = search(task, MagnitudeConfig(unit="rows"), "4 params").tables[0].blocks[0].rows
    assert rows.tolist() == [4]


def test_mde_by_hand(data):
    task = CTRTask(FNN(data.schema, embedding_dim=8, hidden_units=(4,)), data)
    # n = 30, 20, 2000 and d proportional to n^-0.5: 0.183 : 0.224 : 0.022.
    plan = search(task, MDEConfig(alpha=0.5), "2400 params")
    assert [t.output_width for t in plan.tables] == [8, 8, 1]
    even = search(task, MDEConfig(alpha=0.0), "4100 params")
    assert [t.output_width for t in even.tables] == [2, 2, 2]
    projected = search(CTRTask(DeepFM(data.schema, embedding_dim=8, hidden_units=(4,)), data), MDEConfig(), "50%")
    assert {t.alignment for t in projected.tables} == {"project"}
    assert projected.num_projection_params > 0
