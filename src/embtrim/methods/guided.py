"""guided: our own search. One reading of the trained model says what rows, columns and bits are worth; a planner spends.

No candidate is trained. `read` (readings.py) measures in about twenty forward passes over a sample of the validation rows
what the score loses at once without the rows of least energy, without the coordinates of least sensitivity, and with codes
instead of numbers. `allot` (allotting.py) then divides the bytes of a budget over rows, columns and bits of every table, for
the least predicted loss. A reading serves every budget; a plan takes a second.

The compact model starts in one of two ways, and the plan fits the way.

    low_rank    The compact model starts as the best approximation of the trained tables (compaction/low_rank.py). The
                prediction is what that start loses: no training is needed, and a short one can only help. A projection
                per narrow table counts against the budget.
    scratch     The compact model is trained from scratch, as in the papers. Narrow tables need no projections. Training
                again makes up for a part of every loss at once, and most of all for columns; RECOVERY holds what is left.

Low rank is the better start where tables are large, where the budget is mild, or where the full model is not easily
reached again by training; training from scratch is better for small tables within small budgets (docs/results.md). `run`
tries both and keeps the model with the better validation score.

The equations and readings are our own. Energy as the rank of rows follows the frequency-weighted error of SHARK (arXiv
2308.09395); reading a table's worth from its absence follows ShuffleGate (arXiv 2503.09315).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal

from embtrim.compaction.low_rank import has_coordinates
from embtrim.config import Config
from embtrim.methods.allotting import Allotment, Recovery, allot
from embtrim.methods.readings import Readings, read
from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import LEVELS
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment, Bits, Target
from embtrim.tasks.task import Task, alignment_of

# What training from scratch leaves of a loss at once, of rows, columns and bits. Rows: .6 to .76 on Frappe, .6 to 1.4 on
# MovieLens. Columns: .2 to .7 and .3 to .9. Codes are made after training, which recovers nothing.
RECOVERY = Recovery(rows=0.7, widths=0.3, bits=1.0)


# How a compact model starts; see the module docstring.
Start = Literal["low_rank", "scratch"]


class GuidedConfig(Config):
    """Settings of the guided search.

    Attributes:
        start: How the compact model will start: "low_rank" plans for tables that approximate the trained ones, "scratch"
            for tables that are trained again; see the module docstring. None is "scratch", and lets `run` try both.
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
        bits: Bits of every table; "mixed" chooses 16, 8 or 4 for each.
        target: Backend whose bytes are counted.
        keeps_rows: Keep all rows of every table.
    """
    full, levels = task.full_plan(), levels_of(bits)
    if budget.kind == "params":  # numbers of 32 bits, without first-order weights
        budget = Budget("percent", min(1.0, budget.amount / full.num_full_params))
        levels = (32,)
    low_rank = config.start == "low_rank"
    alignment = alignment_of(task, "project" if low_rank else "scatter")
    divide = partial(
        allot,
        full=full,
        budget=budget,
        levels=levels,
        alignment=alignment,
        target=target,
        recovery=Recovery() if low_rank else RECOVERY,
        in_own_basis=low_rank,
        keeps_columns=low_rank and not _may_narrow(task, full, alignment),
        keeps_rows=keeps_rows,
    )
    found = divide(readings)
    if found.plan.keeps_nothing:  # the score misses no table alone, which does not tell that it misses none of them
        found = divide(readings.without_absences())
    if bits != "mixed" and levels != (bits,):
        found = found._replace(plan=found.plan.with_bits(bits))
    return found


def levels_of(bits: Bits) -> Sequence[int]:
    """Bits that a table may have."""
    return LEVELS if bits == "mixed" else (bits,)


def _may_narrow(task: Task, full: SizePlan, alignment: Alignment) -> bool:
    """Whether narrow tables of the model can store coordinates; a model that reads single columns cannot."""
    table = next(t for t in full.tables if t.width)
    if table.width == 1:
        return False
    block = dataclasses.replace(table.blocks[0], columns=(0,), alignment=alignment)
    return has_coordinates(task.model, dataclasses.replace(table, blocks=(block,)))
