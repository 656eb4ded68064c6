"""Tables in fewer bits: codes against their definition, lookups against decoding by hand, bytes against buffers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import embtrim
from embtrim.compaction.compacting import compact
from embtrim.config import Config
from embtrim.errors import BudgetError, ConfigError, EmbtrimError, PlanError
from embtrim.experiments.settings import RunConfig
from embtrim.experiments.steps import shrink, train_full
from embtrim.methods import (
    METHODS,
    FrequencyConfig,
    GuidedConfig,
    MDEConfig,
    PMEConfig,
    RandomConfig,
    SSEDSConfig,
    UniformConfig,
    search,
)
from embtrim.methods.precision import (
    Choice,
    code_loss,
    energy_of_rows,
    least_loss_plan,
    mixed_bits,
    row_choices,
    some_numbers,
    spend,
    trained_rows,
)
from embtrim.methods.registry import register
from embtrim.models import FNN, DeepFM
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import BITS, Block, TablePlan
from embtrim.schema import Schema
from embtrim.serving.bundle import load_bundle, save
from embtrim.serving.exporting import export
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.packing import CLIPS, PackedRows
from embtrim.tables.row_optimizers import RowSGD
from embtrim.tasks.task import CTRTask, Task
from embtrim.testing.checks import foreign_task, planted_data
from embtrim.training.evaluation import evaluate
from embtrim.training.fitting import fit
from embtrim.training.settings import TrainConfig
from tests.tables.test_tables import cases, naive, naive_fm

SCHEMA = Schema.from_sizes([10, 6, 3])


# ---- codes -------------------------------------------------------------------------------------------------------


def packed(values_NW: Tensor, bits: int) -> PackedRows:
    store = PackedRows(len(values_NW), values_NW.shape[1], bits, num_stretches=1)
    store.store(0, torch.arange(len(values_NW)), values_NW)
    return store


def read_all(store: PackedRows) -> Tensor:
    return store(torch.arange(len(store.values))[:, None], torch.tensor([0]))[:, 0]


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 999), st.sampled_from([1e-6, 1.0, 1e4]))
def test_codes_round_to_nearest_inside_their_range_and_clip_outside(bits, num_rows, width, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    values = spread * torch.randn(num_rows, width, generator=generator) ** 3
    store = packed(values, bits)
    low, step = store.offset[0].double(), store.scale[0].double()
    high = low + step * (2**bits - 1)
    error = (read_all(store).double() - values.double()).abs()
    slack = 1e-5 * values.abs().amax(0)
    nearest = torch.clamp(values.double(), low, high)
    assert (error <= (values.double() - nearest).abs() + step / 2 + slack).all()
    # No worse than codes from the smallest to the largest value.
    span = (values.amax(0) - values.amin(0)).double()
    assert (error.square().mean(0).sqrt() <= span / (2**bits - 1) / 2 + slack).all()
    if num_rows == 1:
        assert torch.equal(read_all(store), values)


def test_an_outlier_is_clipped_where_that_loses_less():
    values = torch.linspace(-1, 1, 1001)[:, None].repeat(1, 2)
    values[0, 1] = -4.0
    plain, outlier = packed(values, 4).scale[0] * 15
    assert 1.79 < plain <= 2.0
    assert outlier < 0.95 * 5.0
    assert CLIPS[0] == 1.0, "a range that needs no clipping is tried"


def test_two_codes_a_byte_by_hand():
    # Columns 0..2 span 0..15, so that codes are the values; the third stands in the low bits of the second byte.
    store = packed(torch.tensor([[0.0, 15.0, 3.0], [15.0, 0.0, 0.0], [1.0, 2.0, 15.0]]), 4)
    assert store.values.tolist() == [[0 + 3 * 16, 15], [15, 0], [1 + 15 * 16, 2]]


def test_half_precision_is_rounded_once():
    values = torch.randn(7, 3)
    assert torch.equal(read_all(packed(values, 16)), values.half().float())


# ---- tables ------------------------------------------------------------------------------------------------------


def decoded(tables: EmbeddingTables, table: TablePlan, compact_id: int) -> np.ndarray:
    """One stored row, out of the buffers that a file holds."""
    state = tables.state_dict()
    row = int(tables.storage_rows(table.name, np.array([compact_id]))[0])
    ((number, group),) = [(n, g) for n, g in enumerate(tables.groups) if g.start <= row < g.start + g.num_rows]
    stored = state[f"packed.{number}.values"][row - group.start].numpy()
    if table.bits > 8:
        return stored.astype(np.float64)
    if table.bits == 4:
        stored = np.concatenate([stored % 16, stored // 16])[: group.width]
    stretch = list(dict.fromkeys(group.tables)).index(table.name)
    scale, offset = (state[f"packed.{number}.{name}"][stretch].double().numpy() for name in ("scale", "offset"))
    return stored * scale + offset


def decoded_first_order(tables: EmbeddingTables, table: TablePlan, compact_id: int) -> float:
    state, bits = tables.state_dict(), {32: 32, 16: 16, 8: 8, 4: 8}
    alike = [t for t in tables.plan.tables if bits[t.bits] == bits[table.bits]]
    first = min(
        int(tables.storage_rows(t.name, np.arange(t.num_compact_rows)).min()) for t in alike if t.num_compact_rows
    )
    row = int(tables.storage_rows(table.name, np.array([compact_id]))[0]) - first
    key = f"packed_first_order.{bits[table.bits]}"
    value = float(state[f"{key}.values"][row])
    if table.bits > 8:
        return value
    stretch = alike.index(table)
    return value * float(state[f"{key}.scale"][stretch]) + float(state[f"{key}.offset"][stretch])


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_every_layout_reads_what_decoding_by_hand_gives(case, draw):
    reference, ids = case
    plan = reference.plan
    bits = {t.name: draw.draw(st.sampled_from(BITS)) for t in plan.tables}
    tables = EmbeddingTables(reference.schema, plan.with_bits(bits), 1.0).eval()
    with torch.no_grad():
        for name, parameter in tables.named_parameters():
            parameter.normal_()
            if "projection" in name:
                reference.get_parameter(name).copy_(parameter)
    original = {t.name: tables.get_rows(t.name, np.arange(t.num_compact_rows)) for t in plan.tables}
    tables.quantize()
    assert sum(value.nbytes for value in tables.state_dict().values()) == tables.plan.num_bytes()

    for table in tables.plan.tables:
        for rows, values in original[table.name]:
            if not values.shape[1]:
                continue
            found = np.stack([decoded(tables, table, i) for i in rows])
            span = np.ptp(values.numpy(), axis=0) / (2**table.bits - 1) if table.bits <= 8 else 0.0
            error = np.sqrt(((found - values.numpy()) ** 2).mean(0))
            assert (error <= span / 2 + 1e-3 * abs(values.numpy()).max() + 1e-3).all()
            wide = torch.zeros(len(rows), reference.width, dtype=torch.float64)
            wide[:, : found.shape[1]] = torch.from_numpy(found)
            reference.set_rows(table.name, rows, wide)
        if reference.first_order is not None:
            for i in range(table.num_compact_rows):
                row = reference.storage_rows(table.name, np.array([i]))
                reference.first_order.data[row] = decoded_first_order(tables, table, i)

    concat, aligned, first_order = naive(reference, ids)
    views = tables(ids)
    np.testing.assert_allclose(views.concat.detach().numpy(), concat, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(views.aligned.detach().numpy(), aligned, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(views.fm().detach().numpy(), naive_fm(aligned), rtol=1e-3, atol=1e-3)
    if tables.plan.first_order:
        np.testing.assert_allclose(views.first_order.detach().numpy(), first_order, rtol=1e-4, atol=1e-4)
    else:
        assert views.first_order is None

    again = EmbeddingTables(reference.schema, tables.plan, 1.0).eval()
    again.load_state_dict(tables.state_dict())
    assert torch.equal(again(ids).concat, views.concat)


@settings(max_examples=20, deadline=None)
@given(cases(), st.data())
def test_dequantised_tables_read_the_same_and_can_be_trained(case, draw):
    reference, ids = case
    bits = {t.name: draw.draw(st.sampled_from(BITS)) for t in reference.plan.tables}
    tables = EmbeddingTables(reference.schema, reference.plan.with_bits(bits), 1.0).eval()
    tables.quantize()
    before, state = tables(ids), {name: value.clone() for name, value in tables.state_dict().items()}
    tables.dequantize()
    tables.dequantize()
    after = tables(ids)
    torch.testing.assert_close(after.concat, before.concat)
    if before.first_order is not None:
        torch.testing.assert_close(after.first_order, before.first_order)
    if tables.weight.numel():
        tables.train()(ids).concat.sum().backward()
    tables.eval().quantize()
    assert {name: value.shape for name, value in tables.state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_what_quantised_tables_refuse():
    plan = SizePlan.full(SCHEMA, 4, first_order=True).with_bits(8)
    tables, ids = EmbeddingTables(SCHEMA, plan), torch.zeros(2, 3, dtype=torch.int32)
    with tables.gated(lambda concat: concat), pytest.raises(EmbtrimError, match="masked by a gate"):
        tables.quantize()
    tables.quantize()
    for refused in (
        tables.quantize,
        lambda: tables.gated(lambda concat: concat).__enter__(),
        lambda: RowSGD(tables),
        lambda: tables.get_rows("f0", np.array([0])),
        lambda: tables.set_rows("f0", np.array([0]), torch.zeros(1, 4)),
        lambda: tables.train()(ids),
    ):
        with pytest.raises(EmbtrimError, match="these tables are quantised, for inference only"):
            refused()
    split = EmbeddingTables(SCHEMA, plan)
    split.split_by_width()
    with pytest.raises(EmbtrimError, match="split by width"):
        split.quantize()


# ---- plans and budgets -------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    rows = np.array([0, 2, 5], np.int32)
    plan = SizePlan(SCHEMA.fingerprint, 3, (
        TablePlan("f0", 10, 4, (Block(10, (0, 1, 2)),), bits=4),
        TablePlan("f1", 6, 4, (Block(3, (0, 1), "concat", rows),), bits=8),
        TablePlan("f2", 3, 4, (Block(3, (0, 1, 2, 3)),), bits=16),
    ), first_order=True)  # fmt: skip
    values = 10 * 2 + 3 * 8 + (3 + 1) * 2 + 2 * 8 + 3 * 4 * 2
    assert plan.num_bytes() == values + (10 + 8) + (4 + 8) + 3 * 2
    assert plan.num_params == 30 + 8 + 12
    assert plan.with_bits(32).num_bytes() == 4 * (50 + 17)
    assert plan.tables[0] in plan.with_bits({"f2": 8}).tables
    assert "10 rows x 3 of 10 x 4 (columns [0, 1, 2]), 4 bits" in plan.summary()
    assert plan.digest != plan.with_bits(32).digest
    assert "bits" in plan.diff(plan.with_bits(32))


def test_a_saved_plan_keeps_its_bits(tmp_path: Path):
    plan = SizePlan.full(SCHEMA, 4)
    plan.save(tmp_path / "old.json")
    assert "bits" not in (tmp_path / "old.json").read_text()
    plan.with_bits({"f1": 4}).save(tmp_path / "new.json")
    assert [t.bits for t in SizePlan.load(tmp_path / "new.json").tables] == [32, 4, 32]
    values = json.loads((tmp_path / "new.json").read_text())
    values["tables"][1]["bits"] = 3
    (tmp_path / "new.json").write_text(json.dumps(values))
    with pytest.raises(PlanError, match="'f1': bits must be 32, 16, 8 or 4, given 3"):
        SizePlan.load(tmp_path / "new.json")
    with pytest.raises(PlanError, match="names table 'f9', the plan has f0, f1, f2"):
        plan.with_bits({"f9": 8})


def test_limits_of_fewer_bits_by_hand():
    plan = SizePlan.full(SCHEMA, 4, first_order=True)  # 76 parameters, 19 first-order weights
    assert [plan.with_bits(bits).max_bytes(Budget.parse("50%")) for bits in BITS] == [
        152 + 4 * 19, 152 + 2 * 19, 152 + 19 + 3 * 8, 152 + 19 + 3 * 8
    ]  # fmt: skip
    assert plan.with_bits(8).max_bytes(Budget.parse("200b")) == 200
    assert plan.with_bits(16).max_bytes(Budget.parse("38 params")) == (76 + 19)


def test_bytes_of_one_table_by_hand():
    """A table of 8 bits with first-order weights and a projection of its own, and one of two widths."""
    rows = [np.array(ids, np.int32) for ids in ([0, 2], [1, 4, 5])]
    plan = SizePlan(SCHEMA.fingerprint, 2, (
        TablePlan("f0", 10, 4, (Block(10, (0, 2), "project"),), bits=8),
        TablePlan("f1", 6, 4, (Block(2, (0, 1, 2, 3), "project", rows[0]), Block(3, (0,), "project", rows[1]))),
    ), first_order=True)  # fmt: skip
    one, two = plan.tables
    values, projection, first_order = 10 * 2 + 2 * 8, 4 * 2 * 4, 10 + 8
    assert (
        plan.table_bytes(one) == plan.table_bytes(one, budget=Budget.parse("80b")) == values + projection + first_order
    )
    assert plan.table_bytes(one, budget=Budget.parse("80%")) == values + projection
    assert plan.table_bytes(two) == 4 * (3 * 4 + 3 * 1) + 4 * 6
    assert plan.num_bytes() == plan.table_bytes(one) + plan.table_bytes(two) + 4 * 1 * 4
    foreign = dataclasses.replace(plan, standalone=True)  # W_1 is the table's own, and so is a map of a byte an id
    assert foreign.table_bytes(two) == plan.table_bytes(two) + 4 * 1 * 4 + 6
    assert foreign.num_bytes() == foreign.table_bytes(one) + foreign.table_bytes(two)
    narrow = TablePlan("f1", 6, 4, (Block(6, (0,), "concat"),))
    assert plan.table_bytes(narrow, "fbgemm") == 4 * 6 * (4 + 4)
    assert plan.table_bytes(narrow, "fbgemm", Budget.parse("80%")) == 4 * 6 * 4


@pytest.mark.parametrize("budget", ["220 b", "60%", "64.5%"])
def test_a_plan_is_within_a_budget_where_its_tables_are(budget):
    full, limit = SizePlan.full(SCHEMA, 4, first_order=True), Budget.parse(budget)
    within = {True: 0, False: 0}
    for bits in itertools.product(BITS, repeat=3):
        plan = full.with_bits(dict(zip(("f0", "f1", "f2"), bits, strict=True)))
        fits = sum(full.table_bytes(table, budget=limit) for table in plan.tables) <= full.counted_bytes(limit)
        assert fits == (plan.num_bytes() <= plan.max_bytes(limit))
        within[fits] += 1
    assert min(within.values()) > 0


@pytest.fixture(scope="module")
def task() -> CTRTask:
    data = planted_data(num_rows=1000, noise_vocab=200)
    return CTRTask(DeepFM(data.schema, embedding_dim=8, hidden_units=(8,)), data, TrainConfig(batch_size=256))


@pytest.mark.parametrize("config", [UniformConfig(), UniformConfig(align="project"), FrequencyConfig(), MDEConfig(), PMEConfig()])  # fmt: skip
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("budget", ["1500 b", "10%", "100%", "300 params"])
def test_a_search_fills_the_budget_at_its_bits(task, config, bits, budget):
    limit = Budget.parse(budget)
    plan = search(task, config, budget, bits=bits)
    assert {t.bits for t in plan.tables} == {bits}
    assert plan.budget == limit
    if limit.kind == "params":
        assert plan.num_params == search(task, config, budget).num_params
    else:
        assert plan.num_bytes() <= plan.max_bytes(limit) + 1e-6
        assert plan.num_params > min(plan.num_full_params - 1, search(task, config, budget).num_params)


def test_a_budget_that_scales_alone_exceed(task):
    with pytest.raises(BudgetError):
        search(task, UniformConfig(align="project"), "20 b", bits=4)


def test_an_error_quotes_the_budget_that_was_given(task):
    with pytest.raises(
        BudgetError, match=r"^budget of 100 bytes for tables of 8 bits for torch, .* within 400 bytes: "
    ):
        search(task, RandomConfig(), "100 b", bits=8)  # it drops columns, no rows and their first-order weights
    with pytest.raises(BudgetError, match=r"^budget of 100 bytes is below the first-order weights alone"):
        search(task, RandomConfig(), "100 b")


def test_bits_go_where_they_save_most_loss_a_byte(task):
    plan, budget = SizePlan.full(task.data.schema, 8, first_order=True), Budget.parse("20%")
    names = [t.name for t in plan.tables]
    found = mixed_bits(task, plan, budget)
    weights = dict(zip(names, task.sites(task.model)[0].weights(), strict=True))
    counts = task.row_counts()
    assert len({t.bits for t in found.tables}) > 1
    assert found.num_bytes() <= found.max_bytes(budget)

    def loss_by_hand(name: str, bits: int) -> float:
        tables = EmbeddingTables(task.data.schema, plan.with_bits(bits))
        tables.load_state_dict(task.model.tables.state_dict())
        ids = np.arange(len(weights[name]))
        rows = torch.from_numpy(tables.storage_rows(name, ids))
        tables.quantize()
        stretch = torch.tensor([tables.groups[0].tables.index(name)])
        error = tables.packed[0](rows[:, None], stretch)[:, 0] - weights[name]
        return float((error.double().square().sum(1) * torch.from_numpy(counts[name])).sum())

    losses = {
        (t.name, bits): code_loss(t, weights[t.name], counts[t.name], bits) for t in plan.tables for bits in (4, 8, 16)
    }
    for (name, bits), loss in losses.items():
        assert loss == pytest.approx(loss_by_hand(name, bits), rel=1e-3)
    # No table's next level fits any more, and no other allotment within the bytes loses much less.
    for table in found.tables:
        if table.bits < 16:
            wider = found.with_bits({table.name: 2 * table.bits})
            assert wider.num_bytes() > wider.max_bytes(budget)
    least = min(
        sum(losses[name, bits] for name, bits in zip(names, allotted, strict=True))
        for allotted in itertools.product((4, 8, 16), repeat=len(names))
        if plan.with_bits(dict(zip(names, allotted, strict=True))).num_bytes() <= found.max_bytes(budget)
    )
    assert sum(losses[t.name, t.bits] for t in found.tables) <= 1.1 * least
    everything = mixed_bits(task, plan, Budget.parse("100%"))
    assert {t.bits for t in everything.tables} == {16}


def test_padding_loses_nothing_whatever_its_bits():
    """Two tables alike, but that one is padded: bits go to the other, whose rows are all read."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Embedding(200, 8, padding_idx=0) for name in ("padded", "full")})
    with torch.no_grad():
        for table in model.values():
            table.weight[1:].uniform_(1, 2)  # the code of zero is far off
    rows = torch.arange(1, 200)
    batches = [(torch.cat([torch.zeros(100_000, dtype=torch.int64), rows]), rows.repeat(2))]
    task = Task(model, lambda m, b: m["padded"](b[0]).mean() + m["full"](b[1]).mean(), batches)
    plan = task.full_plan()
    assert task.row_counts()["padded"][0] == 100_000
    budget = Budget("bytes", plan.with_bits({"padded": 4, "full": 8}).num_bytes())
    assert [t.bits for t in mixed_bits(task, plan, budget).tables] == [4, 8]


