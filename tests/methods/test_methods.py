"""What every search promises, on a zoo model and on foreign ones; methods by hand; planted signal."""

from __future__ import annotations

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import nn

import embtrim.testing.checks
from embtrim.compaction.compacting import compact
from embtrim.config import Config
from embtrim.data.dataset import Batch
from embtrim.errors import BudgetError, ConfigError, EmbtrimError
from embtrim.methods import (
    METHODS,
    FrequencyConfig,
    GuidedConfig,
    HardMaskConfig,
    MagnitudeConfig,
    MDEConfig,
    OptEmbedConfig,
    PMEConfig,
    RandomConfig,
    SSEDSConfig,
    UniformConfig,
    method_named,
    search,
)
from embtrim.methods.guided import Trial, propose, row_energies
from embtrim.methods.pme import entry_saliency, fill_sizes, reassign, sized_plan
from embtrim.methods.registry import Implementation, register
from embtrim.methods.selection import field_plan, largest, row_plan
from embtrim.methods.sseds import slot_gradients
from embtrim.models import FNN, LR, DeepFM
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block
from embtrim.schema import Schema
from embtrim.tasks.sites import gate_sites
from embtrim.tasks.survey import find_sites
from embtrim.tasks.task import CTRTask, Task, loss_weight, num_slots
from embtrim.testing.checks import (
    CHECKS,
    KEEPS_NOISE,
    TASKS,
    ForeignModel,
    check_filled,
    check_planted,
    conformance_matrix,
    foreign_batches,
    foreign_task,
    kept_shares,
    matrix_configs,
    planted_cell,
    planted_data,
    planted_task,
    zoo_task,
)
from embtrim.training.fitting import fit
from embtrim.training.settings import Hooks, TrainConfig

CONFIGS = {
    **{name: method.config() for name, method in METHODS.items()},
    # Shorter than by default; `python -m embtrim.testing` runs the defaults.
    "guided": GuidedConfig(trial_steps=4),
    "optembed": OptEmbedConfig(epochs=2, generations=3),
    "sseds-signed": SSEDSConfig(score="signed", data="valid", batches=0, cost_aware=True),
    "sseds-pretrain": SSEDSConfig(pretrain="epochs:1", align="project", score="abs", average="abs", batches=2),
    "uniform-project": UniformConfig(align="project"),
    "guided-project": GuidedConfig(trial_steps=4, align="project"),
    "random-project": RandomConfig(align="project"),
    "magnitude-rows": MagnitudeConfig(unit="rows"),
    "magnitude-project": MagnitudeConfig(align="project", cost_aware=True),
    "mde-occurrences": MDEConfig(popularity="occurrences", align="scatter"),
    "pme-frequency": PMEConfig(score="frequency", search_fraction=0.3),
    "pme-random": PMEConfig(score="random"),
    "pme-warm": PMEConfig(score="magnitude", warmup_epochs=1),
}


@pytest.fixture(scope="module", params=TASKS)
def task(request) -> Task:
    return TASKS[request.param]()


