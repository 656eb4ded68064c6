"""guided: our own search. Simple rules propose rows and columns; short trainings from scratch decide between them.

    g_{f,j} = dL/dalpha_{f,j} at alpha = 1, on all validation batches of the trained model          (as in SSEDS)
    s_{f,j} = -g_{f,j} / cost_{f,j}^gamma                                                            (importance)
    q_r     = n_r ||e_r||^2, with n_r how often the row occurs in the training data                      (energy)

The energy of a row is the squared length that the embedded training data lose when the row becomes zero. Among all
choices of as many rows, the choice by energy leaves the least error. It ranks rows of all tables together: a rare value
that training moved far counts, and so does a frequent value that training hardly moved.

The evidence (docs/results.md) says that no rule wins everywhere. Importance wins where high-cardinality ids only
overfit; there a plan smaller than the budget can be better. Dropping rows of little energy buys width that is worth more
where two id fields hold nearly all parameters. Elsewhere one width for all rows is hard to beat. So the search

    propose     equal widths of all rows, or larger widths of the rows of most energy; the slots of most importance for
                the same rows; for all rows also importance per parameter, importance within a part of the budget, and
                mixed widths by cardinality
    race        train the compact candidates from scratch for some steps, keep the best third by validation score, train
                the survivors for twice as long, and so on (successive halving, Jamieson & Talwalkar 2016). Every round
                ends with some steps at a lower learning rate. Without them, scores are mostly the noise of the last
                steps, and plans that end up .002 apart in AUC pass each other (docs/results.md)
    prove       a leader whose lead over the plan of the uniform control has more than halved in a round is not certainly
                ahead: the race goes on

Early scores favour few, wide rows, and the lead of such plans melts away where a model needs twenty epochs (MovieLens).
The plan of the uniform control therefore stays in the race to the end: the search loses to it only by what the longest
trial cannot tell. The test split is never read. The plan may be smaller than the budget.

If bits may differ by table there is no race: `least_loss_plan` (precision.py) chooses rows, columns and bits in a second.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from embtrim.compaction.compacting import compact
from embtrim.config import Config
from embtrim.errors import BudgetError
from embtrim.methods.mde import MDEConfig, search_mde
from embtrim.methods.precision import least_loss_plan
from embtrim.methods.selection import field_plan, filled, row_plan, slot_costs
from embtrim.methods.sseds import SSEDSConfig, slot_gradients
from embtrim.methods.uniform import UniformConfig, search_uniform
from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import full_limit
from embtrim.plan.plan import SizePlan
from embtrim.system.progress import tracked
from embtrim.tables.packing import CHUNK_ROWS
from embtrim.tasks.sites import weights_by_table
from embtrim.tasks.task import Task, alignment_of
from embtrim.training.settings import Hooks

# Part of a round's candidates that goes on, beside the plan of the uniform control, until FINALISTS are left.
KEPT_PART = 1 / 3
FINALISTS = 3
EQUAL = "equal widths"
# Most epochs of the first round, however few steps an epoch has.
MOST_EPOCHS = 4
# A round ends with this part of its steps, and an epoch at most, at a lower learning rate. The real training ends by early
# stopping where longer training would overfit.
ANNEALED_PART = 1 / 4
ANNEALED_RATE = 0.1


class GuidedConfig(Config):
    """Settings of the guided search.

    Attributes:
        width_factors: Widths of the rows of most energy, as multiples of the equal width of all rows.
        cost_powers: Values of gamma: 0 ranks slots by importance, 1 by importance per parameter.
        budget_parts: Parts of the budget that are filled by importance.
        trial_epochs: Epochs of a candidate's training in the first round, such as 0.5; each round doubles them.
        trial_steps: Least number of steps in the first round, for data with few batches.
        most_rounds: Rounds after which the leader wins, however much its lead has shrunk; each costs twice the one before.
        align: How narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    width_factors: tuple[float, ...] = (4 / 3, 5 / 3, 5 / 2)
    cost_powers: tuple[float, ...] = (0.0, 0.5)
    budget_parts: tuple[float, ...] = (1.0, 0.5, 0.25)
    trial_epochs: float = Field(default=0.5, gt=0)
    trial_steps: int = Field(default=100, ge=1)
    most_rounds: int = Field(default=5, ge=1)
    align: Literal["scatter", "project"] = "scatter"


def search_mixed(task: Task, config: GuidedConfig, budget: Budget, seed: int) -> SizePlan:
    """Choose rows, columns and bits of every table together."""
    details = {"config": config.model_dump(mode="json")}
    return least_loss_plan(task, budget, alignment_of(task, config.align)).made_by("guided", budget, seed, details)


