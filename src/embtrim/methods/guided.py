"""guided: our own search. One reading of the trained model says what rows, columns and bits are worth; a planner spends.

No candidate is trained. `read` (readings.py) measures in about twenty forward passes over a sample of the validation rows
what the score loses at once without the rows of least energy, without the coordinates of least sensitivity, and with codes
instead of numbers. `allot` (allotting.py) then divides the bytes of a budget over rows, columns and bits of every table, for
the least predicted loss. A reading serves every budget; a plan takes a second.

The compact model starts in one of two ways.

    low_rank    It starts as an approximation of the trained model (compaction/low_rank.py) and is trained on.
    scratch     It is trained from scratch, as in the papers. Full tables that overfit are then forgotten.

The readings say what a low-rank start loses before it is trained. Training makes up for a part of every loss: RECOVERY
holds what is left.

The equations and readings are our own. Energy as the rank of rows follows the frequency-weighted error of SHARK (arXiv
2308.09395); reading a table's worth from its absence follows ShuffleGate (arXiv 2503.09315).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from embtrim.config import Config
from embtrim.methods.allotting import Allotment, Recovery, allot
from embtrim.methods.readings import Readings, read
from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import LEVELS
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Bits, Target
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.task import Task, alignment_of

# How a compact model starts; see the module docstring.
Start = Literal["low_rank", "scratch"]
# What training leaves of a loss at once, of rows, columns and bits, by the start. Rows: .6 to .76 on Frappe, .6 to 1.4 on
# MovieLens. Columns, trained on from a low-rank start: nothing to .1 on Frappe and flights; from scratch .2 to .9. Codes cost
# a narrow model more than the full one whose readings are used, since few columns carry what many did: 5 to 8 times as
# much on Frappe, about as much on flights, before the model learns to live with them.
RECOVERY: Mapping[Start, Recovery] = {
    "low_rank": Recovery(rows=0.7, widths=0.1, bits=4.0),
    "scratch": Recovery(rows=0.7, widths=0.3, bits=4.0),
}


class GuidedConfig(Config):
    """Settings of the guided search.

    Attributes:
        start: How the compact model will start: "low_rank" or "scratch"; see the module docstring. None is "scratch", and
            lets `run` try both.
    """

    start: Start | None = None


def search_guided(
    task: Task, config: GuidedConfig, budget: Budget, seed: int, bits: Bits = 32, target: Target | None = None
) -> SizePlan:
    """Read the model and divide the budget."""
    readings = task.readings or read(task)
    found = plan_within(task, readings, config, budget, bits, target)
    details = {
        "config": config.model_dump(mode="json"),
        "predicted_loss": found.loss,
        "predicted_losses": found.by_lever(),
        "readings": readings.summary(),
    }
    return found.plan.made_by("guided", budget, seed, details)


def plan_within(
    task: Task,
    readings: Readings,
    config: GuidedConfig,
    budget: Budget,
    bits: Bits = 32,
    target: Target | None = None,
    *,
    keeps_rows: bool = False,
) -> Allotment:
    """The plan for one budget from readings that were made before, with the loss of the score that they predict.

    Args:
        task: Task of the trained full model.
        readings: Readings of this model.
        config: Settings of the search.
        budget: Budget in percent, parameters or bytes.
        bits: Bits of every table; "mixed" chooses them for each table and band.
        target: Backend whose bytes are counted.
        keeps_rows: Keep all rows of every table.
    """
    full, levels = task.full_plan(), levels_of(bits)
    if budget.kind == "params":  # numbers of 32 bits, without first-order weights
        budget = Budget("percent", min(1.0, budget.amount / full.num_full_params))
        levels = (32,)
    start: Start = config.start or "scratch"
    projects = start == "low_rank" and not isinstance(task, CTRTask)
    alignment = alignment_of(task, "project" if projects else "scatter")
    divide = partial(
        allot,
        full=full,
        budget=budget,
        levels=levels,
        alignment=alignment,
        target=target,
        recovery=RECOVERY[start],
        coordinates=start == "low_rank",
        keeps_rows=keeps_rows,
    )
    found = divide(readings)
    if found.plan.keeps_nothing:  # the score misses no table alone, which does not tell that it misses none of them
        found = divide(readings.without_absences(), first_order_alone=False)
    if bits != "mixed" and levels != (bits,):
        found = found._replace(plan=found.plan.with_bits(bits))
    return found


def levels_of(bits: Bits) -> Sequence[int]:
    """Bits that a table may have."""
    return LEVELS if bits == "mixed" else (bits,)
