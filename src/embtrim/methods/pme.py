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

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from embtrim.config import Config
from embtrim.errors import EmbtrimError, ModelError
from embtrim.methods.value_sizes import Shares, bucket_scores, fill_sizes, sized_plan
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.plan import SizePlan
from embtrim.tasks.entries import Entries
from embtrim.tasks.task import Task

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
    shares, ranked = ranked_scores(task, config, seed)
    if config.score == "frequency":
        counts = task.row_counts()
        ranked = reassign(ranked, np.concatenate([counts[t.name] for t in full.tables]))
    elif config.score == "random":
        ranked = reassign(ranked, np.random.default_rng(seed).random(sum(map(len, ranked))))
    reached = bucket_scores(full, ranked)
    del ranked  # as large as the tables
    if budget.kind == "bytes" and full.first_order:  # rows of size 0 free their first-order weights
        limit, row_cost = int(budget.amount // BYTES_PER_PARAM), 1
    else:
        limit, row_cost = full.max_params(budget), 0
    plan = sized_plan(full, fill_sizes(full, reached, limit, row_cost, shares), shares)
    plan.max_params(budget)  # raises if the first-order weights alone exceed the budget
    details = {"config": config.model_dump(), "rows_by_size": rows_by_size(plan)}
    return plan.made_by("pme", budget, seed, details)


def rows_by_size(plan: SizePlan) -> dict[str, int]:
    """How many feature values of all tables have each size."""
    found = Counter({0: sum(t.num_rows - t.num_kept for t in plan.tables)})
    for table in plan.tables:
        found.update({block.width: block.num_rows for block in table.blocks})
    return {str(size): found[size] for size in sorted(found) if found[size]}


def ranked_scores(task: Task, config: PMEConfig, seed: int) -> tuple[Shares, list[np.ndarray]]:
    """The rows that this process holds of each table, and the scores of their entries (N, D), falling along each row.

    Only the order of the scores matters. Column j holds the (j + 1)-th largest score of each value.
    """
    model = task.fresh(seed)
    task.draw_weights(model, config.init_std, seed)
    if config.warmup_epochs:
        task.fit(model, epochs=config.warmup_epochs, seed=seed)
    own = task.entries(model)
    if config.score in ("frequency", "random"):
        check_whole(task, own, config.score)
    if config.score == "magnitude":
        scores = [entries.values_ND.abs() for entries in own]
    else:
        scores = entry_saliency(task, model, own, config.search_fraction, seed)
    ranked = []
    for score_ND in scores:
        found_ND = score_ND.cpu().numpy()
        found_ND.sort(axis=1)
        ranked.append(found_ND[:, ::-1])
    return Shares([entries.first for entries in own], task), ranked


# ---- saliency ----------------------------------------------------------------------------------------------------------


def entry_saliency(task: Task, model: nn.Module, own: Sequence[Entries], fraction: float, seed: int) -> list[Tensor]:
    """|E * sum_b dL_b/dE| of the rows that this process holds (N, D), over `fraction` of the training batches, with no update.

    The mean loss of a batch counts by the rows of the batch, so that a small last batch does not count too much.
    """
    model.eval()  # no dropout
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.train()  # running statistics are not fitted yet
    sums = torch.zeros(2, dtype=torch.float64)  # batches, and their weights

    def read() -> Iterator[tuple[int, Any, float]]:
        for number, batch in enumerate(task.tracked_batches("train", "scoring entries", seed)):
            if math.ceil((number + 1) * fraction) > math.ceil(number * fraction):
                weight = task.weight_of(batch)
                sums.add_(torch.tensor([1.0, weight], dtype=torch.float64))
                yield number, batch, weight

    grads = task.entry_gradients(model, read())
    if not sums[0]:
        raise EmbtrimError("there are no training batches to read the saliency on; raise search_fraction or give more")
    batches, weights = float(sums[0]), float(task.summed(sums[1]))
    return [
        grad_ND.mul_(entries.values_ND).abs_().mul_(batches / weights)  # (saliency, SNIP)
        for entries, grad_ND in zip(own, grads, strict=True)
    ]


def check_whole(task: Task, own: Sequence[Entries], score: str) -> None:
    """Raise ModelError, on all processes alike, if a process holds only some of the rows."""
    missing = sum(entries.num_rows - len(entries.values_ND) for entries in own)
    if task.largest(torch.tensor(missing, dtype=torch.int64)):
        raise ModelError(
            f"pme with score = {score!r} gives the scores of one value to another, which may lie on another rank; choose "
            "score = 'saliency' or 'magnitude', or search in one process"
        )


def reassign(ranked: list[np.ndarray], key_R: np.ndarray) -> list[np.ndarray]:
    """Give the scores of the value with the i-th largest saliency to the value with the i-th largest key."""
    widest = max(scores.shape[1] for scores in ranked)
    first_row = np.cumsum([0, *map(len, ranked)])
    stacked_RD = np.zeros((first_row[-1], widest), ranked[0].dtype)
    for scores, start in zip(ranked, first_row, strict=False):
        stacked_RD[start : start + len(scores), : scores.shape[1]] = scores
    source_R = np.empty(len(stacked_RD), np.int64)
    source_R[np.argsort(-key_R, kind="stable")] = np.argsort(-stacked_RD.sum(1), kind="stable")
    parts = np.split(source_R, first_row[1:-1])
    return [stacked_RD[part][:, : scores.shape[1]] for part, scores in zip(parts, ranked, strict=True)]
