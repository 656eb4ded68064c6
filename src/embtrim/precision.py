"""Which tables of a plan are stored in 8 bits and which in 4, by what their codes lose.

    loss_f(b) = sum_r n_r ||e_r - codes_b(e_r)||^2 over the kept rows and columns of a table

n_r is how often row r occurs in the training data, e_r its embedding in the trained model: the squared length that the
embedded training data lose, as in the row energies of the guided search.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from embtrim.budget import Budget
from embtrim.packing import codes_of, fit_codes
from embtrim.plan import SizePlan, TablePlan
from embtrim.sites import Task

# Precisions that a search can be told: bits of every table, or 8 or 4 by table.
Bits = Literal[32, 16, 8, 4, "mixed"]
# What a value takes on average where tables have 8 or 4 bits.
MIXED_BITS = 6
WIDE, NARROW = 8, 4


def mixed_bits(task: Task, plan: SizePlan, budget: Budget) -> SizePlan:
    """The plan with 4 bits in every table, and 8 in those where that saves most loss a byte, as far as the budget goes.

    Args:
        task: of the trained full model.
        plan: rows and columns; a number of columns means the first ones.
        budget: a percentage or bytes; if 4 bits everywhere exceed it, so does the plan that comes back.
    """
    weights = {name: w for site in task.sites(task.model) for name, w in zip(site.names, site.weights(), strict=True)}
    counts = task.row_counts()
    plan = plan.with_bits(NARROW)
    gains = {}
    for table in plan.tables:
        narrow, wide = (code_loss(table, weights[table.name], counts[table.name], b) for b in (NARROW, WIDE))
        more_bytes = plan.with_bits({table.name: WIDE}).num_bytes() - plan.num_bytes()
        gains[table.name] = (narrow - wide) / max(1, more_bytes)
    for name in sorted(gains, key=lambda name: -gains[name]):
        wider = plan.with_bits({name: WIDE})
        if wider.num_bytes() <= wider.max_bytes(budget):
            plan = wider
    return plan


def code_loss(table: TablePlan, weight_VD: Tensor, count_V: np.ndarray, bits: int) -> float:
    """What the codes of a table's kept rows and columns lose; see the module docstring."""
    total = 0.0
    for block in table.blocks:
        kept = weight_VD if block.rows is None else weight_VD[torch.from_numpy(block.rows).to(weight_VD.device)]
        counts = torch.from_numpy(count_V if block.rows is None else count_V[block.rows]).to(weight_VD.device)
        values = kept[:, list(block.kept_columns)].float()
        scale, offset = fit_codes(values, bits)
        error = (codes_of(values, scale, offset, bits) * scale + offset - values).double()
        total += float((error.square().sum(1) * counts).sum())
    return total
