"""TableStorage: the rows of all embedding tables in one flat buffer, and the forms that they take for inference.

Rows are trained in one 1-D parameter `weight`, of which each group is a 2-D view (see `layout.py`). Two forms serve
inference only: one parameter for each group, for export (`split_by_width`), and rows in the bits of the plan
(`quantize_`).

Axes: N rows, D full width, R storage rows, U distinct rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.errors import ModelError
from embtrim.plan.plan import PlanShape
from embtrim.schema import Schema
from embtrim.tables.indices import Indices, index_tensors, packed_tensors, segment_tensors
from embtrim.tables.layout import Group, lay_out, places_of
from embtrim.tables.packing import BandedRows, PackedRows, counts_of, packed_rows, store_each


@dataclass
class Lookup:
    """The distinct rows of one forward pass, as leaves that collect gradients.

    Attributes:
        rows_U: int32 storage rows, ascending.
        bounds: For each group, the range of `rows_U` that lies in it.
        leaves: For each group, the looked-up rows (U_g, width). Backward sets their `.grad`.
        first_order_U: The looked-up first-order weights, or None.
        has_gradient: Whether backward has reached any of the leaves.
    """

    rows_U: Tensor
    bounds: list[tuple[int, int]]
    leaves: list[Tensor]
    first_order_U: Tensor | None = None
    has_gradient: bool = False


class RowOwner(Protocol):
    """The row optimiser that owns the updates of the rows, as far as the tables know it."""

    def catch_up(self, rows_U: Tensor | None) -> None:
        """Apply the decay owed to these storage rows (None: to all), in place."""
        ...


def normal_values(std: float, generator: torch.Generator | None, *size: int) -> Tensor:
    """Values from N(0, std^2); none are drawn on the device "meta", where torch would import its compiler to do nothing."""
    values = torch.empty(size)
    return values if values.is_meta else values.normal_(0, std, generator=generator)


def _own_storage(view: Tensor) -> Tensor:
    """A tensor over the memory of a view, with a storage that holds no more than the view."""
    return torch.from_dlpack(view.detach()) if view.numel() else view.detach().clone()


class TableStorage(nn.Module, Indices):
    """The rows of all embedding tables, read and written by table.

    Args:
        schema: Fields and vocabulary sizes of the full tables.
        plan: The rows and columns to store.
        init_std: Standard deviation of the initial weights. OOV and DROPPED rows start at zero.
        generator: Source of the initial weights.

    Attributes:
        layout: Where the rows of each table lie.
        width: Full width D.
        num_fields: Number of fields that read a table, F.
        weight: Flat fp32 rows; absent once the tables are split by width or quantised.
        first_order: (R,) first-order weights, or None.
        projection: Rows of the projections that uniform tables own, fp32. Exists if a table owns one. Quantised tables
            hold those of tables of 32 bits here, and the others in `half_projection`.
        half_projection: None, or the fp16 rows of the projections of quantised tables of fewer than 32 bits.
        shared_projections: PME's projections (s, D) of mixed tables, by the width s as text.
        weight_by_width: None, or the rows of each group by its name; see `split_by_width`.
        packed: None, or the rows of each group; see `quantize_`.
        packed_first_order: None, or the first-order weights of each precision by its bits as text; see `quantize_`.
        row_owner: None, or the row optimiser that owns the updates; see `attach`.
        lookups: Passes since the owner's last step that have gradients.

    Raises:
        PlanError: The plan was made for another schema.
    """

    def __init__(
        self, schema: Schema, plan: PlanShape, init_std: float = 1e-4, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        plan.check_schema(schema)
        self.schema = schema
        self.plan = plan
        self.layout = lay_out(schema, plan)
        self.width = plan.width
        self.num_fields = len(self.layout.fields)
        self.weight_by_width: nn.ParameterDict | None = None
        self.packed: nn.ModuleList | None = None
        self.packed_first_order: nn.ModuleDict | None = None
        self.half_projection: Tensor | None
        self.register_buffer("half_projection", None)
        self.row_owner: RowOwner | None = None
        self.lookups: list[Lookup] = []
        self._register(index_tensors(self.layout))
        self.weight = nn.Parameter(normal_values(init_std, generator, self.layout.num_elements))
        self.first_order = nn.Parameter(normal_values(init_std, generator, self.num_rows)) if plan.first_order else None
        self._init_projections(generator)
        self._zero_special_rows()

    def _register(self, indices: Mapping[str, Tensor]) -> None:
        """Make buffers of index tensors; a file does not hold them, since the plan gives them again."""
        for name, value in indices.items():
            self.register_buffer(name, value, persistent=False)

    def _init_projections(self, generator: torch.Generator | None) -> None:
        layout = self.layout
        if layout.has_projections:
            widths = [layout.widths[layout.field_of_output[s]] for s in layout.first_projected_outputs]
            noise = normal_values(1.0, generator, len(widths), self.width)
            self.projection = nn.Parameter(noise * torch.tensor([width**-0.5 for width in widths])[:, None])
        self.shared_projections = nn.ParameterDict(
            {
                str(s): nn.Parameter(normal_values(s**-0.5, generator, s, self.width))
                for s in self.plan.shared_projection_widths
            }
        )

    @torch.no_grad()
    def _zero_special_rows(self) -> None:
        """OOV and DROPPED rows start at zero, so that an untrained one adds no noise."""
        found = [np.empty(0, np.int64)]
        for table in self.plan.tables:
            special = [row for row in (table.dropped_id, table.oov_id()) if row is not None]
            found.append(self.storage_rows(table.name, np.array(special, np.int64)))
        rows = np.concatenate(found)
        for inside, group in self._groups_of(rows):
            self.group_view(group)[torch.from_numpy(rows[inside] - group.start)] = 0.0
        if self.first_order is not None:
            self.first_order[torch.from_numpy(rows)] = 0.0

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of rows of one width and precision."""
        return self.layout.groups

    @property
    def num_rows(self) -> int:
        """Storage rows, R."""
        return self.layout.num_rows

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each field in `concat`."""
        return self.layout.widths

    # ---- reading and writing rows by table --------------------------------------------------------------------

    def group_view(self, group: Group) -> Tensor:
        """The (num_rows, width) view of a group's rows.

        Raises:
            ModelError: The tables are quantised.
        """
        self.check_fp32()
        if self.weight_by_width is not None:
            return self.weight_by_width[group.name]
        return self.weight[group.offset : group.offset + group.num_rows * group.width].view(group.num_rows, group.width)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows as they are read."""
        return torch.float32 if self.packed is not None else self.group_view(self.groups[0]).dtype

    def storage_rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Storage rows of compact ids of a table."""
        return self.layout.storage_rows(name, ids)

    @torch.no_grad()
    def get_rows(self, name: str, ids: np.ndarray) -> list[tuple[np.ndarray, Tensor]]:
        """Stored rows of a table, by width: (positions in `ids`, values (N, width)) for each width among them."""
        return [(inside, view[index]) for inside, index, view in self._by_group(name, ids)]

    @torch.no_grad()
    def set_rows(self, name: str, ids: np.ndarray, values_ND: Tensor) -> None:
        """Write rows of a table. A row takes the leading columns of its value, as many as it stores."""
        for inside, index, view in self._by_group(name, ids):
            values = values_ND[torch.from_numpy(inside).to(values_ND.device), : view.shape[1]]
            view[index] = values.to(self.weight)

    def _by_group(self, name: str, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """For each group that has any of the rows: their positions in `ids`, their places in its view, and the view."""
        self.check_fp32()
        self.settle()  # decay is owed on the weights as they are, also on those that are about to be overwritten
        rows = self.storage_rows(name, ids)
        for inside, group in self._groups_of(rows):
            index = torch.from_numpy(rows[inside] - group.start).to(self.weight.device)
            yield inside, index, self.group_view(group)

    def _groups_of(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Group]]:
        """The groups that have any of the storage rows, each with the positions of its rows."""
        numbers = np.searchsorted([group.stop for group in self.groups], rows, side="right")
        for number in np.unique(numbers):
            yield np.flatnonzero(numbers == number), self.groups[number]

    # ---- the row optimiser, copies and files ------------------------------------------------------------------

    def attach(self, optimizer: RowOwner | None) -> None:
        """Let a row-sparse optimiser own the updates; None releases the tables, with all decay owed applied."""
        self.check_fp32()
        self.settle()
        self.lookups.clear()
        self.row_owner = optimizer

    def settle(self) -> None:
        """Apply the decay that untouched rows are owed; needed before weights are read from outside."""
        if self.row_owner is not None:
            self.row_owner.catch_up(None)

    def __getstate__(self) -> dict:
        # A copy (deepcopy, a saved module) has settled weights and no optimiser of its own.
        self.settle()
        return {**self.__dict__, "row_owner": None, "lookups": []}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.settle()  # decay is owed on the weights as they are, which are about to be overwritten
        if self.packed is None and any(key.startswith(f"{prefix}packed.") for key in state_dict):
            # A file of an earlier release holds projections in fp32, which stay as they are.
            self._take_packed(*self._empty_packed(), halves=f"{prefix}half_projection" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- quantised --------------------------------------------------------------------------------------------

    def check_fp32(self) -> None:
        """Raise ModelError if the tables are quantised: they can only be read."""
        if self.packed is not None:
            raise ModelError(
                "these tables are quantised, for inference only; train, search and change the model before "
                "model.tables.quantize_(), or store them in fp32 again with model.tables.dequantize_()"
            )

    def check_quantized(self) -> None:
        """Raise ModelError if the tables are fp32 and their plan says fewer bits."""
        if self.plan.is_quantized and self.packed is None:
            raise ModelError(
                "the plan of this model says fewer than 32 bits, but its tables are still fp32; call model.tables.quantize_() "
                "once it is trained, or compact with plan.with_bits(32)"
            )

    def check_free(self) -> None:
        """Raise ModelError if a row optimiser owns the tables."""
        if self.row_owner is not None:
            raise ModelError("a row optimiser owns these tables; release them with model.tables.attach(None)")

    @property
    def is_fixed(self) -> bool:
        """Whether the tables have a form for inference only: split by width, or quantised."""
        return self.weight_by_width is not None or self.packed is not None

    @torch.no_grad()
    def quantize_(self, counts: Mapping[str, np.ndarray] | None = None) -> None:
        """Store the tables in the bits of their plan, in place: for inference only. Shared projections stay fp32.

        Args:
            counts: How often each stored row of a table occurs in the training data, by table (rows,), such as
                `data.recode(plan).value_counts()` gives. Scales are then fitted for the least error of what is read;
                None counts all rows alike.

        Raises:
            ModelError: The tables are quantised already, are split by width, are gated, or a row optimiser owns them; or
                the counts are not one for each row.

        Example:
            >>> from embtrim.plan.plan import SizePlan
            >>> plan = SizePlan.full(Schema.from_sizes([100, 10]), width=4).with_bits(8)
            >>> tables = TableStorage(Schema.from_sizes([100, 10]), plan)
            >>> tables.quantize_()
            >>> sum(b.nbytes for b in tables.state_dict().values()) == plan.num_bytes()
            True
        """
        self.check_fp32()
        self.check_free()
        if self.weight_by_width is not None:
            raise ModelError("these tables are split by width, for export; quantise the model before you split them")
        packed, packed_first_order = self._empty_packed()
        count_R = None if counts is None else self.by_storage_row(counts)
        store_each(
            (store, stretch, local, rows_RW[local], None if count_R is None else count_R[rows])
            for store, stretch, rows, local, rows_RW in self._stretches(packed, packed_first_order)
        )
        self._take_packed(packed, packed_first_order)

    @torch.no_grad()
    def dequantize_(self) -> None:
        """Store quantised tables in fp32 again, with the values that their codes stand for, in place: to train on."""
        if self.packed is None or self.packed_first_order is None:
            return
        packed, packed_first_order = list(self.packed), dict(self.packed_first_order.items())
        device = self.shift_C.device
        if self.half_projection is not None:
            self.projection, self.half_projection = nn.Parameter(self.projections().clone()), None
        self.packed = self.packed_first_order = None
        self.weight = nn.Parameter(torch.zeros(self.layout.num_elements, device=device))
        if self.plan.first_order:
            self.first_order = nn.Parameter(torch.zeros(self.num_rows, device=device))
        for store, stretch, _, local, rows_RW in self._stretches(packed, packed_first_order):
            rows_RW[local] = store(local[:, None], torch.tensor([stretch], device=device))[:, 0]

    def _stretches(
        self, packed: Sequence[nn.Module], packed_first_order: Mapping[str, nn.Module]
    ) -> Iterator[tuple[Any, int, Tensor, Tensor, Tensor]]:
        """For each stretch: its packed rows, its number among them, its storage rows, their places, and the fp32 rows of all places."""
        layout = self.layout
        places = [places_of(group.tables) for group in self.groups]
        first_order_places = {bits: places_of(layout.first_order_tables(bits)) for bits in layout.first_order_bits}
        starts = {bits: layout.first_order_start(bits) for bits in layout.first_order_bits}
        for table in self.plan.tables:
            rows = torch.from_numpy(self.storage_rows(table.name, np.arange(table.num_compact_rows)))
            rows = rows.to(self.weight.device)
            for group, store, place in zip(self.groups, packed, places, strict=True):
                if table.name in place:
                    inside = rows[(rows >= group.start) & (rows < group.stop)]
                    yield store, place[table.name], inside, inside - group.start, self.group_view(group)
            if self.first_order is not None:
                bits, start = table.first_order_bits, starts[table.first_order_bits]
                stretch = first_order_places[bits][table.name]
                yield packed_first_order[str(bits)], stretch, rows, rows - start, self.first_order[start:, None]

    def by_storage_row(self, counts: Mapping[str, np.ndarray]) -> Tensor:
        """float32 (storage rows,): the counts of tables' rows, by table (rows,), where these rows are stored.

        Raises:
            ModelError: There is not one for each row of each table.
        """
        found = np.zeros(self.num_rows, np.float32)
        for table in self.plan.tables:
            rows = table.num_compact_rows
            found[self.storage_rows(table.name, np.arange(rows))] = counts_of(counts, table.name, rows)
        return torch.from_numpy(found).to(self.weight.device)

    def packed_pieces(self, name: str) -> list[tuple[PackedRows, int, Tensor]]:
        """Where the rows of a quantised table are stored, in order of their compact ids: packed rows, stretch, and places."""
        assert self.packed is not None
        rows = torch.from_numpy(self.storage_rows(name, np.arange(self.layout.tables[name].num_compact_rows)))
        found = []
        for group, store in zip(self.groups, self.packed, strict=True):
            if name in (place := places_of(group.tables)):
                local = rows[(rows >= group.start) & (rows < group.stop)] - group.start
                pieces = store.pieces(place[name], local, local, None)  # type: ignore[operator]
                found += [(packed, stretch, places) for packed, stretch, places, *_ in pieces]
        return found

    def projections(self) -> Tensor:
        """The rows of all projections that uniform tables own, in fp32."""
        if self.half_projection is None:
            return self.projection
        return torch.cat([self.projection, self.half_projection.float()]).index_select(0, self.projection_places)

    def _empty_packed(self) -> tuple[list[PackedRows | BandedRows], dict[str, PackedRows]]:
        """Room for the rows of each group, and for the first-order weights of each precision."""
        device = self.weight.device
        packed = [packed_rows(g.width, self.layout.bands(g)).to(device) for g in self.groups]
        first_order = {}
        for bits in self.layout.first_order_bits:
            tables = [self.layout.tables[name] for name in self.layout.first_order_tables(bits)]
            num_rows = sum(t.num_compact_rows for t in tables)
            first_order[str(bits)] = PackedRows(num_rows, 1, bits, len(tables)).to(device)
        return packed, first_order

    def _take_packed(
        self,
        packed: Sequence[PackedRows | BandedRows],
        packed_first_order: Mapping[str, PackedRows],
        *,
        halves: bool = True,
    ) -> None:
        """Read from packed rows from now on; with `halves`, from projections in fp16 where their tables have fewer bits."""
        device = self.shift_C.device
        if halves and any(self.layout.is_half_projection):
            is_half_P = np.array(self.layout.is_half_projection)
            half_P, full_P = (torch.tensor(np.flatnonzero(part), device=device) for part in (is_half_P, ~is_half_P))
            self.half_projection = self.projection[half_P].half()
            self.projection = nn.Parameter(self.projection[full_P])
        self.packed, self.packed_first_order = nn.ModuleList(packed), nn.ModuleDict(packed_first_order)
        del self.weight
        self.first_order = None
        self._register({name: value.to(device) for name, value in packed_tensors(self.layout).items()})

    # ---- export -----------------------------------------------------------------------------------------------

    def split_by_width(self) -> None:
        """Take the form that is exported, for good: inference only, on one path for any batch size.

        `weight` gives way to one parameter for each group, so that a graph gathers from a table instead of slicing it
        out of the buffer first. Each has a storage of its own over the memory of the buffer, because torch.export.save
        mistakes views of one storage for each other.
        Ids of mixed tables find their segment by comparison, because ONNX has no binary search. To keep the files small,
        indices are int32, and matrices of 0 and 1 are built from them.
        """
        # Rows are gathered at every batch size, not elements. In onnxruntime a gather of elements takes 30 us against 60
        # at batch 1 where a plan left several widths, but 30 against 23 with full tables and 40 ms against 7 at batch 4096.
        if self.packed is None:
            self.weight_by_width = nn.ParameterDict(
                {g.name: nn.Parameter(_own_storage(self.group_view(g)), requires_grad=False) for g in self.groups}
            )
            del self.weight
            if self.layout.mixed_columns:
                device = self.shift_C.device
                self._register({name: value.to(device) for name, value in segment_tensors(self.layout).items()})
        if not self.layout.is_equal_width:
            self.fixed_projection_SD = None
        for name, value in list(self.named_buffers(recurse=False)):
            if value.dtype == torch.int64:
                self.register_buffer(name, value.int(), persistent=False)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        widths = ", ".join(f"{g.num_rows:,} x {g.width}" for g in self.groups)
        return f"fields={self.num_fields}, rows by width: {widths}, first_order={self.plan.first_order}"
