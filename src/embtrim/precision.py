"""The bits of each table of a plan, by what storing its values in so many loses.

    loss_f(b) = sum_r n_r ||e_r - stored_b(e_r)||^2 over the kept rows and columns of a table

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
from embtrim.sites import ModuleSite, Task

# Precisions that a search can be told: bits of every table, or by table.
Bits = Literal[32, 16, 8, 4, "mixed"]
# Bits that a search with bits by table counts for a value: between the 4 and the 8 that large tables get.
MIXED_BITS = 6
# What a table may have then; 32 would gain nothing that can be measured over 16.
LEVELS = (4, 8, 16)


def mixed_bits(task: Task, plan: SizePlan, budget: Budget) -> SizePlan:
    """The plan with the bits of each table that lose least within the budget, by greedy steps.

    Every table starts where it takes fewest bytes. That is not always 4 bits: a scale and an offset a column cost more
    than a few rows in 16 save. Then the step to more bits that saves most loss a byte is taken, again and again, of
    those that fit.

    Args:
        task: of the trained full model.
        plan: rows and columns; a number of columns means the first ones.
        budget: a percentage or bytes; if the fewest bytes exceed it, so does the plan that comes back.
    """
    sites = task.sites(task.model)
    weights = {name: w for site in sites for name, w in zip(site.names, site.weights(), strict=True)}
    counts = task.row_counts()
    for site in sites:
        if isinstance(site, ModuleSite):
            for name, row in zip(site.names, site.reserved_rows, strict=True):
                if row is not None:
                    counts[name][row] = 0  # padding reads zeros, or is left out of its bag, at any bits
    # Of each table (bits, bytes of the plan, loss): the first two ascending and the last descending.
    steps: dict[str, list[tuple[int, int, float]]] = {}
    for table in plan.tables:
        kept: list[tuple[int, int, float]] = []
        for bits in reversed(LEVELS):
            size = plan.with_bits({table.name: bits}).num_bytes()
            if not kept or size < kept[0][1]:
                kept.insert(0, (bits, size, code_loss(table, weights[table.name], counts[table.name], bits)))
        steps[table.name] = kept
    plan = plan.with_bits({name: kept[0][0] for name, kept in steps.items()})

    def gain(name: str) -> float:
        (_, size, loss), (_, next_size, next_loss), *_ = steps[name]
        return (loss - next_loss) / (next_size - size)

    while ahead := [name for name, kept in steps.items() if len(kept) > 1]:
        name = max(ahead, key=gain)
        wider = plan.with_bits({name: steps[name][1][0]})
        if wider.num_bytes() <= wider.max_bytes(budget):
            plan = wider
            del steps[name][0]
        else:
            del steps[name][1:]
    return plan


def code_loss(table: TablePlan, weight_VD: Tensor, count_V: np.ndarray, bits: int) -> float:
    """What storing a table's kept rows and columns in 16, 8 or 4 bits loses; see the module docstring."""
    total = 0.0
    for block in table.blocks:
        kept = weight_VD if block.rows is None else weight_VD[torch.from_numpy(block.rows).to(weight_VD.device)]
        counts = torch.from_numpy(count_V if block.rows is None else count_V[block.rows]).to(weight_VD.device)
        values = kept[:, list(block.kept_columns)].float()
        if bits == 16:
            stored = values.half().float()
        else:
            scale, offset = fit_codes(values, bits)
            stored = codes_of(values, scale, offset, bits) * scale + offset
        total += float(((stored - values).double().square().sum(1) * counts).sum())
    return total
