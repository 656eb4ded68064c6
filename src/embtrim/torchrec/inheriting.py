"""Weights of a full model into a compact one, from any sharding to any other, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.compaction.inheriting import kept_rows_of
from embtrim.errors import ModelError, PlanError
from embtrim.plan.plan import SizePlan
from embtrim.system.modules import named_modules, unwrapped
from embtrim.tables.packing import CHUNK_ROWS
from embtrim.torchrec.compacting import CompactCollection, CompactSequences
from embtrim.torchrec.sites import (
    Shard,
    configs_of,
    find_collections,
    gathered_rows,
    name_of,
    put_rows,
    shards_of,
)


@torch.no_grad()
def inherit(full: nn.Module, small: nn.Module, plan: SizePlan) -> None:
    """Give a compact model the weights that a full one has: rows and columns that the plan keeps, and all other weights.

    All ranks call it. DROPPED rows become zero, as the rows are that a masked full model reads. The columns that fill a row
    up to a multiple of four become zero too; nothing reads them.

    Args:
        full: Full model, sharded or not.
        small: Compact model that `compact` made, changed in place; sharded in any way or not.
        plan: Plan of the compact model.

    Raises:
        PlanError: The plan was made for another model.
        ModelError: A weight beside the tables has another shape in the compact model, or is missing in the full one.
    """
    full, small = unwrapped(full), unwrapped(small)
    tables = {table.name: table for table in plan.tables}
    given = _shards_by_name(full)
    if missing := [name for name in tables if name not in given]:
        raise PlanError(f"the plan is for a table {missing[0]!r}, which the full model does not have")
    for name, (config, shards) in compact_shards(small).items():
        if name not in given:
            raise ModelError(f"the compact model has a table {name!r}, which the full model does not have")
        full_config, own = given[name]
        width, table = full_config.embedding_dim, tables.get(name)
        columns = range(width) if table is None else table.columns
        for shard in shards:
            shard.weight_RC.zero_()
        for rows, ids in _all_rows(config.num_embeddings) if table is None else kept_rows_of(table):
            values_ND = gathered_rows(own, torch.from_numpy(rows.astype(np.int64)), width)
            put_rows(shards, torch.from_numpy(ids.astype(np.int64)), values_ND[:, list(columns)])
    _copy_others(full, small)


@torch.no_grad()
def copy_weights(model: nn.Module, other: nn.Module) -> None:
    """Give another model of the same tables all weights of a model, from any sharding to any other; all ranks call it.

    Raises:
        ModelError: A table or a weight has another shape in the other model, or is missing.
    """
    given, taken = _shards_by_name(model), _shards_by_name(other)
    for name, (config, shards) in taken.items():
        size = (config.num_embeddings, config.embedding_dim)
        if name not in given or (given[name][0].num_embeddings, given[name][0].embedding_dim) != size:
            raise ModelError(f"fresh= made a table {name!r} of {size[0]:,} x {size[1]}, which the model does not have")
        for rows, _ in _all_rows(size[0]):
            rows_N = torch.from_numpy(rows)
            put_rows(shards, rows_N, gathered_rows(given[name][1], rows_N, size[1]))
    _copy_others(model, other)


def _all_rows(number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All rows of a table that stays as it is, in chunks, see `kept_rows_of`."""
    for start in range(0, number, CHUNK_ROWS):
        rows = np.arange(start, min(start + CHUNK_ROWS, number))
        yield rows, rows


def _shards_by_name(model: nn.Module) -> dict[str, tuple[Any, list[Shard]]]:
    """Config and this rank's pieces of each table of a full model, by its name in plans."""
    found: dict[str, tuple[Any, list[Shard]]] = {}
    for path, module in find_collections(model):
        for config in configs_of(module):
            found[name_of(path, module, config)] = config, shards_of(module, [config])
    return found


def compact_shards(model: nn.Module) -> dict[str, tuple[Any, list[Shard]]]:
    """Config and this rank's pieces of each table of a compact model, by the name that the full table has in plans.

    Collections that the plan leaves alone are among them.
    """
    compact = {path: m for path, m in named_modules(model) if isinstance(m, (CompactCollection, CompactSequences))}
    if not compact:
        raise ModelError(f"this {type(model).__name__} has no compact collection; make it by embtrim.torchrec.compact")
    found = {}
    for path, module in find_collections(model):
        outer = next((start for start in compact if path.startswith(f"{start}." if start else "")), path)
        for config in configs_of(module):
            found[name_of(outer, module, config)] = config, shards_of(module, [config])
    return found


def _copy_others(full: nn.Module, small: nn.Module) -> None:
    """Copy all parameters and buffers that are not inside a collection."""
    source = _other_values(full)
    for name, value in _other_values(small).items():
        if name not in source or source[name].shape != value.shape:
            has = f"is {tuple(source[name].shape)}" if name in source else "is missing"
            raise ModelError(
                f"weight {name!r} of the compact model is {tuple(value.shape)}, in the full model it {has}"
            )
        value.copy_(source[name])


def _other_values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers outside of collections by name; those of DistributedDataParallel's wrapper among them."""
    inside = [path for path, _ in find_collections(model)]
    inside += [path for path, m in named_modules(model) if isinstance(m, (CompactCollection, CompactSequences))]
    found: dict[str, Tensor] = {}
    for path, module in named_modules(model):
        if any(path == start or path.startswith(f"{start}.") for start in inside):
            continue
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                found[f"{path}.{name}" if path else name] = value.detach()
    return found