@pytest.mark.parametrize("check", CHECKS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("name", CONFIGS)
def test_conformance(name: str, check: str, task: Task):
    """One class of promises, all methods, on a zoo model and on foreign ones."""
    CHECKS[check](task, CONFIGS[name])


class TestTheChecksCanFail:
    """A method that breaks a promise is found out."""

    @pytest.fixture
    def broken(self):
        class BrokenConfig(Config):
            fault: str

        @register("broken", BrokenConfig, needs="nothing")  # it adds columns
        def search_broken(task: Task, config: BrokenConfig, budget: Budget, seed: int) -> SizePlan:
            full = task.full_plan()
            first = full.tables[0].name
            if config.fault == "global generator":
                return full.with_columns({first: torch.randperm(4)[:2].tolist()})
            if config.fault == "moves":
                next(task.model.parameters()).data.add_(1.0)
            if config.fault == "reads":
                weight = task.sites(task.model)[0].weights()[0]
                return full.with_columns({first: weight.sum(0).argsort()[:2].tolist()})
            if config.fault == "not JSON":
                return full.with_columns({first: [0]}).made_by("broken", budget, seed, {"set": (1, 2)})
            if config.fault == "over budget":
                return full
            return full.with_columns({first: [0]})

        yield BrokenConfig
        del METHODS["broken"]

    @pytest.mark.parametrize(
        ("fault", "check"),
        [
            ("global generator", "same seed, same plan"),
            ("over budget", "budget holds and is full"),
            ("one column only", "budget holds and is full"),
            ("one column only", "keep-all is the identity"),
            ("not JSON", "plan round-trips"),
            ("moves", "only declared parameters move"),
            ("reads", "only declared parameters move"),
        ],
    )
    def test_fault(self, fault: str, check: str, task: Task, broken):
        before = copy.deepcopy(task.model.state_dict())
        torch.manual_seed(5)
        with pytest.raises(AssertionError):
            CHECKS[check](task, broken(fault=fault))
        task.model.load_state_dict(before)

    def test_wrong_compaction(self, task: Task, monkeypatch):
        right = embtrim.testing.checks.compact

        def off_by_one(*args, **settings):
            small = right(*args, **settings)
            with torch.no_grad():
                for name, p in small.named_parameters():
                    if "user" in name or "tables" in name:
                        p.add_(0.1)
            return small

        monkeypatch.setattr("embtrim.testing.checks.compact", off_by_one)
        monkeypatch.setattr("embtrim.compaction.verification.compact", off_by_one)
        with pytest.raises((AssertionError, EmbtrimError)):
            CHECKS["compact equals masked"](task, RandomConfig())
        with pytest.raises(AssertionError):
            CHECKS["keep-all is the identity"](task, RandomConfig())

    def test_the_matrix_names_what_fails(self, broken, monkeypatch):
        monkeypatch.setattr("embtrim.testing.checks.CHECKS", {"budget": CHECKS["budget holds and is full"]})
        lines = conformance_matrix({"random": RandomConfig(), "broken": broken(fault="over budget")}).splitlines()
        assert re.match(r"\| random \| zoo \| holds \| fails as expected, noise is kept: .*nothing", lines[2])
        assert "| FAILS: a search exceeded its budget | FAILS: " in lines[3]
        assert lines[4] == "| random | foreign | holds | - |"

    @pytest.mark.parametrize("adds", [("columns",), ("rows",), ("columns", "rows"), ("sizes",)])
    @pytest.mark.parametrize("blocks", [(), (Block(0, ()),)])
    def test_a_plan_that_keeps_nothing_is_not_full(self, adds, blocks, task: Task):
        class EmptyConfig(Config):
            pass

        @register("empty", EmptyConfig, needs="nothing", adds=adds)
        def search_empty(task: Task, config: EmptyConfig, budget: Budget, seed: int) -> SizePlan:
            full = task.full_plan()
            return dataclasses.replace(full, tables=tuple(dataclasses.replace(t, blocks=blocks) for t in full.tables))

        try:
            plan = search_empty(task, EmptyConfig(), Budget.parse("80%"), 0)
            with pytest.raises(
                AssertionError, match=f"80%: the first of the {adds[0] if len(adds) == 1 else ''}.* fit"
            ):
                check_filled(plan, EmptyConfig(), Budget.parse("80%"))
            with pytest.raises(
                BudgetError, match=r"^method 'empty' keeps no row of any table within a budget of 80%; "
            ):
                search(task, EmptyConfig(), "80%")
        finally:
            del METHODS["empty"]


def test_sseds_gradient_equals_autograd_of_an_explicit_mask():
    """g = dL/dalpha on a 2-field, 3-column toy: sum over the batch of dL/de~ * e."""
    data = planted_data(num_rows=400, noise_vocab=50)
    model = FNN(data.schema, embedding_dim=3, hidden_units=(4,), init_std=0.5)
    task = CTRTask(model, data, TrainConfig(batch_size=64))
    found = slot_gradients(task, model, SSEDSConfig(data="train", batches=1), seed=0)
    batch = next(iter(task.batches("train", 0)))
    model.eval()
    emb = model.tables(batch.ids_BC).concat.detach().requires_grad_()
    with model.tables.gated(slot_gate=lambda _: emb):
        task.loss(model, batch).backward()
    expected = (emb.grad * emb).sum(0).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    assert np.abs(found).max() > 0


def test_sseds_counts_a_small_last_batch_by_its_rows():
    """The gradient of all batches is that of one batch that holds all rows."""
    data = planted_data(num_rows=400, noise_vocab=50)
    model = FNN(data.schema, embedding_dim=3, hidden_units=(4,), init_std=0.5)
    num_rows = data.num_rows("valid")
    assert num_rows % 32
    in_parts, at_once = (
        slot_gradients(task, model, SSEDSConfig(), seed=0)
        for task in (CTRTask(model, data, TrainConfig(batch_size=size)) for size in (32, num_rows))
    )
    np.testing.assert_allclose(in_parts, at_once, rtol=1e-4, atol=1e-9)


def test_sseds_refuses_to_rank_by_signs_that_it_does_not_have():
    with pytest.raises(ConfigError, match="average = 'abs' leaves no signs"):
        SSEDSConfig.parse({"average": "abs"}, where="search")


@pytest.mark.parametrize(("batch", "rows"), [
    (torch.zeros(7, 2), 7), ((torch.zeros(5), torch.zeros(9)), 5), ({"x": [torch.zeros(3, 1)]}, 3),
    (Batch(torch.zeros(4, 1, dtype=torch.int32), torch.zeros(4)), 4),
    (Batch(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2), weights_B=torch.tensor([0.5, 2.0])), 2.5),
    (torch.tensor(1.0), 1), (("a", "bc"), 1), ((), 1),
])  # fmt: skip
def test_weight_of_a_batch_among_others(batch, rows):
    assert loss_weight(batch) == rows


