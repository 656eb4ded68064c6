"""guided: our own search. Simple rules propose rows and columns; short trainings from scratch decide between them.

    g_{f,j} = dL/dalpha_{f,j} at alpha = 1, on all validation batches of the trained model          (as in SSEDS)
    s_{f,j} = -g_{f,j} / cost_{f,j}^gamma                                                            (importance)
    q_r     = n_r ||e_r||^2, with n_r how often the row occurs in the training data                      (energy)

The energy is what the embedded training data lose, in squared length, when a row becomes zero: of all choices of as
many rows the one by energy leaves the least error. It ranks rows of all tables together. A rare value that training
moved far counts, and so does a frequent one that it hardly moved.

The evidence (docs/results.md) says that no rule wins everywhere. Importance wins where high-cardinality ids only
overfit, and there less can be better than all that the budget allows; dropping rows of little energy buys width that
is worth more where two id fields hold nearly all parameters; one width for all rows is hard to beat elsewhere. So the
search

    propose     equal widths of all rows, or larger ones of the rows of most energy; the slots of most importance for
                the same rows; with all rows also importance per parameter, importance within a part of the budget, and
                mixed widths by cardinality
    race        train the compact candidates from scratch for some steps, keep the best third by validation score, train
                these on for twice as long, and so on (successive halving, Jamieson & Talwalkar 2016)
    prove       a leader that is ahead of the plan of the uniform control by less than its own last round brought is not
                ahead for certain: these two train on, until it is, or is no leader any more

Early scores favour few, wide rows, and the lead of such plans melts away where a model needs twenty epochs (MovieLens).
The plan of the uniform control therefore stays in the race to the end, so that the search loses to it only by what the
longest trial cannot tell. The test split is never read. The plan may be smaller than the budget.

Where tables may have fewer bits, by table, rows, columns and bits are chosen together: `search_mixed`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
from pydantic import Field

from embtrim.budget import BYTES_PER_PARAM, Budget
from embtrim.compaction import compact, quantize
from embtrim.config import Config
from embtrim.methods.mde import MDEConfig, search_mde
from embtrim.methods.registry import register
from embtrim.methods.selection import field_plan, filled, full_limit, row_plan, slot_costs
from embtrim.methods.sseds import SSEDSConfig, slot_gradients
from embtrim.methods.uniform import UniformConfig, search_uniform
from embtrim.plan import SizePlan
from embtrim.precision import LEVELS, least_loss_plan, mixed_bits
from embtrim.progress import tracked
from embtrim.sites import Task, alignment_of
from embtrim.train import Hooks

# Of the candidates of a round this part goes on, beside the plan of the uniform control, until this many are left.
KEPT_PART = 1 / 3
FINALISTS = 3
EQUAL = "equal widths"
LEAST_LOSS = "least loss"
# The first round is no longer than this many epochs, however few steps they have.
MOST_EPOCHS = 4


class GuidedConfig(Config):
    """Settings of the guided search.

    Attributes:
        width_factors: by how much larger than equal widths of all rows those of the rows of most energy are.
        cost_powers: gammas: 0 ranks slots by importance, 1 by importance per parameter.
        budget_parts: parts of the budget that are filled by importance.
        trial_epochs: epochs of a candidate's training in the first round, twice that in the next; may be a fraction.
        trial_steps: least number of steps in the first round, for sets with few batches.
        most_rounds: rounds after which the leader wins, however small its lead; with mixed bits the plan of least loss. Each
            round costs twice the one before.
        align: how narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    width_factors: tuple[float, ...] = (4 / 3, 5 / 3, 5 / 2)
    cost_powers: tuple[float, ...] = (0.0, 0.5)
    budget_parts: tuple[float, ...] = (1.0, 0.5, 0.25)
    trial_epochs: float = Field(default=0.5, gt=0)
    trial_steps: int = Field(default=100, ge=1)
    most_rounds: int = Field(default=5, ge=1)
    align: Literal["scatter", "project"] = "scatter"


@register("guided", GuidedConfig, needs="trained", adds=())
def search_guided(task: Task, config: GuidedConfig, budget: Budget, seed: int) -> SizePlan:
    """Propose plans by several rules and keep the one that short trainings favour."""
    candidates = propose(task, config, budget, seed, importance(task, seed))
    scores, _ = race(task, candidates, EQUAL, config, seed)
    leader = max(scores, key=lambda name: (len(scores[name]), scores[name][-1]))
    return noted(candidates[leader], config, budget, seed, leader, scores)


def search_mixed(task: Task, config: GuidedConfig, budget: Budget, seed: int) -> SizePlan:
    """Rows, columns and bits of every table together, within a percentage or a number of bytes.

    The plan of least loss (precision.py), unless one of those that `propose` finds for values of 4 bits, whose tables get more
    bits where bytes are left, proves to be better, quantised: early scores alone favour plans that learn fast.

    Raises:
        BudgetError: not even 4 bits fit.
    """
    candidates = {LEAST_LOSS: least_loss_plan(task, budget, alignment_of(task, config.align))}
    candidates = distinct_of(candidates | stored_proposals(task, config, budget, seed, min(LEVELS)))
    scores, proved = race(task, candidates, LEAST_LOSS, config, seed)
    leader = proved or LEAST_LOSS
    return noted(candidates[leader], config, budget, seed, leader, scores)


def noted(
    plan: SizePlan, config: GuidedConfig, budget: Budget, seed: int, chosen: str, scores: dict[str, list[float]]
) -> SizePlan:
    """The plan with how it was found."""
    details = {"config": config.model_dump(mode="json"), "budget": str(budget), "seed": seed, "chosen": chosen}
    return plan.made_by("guided", {**details, "scores": scores})


