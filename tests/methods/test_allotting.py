"""Allotting a budget: bytes go where they save most predicted loss, and no budget is exceeded."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embtrim.compaction.low_rank import Basis
from embtrim.methods import UniformConfig, search
from embtrim.methods.allotting import (
    CLOSE,
    Choices,
    Recovery,
    _equal_widths,
    _lost_together,
    _noise_of,
    _with_rows,
    allot,
    choices_of,
    ladders_of,
    lower_hull,
    some_numbers,
    spend,
)
from embtrim.methods.guided import GuidedConfig, plan_within
from embtrim.methods.readings import Curve, Readings, Segments, TableReading, read
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment, Bits, Target
from embtrim.schema import Schema
from embtrim.tasks.row_scores import RowScores
from embtrim.tasks.task import Task
from embtrim.testing.toys import foreign_task, pooled_task, zoo_task

LINE = Curve((0.0, 1.0), (0.0, 1.0), (1.0, 0.0))


def reading_of(
    energy_V: np.ndarray, lost_D: np.ndarray, noise: dict[int, float], absence: float | None = None
) -> TableReading:
    """A reading of one segment, whose rows are used alike and whose coordinates are equally noisy."""
    own = {bits: value * np.linspace(0, 1, len(lost_D)) for bits, value in noise.items()}
    rows, uses = np.array([len(energy_V)]), np.array([float(len(energy_V))])
    segments = Segments(rows, uses, {b: np.array([n]) for b, n in noise.items()}, {b: n[None] for b, n in own.items()})
    return TableReading(RowScores(energy_V), lost_D, noise, own, segments, absence)


def basis_of(width: int, columns: tuple[int, ...] | None = None) -> Basis:
    """A basis that says nothing but its columns."""
    whole = torch.eye(width)
    return Basis(whole, whole, np.zeros(width + 1), np.ones(width), torch.zeros(width), 1.0, columns)


def made_readings(full: SizePlan, seed: int = 0, absence: float | None = None) -> Readings:
    """Readings that could be those of a model of a plan, with curves that are straight."""
    rng = np.random.default_rng(seed)
    tables = {}
    for number, table in enumerate(full.tables):
        lost_D = np.append(np.sort(rng.exponential(0.1, table.width))[::-1].cumsum()[::-1], 0.0)
        noise = {8: 1e-4 * rng.random(), 4: 1e-2 * rng.random()}
        energy_V = rng.exponential(0.02, table.num_rows)
        tables[table.name] = reading_of(energy_V, lost_D, noise, absence if number == 0 else None)
    return Readings(0.8, 0.001, tables, LINE, LINE, LINE, {t.name: basis_of(t.width) for t in full.tables})


# ---- spend -------------------------------------------------------------------------------------------------------------


def arrays_of(tables: list[list[tuple[int, int]]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    sizes = [np.array([size for size, _ in of_table], np.int64) for of_table in tables]
    return sizes, [np.array([float(loss) for _, loss in of_table]) for of_table in tables]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=5), min_size=1, max_size=3
    ),
    st.integers(0, 50),
)
def test_bytes_are_spent_where_they_save_most(tables, more):
    bytes_TN, losses_TN = arrays_of(tables)
    allowed = sum(int(sizes.min()) for sizes in bytes_TN) + more
    chosen = spend(bytes_TN, losses_TN, allowed)
    spent = sum(int(sizes[n]) for sizes, n in zip(bytes_TN, chosen, strict=True))
    lost = sum(float(losses[n]) for losses, n in zip(losses_TN, chosen, strict=True))
    assert spent <= allowed
    # Greedy steps miss the optimum by less than the one step that did not fit.
    best = min(
        sum(loss for _, loss in every)
        for every in itertools.product(*tables)
        if sum(size for size, _ in every) <= allowed
    )
    assert lost <= best + max(float(losses.max() - losses.min()) for losses in losses_TN)
    # No table has a better choice that still fits.
    for sizes, losses, n in zip(bytes_TN, losses_TN, chosen, strict=True):
        assert (losses[sizes - sizes[n] <= allowed - spent] >= losses[n]).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=12))
def test_the_hull_has_no_choice_below_it(choices):
    (sizes,), (losses,) = arrays_of([choices])
    hull = lower_hull(sizes, losses)
    assert (np.diff(sizes[hull]) > 0).all()
    assert (np.diff(losses[hull]) < 0).all()
    assert (np.diff(np.diff(losses[hull]) / np.diff(sizes[hull])) > 0).all(), "each step saves less per byte"
    assert sizes[hull[0]] == sizes.min()
    assert losses[hull[-1]] == losses.min()
    for size, loss in choices:
        if size <= sizes[hull[-1]]:
            assert loss >= np.interp(size, sizes[hull], losses[hull]) - 1e-9


def test_steps_are_taken_in_the_order_of_what_they_save_per_byte():
    """Table 0 saves 6 for 2 bytes, then 2 for 2; table 1 saves 8 for 4, then 1 for 4."""
    bytes_TN = [np.array([1, 3, 5]), np.array([1, 5, 9])]
    losses_TN = [np.array([10.0, 4.0, 2.0]), np.array([10.0, 2.0, 1.0])]
    found = [spend(bytes_TN, losses_TN, allowed) for allowed in (1, 2, 4, 8, 10, 14, 99)]
    assert found == [[0, 0], [0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [2, 2]]


def test_a_step_that_does_not_fit_is_replaced_by_the_best_choice_that_does():
    bytes_TN = [np.array([0, 100, 30, 60])]
    losses_TN = [np.array([10.0, 0.0, 9.0, 8.0])]
    assert lower_hull(bytes_TN[0], losses_TN[0]) == [0, 1]
    assert spend(bytes_TN, losses_TN, 99) == [3]
    assert spend(bytes_TN, losses_TN, 59) == [2]


def test_some_numbers_are_all_small_ones_and_some_per_doubling():
    assert some_numbers(1) == [1]
    assert some_numbers(6) == [1, 2, 3, 4, 5, 6]
    assert some_numbers(20) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 20]
    assert len(some_numbers(10**8)) < 120


# ---- what a choice loses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absence", [None, 0.02, 0.0, -0.01])
def test_what_a_choice_loses_by_hand(absence):
    full = SizePlan.full(Schema.from_sizes([30]), 4)
    reading = made_readings(full, absence=absence).tables["f0"]
    budget, weight = Budget.parse("20%"), 1.0 if absence is None or absence > 0 else 0.0
    found = choices_of(
        full,
        full.tables[0],
        reading,
        reading.lost_D,
        budget,
        (4, 16),
        "project",
        None,
        keeps_rows=False,
        coordinates=True,
    )
    ranked = np.sort(reading.energies.scores)[::-1]
    seen = set()
    for n, (size, errors) in enumerate(zip(found.bytes_N, found.errors_LN.T, strict=True)):
        table = found.layout(n, "project")
        kept = ranked[: table.num_kept].sum()
        assert size == full.table_bytes(table, budget=budget)
        if table.blocks:
            part, width = kept / ranked.sum(), table.output_width
            expected = [weight * (ranked.sum() - kept), weight * part * reading.lost_D[width]]
            noise = table.num_kept / 30 * width / 4 * reading.noise.get(table.bits, 0.0)
            if weight:  # a table that is not missed may not count at all
                assert errors == pytest.approx([*expected, noise], abs=1e-12)
            else:
                assert errors == pytest.approx([0, 0, 0], abs=1e-12)
            assert table.alignment == "project"
        else:
            assert errors == pytest.approx([weight * ranked.sum(), 0, 0])
        seen.add((table.num_kept, table.output_width, table.bits))
    assert seen == {(0, 0, 4)} | set(itertools.product(some_numbers(30), (1, 2, 3, 4), (4, 16)))


def test_rows_without_columns_keep_first_order_weights_and_lose_as_dropped_rows_do():
    full = SizePlan.full(Schema.from_sizes([30]), 4, first_order=True)
    reading = made_readings(full).tables["f0"]
    budget, table = Budget.parse("400 bytes"), full.tables[0]
    found = choices_of(
        full, table, reading, reading.lost_D, budget, (4, 16), "project", None,
        keeps_rows=False, first_order_alone=True, coordinates=True,
    )  # fmt: skip
    ranked = np.sort(reading.energies.scores)[::-1]
    bare = np.flatnonzero((found.widths_N == 0) & (found.rows_N > 0))
    assert found.rows_N[bare].tolist() == some_numbers(30)
    for n in bare.tolist():
        layout, kept = found.layout(n, "project"), ranked[: found.rows_N[n]].sum()
        assert (layout.num_kept, layout.output_width, layout.bits) == (found.rows_N[n], 0, 4)
        assert layout.num_value_bytes == 0
        assert found.bytes_N[n] == full.table_bytes(layout, budget=budget) >= layout.num_kept
        lost = ranked.sum() - kept + kept / ranked.sum() * reading.lost_D[0]
        assert found.errors_LN[:, n] == pytest.approx([lost, 0, 0])


def test_a_plan_may_keep_first_order_weights_alone():
    """The rows of one table say nothing but through these weights: its readings have no loss without columns."""
    full = SizePlan.full(Schema.from_sizes([30, 30]), 4, first_order=True)
    readings = made_readings(full)
    bare = dataclasses.replace(readings.tables["f0"], lost_D=np.zeros(5))
    readings = dataclasses.replace(readings, tables={**readings.tables, "f0": bare})
    found = {
        alone: allot(readings, full, Budget.parse("70%"), (32,), "scatter", first_order_alone=alone)
        for alone in (True, False)
    }
    table = found[True].plan.tables[0]
    assert (table.num_kept, table.output_width) == (30, 0)
    assert found[False].plan.tables[0].output_width > 0
    assert found[True].loss <= found[False].loss


def test_the_columns_of_a_plan_are_the_first_ones_of_the_basis():
    full = SizePlan.full(Schema.from_sizes([30, 9]), 4)
    readings = dataclasses.replace(made_readings(full), bases={t.name: basis_of(4, (2, 0, 3, 1)) for t in full.tables})
    found = allot(readings, full, Budget.parse("20%"), (32,), "scatter")
    columns = {t.columns for t in found.plan.tables if t.blocks}
    assert columns <= {(2,), (0, 2), (0, 2, 3), (0, 1, 2, 3)}
    assert min(map(len, columns)) < 4
    from_scratch = allot(readings, full, Budget.parse("20%"), (32,), "scatter", coordinates=False)
    assert all(t.columns == tuple(range(t.output_width)) for t in from_scratch.plan.tables)


# ---- bands -------------------------------------------------------------------------------------------------------------


def banded_reading() -> TableReading:
    """100 rows in three segments: the first is used most, and noise falls by four with each bit."""
    rows, uses = np.array([10, 30, 60]), np.array([1000.0, 100.0, 10.0])
    noise = {bits: uses / 4.0**bits for bits in (2, 3, 4, 8)}
    own = {bits: values[:, None] * np.linspace(0, 1, 5) for bits, values in noise.items()}
    energy_V = np.repeat([100.0, 5.0, 0.2], rows)
    whole = {bits: float(values.sum()) for bits, values in noise.items()}
    own_whole = {bits: values.sum(0) for bits, values in own.items()}
    lost_D = np.array([9.0, 3.0, 1.0, 0.2, 0.0])
    return TableReading(RowScores(energy_V), lost_D, whole, own_whole, Segments(rows, uses, noise, own))


def test_ladders_give_more_bits_to_rows_of_more_energy():
    ladders = ladders_of(banded_reading(), (2, 3, 4, 8, 16))
    assert ladders[:5] == [((100, bits),) for bits in (2, 3, 4, 8, 16)]
    assert ((10, 4), (30, 3), (60, 2)) in ladders
    for bands in ladders:
        assert sum(rows for rows, _ in bands) == 100
        assert [bits for _, bits in bands] == sorted({bits for _, bits in bands}, reverse=True)
    assert len(ladders) == len(set(ladders))
    assert ladders_of(banded_reading(), (8,)) == [((100, 8),)]
    assert ladders_of(banded_reading(), (32,)) == [((100, 32),)]


def test_noise_of_bands_by_hand():
    """Every band has the step of its first segment; the last rows of a segment are dropped in proportion."""
    bands, counts = ((40, 3), (60, 2)), np.array([10, 25, 40, 100])
    found = _noise_of(banded_reading(), bands, counts, np.array([2, 4]), coordinates=True)
    first = 1000.0 / 4**3
    second = first * 100 / 1000
    third = 10 / 4**2
    expected = np.array([first, first + second / 2, first + second, first + second + third])
    assert found[1] == pytest.approx(expected)
    assert found[0] == pytest.approx(expected / 2), "two of four coordinates"
    again = _noise_of(banded_reading(), bands, counts, np.array([2, 4]), coordinates=False)
    assert again == pytest.approx(np.stack([expected, expected])), "two columns are as strong as four were"


@pytest.mark.parametrize("standalone", [False, True])
def test_bytes_and_rows_of_bands_are_those_of_their_layout(standalone: bool):
    full = dataclasses.replace(
        SizePlan.full(Schema.from_sizes([100]), 4, first_order=not standalone), standalone=standalone
    )
    reading, budget = banded_reading(), Budget.parse("2000 b")
    found = choices_of(
        full, full.tables[0], reading, reading.lost_D, budget, (2, 3, 4, 8, 16), "project", None,
        keeps_rows=False, coordinates=True,
    )  # fmt: skip
    layouts = [found.layout(n, "project") for n in range(len(found.bytes_N))]
    assert found.bytes_N.tolist() == [full.table_bytes(table, budget=budget) for table in layouts]
    assert max(len(table.bands) for table in layouts) == 3
    shape = next(t for t in layouts if len(t.bands) == 3 and t.has_dropped)
    table = _with_rows(shape, RowScores(np.arange(100.0)))
    kept = np.concatenate([block.rows for block in table.blocks])
    assert sorted(kept.tolist()) == list(range(100 - shape.num_kept, 100))
    for before, after in itertools.pairwise(table.blocks):
        assert before.rows.min() > after.rows.max()
    assert table.dropped_id == table.blocks[0].num_rows


def test_a_plan_has_bands_where_they_pay():
    full = SizePlan.full(Schema.from_sizes([100]), 4)
    readings = dataclasses.replace(made_readings(full), tables={"f0": banded_reading()})
    found = allot(readings, full, Budget.parse("14%"), (2, 3, 4, 8, 16), "concat")
    (table,) = found.plan.tables
    assert len(table.bands) > 1
    assert found.plan.num_bytes() <= 0.14 * 4 * 400
    plain = allot(readings, full, Budget.parse("14%"), (4,), "concat")
    assert found.loss < plain.loss
    assert len(plain.plan.tables[0].bands) == 1


def test_tables_that_share_columns_lose_what_all_lose_together():
    """8 of 12 and 3 of 4 are left at one column, 11/16 together; 2 and 0 at two, 2/16."""
    found = _lost_together({"a": np.array([12.0, 8.0, 2.0, 0.0]), "b": np.array([4.0, 3.0, 0.0])})
    assert found["a"] == pytest.approx([12, 12 * 11 / 16, 12 * 2 / 16, 0])
    assert found["b"] == pytest.approx([4, 4 * 11 / 16, 0]), "at its full width a table lacks no column"
    assert _lost_together({"a": np.zeros(3)})["a"].tolist() == [0, 0, 0]


# ---- plans -------------------------------------------------------------------------------------------------------------

LADDER = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)


@pytest.fixture(scope="module", params=[zoo_task, foreign_task, pooled_task])
def read_task(request) -> tuple[Task, Readings]:
    task = request.param()
    return task, read(task)


@pytest.mark.parametrize("start", ["low_rank", "scratch"])
@pytest.mark.parametrize(
    ("bits", "target"),
    [(32, None), (32, "fbgemm"), (8, None), (4, "onnx"), (16, None), ("mixed", None), ("mixed", "onnx")],
)
def test_no_budget_is_exceeded_and_more_of_it_loses_no_more(
    read_task, start: str, bits: Bits, target: Target | None
) -> None:
    task, readings = read_task
    full, config = task.full_plan(), GuidedConfig(start=start)
    for kind in ("percent", "bytes"):
        losses: list[float] = []
        for share in LADDER:
            amount = share if kind == "percent" else float(int(share * full.num_bytes()))
            budget = Budget(kind, amount)
            found = plan_within(task, readings, config, budget, bits, target)
            plan = found.plan
            if not plan.keeps_nothing:
                assert plan.num_bytes(target) <= plan.max_bytes(budget, target) + 1e-6
            assert found.loss == pytest.approx(sum(found.losses))
            assert {t.bits for t in plan.tables} <= ({2, 3, 4, 8, 16} if bits == "mixed" else {bits})
            if not plan.keeps_nothing:
                losses.append(found.loss)
        # Bytes come in lumps, and codes of more rows lose a little more.
        lump = 0.02 * (max(losses) - min(losses)) + readings.bits.losses[1] + 5e-5 * (bits != 32)
        lump += CLOSE * readings.error * (start == "scratch")  # equal widths win although they lose so much more
        assert all(later <= earlier + lump for earlier, later in itertools.pairwise(losses))
        assert losses[-1] <= losses[0]
        assert len(losses) >= len(LADDER) - 4, "a budget that allows rows gets some"


def test_a_number_of_parameters_is_kept_to_in_fp32(read_task):
    task, readings = read_task
    for amount in (60, 200, 400):
        for bits in (32, 8):
            plan = plan_within(task, readings, GuidedConfig(), Budget("params", amount), bits).plan
            assert 0 < plan.num_params <= amount
            assert {t.bits for t in plan.tables} == {bits}


def choices_of_all(
    full: SizePlan, readings: Readings, budget: Budget, levels: tuple[int, ...], alignment: Alignment
) -> list[Choices]:
    """The choices of every table, with the columns of its own reading."""
    found = []
    for table in full.tables:
        reading = readings.tables[table.name]
        found.append(
            choices_of(
                full,
                table,
                reading,
                reading.lost_D,
                budget,
                levels,
                alignment,
                None,
                keeps_rows=False,
                coordinates=True,
            )
        )
    return found


def test_equal_widths_are_among_the_candidates():
    full = SizePlan.full(Schema.from_sizes([30, 9, 4]), 4)
    readings, budget, levels = made_readings(full), Budget.parse("55%"), (32, 8)
    choices = choices_of_all(full, readings, budget, levels, "scatter")
    allowed = full.counted_bytes(budget)
    narrow, coded = _equal_widths(choices, 4, levels, allowed)
    for chosen, width, bits in ((narrow, 2, 32), (coded, 4, 8)):
        tables = [of.layout(n, "scatter") for of, n in zip(choices, chosen, strict=True)]
        assert {(t.output_width, t.bits, t.has_dropped) for t in tables} == {(width, bits, False)}
        assert sum(int(of.bytes_N[n]) for of, n in zip(choices, chosen, strict=True)) <= allowed


def test_equal_widths_win_where_nothing_else_is_worth_more():
    """Every row and every column is worth the same: the plan is that of the uniform method."""
    task = zoo_task()
    full = task.full_plan()
    tables = {
        t.name: reading_of(np.full(t.num_rows, 1e6), np.arange(t.width, -1.0, -1.0) * t.num_rows / 1e3, {})
        for t in full.tables
    }
    readings = Readings(0.8, 0.001, tables, LINE, Curve((0.0, 1e3), (0.0, 1.0), (8.0, 0.0)), LINE, {})
    found = allot(readings, full, Budget.parse("50%"), (32,), "scatter", coordinates=False)
    assert not found.plan.diff(search(task, UniformConfig(align="scatter"), "50%"))


def test_equal_widths_win_where_a_plan_is_hardly_better():
    """The error of the score decides, where tables are trained again; a start of low rank takes what it is told."""
    full = SizePlan.full(Schema.from_sizes([30, 9, 4]), 4)
    for error, is_equal in ((1e-9, False), (1e3, True)):
        readings = dataclasses.replace(made_readings(full), error=error)
        for coordinates in (False, True):
            found = allot(readings, full, Budget.parse("55%"), (32,), "concat", coordinates=coordinates)
            shapes = {(t.output_width, t.has_dropped) for t in found.plan.tables}
            assert (shapes == {(2, False)}) == (is_equal and not coordinates)


@pytest.mark.parametrize("num_rows", [1, 2, 9, 40, 300, 40_000])
@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("target", [None, "fbgemm"])
def test_bytes_are_those_of_every_layout(num_rows: int, standalone: bool, target: Target | None):
    """They are found from a few layouts; a map of ids takes one, two or four bytes a row."""
    full = SizePlan.full(Schema.from_sizes([num_rows]), 5, first_order=not standalone)
    full = dataclasses.replace(full, standalone=standalone)
    reading = reading_of(np.ones(num_rows), np.arange(5, -1.0, -1.0), {})
    levels = (32,) if target else (4, 8, 16, 32)
    for kind in ("bytes", "percent"):
        budget = Budget(kind, 0.5)
        for alignment in ("project", "concat"):
            found = choices_of(
                full,
                full.tables[0],
                reading,
                reading.lost_D,
                budget,
                levels,
                alignment,
                target,
                keeps_rows=False,
                coordinates=True,
            )
            expected = [
                full.table_bytes(found.layout(n, alignment), target, budget=budget) for n in range(len(found.bytes_N))
            ]
            assert found.bytes_N.tolist() == expected


def test_the_rows_of_most_energy_are_kept():
    full = SizePlan.full(Schema.from_sizes([30, 9]), 4)
    readings = made_readings(full)
    found = allot(readings, full, Budget.parse("30%"), (32,), "concat")
    dropped = 0
    for table in found.plan.tables:
        energy_V = readings.tables[table.name].energies.scores
        if table.blocks and table.has_dropped:
            out = np.setdiff1d(np.arange(table.num_rows), table.blocks[0].rows)
            assert energy_V[table.blocks[0].rows].min() >= energy_V[out].max()
            dropped += len(out)
    assert dropped


def test_the_predicted_loss_is_that_of_the_curves():
    full = SizePlan.full(Schema.from_sizes([30, 9]), 4)
    readings, recovery = made_readings(full), Recovery(rows=0.5, widths=0.25, bits=1.0)
    found = allot(readings, full, Budget.parse("20%"), (8,), "concat", recovery=recovery)
    errors = np.zeros(3)
    for table in found.plan.tables:
        reading = readings.tables[table.name]
        total = reading.energies.scores.sum()
        kept = reading.energies.scores[table.blocks[0].rows].sum() if table.blocks and table.has_dropped else total
        kept = kept if table.blocks else 0.0
        errors += [total - kept, kept / total * reading.lost_D[table.output_width] if kept else 0.0, 0.0]
        errors[2] += table.num_kept / table.num_rows * table.output_width / 4 * reading.noise[8]
    expected = [eta * LINE.loss(error) for eta, error in zip(recovery, errors, strict=True)]
    assert found.losses == pytest.approx(expected)
    assert found.loss == pytest.approx(sum(expected))


def test_a_table_that_is_not_missed_goes_first():
    full = SizePlan.full(Schema.from_sizes([30, 30, 30]), 4)
    kept = {}
    for absence in (0.5, -0.1):
        found = allot(made_readings(full, absence=absence), full, Budget.parse("60%"), (32,), "concat")
        kept[absence] = found.plan.tables[0].num_kept * found.plan.tables[0].output_width
    assert kept[0.5] > 30
    assert kept[-0.1] == 0


def test_no_better_plan_is_found_by_trying_all(monkeypatch):
    """On two tiny tables the plan loses little more than the best of all plans."""
    full = SizePlan.full(Schema.from_sizes([5, 4]), 2)
    for seed, share in itertools.product(range(4), (0.3, 0.5, 0.8)):
        readings, budget = made_readings(full, seed), Budget("percent", share)
        found = allot(readings, full, budget, (32, 8), "concat")
        choices = choices_of_all(full, readings, budget, (32, 8), "concat")
        least = min(
            float(LINE.loss(errors[0]) + LINE.loss(errors[1]) + LINE.loss(errors[2]))
            for a, b in itertools.product(*(range(len(of.bytes_N)) for of in choices))
            if choices[0].bytes_N[a] + choices[1].bytes_N[b] <= full.counted_bytes(budget)
            for errors in [choices[0].errors_LN[:, a] + choices[1].errors_LN[:, b]]
        )
        nothing = sum(float(readings.tables[t.name].energies.scores.sum()) for t in full.tables)
        assert least - 1e-12 <= found.loss <= least + 0.25 * nothing


@pytest.mark.parametrize("power, share, levels", [(4, 0.1, (32, 8, 4)), (1, 0.2, (32,))])
def test_bent_curves_are_spent_along_as_well_as_by_a_grid_of_rates(power: int, share: float, levels: tuple[int, ...]):
    """The mean slope of a curve that rises late is much smaller than the slope where a plan ends."""

    def bent(power: int, most: float) -> Curve:
        part = np.linspace(0, 1, 40)
        return Curve(tuple(most * part), tuple(part**power), tuple(1 - part))

    full, budget = SizePlan.full(Schema.from_sizes([600, 400, 40]), 16), Budget("percent", share)
    readings = dataclasses.replace(made_readings(full), rows=bent(power, 21), widths=bent(4, 6))
    found = allot(readings, full, budget, levels, "concat")
    (choices,) = readings.choices.values()
    sizes, losses = [of.bytes_N for of in choices], []
    for of_rows, of_widths in itertools.product(np.geomspace(1e-3, 1e3, 25), repeat=2):
        rates = np.array([of_rows, of_widths, 1.0])
        chosen = spend(sizes, [rates @ of.errors_LN for of in choices], full.counted_bytes(budget))
        errors = sum(of.errors_LN[:, n] for of, n in zip(choices, chosen, strict=True))
        curves = (readings.rows, readings.widths, readings.bits)
        losses.append(sum(curve.loss(error) for curve, error in zip(curves, errors, strict=True)))
    assert found.loss <= 1.05 * min(losses)