@pytest.mark.parametrize("config", [FrequencyConfig(), MagnitudeConfig(unit="rows"), PMEConfig(), UniformConfig()])
def test_bytes_of_first_order_weights_that_go_buy_rows(config: Config):
    """A budget below what the first-order weights of all rows take: 253 of them, 1,012 bytes."""
    task = zoo_task()
    full, budget = task.full_plan(), Budget.parse("900 bytes")
    assert 4 * full.num_first_order_params > 900
    plan = search(task, config, budget)
    assert 0.9 * 900 < plan.num_bytes() <= 900
    # The least is an entry and its DROPPED row, and a first-order weight of each of these and of the other tables' two.
    with pytest.raises(BudgetError, match=r"^budget of 8 bytes is below the smallest plan of any method, 24 bytes; "):
        search(task, config, "8 bytes")


def test_guided_finds_rows_within_few_bytes():
    """Where some tables keep no row: importance for the rows of the others would count all their first-order weights."""
    for budget in ("60 bytes", "300 bytes"):
        plan = search(zoo_task(), CONFIGS["guided"], budget)
        assert any(not t.blocks for t in plan.tables)
        assert 0 < plan.num_bytes() <= Budget.parse(budget).amount


TINY = ("8 bytes", "1 params", "0.01%")


@pytest.mark.parametrize("bits", [32, 8, "mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_that_allows_nothing_is_refused_before_the_search(name, bits, monkeypatch):
    """Whatever the method: what it would train for nothing is not trained."""
    method = METHODS[name]
    untouched = Implementation(method.config, None, None)
    monkeypatch.setitem(METHODS, name, dataclasses.replace(method, implementation=lambda: untouched))
    for task in (zoo_task(), foreign_task()):
        for budget in TINY:
            if task.full_plan().standalone and budget == "8 bytes" and bits != 8:
                continue  # two entries, or more at fewer bits, where no scales are stored
            with pytest.raises(
                BudgetError, match=r"below the smallest plan of any method, [\d.]+( bytes| params|%); give"
            ):
                search(task, METHODS[name].config(), budget, bits=bits)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["bytes", "params", "%"])
@pytest.mark.parametrize("config", [
    UniformConfig(), FrequencyConfig(), RandomConfig(), MagnitudeConfig(), PMEConfig(), SSEDSConfig(), OptEmbedConfig()
])  # fmt: skip
def test_no_plan_is_empty_and_a_budget_that_is_named_is_enough(config, kind, bits):
    """Budgets are doubled from far too little: a method refuses them until it keeps something, and names one that does."""
    task = foreign_task() if kind == "params" else zoo_task()
    named, refused = [], 0
    for amount in (2**k * 0.02 for k in range(20)):
        try:
            plan = search(task, config, f"{amount:.6f} {kind}", bits=bits)
        except BudgetError as error:
            found = re.search(r"keeps no row .*; ([\d.,]+) ?(bytes|params|%) is enough", str(error))
            named += [" ".join(found.groups())] if found else []
            refused += 1
            continue
        assert not plan.keeps_nothing
        break
    assert refused > 1
    for budget in set(named):
        assert not search(task, config, budget, bits=bits).keeps_nothing


def test_shared_table_is_one_slot_for_both_fields():
    from embtrim.data.dataset import EncodedDataset, SplitArrays
    from embtrim.schema import FieldSpec, Schema

    schema = Schema(
        label="y", fields=(FieldSpec(name="a", vocab_size=9, table="t"), FieldSpec(name="b", vocab_size=9, table="t"))
    )
    rng = np.random.default_rng(0)
    arrays = SplitArrays(rng.integers(0, 9, (64, 2)).astype(np.int32), rng.integers(0, 2, 64).astype(np.float32))
    data = EncodedDataset(schema, {"train": arrays, "valid": arrays})
    model = FNN(schema, embedding_dim=4, hidden_units=(4,), init_std=0.5)
    plan = search(CTRTask(model, data), SSEDSConfig(), "50%")
    assert len(plan.details["scores"]) == 4
    assert plan.num_params == 18


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
    scores = {"f0": np.array([9, 1, 8, 7]), "f1": np.array([6, 5, 0])}
    columns = {"f0": (0, 1), "f1": (1,)}

    def kept(limit: int) -> list[list[int] | None]:
        plan = row_plan(full, scores, columns, limit, "scatter")
        assert plan.num_params <= limit
        return [None if b.rows is None else b.rows.tolist() for t in plan.tables for b in t.blocks]

    assert kept(1) == []
    assert kept(3) == [None]  # only f1, of one column, fits
    assert kept(4) == [[0]]  # the row and DROPPED
    assert kept(6) == [[0, 2]]
    assert kept(8) == [None]  # the last row takes the place of DROPPED
    assert kept(10) == [None, [0]]
    assert kept(11) == [None, None]


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


class TestPME:
    """Sizes per feature value."""

    def test_saliency_equals_autograd_of_an_explicit_entry_mask(self):
        data = planted_data(num_rows=400, noise_vocab=50)
        model = DeepFM(data.schema, embedding_dim=3, hidden_units=(4,), init_std=0.5)
        task = CTRTask(model, data, TrainConfig(batch_size=64))
        sites = task.sites(model)
        found = torch.cat(entry_saliency(task, model, sites, 1.0, seed=0))
        mask = torch.ones_like(found, requires_grad=True)
        start = torch.tensor([0, 30, 50])
        for batch in task.batches("train", 0):
            rows_BF = batch.ids_BC + start

            def masked(concat: torch.Tensor, rows_BF: torch.Tensor = rows_BF) -> torch.Tensor:
                return concat * mask[rows_BF].reshape(len(concat), -1)

            with model.tables.gated(slot_gate=masked):
                task.loss(model, batch).backward()
        np.testing.assert_allclose(found.numpy(), mask.grad.abs().numpy(), rtol=1e-3, atol=1e-7)
        assert found.max() > 0

    def test_sizes_are_counts_of_the_largest_entries_bucketed_down(self):
        full = hand_plan(8, width=4)
        ranked = [np.array([[9.0, 8, 7, 1], [6, 5, 0.5, 0.5], [4, 0.1, 0.1, 0.1], *[[0.0] * 4] * 5])]
        # Entries above 3.5 are 3, 2, 1, 0 .. of the values: sizes 2, 2, 1, 0 .., 2 for DROPPED and 4 + 8 of W.
        sizes = fill_sizes(full, ranked, 19)
        assert sizes[0].tolist() == [2, 2, 1, 0, 0, 0, 0, 0]
        plan = sized_plan(full, sizes)
        assert plan.num_params == 2 + 2 + 1 + 2 + 4 + 8
        assert [(b.width, b.rows.tolist()) for b in plan.tables[0].blocks] == [(2, [0, 1]), (1, [2])]
        # One less, and only W_2 is left: what it frees goes to the next values in order.
        assert fill_sizes(full, ranked, 18)[0].tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
        assert fill_sizes(full, ranked, 32)[0].tolist() == [4] * 8

    def test_controls_give_the_same_histogram_to_other_values(self):
        rng = np.random.default_rng(0)
        ranked = [np.sort(rng.random((n, 4)))[:, ::-1] for n in (5, 3)]
        key = np.array([0, 1, 2, 3, 4, 7, 6, 5])
        given = reassign(ranked, key)
        assert sorted(map(tuple, np.concatenate(given))) == sorted(map(tuple, np.concatenate(ranked)))
        sums = np.concatenate(given).sum(1)
        assert np.argsort(sums).tolist() == np.argsort(key).tolist()

    def test_frequency_sizes_grow_with_frequency(self, data):
        task = CTRTask(FNN(data.schema, embedding_dim=8, hidden_units=(4,)), data)
        plan = search(task, PMEConfig(score="frequency"), "20%")
        counts = task.row_counts()
        blocks = [(b.width, counts[t.name][b.rows]) for t in plan.tables for b in t.blocks if b.rows is not None]
        means = {w: np.mean(np.concatenate([c for width, c in blocks if width == w])) for w, _ in blocks}
        assert len(means) > 2
        assert sorted(means, key=means.get) == sorted(means)

    def test_ids_are_renumbered_by_size(self, data):
        task = CTRTask(DeepFM(data.schema, embedding_dim=8, hidden_units=(4,)), data)
        plan = search(task, PMEConfig(), "20%")
        small = compact(task.model, plan)
        fit(small, data.recode(plan), epochs=1)
        assert small.tables.weight.numel() + sum(p.numel() for p in small.tables.shared_projections.values()) == (
            plan.num_params
        )

    def test_no_batches(self):
        task = foreign_task()
        task._train = []
        with pytest.raises(EmbtrimError, match="no training batches"):
            search(task, PMEConfig(), "50%")


@pytest.mark.parametrize("name", [*matrix_configs(), "hard_mask-quantile"])
def test_planted_noise_of_many_values_goes_first(name: str):
    """Of methods that keep it: that they do, and what mends it."""
    shorter = {"guided": GuidedConfig(trial_steps=20), "hard_mask-quantile": HardMaskConfig(mode="quantile")}
    config = {**matrix_configs(), **shorter}[name]
    if name not in KEEPS_NOISE:
        check_planted(config)
        return
    said = planted_cell(name, config)
    assert said.startswith("fails as expected, noise is kept: ")
    signed = "score = 'signed', data = 'valid', batches = 0"
    mended = {"magnitude": "cost_aware = True", "sseds": "min_dim = 0", "sseds-faithful": signed}
    assert said.endswith(f"; holds with {mended[name]}" if name in mended else f"({KEEPS_NOISE[name][0]})")


@pytest.fixture(scope="module")
def planted() -> CTRTask:
    return planted_task()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sseds", {}),
        ("sseds", {"preset": "faithful"}),
        ("hard_mask", {}),
        ("hard_mask", {"mode": "quantile"}),
        ("optembed", {}),
        ("magnitude", {}),
        ("magnitude", {"unit": "rows"}),
        ("guided", {}),
    ],
)
def test_methods_that_read_the_data_leave_planted_noise_behind(name: str, settings: dict, planted: CTRTask):
    """Strong, weak and noise cost the same, the model is at its best epoch: noise keeps the least."""
    kept = kept_shares(search(planted, method_named(name).parse(settings), "30%"))
    assert kept["noise"] < 0.2
    assert kept["noise"] < kept["strong"] / 2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("uniform", {}),
        ("frequency", {}),
        ("mde", {}),
        ("mde", {"popularity": "occurrences"}),
        ("pme", {}),
        ("pme", {"score": "frequency"}),
    ],
)
def test_rules_that_do_not_look_cannot_tell_noise_from_signal(name: str, settings: dict, planted: CTRTask):
    """PME is among them: at initialisation its saliency tells how often a value occurs, and little more."""
    kept = kept_shares(search(planted, method_named(name).parse(settings), "30%"))
    assert kept["noise"] > kept["strong"] / 2


