"""random: random slots at the same budget; a control that every ranking must beat."""

from __future__ import annotations

from typing import Literal

import numpy as np

from embtrim.config import Config
from embtrim.methods.selection import field_plan
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.tasks.task import Task, alignment_of


class RandomConfig(Config):
    """Settings of the random control.

    Attributes:
        align: How narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    align: Literal["scatter", "project"] = "scatter"


def search_random(task: Task, config: RandomConfig, budget: Budget, seed: int) -> SizePlan:
    """Fill the budget with slots in random order."""
    full = task.full_plan()
    ranking = np.random.default_rng(seed).permutation(sum(t.width for t in full.tables))
    details = {"config": config.model_dump()}
    return field_plan(full, ranking, full.max_params(budget), alignment_of(task, config.align)).made_by(
        "random", budget, seed, details
    )
