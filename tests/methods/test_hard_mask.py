"""HAM: the mask's gradient, the regulariser and the price by hand; both modes within their budget; planted signal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from embtrim.errors import BudgetError, EmbtrimError
from embtrim.methods import HardMaskConfig, search
from embtrim.methods.hard_mask import (
    MaskedSupernet,
    column_correlation,
    straight_through,
    updated_cost_weight,
)
from embtrim.methods.selection import lowest_threshold, rank_slots, slot_costs
from embtrim.models import FNN, DeepFM
from embtrim.plan.budget import Budget
from embtrim.tables.row_optimizers import RowAdam
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.task import Task
from embtrim.testing.checks import CHECKS
from embtrim.testing.toys import ForeignModel, foreign_batches, foreign_task, planted_data, zoo_task
from embtrim.training.fitting import fit
from embtrim.training.settings import Hooks, TrainConfig

MODES = [pytest.param(HardMaskConfig(mode=mode), id=mode) for mode in ("quantile", "penalty")]
CONFIGS = [
    *MODES,
    pytest.param(
        HardMaskConfig(mode="penalty", start="initial", align="project", orthogonality=0), id="penalty-initial"
    ),
    pytest.param(
        HardMaskConfig(mode="quantile", single_level=True, refill="per_cost", mask_every=2), id="quantile-single-level"
    ),
]


@pytest.fixture(scope="module", params=["zoo", "foreign"])
def task(request) -> Task:
    return zoo_task() if request.param == "zoo" else foreign_task()


def toy_supernet(config: HardMaskConfig, num_rows: int = 400, **train) -> MaskedSupernet:
    """Three fields of width 3; weights large enough that every slot matters."""
    data = planted_data(num_rows=num_rows, noise_vocab=500)
    model = FNN(data.schema, embedding_dim=3, hidden_units=(4,), init_std=0.5)
    task = CTRTask(model, data, TrainConfig(batch_size=64, precision="fp32", **train))
    costs_S = slot_costs(task.full_plan(), "concat")
    return MaskedSupernet(task, model, config, costs_S, int(costs_S.sum()) // 4, seed=0)


class TestMask:
    """Equations (mask) and (ste)."""

    def test_straight_through_by_hand(self):
        a_S = torch.tensor([0.5, -0.5, 1.5, -1.0], requires_grad=True)
        mask_S = straight_through(a_S, a_S > 0)
        assert mask_S.tolist() == [1, 0, 1, 0]
        (mask_S * torch.tensor([2.0, 3.0, 5.0, 7.0])).sum().backward()
        assert a_S.grad.tolist() == [2, 3, 0, 7]

    def test_gradient_reads_the_unmasked_embeddings(self):
        supernet = toy_supernet(HardMaskConfig(mode="penalty"))
        model, task = supernet.model, supernet.task
        batch = next(iter(task.batches("valid", 0)))
        supernet.mask_S = torch.tensor([True, False, True] * 3)
        found_S = supernet._mask_gradient(batch)
        model.eval()
        emb_BS = model.tables(batch.ids_BC).concat.detach()
        masked_BS = (emb_BS * supernet.mask_S).requires_grad_()
        with model.tables.gated(slot_gate=lambda _: masked_BS):
            task.loss(model, batch).backward()
        expected_S = (masked_BS.grad * emb_BS).sum(0)
        torch.testing.assert_close(found_S, expected_S, rtol=1e-4, atol=1e-8)
        assert (found_S[~supernet.mask_S].abs() > 1e-6).all(), "masked slots must feel the loss"

    def test_a_masked_column_comes_back(self):
        supernet = toy_supernet(HardMaskConfig(mode="penalty", mask_lr=5.0))
        batch = next(iter(supernet.task.batches("valid", 0)))
        supernet.a_S[::2] = -1e-3
        supernet.mask_S = supernet.a_S > 0
        gradient_S = supernet._mask_gradient(batch)
        supernet._mask_batches = iter([batch])
        supernet._mask_step()
        wanted_S = gradient_S < -0.5 * gradient_S.abs().mean()
        assert wanted_S[::2].any()
        assert supernet.mask_S[::2].tolist() == (gradient_S[::2] < 0).logical_and(supernet.a_S[::2] > 0).tolist()
        assert supernet.mask_S[wanted_S].all()

    def test_weights_step_moves_only_columns_in_use(self):
        """Masked columns get no gradient from the loss; the mask of the sites follows a."""
        supernet = toy_supernet(HardMaskConfig(orthogonality=0.0, min_steps=1, epochs=0.01, mask_every=3))
        supernet.mask_S = torch.tensor([True, False, True] * 3)
        before = supernet.model.tables.weight.detach().clone().view(-1, 3)
        supernet.train()
        moved_D = (supernet.model.tables.weight.detach().view(-1, 3) != before).any(0)
        assert moved_D.tolist() == [True, False, True]

    def test_mask_step_leaves_weights_and_their_optimiser_alone(self):
        """The row optimiser gets no lookup, and owed decay is paid for the rows of the batch alone."""
        supernet = toy_supernet(HardMaskConfig())
        model, tables = supernet.model, supernet.model.tables
        optimizer = RowAdam(tables, l2=0.1)
        batches = iter(supernet.task.batches("train", 0))
        for _ in range(3):
            supernet.task.loss(model.train(), next(batches)).backward()
            optimizer.step()
        model.zero_grad()
        before = {name: value.clone() for name, value in optimizer.state.items()}
        weights = {name: value.clone() for name, value in model.named_parameters() if not name.startswith("tables.")}
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        batch = next(iter(supernet.task.batches("valid", 0)))
        supernet._mask_gradient(batch)
        assert tables.lookups == []
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
        assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
        assert model.training
        moved = (optimizer.state["decayed_until"] != before["decayed_until"]).nonzero().flatten()
        read = tables.storage_ids(batch.ids_BC).unique()
        assert set(moved.tolist()) <= set(read.tolist())
        assert len(moved)


class TestRegulariser:
    """Equation (orth)."""

    def test_by_hand(self):
        emb_UD = torch.tensor([[3.0, 0.0, 1.0], [4.0, 1.0, 0.0]])  # cosines .8, .6, 0
        every = torch.tensor([True, True, True])
        assert float(column_correlation(emb_UD, every, num_rows=2)) == pytest.approx(2 * (0.64 + 0.36) / 2**2)
        assert float(column_correlation(emb_UD, every, num_rows=9)) == pytest.approx(2 * (0.64 + 0.36) / 3**2)
        two = torch.tensor([True, True, False])
        assert float(column_correlation(emb_UD, two, num_rows=2)) == pytest.approx(2 * 0.64 / 2**2)
        none = torch.tensor([False, False, False])
        assert float(column_correlation(emb_UD, none, num_rows=2)) == 0.0

    def test_zero_for_orthogonal_columns(self):
        emb_UD = torch.linalg.qr(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)))[0]
        scaled_UD = emb_UD * torch.tensor([1.0, 5.0, 0.1, 2.0])
        assert float(column_correlation(scaled_UD, torch.ones(4, dtype=torch.bool), 7)) == pytest.approx(0, abs=1e-10)

    @pytest.mark.parametrize("tables", ["lazy", "dense"])
    def test_only_rows_of_the_batch_move(self, tables: str):
        config = HardMaskConfig(orthogonality=1.0, orthogonality_every=1)
        supernet = toy_supernet(config, tables=tables)
        model = supernet.model
        before = model.tables.weight.detach().clone().view(-1, 3)
        supernet.train()
        seen = np.unique(model.tables.storage_ids(torch.from_numpy(supernet.task.data.split("train").ids)).numpy())
        moved = (model.tables.weight.detach().view(-1, 3) != before).any(1).numpy().nonzero()[0]
        assert len(seen) < len(before) - 100
        np.testing.assert_array_equal(moved, seen)

    def test_it_lowers_the_correlation(self):
        def correlation(strength: float) -> float:
            config = HardMaskConfig(orthogonality=strength, orthogonality_every=1, epochs=4)
            supernet = toy_supernet(config, learning_rate=1e-2)
            supernet.train()
            strong_VD = supernet.sites[0].weights()[0]
            return float(column_correlation(strong_VD, torch.ones(3, dtype=torch.bool), len(strong_VD)))

        assert correlation(30.0) < 0.5 * correlation(0.0)

    def test_foreign_sites_are_read_too(self):
        task = foreign_task()
        costs_S = slot_costs(task.full_plan(), "scatter")
        supernet = MaskedSupernet(task, task.model, HardMaskConfig(orthogonality=2.0), costs_S, 100, seed=0)
        batch = next(iter(task.batches("train")))
        supernet.mask_S[0] = False
        with supernet._gates:
            supernet._open_gates()
            task.loss(task.model, batch)
        ids = batch[0]
        user_UD = task.model.user.weight[ids[:, 0].unique()]
        item_UD = torch.cat([task.model.item.weight[ids[:, c].unique()] for c in (1, 2)])
        expected = column_correlation(user_UD, torch.arange(6) > 0, 40)
        expected = expected + column_correlation(item_UD, torch.arange(4) >= 0, 25)
        torch.testing.assert_close(supernet._extra_loss(task.model, batch), 2 * expected)
        assert float(supernet._extra_loss(task.model, batch)) == 0.0, "rows are read once"


class TestPriceAndThreshold:
    """Equation (dual), and tau_B."""

    def test_update_of_the_cost_weight(self):
        assert updated_cost_weight(1.0, 2.0, cost=0.5, target=0.25) == 1.5
        assert updated_cost_weight(0.1, 2.0, cost=0.25, target=0.5) == 0.0

    def test_penalty_stops_at_the_first_cost_within_the_target(self):
        supernet = toy_supernet(HardMaskConfig(mode="penalty", eta=20.0, epochs=4))
        costs, weights, units = [], [], []
        step = supernet._mask_step

        def noted() -> bool:
            done = step()
            costs.append(supernet.cost)
            weights.append(supernet.cost_weight)
            units.append(supernet.unit)
            return done

        supernet._mask_step = noted
        supernet.train()
        assert supernet.mask_steps == len(costs) < supernet.planned
        assert costs[-1] <= supernet.target < min(costs[:-1])
        eta = 20.0 / float(supernet.share_S.max()) / supernet.planned
        assert weights[0] == pytest.approx(eta * units[0] * (costs[0] - supernet.target))
        assert weights[1] == pytest.approx(weights[0] + eta * units[1] * (costs[1] - supernet.target))
        assert supernet.a_S.abs().max() <= 1

    @pytest.mark.parametrize("slack, done", [(0.0, True), (0.01, False)])
    def test_penalty_stops_at_the_target_and_not_above(self, slack: float, done: bool):
        supernet = toy_supernet(HardMaskConfig(mode="penalty"))
        supernet._mask_gradient = lambda batch: torch.zeros(9)
        supernet.a_S = torch.tensor([0.5, -0.5, 0.5] * 3)
        supernet.target = float(supernet.share_S[supernet.a_S > 0].sum()) - slack
        assert supernet._mask_step() == done

    def test_lowest_threshold_by_hand(self):
        a_S = torch.tensor([0.3, 0.1, 0.3, 0.2])
        share_S = torch.tensor([0.3, 0.1, 0.1, 0.5], dtype=torch.float64)
        assert lowest_threshold(a_S, share_S, 1.0) == pytest.approx(0.1)
        assert lowest_threshold(a_S, share_S, 0.95) == pytest.approx(0.2)
        assert lowest_threshold(a_S, share_S, 0.89) == pytest.approx(0.3)
        none = lowest_threshold(a_S, share_S, 0.39)  # the tied pair takes 0.4
        assert not (a_S >= none).any()
        assert none == pytest.approx(0.3)

    def test_rank_by_hand(self):
        margin_S, costs_S = np.array([0.9, 0.2, -0.1, -0.2]), np.array([9, 1, 30, 10])
        mask_S = margin_S > 0
        assert rank_slots(margin_S, costs_S, mask_S, "per_cost").tolist() == [1, 0, 3, 2]
        assert rank_slots(margin_S, costs_S, mask_S, "plain").tolist() == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("config", CONFIGS)
def test_conformance(config: HardMaskConfig, check: str, task: Task):
    CHECKS[check](task, config)


@pytest.mark.parametrize("config", MODES)
def test_details_say_what_the_search_did(config: HardMaskConfig):
    task = zoo_task()
    plan = search(task, config, "30%", seed=2)
    details = plan.details
    assert details["config"] == config.model_dump()
    assert (str(plan.budget), plan.seed) == (str(Budget.parse("30%")), 2)
    assert len(details["scores"]) == 24
    assert details["weight_steps"] == details["mask_steps"]
    if config.mode == "quantile":
        assert details["cost"] <= details["cost_target"]
        assert details["cost_weight"] == 0
    else:
        assert details["cost_weight"] > 0


def test_single_level_reads_training_batches_only(data):
    model = FNN(data.schema, embedding_dim=3, hidden_units=(4,))
    read: list[str] = []

    class Watched(CTRTask):
        def batches(self, split: str, seed: int | None = None):
            read.append(split)
            return super().batches(split, seed)

    task = Watched(model, data, TrainConfig(batch_size=512))
    search(task, HardMaskConfig(single_level=True), "30%")
    assert set(read) == {"train"}
    read.clear()
    search(task, HardMaskConfig(), "30%")
    assert set(read) == {"valid"}


@pytest.mark.slow
def test_min_dim_keeps_columns_everywhere(data):
    model = FNN(data.schema, embedding_dim=3, hidden_units=(4,))
    task = CTRTask(model, data, TrainConfig(batch_size=512))
    for config in (HardMaskConfig(), HardMaskConfig(mode="penalty", eta=50.0)):
        plan = search(task, config.replace(min_dim=1), "34%")
        assert min(t.output_width for t in plan.tables) == 1
    with pytest.raises(BudgetError, match="1 column"):
        search(task, HardMaskConfig(min_dim=1), "30%")


def test_a_task_without_validation_batches():
    batches = list(foreign_batches())
    task = Task(
        ForeignModel(),
        lambda m, b: nn.functional.binary_cross_entropy_with_logits(m(b[0]), b[1]),
        train=batches,
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    )
    with pytest.raises(EmbtrimError, match="valid="):
        search(task, HardMaskConfig(), "50%")
    assert search(task, HardMaskConfig(single_level=True), "50%").num_params > 0
    empty = Task(task.model, task.loss, train=batches, valid=[], optimizer=lambda m: torch.optim.Adam(m.parameters()))
    with pytest.raises(EmbtrimError, match="no valid batches"):
        search(empty, HardMaskConfig(), "50%")


@pytest.fixture(scope="module")
def trained() -> CTRTask:
    data = planted_data(num_rows=8000, noise_vocab=3000, seed=1)
    config = TrainConfig(epochs=4, batch_size=256, learning_rate=3e-3, patience=0, reduce_lr=1.0, precision="fp32")
    task = CTRTask(DeepFM(data.schema, embedding_dim=8, hidden_units=(32,)), data, config)
    task.fit(task.model, epochs=4, seed=0)
    return task


class TestPlantedSignal:
    """strong > weak > noise, where noise has 3,000 values and a trained model has learned them by heart."""

    def by_field(self, task: CTRTask, config: HardMaskConfig) -> tuple[list[float], list[int]]:
        plan = search(task, config, "20%")
        means = np.array(plan.details["scores"]).reshape(3, 8).mean(1)
        return means.tolist(), [t.output_width for t in plan.tables]

    @pytest.mark.slow
    @pytest.mark.parametrize("config", MODES)
    def test_noise_goes_first(self, config: HardMaskConfig, trained: CTRTask):
        (strong, weak, noise), widths = self.by_field(trained, config)
        assert strong > weak > 0 > noise
        assert widths == [8, 8, 1], "what is left of the budget takes one column of noise"

    def test_a_single_level_mask_overrates_memorised_noise(self, trained: CTRTask):
        """The mask then asks for what the weights have fitted; reading validation batches, the default, mends it."""
        (_, weak, noise), _ = self.by_field(trained, HardMaskConfig(mode="quantile", single_level=True))
        assert noise > weak > 0


def test_batches_of_an_epoch_are_counted(data):
    task = CTRTask(FNN(data.schema, embedding_dim=3, hidden_units=(4,)), data, TrainConfig(batch_size=1000))
    assert task.num_batches("train") == len(list(task.batches("train"))) == 5

    class NoLength:
        def __iter__(self):
            return foreign_batches()

    assert Task(ForeignModel(), task.loss, train=NoLength()).num_batches("train") == 4


def test_a_hook_can_end_the_training(data):
    def steps(stop_at: int) -> int:
        seen: list[int] = []

        def on_step(step: int) -> bool:
            seen.append(step)
            return step == stop_at

        model = FNN(data.schema, embedding_dim=3, hidden_units=(4,))
        result = fit(model, data, epochs=3, batch_size=1000, patience=0, hooks=Hooks(on_step=on_step))
        assert len(result.history) == math.ceil(len(seen) / 5)
        return len(seen)

    assert [steps(2), steps(5), steps(7), steps(99)] == [2, 5, 7, 15]
