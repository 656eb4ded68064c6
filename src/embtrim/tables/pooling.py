"""Pooling of looked-up embeddings as an nn.EmbeddingBag does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def is_exporting() -> bool:
    """Whether torch is recording a graph, in which shapes must not depend on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def pool_entries(
    module: Any, entries: Tensor, ids: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
) -> Tensor:
    """Pool the embeddings of single ids as an nn.EmbeddingBag does. Those of an nn.Embedding stay as they are.

    Args:
        module: Says how to pool, by its `mode`, `include_last_offset` and `padding_idx`.
        entries: Embeddings (..., D) of ids (...).
        ids: Ids of one dimension, with `offsets`, or of two.
        offsets: As in nn.EmbeddingBag.
        per_sample_weights: As in nn.EmbeddingBag.
    """
    if not hasattr(module, "mode"):
        return entries
    if offsets is None and is_exporting():  # an embedding_bag of entries would fix the batch size
        return _pooled(module, entries, ids, per_sample_weights, lambda values: values.sum(1))
    if offsets is not None and is_exporting():
        num_bags = offsets.shape[0] - bool(module.include_last_offset)
        starts = torch.zeros(ids.shape[0] + 1, dtype=torch.int64, device=ids.device)  # ONNX has no bucketize
        bag_N = starts.index_add(0, offsets.long(), torch.ones_like(offsets.long())).cumsum(0)[:-1] - 1

        def add(values: Tensor) -> Tensor:
            return values.new_zeros(num_bags, *values.shape[1:]).index_add(0, bag_N, values)

        return _pooled(module, entries, ids, per_sample_weights, add)
    flat_ND = entries.flatten(0, -2)
    # Row 0 holds zeros. As the padding row it counts for nothing.
    index = torch.arange(1, flat_ND.shape[0] + 1, device=ids.device, dtype=ids.dtype).view(ids.shape)
    if module.padding_idx is not None:
        index = index.masked_fill(ids == module.padding_idx, 0)
    return nn.functional.embedding_bag(
        index,
        torch.cat([flat_ND.new_zeros(1, flat_ND.shape[1]), flat_ND]),
        offsets,
        mode=module.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=module.include_last_offset,
        padding_idx=0,
    )


def _pooled(
    module: Any, entries: Tensor, ids: Tensor, per_sample_weights: Tensor | None, add: Callable[[Tensor], Tensor]
) -> Tensor:
    """Pool entries by a function that adds the values of every bag."""
    counts = torch.ones_like(ids) if module.padding_idx is None else (ids != module.padding_idx).to(ids.dtype)
    weights = counts if per_sample_weights is None else counts * per_sample_weights
    pooled = add(entries * weights[..., None])
    return pooled / add(counts).clamp(min=1)[..., None] if module.mode == "mean" else pooled