def test_a_table_of_few_rows_is_smallest_in_16_bits(task):
    """Scales and offsets, 8 bytes a column, are more than what codes save on a few rows."""
    few = search(task, FrequencyConfig(), "60 params")
    smallest = mixed_bits(task, few, Budget.parse("1 b"))
    for table in smallest.tables:
        sizes = {bits: few.with_bits({table.name: bits}).num_bytes() for bits in (4, 8, 16)}
        assert sizes[table.bits] == min(sizes.values())
    assert 16 in {t.bits for t in smallest.tables}


@pytest.mark.parametrize("config", [UniformConfig(), PMEConfig()])
def test_a_search_of_mixed_bits(task, config):
    sizes = {}
    for bits in (8, "mixed", 4):
        plan = search(task, config, "15%", bits=bits)
        assert plan.num_bytes() <= plan.max_bytes(Budget.parse("15%")) + 1e-6
        sizes[bits] = plan.num_params
    assert sizes[8] < sizes["mixed"] <= sizes[4]
    with pytest.raises(ConfigError, match="mixed bits need a budget in percent or bytes, given 300 params"):
        search(task, config, "300 params", bits="mixed")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=5), min_size=1, max_size=3
    ),
    st.integers(0, 50),
)
def test_bytes_are_spent_where_they_save_most(tables, more):
    nothing = TablePlan("t", 1, 1, ())
    choices = [[Choice(size, float(loss), nothing) for size, loss in of_table] for of_table in tables]
    least = sum(min(choice.num_bytes for choice in of_table) for of_table in choices)
    chosen = spend(choices, least + more)
    assert sum(choice.num_bytes for choice in chosen) <= least + more
    # Greedy steps miss the optimum by less than the one step that did not fit.
    best = min(
        sum(choice.loss for choice in every)
        for every in itertools.product(*choices)
        if sum(choice.num_bytes for choice in every) <= least + more
    )
    largest_step = max(max(c.loss for c in of_table) - min(c.loss for c in of_table) for of_table in choices)
    assert sum(choice.loss for choice in chosen) <= best + largest_step
    # No table has a better choice that still fits.
    left = least + more - sum(choice.num_bytes for choice in chosen)
    for of_table, choice in zip(choices, chosen, strict=True):
        assert all(c.loss >= choice.loss for c in of_table if c.num_bytes - choice.num_bytes <= left)


