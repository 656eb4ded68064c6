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
            pooled = pool_entries(bag, entries, input, offsets, per_sample_weights)
            return pooled if widen is None else widen(pooled)
        if bag.mode == "max" and offsets is not None:
            return bag(input, offsets)
        entries = nn.functional.embedding(input, bag.weight)
        if bag.mode == "max":
            return _largest(bag, entries, input)
        return pool_entries(bag, entries, input, offsets, per_sample_weights)


def gather_bags(module: nn.Module) -> nn.Module:
    """A module with its bags read entry by entry, in place; one of mode max that is read with offsets stays what it is."""
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
