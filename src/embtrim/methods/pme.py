"""PME: pruning-based multi-size embedding (Liu et al., Frontiers in Big Data 2023, doi 10.3389/fdata.2023.1195742).

    s_{v,j} = | E_{v,j} * sum_b dL_b / dE_{v,j} |   at initialisation, no update                       (saliency, SNIP)
    d_v     = number of v's entries among the top K of all entries                                     (capacity)
    d_v     bucketed down to {0, 1, 2, 4, 8, .., D};  K as large as the budget allows
    e_v     = T_s[row] W_s,  W_s in R^{s x D} shared by all rows of size s, identity at s = D          (lookup)

Certain: a size per feature value; the entries with the least impact are pruned in a search before training; only the
number of a value's entries is transferred, to a fresh dense vector; the table is read by groups of one size.
Reconstructed: the SNIP form of the saliency, the buckets, W_s and its variance 1 / s, one initial spread for all
fields (a spread per field would bias the comparison between fields); batch norm on the batch's statistics.
Departure: the vector that a field's values of size 0 share is as wide as its widest values. Ids are re-numbered by size,
so that no row carries an index.

Accumulated saliency grows with how often a value occurs. The controls that show what it adds: `score = "frequency"`
gives the i-th largest value's saliency to the i-th most frequent value, "random" to a random one - the same histogram of
sizes - and "magnitude" ranks |E| at initialisation. `warmup_epochs` reads the saliency after short training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from embtrim.config import Config
from embtrim.errors import EmbtrimError
from embtrim.methods.selection import largest
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Block, BlockShape, TablePlan, TableShape, map_params
from embtrim.tasks.sites import Site, gate_sites
from embtrim.tasks.task import Task
from embtrim.training.evaluation import check_finite, loss_weight

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class PMEConfig(Config):
    """Settings of PME; the defaults are our reading of the paper.

    Attributes:
        score: What ranks entries: "saliency"; or a control: "magnitude", or "frequency" and "random", which give the sizes
            of "saliency" to other values.
        search_fraction: Share of the training batches, evenly spread, that the gradient is summed over.
        init_std: Standard deviation of the embeddings of all fields at which the saliency is read.
        warmup_epochs: Epochs of training before the saliency is read; the paper has 0.
    """

    score: Literal["saliency", "frequency", "random", "magnitude"] = "saliency"
    search_fraction: float = Field(default=1.0, gt=0, le=1)
    init_std: float = Field(default=0.01, gt=0)
    warmup_epochs: int = Field(default=0, ge=0)


def search_pme(task: Task, config: PMEConfig, budget: Budget, seed: int) -> SizePlan:
    """Give every feature value a size."""
    full = task.full_plan()
    model = task.fresh(seed)
    sites = task.sites(model)
    draw_weights(sites, config.init_std, seed)
    if config.warmup_epochs:
        task.fit(model, epochs=config.warmup_epochs, seed=seed)
    if config.score == "magnitude":
        scores = [weight_VD.abs() for site in sites for weight_VD in site.weights()]
    else:
        scores = entry_saliency(task, model, sites, config.search_fraction, seed)
    # Only the order of a value's entries matters: column j of `ranked` is the (j + 1)-th largest score of each value.
    ranked = [np.sort(score_VD.cpu().numpy(), axis=1)[:, ::-1] for score_VD in scores]
    if config.score == "frequency":
        counts = task.row_counts()
        ranked = reassign(ranked, np.concatenate([counts[t.name] for t in full.tables]))
    elif config.score == "random":
        ranked = reassign(ranked, np.random.default_rng(seed).random(sum(map(len, ranked))))
    details = {"config": config.model_dump()}
    if budget.kind == "bytes" and full.first_order:  # rows of size 0 free their first-order weights
        limit, row_cost = int(budget.amount // BYTES_PER_PARAM), 1
    else:
        limit, row_cost = full.max_params(budget), 0
    sizes = fill_sizes(full, ranked, limit, row_cost)
    found, rows = np.unique(np.concatenate(sizes), return_counts=True)
    details["rows_by_size"] = dict(zip(map(str, found.tolist()), rows.tolist(), strict=True))
    plan = sized_plan(full, sizes)
    plan.max_params(budget)  # raises if the first-order weights alone exceed the budget
    return plan.made_by("pme", budget, seed, details)


# ---- saliency ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_weights(sites: list[Site], std: float, seed: int) -> None:
    """Draw all embeddings with one standard deviation; rows that start at zero (OOV, padding) stay zero."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        for weight_VD in site.weights():
            noise_VD = torch.empty(weight_VD.shape).normal_(0, std, generator=generator).to(weight_VD)
            weight_VD.copy_(noise_VD * weight_VD.any(1, keepdim=True))


