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
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from embtrim.config import Config
from embtrim.errors import EmbtrimError
from embtrim.methods.value_sizes import bucket_scores, fill_sizes, sized_plan
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.plan import SizePlan
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
    ranked = ranked_scores(task, config, seed)
    if config.score == "frequency":
        counts = task.row_counts()
        ranked = reassign(ranked, np.concatenate([counts[t.name] for t in full.tables]))
    elif config.score == "random":
        ranked = reassign(ranked, np.random.default_rng(seed).random(sum(map(len, ranked))))
    reached = bucket_scores(full, ranked)
    del ranked  # as large as the tables
    details = {"config": config.model_dump()}
    if budget.kind == "bytes" and full.first_order:  # rows of size 0 free their first-order weights
        limit, row_cost = int(budget.amount // BYTES_PER_PARAM), 1
    else:
        limit, row_cost = full.max_params(budget), 0
    sizes = fill_sizes(full, reached, limit, row_cost)
    rows_by_size = np.sum([np.bincount(size_V, minlength=full.width + 1) for size_V in sizes], axis=0)
    details["rows_by_size"] = {str(size): int(rows_by_size[size]) for size in np.flatnonzero(rows_by_size)}
    plan = sized_plan(full, sizes)
    plan.max_params(budget)  # raises if the first-order weights alone exceed the budget
    return plan.made_by("pme", budget, seed, details)


def ranked_scores(task: Task, config: PMEConfig, seed: int) -> list[np.ndarray]:
    """Scores of the entries of each table (V, D), in falling order along each row; only their order matters.

    Column j holds the (j + 1)-th largest score of each value.
    """
    model = task.fresh(seed)
    sites = task.sites(model)
    draw_weights(sites, config.init_std, seed)
    if config.warmup_epochs:
        task.fit(model, epochs=config.warmup_epochs, seed=seed)
    if config.score == "magnitude":
        scores = [weight_VD.abs() for site in sites for weight_VD in site.weights()]
    else:
        scores = entry_saliency(task, model, sites, config.search_fraction, seed)
    ranked = []
    for score_VD in scores:
        found_VD = score_VD.cpu().numpy()
        found_VD.sort(axis=1)
        ranked.append(found_VD[:, ::-1])
    return ranked


# ---- saliency ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_weights(sites: list[Site], std: float, seed: int) -> None:
    """Draw all embeddings with one standard deviation; rows that start at zero (OOV, padding) stay zero."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        for weight_VD in site.weights():
            drawn_V1 = weight_VD.any(1, keepdim=True)
            if weight_VD.device.type == "cpu" and weight_VD.dtype == torch.float32 and weight_VD.is_contiguous():
                weight_VD.normal_(0, std, generator=generator).mul_(drawn_V1)
            else:
                noise_VD = torch.empty(weight_VD.shape).normal_(0, std, generator=generator).to(weight_VD)
                weight_VD.copy_(noise_VD.mul_(drawn_V1))


def entry_saliency(task: Task, model: nn.Module, sites: list[Site], fraction: float, seed: int) -> list[Tensor]:
    """|E * sum_b dL_b/dE| of each table (V, D), over `fraction` of the training batches, with no update.

    The mean loss of a batch counts by the rows of the batch, so that a small last batch does not count too much.
    """
    weights_of = [site.weights() for site in sites]
    grads = [weights[0].new_zeros(sum(map(len, weights)), weights[0].shape[1]) for weights in weights_of]
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
    saliency = [
        grad_VD.mul_(weight_VD).abs_().mul_(len(weights) / sum(weights))  # (saliency, SNIP)
        for site, grad in zip(sites, grads, strict=True)
        for weight_VD, grad_VD in zip(site.weights(), grad.split(site.num_rows), strict=True)
    ]
    return saliency


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
