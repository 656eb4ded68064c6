"""Training steps of a search on ranks: gradients are means over ranks, each batch weighed by its rows.

TorchRec divides the gradients of tables on shards by the number of ranks, as DistributedDataParallel does. A rank's loss is
therefore multiplied by its share of the step's rows times the number of ranks. Everything else that a search trains, such as
dense layers, masks and thresholds, has a copy on each rank, whose gradients are averaged here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from embtrim.errors import ModelError
from embtrim.tasks.row_gradients import RowGradients
from embtrim.tasks.task import Task
from embtrim.torchrec.ranks import Filler, gathered, num_ranks, own_rank, summed
from embtrim.torchrec.sites import CollectionSite, OutputLeaf, configs_of, find_collections, shards_of
from embtrim.training.evaluation import check_finite
from embtrim.training.settings import Optimizer


def step_share(task: Task, model: nn.Module, batch: Any) -> float:
    """Factor on the loss of this rank's batch in a step, such that the mean over ranks is the loss of all rows.

    Raises:
        ModelError: The ranks' batches have unequal sizes, which tables that are cut by rows cannot be trained on.
    """
    if num_ranks() == 1:
        return 1.0
    weight = task.weight_of(batch)
    run = task.weight_of(batch.batch) if isinstance(batch, Filler) else weight
    both = gathered(torch.tensor([weight, run, cuts_rows(model)], dtype=torch.float64))
    sizes = [float(part[1]) for part in both]
    if max(sizes) > min(sizes) and any(float(part[2]) for part in both):
        raise ModelError(
            f"the ranks' train batches have {', '.join(f'{size:,.0f}' for size in sizes)} rows, and tables that are cut by "
            "rows train on equal batches only; drop the last, smaller batches"
        )
    return weight * num_ranks() / sum(float(part[0]) for part in both)


def cuts_rows(model: nn.Module) -> bool:
    """Whether this rank holds a part of the rows of a table."""
    return any(
        shard.rows.stop - shard.rows.start < config.num_embeddings
        for _, module in find_collections(model)
        for config in configs_of(module)
        for shard in shards_of(module, [config])
    )


def output_gradients(sites: Sequence[CollectionSite], loss_of: Callable[[], Tensor], place: int) -> list[RowGradients]:
    """Gradients of a loss by the rows that all ranks read in a step, as `row_gradients` gives them in one process.

    Rows of bags follow from the gradients of what the collections return. The ranks exchange rows and gradients, and each
    takes the rows of its share.
    """
    leaves: list[OutputLeaf] = []
    with torch.enable_grad(), ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.outputs_seen(leaves))
        loss = loss_of()
    check_finite(loss, "loss", "valid", place)
    gradients = torch.autograd.grad(loss, [leaf.leaf for leaf in leaves], allow_unused=True, materialize_grads=True)
    found = []
    for number, site in enumerate(sites):
        parts = [site.row_gradients(leaf, g) for leaf, g in zip(leaves, gradients, strict=True) if leaf.site is site]
        if not parts:
            continue
        rows_M, gradient_MD = (torch.cat(part) for part in zip(*parts, strict=True))
        check_finite(gradient_MD, "gradient by the embeddings", "valid", place)
        own_U, own_UD = _summed_by_row(rows_M, gradient_MD)
        every_N = torch.cat(gathered(own_U))
        every_ND = torch.cat(gathered(own_UD.flatten())).view(-1, site.widths[0])
        mine = every_N % num_ranks() == own_rank()
        found.append((number, *_summed_by_row(every_N[mine], every_ND[mine])))
    return found


def _summed_by_row(rows_M: Tensor, values_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows in ascending order, and the sums of their values."""
    rows_U, inverse_M = torch.unique(rows_M, return_inverse=True)
    return rows_U, values_MD.new_zeros(len(rows_U), values_MD.shape[1]).index_add(0, inverse_M, values_MD)


@torch.no_grad()
def average_gradients(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Average the gradients of all parameters of optimisers, apart from tables on shards.

    A parameter without a gradient on any rank stays without one; where a rank has none, it counts as zero.

    Raises:
        ModelError: A gradient is sparse.
    """
    if num_ranks() == 1:
        return
    kinds = (ShardedEmbeddingBagCollection, ShardedEmbeddingCollection)
    on_shards = {id(p) for _, m in find_collections(model) if isinstance(m, kinds) for p in m.parameters()}
    groups = [group for o in optimizers for group in getattr(o, "param_groups", ())]
    found = {id(p): p for group in groups for p in group["params"] if p.requires_grad and id(p) not in on_shards}
    parameters = list(found.values())
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise ModelError(
            "a layer beside the tables has a sparse gradient, which ranks do not average; use sparse=False"
        )
    has_any = summed(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)).tolist()
    trained = [p for p, number in zip(parameters, has_any, strict=True) if number]
    for kind in dict.fromkeys((p.dtype, p.device) for p in trained):
        own = [p for p in trained if (p.dtype, p.device) == kind]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
        parts: Sequence[Tensor] = (summed(flat) / num_ranks()).split([p.numel() for p in own])
        for parameter, part in zip(own, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
