"""Searches at fewer bits, of mixed bits and for FBGEMM: they fill their budget, and spend bytes where most loss is saved."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from embtrim.config import Config
from embtrim.errors import BudgetError, ConfigError, PlanError
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
from embtrim.methods.precision import code_losses, mixed_bits
from embtrim.methods.readings import row_energies
from embtrim.methods.registry import register
from embtrim.models import FNN, DeepFM
from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import LEVELS
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Bits, Block, TablePlan, Target
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.packing import PackedRows
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.task import Task
from embtrim.testing.toys import foreign_task, planted_data
from embtrim.training.settings import TrainConfig


@pytest.fixture(scope="module")
def task() -> CTRTask:
    data = planted_data(num_rows=1000, noise_vocab=200)
    return CTRTask(DeepFM(data.schema, embedding_dim=8, hidden_units=(8,)), data, TrainConfig(batch_size=256))


@pytest.mark.parametrize("config", [UniformConfig(), UniformConfig(align="project"), FrequencyConfig(), MDEConfig(), PMEConfig()])  # fmt: skip
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("budget", ["1500 b", "10%", "100%", "300 params"])
@pytest.mark.slow
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
        tables.quantize_(counts)
        stretch = torch.tensor([tables.groups[0].tables.index(name)])
        error = tables.packed[0](rows[:, None], stretch)[:, 0] - weights[name]
        return float((error.double().square().sum(1) * torch.from_numpy(counts[name])).sum())

    found_TN = code_losses(plan.tables, weights, counts, (4, 8, 16))
    losses = {(t.name, bits): found_TN[i, n] for i, t in enumerate(plan.tables) for n, bits in enumerate((4, 8, 16))}
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
    """Scales and offsets, 4 bytes a column, are more than what codes save on a few rows."""
    few = search(task, FrequencyConfig(), "24 params")
    smallest = mixed_bits(task, few, Budget.parse("1 b"))
    for table in smallest.tables:
        sizes = {bits: few.with_bits({table.name: bits}).num_bytes() for bits in LEVELS}
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


def test_guided_refuses_bytes_that_its_smallest_choices_exceed(task):
    with pytest.raises(BudgetError, match="smallest plan of method 'guided' with mixed bits, ") as caught:
        search(task, GuidedConfig(), "14 bytes", bits="mixed")
    least = re.search(r"(\d+) bytes; give more than that", str(caught.value))
    assert least is not None
    with pytest.raises(BudgetError, match="keeps no row"):
        search(task, GuidedConfig(), f"{least[1]} bytes", bits="mixed")
    assert search(task, GuidedConfig(), f"{int(least[1]) + 12} bytes", bits="mixed").num_params > 0


@pytest.mark.parametrize("plans_bits", [True, False])
def test_a_method_of_anyones_may_choose_bits_itself(task, plans_bits):
    given: list[tuple[Bits, Target | None]] = []

    class HalvesConfig(Config):
        bits: int = 8

    def by_table(task: Task, config: HalvesConfig, budget: Budget, seed: int, bits: Bits, target: Target | None):
        given.append((bits, target))
        return rows_and_columns(task, config, budget, seed).with_bits({"strong": 16, "noise": config.bits})

    def rows_and_columns(task: Task, config: HalvesConfig, budget: Budget, seed: int) -> SizePlan:
        return search(task, FrequencyConfig(), budget, seed).made_by("halves", budget, seed, {})

    chosen = by_table if plans_bits else rows_and_columns
    register("halves", HalvesConfig, "nothing", ("rows",), plans_bits)(chosen)
    try:
        assert METHODS["halves"].plans_bits == plans_bits
        plan = search(task, HalvesConfig(), "30%", seed=3, bits="mixed")
        assert (plan.method, plan.budget, plan.seed) == ("halves", Budget.parse("30%"), 3)
        assert ([t.bits for t in plan.tables] == [16, 32, 8]) == plans_bits
        assert (plan.num_params > 0.3 * plan.num_full_params) != plans_bits  # else what bits free buys rows
        everywhere = search(task, HalvesConfig(), "30%", seed=3, bits=8, target="onnx")
        assert everywhere.target == "onnx"
        if plans_bits:
            assert given == [("mixed", None), (8, "onnx")]
            assert [t.bits for t in everywhere.tables] == [16, 32, 8], "what the method chose stands"
        else:
            assert not given
            assert {t.bits for t in everywhere.tables} == {8}
        with pytest.raises(ConfigError, match="mixed bits need a budget in percent or bytes, given 300 params"):
            search(task, HalvesConfig(), "300 params", bits="mixed")
    finally:
        del METHODS["halves"]


def test_a_method_that_chooses_bits_may_not_exceed_the_budget(task):
    class GreedyConfig(Config):
        pass

    @register("greedy", GreedyConfig, "nothing", (), True)
    def search_greedy(task: Task, config: GreedyConfig, budget: Budget, seed: int, bits: Bits, target: Target | None):
        return task.full_plan().made_by("greedy", budget, seed, {})

    try:
        with pytest.raises(
            BudgetError, match="budget of 30% is below the smallest plan of method 'greedy' with 8 bits, "
        ):
            search(task, GreedyConfig(), "30%", bits=8)
        assert search(task, GreedyConfig(), "100%", bits=8).num_params == task.full_plan().num_params
    finally:
        del METHODS["greedy"]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_large_tables_are_read_in_parts(bits, monkeypatch):
    """Energies, losses and codes of ten rows, in parts of three, are those of all at once."""
    generator = torch.Generator().manual_seed(0)
    weight_VD, count_V = torch.randn(10, 4, generator=generator), np.arange(10)
    mean_D = torch.randn(4, generator=generator)
    table = TablePlan("f0", 10, 4, (Block(7, (0, 2, 3), "concat", np.arange(7, dtype=np.int32)),))

    def found() -> tuple[np.ndarray, float, Tensor]:
        packed = PackedRows(10, 4, bits, 1)
        packed.store(0, torch.arange(10).flip(0), weight_VD)
        loss = code_losses([table], {"f0": weight_VD}, {"f0": count_V}, [bits])[0, 0]
        return row_energies(weight_VD, count_V, mean_D), loss, packed(torch.arange(10)[:, None], torch.zeros(1).long())

    energies, loss, stored = found()
    for module in ("tables.packing", "methods.readings"):
        monkeypatch.setattr(f"embtrim.{module}.CHUNK_ROWS", 3)
    in_parts = found()
    np.testing.assert_allclose(in_parts[0], energies, rtol=1e-12)
    assert in_parts[1] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(in_parts[2], stored)
    np.testing.assert_allclose(energies, count_V * ((weight_VD - mean_D).numpy() ** 2).sum(1), rtol=1e-6)


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
