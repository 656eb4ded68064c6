"""Sites: the places where embeddings enter a model, and the gates that a search puts on them.

A site is the EmbeddingTables of a zoo model (one site for all fields), or one nn.Embedding or nn.EmbeddingBag of a
foreign model. Its *slots* are (table, column) pairs. A search reads a Task and its sites, and knows neither the model
nor the kind of site.

There are two gates. A *slot gate* multiplies the output of a site, after pooling, and may differ per sample. A *row
gate* sees the distinct rows of a batch before they are expanded and pooled; through it a search masks single rows or
reads their gradients. Rows of a site are numbered table by table.

Shapes: S slots of a site, B batch, O output columns of a site, U distinct rows of a batch, V rows of a table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.errors import ModelError
from embtrim.schema import OOV
from embtrim.system.modules import reads_given, uncompiled
from embtrim.tables.embedding_tables import EmbeddingTables, OutputGate, RowGate
from embtrim.tables.lazy_weights import WeightSource, lazy_weight
from embtrim.tables.pooling import pool_entries

SlotGate = Tensor | OutputGate


class Site(Protocol):
    """A place where embeddings enter a model.

    Attributes:
        names: Names of the site's tables.
        num_rows: Rows of each table.
        widths: Columns of each table.
        reserved_rows: Row of each table that is kept longer than all others (OOV or a padding row), or None.
        shows_rows: Whether a row gate sees the rows of every read. Otherwise some reads are pooled before they are seen.
    """

    names: tuple[str, ...]
    num_rows: tuple[int, ...]
    widths: tuple[int, ...]
    reserved_rows: tuple[int | None, ...]
    shows_rows: bool

    def gated(self, slots: SlotGate | None = None, rows: RowGate | None = None) -> AbstractContextManager[None]:
        """Apply gates inside a `with` block. Gates of one site do not nest.

        Args:
            slots: Tensor (S,) or (B, S) that multiplies the slots, table by table and column by column; or a function of
                the pooled output (B, O), field by field.
            rows: Function of (rows of the site (U,), their embeddings (U, D)) that returns embeddings.
        """
        ...

    def weights(self) -> list[Tensor]:
        """Embeddings (V, D) of each table: views of the parameters, without gradient."""
        ...

    def drop_rows(self, kept: Sequence[Tensor]) -> None:
        """Set rows and their first-order weights to zero, in place.

        Args:
            kept: Rows to leave alone: bool (V,) for each table.
        """
        ...


class TableSite:
    """The full EmbeddingTables of a zoo model; fields that share a table share its slots."""

    shows_rows = True

    def __init__(self, tables: EmbeddingTables) -> None:
        if not tables.plan.keeps_all:
            raise ModelError("these tables are compact already; search in the full model")
        self.tables = tables
        plans = tables.plan.tables
        self.names = tuple(t.name for t in plans)
        self.num_rows = tuple(t.num_rows for t in plans)
        self.widths = tuple(t.output_width for t in plans)
        self.reserved_rows: tuple[int | None, ...] = (OOV,) * len(plans)
        first = dict(zip(self.names, np.cumsum([0, *self.widths[:-1]]).tolist(), strict=True))
        slots = [
            first[f.table_name] + column
            for f, width in zip(tables.schema.id_fields, tables.widths, strict=True)
            for column in range(width)
        ]
        # None if no table is shared: the slots are then the output columns, in order.
        self.slot_of_output = None if slots == list(range(len(slots))) else torch.tensor(slots)

    def gated(self, slots: SlotGate | None = None, rows: RowGate | None = None) -> AbstractContextManager[None]:
        """See Site."""
        if isinstance(slots, Tensor):
            by_output = slots if self.slot_of_output is None else slots[..., self.slot_of_output.to(slots.device)]
            return self.tables.gated(lambda concat: concat * by_output, rows)
        return self.tables.gated(slots, rows)

    def weights(self) -> list[Tensor]:
        """See Site."""
        self.tables.settle()
        stored = self.tables.group_view(self.tables.groups[0]).detach()  # full tables: one width, in the schema's order
        return list(stored.split(self.num_rows))

    @torch.no_grad()
    def drop_rows(self, kept: Sequence[Tensor]) -> None:
        """See Site."""
        dropped_R = ~torch.cat(list(kept))
        self.tables.settle()
        self.tables.group_view(self.tables.groups[0])[dropped_R] = 0.0
        if self.tables.first_order is not None:
            self.tables.first_order[dropped_R] = 0.0


class ModuleSite:
    """An nn.Embedding or nn.EmbeddingBag of a foreign model, called any number of times in a forward pass.

    A *flat table* holds several fields, whose ids follow each other. Its site has one table per field, and slot gates act
    on single entries before they are pooled.

    Args:
        name: Path of the module. Tables of a flat one are called "path[field]".
        module: Module that holds the weight.
        fields: Rows of each field of a flat table, in order.

    The weight may be read whole too: as `module.weight`, or as a parameter of another module. Its gates then see all rows,
    and a slot function sees them as samples.

    Attributes:
        path: Path of the module.
        modules: The module, and all others with the same weight and the same settings.
        readers: Other modules that hold the weight, such as a tied output layer, and the names of their parameters.
    """

    shows_rows = True

    def __init__(
        self, name: str, module: nn.Embedding | nn.EmbeddingBag, fields: Mapping[str, int] | None = None
    ) -> None:
        self.path, self.module = name, module
        self.modules = [module]
        self.readers: list[tuple[nn.Module, str]] = []
        self.names = tuple(f"{name}[{field}]" for field in fields) if fields else (name,)
        self.num_rows = tuple(fields.values()) if fields else (module.num_embeddings,)
        self.widths = (module.embedding_dim,) * len(self.names)
        first = np.cumsum([0, *self.num_rows]).tolist()
        row = module.padding_idx
        self.reserved_rows: tuple[int | None, ...] = tuple(
            row - low if row is not None and low <= row < high else None for low, high in itertools.pairwise(first)
        )

    @contextmanager
    def gated(self, slots: SlotGate | None = None, rows: RowGate | None = None) -> Iterator[None]:
        """See Site. A slot function gets the module's output (..., D), or ones (B, S) if the table is flat."""
        by_entry = slots if len(self.names) > 1 else None
        called: list[nn.Module] = []

        def enter(module: nn.Module, _args: Any) -> None:
            called.append(module)

        def apply(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            called.remove(module)
            if rows is not None or by_entry is not None:
                ids, offsets, weights = read_call(args, kwargs)
                entries = self._gated_rows(ids, rows, module.padding_idx)
                if by_entry is not None:
                    entries = entries * self._entry_gates(by_entry, ids, *_samples(module, ids, offsets))
                output = pool_entries(module, entries, ids, offsets, weights)
            return output if slots is None or by_entry is not None else _gated_output(output, slots)

        def read(module: nn.Module) -> Tensor:
            return self.weight if module in called else lazy_weight(_Gated(self, slots, rows))

        with ExitStack() as stack:
            for module, name in self.holders:
                stack.enter_context(reads_given(module, name, partial(read, module)))
            for module in self.modules:
                for handle in (
                    module.register_forward_pre_hook(enter),
                    module.register_forward_hook(apply, with_kwargs=True),
                ):
                    stack.callback(handle.remove)
            yield

    @property
    def weight(self) -> nn.Parameter:
        """The weight (V, D) of the site, whatever gates are on it."""
        return self.module._parameters["weight"]  # type: ignore[return-value]

    @property
    def holders(self) -> list[tuple[nn.Module, str]]:
        """All modules that hold the weight, and the names of their parameters."""
        return [*((module, "weight") for module in self.modules), *self.readers]

    def _gated_rows(self, ids: Tensor, rows: RowGate | None, padding_idx: int | None) -> Tensor:
        """Embeddings (..., D) of ids (...), whose distinct rows the row gate saw."""
        rows_U, inverse = torch.unique(ids, return_inverse=True)
        found_UD = nn.functional.embedding(rows_U, self.weight, padding_idx=padding_idx, sparse=self.module.sparse)
        return (found_UD if rows is None else rows(rows_U, found_UD))[inverse]

    def _entry_gates(self, slots: SlotGate, ids: Tensor, sample: Tensor, size: int) -> Tensor:
        """Factors (..., D) of the entries of a flat table, by the field of each id and by its sample, one of `size`."""
        width = self.widths[0]
        ends = torch.tensor(np.cumsum(self.num_rows), device=ids.device)
        field = torch.bucketize(ids.long(), ends, right=True)
        if isinstance(slots, Tensor) and slots.ndim == 1:
            return nn.functional.embedding(field, slots.view(-1, width))
        if not isinstance(slots, Tensor):
            slots = slots(self.weight.new_ones(size, len(self.names) * width))
        return slots.view(size, -1, width)[sample, field]

    def weights(self) -> list[Tensor]:
        """See Site."""
        return list(self.weight.detach().split(self.num_rows))

    @torch.no_grad()
    def drop_rows(self, kept: Sequence[Tensor]) -> None:
        """See Site."""
        self.weight[~torch.cat(list(kept))] = 0.0


class _Gated(WeightSource):
    """The weight of a site under its gates, as it is read outside of the site's modules."""

    def __init__(self, site: ModuleSite, slots: SlotGate | None, rows: RowGate | None) -> None:
        self.site, self.slots, self.rows = site, slots, rows
        self.has_graph = torch.is_grad_enabled()
        self.what, self.shape = f"the weight of {site.path!r}", (site.weight.shape[0], site.weight.shape[1])
        self.dtype, self.device, self.parameters = site.weight.dtype, site.weight.device, (site.weight,)

    def all_rows(self) -> Tensor:
        """See WeightSource. A function of its own computes its gradient itself, without the gates."""
        if self.has_graph and not torch.is_grad_enabled():
            raise ModelError(
                f"a torch.autograd.Function, or a block under no_grad, takes {self.what} from outside, where the gates of a "
                "search do not reach; read the weight inside, or leave it alone with the Task's exclude="
            )
        site, slots, ids = self.site, self.slots, torch.arange(self.shape[0], device=self.device)
        found = site.weight if self.rows is None else self.rows(ids, site.weight)
        if slots is None:
            return found
        if isinstance(slots, Tensor) and slots.ndim > 1:
            raise ModelError(f"{site.path!r} is read whole, which has no samples, but its slot gate differs per sample")
        if len(site.names) > 1:
            return found * site._entry_gates(slots, ids, torch.zeros_like(ids), 1)
        return _gated_output(found, slots)

    def rows_at(self, ids: Tensor) -> Tensor:
        """See WeightSource."""
        site, slots = self.site, self.slots
        found = site._gated_rows(ids, self.rows, None)
        if slots is None:
            return found
        if len(site.names) == 1:
            return _gated_output(found, slots)
        return found * site._entry_gates(slots, ids, *_samples(site.module, ids, None))

    def products(self, input: Tensor) -> Tensor:
        """See WeightSource."""
        return nn.functional.linear(input, self.all_rows())


def _gated_output(output: Tensor, slots: SlotGate) -> Tensor:
    """Embeddings (..., D) under a slot gate of one table."""
    if not isinstance(slots, Tensor):
        return slots(output)
    return output * (slots if slots.ndim == 1 else slots.view(len(slots), *[1] * (output.ndim - 2), -1))


def _samples(module: Any, ids: Tensor, offsets: Tensor | None) -> tuple[Tensor, int]:
    """The sample of each id in a call of an nn.Embedding or nn.EmbeddingBag, and the number of samples."""
    if offsets is None:
        return torch.arange(len(ids), device=ids.device).view(-1, *[1] * (ids.ndim - 1)), len(ids)
    sample = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets.long(), right=True) - 1
    return sample, len(offsets) - bool(module.include_last_offset)


def read_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids, offsets and per-sample weights of one call of an nn.Embedding or nn.EmbeddingBag."""
    given = {**dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)), **kwargs}
    return given["input"], given.get("offsets"), given.get("per_sample_weights")


@contextmanager
def gate_sites(
    sites: Sequence[Site], slots: Sequence[SlotGate] | None = None, rows: Sequence[RowGate | None] | None = None
) -> Iterator[None]:
    """Gate every site inside a `with` block, with one slot gate and one row gate for each site.

    What torch.compile made of the model runs without compilation meanwhile: compiled code does not see the gates.
    """
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for number, site in enumerate(sites):
            stack.enter_context(site.gated(slots[number] if slots else None, rows[number] if rows else None))
        yield


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Restore embeddings with max_norm after a `with` block: torch renormalises their rows in place as it reads them."""
    limited = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None]
    weights = [module.weight for module in limited]
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, values in zip(weights, before, strict=True):
                weight.copy_(values)


def weights_by_table(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Embeddings (V, D) of every table by its name; see `Site.weights`."""
    return {name: weight_VD for site in sites for name, weight_VD in zip(site.names, site.weights(), strict=True)}


def num_slots(site: Site) -> int:
    """Number of slots of a site, S."""
    return sum(site.widths)
