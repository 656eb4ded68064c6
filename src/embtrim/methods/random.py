"""random: random slots at the same budget; what a ranking must beat to be a ranking."""

from __future__ import annotations

from typing import Literal

import numpy as np

from embtrim.budget import Budget
from embtrim.config import Config
from embtrim.methods.registry import register
from embtrim.methods.selection import columns_by_table, fill_budget, slot_costs, slot_tables
from embtrim.plan import SizePlan
from embtrim.sites import Task, alignment_of


class RandomConfig(Config):
    """Settings of the random control.

    Attributes:
        align: how narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    align: Literal["scatter", "project"] = "scatter"


@register("random", RandomConfig, needs="nothing")
def search_random(task: Task, config: RandomConfig, budget: Budget, seed: int) -> SizePlan:
    """Fill the budget with slots in random order."""
    full = task.full_plan()
    alignment = alignment_of(task, config.align)
    costs_S = slot_costs(full, alignment)
    ranking = np.random.default_rng(seed).permutation(len(costs_S))
    accepted_S = fill_budget(ranking, costs_S, full.max_params(budget), slot_tables(full))
    details = {"config": config.model_dump(), "budget": str(budget), "seed": seed}
    return full.with_columns(columns_by_table(full, accepted_S), "random", details, alignment)
