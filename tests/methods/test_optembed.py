"""OptEmbed: the surrogate by hand, the gates, the evolution with a known answer, budgets, planted signal."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.errors import BudgetError, EmbtrimError
from embtrim.methods import OptEmbedConfig, search
from embtrim.methods.evolution import Space, crossover, evolve, fill, fits, kept_rows, mutate, raise_thresholds, ranked
from embtrim.methods.optembed import (
    Fitness,
    HardStep,
    row_gate,
    row_margins,
    train_supernet,
    width_gate,
    width_masks,
)
from embtrim.models import FNN, DeepFM
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.schema import OOV, Schema
from embtrim.tables.embedding_tables import full_tables
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.sites import ModuleSite, TableSite, gate_sites
from embtrim.tasks.task import Task
from embtrim.testing.toys import ForeignModel, foreign_batches, planted_data
from embtrim.training.evaluation import evaluate
from embtrim.training.settings import TrainConfig

QUICK = OptEmbedConfig(epochs=1, population=6, generations=3, mutations=3, crossovers=3, num_elite=4, fitness_rows=0)
# Small data have few steps: a threshold that is to move needs a larger rate and weight than the paper's.
PRUNING = {"threshold_lr": 0.1, "threshold_weight": 0.01}


def zoo_task(l2: float = 0.3, width: int = 8, kind: type = DeepFM, noise_vocab: int = 200, **settings) -> CTRTask:
    data = planted_data(num_rows=2000, noise_vocab=noise_vocab)
    model = kind(data.schema, embedding_dim=width, hidden_units=(8,))
    config = {"batch_size": 256, "learning_rate": 3e-3, "precision": "fp32", "embedding_l2": l2}
    return CTRTask(model, data, TrainConfig(**{**config, **settings}))


def foreign_task(score: bool = False) -> Task:
    batches = list(foreign_batches())

    def loss(model: nn.Module, batch) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def fresh(seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return ForeignModel()

    return Task(
        fresh(0),
        loss,
        train=batches,
        valid=batches[:2],
        score=(lambda model: -sum(float(loss(model, b)) for b in batches[:2]) / 2) if score else None,
        optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=1e-3),
        fresh=fresh,
    )


class TestSupernet:
    """The two gates and the thresholds."""

    def test_surrogate_gradient_by_hand(self):
        """Rows (0.1, -0.2), (0.5, 0.3), (2, 1) at t = 0.1: x = 0.2, 0.7, 2.9, so dr/dx = 1.2, 0.4, 0."""
        weight = torch.tensor([[0.1, -0.2], [0.5, 0.3], [2.0, 1.0]], requires_grad=True)
        threshold = torch.tensor([0.1], requires_grad=True)
        module = nn.Embedding(3, 2)
        upstream = torch.tensor([[1.0, 10.0], [-1.0, 2.0], [3.0, 3.0]])
        (row_gate(ModuleSite("e", module), threshold)(torch.arange(3), weight) * upstream).sum().backward()
        # dL/dr = upstream . E = -1.9, 0.1, 9;  dL/dt = -(-1.9 * 1.2 + 0.1 * 0.4 + 0)
        assert float(threshold.grad) == pytest.approx(2.28 - 0.04)
        # dL/dE = r * upstream + dL/dr * dr/dx * sign(E)
        expected = [[1 - 2.28, 10 + 2.28], [-1 + 0.04, 2 + 0.04], [3.0, 3.0]]
        torch.testing.assert_close(weight.grad, torch.tensor(expected))

    def test_closed_rows_are_zero_and_still_learn(self):
        x = torch.tensor([-2.0, -0.7, -0.3, 0.0, 0.3, 1.0], requires_grad=True)
        step = HardStep.apply(x)
        step.sum().backward()
        assert step.tolist() == [0, 0, 0, 0, 1, 1]
        assert x.grad.tolist() == pytest.approx([0, 0.4, 0.8, 2.0, 0.8, 0.4])

    def test_rows_find_the_threshold_of_their_table_and_reserved_rows_pass(self):
        site = TableSite(full_tables(Schema.from_sizes([3, 4]), width=2))
        gate = row_gate(site, torch.tensor([1.0, 5.0]))
        found = gate(torch.arange(7, dtype=torch.int32), torch.ones(7, 2))[:, 0]
        # Norm 2 passes 1 and not 5; storage rows 0 and 3 are the OOV rows of the two tables.
        assert found.tolist() == [1, 1, 1, 1, 0, 0, 0]

    def test_widths_are_uniform_and_independent(self):
        model = nn.Module()
        gate = width_gate(
            TableSite(full_tables(Schema.from_sizes([3, 4, 5]), width=4)), model, torch.Generator().manual_seed(0)
        )
        model.eval()
        assert torch.equal(gate(torch.ones(5, 12)), torch.ones(5, 12))
        model.train()
        mask = gate(torch.ones(8000, 12)).view(8000, 3, 4)
        drawn = mask.sum(2).long()
        assert torch.equal(mask, (torch.arange(4) < drawn[..., None]).float()), "only first coordinates are kept"
        for field in range(3):
            shares = torch.bincount(drawn[:, field], minlength=5) / 8000
            assert shares[0] == 0
            assert shares[1:].tolist() == pytest.approx([0.25] * 4, abs=0.02)
        together = (drawn[:, 0] == drawn[:, 1]).float().mean()
        assert float(together) == pytest.approx(0.25, abs=0.02)

    def test_a_foreign_sequence_draws_one_width_a_sample(self):
        model = nn.Module().train()
        gate = width_gate(ModuleSite("e", nn.Embedding(9, 4)), model, torch.Generator().manual_seed(0))
        drawn = gate(torch.ones(50, 7, 4)).sum(2)
        assert (drawn == drawn[:, :1]).all()
        assert len(drawn[:, 0].unique()) == 4

    def test_thresholds_grow_by_lambda_alone(self):
        """Where the loss does not see the rows, a step adds lr_t * lambda * exp(-t)."""
        task = foreign_task()
        task.loss = lambda model, batch: model(batch[0]).sum() * 0.0
        _, thresholds = train_supernet(task, OptEmbedConfig(epochs=5, threshold_lr=0.5, threshold_weight=0.2), 0)
        expected = 0.0
        for _ in range(5 * 4):
            expected += 0.5 * 0.2 * np.exp(-expected)
        np.testing.assert_allclose(np.concatenate(thresholds), expected, rtol=1e-5)

    def test_only_the_supernet_and_t_move(self):
        task = zoo_task()
        before = copy.deepcopy(task.model.state_dict())
        state = torch.random.get_rng_state()
        search(task, QUICK, "40%", seed=1)
        assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
        assert torch.equal(state, torch.random.get_rng_state())


class TestEvolution:
    """The search over widths, with scores whose best candidate is known."""

    @staticmethod
    def space(budget: str | None = None, sizes=(10, 20, 30), width: int = 6) -> Space:
        full = SizePlan.full(Schema.from_sizes(list(sizes)), width)
        kept = [np.ones(n, bool) for n in sizes]
        return Space(full, "scatter", kept, Budget.parse(budget) if budget else None)

    @staticmethod
    def counting(best=(3, 1, 5)):
        calls: list[tuple[int, ...]] = []

        def score(candidates):
            calls.extend(candidates)
            return [-float(np.abs(np.array(c) - best).sum()) for c in candidates]

        return score, calls

    def test_finds_the_best_and_never_loses_it(self):
        score, calls = self.counting()
        seen: list[float] = []
        for generations in (0, 2, 5, 30):
            config = OptEmbedConfig(generations=generations)
            best = evolve(self.space(), score, config, np.random.default_rng(0), range(config.generations))
            scores = score(best)
            assert scores == sorted(scores, reverse=True)
            assert len(best) == len(set(best)) <= config.num_elite
            seen.append(scores[0])
        assert seen == sorted(seen), "the elite lives on, so more generations are never worse"
        assert best[0] == (3, 1, 5)
        assert all(1 <= d <= 6 for c in calls for d in c)
        assert {d for c in calls for d in c} == set(range(1, 7))

    def test_scores_stay_with_their_candidates(self):
        score, _ = self.counting()
        candidates = [(6, 6, 6), (3, 1, 5), (1, 1, 1), (3, 1, 4), (3, 1, 5)]
        assert ranked(candidates, score) == [(3, 1, 5), (3, 1, 4), (1, 1, 1), (6, 6, 6)]

    def test_parents_are_not_changed(self):
        space, rng = self.space(), np.random.default_rng(0)
        left, right = np.array([1, 2, 3]), np.array([4, 5, 6])
        config = OptEmbedConfig(mutation_rate=1.0)
        children = [mutate(space, left, config, rng) for _ in range(20)] + [crossover(left, right, rng)]
        assert left.tolist() == [1, 2, 3]
        assert right.tolist() == [4, 5, 6]
        assert any(child.tolist() != [1, 2, 3] for child in children)
        assert {tuple(crossover(left, right, rng).tolist()) for _ in range(50)} == {(1, 5, 6), (1, 2, 6)}

    def test_mutation_rate(self):
        space, rng = self.space(sizes=(5,) * 50, width=100), np.random.default_rng(0)
        config, parent = OptEmbedConfig(), np.full(50, 200)
        changed = np.mean([mutate(space, parent, config, rng) != parent for _ in range(200)])
        assert changed == pytest.approx(0.1, abs=0.01)

    @pytest.mark.parametrize("budget", ["17%", "20%", "50%", "83%", "100%"])
    def test_repair_holds_the_budget_and_fill_uses_it(self, budget: str):
        space, rng = self.space(budget), np.random.default_rng(0)
        score, _ = self.counting()
        for _ in range(100):
            drawn = space.draw(rng)
            before = drawn.copy()
            repaired = space.repair(drawn, rng)
            assert np.array_equal(drawn, before), "the candidate was changed in place"
            assert space.plan(repaired).num_params == space.cost(repaired) <= space.limit
            assert all(1 <= d <= most for d, most in zip(repaired, drawn, strict=True))
            if space.cost(drawn) <= space.limit:
                assert repaired == tuple(drawn)
            filled = fill(space, repaired, score)
            left = space.limit - space.cost(filled)
            assert left >= 0
            assert all(d == 6 or left < rows for d, rows in zip(filled, (10, 20, 30), strict=True))

    def test_repair_lowers_no_more_than_needed(self):
        space = self.space("50%", sizes=(10,))
        assert space.repair(np.array([6]), np.random.default_rng(0)) == (3,)

    def test_fill_widens_what_gains_most(self):
        space = self.space("100%", sizes=(10, 10, 10))
        space.limit = 90  # 9 columns of 10 rows
        score, _ = self.counting(best=(1, 2, 6))
        assert fill(space, (1, 1, 1), score) == (1, 2, 6)

    def test_of_many_tables_fill_scores_those_that_would_take_most(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("embtrim.methods.evolution.MOST_SCORED", 2)
        space = self.space("100%", sizes=(10, 30, 20))
        space.limit = 60 + 100  # the 5 further columns of the second table take 150, those of the third 100
        score, scored = self.counting(best=(1, 1, 6))
        assert fill(space, (1, 1, 1), score) == (1, 1, 6)
        assert len(scored) == 2

    def test_projections_are_counted(self):
        """Width 6 needs no projection: it costs less than width 5 of a small table."""
        full = SizePlan.full(Schema.from_sizes([4, 50]), 6)
        space = Space(full, "project", [np.ones(4, bool), np.ones(50, bool)], Budget.parse("60%"))
        assert space.costs[0].tolist() == [0, 4 + 6, 8 + 12, 12 + 18, 16 + 24, 20 + 30, 24]
        rng = np.random.default_rng(0)
        score, _ = self.counting(best=(6, 1))
        for _ in range(50):
            widths = fill(space, space.repair(space.draw(rng), rng), score)
            assert space.plan(widths).num_params == space.cost(widths) <= space.limit
            assert all(space.widest(widths, table, space.cost(widths)) == widths[table] for table in range(2))

    def test_rows_kept_by_hand(self):
        full = SizePlan.full(Schema.from_sizes([5, 3, 3, 3]), 2)
        margins = [
            np.array([-1, 2, -1, 3, -1]),  # two rows, OOV and DROPPED: 4 of 5
            np.array([9, -1, -1]),  # nothing but OOV, which stays for no one
            np.array([1, 1, -1]),  # OOV, one row and DROPPED: as many as before
            np.array([-1, 1, 1]),
        ]
        found = kept_rows(full, "scatter", margins, [OOV] * 4, [2] * 4)
        assert [np.flatnonzero(rows).tolist() for rows in found] == [[0, 1, 3], [], [0, 1, 2], [0, 1, 2]]
        found = kept_rows(full, "scatter", margins, [None] * 4, [2] * 4)
        assert [np.flatnonzero(rows).tolist() for rows in found] == [[1, 3], [0], [0, 1, 2], [0, 1, 2]]
        space = Space(full, "scatter", kept_rows(full, "scatter", margins, [OOV] * 4, [2] * 4))
        assert space.most_T.tolist() == [2, 0, 2, 2]
        assert [space.cost((d, 0, 1, 1)) for d in (1, 2)] == [4 + 6, 8 + 6]
        assert space.plan((2, 0, 1, 1)).tables[1].blocks == ()

    def test_thresholds_rise_no_more_than_needed(self):
        full = SizePlan.full(Schema.from_sizes([50, 50]), 4)
        rng = np.random.default_rng(0)
        margins = [rng.random(50) + 0.1, rng.random(50) + 0.3]
        budget = Budget.parse("40 params")
        kept, raised = raise_thresholds(full, "scatter", margins, [OOV, OOV], budget)
        assert raised > 0
        for margin, rows in zip(margins, kept, strict=True):
            assert np.array_equal(rows[1:], margin[1:] > raised)
        assert fits(full, "scatter", kept, budget)
        assert Space(full, "scatter", kept).cost((1, 1)) >= 39, "one row less would not have been enough"


def full_fitness(task: CTRTask, model, plan: SizePlan) -> float:
    return evaluate(compact(model, plan, "inherit"), task.data.recode(plan), "valid", task.config).auc


@pytest.fixture(scope="module")
def pruned():
    """A task, a supernet of which rows have gone, and its kept rows."""
    task = zoo_task(l2=0.3, noise_vocab=400)
    config = OptEmbedConfig(epochs=12, **PRUNING)
    model, thresholds = train_supernet(task, config, 0)
    sites = task.sites(model)
    margins = row_margins(task, model, sites, thresholds)
    full = task.full_plan()
    kept = kept_rows(full, "scatter", margins, [OOV] * 3, [8] * 3)
    sites[0].drop_rows([torch.from_numpy(rows) for rows in kept])
    return task, model, Space(full, "scatter", kept)


class TestFitness:
    """What the evolution reads is what the compact model does."""

    def test_equals_the_compact_model(self, pruned):
        task, model, space = pruned
        assert any(not rows.all() for rows in space.kept), "the fixture is to drop rows"
        candidates = [space.repair(space.draw(np.random.default_rng(n)), np.random.default_rng(n)) for n in range(4)]
        together = Fitness(task, model, 0)(candidates)
        for candidate, score in zip(candidates, together, strict=True):
            assert score == pytest.approx(full_fitness(task, model, space.plan(candidate)), abs=1e-6)
        assert len(set(together)) > 1

    def test_together_equals_one_by_one_and_nothing_is_scored_twice(self, pruned, monkeypatch):
        task, model, _ = pruned
        candidates = [(8, 8, 0), (1, 4, 0), (3, 3, 0)]
        single = []
        for candidate in candidates:
            with gate_sites(task.sites(model), width_masks(task.sites(model), candidate)):
                single.append(task.score(model))
        fitness = Fitness(task, model, 0)
        assert fitness(candidates) == single
        asked: list[int] = []
        monkeypatch.setattr(
            task, "gated_scores", lambda model, gates, rows: asked.append(len(gates)) or [0.5] * len(gates)
        )
        assert fitness([candidates[1], (2, 2, 0), (2, 2, 0), candidates[0]]) == [single[1], 0.5, 0.5, single[0]]
        assert asked == [1]
        assert len(fitness.scores) == 4

    def test_a_sample_of_rows_is_the_same_each_time(self, pruned):
        task, model, _ = pruned
        full, first, second = (Fitness(task, model, rows)([(4, 4, 0)])[0] for rows in (0, 100, 100))
        assert first == second != full
        assert Fitness(task, model, 10**6)([(4, 4, 0)])[0] == full

    @pytest.mark.parametrize("score", [True, False])
    def test_of_a_foreign_task(self, score: bool):
        task = foreign_task(score)
        gates = [width_masks(task.sites(task.model), widths) for widths in [(6, 4), (2, 3), (0, 0)]]
        expected = []
        for gating in gates:
            with torch.no_grad(), gate_sites(task.sites(task.model), gating):
                expected.append(-np.mean([float(task.loss(task.model, batch)) for batch in task.batches("valid")]))
        assert task.gated_scores(task.model, gates) == pytest.approx(expected)
        assert len(set(expected)) == 3


class TestSearch:
    """Plans of the whole method."""

    @pytest.mark.parametrize("kind", ["zoo", "foreign"])
    @pytest.mark.parametrize("align", ["scatter", "project"])
    @pytest.mark.parametrize("budget", ["90%", "40%", "20%", "10%", "3%"])
    def test_budget_is_respected_and_full(self, kind: str, align: str, budget: str):
        task = zoo_task() if kind == "zoo" else foreign_task()
        # The paper's threshold settings drop no row here, so that only the budget can.
        config = QUICK.replace(**OptEmbedConfig.faithful, align=align)
        if kind == "foreign" and budget == "3%":  # of 340 parameters; maps cost more
            with pytest.raises(BudgetError, match="'optembed' keeps no row of any table"):
                search(task, config, budget, seed=1)
            return
        plan = search(task, config, budget, seed=1)
        limit = plan.max_params(Budget.parse(budget))
        assert plan.num_params <= limit
        extra = plan.width if align == "project" else 0
        for table in plan.tables:
            if 0 < table.output_width < table.width:
                assert plan.num_params + table.num_compact_rows + extra > limit, f"one column of {table.name} fits"
        ones = sum(table.num_rows + (table.width if align == "project" else 0) for table in plan.tables)
        assert (plan.details["raised"] > 0) == (ones > limit)
        if ones > limit:
            assert any(table.has_dropped for table in plan.tables)

    def test_bytes_count_the_first_order_weights_that_are_left(self):
        plan = search(zoo_task(), QUICK, "1500 bytes")
        assert plan.num_bytes() <= 1500
        assert any(table.has_dropped for table in plan.tables)
        with pytest.raises(BudgetError):
            search(zoo_task(), QUICK, "4 bytes")

    @pytest.mark.slow
    def test_columns_are_prefixes_and_oov_stays_with_the_rows(self):
        plan = search(zoo_task(), QUICK.replace(**PRUNING, epochs=12), "10%")
        assert any(table.has_dropped for table in plan.tables)
        for table in plan.tables:
            assert table.columns == tuple(range(table.output_width))
            for block in table.blocks:
                assert block.rows is None or block.rows[0] == OOV

    def test_same_seed_same_plan(self):
        first, second, other = (search(zoo_task(), QUICK, "30%", seed) for seed in (1, 1, 2))
        assert first.diff(second) == ""
        assert first.details == second.details
        assert first.details["thresholds"] != other.details["thresholds"]

    def test_natural_is_the_best_candidate_and_an_error_over_the_budget(self):
        config = QUICK.replace(natural=True)
        plan = search(zoo_task(), config, "100%")
        assert plan.num_params < plan.num_full_params
        assert plan.details["raised"] == 0.0
        assert plan.details["natural_params"] == plan.num_params
        with pytest.raises(BudgetError, match=f"natural size of this plan is {plan.num_params:,}"):
            search(zoo_task(), config, "5%")

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [FNN, DeepFM])
    def test_masked_equals_compact(self, kind: type):
        task = zoo_task(kind=kind)
        plan = search(task, QUICK.replace(**PRUNING, epochs=12), "12%")
        assert any(table.has_dropped for table in plan.tables)
        verify(task.fresh(3), plan, task.data).require()
        small = compact(task.model, plan, "initial")
        assert small.tables.weight.numel() == plan.num_params

    def test_padding_is_reserved_and_a_foreign_model_has_no_oov(self):
        task = foreign_task()
        user, item = task.sites(task.model)
        assert (user.reserved_rows, item.reserved_rows) == ((None,), (0,))
        for site, first in ((user, 0.0), (item, 1.0)):
            gate = row_gate(site, torch.tensor([3.0]))
            assert gate(torch.arange(3), torch.ones(3, 2))[:, 0].tolist() == [first, 0.0, 0.0]

    def test_foreign_rows_go_where_their_map_pays(self):
        """Thresholds far up: user keeps the few rows above them, whose map costs less than the others' 6 columns."""
        task = foreign_task()
        loud = task.fresh

        def fresh(seed: int) -> nn.Module:
            model = loud(seed)
            model.user.weight.data[::10] *= 1000.0
            return model

        task.fresh = fresh
        task.loss = lambda model, batch: model(batch[0]).sum() * 0.0
        config = QUICK.replace(threshold_lr=100.0, threshold_weight=1.0, natural=True)
        plan = search(task, config, "100%")
        assert plan.tables[0].blocks[0].rows.tolist() == [0, 10, 20, 30]
        assert plan.num_params == 5 * plan.tables[0].output_width + 40 // 4
        assert plan.tables[1].blocks == ()

    @pytest.mark.slow
    def test_reported_fitness_is_that_of_the_compact_supernet(self):
        task, config = zoo_task(), QUICK.replace(**PRUNING, epochs=12)
        plan = search(task, config, "12%", seed=4)
        model, thresholds = train_supernet(task, config, 4)
        assert plan.details["thresholds"] == np.concatenate(thresholds).tolist()
        assert any(table.has_dropped for table in plan.tables)
        assert plan.details["fitness"] == pytest.approx(full_fitness(task, model, plan), abs=1e-6)

    def test_lazy_tables(self):
        plan = search(zoo_task(), QUICK.replace(optimizer="lazy"), "30%")
        assert plan.num_params <= plan.max_params(Budget.parse("30%"))

    def test_a_task_says_what_it_lacks(self):
        task = Task(ForeignModel(), lambda m, b: m(b[0]).mean(), train=list(foreign_batches()))
        with pytest.raises(EmbtrimError, match="fresh="):
            search(task, QUICK, "50%")