def entry_saliency(task: Task, model: nn.Module, sites: list[Site], fraction: float, seed: int) -> list[Tensor]:
    """|E * sum_b dL_b/dE| of each table (V, D), over `fraction` of the training batches, with no update.

    The mean loss of a batch counts by the rows of the batch, so that a small last batch does not count too much.
    """
    grads = [torch.zeros_like(torch.cat(site.weights())) for site in sites]
    model.eval()  # no dropout
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.train()  # running statistics are not fitted yet
    leaves: list[tuple[int, Tensor, Tensor]] = []

    def reader(number: int) -> Callable[[Tensor, Tensor], Tensor]:
        def read(rows_U: Tensor, found_UD: Tensor) -> Tensor:
            leaves.append((number, rows_U, found_UD.detach().requires_grad_()))
            return leaves[-1][2]

        return read

    weights: list[float] = []
    for number, batch in enumerate(task.tracked_batches("train", "scoring entries", seed)):
        if math.ceil((number + 1) * fraction) == math.ceil(number * fraction):
            continue
        leaves.clear()
        with gate_sites(sites, rows=[reader(n) for n in range(len(sites))]):
            loss = task.loss(model, batch)
        check_finite(loss, "loss", "train", number)
        found = torch.autograd.grad(loss, [leaf for *_, leaf in leaves], allow_unused=True)
        for (site, rows_U, _), grad_UD in zip(leaves, found, strict=True):
            if grad_UD is not None:
                check_finite(grad_UD, "gradient by the embeddings", "train", number)
                grads[site].index_add_(0, rows_U.long(), grad_UD, alpha=loss_weight(batch))
        weights.append(loss_weight(batch))
    if not weights:
        raise EmbtrimError("there are no training batches to read the saliency on; raise search_fraction or give more")
    return [
        (weight_VD * grad_VD).abs() * (len(weights) / sum(weights))  # (saliency, SNIP)
        for site, grad in zip(sites, grads, strict=True)
        for weight_VD, grad_VD in zip(site.weights(), grad.split(site.num_rows), strict=True)
    ]


def reassign(ranked: list[np.ndarray], key_R: np.ndarray) -> list[np.ndarray]:
    """Give the scores of the value with the i-th largest saliency to the value with the i-th largest key."""
    widest = max(scores.shape[1] for scores in ranked)
    stacked_RD = np.concatenate([np.pad(scores, ((0, 0), (0, widest - scores.shape[1]))) for scores in ranked])
    given_RD = np.empty_like(stacked_RD)
    by_saliency = np.argsort(-stacked_RD.sum(1), kind="stable")
    given_RD[np.argsort(-key_R, kind="stable")] = stacked_RD[by_saliency]
    parts = np.split(given_RD, np.cumsum([len(scores) for scores in ranked])[:-1])
    return [part[:, : scores.shape[1]] for part, scores in zip(parts, ranked, strict=True)]


# ---- sizes -------------------------------------------------------------------------------------------------------------


def buckets(width: int) -> list[int]:
    """Sizes that a value may have, apart from 0: powers of two below D, and D."""
    return [*(2**k for k in range(width.bit_length()) if 2**k < width), width]


