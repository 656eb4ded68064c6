"""What stands in for the nn.Embedding or nn.EmbeddingBag of a foreign model once a plan made its tables smaller.

They take the ids of the full table and give its full width, so that nothing else in the model changes.

Shapes: N rows, D full width; ids (...) of any shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.plan import TablePlan, projects
from embtrim.sites import pool_entries


class CompactEmbedding(nn.Module):
    """Drop-in for an nn.Embedding of which a plan keeps some columns or rows: zeros, or projections, fill the rest.

    Ids stay those of the full table. Where the kept rows are the first ones, larger ids read the DROPPED row; else,
    where rows were dropped or re-sized, a map takes ids to compact ones.

    Args:
        table: plan of the table, with its rows.
        padding_idx: as in nn.Embedding; where the plan dropped its row it reads zero.
        max_norm: as in nn.Embedding, of what is given out; stored rows are left as they are.
        norm_type: as in nn.Embedding.
        sparse: as in nn.Embedding.
    """

    columns: Tensor
    id_map: Tensor | None

    def __init__(
        self,
        table: TablePlan,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_dim = table.width
        self.num_embeddings = table.num_rows
        self.padding_idx, self.max_norm, self.norm_type, self.sparse = padding_idx, max_norm, norm_type, sparse
        id_map = table.id_map() if table.output_width else None
        self.padding_row = padding_idx if padding_idx is None or id_map is None else int(id_map[padding_idx])
        self.drops_padding = self.padding_row is not None and self.padding_row == table.dropped_id
        if self.drops_padding:
            self.padding_row = None  # it shares a row that other values train
        dtype = table.map_dtype
        self.register_buffer("id_map", None if dtype is None else torch.from_numpy(id_map.astype(dtype)))  # type: ignore[union-attr]
        self.last_row = table.dropped_id if dtype is None else None
        self.weights = nn.ParameterList([torch.zeros(rows, width) for rows, width in table.segments])
        widths = [table.output_width] if projects(table) else table.mixed_widths
        self.projections = nn.ParameterDict({str(s): torch.zeros(s, table.width) for s in widths})
        self.register_buffer("columns", torch.tensor(table.columns, dtype=torch.int64), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) embeddings of ids (...)."""
        if not any(weight.shape[1] for weight in self.weights):
            return self.weights[0].new_zeros(*input.shape, self.embedding_dim)
        rows = self.rows_of(input)
        if len(self.weights) == 1:
            found = self.widen(self._read(rows, self.weights[0], 0))
        else:
            found = self.weights[0].new_zeros(*input.shape, self.embedding_dim)
            start = 0
            for weight in self.weights:
                local = rows - start
                inside = (local >= 0) & (local < len(weight))
                found = found + self.widen(self._read(local * inside, weight, start)) * inside[..., None]
                start += len(weight)
        if self.max_norm is not None:
            norms = found.detach().norm(self.norm_type, dim=-1, keepdim=True)
            found = found * (self.max_norm / (norms + 1e-7)).clamp(max=1.0)
        return found.masked_fill((input == self.padding_idx)[..., None], 0.0) if self.drops_padding else found

    def rows_of(self, ids: Tensor) -> Tensor:
        """Compact ids of ids (...)."""
        if self.id_map is not None:
            return self.id_map.index_select(0, ids.flatten()).view(ids.shape).to(ids.dtype)
        return ids if self.last_row is None else ids.clamp(max=self.last_row)

    def widen(self, narrow: Tensor) -> Tensor:
        """Embeddings of one width at width D."""
        width = narrow.shape[-1]
        if str(width) in self.projections:
            return narrow @ self.projections[str(width)]
        if width in (0, self.embedding_dim):
            return narrow if width else narrow.new_zeros(*narrow.shape[:-1], self.embedding_dim)
        return narrow.new_zeros((*narrow.shape[:-1], self.embedding_dim)).index_copy(-1, self.columns, narrow)

    @torch.no_grad()
    def set_rows(self, compact_ids: np.ndarray, values_ND: Tensor) -> None:
        """Write rows; of each value as many leading columns are taken as the row stores."""
        start = 0
        for weight in self.weights:
            inside = torch.from_numpy((compact_ids >= start) & (compact_ids < start + len(weight)))
            local = torch.from_numpy(compact_ids).long()[inside] - start
            weight[local] = values_ND[inside.to(values_ND.device)][:, : weight.shape[1]].to(weight)
            start += len(weight)

    def _read(self, local: Tensor, weight: Tensor, start: int) -> Tensor:
        """Rows of one of the weights, which begins at the compact id `start`."""
        padding = None if self.padding_row is None else self.padding_row - start
        if padding is not None and not 0 <= padding < len(weight):
            padding = None
        return nn.functional.embedding(local, weight, padding_idx=padding, sparse=self.sparse)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        stored = ", ".join(f"{len(w):,} x {w.shape[1]}" for w in self.weights)
        return f"{stored} of {self.num_embeddings:,} x {self.embedding_dim}"


class CompactFlatEmbedding(nn.Module):
    """Drop-in for an nn.Embedding whose ids run through several fields: a compact table for each.

    Args:
        tables: of the fields, in the order of their ids.
        padding_idx: as in nn.Embedding.
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
        ids = input.flatten()
        field_N = torch.bucketize(ids.long(), self.ends[:-1], right=True)  # type: ignore[index]
        order = torch.argsort(field_N, stable=True)  # one lookup a field, of all its ids
        counts = torch.bincount(field_N, minlength=len(self.tables)).tolist()
        parts, start = [], 0
        for table, ids_n in zip(self.tables, ids[order].split(counts), strict=True):
            parts.append(table(ids_n - start))
            start += table.num_embeddings  # type: ignore[operator]
        found_ND = torch.cat(parts)[torch.argsort(order)]
        return found_ND.view(*input.shape, self.embedding_dim)


class CompactEmbeddingBag(nn.Module):
    """Drop-in for an nn.EmbeddingBag of mode sum or mean.

    Args:
        entries: gives the embeddings (..., D) of single ids (...).
        bag: what it stands in for; says how to pool.
    """

    def __init__(self, entries: CompactEmbedding | CompactFlatEmbedding, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.entries = entries
        self.embedding_dim, self.num_embeddings = bag.embedding_dim, bag.num_embeddings
        self.mode, self.include_last_offset, self.padding_idx = bag.mode, bag.include_last_offset, bag.padding_idx

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """(bags, D) pooled embeddings; arguments as in nn.EmbeddingBag."""
        entries = self.entries
        if (
            isinstance(entries, CompactFlatEmbedding)
            or len(entries.weights) > 1
            or not entries.weights[0].shape[1]
            or entries.drops_padding
            or entries.max_norm is not None
        ):
            return pool_entries(self, entries(input), input, offsets, per_sample_weights)
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
        return entries.widen(pooled)
