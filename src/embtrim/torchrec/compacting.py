"""Compact collections: the tables of a plan inside a collection that looks like the full one from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    KeyedTensor,
)

from embtrim.errors import ModelError, PlanError
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import TablePlan, padded_width
from embtrim.system.modules import named_modules
from embtrim.torchrec.sites import configs_of, find_collections, name_of


def compact(make_model: Callable[[], nn.Module], plan: SizePlan) -> nn.Module:
    """A model with compact collections in the place of full ones, to be sharded as any other.

    The tables lie on the device on which `make_model` makes its own, and have initial weights until `inherit` gives them
    those of the full model. Widths are filled up to multiples of four, which FBGEMM's kernels need; `plan.num_bytes("fbgemm")` counts them.

    Args:
        make_model: Makes the full model with plain collections, best on the device "meta": its tables are never filled.
        plan: Plan of a search in the model.

    Raises:
        PlanError: The plan names a table that the model does not have, or has tables that a collection cannot hold: rows
            of several widths, projected columns, or bits.
        ModelError: The model has no collection, or a sharded one.
    """
    model = make_model()
    tables = {table.name: table for table in plan.tables}
    found = find_collections(model)
    if not found:
        raise ModelError(f"make_model() gave a {type(model).__name__} without a collection of torchrec")
    for path, module in found:
        if not isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            raise ModelError(f"make_model() gave a sharded collection, {path!r}; give the model before it is sharded")
        own = {c.name: tables.pop(name_of(path, module, c), None) for c in configs_of(module)}
        kept = {name: table for name, table in own.items() if table is not None}
        if not kept:
            continue
        is_bags = isinstance(module, EmbeddingBagCollection)
        small = CompactCollection(module, kept) if is_bags else CompactSequences(module, kept)
        if not path:
            model = small
        else:
            parent, _, name = path.rpartition(".")
            setattr(dict(named_modules(model))[parent], name, small)
    if tables:
        raise PlanError(
            f"the plan is for a table {next(iter(tables))!r}, which the model of make_model() does not have"
        )
    return model


class _Compact(nn.Module):
    """What compact collections share: the smaller configs, ids of the compact tables, and the columns that they stand for.

    Args:
        full: The plain collection.
        tables: Plans of its tables by the name of the config; other tables stay as they are.
    """

    def __init__(self, full: nn.Module, tables: Mapping[str, TablePlan]) -> None:
        super().__init__()
        configs = configs_of(full)
        self.features = [feature for config in configs for feature in config.feature_names]
        self.widths = [config.embedding_dim for config in configs for _ in config.feature_names]
        self._width_of = dict(zip(self.features, self.widths, strict=True))
        self._plans: dict[str, TablePlan] = {}
        self._table_of: dict[str, int] = {}  # number of each feature's table, which its buffers are called after
        self._device: torch.device = full.device  # type: ignore[assignment]
        self.small: list[Any] = []
        self.removed: list[Any] = []  # configs of tables without columns
        for number, config in enumerate(configs):
            table = tables.get(config.name)
            if table is not None:
                _check(table, config)
                if not table.output_width:
                    self.removed.append(config)
                    continue
                self._plans |= dict.fromkeys(config.feature_names, table)
                self._table_of |= dict.fromkeys(config.feature_names, number)
                id_map = table.id_map() if table.renumbers and not table.keeps_first_rows else None
                if id_map is not None:
                    self._hold(f"map_{number}", torch.from_numpy(id_map.astype(table.map_dtype, copy=False)))
                if table.output_width < table.width:
                    self._hold(f"columns_{number}", torch.tensor(table.columns))
            self.small.append(config if table is None else _small_config(config, table))
        self.read = [feature for config in self.small for feature in config.feature_names]

    def _hold(self, name: str, values: Tensor) -> None:
        """Register a buffer. Tables on the device "meta" are made when they are sharded; their maps are known now."""
        there = values if self._device.type == "meta" else values.to(self._device)
        self.register_buffer(name, there, persistent=False)

    def renumbered(self, given: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The features of the tables that are left, with the ids of the compact tables."""
        if not self._plans and list(given.keys()) == self.read:
            return given
        parts = given.to_dict()
        own = [parts[feature] for feature in self.read]
        weights = [part.weights_or_none() for part in own]
        ids = [self._ids(feature, part.values()) for feature, part in zip(self.read, own, strict=True)]
        weighted = None if any(w is None for w in weights) else torch.cat(weights)  # type: ignore[arg-type]
        lengths = torch.cat([part.lengths() for part in own])
        return KeyedJaggedTensor.from_lengths_sync(self.read, torch.cat(ids), lengths, weighted)

    def _ids(self, feature: str, ids: Tensor) -> Tensor:
        table = self._plans.get(feature)
        if table is None or not table.renumbers:
            return ids
        if table.keeps_first_rows:
            return ids.clamp(max=table.num_kept)
        return self.get_buffer(f"map_{self._table_of[feature]}")[ids].to(ids.dtype)

    def wide(self, feature: str, narrow: Tensor) -> Tensor:
        """Embeddings (N, D) of a feature from what the compact table gives, (N, columns and filling)."""
        width, table = self._width_of[feature], self._plans.get(feature)
        if table is None or table.output_width == width:
            return narrow[:, :width]
        columns = self.get_buffer(f"columns_{self._table_of[feature]}")
        return narrow.new_zeros(len(narrow), width).index_copy(1, columns, narrow[:, : len(columns)])


