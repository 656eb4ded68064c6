"""What every search promises, on a zoo model and on a foreign one; SSEDS by hand; planted signal."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from embtrim.budget import Budget
from embtrim.config import Config
from embtrim.errors import BudgetError, ConfigError, EmbtrimError
from embtrim.methods import METHODS, RandomConfig, SSEDSConfig, UniformConfig, method_named, search
from embtrim.methods.selection import fill_budget
from embtrim.methods.sseds import slot_gradients
from embtrim.models import FNN, LR, DeepFM
from embtrim.plan import SizePlan
from embtrim.sites import CTRTask, Task, find_sites, gate_sites, num_slots
from embtrim.train import TrainConfig, fit
from tests.conftest import planted_data
from tests.test_compaction import Foreign, foreign_batches

CONFIGS = [
    pytest.param(SSEDSConfig(), id="sseds"),
    pytest.param(SSEDSConfig(score="signed", data="valid", batches=0, cost_aware=True), id="sseds-signed"),
    pytest.param(SSEDSConfig(pretrain="epochs:1", align="project", average="abs", batches=2), id="sseds-pretrain"),
    pytest.param(UniformConfig(), id="uniform"),
    pytest.param(RandomConfig(align="project"), id="random"),
]


def zoo_task() -> CTRTask:
    data = planted_data(num_rows=2000, noise_vocab=200)
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(8,))
    config = TrainConfig(epochs=1, batch_size=256)
    fit(model, data, config)
    return CTRTask(model, data, config)


def foreign_task() -> Task:
    torch.manual_seed(0)
    model = Foreign()
    batches = list(foreign_batches())
    return Task(
        model,
        lambda m, b: nn.functional.binary_cross_entropy_with_logits(m(b[0]), b[1]),
        train=batches,
        valid=batches,
        optimizer=lambda m: torch.optim.Adam(m.parameters()),
        fresh=lambda seed: torch.random.manual_seed(seed) and Foreign(),
    )


@pytest.fixture(scope="module", params=["zoo", "foreign"])
def task(request) -> Task:
    return zoo_task() if request.param == "zoo" else foreign_task()


@pytest.mark.parametrize("config", CONFIGS)
class TestEveryMethod:
    """Conformance: one parametrised class, all methods."""

    def test_same_seed_same_plan(self, config: Config, task: Task):
        first, second = (search(task, config, "50%", seed=3) for _ in range(2))
        assert first.diff(second) == ""

    @pytest.mark.parametrize("budget", ["80%", "30%", "12%", "500 params"])
    def test_budget_holds_and_is_full(self, config: Config, task: Task, budget: str):
        if isinstance(config, UniformConfig) and budget == "12%" and not isinstance(task, CTRTask):
            with pytest.raises(BudgetError, match="does not know which rows"):
                search(task, config, budget)
            return
        plan = search(task, config, budget)
        limit = plan.max_params(Budget.parse(budget))
        assert plan.num_params <= limit
        extra = plan.width if getattr(config, "align", "") == "project" else 0
        for table in plan.tables:
            if table.output_width < table.width and not isinstance(config, UniformConfig):
                assert plan.num_params + table.num_rows + extra > limit, f"one more column of {table.name} fits"

    def test_model_is_unchanged(self, config: Config, task: Task):
        before = copy.deepcopy(task.model.state_dict())
        training = task.model.training
        search(task, config, "30%")
        assert task.model.training == training
        assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
        assert all(p.grad is None for p in task.model.parameters())

    def test_plan_round_trips(self, config: Config, task: Task, tmp_path):
        plan = search(task, config, "30%")
        plan.save(tmp_path / "plan.json")
        again = SizePlan.load(tmp_path / "plan.json")
        assert again.diff(plan) == ""
        assert (again.num_params, again.method, again.details) == (plan.num_params, plan.method, plan.details)

    def test_whole_budget_keeps_everything(self, config: Config, task: Task):
        if getattr(config, "align", "") == "project":
            assert search(task, config, "100%").num_params <= task.full_plan().num_params
        else:
            assert search(task, config, "100%").num_params == task.full_plan().num_params


def test_sseds_gradient_equals_autograd_of_an_explicit_mask():
    """g = dL/dalpha on a 2-field, 3-column toy: sum over the batch of dL/de~ * e."""
    data = planted_data(num_rows=400, noise_vocab=50)
    model = FNN(data.schema, embedding_dim=3, hidden_units=(4,), init_std=0.5)
    task = CTRTask(model, data, TrainConfig(batch_size=64))
    found = slot_gradients(task, model, SSEDSConfig(batches=1), seed=0)
    batch = next(iter(task.batches("train", 0)))
    model.eval()
    emb = model.tables(batch.ids_BC).concat.detach().requires_grad_()
    with model.tables.gated(slot_gate=lambda _: emb):
        task.loss(model, batch).backward()
    expected = (emb.grad * emb).sum(0).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    assert np.abs(found).max() > 0


def test_shared_table_is_one_slot_for_both_fields():
    from embtrim.dataset import EncodedDataset, SplitArrays
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


def test_fill_budget_by_hand():
    ranking, costs, tables = np.array([2, 0, 1, 3]), np.array([5, 4, 9, 1]), np.array([0, 0, 1, 1])
    assert fill_budget(ranking, costs, 10, tables).tolist() == [False, False, True, True]
    assert fill_budget(ranking, costs, 13, tables).tolist() == [False, True, True, False]
    assert fill_budget(ranking, costs, 14, tables, min_dim=1).tolist() == [True, False, True, False]
    with pytest.raises(BudgetError, match="14"):
        fill_budget(ranking, costs, 13, tables, min_dim=1)


def test_uniform_by_hand(data):
    model = FNN(data.schema, embedding_dim=8, hidden_units=(4,))
    plan = search(CTRTask(model, data), UniformConfig(), "30%", seed=1)
    widths = [t.output_width for t in plan.tables]
    # 30% of 2050 x 8 is 4920 = 2 x 2050 + 820: width 2 for all; the small tables may get a third column, noise not.
    assert widths[2] == 2
    assert widths[0] == widths[1] == 3


def test_uniform_below_width_one_keeps_the_most_frequent_rows(data):
    model = FNN(data.schema, embedding_dim=8, hidden_units=(4,))
    plan = search(CTRTask(model, data), UniformConfig(), "3%")
    assert plan.num_params == plan.max_params(Budget.parse("3%")) == 492
    counts = data.value_counts("train")
    noise = plan.tables[2]
    kept = noise.blocks[0].rows
    dropped = np.setdiff1d(np.arange(noise.num_rows), kept)
    assert noise.has_dropped
    assert counts["noise"][kept[1:]].min() >= counts["noise"][dropped].max() - 0
    with pytest.raises(BudgetError, match="smallest uniform plan"):
        search(CTRTask(model, data), UniformConfig(), "5 params")
    with pytest.raises(BudgetError, match="does not know which rows"):
        search(foreign_task(), UniformConfig(), "3%")


def test_planted_noise_goes_first_with_the_signed_score():
    """A pure-noise field of many values: the signed score on validation after one epoch ranks it last.

    The faithful absolute score on the training data does not: it gives the memorised noise field a large score.
    """
    data = planted_data(num_rows=8000, noise_vocab=3000, seed=1)
    config = TrainConfig(epochs=4, batch_size=256, learning_rate=3e-3, patience=0, reduce_lr=1.0, precision="fp32")
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(32,))
    task = CTRTask(model, data, config)
    task.fit(model, epochs=4, seed=0)

    def shares(settings: SSEDSConfig) -> np.ndarray:
        scores = np.array(search(task, settings, "20%").details["scores"]).reshape(3, 8)
        return scores.sum(1)

    signed = shares(SSEDSConfig(score="signed", data="valid", batches=0, pretrain="epochs:1"))
    assert signed[0] > signed[1] > signed[2]
    faithful = shares(SSEDSConfig())
    assert faithful[2] > faithful[1], "the faithful score is expected to overrate memorised noise"


def test_find_sites_says_what_it_left():
    assert [s.names for s in find_sites(Foreign())] == [("user",), ("item",)]
    assert [s.names for s in find_sites(Foreign(), keep=lambda name: name == "item")] == [("item",)]
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
    task = Task(Foreign(), lambda m, b: m(b[0]).mean(), train=list(foreign_batches()))
    with pytest.raises(EmbtrimError, match="valid="):
        search(task, SSEDSConfig(data="valid"), "50%")
    with pytest.raises(EmbtrimError, match="no train batches"):
        search(Task(Foreign(), lambda m, b: m(b[0]).mean(), train=[]), SSEDSConfig(), "50%")
    data = planted_data(num_rows=500)
    with pytest.raises(EmbtrimError, match="no embedding tables to shrink"):
        search(CTRTask(LR(data.schema), data), SSEDSConfig(), "50%")
    with pytest.raises(EmbtrimError, match="fresh="):
        search(task, SSEDSConfig(pretrain="epochs:1"), "50%")


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