def test_warming_up_mends_pme_a_little(planted: CTRTask):
    """Read after an epoch of training the saliency puts the strong field further ahead of the noise."""

    def lead(config: PMEConfig) -> float:
        kept = kept_shares(search(planted, config, "30%"))
        return kept["strong"] / kept["noise"]

    assert lead(PMEConfig(warmup_epochs=1)) > 1.2 * lead(PMEConfig())


def test_sseds_keeps_a_column_of_every_table_where_the_budget_has_room_for_it(planted: CTRTask):
    full = planted.full_plan()
    rows = sum(table.num_rows for table in full.tables)

    def least_width(config: SSEDSConfig, budget: int) -> int:
        return min(table.output_width for table in search(planted, config, f"{budget} params").tables)

    assert least_width(SSEDSConfig(), rows) == 1
    assert least_width(SSEDSConfig(min_dim=0), rows) == 0
    assert least_width(SSEDSConfig(), rows - 1) == 0
    with pytest.raises(BudgetError, match="set min_dim = 0"):
        search(planted, SSEDSConfig(min_dim=1), f"{rows - 1} params")


@pytest.mark.parametrize("more_epochs", [2, 6])
def test_faithful_sseds_overrates_memorised_noise(more_epochs: int):
    """Past its best epoch a model has learned the noise by heart, and |g| on training data calls it important.

    The signed score on validation data of a fresh model, trained for one epoch, ranks the fields as they were planted.
    """
    data = planted_data(num_rows=8000, noise_vocab=3000, seed=1)
    config = TrainConfig(
        epochs=2, batch_size=256, learning_rate=3e-3, patience=0, reduce_lr=1.0, precision="fp32", tables="dense"
    )
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(32,))
    task = CTRTask(model, data, config)
    task.fit(model, epochs=2 + more_epochs, seed=0)

    def by_field(settings: SSEDSConfig) -> np.ndarray:
        return np.array(search(task, settings, "20%").details["scores"]).reshape(3, 8).sum(1)

    mended = by_field(SSEDSConfig(pretrain="epochs:1"))
    assert mended[0] > mended[1] > mended[2]
    faithful = by_field(SSEDSConfig(**SSEDSConfig.faithful))
    assert faithful[2] > faithful[1]


