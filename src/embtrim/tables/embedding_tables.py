"""EmbeddingTables: the embeddings of all fields, looked up in one storage of mixed widths.

Training looks up the distinct rows of a batch once, in buffers of their own, and expands them. With a row optimiser
attached only these buffers get gradients, and only these rows move; without one the tables are an ordinary module with
dense gradients, and any optimiser works. Inference gathers directly, with fixed shapes; so does export. Rows of
quantised tables are converted as they are gathered.

Axes: B batch, C id columns, F fields, D full width, S output columns of all fields (sum of their widths), N lookups,
U distinct rows of a batch, W width of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from embtrim.errors import ModelError, PlanError
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.schema import PAD, Schema
from embtrim.tables.kernels import Expand, kernels_for, kernels_to_read
from embtrim.tables.kernels.torch import Expansion
from embtrim.tables.layout import Group
from embtrim.tables.storage import Lookup, TableStorage
from embtrim.tables.views import EmbeddingViews

# Up to this batch size inference gathers single elements from the buffer in one call: below it the calls for each
# group cost more than the gather.
ELEMENT_GATHER_ROWS = 32

# Takes `concat` (B, S) and returns it gated.
OutputGate = Callable[[Tensor], Tensor]
# Takes storage rows (U,) and their embeddings (U, W), and returns embeddings.
RowGate = Callable[[Tensor, Tensor], Tensor]


class EmbeddingTables(TableStorage):
    """All embedding tables of a model in one flat storage, laid out by a plan. TableStorage describes what is stored.

    Args:
        schema: Fields and vocabulary sizes of the full tables.
        plan: The rows and columns to store; `SizePlan.full(schema, width)` stores everything.
        init_std: Standard deviation of the initial weights. OOV and DROPPED rows start at zero.
        generator: Source of the initial weights.

    Attributes:
        slot_gate: None, or the gate of `concat` (B, S), which may differ per sample; see `gated`.
        row_gate: None, or the gate of the distinct rows of each group, before they are pooled; see `gated`.

    Raises:
        PlanError: The plan was made for another schema.
    """

    def __init__(
        self, schema: Schema, plan: PlanShape, init_std: float = 1e-4, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(schema, plan, init_std, generator)
        self.slot_gate: OutputGate | None = None
        self.row_gate: RowGate | None = None

    # ---- gates ------------------------------------------------------------------------------------------------

    @contextmanager
    def gated(self, slot_gate: OutputGate | None = None, row_gate: RowGate | None = None) -> Iterator[None]:
        """Apply gates inside a `with` block. Gates do not nest.

        Args:
            slot_gate: Takes `concat` (B, S) and returns it gated. The gate may differ per sample.
            row_gate: Takes storage rows (U,) and their embeddings (U, W), and returns embeddings.

        Raises:
            ModelError: The tables are gated already, or quantised.
        """
        self.check_fp32()
        if self.slot_gate is not None or self.row_gate is not None:
            raise ModelError("these tables are gated already; gates do not nest")
        self.slot_gate, self.row_gate = slot_gate, row_gate
        try:
            yield
        finally:
            self.slot_gate = self.row_gate = None

    def check_free(self) -> None:
        """Raise ModelError if the tables are gated, or a row optimiser owns them."""
        if self.slot_gate is not None or self.row_gate is not None:
            raise ModelError("these tables are masked by a gate, which no file can hold; leave the `gated` block")
        super().check_free()

    def __getstate__(self) -> dict:
        # Gates belong to a `with` block, which a copy (deepcopy, a saved module) is not in.
        return {**super().__getstate__(), "slot_gate": None, "row_gate": None}

    # ---- forward ----------------------------------------------------------------------------------------------

    def forward(self, ids_BC: Tensor) -> EmbeddingViews:
        """Look up a batch.

        Args:
            ids_BC: Integer ids local to their table, PAD = -1, with one column for each id column of the schema.
        """
        layout = self.layout
        assert ids_BC.shape[1] == len(self.shift_C), f"ids have {ids_BC.shape[1]} columns, tables {len(self.shift_C)}"
        pool_BC = self._pool_weights(ids_BC) if layout.is_pooled else None
        if self.packed is not None and self.training and torch.is_grad_enabled():
            self.check_fp32()
        learns = self.row_owner is not None and self.training and torch.is_grad_enabled()
        # Rows of mixed tables are projected one by one, so distinct ones pay wherever shapes may vary.
        distinct = learns or self.row_gate is not None or (bool(layout.mixed_columns) and self.training)
        distinct = distinct and self.packed is None
        if not distinct:
            self.settle()  # `_forward_distinct` catches up the rows that it reads, and no others
        if distinct:
            concat, first_order = self._forward_distinct(ids_BC, pool_BC, learns)
        elif self.gathers_elements(ids_BC.shape[0]):
            index_BS = ids_BC[:, self.field_S] * self.width_S + self.element_S
            concat = self.weight[index_BS]
            first_order = None if self.first_order is None else self.first_order[ids_BC + self.shift_C].sum(1)
        else:
            concat, first_order = self._forward_direct(ids_BC, pool_BC)
        if self.slot_gate is not None:
            concat = self.slot_gate(concat)
        return EmbeddingViews(self, concat, first_order)

    def gathers_elements(self, batch_rows: int) -> bool:
        """Whether inference on so many rows gathers single elements from the flat buffer."""
        return not self.is_fixed and batch_rows <= ELEMENT_GATHER_ROWS and self.layout.gathers_elements

    def _pool_weights(self, ids_BC: Tensor) -> Tensor:
        """(B, C) factor of each id column: 0 for PAD, and 1 / count where a field takes the mean."""
        used_BC = (ids_BC != PAD).to(self.dtype)
        count_BF = used_BC.new_zeros(ids_BC.shape[0], self.num_fields).index_add(
            1, self.field_of_column_C.long(), used_BC
        )
        scale_BF = torch.where(self.mean_F, 1 / count_BF.clamp(min=1), 1.0)
        return used_BC * scale_BF.index_select(1, self.field_of_column_C)

    def storage_ids(self, ids_BC: Tensor) -> Tensor:
        """(B, C) storage rows of a batch of ids. PAD reads row 0 of its table, with weight zero."""
        ids_BC = ids_BC.clamp(min=0) if self.layout.is_pooled else ids_BC
        rows_BC = (ids_BC + self.shift_C).to(torch.int32)
        if self.layout.mixed_columns and self.is_fixed:
            ids = ids_BC.index_select(1, self.mixed_C)
            steps = torch.where(ids[..., None] >= self.segment_ids_CK, self.segment_steps_CK, 0).sum(-1)
            rows_BC = rows_BC.index_copy(1, self.mixed_C.long(), (ids + steps).to(torch.int32))
        elif self.layout.mixed_columns:
            key = (ids_BC[:, self.mixed_C] + self.mixed_first_id).to(torch.int32)
            segment = torch.searchsorted(self.mixed_bounds, key, right=True) - 1
            rows_BC = rows_BC.index_copy(1, self.mixed_C, key + self.mixed_shifts[segment])
        return rows_BC

    def _forward_distinct(self, ids_BC: Tensor, pool_BC: Tensor | None, learns: bool) -> tuple[Tensor, Tensor | None]:
        """Look up each distinct row once, then expand; gates and gradients see the distinct rows."""
        layout = self.layout
        weight = self.group_view(layout.groups[0])
        kernels = kernels_for(weight) if self.training else kernels_to_read(weight, ids_BC.numel())
        expansion = Expansion(
            len(ids_BC),
            sum(layout.widths),
            [self.get_buffer(name) for name in layout.column_buffers],
            [self.get_buffer(f"outputs_{number}") for number in range(len(layout.groups))],
            len(layout.column_buffers) == 1 and not layout.is_pooled,
        )
        distinct = kernels.distinct_rows(expansion, self.storage_ids(ids_BC), layout.num_rows)
        rows_U = distinct.rows_U
        edges = torch.searchsorted(rows_U, self.group_starts).tolist()
        bounds = list(itertools.pairwise(edges))
        if self.row_owner is not None:
            self.row_owner.catch_up(rows_U)
        lookup = Lookup(rows_U, bounds, [])
        sources, mixed_sources, mixed_rows = [], [], []
        for group, (low, high) in zip(layout.groups, bounds, strict=True):
            rows_g = rows_U[low:high]
            found = self._read(self.group_view(group), rows_g - group.start, learns, lookup)
            lookup.leaves.append(found)
            if self.row_gate is not None:
                found = self.row_gate(rows_g, found)
            if group.has_mixed:
                cut = int(torch.searchsorted(rows_g, group.mixed_start))
                mixed_rows.append(torch.arange(low + cut, high, device=rows_U.device))
                mixed_sources.append(self._project(group, found[cut:]))
                found = found[:cut]
            sources.append(found)
        first_U = None
        if self.first_order is not None:
            first_U = lookup.first_order_U = self._read(self.first_order, rows_U, learns, lookup)
        pool_N = None if pool_BC is None else expansion.by_group(pool_BC)
        concat, first_order = Expand.apply(kernels, expansion, distinct, edges[:-1], pool_N, first_U, *sources)
        if layout.mixed_columns:
            # Distinct rows of mixed tables, all at width D now, by their places in rows_U.
            source = torch.cat(mixed_sources)
            place_U = torch.empty(len(rows_U), dtype=torch.int64, device=rows_U.device)
            place_U[torch.cat(mixed_rows)] = torch.arange(len(source), device=rows_U.device)
            lookups = expansion.lookups[-1]
            mixed_NW = source.index_select(0, place_U.index_select(0, distinct.inverse_N[lookups]))
            if pool_N is not None:
                mixed_NW = mixed_NW * pool_N[lookups, None]
            concat = concat.index_add(1, self.mixed_outputs, mixed_NW.view(len(ids_BC), -1).to(concat.dtype))
        return concat, first_order

    def _read(self, source: Tensor, rows: Tensor, learns: bool, lookup: Lookup) -> Tensor:
        """Rows of `source`. Where a row optimiser learns, they are a leaf whose gradient adds `lookup` to the lookups."""
        if not learns:
            return source.index_select(0, rows)
        leaf = source.detach().index_select(0, rows).requires_grad_()
        leaf.register_post_accumulate_grad_hook(lambda _: self._note(lookup))
        return leaf

    def _note(self, lookup: Lookup) -> None:
        if not lookup.has_gradient:
            lookup.has_gradient = True
            self.lookups.append(lookup)

    def _forward_direct(self, ids_BC: Tensor, pool_BC: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gather every id from its group's view, or from its packed rows."""
        layout = self.layout
        rows_BC = self.storage_ids(ids_BC)
        sources = [self.group_view(g) for g in layout.groups] if self.packed is None else list(self.packed)
        indices = [
            rows_BC.index_select(1, self.get_buffer(f"columns_{number}")) - group.start
            for number, group in enumerate(layout.groups)
        ]
        mixed = None
        if layout.mixed_columns:
            rows = rows_BC.index_select(1, self.mixed_C)
            mixed = rows.new_zeros((*rows.shape, self.width), dtype=self.dtype)
            for number, (group, source) in enumerate(zip(layout.groups, sources, strict=True)):
                if group.width == 0 or not group.has_mixed:
                    continue
                local = rows - group.start
                inside = (local >= 0) & (local < group.num_rows)
                found = self._gather(source, local * inside, f"mixed_stretches_{number}").view(-1, group.width)
                mixed = mixed + self._project(group, found).view(mixed.shape) * inside[..., None]
        first_order = None
        if self.packed_first_order is not None:
            first_order = self._packed_first_order_sum(self.packed_first_order, rows_BC, pool_BC)
        elif self.first_order is not None:
            first_BC = self.first_order.index_select(0, rows_BC.reshape(-1)).view(rows_BC.shape)
            first_order = (first_BC if pool_BC is None else first_BC * pool_BC).sum(1)
        return self._assemble(sources, indices, mixed, pool_BC), first_order

    def _gather(self, source: Tensor | nn.Module, index: Tensor, stretches: str) -> Tensor:
        """Rows (*index.shape, W) of a group. `stretches` names the buffer of the stretches to which packed rows belong."""
        if isinstance(source, nn.Module):
            return source(index, self.get_buffer(stretches))
        return source.index_select(0, index.reshape(-1)).view(*index.shape, source.shape[1])

    def _packed_first_order_sum(
        self, packed_first_order: nn.ModuleDict, rows_BC: Tensor, pool_BC: Tensor | None
    ) -> Tensor | None:
        """(B,) sum of the first-order weights, or None if the tables have none."""
        total = None
        for bits, store in packed_first_order.items():
            columns = self.get_buffer(f"first_order_columns_{bits}")
            index = rows_BC.index_select(1, columns) - self.layout.first_order_start(int(bits))
            first = store(index, self.get_buffer(f"first_order_stretches_{bits}")).squeeze(-1)
            first = (first if pool_BC is None else first * pool_BC.index_select(1, columns)).sum(1)
            total = first if total is None else total + first
        return total

    def _project(self, group: Group, values: Tensor) -> Tensor:
        """Rows of mixed tables at width D: x W_s (PME) for width s, rows of width D as they are, rows of width 0 as zeros."""
        if group.width == self.width:
            return values
        if group.width == 0:
            return values.new_zeros(len(values), self.width)
        return values @ self.shared_projections[str(group.width)]

    def _assemble(
        self,
        sources: Sequence[Tensor | nn.Module],
        indices: list[Tensor],
        mixed: Tensor | None,
        pool_BC: Tensor | None,
    ) -> Tensor:
        """(B, S): expand each group's rows by its index (B, columns), pool multi-valued fields, put the fields in order."""
        outputs: dict[int, Tensor] = {}
        for number, (group, source, index) in enumerate(zip(self.layout.groups, sources, indices, strict=True)):
            if not group.fields or group.width == 0:
                continue
            found = self._gather(source, index, f"stretches_{number}")
            if pool_BC is None and len(group.fields) == self.num_fields:
                return found.view(found.shape[0], -1)
            weights = None if pool_BC is None else pool_BC.index_select(1, self.get_buffer(f"columns_{number}"))
            self._split_fields(outputs, found, group.fields, weights)
        if mixed is not None:
            weights = None if pool_BC is None else pool_BC.index_select(1, self.mixed_C)
            self._split_fields(outputs, mixed, self.layout.mixed_fields, weights)
        if not outputs:
            return self.mean_F.new_zeros((indices[0].shape[0], 0), dtype=self.dtype)
        return torch.cat([outputs[i] for i in sorted(outputs)], 1)

    def _split_fields(
        self, outputs: dict[int, Tensor], found_BCW: Tensor, fields: tuple[int, ...], weights_BC: Tensor | None
    ) -> None:
        """Add each field's pooled (B, W) output to `outputs`."""
        if weights_BC is not None:
            found_BCW = found_BCW * weights_BC[..., None]
        parts = found_BCW.split([self.layout.lengths[i] for i in fields], 1)
        for i, part in zip(fields, parts, strict=True):
            outputs[i] = part.sum(1) if self.layout.lengths[i] > 1 else part.squeeze(1)


def full_tables(
    schema: Schema,
    width: int,
    first_order: bool = False,
    init_std: float = 1e-4,
    generator: torch.Generator | None = None,
) -> EmbeddingTables:
    """Tables that store everything at one width."""
    if width < 0:
        raise PlanError(f"embedding_dim must be 0 or more, given {width}")
    return EmbeddingTables(schema, SizePlan.full(schema, width, first_order), init_std, generator)