def test_what_a_choice_of_rows_loses_by_hand():
    torch.manual_seed(0)
    weight_VD, count_V = torch.randn(30, 4, dtype=torch.float64), np.arange(30, 0, -1)
    table = SizePlan.full(Schema.from_sizes([30]), 4).tables[0]
    energy_V = energy_of_rows(weight_VD, count_V)
    mean_D = np.average(weight_VD.numpy(), axis=0, weights=count_V)
    assert energy_V == pytest.approx(count_V * ((weight_VD.numpy() - mean_D) ** 2).sum(1))
    kept_V = np.cumsum(np.sort(energy_V)[::-1])
    choices = row_choices(table, kept_V, Block(0, (0, 1)), [(4, 0.25), (16, 0.1)])
    assert {stored.num_kept for _, stored in choices} == {0, *some_numbers(30)}
    for loss, stored in choices:
        kept = np.sort(energy_V)[::-1][: stored.num_kept].sum()
        part = {4: 0.25, 16: 0.1}[stored.bits]
        assert loss == pytest.approx(4 * (energy_V.sum() - kept) + part * kept)
        assert stored.output_width == (2 if stored.blocks else 0)


def test_some_numbers_of_rows():
    assert some_numbers(1) == [1]
    assert some_numbers(6) == [1, 2, 3, 4, 5, 6]
    assert some_numbers(20) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 20]
    assert len(some_numbers(10**8)) < 120