def test_presets(planted: CTRTask):
    assert method_named("sseds").parse({"preset": "faithful", "batches": 3}) == SSEDSConfig(
        score="abs", data="train", batches=3, min_dim=0
    )
    assert method_named("sseds").parse({}) == SSEDSConfig()
    with pytest.raises(ConfigError, match=r"preset 'papers' is not known; method 'sseds' has 'faithful'"):
        method_named("sseds").parse({"preset": "papers"})
    with pytest.raises(ConfigError, match="has no preset"):
        method_named("uniform").parse({"preset": "faithful"})


class TestGuided:
    """Rules propose, short trainings decide."""

    def test_candidates_keep_to_the_budget_and_differ(self, planted: CTRTask):
        config = GuidedConfig()
        found = propose(planted, config, Budget.parse("10%"), seed=0)
        limit = planted.full_plan().max_params(Budget.parse("10%"))
        assert all(plan.num_params <= limit for plan in found.values())
        assert "equal widths" in found
        plans = list(found.values())
        assert all(a.diff(b) for n, a in enumerate(plans) for b in plans[:n])
        # 10% of width 8 is less than one column of all rows: "equal widths" has width 1, others have 2 (twice) and 3.
        fewer = {name: plan for name, plan in found.items() if name.startswith("width")}
        assert set(fewer) == {"width 2, rows of most energy", "width 3, rows of most energy"}
        assert all(any(t.has_dropped for t in plan.tables) for plan in fewer.values())
        by_importance = [plan for name, plan in found.items() if "rows as of width" in name]
        kept = [{t.name: t.num_kept for t in plan.tables if t.output_width} for plan in by_importance]
        assert len(kept) >= 2
        assert kept[0] != kept[1]

    def test_energy_is_what_dropping_a_row_costs_the_embedded_data(self, planted: CTRTask):
        energies = row_energies(planted)
        arrays, weights = planted.data.split("train"), planted.sites(planted.model)[0].weights()
        for number, (table, weight) in enumerate(zip(planted.full_plan().tables, weights, strict=True)):
            embedded = weight[torch.from_numpy(np.array(arrays.ids[:, number], np.int64))]
            row = int(energies[table.name].argmax())
            without = torch.where(torch.from_numpy(arrays.ids[:, number] == row)[:, None], 0.0, embedded)
            assert energies[table.name][row] == pytest.approx(float((embedded - without).square().sum()), rel=1e-4)
            assert energies[table.name].shape == (table.num_rows,)

    def test_the_best_candidate_of_the_last_round_wins(self, planted: CTRTask, monkeypatch):
        trained: list[int] = []

        class FakeTrial:
            def __init__(self, task, plan, seed):
                self.size = plan.num_params

            def train(self, steps, seed):
                trained.append(steps)
                return float(self.size + (0 if len(trained) % 2 else 0.5))

        monkeypatch.setattr("embtrim.methods.guided.Trial", FakeTrial)
        plan = search(planted, GuidedConfig(trial_steps=7, trial_epochs=0.01), "10%")
        scores = plan.details["scores"]
        rounds = max(map(len, scores.values()))
        last = {name: s[-1] for name, s in scores.items() if len(s) == rounds}
        assert plan.details["chosen"] == max(last, key=last.get)
        assert "equal widths" in last
        assert len(last) < len(scores) / 2
        assert sorted(set(trained)) == [7 * 2**number for number in range(rounds)]

    @pytest.mark.parametrize(
        ("leads", "most_rounds", "rounds", "equal_wins"),
        [
            ([0.05, 0.04, 0.02, 0.0], 5, 3, False),
            ([0.08, 0.04, 0.01, -0.01], 5, 4, True),
            ([0.08, 0.04, 0.01, 0.01], 5, 4, False),
            ([0.08, 0.04, 0.01, -0.01], 3, 3, False),
        ],
    )
    def test_a_lead_over_equal_widths_that_melts_is_proved(
        self, planted: CTRTask, monkeypatch, leads: list[float], most_rounds: int, rounds: int, equal_wins: bool
    ):
        """One candidate is ahead by `leads`, round by round; it wins once a round has left it half of its lead."""
        equal = search(planted, UniformConfig(), "10%")
        ahead: list[SizePlan] = []

        class FakeTrial:
            def __init__(self, task, plan, seed):
                self.rounds = 0
                self.is_equal = not plan.diff(equal)
                self.is_ahead = not self.is_equal and not ahead
                ahead.extend([plan] * self.is_ahead)

            def train(self, steps, seed):
                self.rounds += 1
                lead = leads[self.rounds - 1] if self.is_ahead else -1.0
                return 0.1 * self.rounds + (0.0 if self.is_equal else lead)

        monkeypatch.setattr("embtrim.methods.guided.Trial", FakeTrial)
        plan = search(planted, GuidedConfig(trial_steps=7, most_rounds=most_rounds), "10%")
        assert max(map(len, plan.details["scores"].values())) == rounds
        assert bool(plan.diff(ahead[0])) == equal_wins
        assert bool(plan.diff(equal)) != equal_wins

    def test_a_round_ends_with_steps_at_a_lower_learning_rate(self, planted: CTRTask, monkeypatch):
        fits: list[tuple[int, float]] = []

        def fit(self, model, epochs, seed, hooks, lr_factor):
            fits.append((hooks.settings["steps"], lr_factor))

        monkeypatch.setattr(CTRTask, "fit", fit)
        epoch = planted.num_batches("train")
        trial = Trial(planted, search(planted, UniformConfig(), "10%"), seed=0)
        trial.train(4, seed=0)
        trial.train(8 * epoch, seed=0)
        assert fits == [(4, 1.0), (1, 0.1), (8 * epoch, 1.0), (epoch, 0.1)]


