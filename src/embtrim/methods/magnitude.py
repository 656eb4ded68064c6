"""magnitude: columns, or rows, by their norm in the trained tables; a control that every gradient score must beat.

s_{f,j} = ||E_f[:, j]||_2        or        s_v = ||E_v||_2
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from embtrim.config import Config
from embtrim.methods.selection import field_plan, filled, row_plan, slot_costs
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.tasks.task import Task, alignment_of


class MagnitudeConfig(Config):
    """Settings of the magnitude control.

    Attributes:
        unit: What is ranked by its norm: "columns" (slots, over all rows of their table) or "rows" (at full width).
        cost_aware: Rank by norm per parameter.
        align: How narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    unit: Literal["columns", "rows"] = "columns"
    cost_aware: bool = False
    align: Literal["scatter", "project"] = "scatter"


def search_magnitude(task: Task, config: MagnitudeConfig, budget: Budget, seed: int) -> SizePlan:
    """Keep the slots, or the rows, with the largest norms."""
    full = task.full_plan()
    alignment = alignment_of(task, config.align)
    details = {"config": config.model_dump()}
    if config.unit == "rows":
        scores = task.row_norms()
        if config.cost_aware:
            scores = {t.name: scores[t.name].times(1 / t.width) for t in full.tables}
        columns = {t.name: range(t.width) for t in full.tables}
        plan = filled(full, budget, lambda limit: row_plan(full, scores, columns, limit, alignment))
        return plan.made_by("magnitude", budget, seed, details)
    norms = task.column_norms()
    score_S = np.concatenate([norms[t.name] for t in full.tables])
    key_S = score_S / slot_costs(full, alignment) if config.cost_aware else score_S
    plan = field_plan(full, np.argsort(-key_S, kind="stable"), full.max_params(budget), alignment)
    return plan.made_by("magnitude", budget, seed, details)
