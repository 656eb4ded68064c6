"""Embedding bags as gathers and sums, for graphs whose format has no operator for bags."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from embtrim.tables.pooling import pool_entries
from embtrim.tables.replacements import CompactEmbedding, CompactEmbeddingBag


class GatheredBag(nn.Module):
    """Reads an nn.EmbeddingBag or its replacement entry by entry, in operators whose shapes do not depend on values.

    Args:
        bag: The bag; its weights are shared.
    """

    def __init__(self, bag: nn.EmbeddingBag | CompactEmbeddingBag) -> None:
        super().__init__()
        self.bag = bag

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """(bags, D) pooled embeddings. Arguments are those of nn.EmbeddingBag."""
        bag = self.bag
        if isinstance(bag, CompactEmbeddingBag):
            entries, widen = _stored_entries(bag, input)
        else:
            entries, widen = nn.functional.embedding(input, bag.weight), None
        if offsets is not None:
            pooled = _pooled_by_offsets(bag, entries, input, offsets, per_sample_weights)
        elif isinstance(bag, nn.EmbeddingBag) and bag.mode == "max":
            pooled = _largest(bag, entries, input)
        else:
            pooled = pool_entries(bag, entries, input, None, per_sample_weights)
        return pooled if widen is None else widen(pooled)


def gather_bags(module: nn.Module) -> nn.Module:
    """A module with its bags read entry by entry, in place; a bag of mode max with offsets stays what it is."""
    bags = {
        path: bag
        for path, bag in module.named_modules(remove_duplicate=False)
        if isinstance(bag, CompactEmbeddingBag) or (type(bag) is nn.EmbeddingBag and bag.max_norm is None)
    }
    if "" in bags:
        return GatheredBag(bags[""])
    for path, bag in bags.items():
        module.set_submodule(path, GatheredBag(bag))
    return module


def _stored_entries(bag: CompactEmbeddingBag, ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Embeddings of single ids as they are stored, and what brings pooled ones to the full width if they are narrower."""
    if bag.pools_whole:
        return bag.entries(ids), None
    assert isinstance(bag.entries, CompactEmbedding)
    (_, width), *_ = bag.entries.segments
    widen = partial(bag.entries.widen, width=width)
    return nn.functional.embedding(bag.entries.rows_of(ids), bag.entries.weights[0]), widen


def _largest(bag: nn.EmbeddingBag, entries: Tensor, ids: Tensor) -> Tensor:
    """The largest number of each column of the bags; zeros for a bag of padding alone."""
    if bag.padding_idx is None:
        return entries.amax(-2)
    is_kept = (ids != bag.padding_idx)[..., None]
    largest = entries.masked_fill(~is_kept, torch.finfo(entries.dtype).min).amax(-2)
    return torch.where(is_kept.any(-2), largest, 0.0)


def _pooled_by_offsets(
    bag: nn.EmbeddingBag | CompactEmbeddingBag,
    entries: Tensor,
    ids: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
) -> Tensor:
    """Bags of ids of one dimension, each from its offset to the next."""
    starts = offsets[:-1] if bag.include_last_offset else offsets
    opens = torch.zeros(ids.shape[0] + 1, dtype=torch.int64).scatter_add(
        0, starts.long(), torch.ones_like(starts).long()
    )
    bag_N = opens.cumsum(0)[:-1] - 1
    counts = torch.ones_like(entries[:, 0]) if bag.padding_idx is None else (ids != bag.padding_idx).to(entries.dtype)
    weights = counts if per_sample_weights is None else counts * per_sample_weights
    empty = entries.new_zeros(starts.shape[0], entries.shape[1])
    pooled = empty.index_add(0, bag_N, entries * weights[:, None])
    if bag.mode != "mean":
        return pooled
    return pooled / empty[:, :1].index_add(0, bag_N, counts[:, None]).clamp(min=1)
