"""frequency: the most frequent values at full width, the rest dropped; a control that every choice of rows must beat."""

from __future__ import annotations

from embtrim.config import Config
from embtrim.methods.selection import filled, row_plan
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.tasks.task import Task, alignment_of


class FrequencyConfig(Config):
    """Settings of the frequency control; there are none."""


def search_frequency(task: Task, config: FrequencyConfig, budget: Budget, seed: int) -> SizePlan:
    """Keep the rows of all fields that occur most often in the training data."""
    full = task.full_plan()
    columns = {t.name: range(t.width) for t in full.tables}
    details = {"config": config.model_dump()}
    counts, alignment = task.count_scores(), alignment_of(task, "scatter")
    plan = filled(full, budget, lambda limit: row_plan(full, counts, columns, limit, alignment))
    return plan.made_by("frequency", budget, seed, details)