def importance(task: Task, seed: int) -> np.ndarray:
    """g of each slot of the trained model, (S,), on the validation split."""
    found = task.kept(
        "slot gradients", task.model, lambda: slot_gradients(task, task.model, SSEDSConfig(), seed).tolist()
    )
    return np.array(found)


def stored_proposals(task: Task, config: GuidedConfig, budget: Budget, seed: int, bits: int) -> dict[str, SizePlan]:
    """What `propose` finds for so many bits a value, with the bits of each table that fit the budget best."""
    gradient_S = importance(task, seed)
    unit = 1 if budget.kind == "bytes" else BYTES_PER_PARAM * task.full_plan().num_full_params
    most = math.inf if budget.kind == "bytes" else 1.0
    amount = budget.amount * 32 / bits
    while True:
        within = Budget(budget.kind, min(amount, most))
        found = {
            name: mixed_bits(task, plan, budget)
            for name, plan in propose(task, config, within, seed, gradient_S).items()
        }
        excess = max(plan.num_bytes() - plan.max_bytes(budget) for plan in found.values())
        if excess <= 1e-6:  # of a byte: the percentage was rounded
            return found
        amount = max(min(amount, most) - excess * 32 / bits / unit, amount / 2)  # scales come beside the values


def race(
    task: Task, candidates: dict[str, SizePlan], control: str, config: GuidedConfig, seed: int
) -> tuple[dict[str, list[float]], str | None]:
    """Scores of the candidates after each round that they were in, and the one that proved to be the best, if one did.

    The control, one of the candidates, stays to the end.
    """
    epoch_steps = max(1, task.num_batches("train"))
    steps = max(config.trial_steps, math.ceil(config.trial_epochs * epoch_steps))
    steps = min(steps, MOST_EPOCHS * epoch_steps)
    scores: dict[str, list[float]] = {name: [] for name in candidates}
    trials = {name: Trial(task, plan, seed) for name, plan in candidates.items()}
    for number in range(config.most_rounds):
        for name, trial in tracked(trials.items(), f"round {number + 1}", len(trials), task.progress):
            scores[name].append(trial.train(steps * 2**number, seed * 1_009 + number))
        best = sorted(trials, key=lambda name: -scores[name][-1])
        if len(best) <= FINALISTS and is_decided(scores[best[0]], scores[control]):
            return scores, best[0]
        others = [name for name in best if name != control]
        trials = {name: trials[name] for name in (control, *others[: math.ceil(len(others) * KEPT_PART)])}
    return scores, None


def is_decided(leader: list[float], control: list[float]) -> bool:
    """Whether the leader, by its scores of all rounds, is ahead of the control by what its last round brought.

    That is so where it was a round ago where the control is now.
    """
    return leader is control or (len(leader) > 1 and leader[-2] >= control[-1])


class Trial:
    """A compact candidate in training."""

    def __init__(self, task: Task, plan: SizePlan, seed: int) -> None:
        self.task = task.recoded(plan)
        self.model = compact(task.fresh(seed), plan, init="scratch", seed=seed)
        self.is_quantized = plan.is_quantized

    def train(self, steps: int, seed: int) -> float:
        """Train on for some steps, and return the validation score, in the plan's bits."""
        epochs = math.ceil(steps / max(1, self.task.num_batches("train")))
        self.task.fit(self.model, epochs, seed, Hooks(on_step=lambda step: step >= steps, settings={"steps": steps}))
        return self.task.kept("validation score", self.model, self._score)

    def _score(self) -> float:
        if not self.is_quantized:
            return self.task.valid_score(self.model)
        stored = copy.deepcopy(self.model)
        quantize(stored)
        return self.task.valid_score(stored)


def propose(task: Task, config: GuidedConfig, budget: Budget, seed: int, gradient_S: np.ndarray) -> dict[str, SizePlan]:
    """Distinct plans within the budget, by name; of fp32.

    Args:
        task: of the trained full model.
        config: which rules.
        budget: not exceeded by any.
        seed: of equal widths: which tables get one more column.
        gradient_S: g of each slot.
    """
    full, alignment = task.full_plan(), alignment_of(task, config.align)
    limit = full_limit(full, budget)
    found = {EQUAL: search_uniform(task, UniformConfig(align=config.align), budget, seed)}

    def by_importance(power: float, limit: int, kept: dict[str, np.ndarray] | None = None) -> SizePlan:
        key_S = gradient_S / slot_costs(full, alignment, kept) ** power  # the smallest first: the largest -g
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
        found[f"importance, rows as of width {width}"] = filled(full, budget, partial(by_importance, 0.0, kept=kept))
    return distinct_of(found)


def distinct_of(found: Mapping[str, SizePlan]) -> dict[str, SizePlan]:
    """The plans that keep something and differ from those before them; the first always."""
    distinct: dict[str, SizePlan] = {}
    for name, plan in found.items():
        if (plan.num_params or not distinct) and all(plan.diff(other) for other in distinct.values()):
            distinct[name] = plan
    return distinct


def row_energies(task: Task) -> dict[str, np.ndarray]:
    """n_r ||e_r||^2 of each row of the trained model, (V,) by table."""
    counts = task.row_counts()
    return {
        name: counts[name] * weight.double().square().sum(1).cpu().numpy()
        for site in task.sites(task.model)
        for name, weight in zip(site.names, site.weights(), strict=True)
    }