@pytest.mark.slow
class TestPlantedSignal:
    """Noise of 2,000 values beside two fields of 30 and 20 that carry the label."""

    @staticmethod
    def plan(config: OptEmbedConfig, l2: float = 0.3) -> SizePlan:
        data = planted_data(noise_vocab=2000, seed=1)
        model = DeepFM(data.schema, embedding_dim=8, hidden_units=(16,))
        train = TrainConfig(batch_size=256, learning_rate=3e-3, precision="fp32", embedding_l2=l2)
        return search(CTRTask(model, data, train), config, "100%")

    def test_noise_rows_go_first_with_l2_and_thresholds_that_move(self):
        quick = {"epochs": 8, "generations": 0, "natural": True}
        plan = self.plan(OptEmbedConfig(**quick, **PRUNING))
        strong, _weak, noise = (table.num_kept / table.num_rows for table in plan.tables)
        assert strong > 0.7
        assert noise < 0.05
        without_l2 = self.plan(OptEmbedConfig(**quick, **PRUNING, l2=0.0)).tables[2]
        assert without_l2.num_kept > 1000, "it is L2 that takes the norms below the threshold"

    def test_the_paper_s_threshold_settings_drop_nothing_here_but_widths_tell(self):
        """The evolution gives memorised noise the smallest width."""
        plan = self.plan(OptEmbedConfig(**OptEmbedConfig.faithful, epochs=8, natural=True), l2=0.01)
        assert not plan.tables[2].has_dropped
        strong, _weak, noise = (table.output_width for table in plan.tables)
        assert noise <= 2
        assert strong >= 4
