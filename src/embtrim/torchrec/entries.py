"""Single entries of tables on shards: weights drawn anew, and gradients by every entry, each rank of the rows that it reads alone.

The gradients add up in `.grad` of the tables, which takes one more copy of them. Only the dense compute kernel leaves them
there: a fused one updates the tables within the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embtrim.errors import ModelError
from embtrim.tasks.entries import Entries, normal_chunks
from embtrim.tasks.task import Task
from embtrim.torchrec.parts import sharded_tables
from embtrim.torchrec.ranks import largest, num_ranks, summed
from embtrim.torchrec.sites import SEQUENCES, CollectionSite, Shard, configs_of, find_collections, is_sharded, shards_of
from embtrim.torchrec.training import step_share
from embtrim.training.evaluation import check_finite

DENSE = "dense"


@torch.no_grad()
def draw_weights(sites: Sequence[CollectionSite], std: float, seed: int) -> None:
    """See Task.draw_weights; all ranks draw the numbers of all rows, and keep those of their pieces."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        by_table: dict[str, list[Shard]] = {config.name: [] for config in site.configs}
        for shard in site.shards():
            by_table[shard.table].append(shard)
        for config in site.configs:
            for rows, noise_RD in normal_chunks(config.num_embeddings, config.embedding_dim, std, generator):
                _draw(by_table[config.name], rows, noise_RD)


def _draw(shards: Sequence[Shard], rows: slice, noise_RD: Tensor) -> None:
    """Give the pieces of a table the numbers of some rows; rows that are zero in all pieces stay zero."""
    drawn_R, places = torch.zeros(len(noise_RD), dtype=torch.uint8), []
    for shard in shards:
        start, stop = max(rows.start, shard.rows.start), max(min(rows.stop, shard.rows.stop), shard.rows.start)
        places.append(
            (slice(start - rows.start, stop - rows.start), slice(start - shard.rows.start, stop - shard.rows.start))
        )
        here, own = places[-1]
        if start < stop:
            drawn_R[here] |= shard.weight_RC[own].any(1).byte().cpu()
    noise_RD = noise_RD * largest(drawn_R)[:, None]
    for shard, (here, own) in zip(shards, places, strict=True):
        shard.weight_RC[own] = noise_RD[here, shard.columns].to(shard.weight_RC)


def entries(sites: Sequence[CollectionSite], values_of: Callable[[Shard], Tensor] | None = None) -> list[Entries]:
    """See Task.entries.

    Args:
        sites: Sites of a model.
        values_of: Shard -> other values of the same piece; None takes the weights.
    """
    tables = sharded_tables(sites, values_of)
    return [Entries(table.first, table.num_rows, table.weight_ND.float()) for table in tables]


def entry_gradients(task: Task, model: nn.Module, batches: Iterable[tuple[int, Any, float]]) -> list[Tensor]:
    """See Task.entry_gradients.

    Raises:
        ModelError: A table lies in another kernel than the dense one; or the ranks' batches have unequal sizes, which tables
            that are cut by rows cannot be trained on.
    """
    check_dense(model)
    sites: Any = task.sites(model)
    for place, batch, weight in batches:
        loss = task.loss(model, batch)
        check_finite(loss, "loss", "train", place)
        # TorchRec takes the mean over ranks: this becomes the sum of the ranks' gradients by their weights.
        total = float(summed(torch.tensor(weight, dtype=torch.float64)))
        (loss * (step_share(task, model, batch) * total)).backward()
    sums = [found.values_ND for found in entries(sites, _gradients_of(model))]
    if int(largest(torch.tensor(not all(bool(part.isfinite().all()) for part in sums), dtype=torch.int32))):
        raise ModelError(
            "the gradient by the embeddings of a train batch is nan or infinite; look for missing values in the batches, or for "
            "a division by zero in the model or the loss"
        )
    model.zero_grad(set_to_none=True)
    return sums


def check_dense(model: nn.Module) -> None:
    """Raise ModelError where gradients by entries cannot be had: the backward pass spends them, or the lookup is wrong."""
    for path, module in find_collections(model):
        if not is_sharded(module):
            continue
        others = "or choose guided, sseds, hard_mask, optembed, or a control"
        sharding: Any = module
        for config in configs_of(module):
            kernel = sharding.module_sharding_plan[config.name].compute_kernel
            if kernel != DENSE:
                raise ModelError(
                    f"pme reads the gradient of every entry, which the compute kernel {kernel!r} of table {config.name!r} of the "
                    f"collection {path!r} spends within the backward pass; shard the model that the Task's `fresh=` makes with "
                    f"compute_kernel='dense' for every table (the Task's model may stay as it is), {others}"
                )
        if isinstance(module, SEQUENCES) and any(
            s.weight_RC.device.type == "cpu" for s in shards_of(module, configs_of(module))
        ):
            raise ModelError(
                f"pme needs the dense compute kernel, which FBGEMM has for bags only on the CPU: embeddings of the "
                f"EmbeddingCollection {path!r} come out wrong there; search in one process, {others}"
            )


def _gradients_of(model: nn.Module) -> Callable[[Shard], Tensor]:
    """Shard -> gradient of its piece, the same on all ranks that hold a copy of it."""
    found: dict[tuple[int, tuple[int, ...]], nn.Parameter] = {}
    own: set[int] = set()
    for _, module in find_collections(model):
        for parameter in module.parameters():
            found[parameter.data_ptr(), tuple(parameter.shape)] = parameter
            if not is_sharded(module):
                own.add(id(parameter))

    def gradient(shard: Shard) -> Tensor:
        parameter = found[shard.weight_RC.data_ptr(), tuple(shard.weight_RC.shape)]
        values = torch.zeros_like(shard.weight_RC) if parameter.grad is None else parameter.grad.detach()
        return summed(values) / num_ranks() if id(parameter) in own else values

    return gradient