class CompactCollection(_Compact):
    """Stands for an EmbeddingBagCollection: the same ids in, a KeyedTensor of the full widths out."""

    def __init__(self, full: EmbeddingBagCollection, tables: Mapping[str, TablePlan]) -> None:
        super().__init__(full, tables)
        self.collection = (
            EmbeddingBagCollection(tables=self.small, is_weighted=full.is_weighted(), device=self._device)
            if self.small
            else None
        )

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """A batch of ids -> the pooled embeddings of all features, in the order of the full collection."""
        size = features.stride()
        found = {} if self.collection is None else self.collection(self.renumbered(features)).to_dict()
        like = next(iter(found.values()), self._no_values(features))
        parts = [
            self.wide(feature, found[feature]) if feature in found else like.new_zeros(size, width)
            for feature, width in zip(self.features, self.widths, strict=True)
        ]
        return KeyedTensor(self.features, self.widths, torch.cat(parts, 1))

    @staticmethod
    def _no_values(features: KeyedJaggedTensor) -> Tensor:
        return torch.zeros(0, device=features.values().device)


class CompactSequences(_Compact):
    """Stands for an EmbeddingCollection: the same ids in, a JaggedTensor of the full width for each feature out.

    An EmbeddingCollection has one width, so there is one collection inside for each width.
    """

    def __init__(self, full: EmbeddingCollection, tables: Mapping[str, TablePlan]) -> None:
        super().__init__(full, tables)
        widths = sorted({config.embedding_dim for config in self.small})
        self.collections = nn.ModuleDict(
            {
                str(width): EmbeddingCollection(
                    tables=[c for c in self.small if c.embedding_dim == width], device=self._device
                )
                for width in widths
            }
        )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """A batch of ids -> the embeddings of every id, by feature."""
        given, found = features.to_dict(), {}
        if self.read:
            renumbered = self.renumbered(features)
            for collection in self.collections.values():
                names = [name for config in configs_of(collection) for name in config.feature_names]
                found |= dict(collection(_chosen(renumbered, names)).items())
        like = next((jagged.values() for jagged in found.values()), torch.zeros(0, device=features.values().device))
        return {
            name: JaggedTensor(
                self.wide(name, found[name].values())
                if name in found
                else like.new_zeros(len(given[name].values()), width),
                lengths=given[name].lengths(),
            )
            for name, width in zip(self.features, self.widths, strict=True)
        }


def _chosen(given: KeyedJaggedTensor, names: Sequence[str]) -> KeyedJaggedTensor:
    parts = given.to_dict()
    values, lengths = (torch.cat([getattr(parts[name], what)() for name in names]) for what in ("values", "lengths"))
    return KeyedJaggedTensor.from_lengths_sync(list(names), values, lengths)


def _check(table: TablePlan, config: Any) -> None:
    if (table.num_rows, table.width) != (config.num_embeddings, config.embedding_dim):
        raise PlanError(
            f"the plan's table {table.name!r} is {table.num_rows:,} x {table.width}, the model's is "
            f"{config.num_embeddings:,} x {config.embedding_dim}; make the plan for this model"
        )
    if table.mixed:
        raise PlanError(
            f"the plan's table {table.name!r} has rows of several widths, which a collection of torchrec cannot hold; compact the "
            "model in one process, with plain collections, by embtrim.compact(model, plan), and train it there; or search by a "
            "method that gives all rows of a table one width, as all but pme do"
        )
    reasons = {
        "narrow rows that are projected": table.alignment == "project" and table.output_width < table.width,
        f"values of {table.bits} bits": table.bits != 32 or len(table.bands) > 1,
    }
    for what, is_so in reasons.items():
        if is_so:
            raise PlanError(
                f"the plan's table {table.name!r} has {what}, which a collection of torchrec cannot hold while it trains; search "
                "with align = 'scatter' and bits = 32"
            )


def _small_config(config: Any, table: TablePlan) -> Any:
    """The config of a compact table."""
    kind = EmbeddingBagConfig if isinstance(config, EmbeddingBagConfig) else EmbeddingConfig
    own: dict[str, Any] = {"pooling": config.pooling} if kind is EmbeddingBagConfig else {}
    return kind(
        name=config.name,
        embedding_dim=padded_width(table.output_width),
        num_embeddings=table.num_compact_rows,
        feature_names=list(config.feature_names),
        data_type=config.data_type,
        **own,
    )