def rows_of(task):
    weights, counts = trained_rows(task)
    return list(weights.values()), [counts[name] for name in weights]


@pytest.mark.parametrize("budget", ["1500 b", "5%", "20%"])
def test_a_plan_of_least_loss_fills_its_budget(budget):
    data = planted_data(num_rows=1000, noise_vocab=200)
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(8,), init_std=0.5, seed=1)
    limit = Budget.parse(budget)
    for task in (CTRTask(model, data, TrainConfig(batch_size=256)), foreign_task()):
        plan = least_loss_plan(task, limit, "scatter")
        allowed = min(plan.max_bytes(limit), task.full_plan().with_bits(16).num_bytes())
        assert 0.8 * allowed <= plan.num_bytes() <= allowed + 1e-6
        compact(task.model, plan)
        assert len({t.output_width for t in plan.tables if t.blocks and t.output_width < t.width}) <= 1
        for table, energy in zip(plan.tables, map(energy_of_rows, *rows_of(task)), strict=True):
            if table.blocks and table.blocks[0].rows is not None:
                dropped = np.setdiff1d(np.arange(table.num_rows), table.blocks[0].rows)
                assert energy[table.blocks[0].rows].min() >= energy[dropped].max()


@pytest.mark.parametrize("budget", ["1500 b", "5%", "20%"])
def test_guided_chooses_rows_columns_and_bits_together(budget):
    data = planted_data(num_rows=1000, noise_vocab=200)
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(8,), init_std=0.5, seed=1)
    for task in (CTRTask(model, data, TrainConfig(batch_size=256)), foreign_task()):
        plan = search(task, GuidedConfig(), budget, bits="mixed")
        assert plan.is_quantized
        assert plan.num_bytes() <= plan.max_bytes(Budget.parse(budget)) + 1e-6
        assert plan.method == "guided"
        assert not plan.diff(least_loss_plan(task, Budget.parse(budget), plan.tables[0].alignment))