@pytest.mark.parametrize("make", [foreign_task, zoo_task])
def test_fit_scales_the_learning_rates(make):
    """Adam's first step is proportional to the learning rate."""
    steps = []
    for factor in (1.0, 0.1):
        task = make()
        before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
        task.fit(task.model, 1, 0, Hooks(on_step=lambda step: True), lr_factor=factor)
        steps.append({name: p.detach() - before[name] for name, p in task.model.named_parameters()})
    assert any(step.abs().max() > 1e-6 for step in steps[0].values())
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], 0.1 * step, rtol=1e-3, atol=1e-6)


def test_find_sites_says_what_it_left():
    assert [s.names for s in find_sites(ForeignModel())] == [("user",), ("item",)]
    assert [s.names for s in find_sites(ForeignModel(), keep=lambda name: name == "item")] == [("item",)]
    with pytest.raises(EmbtrimError, match=r"keep= is a function of a module's path, .* given 'item'"):
        find_sites(ForeignModel(), keep="item")
    with pytest.raises(EmbtrimError, match="first-order"):
        find_sites(nn.Sequential(nn.Embedding(5, 1)))
    with pytest.raises(EmbtrimError, match=r"no nn\.Embedding"):
        find_sites(nn.Linear(2, 2))


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'sseds'"):
        method_named("ssed")
    with pytest.raises(ConfigError, match="not the config of a search method"):
        search(foreign_task(), TrainConfig(), "10%")
    assert set(METHODS) >= {"sseds", "uniform", "random"}


