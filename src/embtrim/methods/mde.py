"""mde: mixed-dimension embeddings by a rule, no training (Ginart et al., ISIT 2021, arXiv 1909.11810).

    d_f proportional to p_f^alpha,  p_f = 1 / n_f   (or the mean occurrences of a row of the field)

solved for the budget; narrow fields are projected to D. Certain: the rule and the projections. Departure: the scale is
solved to the column, where the authors round to powers of two.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from embtrim.config import Config
from embtrim.methods.selection import field_plan
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.tasks.task import Task, alignment_of


class MDEConfig(Config):
    """Settings of the mixed-dimension rule (MDE).

    Attributes:
        alpha: Temperature of the rule; 0 gives all fields one width.
        popularity: Popularity of a field: "rows" takes 1 / n_f, "occurrences" how often the mean row of the field occurs in
            the training data.
        align: How narrow fields reach the full width in models that need it: "project" or "scatter".
    """

    alpha: float = Field(default=0.3, ge=0)
    popularity: Literal["rows", "occurrences"] = "rows"
    align: Literal["project", "scatter"] = "project"


def search_mde(task: Task, config: MDEConfig, budget: Budget, seed: int) -> SizePlan:
    """Give each table a width by its popularity."""
    full = task.full_plan()
    if config.popularity == "rows":
        popularity = [1 / t.num_rows for t in full.tables]
    else:
        counts = task.count_scores()
        popularity = [max(1.0, counts[t.name].sum) / t.num_rows for t in full.tables]
    # The rule wants column j of field f once the scale reaches j / p_f^alpha. Slots are taken in this order.
    scale_S = np.concatenate(
        [np.arange(1, t.width + 1) / p**config.alpha for t, p in zip(full.tables, popularity, strict=True)]
    )
    details = {"config": config.model_dump()}
    ranking = np.argsort(scale_S, kind="stable")
    return field_plan(full, ranking, full.max_params(budget), alignment_of(task, config.align)).made_by(
        "mde", budget, seed, details
    )