def test_guided_refuses_bytes_that_its_smallest_choices_exceed(task):
    with pytest.raises(BudgetError, match="smallest plan of method 'guided' with mixed bits, ") as caught:
        search(task, GuidedConfig(), "14 bytes", bits="mixed")
    least = re.search(r"\d+ bytes(?=; give)", str(caught.value))
    assert least is not None
    assert search(task, GuidedConfig(), least[0], bits="mixed").num_bytes() == int(least[0].split()[0])


@pytest.mark.parametrize("plans_bits", [True, False])
def test_a_method_of_anyones_may_choose_bits_itself(task, plans_bits):
    class HalvesConfig(Config):
        bits: int = 8

    def by_table(task: Task, config: HalvesConfig, budget: Budget, seed: int) -> SizePlan:
        return rows_and_columns(task, config, budget, seed).with_bits({"strong": 16, "noise": config.bits})

    def rows_and_columns(task: Task, config: HalvesConfig, budget: Budget, seed: int) -> SizePlan:
        return search(task, FrequencyConfig(), budget, seed).made_by("halves", budget, seed, {})

    register("halves", HalvesConfig, "nothing", ("rows",), by_table if plans_bits else None)(rows_and_columns)
    try:
        plan = search(task, HalvesConfig(), "30%", seed=3, bits="mixed")
        assert (plan.method, plan.budget, plan.seed) == ("halves", Budget.parse("30%"), 3)
        assert ([t.bits for t in plan.tables] == [16, 32, 8]) == plans_bits
        assert (plan.num_params > 0.3 * plan.num_full_params) != plans_bits  # else what bits free buys rows
        everywhere = search(task, HalvesConfig(), "30%", seed=3, bits=8)  # one precision is not the method's to choose
        assert {t.bits for t in everywhere.tables} == {8}
    finally:
        del METHODS["halves"]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_large_tables_are_read_in_parts(bits, monkeypatch):
    """Energies, losses and codes of ten rows, in parts of three, are those of all at once."""
    generator = torch.Generator().manual_seed(0)
    weight_VD, count_V = torch.randn(10, 4, generator=generator), np.arange(10)
    table = TablePlan("f0", 10, 4, (Block(7, (0, 2, 3), "concat", np.arange(7, dtype=np.int32)),))

    def found() -> tuple[np.ndarray, float, Tensor]:
        packed = PackedRows(10, 4, bits, 1)
        packed.store(0, torch.arange(10).flip(0), weight_VD)
        loss = code_loss(table, weight_VD, count_V, bits)
        return energy_of_rows(weight_VD, count_V), loss, packed(torch.arange(10)[:, None], torch.zeros(1).long())

    energies, loss, stored = found()
    for module in ("tables.packing", "methods.precision"):
        monkeypatch.setattr(f"embtrim.{module}.CHUNK_ROWS", 3)
    in_parts = found()
    np.testing.assert_allclose(in_parts[0], energies, rtol=1e-12)
    assert in_parts[1] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(in_parts[2], stored)
    mean_D = np.average(weight_VD.double(), axis=0, weights=count_V)
    np.testing.assert_allclose(energies, count_V * ((weight_VD.numpy() - mean_D) ** 2).sum(1), rtol=1e-6)