def test_a_task_says_what_it_lacks():
    task = Task(ForeignModel(), lambda m, b: m(b[0]).mean(), train=list(foreign_batches()))
    with pytest.raises(EmbtrimError, match="valid="):
        search(task, SSEDSConfig(data="valid"), "50%")
    with pytest.raises(EmbtrimError, match="no train batches"):
        search(Task(ForeignModel(), lambda m, b: m(b[0]).mean(), train=[]), SSEDSConfig(data="train"), "50%")
    data = planted_data(num_rows=500)
    with pytest.raises(EmbtrimError, match="no embedding tables to shrink"):
        search(CTRTask(LR(data.schema), data), SSEDSConfig(), "50%")
    with pytest.raises(EmbtrimError, match="fresh="):
        search(task, SSEDSConfig(pretrain="epochs:1", data="train"), "50%")


class TestGates:
    """Gates of both kinds of site, and what they let a search read."""

    def test_row_gate_sees_each_row_once_and_its_gradient(self, task: Task):
        model, batch = task.model, next(iter(task.batches("train", 0)))
        sites = task.sites(model)
        leaves: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {n: [] for n in range(len(sites))}

        def read(number: int):
            def gate(rows_U: torch.Tensor, found_UD: torch.Tensor) -> torch.Tensor:
                assert len(rows_U.unique()) == len(rows_U)
                stored_VD = torch.cat(sites[number].weights())
                assert torch.equal(found_UD.detach(), stored_VD[rows_U])
                leaves[number].append((rows_U, found_UD.detach().requires_grad_()))
                return leaves[number][-1][1]

            return gate

        model.eval()
        plain = task.loss(model, batch)
        with gate_sites(sites, rows=[read(n) for n in range(len(sites))]):
            gated = task.loss(model, batch)
        assert float(gated.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
        gated.backward()
        assert all(
            leaf.grad is not None and leaf.grad.abs().sum() > 0 for found in leaves.values() for _, leaf in found
        )
        model.zero_grad()

    def test_slot_and_row_gates_at_once(self, task: Task):
        model, batch = task.model, next(iter(task.batches("train", 0)))
        sites = task.sites(model)
        model.eval()

        def loss(**gates) -> float:
            with torch.no_grad(), gate_sites(sites, **gates):
                return float(task.loss(model, batch))

        zeros = [torch.zeros(num_slots(site)) for site in sites]
        without_slots = loss(slots=zeros)
        assert loss(rows=[lambda rows, found: found * 0.0 for _ in sites]) == pytest.approx(without_slots)
        assert loss(slots=zeros, rows=[lambda rows, found: found + 7.0 for _ in sites]) == pytest.approx(without_slots)
        assert loss() != pytest.approx(without_slots)


@pytest.mark.parametrize(
    "config", [SSEDSConfig(), PMEConfig(), GuidedConfig(trial_steps=4), OptEmbedConfig(epochs=1, generations=2)]
)
def test_searches_show_progress_where_the_task_asks(config: Config, monkeypatch):
    shown: list[bool] = []

    class Recorder(Progress):
        def __init__(self, *columns, disable: bool = False, **settings) -> None:
            shown.append(not disable)
            super().__init__(*columns, disable=True, **settings)

    monkeypatch.setattr("embtrim.system.progress.Progress", Recorder)
    task = zoo_task()
    search(task, config, "30%")
    assert not any(shown)
    task.progress = True
    search(task, config, "30%")
    assert any(shown)
