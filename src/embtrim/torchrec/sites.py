"""Sites of TorchRec's collections, plain or sharded: where they are, gates on their output, and the pieces of their tables.

A collection looks up many tables at once. Its site has a table for each of its configs, and a slot for each column of a
table; features that share a table share its slots. Slot gates multiply what the collection returns, after all ranks have
exchanged it, so that gradients by the gates never reach the tables: a fused optimiser, which would update the tables
within the backward pass, does nothing.

The output is always read by name: sharding table by table changes the order of a KeyedTensor's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    JaggedTensor,
    KeyedJaggedTensor,
    KeyedTensor,
    PoolingType,
)
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from embtrim.errors import ModelError
from embtrim.system.modules import named_modules
from embtrim.tables.embedding_tables import RowGate
from embtrim.tasks.sites import SlotGate
from embtrim.torchrec.ranks import largest, own_rank, summed

BAGS = (EmbeddingBagCollection, ShardedEmbeddingBagCollection)
SEQUENCES = (EmbeddingCollection, ShardedEmbeddingCollection)


@dataclass(frozen=True)
class Shard:
    """A piece of a table that this rank holds.

    Attributes:
        table: Name of the table's config.
        rows: Rows of the table.
        columns: Columns of the table.
        weight_RC: The values: a view, so that writes change the table.
        counts: Whether sums over all ranks take this piece; of the copies of a table that every rank holds, one does.
    """

    table: str
    rows: slice
    columns: slice
    weight_RC: Tensor
    counts: bool


class OutputLeaf(NamedTuple):
    """What a collection returned for a feature.

    Attributes:
        site: Site of the collection.
        given: Ids of the feature.
        feature: Its name.
        leaf: Zeros that were added to the output.
    """

    site: CollectionSite
    given: JaggedTensor
    feature: str
    leaf: Tensor


class CollectionSite:
    """Tables of one width of a collection in a model, see Site.

    Args:
        path: Path of the collection in the model, without wrappers.
        module: The collection.
        configs: The configs of the tables to search, all of one width; the others are left alone.

    Attributes:
        features: Features of all tables of the collection, in the order of the configs.
        by_config: Name of each table in plans, by the name of its config.
    """

    shows_rows = False

    def __init__(self, path: str, module: nn.Module, configs: Sequence[Any]) -> None:
        self.path, self.module, self.configs = path, module, tuple(configs)
        self.pooled = isinstance(module, BAGS)
        self.by_config = {config.name: name_of(path, module, config) for config in configs}
        self.names = tuple(self.by_config.values())
        self.num_rows = tuple(config.num_embeddings for config in configs)
        self.widths = tuple(config.embedding_dim for config in configs)
        self.reserved_rows: tuple[int | None, ...] = (None,) * len(configs)
        first = np.cumsum([0, *self.widths]).tolist()
        first_row = np.cumsum([0, *self.num_rows]).tolist()
        self._first_row = {
            feature: first_row[number] for number, config in enumerate(configs) for feature in config.feature_names
        }
        self._slots = {
            feature: range(first[number], first[number + 1])
            for number, config in enumerate(configs)
            for feature in config.feature_names
        }
        self._pooling = {
            feature: getattr(config, "pooling", None) for config in configs for feature in config.feature_names
        }
        self.features = [feature for config in configs_of(module) for feature in config.feature_names]
        if len(set(self.features)) < len(self.features):
            raise ModelError(
                f"a feature of the collection {path!r} is looked up in several tables, whose outputs then have other names; "
                "give each table its own feature"
            )

    @contextmanager
    def gated(self, slots: SlotGate | None = None, rows: RowGate | None = None) -> Iterator[None]:
        """See Site. A slot function gets the outputs of all features of the searched tables side by side.

        A row gate sees the rows that this rank's batch reads, in what the collection returns: rows of different ranks are
        different entries. All features of a table are seen together.

        Raises:
            ModelError: Rows are gated where several ids are pooled, or ids have weights of their own, on any rank.
        """
        apply = self._gate_pooled if self.pooled else self._gate_sequences
        handle = self.module.register_forward_hook(lambda _module, args, output: apply(slots, rows, args[0], output))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def outputs_seen(self, leaves: list[OutputLeaf]) -> Iterator[None]:
        """Note inside a `with` block what is read, with leaves whose gradients are those of the outputs."""

        def see(_module: nn.Module, args: Any, output: Any) -> Any:
            given, found = args[0], dict(output.items() if not self.pooled else output.to_dict().items())
            parts = {name: part if self.pooled else part.values() for name, part in found.items()}
            for name in self._slots:
                leaf = torch.zeros_like(parts[name], requires_grad=True)
                leaves.append(OutputLeaf(self, given[name], name, leaf))
                parts[name] = parts[name].detach() + leaf
            if not self.pooled:
                return {name: JaggedTensor(parts[name], lengths=j.lengths()) for name, j in found.items()}
            keys = list(output.keys())
            return KeyedTensor(keys, list(output.length_per_key()), torch.cat([parts[key] for key in keys], 1))

        handle = self.module.register_forward_hook(see)
        try:
            yield
        finally:
            handle.remove()

    def row_gradients(self, leaf: OutputLeaf, gradient_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the site that a feature reads, one for each id, and their gradients, from that of its output."""
        given = leaf.given
        rows_M = given.values().long() + self._first_row[leaf.feature]
        if not self.pooled:
            return rows_M, gradient_ND
        lengths = given.lengths().long()
        if self._pooling[leaf.feature] == PoolingType.MEAN:
            gradient_ND = gradient_ND / lengths.clamp(min=1)[:, None]
        gradient_MD = gradient_ND.repeat_interleave(lengths, 0)
        weights = given.weights_or_none()
        return rows_M, gradient_MD if weights is None else gradient_MD * weights[:, None]

    def _gate_pooled(
        self, slots: SlotGate | None, rows: RowGate | None, given: KeyedJaggedTensor, output: Any
    ) -> KeyedTensor:
        keys, lengths, values = list(output.keys()), list(output.length_per_key()), output.values()
        parts = dict(zip(keys, values.split(lengths, 1), strict=True))
        if rows is not None:
            parts |= self._gated_rows(rows, given, parts)
        parts |= self._gated_parts(slots, parts)
        return KeyedTensor(keys, lengths, torch.cat([parts[key] for key in keys], 1))

    def _gate_sequences(
        self, slots: SlotGate | None, rows: RowGate | None, given: KeyedJaggedTensor, output: Any
    ) -> dict[str, JaggedTensor]:
        found = dict(output.items())
        gated: dict[str, Any] = {name: jagged.values() for name, jagged in found.items()}
        if rows is not None:
            gated |= self._gated_rows(rows, given, gated)
        if isinstance(slots, Tensor) and slots.ndim == 1:
            gated |= self._gated_parts(slots, gated)
        elif slots is not None:
            size = given.stride()
            ones = {name: gated[name].new_ones(size, len(own)) for name, own in self._slots.items()}
            gated |= {
                name: gated[name] * gate.repeat_interleave(found[name].lengths().long(), 0)
                for name, gate in self._gated_parts(slots, ones).items()
            }
        return {name: JaggedTensor(gated[name], lengths=jagged.lengths()) for name, jagged in found.items()}

    def _gated_rows(self, rows: RowGate, given: KeyedJaggedTensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs (N, D) of the searched features under a row gate, by feature.

        The gate gets the first entry of each distinct row, so that gradients add up there as they do in the table.
        """
        read = {name: given[name] for name in self._slots}
        self._check_single(read)
        ids_N = torch.cat([read[name].values().long() + first for name, first in self._first_row.items()])
        places = {name: jagged.lengths().nonzero().squeeze(1) for name, jagged in read.items()}
        entries_ND = torch.cat(
            [parts[name].index_select(0, places[name]) if self.pooled else parts[name] for name in self._slots]
        )
        rows_U, inverse_N = torch.unique(ids_N, return_inverse=True)
        every_N = torch.arange(len(ids_N), device=ids_N.device)
        first_U = every_N.new_empty(len(rows_U)).scatter_reduce(0, inverse_N, every_N, "amin", include_self=False)
        gated_ND = rows(rows_U, entries_ND[first_U])[inverse_N]
        found = dict(zip(self._slots, gated_ND.split([len(j.values()) for j in read.values()]), strict=True))
        if not self.pooled:
            return found
        return {name: torch.zeros_like(parts[name]).index_copy(0, places[name], gated) for name, gated in found.items()}

    def _check_single(self, read: dict[str, JaggedTensor]) -> None:
        """Raise ModelError, on all ranks alike, if an output of the searched features is more than one row of a table."""
        pooled = [int(j.lengths().max()) > 1 if self.pooled and len(j.lengths()) else False for j in read.values()]
        weighted = [j.weights_or_none() is not None for j in read.values()]
        for why, there in (("pools several ids of", pooled), ("weighs the ids of", weighted)):
            found = largest(torch.tensor(there, dtype=torch.int32)).tolist()
            if any(found):
                raise ModelError(
                    f"this search gates single rows, but the collection {self.path!r} {why} feature "
                    f"{list(read)[found.index(1)]!r}, which hides them; read it through an EmbeddingCollection without weights, "
                    "leave its table alone with the Task's exclude=, or choose sseds, guided, hard_mask with "
                    "orthogonality = 0, or a control"
                )

    def _gated_parts(self, slots: SlotGate | None, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs (N, D) of the searched features under a slot gate, by feature."""
        if slots is None:
            return {}
        if isinstance(slots, Tensor):
            return {name: parts[name] * slots[..., own.start : own.stop] for name, own in self._slots.items()}
        widths = [len(own) for own in self._slots.values()]
        gated = slots(torch.cat([parts[name] for name in self._slots], 1))
        return dict(zip(self._slots, gated.split(widths, 1), strict=True))

    def weights(self) -> list[Tensor]:
        """Refused: nothing gathers the tables of a collection. See `shards`."""
        raise ModelError(
            f"this search reads whole tables, and those of the collection {self.path!r} may lie on several ranks; choose "
            "guided, sseds, hard_mask, optembed, pme, or a control, and bits = 32, or bits = 'mixed' with guided"
        )

    def drop_rows(self, kept: Sequence[Tensor]) -> None:
        """See Site."""
        by_name = dict(zip((config.name for config in self.configs), kept, strict=True))
        with torch.no_grad():
            for shard in self.shards():
                shard.weight_RC[~by_name[shard.table][shard.rows].to(shard.weight_RC.device)] = 0.0

    def shards(self) -> list[Shard]:
        """The pieces of the searched tables that this rank holds, whatever the sharding."""
        return shards_of(self.module, self.configs)

    @contextmanager
    def rows_seen(self, see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call `see` with the name of a table and the ids of each feature of this rank's batches inside a `with` block."""
        of_feature = {f: self.by_config[config.name] for config in self.configs for f in config.feature_names}

        def look(_module: nn.Module, args: Any) -> None:
            for feature, jagged in args[0].to_dict().items():
                if feature in of_feature:
                    see(of_feature[feature], jagged.values())

        handle = self.module.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()


def find_collections(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths, without wrappers, and modules of the collections of a model, plain or sharded."""
    return [(path, module) for path, module in named_modules(model) if isinstance(module, (*BAGS, *SEQUENCES))]


def is_sharded(model: nn.Module) -> bool:
    """Whether a collection of a model is sharded."""
    kinds = (ShardedEmbeddingBagCollection, ShardedEmbeddingCollection)
    return any(isinstance(module, kinds) for _, module in find_collections(model))


def configs_of(module: nn.Module) -> list[Any]:
    """The configs of a collection's tables."""
    if isinstance(module, EmbeddingBagCollection):
        return list(module.embedding_bag_configs())
    if isinstance(module, EmbeddingCollection):
        return list(module.embedding_configs())
    found: Any = module
    return list(found._embedding_bag_configs if isinstance(module, BAGS) else found._embedding_configs)


def name_of(path: str, module: nn.Module, config: Any) -> str:
    """The name that a table has in plans: the path of its module in the plain collection."""
    inside = f"{'embedding_bags' if isinstance(module, BAGS) else 'embeddings'}.{config.name}"
    return f"{path}.{inside}" if path else inside


def shards_of(module: nn.Module, configs: Sequence[Any]) -> list[Shard]:
    """The pieces of a collection's tables that this rank holds."""
    state, part = module.state_dict(), "embedding_bags" if isinstance(module, BAGS) else "embeddings"
    found = []
    for config in configs:
        value = state[f"{part}.{config.name}.weight"]
        for (row, column), (rows, columns), weight, counts in _pieces(value):
            piece = slice(row, row + rows), slice(column, column + columns)
            found.append(Shard(config.name, *piece, weight.detach(), counts))
    return found


def _pieces(value: Any) -> list[tuple[Sequence[int], Sequence[int], Tensor, bool]]:
    """First row and column, size, values and whether to count, of each piece that this rank holds of a tensor."""
    if hasattr(value, "to_local"):  # a DTensor, around torchrec's wrapper of several pieces
        local = value.to_local()
        pieces = zip(local.local_offsets(), local.local_shards(), strict=True)
        return [(offset, tuple(piece.shape), piece, True) for offset, piece in pieces]
    if hasattr(value, "local_shards"):
        pieces = [(s.metadata.shard_offsets, s.metadata.shard_sizes, s.tensor, True) for s in value.local_shards()]
        return pieces
    return [((0, 0), tuple(value.shape), value, own_rank() == 0)]  # every rank has a copy


def gathered_rows(shards: Sequence[Shard], rows_N: Tensor, width: int) -> Tensor:
    """Rows (N, D) of a table on every rank: each rank adds what it holds to zeros, and all are summed."""
    found_ND = torch.zeros(len(rows_N), width)
    for shard in shards:
        if shard.counts:
            here = (rows_N >= shard.rows.start) & (rows_N < shard.rows.stop)
            local = (rows_N[here] - shard.rows.start).to(shard.weight_RC.device)
            found_ND[here, shard.columns] = shard.weight_RC[local].float().cpu()
    return summed(found_ND)


def put_rows(shards: Sequence[Shard], ids_N: Tensor, values_NW: Tensor) -> None:
    """Write rows of a compact table into the pieces of it that this rank holds."""
    for shard in shards:
        here = (ids_N >= shard.rows.start) & (ids_N < shard.rows.stop)
        columns = slice(shard.columns.start, min(shard.columns.stop, values_NW.shape[1]))
        if columns.stop > columns.start:
            local, width = (ids_N[here] - shard.rows.start).to(shard.weight_RC.device), columns.stop - columns.start
            shard.weight_RC[local, :width] = values_NW[here, columns].to(shard.weight_RC)