def test_bytes_of_fbgemm_by_hand():
    rows = np.array([0, 2, 5], np.int32)
    plan = SizePlan(SCHEMA.fingerprint, 3, (
        TablePlan("f0", 10, 6, (Block(10, (0, 2, 5)),)),
        TablePlan("f1", 6, 6, (Block(3, (0, 1), "project", rows),)),
        TablePlan("f2", 3, 6, (Block(3, (0, 1, 2, 3)),)),
    ), first_order=True)  # fmt: skip
    projection = 2 * 6
    assert plan.num_bytes("onnx") == plan.num_bytes("torch") == plan.num_bytes()
    assert plan.num_bytes("fbgemm") == 4 * (10 * 4 + 4 * 4 + projection + 3 * 4 + (10 + 4 + 3) * 4)
    free = plan.with_free_columns()
    assert [t.columns for t in free.tables] == [(0, 1, 2, 5), (0, 1), (0, 1, 2, 3)]
    assert free.num_bytes("fbgemm") == plan.num_bytes("fbgemm")
    assert plan.max_bytes(Budget.parse("50%"), "fbgemm") == 0.5 * 4 * 19 * 6 + 4 * 4 * (10 + 4 + 3)
    with pytest.raises(PlanError, match="'f0' has 8 bits, which fbgemm's tables cannot"):
        plan.with_bits(8).num_bytes("fbgemm")


