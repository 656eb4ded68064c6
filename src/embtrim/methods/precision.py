"""The bits of each table by the loss of storing its values in them; or rows, columns and bits together.

    loss_f(b) = sum_r n_r ||e_r - stored_b(e_r)||^2 over the kept rows and columns of a table

n_r is how often row r occurs in the training data, e_r its embedding in the trained model. The loss is the squared length
that the embedded training data lose, as in the row energies of the guided search.

    loss_f(n, w, b) = 4 sum_{other rows} q_r + (g(w) + rho_b) sum_{n rows of most q} q_r,    q_r = n_r ||e_r - mean||^2
    g(w) = 0.75 (w^-1.25 - D^-1.25)

is the loss of n rows, w columns and b bits of a table, about the mean row, which the DROPPED row can hold. rho_b is the part
of the whole table that codes of b bits lose, as measured. g is the part that a table of w columns lacks once it is trained
again. The spectrum of the trained model does not tell g, because the model has energy in more directions than it needs. All
tables get one width, since a product of embeddings is worth no more than the narrower one.

The numbers are ours, set by validation AUC (docs/results.md). Equal widths fall behind the full model as w^-1.25 on Frappe,
w^-1.31 on MovieLens and w^-0.97 on flights. The factor of g makes a loss of columns equal to a loss of bits that costs the
same AUC; it lies between the factors of Frappe (1.5) and MovieLens (0.36). Dropping a row is penalised four times as much as
the same energy lost to quantisation noise. With equal weights, fp32 tables on Frappe and quantised tables on MovieLens kept
too few rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.budget_limits import LEVELS
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment, Block, BlockShape, TablePlan, TableShape
from embtrim.tables.packing import CHUNK_ROWS, codes_of, fit_codes
from embtrim.tasks.sites import ModuleSite, weights_by_table
from embtrim.tasks.task import Task

# Bits per value that a method other than guided assumes while it searches, if bits are chosen for each table.
MIXED_BITS = 6
# Numbers of rows and columns that are tried: all up to eight, then this many per doubling.
CHOICES_PER_DOUBLING = 4
# w columns lose COLUMN_LOSS / w^COLUMN_POWER of the energy of a table, less the same term for all columns. A dropped row
# loses ROW_LOSS times its energy.
COLUMN_LOSS, COLUMN_POWER, ROW_LOSS = 0.75, 1.25, 4.0


class Choice(NamedTuple):
    """One way to store a table: its bytes, its loss, and its plan, which lists no rows yet."""

    num_bytes: int
    loss: float
    table: TableShape


def mixed_bits(task: Task, plan: SizePlan, budget: Budget) -> SizePlan:
    """The plan with the bits for each table that lose least within the budget; see `spend`.

    Every table starts with the bits that take fewest bytes. These are not always 4 bits: a scale and an offset per column
    cost more than few rows save over 16 bits.

    Args:
        task: Task of the trained full model.
        plan: Plan with rows and columns; a number of columns means the first ones.
        budget: Budget in percent or bytes. If even the fewest bytes exceed it, so does the returned plan.
    """
    weights, counts = trained_rows(task)
    choices = []
    for table in plan.tables:
        of_table = []
        for bits in LEVELS:
            stored = dataclasses.replace(table, bits=bits)
            loss = code_loss(table, weights[table.name], counts[table.name], bits)
            of_table.append(Choice(plan.table_bytes(stored, budget=budget), loss, stored))
        choices.append(of_table)
    chosen = spend(choices, plan.counted_bytes(budget) - BYTES_PER_PARAM * plan.num_shared_projection_params)
    return plan.with_bits({choice.table.name: choice.table.bits for choice in chosen})


def least_loss_plan(task: Task, budget: Budget, alignment: Alignment) -> SizePlan:
    """Rows, columns and bits of every table, chosen together for the least loss; see the module docstring.

    Args:
        task: Task of the trained full model.
        budget: Budget in percent or bytes.
        alignment: How narrow tables reach the full width: "scatter" or "concat".
    """
    full = task.full_plan()
    weights, counts = trained_rows(task)
    energies = {t.name: energy_of_rows(weights[t.name], counts[t.name]) for t in full.tables}
    lost = {
        (t.name, bits): code_loss(t, weights[t.name], counts[t.name], bits) / max(energies[t.name].sum(), 1e-300)
        for t in full.tables
        for bits in LEVELS
    }
    orders = {name: np.argsort(-energy_V, kind="stable") for name, energy_V in energies.items()}
    kept = {name: np.cumsum(energy_V[orders[name]]) for name, energy_V in energies.items()}
    best: list[Choice] = []
    for width in some_numbers(full.width):
        choices = []
        for table in full.tables:
            columns = min(width, table.width)
            missing = COLUMN_LOSS * (columns**-COLUMN_POWER - table.width**-COLUMN_POWER)
            block = BlockShape(0, tuple(range(columns)), alignment)
            parts = [(bits, min(1.0, missing + lost[table.name, bits])) for bits in LEVELS]
            tables = row_choices(table, kept[table.name], block, parts)
            choices.append([Choice(full.table_bytes(stored, budget=budget), loss, stored) for loss, stored in tables])
        chosen = spend(choices, full.counted_bytes(budget))
        if not best or sum(c.loss for c in chosen) < sum(c.loss for c in best):
            best = chosen
    tables = []
    for table in (choice.table for choice in best):
        some = table.num_kept < table.num_rows
        rows = np.sort(orders[table.name][: table.num_kept]).astype(np.int32) if some else None
        blocks = tuple(Block(block.num_rows, block.columns, block.alignment, rows) for block in table.blocks)
        tables.append(TablePlan(table.name, table.num_rows, table.width, blocks, table.bits))
    return dataclasses.replace(full, tables=tuple(tables))


def energy_of_rows(weight_VD: Tensor, count_V: np.ndarray) -> np.ndarray:
    """n_r ||e_r - mean||^2 of each row (V,); the mean is weighted by n_r."""
    # In parts, because a large table in float64 takes twice its memory, and its squares as much again.
    parts = list(zip(torch.from_numpy(count_V).double().split(CHUNK_ROWS), weight_VD.split(CHUNK_ROWS), strict=True))
    total_D = sum(
        (count @ part_VD.double().cpu() for count, part_VD in parts), torch.zeros(weight_VD.shape[1]).double()
    )
    mean_D = total_D / max(1, count_V.sum())
    energies = [count * (part_VD.double().cpu() - mean_D).square().sum(1) for count, part_VD in parts]
    return torch.cat(energies).numpy()


def row_choices(
    table: TableShape, kept_V: np.ndarray, block: BlockShape, parts: Sequence[tuple[int, float]]
) -> list[tuple[float, TableShape]]:
    """The loss of a table for each way to store it, from no row to all rows; plans do not list the rows that they keep.

    Args:
        table: Table of the full plan.
        kept_V: Cumulated energy of the rows, those of most energy first.
        block: Columns of the rows that are kept.
        parts: Pairs of bits and the part of a kept row's energy that they lose.
    """
    total = float(kept_V[-1])
    table = table.shape()
    found = [(ROW_LOSS * total, dataclasses.replace(table, blocks=(), bits=min(LEVELS)))]
    for n in some_numbers(table.num_rows):
        blocks = (dataclasses.replace(block, num_rows=n),)
        for bits, part in parts:
            kept = float(kept_V[n - 1])
            found.append(
                (ROW_LOSS * (total - kept) + part * kept, dataclasses.replace(table, blocks=blocks, bits=bits))
            )
    return found


def some_numbers(most: int) -> list[int]:
    """Numbers from 1 to `most`, ascending: all up to eight, then some per doubling."""
    steps = range(3 * CHOICES_PER_DOUBLING, int(np.log2(most) * CHOICES_PER_DOUBLING) + 1)
    return sorted({*range(1, min(8, most) + 1), *(round(2 ** (k / CHOICES_PER_DOUBLING)) for k in steps), most})


def spend(choices: Sequence[Sequence[Choice]], allowed: float) -> list[Choice]:
    """One choice for each table, such that the losses add up to little within a number of bytes.

    Each table starts with its smallest choice. The step that saves most loss per byte is then taken, again and again, along
    the lower convex hull of each table's choices: no other choices of as many bytes lose less (Everett 1963). If a step does
    not fit, the table gets its best choice that does.

    Args:
        choices: Choices of each table, in any order.
        allowed: Bytes of all tables together. If the smallest choices exceed them, the smallest choices are returned.
    """
    hulls = [lower_hull(of_table) for of_table in choices]
    place, chosen = [0] * len(hulls), [hull[0] for hull in hulls]
    left = allowed - sum(choice.num_bytes for choice in chosen)

    def gain(number: int) -> float:
        return _saved(*hulls[number][place[number] : place[number] + 2])

    while ahead := [number for number, hull in enumerate(hulls) if place[number] + 1 < len(hull)]:
        number = max(ahead, key=gain)
        now, after = chosen[number], hulls[number][place[number] + 1]
        if after.num_bytes - now.num_bytes <= left:
            place[number] += 1
        else:
            place[number] = len(hulls[number])
            fitting = [choice for choice in choices[number] if choice.num_bytes - now.num_bytes <= left]
            after = min([now, *fitting], key=lambda choice: (choice.loss, choice.num_bytes))
        chosen[number] = after
        left -= after.num_bytes - now.num_bytes
    return chosen


def lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of loss over bytes: bytes rise, and losses fall by less and less per byte."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.num_bytes, choice.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _saved(hull[-2], hull[-1]) <= _saved(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _saved(smaller: Choice, larger: Choice) -> float:
    """Loss that a larger choice saves per byte."""
    return (smaller.loss - larger.loss) / (larger.num_bytes - smaller.num_bytes)


def trained_rows(task: Task) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Weights of each table (V, D), and how often its rows occur in the training data (V,); padding rows count 0."""
    sites, counts = task.sites(task.model), task.row_counts()
    for site in sites:
        if isinstance(site, ModuleSite):
            for name, row in zip(site.names, site.reserved_rows, strict=True):
                if row is not None:
                    counts[name][row] = 0  # padding reads zeros or is left out of its bag, at any bits
    return weights_by_table(sites), counts


def code_loss(table: TablePlan, weight_VD: Tensor, count_V: np.ndarray, bits: int) -> float:
    """The loss of storing a table's kept rows and columns in 16, 8 or 4 bits; see the module docstring."""
    total = 0.0
    for block in table.blocks:
        kept = weight_VD if block.rows is None else weight_VD[torch.from_numpy(block.rows).to(weight_VD.device)]
        counts = torch.from_numpy(count_V if block.rows is None else count_V[block.rows]).to(weight_VD.device)
        values = kept[:, list(block.kept_columns)].float()
        scale, offset = (None, None) if bits == 16 else fit_codes(values, bits)
        for part, count in zip(values.split(CHUNK_ROWS), counts.split(CHUNK_ROWS), strict=True):
            if scale is None or offset is None:
                stored = part.half().float()
            else:
                stored = codes_of(part, scale, offset, bits) * scale + offset
            total += float(((stored - part).double().square().sum(1) * count).sum())
    return total