def search_guided(task: Task, config: GuidedConfig, budget: Budget, seed: int) -> SizePlan:
    """Propose plans by several rules and choose the one that scores best in short trainings."""
    candidates = propose(task, config, budget, seed)
    epoch_steps = max(1, task.num_batches("train"))
    steps = max(config.trial_steps, math.ceil(config.trial_epochs * epoch_steps))
    steps = min(steps, MOST_EPOCHS * epoch_steps)
    scores: dict[str, list[float]] = {name: [] for name in candidates}
    trials = {name: Trial(task, plan, seed) for name, plan in candidates.items()}
    for number in range(config.most_rounds):
        for name, trial in tracked(trials.items(), f"round {number + 1}", len(trials), task.progress):
            scores[name].append(trial.train(steps * 2**number, seed * 1_009 + 2 * number))
        best = sorted(trials, key=lambda name: -scores[name][-1])
        if len(best) <= FINALISTS and is_decided(scores[best[0]], scores[EQUAL]):
            break
        others = [name for name in best if name != EQUAL]
        trials = {name: trials[name] for name in (EQUAL, *others[: math.ceil(len(others) * KEPT_PART)])}
    winner = best[0]
    details = {"config": config.model_dump(mode="json"), "chosen": winner}
    return candidates[winner].made_by("guided", budget, seed, {**details, "scores": scores})


def is_decided(leader: list[float], equal: list[float]) -> bool:
    """Whether the leader is equal widths itself, or its last round left it half of its lead over them or more."""
    if leader is equal:
        return True
    return len(leader) > 1 and leader[-1] - equal[-1] >= (leader[-2] - equal[-2]) / 2


class Trial:
    """A compact candidate in training."""

    def __init__(self, task: Task, plan: SizePlan, seed: int) -> None:
        self.task = task.recoded(plan)
        self.epoch_steps = max(1, task.num_batches("train"))
        self.model = compact(task.fresh(seed), plan, init="scratch", seed=seed)

    def train(self, steps: int, seed: int) -> float:
        """Train for some more steps, then for fewer at a lower learning rate, and return the validation score."""
        self._fit(steps, seed)
        annealed = min(math.ceil(steps * ANNEALED_PART), self.epoch_steps)
        self._fit(annealed, seed + 1, lr_factor=ANNEALED_RATE)
        return self.task.kept("validation score", self.model, lambda: self.task.valid_score(self.model))

    def _fit(self, steps: int, seed: int, lr_factor: float = 1.0) -> None:
        hooks = Hooks(on_step=lambda step: step >= steps, settings={"steps": steps})
        self.task.fit(self.model, math.ceil(steps / self.epoch_steps), seed, hooks, lr_factor=lr_factor)


def propose(task: Task, config: GuidedConfig, budget: Budget, seed: int) -> dict[str, SizePlan]:
    """Distinct plans within the budget, by name."""
    full, alignment = task.full_plan(), alignment_of(task, config.align)
    limit = full_limit(full, budget)
    gradient_S = np.array(
        task.kept("slot gradients", task.model, lambda: slot_gradients(task, task.model, SSEDSConfig(), seed).tolist())
    )
    found = {EQUAL: search_uniform(task, UniformConfig(align=config.align), budget, seed)}

    def by_importance(power: float, limit: int, kept: dict[str, np.ndarray] | None = None) -> SizePlan:
        key_S = gradient_S / slot_costs(full, alignment, kept) ** power  # ascending: the largest -g comes first
        return field_plan(full, np.argsort(key_S, kind="stable"), limit, alignment, kept=kept)

    if limit:
        found["mixed widths"] = search_mde(task, MDEConfig(align=config.align), budget, seed)
        for power in config.cost_powers:
            found[f"importance / cost^{power:g}"] = by_importance(power, limit)
        for part in config.budget_parts:
            found[f"importance, {part:g} of the budget"] = by_importance(0.0, int(part * limit))
    energies = row_energies(task)
    floor = max(1, min(t.output_width for t in found[EQUAL].tables))
    for factor in config.width_factors:
        width = max(floor + 1, math.ceil(factor * floor - 1e-9))
        columns = {t.name: range(min(width, t.width)) for t in full.tables}
        fewer = filled(full, budget, partial(row_plan, full, energies, columns, alignment=alignment))
        kept = {t.name: t.blocks[0].rows for t in fewer.tables if t.blocks and t.blocks[0].rows is not None}
        found[f"width {width}, rows of most energy"] = fewer
        with suppress(BudgetError):  # a table without rows still counts its first-order weights here
            found[f"importance, rows as of width {width}"] = filled(
                full, budget, partial(by_importance, 0.0, kept=kept)
            )
    distinct: dict[str, SizePlan] = {}
    for name, plan in found.items():
        if (plan.num_params or name == EQUAL) and all(plan.diff(other) for other in distinct.values()):
            distinct[name] = plan
    return distinct


def row_energies(task: Task) -> dict[str, np.ndarray]:
    """n_r ||e_r||^2 of each row of the trained model, (V,) by table."""
    counts = task.row_counts()
    return {
        name: counts[name]
        * torch.cat([part.double().square().sum(1).cpu() for part in weight_VD.split(CHUNK_ROWS)]).numpy()
        for name, weight_VD in weights_by_table(task.sites(task.model)).items()
    }