@pytest.mark.parametrize("config", [RandomConfig(), MDEConfig(align="scatter"), SSEDSConfig()])
def test_a_search_for_fbgemm_leaves_no_room_for_four_columns_more(config):
    """Padding makes of narrow tables up to four times as much: what the search then takes back is given out again."""
    data = planted_data(num_rows=600, noise_vocab=2000, strong_vocab=300, weak_vocab=40)
    model = FNN(data.schema, embedding_dim=16, hidden_units=(4,), init_std=0.1)
    task = CTRTask(model, data, TrainConfig(batch_size=256))
    for budget in ("5%", "20%", "50%", "12 KB"):
        plan = search(task, config, budget, seed=1, target="fbgemm")
        room = plan.max_bytes(Budget.parse(budget), "fbgemm") - plan.num_bytes("fbgemm")
        assert room >= -1e-6
        for t in plan.tables:
            assert t.output_width == 16 or 4 * 4 * t.num_rows > room, (budget, t.name, t.output_width)
    wanted = {t.name: 0 for t in plan.tables} | {"noise": 16}
    assert (
        max(plan.with_padded_columns(Budget.parse("100%"), wanted).tables, key=lambda t: t.num_rows).output_width == 16
    )


def test_sizes_are_refused_for_fbgemm_whatever_the_budget_counts(task):
    for budget in ("30%", "500 params"):
        with pytest.raises(PlanError, match="rows of several widths, which fbgemm's tables cannot"):
            search(task, PMEConfig(), budget, target="fbgemm")


