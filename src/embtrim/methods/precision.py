"""The bits of each table by the loss of storing its values in them, for the rows and columns that a method found.

    loss_f(b) = sum_r n_r ||e_r - stored_b(e_r)||^2 over the kept rows and columns of a table

n_r is how often row r occurs in the training data, e_r its embedding in the trained model. The loss is the squared length
that the embedded training data lose. `guided` chooses rows, columns and bits together instead; see allotting.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from embtrim.compaction.low_rank import trained_rows
from embtrim.methods.allotting import spend
from embtrim.methods.readings import code_errors
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.budget_limits import LEVELS
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import TablePlan
from embtrim.tasks.task import Task

# Bits per value that a method other than guided assumes while it searches, if bits are chosen for each table.
MIXED_BITS = 6


def mixed_bits(task: Task, plan: SizePlan, budget: Budget) -> SizePlan:
    """The plan with the bits for each table that lose least within the budget; see `spend`.

    Every table starts with the bits that take fewest bytes. These are not always 2 bits: a scale and an offset per column
    cost more than few rows save over 16 bits.

    Args:
        task: Task of the trained full model.
        plan: Plan with rows and columns; a number of columns means the first ones.
        budget: Budget in percent or bytes. If even the fewest bytes exceed it, so does the returned plan.
    """
    weights, counts = trained_rows(task)
    bytes_TN, losses_TN = [], []
    for table in plan.tables:
        stored = [dataclasses.replace(table, bits=bits) for bits in LEVELS]
        bytes_TN.append(np.array([plan.table_bytes(t, budget=budget) for t in stored], np.int64))
        losses_TN.append(np.array([code_loss(table, weights[table.name], counts[table.name], bits) for bits in LEVELS]))
    allowed = plan.counted_bytes(budget) - BYTES_PER_PARAM * plan.num_shared_projection_params
    chosen = spend(bytes_TN, losses_TN, allowed)
    return plan.with_bits({table.name: LEVELS[n] for table, n in zip(plan.tables, chosen, strict=True)})


def code_loss(table: TablePlan, weight_VD: torch.Tensor, count_V: np.ndarray, bits: int) -> float:
    """The loss of storing a table's kept rows and columns in 16 bits or codes; see the module docstring."""
    total = 0.0
    for block in table.blocks:
        rows = slice(None) if block.rows is None else block.rows
        kept = weight_VD if block.rows is None else weight_VD[torch.from_numpy(block.rows).to(weight_VD.device)]
        total += float(code_errors(kept[:, list(block.kept_columns)], count_V[rows], bits).sum())
    return total
