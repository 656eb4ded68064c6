"""The bits of each table by the loss of storing its values in them, for the rows and columns that a method found.

    loss_f(b) = sum_r n_r ||e_r - stored_b(e_r)||^2 over the kept rows and columns of a table

n_r is how often row r occurs in the training data, e_r its embedding in the trained model. The loss is the squared length
that the embedded training data lose. `guided` chooses rows, columns and bits together instead; see allotting.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from embtrim.compaction.low_rank import trained_rows
from embtrim.methods.allotting import spend
from embtrim.methods.readings import errors_of_each
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.budget_limits import LEVELS
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import TablePlan
from embtrim.tables.packing import RUN_VALUES
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
    bytes_TN = []
    for table in plan.tables:
        stored = [dataclasses.replace(table, bits=bits) for bits in LEVELS]
        bytes_TN.append(np.array([plan.table_bytes(t, budget=budget) for t in stored], np.int64))
    losses_TN = code_losses(plan.tables, weights, counts, LEVELS)
    allowed = plan.counted_bytes(budget) - BYTES_PER_PARAM * plan.num_shared_projection_params
    chosen = spend(bytes_TN, list(losses_TN), allowed)
    return plan.with_bits({table.name: LEVELS[n] for table, n in zip(plan.tables, chosen, strict=True)})


def code_losses(
    tables: Sequence[TablePlan],
    weights: Mapping[str, torch.Tensor],
    counts: Mapping[str, np.ndarray],
    levels: Sequence[int],
) -> np.ndarray:
    """The loss of storing each table's kept rows and columns in 16 bits or codes: float64 (tables, levels).

    See the module docstring. Tables are taken in runs of about RUN_VALUES values, so that memory is bounded.
    """
    loss_TN = np.zeros((len(tables), len(levels)))
    number_P, kept_P, count_P, size = [], [], [], 0
    for number, table in enumerate(tables):
        weight_VD, count_V = weights[table.name], counts[table.name]
        for block in table.blocks:
            rows = block.places(range(table.num_rows))[0]
            kept = weight_VD[rows if isinstance(rows, slice) else torch.from_numpy(rows).to(weight_VD.device)]
            number_P.append(number)
            kept_P.append(kept[:, list(block.kept_columns)])
            count_P.append(count_V[rows])
            size += kept_P[-1].numel()
        if size >= RUN_VALUES or number == len(tables) - 1:
            for n, bits in enumerate(levels):
                errors_P = errors_of_each(kept_P, count_P, bits)
                np.add.at(loss_TN[:, n], number_P, [errors.sum() for errors in errors_P])
            number_P, kept_P, count_P, size = [], [], [], 0
    return loss_TN