@pytest.mark.parametrize("config", [UniformConfig(), FrequencyConfig(), MDEConfig(align="scatter")])
def test_a_search_for_fbgemm_fills_rows_up(task, config):
    for budget in ("30%", "8 KB"):
        plan = search(task, config, budget, target="fbgemm")
        assert plan.num_bytes("fbgemm") <= plan.max_bytes(Budget.parse(budget), "fbgemm") + 1e-6
        assert all(t.output_width % 4 == 0 for t in plan.tables)
        assert 0 < plan.num_params < plan.num_full_params
        assert f"{plan.num_bytes('fbgemm'):,} bytes with" in plan.summary()
        assert plan.target == "fbgemm"
    assert search(task, config, "30%", target="onnx").target == "onnx"
    assert search(task, config, "30%").target is None
    assert search(foreign_task(), UniformConfig(align="scatter"), "60%", target="fbgemm").num_params


# ---- models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 50, 2000), rng.integers(0, 400, 2000)
    label = (rng.random(2000) < 1 / (1 + np.exp(-(user % 5 - 2.0)))).astype(int)
    return pl.DataFrame({"user": [f"u{i}" for i in user], "item": [f"i{i}" for i in item], "click": label})


def test_a_run_trains_in_fp32_and_keeps_the_quantised_model(raw, tmp_path):
    data = embtrim.encode(raw, label="click", out=tmp_path / "data")
    config = RunConfig(hparams={"embedding_dim": 8, "hidden_units": [8]}, bits=4,
                       train=TrainConfig(epochs=1, batch_size=256, learning_rate=1e-2, precision="fp32"))  # fmt: skip
    full = train_full(data, config, seed=0)
    done = shrink(full, data, config, "pme", {}, "8%", seed=0)
    assert done.plan is not None
    assert any(t.mixed for t in done.plan.tables)
    for table in done.plan.tables:
        stored = sum(rows * width for rows, width in table.segments)
        assert done.record.widths[table.name] * table.num_compact_rows == pytest.approx(stored)
    assert done.record.verification["passed"]
    assert (full.record.bits, done.record.bits) == (32, 4)
    assert full.record.model_params == sum(p.numel() for p in full.model.parameters())
    recoded = data.recode(done.plan)
    assert done.record.test["auc"] == evaluate(done.model, recoded, "test").auc
    tables = [v for name, v in done.model.state_dict().items() if name.startswith("tables.")]
    assert done.record.table_bytes == sum(v.nbytes for v in tables)

    save(done.model, tmp_path / "bundle", recoded)
    bundle = load_bundle(tmp_path / "bundle")
    ids = next(iter(recoded.batches("test", 100))).ids_BC
    assert torch.equal(bundle.model(ids), done.model(ids))
    assert np.isfinite(bundle.predict(raw.head(20))).all()
    for refused in (
        lambda: fit(done.model, recoded, config.train),
        lambda: fit(done.model, recoded, config.train.replace(tables="dense")),
        lambda: compact(done.model, done.plan, init="inherit"),
    ):
        with pytest.raises(EmbtrimError, match="these tables are quantised"):
            refused()
    fp32 = compact(full.model, done.plan)
    for refused in (lambda: save(fp32, tmp_path / "b", recoded), lambda: export(fp32, "pt2", tmp_path / "e")):
        with pytest.raises(EmbtrimError, match=r"its tables are fp32 still; call model\.tables\.quantize\(\)"):
            refused()
    auto = shrink(full, data, config.replace(bits="auto"), "uniform", {}, "6%", seed=0)
    tried = [shrink(full, data, config.replace(bits=b), "uniform", {}, "6%", seed=0) for b in (8, "mixed", 4)]
    best = max(tried, key=lambda trained: trained.record.valid["auc"])
    assert auto.plan
    assert best.plan
    assert (auto.plan.digest, auto.record.bits) == (best.plan.digest, best.record.bits)
    assert (auto.record.valid, auto.record.test) == (best.record.valid, best.record.test)
    assert auto.record.search_seconds > best.record.search_seconds
    with pytest.raises(PlanError, match="quantised by column, which TorchRec's configs cannot say"):
        export(done.model, "torchrec", tmp_path / "torchrec")


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_an_exported_model_stays_quantised(format, tmp_path):
    from tests.serving import export_models

    like = export_models.model_of("deepfm", export_models.schema_of(), export_models.mixed_blocks)
    names = [t.name for t in like.tables.plan.tables]
    plan = like.tables.plan.with_bits(dict(zip(names, (4, 8, 16, 8), strict=True)))
    model = compact(DeepFM(like.schema, embedding_dim=4, hidden_units=(8,), init_std=0.5), plan).eval()
    model.tables.quantize()
    manifest = export(model, format, tmp_path / "out")
    export_models.check_agreement(model, tmp_path / "out", format)
    assert manifest["table_bytes"] == dataclasses.replace(plan, first_order=True).num_bytes()
