"""Replacements: modules that stand in for the nn.Embedding or nn.EmbeddingBag of a foreign model in compact form.

A replacement takes the ids of the full table and gives its full width, so that nothing else in the model changes. Where
every reader of a table can take fewer columns, it gives the stored columns alone. To open a saved module takes this
file, `packing` and `embtrim.plan`, but no search code.

Shapes: N rows, D full width; ids (...) of any shape.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.errors import ModelError
from embtrim.plan.table import TablePlan, projects
from embtrim.tables.lazy_weights import WeightSource, lazy_weight
from embtrim.tables.packing import CHUNK_ROWS, packed_rows
from embtrim.tables.pooling import is_exporting, pool_entries

# Attributes that torch's modules and embeddings have of their own.
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
EMBEDDING_ATTRIBUTES = frozenset({*vars(nn.Embedding(1, 1)), *vars(nn.EmbeddingBag(1, 1))})


class ReplacedError(ModelError, AttributeError):
    """A model reads an attribute of an embedding that was replaced, and that lacks the attribute.

    It is an AttributeError too, so that `hasattr` answers no.
    """


class Replacement(nn.Module):
    """A module that stands in for an nn.Embedding or an nn.EmbeddingBag.

    Attributes:
        path: Path of the replaced module in the model.
        num_embeddings: Rows of the replaced module.
        embedding_dim: Columns returned.
        padding_idx: Padding id of the replaced module, or None.
    """

    path = ""
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    @property
    def weight(self) -> Tensor:
        """(V, D) embeddings of all ids, computed as they are read; see `embtrim.tables.lazy_weights`."""
        return lazy_weight(_Whole(self))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the embeddings that are returned."""
        raise NotImplementedError

    def all_rows(self) -> Tensor:
        """(V, D) embeddings of all ids, as they are stored: without `max_norm`, like the weight of an nn.Embedding."""
        raise NotImplementedError

    def rows_at(self, ids: Tensor) -> Tensor:
        """(..., D) embeddings of ids (...), like `all_rows`: a gradient reaches the padding row too."""
        raise NotImplementedError

    def logits(self, input: Tensor) -> Tensor:
        """(..., V) inner products of vectors (..., D) with the embeddings of all ids, without building the embeddings."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise ReplacedError(
                f"the model reads {name!r} of {self.path!r}, which a compact table does not have; keep it outside of the "
                "embedding, or leave the embedding alone with the Task's exclude="
            ) from None

    def take_attributes(self, module: nn.Module, memo: dict[int, Any]) -> None:
        """Copy what a model added to an embedding that this module replaces: attributes, parameters and modules.

        Args:
            module: The replaced embedding.
            memo: Copies that were made before, see `copy.deepcopy`.

        Raises:
            ModelError: An attribute has a name that this module uses itself.
        """
        plain = {name: value for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES}
        own = {n: v for held in (module._parameters, module._buffers, module._modules) for n, v in held.items()}
        for name, value in {**plain, **own}.items():
            if name == "weight" or (name in EMBEDDING_ATTRIBUTES and hasattr(self, name)):
                continue
            if hasattr(self, name):
                raise ModelError(
                    f"{self.path!r} has an attribute {name!r}, which is what a compact table calls something of its own; "
                    "rename it, or leave the embedding alone with the Task's exclude="
                )
            if name in module._buffers:
                self.register_buffer(name, copy.deepcopy(value, memo), name not in module._non_persistent_buffers_set)
            else:
                setattr(self, name, copy.deepcopy(value, memo))

    def full_table(self, generator: torch.Generator) -> nn.Embedding | nn.EmbeddingBag:
        """A module like the replaced one, with few rows, though its `num_embeddings` says the full number."""
        raise NotImplementedError

    def _few_rows(self, table: CompactEmbedding, generator: torch.Generator) -> nn.Embedding:
        """An nn.Embedding of few rows, the padding row among them, with the settings of a compact table."""
        num_rows = min(max(2, 1 + (self.padding_idx or 0)), self.num_embeddings)
        found = nn.Embedding(
            num_rows,
            table.full_width,
            padding_idx=self.padding_idx,
            max_norm=table.max_norm,
            norm_type=table.norm_type,
            sparse=table.sparse,
            _weight=torch.rand(num_rows, table.full_width, generator=generator).to(table.dtype),
        )
        found.num_embeddings = self.num_embeddings
        return found


class _Whole(WeightSource):
    """What is read of the weight of a replacement."""

    def __init__(self, table: Replacement) -> None:
        self.table, self.what = table, f"the weight of {table.path!r}"
        self.dtype, self.device = table.dtype, next(itertools.chain(table.parameters(), table.buffers())).device
        self.shape = (table.num_embeddings, table.embedding_dim)
        self.parameters = [p for p in table.parameters() if p.requires_grad]

    def all_rows(self) -> Tensor:
        """See WeightSource."""
        return self.table.all_rows()

    def rows_at(self, ids: Tensor) -> Tensor:
        """See WeightSource."""
        return self.table.rows_at(ids)

    def products(self, input: Tensor) -> Tensor:
        """See WeightSource."""
        return self.table.logits(input)


class CompactEmbedding(Replacement):
    """Drop-in for an nn.Embedding of which a plan keeps some columns or rows: zeros, or projections, fill the rest.

    Ids stay those of the full table. If the kept rows are the first ones, larger ids read the DROPPED row. Otherwise,
    where rows were dropped or have several widths, a map takes ids to compact ids.

    Args:
        table: Plan of the table, with its rows.
        padding_idx: As in nn.Embedding. If the plan drops the padding row, its id reads zero.
        max_norm: As in nn.Embedding, but applied to the embeddings that are returned; stored rows stay as they are.
        norm_type: As in nn.Embedding.
        sparse: As in nn.Embedding.

    Attributes:
        weights: fp32 rows of each width; empty once they are quantised.
        packed: None, or the quantised rows of each width, by the width as text.
        embedding_dim: Columns returned: D, or the stored columns after `narrow`.
        full_width: Width of the full table, D.
    """

    columns: Tensor
    id_map: Tensor | None
    packed: nn.ModuleDict | None
    zero_padding: Tensor | None

    def __init__(
        self,
        table: TablePlan,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.path = table.name
        self.embedding_dim = self.full_width = table.width
        self.num_embeddings = table.num_rows
        self.segments, self.bits = table.segments, table.bits
        self.bands = None if table.mixed else table.bands
        self.padding_idx, self.max_norm, self.norm_type, self.sparse = padding_idx, max_norm, norm_type, sparse
        id_map = table.id_map() if table.output_width else None
        self.padding_row = padding_idx if padding_idx is None or id_map is None else int(id_map[padding_idx])
        self.zeroes_padding = self.padding_row is not None and self.padding_row == table.dropped_id
        if self.zeroes_padding:
            self.padding_row = None  # the padding id shares a row that other values train
        dtype = table.map_dtype
        self.register_buffer("id_map", None if dtype is None else torch.from_numpy(id_map.astype(dtype)))  # type: ignore[union-attr]
        self.last_row = table.dropped_id if dtype is None else None
        self.weights = nn.ParameterList([torch.zeros(rows, width) for rows, width in table.segments])
        self.packed = None
        self.register_buffer("zero_padding", None)
        widths = [table.output_width] if projects(table) else table.mixed_widths
        self.projections = nn.ParameterDict({str(s): torch.zeros(s, table.width) for s in widths})
        self.register_buffer("columns", torch.tensor(table.columns, dtype=torch.int64), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) embeddings of ids (...)."""
        self.check_ids(input)
        if not self.stores_columns:
            return self.weights[0].new_zeros(*input.shape, self.embedding_dim)
        found = self._look_up(input, self.padding_row)
        if self.max_norm is not None:
            norms = found.detach().norm(self.norm_type, dim=-1, keepdim=True)
            found = found * (self.max_norm / (norms + 1e-7)).clamp(max=1.0)
        return self._without_padding(found, input)

    def _look_up(self, ids: Tensor, padding_row: int | None) -> Tensor:
        """(..., D) embeddings of ids (...); no gradient reaches the padding row."""
        self._check_not_trained()
        rows = self.rows_of(ids)
        if len(self.segments) == 1:
            return self.widen(self._read(rows, 0, 0, padding_row), self.segments[0][1])
        parts, start = [], 0
        for number, (num_rows, width) in enumerate(self.segments):
            local = rows - start
            inside = (local >= 0) & (local < num_rows)
            parts.append(self.widen(self._read(local * inside, number, start, padding_row), width) * inside[..., None])
            start += num_rows
        return sum(parts[1:], parts[0])

    def _without_padding(self, found: Tensor, ids: Tensor) -> Tensor:
        """Embeddings of ids, those of the padding id zero if its row is not stored."""
        return found.masked_fill((ids == self.padding_idx)[..., None], 0.0) if self.zeroes_padding else found

    def rows_at(self, ids: Tensor) -> Tensor:
        """See Replacement."""
        self.check_ids(ids)
        if not self.stores_columns:
            return self.weights[0].new_zeros(*ids.shape, self.embedding_dim)
        return self._without_padding(self._look_up(ids, None), ids)

    def all_rows(self) -> Tensor:
        """See Replacement."""
        if not self.stores_columns:
            return self.weights[0].new_zeros(self.num_embeddings, self.embedding_dim)
        self._check_not_trained()
        stored = [self.widen(part, width) for n, (_, width) in enumerate(self.segments) for part in self._stored(n)]
        return self._spread(stored[0] if len(stored) == 1 else torch.cat(stored), 0)

    def logits(self, input: Tensor) -> Tensor:
        """See Replacement."""
        if not self.stores_columns:
            return input.new_zeros(*input.shape[:-1], self.num_embeddings)
        self._check_not_trained()
        parts = []
        for number, (_, width) in enumerate(self.segments):
            narrow = self._narrowed(input, width)
            parts.extend(narrow @ part.T for part in self._stored(number))
        return self._spread(parts[0] if len(parts) == 1 else torch.cat(parts, -1), -1)

    def _stored(self, segment: int) -> Iterator[Tensor]:
        """The rows of a segment at their stored width; codes are decoded in chunks."""
        if self.packed is None:
            yield self.weights[segment]
            return
        num_rows, like = self.segments[segment][0], next(self.packed.buffers())
        for start in range(0, num_rows, CHUNK_ROWS):
            local = torch.arange(start, min(start + CHUNK_ROWS, num_rows), device=like.device)
            yield self._read(local, segment, 0, None)

    def _narrowed(self, wide: Tensor, width: int) -> Tensor:
        """Vectors whose products with stored rows of a width are those of the full vectors with the widened rows."""
        if str(width) in self.projections:
            return wide @ self.projections[str(width)].to(wide.dtype).T
        if width == self.embedding_dim:
            return wide
        return wide.index_select(-1, self.columns[:width])

    def _spread(self, stored: Tensor, dim: int) -> Tensor:
        """What compact rows hold, as all ids read it, along one dimension."""
        left = self.num_embeddings - stored.shape[dim]
        if self.id_map is not None:
            found = stored.index_select(dim, self.id_map.long())
        elif self.last_row is not None and left:
            dropped = stored.narrow(dim, self.last_row, 1)
            shape = list(stored.shape)
            shape[dim] = left
            found = torch.cat([stored, dropped.expand(shape)], dim)
        else:
            found = stored
        if not self.zeroes_padding:
            return found
        return found.index_fill(dim, torch.tensor([self.padding_idx], device=found.device), 0.0)

    def _check_not_trained(self) -> None:
        """Raise ModelError if codes would be trained."""
        if self.packed is not None and self.training and torch.is_grad_enabled():
            raise ModelError(f"the table of {self.path!r} is quantised, for inference only; train before quantize_()")

    def check_ids(self, ids: Tensor) -> None:
        """Raise IndexError for an id without a row, as nn.Embedding does, where no lookup of this table would.

        Ids are checked on the CPU alone: a GPU would have to be waited for, and nn.Embedding raises no IndexError there.
        """
        fails_itself = self.id_map is not None or (len(self.segments) == 1 and self.last_row is None)
        if (fails_itself and self.stores_columns) or is_exporting() or not ids.is_cpu or not ids.numel():
            return
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= self.num_embeddings:
            raise IndexError(
                f"id {low if low < 0 else high} is of no row of {self.path!r}; allowed: 0 to {self.num_embeddings - 1:,}"
            )

    @property
    def stores_columns(self) -> bool:
        """Whether any column is kept; otherwise every embedding is zero."""
        return any(width for _, width in self.segments)

    @property
    def num_full_bytes(self) -> int:
        """Bytes of the full table, in the type of its values."""
        return self.num_embeddings * self.full_width * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """See Replacement."""
        return self.weights[0].dtype if self.packed is None else self.value_dtype

    def full_table(self, generator: torch.Generator) -> nn.Embedding:
        """See Replacement."""
        return self._few_rows(self, generator)

    def rows_of(self, ids: Tensor) -> Tensor:
        """Compact ids of ids (...)."""
        if self.id_map is not None:
            return self.id_map.index_select(0, ids.flatten()).view(ids.shape).to(ids.dtype)
        return ids if self.last_row is None else ids.clamp(max=self.last_row)

    def widen(self, narrow: Tensor, width: int) -> Tensor:
        """Stored rows of one width, brought to width D. A trace knows the width as no number of Python."""
        if str(width) in self.projections:
            return narrow @ self.projections[str(width)].to(narrow.dtype)
        if width in (0, self.embedding_dim):
            return narrow if width else narrow.new_zeros(*narrow.shape[:-1], self.embedding_dim)
        return narrow.new_zeros((*narrow.shape[:-1], self.embedding_dim)).index_copy(-1, self.columns, narrow)

    @torch.no_grad()
    def set_rows(self, compact_ids: np.ndarray, values_ND: Tensor) -> None:
        """Write rows. A row takes the leading columns of its value, as many as it stores."""
        start = 0
        for weight in self.weights:
            inside = torch.from_numpy((compact_ids >= start) & (compact_ids < start + len(weight)))
            local = torch.from_numpy(compact_ids).long()[inside] - start
            weight[local] = values_ND[inside.to(values_ND.device)][:, : weight.shape[1]].to(weight)
            start += len(weight)

    def narrow(self) -> None:
        """Return the stored columns alone from now on. Rows of several widths are still returned at width D."""
        if len(self.columns) < self.embedding_dim:
            self.embedding_dim = len(self.columns)
            self.projections = nn.ParameterDict()

    @torch.no_grad()
    def quantize_(self, count_V: np.ndarray | None = None) -> None:
        """Store the rows in the bits of the plan, in place: for inference only. Projections are stored in fp16.

        All rows of one width and precision share a scale and an offset for each column. A padding row of zeros stays zero.

        Args:
            count_V: How often each row of the full table is read; see `embtrim.quantize_`.
        """
        stored = list(self.weights)
        if self.bits == 32 or self.packed is not None or not self.stores_columns:
            return
        # Not every column has a code for zero.
        zeroes = (
            self.padding_row is not None and not self(torch.tensor(self.padding_idx, device=stored[0].device)).any()
        )
        counts = None if count_V is None else self._compact_counts(count_V).split([len(weight) for weight in stored])
        self._take_packed()
        self._zero_padding(zeroes)
        for store in self.packed.values():  # type: ignore[union-attr]
            alike = [n for n, weight in enumerate(stored) if weight.shape[1] == store.width]
            values_NW = torch.cat([stored[n] for n in alike])
            count_N = None if counts is None else torch.cat([counts[n] for n in alike])
            store.store(0, torch.arange(len(values_NW), device=values_NW.device), values_NW, count_N)
        for weight in stored:  # the model may still hold them elsewhere, as in a list of weights to penalise
            weight.data = weight.data.new_zeros(0, weight.shape[1])

    def _compact_counts(self, count_V: np.ndarray) -> Tensor:
        """float32 (compact rows,): how often each is read; a padding row counts 0."""
        every = torch.arange(self.num_embeddings, device=self.weights[0].device)
        found = np.bincount(self.rows_of(every).cpu().numpy(), count_V, sum(map(len, self.weights))).astype(np.float32)
        if self.padding_row is not None:
            found[self.padding_row] = 0
        return torch.from_numpy(found).to(self.weights[0].device)

    def _take_packed(self) -> None:
        """Read from packed rows from now on; they are zero until they are stored."""
        like = self.weights[0]
        rows_by_width: dict[int, int] = {}
        for num_rows, width in self.segments:
            rows_by_width[width] = rows_by_width.get(width, 0) + num_rows
        packed = {str(w): packed_rows(w, [self.bands or ((rows, self.bits),)]) for w, rows in rows_by_width.items()}
        self.value_dtype = like.dtype
        self.packed = nn.ModuleDict(packed).to(like.device)
        self.weights = nn.ParameterList()
        for projection in self.projections.values():
            projection.data = projection.data.half()

    def _zero_padding(self, zeroes: bool) -> None:
        """Return zeros for the padding id, or what its row holds. An empty tensor in the state stands for zeros."""
        if self.padding_row is not None:
            self.zeroes_padding = zeroes
            self.register_buffer("zero_padding", torch.empty(0) if zeroes else None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(f"{prefix}packed.") for key in state_dict):
            if self.packed is None:
                self._take_packed()
            self._zero_padding(f"{prefix}zero_padding" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _read(self, local: Tensor, segment: int, start: int, padding_row: int | None) -> Tensor:
        """Stored rows of a segment, which begins at the compact id `start`."""
        num_rows, width = self.segments[segment]
        if self.packed is not None:
            before = sum(rows for rows, other in self.segments[:segment] if other == width)
            stretch = torch.zeros(1, dtype=torch.int64, device=local.device)
            return self.packed[str(width)](local + before, stretch).to(self.value_dtype)
        padding = None if padding_row is None else padding_row - start
        if padding is not None and not 0 <= padding < num_rows:
            padding = None
        return nn.functional.embedding(local, self.weights[segment], padding_idx=padding, sparse=self.sparse)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        stored = ", ".join(f"{rows:,} x {width}" for rows, width in self.segments)
        levels = [self.bits] if self.bands is None else [bits for _, bits in self.bands]
        bits = "" if self.bits == 32 else f", {', '.join(map(str, levels))} bits"
        bits += " once quantized" if bits and self.packed is None else ""
        return f"{stored} of {self.num_embeddings:,} x {self.embedding_dim}{bits}"


class CompactFlatEmbedding(Replacement):
    """Drop-in for an nn.Embedding whose ids run through several fields, with a compact table for each field.

    Args:
        tables: A compact table for each field, in the order of the ids.
        padding_idx: As in nn.Embedding.
    """

    def __init__(self, tables: Sequence[CompactEmbedding], padding_idx: int | None = None) -> None:
        super().__init__()
        self.tables = nn.ModuleList(tables)
        self.embedding_dim = tables[0].embedding_dim
        self.num_embeddings = sum(table.num_embeddings for table in tables)
        self.padding_idx = padding_idx
        ends = np.cumsum([table.num_embeddings for table in tables])
        self.register_buffer("ends", torch.from_numpy(ends), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) embeddings of ids (...)."""
        return self._forward_fixed(input) if is_exporting() else self._grouped(input, nn.Module.__call__)

    def rows_at(self, ids: Tensor) -> Tensor:
        """See Replacement."""
        return self._grouped(ids, lambda table, own: table.rows_at(own))  # type: ignore[operator]

    @property
    def dtype(self) -> torch.dtype:
        """See Replacement."""
        return self.tables[0].dtype  # type: ignore[return-value]

    def _grouped(self, input: Tensor, read: Callable[..., Tensor]) -> Tensor:
        """What a function reads of every table for its ids."""
        ids = input.flatten()
        field_N = torch.bucketize(ids.long(), self.ends[:-1], right=True)  # type: ignore[index]
        order = torch.argsort(field_N, stable=True)  # one lookup for each field, of all its ids
        counts = torch.bincount(field_N, minlength=len(self.tables)).tolist()
        parts, start = [], 0
        for table, ids_n in zip(self.tables, ids[order].split(counts), strict=True):
            parts.append(read(table, ids_n - start))
            start += table.num_embeddings  # type: ignore[operator]
        found_ND = torch.cat(parts)[torch.argsort(order)]
        return found_ND.view(*input.shape, self.embedding_dim)

    def all_rows(self) -> Tensor:
        """See Replacement."""
        return torch.cat([table.all_rows() for table in self.tables])  # type: ignore[operator]

    def logits(self, input: Tensor) -> Tensor:
        """See Replacement."""
        return torch.cat([table.logits(input) for table in self.tables], -1)  # type: ignore[operator]

    def full_table(self, generator: torch.Generator) -> nn.Embedding:
        """See Replacement."""
        return self._few_rows(self.tables[0], generator)  # type: ignore[arg-type]

    def _forward_fixed(self, input: Tensor) -> Tensor:
        """`forward` with shapes that depend on no values, for exporters: every table looks up every id."""
        found, start = None, 0
        for table in self.tables:
            num_rows: int = table.num_embeddings  # type: ignore[assignment]
            local = input - start
            # Ids below the first table or beyond the last are left to fail in its lookup.
            low, high = 0 if start else None, num_rows - 1 if start + num_rows < self.num_embeddings else None
            part = table(local.clamp(low, high))
            found = part if found is None else torch.where((local >= 0)[..., None], part, found)
            start += num_rows
        assert found is not None
        return found


class CompactEmbeddingBag(Replacement):
    """Drop-in for an nn.EmbeddingBag of mode sum or mean.

    Args:
        entries: Looks up the embeddings (..., D) of single ids (...).
        bag: The module to replace; it says how to pool.
    """

    def __init__(self, entries: CompactEmbedding | CompactFlatEmbedding, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.entries = entries
        self.embedding_dim, self.num_embeddings = bag.embedding_dim, bag.num_embeddings
        self.mode, self.include_last_offset, self.padding_idx = bag.mode, bag.include_last_offset, bag.padding_idx

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """(bags, D) pooled embeddings. Arguments are those of nn.EmbeddingBag."""
        entries = self.entries
        if self.pools_whole:
            return pool_entries(self, entries(input), input, offsets, per_sample_weights)
        assert isinstance(entries, CompactEmbedding)
        entries.check_ids(input)
        pooled = nn.functional.embedding_bag(  # at the stored width, which widens linearly
            entries.rows_of(input),
            entries.weights[0],
            offsets,
            mode=self.mode,
            sparse=entries.sparse,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=entries.padding_row,
        )
        return entries.widen(pooled, entries.segments[0][1])  # type: ignore[index]

    def all_rows(self) -> Tensor:
        """See Replacement."""
        return self.entries.all_rows()

    def logits(self, input: Tensor) -> Tensor:
        """See Replacement."""
        return self.entries.logits(input)

    def rows_at(self, ids: Tensor) -> Tensor:
        """See Replacement."""
        return self.entries.rows_at(ids)

    @property
    def dtype(self) -> torch.dtype:
        """See Replacement."""
        return self.entries.dtype

    @property
    def pools_whole(self) -> bool:
        """Whether entries are widened one by one before they are pooled."""
        entries = self.entries
        return (
            isinstance(entries, CompactFlatEmbedding)
            or len(entries.segments) > 1
            or not entries.stores_columns
            or entries.packed is not None
            or entries.zeroes_padding
            or entries.max_norm is not None
        )

    def full_table(self, generator: torch.Generator) -> nn.EmbeddingBag:
        """See Replacement."""
        entries = self.entries.full_table(generator)
        bag = nn.EmbeddingBag(
            len(entries.weight),
            entries.embedding_dim,
            max_norm=entries.max_norm,
            norm_type=entries.norm_type,
            mode=self.mode,
            sparse=entries.sparse,
            _weight=entries.weight.detach(),
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
        bag.num_embeddings = self.num_embeddings
        return bag

    def narrow(self) -> None:
        """Return the stored columns alone from now on; see CompactEmbedding."""
        assert isinstance(self.entries, CompactEmbedding)
        self.entries.narrow()
        self.embedding_dim = self.entries.embedding_dim