def fill_sizes(full: SizePlan, ranked: list[np.ndarray], limit: int, row_cost: int = 0) -> list[np.ndarray]:
    """The size of each value (V,), by table: its entries above the lowest threshold that fits, bucketed down.

    A value reaches bucket s when its s-th largest entry passes the threshold. Such steps are taken in order of their
    thresholds until one does not fit. The parameters left over go to the next steps that still fit.

    Args:
        full: The plan that keeps everything.
        ranked: Scores of each table (V, D), in falling order along each row.
        limit: Parameters allowed.
        row_cost: Cost of a compact row beside its size.
    """
    levels_of = [np.array([0, *buckets(t.width)]) for t in full.tables]
    # (capacity): d_v >= s where v's s-th largest entry is among the top K.
    threshold = np.concatenate([scores[:, b[1:] - 1].ravel() for scores, b in zip(ranked, levels_of, strict=True)])
    steps = [len(b) - 1 for b in levels_of]
    first_row = np.cumsum([0, *(t.num_rows for t in full.tables)])
    row_of = np.concatenate(
        [np.repeat(np.arange(lo, hi), n) for lo, hi, n in zip(first_row, first_row[1:], steps, strict=False)]
    )
    level_of = np.concatenate(
        [np.tile(np.arange(1, n + 1), t.num_rows) for t, n in zip(full.tables, steps, strict=True)]
    )
    order = np.argsort(-threshold, kind="stable")

    def sizes_of(level_R: np.ndarray) -> list[np.ndarray]:
        return [b[part] for b, part in zip(levels_of, np.split(level_R, first_row[1:-1]), strict=True)]

    def count(level_R: np.ndarray) -> int:
        plan = counted_plan(full, sizes_of(level_R))
        return plan.num_params + row_cost * sum(t.num_compact_rows for t in plan.tables)

    def keep_few(level_R: np.ndarray) -> np.ndarray:
        """Give values of size 0 their table's smallest size if this takes less than the vector they would share."""
        for number, sizes in enumerate(levels_of):
            levels = level_R[first_row[number] : first_row[number + 1]]
            used = np.unique(levels[levels > 0])
            if len(used) and (levels == 0).sum() * sizes[used[0]] <= sizes[used[-1]]:
                levels[levels == 0] = used[0]
        return level_R

    def reached(prefix: int) -> np.ndarray:
        return keep_few(np.bincount(row_of[order[:prefix]], minlength=first_row[-1]))

    def stepped(level_R: np.ndarray, row: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Levels after as many of the steps as fit: all steps together may need a wider id map than any one alone."""

        def after(num: int) -> np.ndarray:
            changed_R = level_R.copy()
            changed_R[row[:num]] = level[:num]
            return keep_few(changed_R)

        return after(largest(len(row), lambda num: count(after(num)) <= limit) if full.standalone else len(row))

    # Keeping everything needs no projections, so it may fit although a little less does not.
    everything = count(reached(len(order))) <= limit
    taken = len(order) if everything else largest(len(order), lambda prefix: count(reached(prefix)) <= limit)
    level_R = reached(taken)
    later = order[taken:]
    table_R = np.repeat(np.arange(len(ranked)), np.diff(first_row))
    size_TL = np.array([np.pad(b, (0, max(steps) + 1 - len(b))) for b in levels_of])
    while True:
        # A step to the next size that its table already has changes only its own row.
        levels = np.split(level_R, first_row[1:-1])
        target_TL = next_levels(levels, size_TL.shape[1])
        left = limit - count(level_R)
        step = later[level_of[later] == target_TL[table_R, level_R][row_of[later]]]
        row = row_of[step]
        cost = size_TL[table_R[row], level_of[step]] - size_TL[table_R[row], level_R[row]]
        cost += np.where(level_R[row] == 0, wider_map(full, levels)[table_R[row]] + row_cost, 0)
        step, row, cost = (part[cost <= left] for part in (step, row, cost))

        fitting = np.cumsum(cost) <= left
        changed_R = stepped(level_R, row[fitting], level_of[step[fitting]])
        if (changed_R == level_R).all():
            return sizes_of(level_R)
        level_R = changed_R


def next_levels(levels: Sequence[np.ndarray], num_levels: int) -> np.ndarray:
    """For each table and level (T, num_levels) the next level that rows of the table have; -1 if there is none."""
    target_TL = np.full((len(levels), num_levels), -1)
    for table, level_V in enumerate(levels):
        used = np.unique(level_V)
        for level in range(num_levels):
            target_TL[table, level] = min(used[used > level], default=-1)
    return target_TL


def wider_map(full: SizePlan, levels: Sequence[np.ndarray]) -> np.ndarray:
    """Cost of one more row for each table (T,) because the table's id map then needs more bytes per entry."""
    kept = [int((level_V > 0).sum()) for level_V in levels]
    return np.array(
        [
            map_params(t.num_rows, n + 2) - map_params(t.num_rows, n + 1) if full.standalone else 0
            for t, n in zip(full.tables, kept, strict=True)
        ]
    )


def sized_plan(full: SizePlan, sizes: Sequence[np.ndarray]) -> SizePlan:
    """The plan that gives each value its size (V,), by table."""
    tables = []
    for table, size_V in zip(full.tables, sizes, strict=True):
        blocks = []
        for block in sized_blocks(table, size_V):
            rows = np.flatnonzero(size_V == block.width).astype(np.int32)
            blocks.append(
                Block(block.num_rows, block.columns, block.alignment, rows if len(rows) < table.num_rows else None)
            )
        tables.append(TablePlan(table.name, table.num_rows, table.width, tuple(blocks)))
    return dataclasses.replace(full, tables=tuple(tables))


def counted_plan(full: SizePlan, sizes: Sequence[np.ndarray]) -> PlanShape:
    """The plan that gives each value its size (V,), by table, without its rows: enough to count its parameters."""
    tables = tuple(
        TableShape(table.name, table.num_rows, table.width, tuple(sized_blocks(table, size_V)))
        for table, size_V in zip(full.tables, sizes, strict=True)
    )
    return dataclasses.replace(full.shape(), tables=tables)


def sized_blocks(table: TablePlan, size_V: np.ndarray) -> list[BlockShape]:
    """One block for each size that values of a table have, the largest first."""
    sizes, counts = np.unique(size_V[size_V > 0], return_counts=True)
    return [
        # (lookup): W_s is the identity at s = D
        BlockShape(rows, tuple(range(size)) if size == table.width else size, "project")
        for size, rows in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True)
    ]
