"""The guided search: what it proposes, and how short trainings decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embtrim.methods import (
    GuidedConfig,
    UniformConfig,
    search,
)
from embtrim.methods.guided import Trial, propose, row_energies
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.tasks.task import CTRTask
from embtrim.testing.toys import (
    foreign_task,
    zoo_task,
)
from embtrim.training.settings import Hooks


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
