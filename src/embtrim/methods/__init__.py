"""Search methods, one file each: search(task, config, budget, seed) -> SizePlan."""

from __future__ import annotations

import logging

from embtrim.budget import Budget
from embtrim.config import Config
from embtrim.errors import EmbtrimError
from embtrim.methods.frequency import FrequencyConfig
from embtrim.methods.guided import GuidedConfig
from embtrim.methods.hard_mask import HardMaskConfig
from embtrim.methods.magnitude import MagnitudeConfig
from embtrim.methods.mde import MDEConfig
from embtrim.methods.optembed import OptEmbedConfig
from embtrim.methods.pme import PMEConfig
from embtrim.methods.random import RandomConfig
from embtrim.methods.registry import METHODS, Method, method_named, method_of
from embtrim.methods.sseds import SSEDSConfig
from embtrim.methods.uniform import UniformConfig
from embtrim.plan import SizePlan
from embtrim.sites import Task

__all__ = [
    "METHODS",
    "FrequencyConfig",
    "GuidedConfig",
    "HardMaskConfig",
    "MDEConfig",
    "MagnitudeConfig",
    "Method",
    "OptEmbedConfig",
    "PMEConfig",
    "RandomConfig",
    "SSEDSConfig",
    "UniformConfig",
    "method_named",
    "method_of",
    "search",
]


log = logging.getLogger(__name__)


def search(task: Task, config: Config, budget: str | Budget, seed: int = 0) -> SizePlan:
    """Find what to keep of a task's embedding tables within a budget; the model is not changed.

    Args:
        task: a CTRTask, or a Task around any module.
        config: settings of the method to use, such as `SSEDSConfig()`.
        budget: such as "10%", "200MB" or "1.5M params".
        seed: of everything random in the search; the same seed and the same batches give the same plan (a loader that
            shuffles on its own does not give the same batches).

    Raises:
        BudgetError: the budget cannot be parsed or is below the smallest plan of the method.
        ConfigError: `config` belongs to no method.
    """
    budget = Budget.parse(budget)
    full = task.full_plan()
    if full.standalone:
        log.info("embeddings of %s:\n  %s", type(task.model).__name__, "\n  ".join(map(str, task.survey())))
    if not full.num_full_params:
        raise EmbtrimError(f"{type(task.model).__name__} has no embedding tables to shrink, only first-order weights")
    plan = method_of(config).search(task, config, budget, seed)
    assert plan.num_params <= plan.max_params(budget), "a search exceeded its budget"
    return plan
