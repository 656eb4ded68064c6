"""guided: our own search. Candidates from signed saliency, frequency and rules, told apart by short trainings.

    g_{f,j} = dL/dalpha_{f,j} at alpha = 1, on all validation batches of the trained model          (as in SSEDS)
    s_{f,j} = -g_{f,j} / cost_{f,j}^gamma,  gamma in {0, 1/2, 1}                                     (importance)

A removed slot with s > 0 would raise the validation loss; the absolute value cannot tell such slots from harmful ones.
The evidence (docs/results.md) says that no single rule wins: importance alone wins where high-cardinality fields only
overfit, a common width where two id fields hold nearly all parameters and all of it is needed, and rows of rare values
are worth dropping in some data and fatal in others. So the rules propose, and short trainings from scratch decide:

    propose     uniform and mixed widths; the best slots by s for each gamma, with all rows or with the most frequent
                part of the rows of large tables
    halve       train the compact candidates for a few epochs, keep the better half by validation score, train those
                on, until one is left (successive halving, Jamieson & Talwalkar 2016)

The plan that a control would make is always among the candidates, so that a search can only lose to it by the noise of
a short training. Nothing is read from the test split.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from embtrim.budget import Budget
from embtrim.compaction import compact
from embtrim.config import Config
from embtrim.methods.mde import MDEConfig, search_mde
from embtrim.methods.registry import register
from embtrim.methods.selection import field_plan, slot_costs
from embtrim.methods.sseds import SSEDSConfig, slot_gradients
from embtrim.methods.uniform import UniformConfig, search_uniform
from embtrim.plan import SizePlan
from embtrim.sites import Task, alignment_of


class GuidedConfig(Config):
    """Settings of the guided search.

    Attributes:
        cost_powers: gammas: 0 ranks slots by importance, 1 by importance per parameter.
        row_shares: parts of a large table's rows, the most frequent, that candidates keep; 1 keeps all.
        large: part of all parameters from which on a table is large.
        trial_epochs: epochs of each trial before half of the candidates go.
        align: how narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    cost_powers: tuple[float, ...] = (0.0, 0.5, 1.0)
    row_shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    large: float = Field(default=0.05, gt=0, le=1)
    trial_epochs: int = Field(default=2, ge=1)
    align: Literal["scatter", "project"] = "scatter"


@register("guided", GuidedConfig, needs="trained", adds=())
def search_guided(task: Task, config: GuidedConfig, budget: Budget, seed: int) -> SizePlan:
    """Propose plans by several rules and keep the one that short trainings favour."""
    candidates = propose(task, config, budget, seed)
    scores: dict[str, list[float]] = {name: [] for name in candidates}
    trials = {name: Trial(task, plan, seed) for name, plan in candidates.items()}
    for rung in range(math.ceil(math.log2(len(trials)))):
        for name, trial in trials.items():
            scores[name].append(trial.train(config.trial_epochs, seed + rung))
        best = sorted(trials, key=lambda name: -scores[name][-1])
        trials = {name: trials[name] for name in best[: math.ceil(len(best) / 2)]}
    (winner,) = trials
    details = {"config": config.model_dump(mode="json"), "budget": str(budget), "seed": seed, "chosen": winner}
    return dataclasses.replace(candidates[winner], method="guided", details={**details, "scores": scores})


class Trial:
    """A compact model in training."""

    def __init__(self, task: Task, plan: SizePlan, seed: int) -> None:
        self.task = task.recoded(plan)
        self.model = compact(task.fresh(seed), plan, init="scratch", seed=seed)

    def train(self, epochs: int, seed: int) -> float:
        """Train on, and return the validation score."""
        self.task.fit(self.model, epochs=epochs, seed=seed)
        return self.task.valid_score(self.model)


def propose(task: Task, config: GuidedConfig, budget: Budget, seed: int) -> dict[str, SizePlan]:
    """Distinct plans within the budget, by name."""
    full, alignment = task.full_plan(), alignment_of(task, config.align)
    limit = full.max_params(budget)
    gradient_S = slot_gradients(task, task.model, SSEDSConfig(), seed)
    found = {
        "uniform": search_uniform(task, UniformConfig(align=config.align), budget, seed),
        "mixed widths": search_mde(task, MDEConfig(align=config.align), budget, seed),
    }
    for share in config.row_shares:
        kept = most_frequent(task, full, share, config.large)
        costs_S = slot_costs(full, alignment, kept)
        for power in config.cost_powers:
            ranking = np.argsort(gradient_S / costs_S**power, kind="stable")  # -g descending
            name = f"importance / cost^{power:g}" + (f", {share:g} of the rows" if share < 1 else "")
            found[name] = field_plan(full, ranking, limit, alignment, "guided", {}, kept=kept)
    distinct: dict[str, SizePlan] = {}
    for name, plan in found.items():
        if all(plan.diff(other) for other in distinct.values()):
            distinct[name] = plan
    return distinct


def most_frequent(task: Task, full: SizePlan, share: float, large: float) -> Mapping[str, np.ndarray]:
    """The most frequent rows of each large table, ascending, by name; other tables keep all and are not listed."""
    if share >= 1:
        return {}
    counts = task.row_counts()
    kept = {}
    for table in full.tables:
        if table.num_rows * table.width >= large * full.num_full_params:
            most = max(1, round(share * table.num_rows))
            kept[table.name] = np.sort(np.argsort(-counts[table.name], kind="stable")[:most]).astype(np.int32)
    return kept
