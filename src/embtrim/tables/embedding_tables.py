"""EmbeddingTables: the embeddings of all fields in one flat buffer, with mixed widths.

Storage. One 1-D parameter `weight`. Rows are numbered so that the rows of one width lie together: a *group* is a 2-D
view of the buffer, and there are as many groups as distinct widths, not as many as fields. A *storage row* is a row's
number over all groups; first-order weights, one a row, have the same numbering (so a table of width 0 still has rows).

Paths. Training looks up the distinct rows of a batch once, in buffers of their own, and expands them; with a row
optimiser attached only these buffers get gradients, and only these rows move. Without one the tables are an ordinary
module with dense gradients, and any optimiser works. Inference gathers directly, with fixed shapes; so does export, from
one parameter a group (see `split_by_width`). A trained model whose plan says fewer bits is quantised, for inference only
(see `quantize`): a group then is of one precision too, and rows are converted as they are gathered.

Axes: B batch, C id columns, F fields, D full width, S output columns of all fields (sum of their widths), U distinct
rows of a batch, R storage rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.errors import EmbtrimError, PlanError
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import projects
from embtrim.schema import PAD, Schema
from embtrim.tables.kernels import Expand, kernels_for
from embtrim.tables.kernels.fm import FMTerm
from embtrim.tables.kernels.torch import Expansion
from embtrim.tables.packing import PackedRows

# Up to this batch size inference gathers single elements from the buffer in one call: below it the calls for each
# group cost more than the gather.
ELEMENT_GATHER_ROWS = 32

SlotGate = Callable[[Tensor], Tensor]
RowGate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Group:
    """The rows of one width and precision: storage rows `start .. start + num_rows`, elements from `offset` on."""

    width: int
    bits: int
    start: int
    num_rows: int
    offset: int
    # Storage rows from here to the group's end belong to mixed tables, whose rows are projected to D.
    mixed_start: int
    # Id columns of the uniform tables in this group, and their fields.
    columns: tuple[int, ...]
    fields: tuple[int, ...]
    # Tables that have rows here, in order.
    tables: tuple[str, ...]

    @property
    def name(self) -> str:
        """The width as text, with the bits where there are fewer than 32."""
        return str(self.width) if self.bits == 32 else f"{self.width}_{self.bits}bit"

    @property
    def has_mixed(self) -> bool:
        """Whether any of the rows belong to mixed tables."""
        return self.mixed_start < self.start + self.num_rows


@dataclass
class Lookup:
    """The distinct rows of one forward pass, as leaves that collect gradients.

    Attributes:
        rows_U: int32 storage rows, ascending.
        bounds: for each group, the range of `rows_U` that lies in it.
        leaves: for each group, the looked-up rows (U_g, width); `.grad` is set by backward.
        first_order_U: the looked-up first-order weights, or None.
    """

    rows_U: Tensor
    bounds: list[tuple[int, int]]
    leaves: list[Tensor]
    first_order_U: Tensor | None = None
    has_gradient: bool = False


class RowOptimizer(Protocol):
    """What the tables need of a row-sparse optimiser (see optim.py)."""

    def catch_up(self, rows_U: Tensor | None) -> None:
        """Apply the decay owed to these storage rows (None: to all), in place."""
        ...


@dataclass
class EmbeddingViews:
    """What a model reads: the embeddings of one batch, in the form that each part needs."""

    tables: EmbeddingTables
    concat: Tensor
    """(B, S) embeddings side by side in field order, each as wide as its plan says."""
    first_order: Tensor | None = None
    """(B,) sum of the first-order weights, or None if the tables have none."""
    _aligned: Tensor | None = field(default=None, repr=False)

    @property
    def aligned(self) -> Tensor:
        """(B, F, D) embeddings brought to the full width, by scatter or projection."""
        if self._aligned is None:
            self._aligned = self.tables.align(self.concat)
        return self._aligned

    def fm(self) -> Tensor:
        """(B,) FM term: sum over pairs of fields of the inner products of aligned embeddings (Rendle 2010).

        Narrow tables never build (B, F, D): with P the stacked projections, the square of the sum is (E P)^2. The sum
        of squares is that of the outputs themselves, and for the projected ones among them rowsum((E G) * E) with
        G = blockdiag(P_f P_f^T).
        """
        tables, concat = self.tables, self.concat
        projection_SD = None if tables.is_equal_width else tables.projection_SD()
        gram_PP = tables.gram_PP() if tables.has_projections else None
        if not torch.compiler.is_compiling():  # what is exported or compiled is left to torch, operator by operator
            projected = None if gram_PP is None or len(gram_PP) == concat.shape[1] else tables.projected_outputs
            return FMTerm.apply(concat, tables.num_fields, projection_SD, projected, gram_PP)
        if projection_SD is None:
            sum_BD = concat.view(concat.shape[0], tables.num_fields, tables.width).sum(1)
        else:
            sum_BD = concat @ projection_SD
        if gram_PP is None:
            return 0.5 * ((sum_BD * sum_BD).sum(1) - (concat * concat).sum(1))
        projected_BP = concat.index_select(1, tables.projected_outputs)
        plain_BS = concat.index_select(1, tables.plain_outputs)
        squares_B = (plain_BS * plain_BS).sum(1) + ((projected_BP @ gram_PP) * projected_BP).sum(1)
        return 0.5 * ((sum_BD * sum_BD).sum(1) - squares_B)


class EmbeddingTables(nn.Module):
    """All embedding tables of a model in one flat storage, laid out by a plan.

    Args:
        schema: fields and vocabulary sizes of the full tables.
        plan: what to store of them (`SizePlan.full(schema, width)` for everything).
        init_std: standard deviation of the initial weights; OOV and DROPPED rows start at zero.
        generator: source of the initial weights.

    Attributes:
        widths: columns of each field in `concat`.
        slot_gate: if set, applied to `concat` (B, S); may differ per sample. See `gated`.
        row_gate: if set, applied to (storage rows (U,), their embeddings (U, D)) of each group, before pooling.
        weight_by_width: None, or the rows of each group by its name; see `split_by_width`.
        packed: None, or the rows of each group; and
        packed_first_order: the first-order weights of each precision, by its bits as text; see `quantize`.

    Raises:
        PlanError: the plan was made for another schema.
    """

    # Index buffers, derived from the plan; see _lay_out.
    group_starts: Tensor
    shift_C: Tensor
    mean_F: Tensor
    field_of_column_C: Tensor
    place_S: Tensor
    element_S: Tensor
    field_S: Tensor
    width_S: Tensor
    fixed_projection_SD: Tensor | None
    same_field_PP: Tensor | None
    plain_outputs: Tensor
    projected_S: Tensor
    projected_outputs: Tensor
    projection_rows: Tensor
    mixed_C: Tensor
    mixed_first_id: Tensor
    mixed_bounds: Tensor
    mixed_shifts: Tensor
    segment_ids_CK: Tensor
    segment_steps_CK: Tensor

    def __init__(
        self, schema: Schema, plan: PlanShape, init_std: float = 1e-4, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        plan.check_schema(schema)
        self.schema = schema
        self.plan = plan
        self.width = plan.width
        self.num_fields = len(schema.id_fields)
        self.slot_gate: SlotGate | None = None
        self.row_gate: RowGate | None = None
        self.lookups: list[Lookup] = []
        self.weight_by_width: nn.ParameterDict | None = None
        self.packed: nn.ModuleList | None = None
        self.packed_first_order: nn.ModuleDict | None = None
        self._optimizer: RowOptimizer | None = None
        self._lay_out()
        self.weight = nn.Parameter(torch.empty(self._num_elements).normal_(0, init_std, generator=generator))
        self.first_order = (
            nn.Parameter(torch.empty(self.num_rows).normal_(0, init_std, generator=generator))
            if plan.first_order
            else None
        )
        self._init_projections(generator)
        self._zero_special_rows()

    # ---- layout -----------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Number the storage rows and derive the index buffers that forward needs."""
        tables = {table.name: table for table in self.plan.tables}
        fields = self.schema.id_fields
        names = [f.table_name for f in fields]
        segments = [  # ((bits, width), mixed, table, segment, rows)
            ((table.bits, width), table.mixed, table.name, number, rows)
            for table in self.plan.tables
            for number, (rows, width) in enumerate(table.segments)
        ]
        segments.sort(key=lambda s: s[1])  # stable: the schema's order within a group
        self.segment_starts: dict[str, list[int]] = {t.name: [0] * len(t.segments) for t in self.plan.tables}
        groups: list[Group] = []
        row = element = 0
        for kind in sorted({s[0] for s in segments}, reverse=True):
            bits, width = kind
            start, offset, mixed_start = row, element, None
            members: list[str] = []
            for _, mixed, name, number, rows in (s for s in segments if s[0] == kind):
                if mixed and mixed_start is None:
                    mixed_start = row
                self.segment_starts[name][number] = row
                members.append(name)
                row += rows
                element += rows * width
            own = tuple(
                i
                for i, n in enumerate(names)
                if not tables[n].mixed and (tables[n].bits, tables[n].output_width) == kind
            )
            columns = tuple(
                c for i in own for c in range(*self.schema.column_slices[i].indices(self.schema.num_id_columns))
            )
            mixed_start = row if mixed_start is None else mixed_start
            members = list(dict.fromkeys(members))
            groups.append(Group(width, bits, start, row - start, offset, mixed_start, columns, own, tuple(members)))
        self.groups = tuple(groups)
        self.num_rows = row
        self._num_elements = element
        self.widths = tuple(tables[n].output_width for n in names)
        self.mixed_fields = tuple(i for i, n in enumerate(names) if tables[n].mixed)
        self.is_equal_width = all(w == self.width for w in self.widths)
        self.has_projections = any(projects(tables[n]) for n in names)

        self._buffer("group_starts", torch.tensor([g.start for g in groups] + [row], dtype=torch.int32))
        starts = [
            0 if tables[n].mixed else self.segment_starts[n][0]
            for f, n in zip(fields, names, strict=True)
            for _ in range(f.length)
        ]
        self._buffer("shift_C", torch.tensor(starts, dtype=torch.int32))
        field_of_column = [i for i, f in enumerate(fields) for _ in range(f.length)]
        self._mixed_columns = [c for c, i in enumerate(field_of_column) if i in self.mixed_fields]
        if self._mixed_columns:
            self._lay_out_mixed([names[field_of_column[c]] for c in self._mixed_columns])
        # Where each field's output begins, and for the id columns of a group the output columns of their rows.
        begins = [0, *itertools.accumulate(self.widths)]

        def outputs_of(columns: Iterable[int], width: int) -> Tensor:
            return torch.tensor(
                [begins[field_of_column[c]] + w for c in columns for w in range(width)], dtype=torch.int64
            )

        for number, group in enumerate(groups):
            self._buffer(f"columns_{number}", torch.tensor(group.columns, dtype=torch.int64))
            self._buffer(f"outputs_{number}", outputs_of(group.columns, group.width))
        self._column_buffers = [f"columns_{number}" for number in range(len(groups))]
        if self._mixed_columns:
            self._buffer("mixed_outputs", outputs_of(self._mixed_columns, self.width))
            self._column_buffers.append("mixed_C")
        self.is_pooled = any(f.length > 1 or f.type == "multi" for f in fields)
        self._lengths = [f.length for f in fields]
        self._buffer("mean_F", torch.tensor([f.pooling == "mean" for f in fields]))
        self._buffer("field_of_column_C", torch.tensor(field_of_column, dtype=torch.int64))

        # Where output column s stands in the full width, its field, and - for gathers of single elements - its address.
        place_S = [c for n in names for c in tables[n].columns]
        field_S = [i for i, w in enumerate(self.widths) for _ in range(w)]
        self._buffer(
            "place_S",
            torch.tensor([i * self.width + c for i, c in zip(field_S, place_S, strict=True)], dtype=torch.int64),
        )
        # A projection belongs to its table: fields that share the table share its rows of `projection`.
        own_rows = [s for s, i in enumerate(field_S) if projects(tables[names[i]])]
        first_output: dict[tuple[str, int], int] = {}
        for s in own_rows:
            first_output.setdefault((names[field_S[s]], place_S[s]), s)
        self.projected_columns = list(first_output.values())
        row_of = {key: row for row, key in enumerate(first_output)}
        if not self.is_equal_width:
            plain = sorted(set(range(len(field_S))) - set(own_rows))
            self._buffer("plain_outputs", torch.tensor(plain, dtype=torch.int64))
            # Of each row of `projection` the first output it projects; and all outputs projected, with their rows.
            self._buffer("projected_S", torch.tensor(self.projected_columns, dtype=torch.int64))
            self._buffer("projected_outputs", torch.tensor(own_rows, dtype=torch.int64))
            rows = [row_of[names[field_S[s]], place_S[s]] for s in own_rows]
            self._buffer("projection_rows", torch.tensor(rows, dtype=torch.int64))
            self._buffer("fixed_projection_SD", self._scatter_SD())
            self._buffer("same_field_PP", self._same_field_PP())
        if not self.mixed_fields and not self.is_pooled:
            group_of = {i: g for g in groups for i in g.fields}
            address = [
                group_of[i].offset + (self.segment_starts[names[i]][0] - group_of[i].start) * w
                for i, w in enumerate(self.widths)
            ]
            within = np.concatenate([np.arange(w) for w in self.widths]) if self.widths else np.zeros(0)
            self._buffer("element_S", torch.tensor(within + np.repeat(address, self.widths), dtype=torch.int64))
            self._buffer("field_S", torch.tensor(field_S, dtype=torch.int64))
            self._buffer("width_S", torch.tensor(np.repeat(self.widths, self.widths), dtype=torch.int64))

    def _lay_out_mixed(self, names: list[str]) -> None:
        """Index buffers that take an id of a mixed table to its storage row, by the segment it lies in."""
        tables = {table.name: table for table in self.plan.tables}
        first_id, bounds, shifts = {}, [], []
        total = 0
        for name in dict.fromkeys(names):
            first_id[name] = total
            local = 0
            for (rows, _), start in zip(tables[name].segments, self.segment_starts[name], strict=True):
                bounds.append(total + local)
                shifts.append(start - total - local)
                local += rows
            total += local
        self._buffer("mixed_C", torch.tensor(self._mixed_columns, dtype=torch.int64))
        self._buffer("mixed_first_id", torch.tensor([first_id[n] for n in names], dtype=torch.int32))
        self._buffer("mixed_bounds", torch.tensor(bounds, dtype=torch.int32))
        self._buffer("mixed_shifts", torch.tensor(shifts, dtype=torch.int32))

    def _buffer(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def _init_projections(self, generator: torch.Generator | None) -> None:
        widths = [self.widths[i] for i in range(self.num_fields) for _ in range(self.widths[i])]
        if self.has_projections:
            std = torch.tensor([widths[s] ** -0.5 for s in self.projected_columns])
            noise = torch.empty(len(self.projected_columns), self.width).normal_(generator=generator)
            self.projection = nn.Parameter(noise * std[:, None])
        self.shared_projections = nn.ParameterDict(
            {
                str(s): nn.Parameter(torch.empty(s, self.width).normal_(0, s**-0.5, generator=generator))
                for s in self.plan.shared_projection_widths
            }
        )

    @torch.no_grad()
    def _zero_special_rows(self) -> None:
        """OOV and DROPPED rows start at zero, so that an untrained one adds no noise."""
        for table in self.plan.tables:
            special = [] if table.dropped_id is None else [table.dropped_id]
            oov = table.oov_id()
            for row in special + ([] if oov is None else [oov]):
                self.set_rows(table.name, np.array([row]), torch.zeros(1, self.width))
                if self.first_order is not None:
                    self.first_order[int(self.storage_rows(table.name, np.array([row]))[0])] = 0.0

    # ---- reading and writing rows by table --------------------------------------------------------------------

    def group_view(self, group: Group) -> Tensor:
        """The (num_rows, width) view of a group's rows; EmbtrimError if the tables are quantised."""
        self.check_fp32()
        if self.weight_by_width is not None:
            return self.weight_by_width[group.name]
        return self.weight[group.offset : group.offset + group.num_rows * group.width].view(group.num_rows, group.width)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.packed is not None else self.group_view(self.groups[0]).dtype

    def storage_rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Storage rows of compact ids of a table."""
        table = next(t for t in self.plan.tables if t.name == name)
        ends = np.cumsum([rows for rows, _ in table.segments])
        segment = np.searchsorted(ends, ids, side="right")
        starts = ends - [rows for rows, _ in table.segments]
        return ids - starts[segment] + np.array(self.segment_starts[name])[segment]

    @torch.no_grad()
    def get_rows(self, name: str, ids: np.ndarray) -> list[tuple[np.ndarray, Tensor]]:
        """Stored rows of a table, by width: (positions in `ids`, values (n, width)) for each width among them."""
        self.check_fp32()
        self.settle()
        rows = self.storage_rows(name, ids)
        found = []
        for group in self.groups:
            inside = np.flatnonzero((rows >= group.start) & (rows < group.start + group.num_rows))
            if len(inside):
                index = torch.from_numpy(rows[inside] - group.start).to(self.weight.device)
                found.append((inside, self.group_view(group)[index]))
        return found

    @torch.no_grad()
    def set_rows(self, name: str, ids: np.ndarray, values_ND: Tensor) -> None:
        """Write rows of a table; of each value as many leading columns are taken as the row stores."""
        self.check_fp32()
        self.settle()  # decay owed is owed on the weights that are about to go
        rows = self.storage_rows(name, ids)
        for group in self.groups:
            inside = np.flatnonzero((rows >= group.start) & (rows < group.start + group.num_rows))
            if len(inside):
                index = torch.from_numpy(rows[inside] - group.start).to(self.weight.device)
                values = values_ND[torch.from_numpy(inside).to(values_ND.device), : group.width]
                self.group_view(group)[index] = values.to(self.weight)

    # ---- optimiser and gates ----------------------------------------------------------------------------------

    def attach(self, optimizer: RowOptimizer | None) -> None:
        """Let a row-sparse optimiser own the updates (None: release the tables, all decay owed being settled)."""
        self.check_fp32()
        self.settle()
        self.lookups.clear()
        self._optimizer = optimizer

    def settle(self) -> None:
        """Apply the decay that untouched rows are owed; needed before weights are read from outside."""
        if self._optimizer is not None:
            self._optimizer.catch_up(None)

    def __getstate__(self) -> dict:
        # A copy (deepcopy, a saved module) has settled weights and no optimiser of its own.
        self.settle()
        return {**self.__dict__, "_optimizer": None, "lookups": [], "slot_gate": None, "row_gate": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.settle()  # decay owed is owed on the weights that are about to go
        if self.packed is None and any(key.startswith(f"{prefix}packed.") for key in state_dict):
            self._take_packed(*self._empty_packed())
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def gated(self, slot_gate: SlotGate | None = None, row_gate: RowGate | None = None) -> Iterator[None]:
        """Apply gates inside a `with` block; see the class attributes. Gates do not nest."""
        self.check_fp32()
        if self.slot_gate is not None or self.row_gate is not None:
            raise EmbtrimError("these tables are gated already; gates do not nest")
        self.slot_gate, self.row_gate = slot_gate, row_gate
        try:
            yield
        finally:
            self.slot_gate = self.row_gate = None

    def check_free(self) -> None:
        """Raise EmbtrimError if the tables are gated, or a row optimiser owns them."""
        if self.slot_gate is not None or self.row_gate is not None:
            raise EmbtrimError("these tables are masked by a gate, which no file can hold; leave the `gated` block")
        if self._optimizer is not None:
            raise EmbtrimError("a row optimiser owns these tables; release them with model.tables.attach(None)")

    def check_fp32(self) -> None:
        """Raise EmbtrimError if the tables are quantised: they can only be read."""
        if self.packed is not None:
            raise EmbtrimError(
                "these tables are quantised, for inference only; train, search and change the model before "
                "model.tables.quantize(), or go on from what its codes read with model.tables.dequantize()"
            )

    def check_quantized(self) -> None:
        """Raise EmbtrimError if the tables are fp32 and their plan says fewer bits."""
        if self.plan.is_quantized and self.packed is None:
            raise EmbtrimError(
                "the plan of this model says fewer than 32 bits, its tables are fp32 still; call model.tables.quantize() "
                "once it is trained, or compact with plan.with_bits(32)"
            )

    # ---- quantised ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def quantize(self) -> None:
        """Store the tables in the bits of their plan, in place: for inference only. Projections stay fp32.

        Raises:
            EmbtrimError: the tables are quantised already, are split by width, are gated, or a row optimiser owns them.

        Example:
            >>> plan = SizePlan.full(Schema.from_sizes([100, 10]), width=4).with_bits(8)
            >>> tables = EmbeddingTables(Schema.from_sizes([100, 10]), plan)
            >>> tables.quantize()
            >>> sum(b.nbytes for b in tables.state_dict().values()) == plan.num_bytes()
            True
        """
        self.check_fp32()
        self.check_free()
        if self.weight_by_width is not None:
            raise EmbtrimError("these tables are split by width, for export; quantise the model before that")
        packed, packed_first_order = self._empty_packed()
        for store, stretch, local, rows_RW in self._stretches(packed, packed_first_order):
            store.store(stretch, local, rows_RW[local])
        self._take_packed(packed, packed_first_order)

    @torch.no_grad()
    def dequantize(self) -> None:
        """Store quantised tables in fp32 again, as their codes read, in place: to train on."""
        if self.packed is None or self.packed_first_order is None:
            return
        packed, packed_first_order = list(self.packed), dict(self.packed_first_order.items())
        device = self.shift_C.device
        self.packed = self.packed_first_order = None
        self.weight = nn.Parameter(torch.zeros(self._num_elements, device=device))
        if self.plan.first_order:
            self.first_order = nn.Parameter(torch.zeros(self.num_rows, device=device))
        for store, stretch, local, rows_RW in self._stretches(packed, packed_first_order):
            rows_RW[local] = store(local[:, None], torch.tensor([stretch], device=device))[:, 0]

    def _stretches(
        self, packed: Sequence[nn.Module], packed_first_order: Mapping[str, nn.Module]
    ) -> Iterator[tuple[Any, int, Tensor, Tensor]]:
        """For each stretch its packed rows, its number there, the places of its rows, and the fp32 rows of all places."""
        for table in self.plan.tables:
            rows = torch.from_numpy(self.storage_rows(table.name, np.arange(table.num_compact_rows)))
            rows = rows.to(self.weight.device)
            for group, store in zip(self.groups, packed, strict=True):
                local = rows[(rows >= group.start) & (rows < group.start + group.num_rows)] - group.start
                if table.name in group.tables:
                    yield store, group.tables.index(table.name), local, self.group_view(group)
            if self.first_order is not None:
                bits = table.first_order_bits
                start = self._first_order_start(bits)
                stretch = self._names_of_first_order(bits).index(table.name)
                yield packed_first_order[str(bits)], stretch, rows - start, self.first_order[start:, None]

    def _empty_packed(self) -> tuple[list[PackedRows], dict[str, PackedRows]]:
        """Room for the rows of each group, and for the first-order weights of each precision."""
        device = self.weight.device
        packed = [PackedRows(g.num_rows, g.width, g.bits, len(g.tables)).to(device) for g in self.groups]
        first_order = {}
        for bits in sorted({t.first_order_bits for t in self.plan.tables}) if self.plan.first_order else ():
            tables = [t for t in self.plan.tables if t.first_order_bits == bits]
            num_rows = sum(t.num_compact_rows for t in tables)
            first_order[str(bits)] = PackedRows(num_rows, 1, bits, len(tables)).to(device)
        return packed, first_order

    def _take_packed(self, packed: Sequence[PackedRows], packed_first_order: Mapping[str, PackedRows]) -> None:
        """Read from packed rows from now on, with the index buffers that this takes."""
        names = [f.table_name for f in self.schema.id_fields for _ in range(f.length)]
        device = self.weight.device
        self.packed, self.packed_first_order = nn.ModuleList(packed), nn.ModuleDict(packed_first_order)
        del self.weight
        self.first_order = None
        for number, group in enumerate(self.groups):
            stretches = [group.tables.index(names[c]) for c in group.columns]
            self._buffer(f"stretches_{number}", torch.tensor(stretches, dtype=torch.int64, device=device))
            # A mixed table without rows here reads those of another, times zero.
            mixed = [names[c] for c in self._mixed_columns]
            stretches = [group.tables.index(name) if name in group.tables else 0 for name in mixed]
            self._buffer(f"mixed_stretches_{number}", torch.tensor(stretches, dtype=torch.int64, device=device))
        for bits in map(int, packed_first_order):
            tables = self._names_of_first_order(bits)
            columns = [c for c, name in enumerate(names) if name in tables]
            stretches = [tables.index(names[c]) for c in columns]
            self._buffer(f"first_order_columns_{bits}", torch.tensor(columns, dtype=torch.int64, device=device))
            self._buffer(f"first_order_stretches_{bits}", torch.tensor(stretches, dtype=torch.int64, device=device))
        if self._mixed_columns:
            self._lay_out_segments()

    def _names_of_first_order(self, bits: int) -> list[str]:
        """Tables whose first-order weights have so many bits."""
        return [t.name for t in self.plan.tables if t.first_order_bits == bits]

    def _first_order_start(self, bits: int) -> int:
        """The first storage row whose first-order weight has so many bits: groups are in order of their bits."""
        return sum(t.num_compact_rows for t in self.plan.tables if t.first_order_bits > bits)

    # ---- export -----------------------------------------------------------------------------------------------

    def split_by_width(self) -> None:
        """Take the form that is exported, for good: inference only, on one path for any batch size.

        `weight` gives way to one parameter a group, so that a graph gathers from a table instead of slicing it out of
        the buffer first; a copy, because torch.export.save mistakes views of one storage for each other. Ids of mixed
        tables find their segment by comparison, because ONNX has no binary search. What is stored beside the tables is
        small: indices are int32, and matrices of 0 and 1 are built from them.
        """
        # Why rows and not elements at every batch size: in onnxruntime a gather of elements takes 30 us against 60 at
        # batch 1 where a plan left several widths, but 30 against 23 of full tables and 40 ms against 7 at batch 4096.
        if self.packed is None:
            self.weight_by_width = nn.ParameterDict(
                {g.name: nn.Parameter(self.group_view(g).detach().clone(), requires_grad=False) for g in self.groups}
            )
            del self.weight
            if self._mixed_columns:
                self._lay_out_segments()
        if not self.is_equal_width:
            self.fixed_projection_SD = self.same_field_PP = None
        for name, value in list(self.named_buffers(recurse=False)):
            if value.dtype == torch.int64:
                self._buffer(name, value.int())

    def _lay_out_segments(self) -> None:
        """For each id column of a mixed table, the first id of each segment and how far storage rows jump there."""
        tables = {table.name: table for table in self.plan.tables}
        names = [f.table_name for f in self.schema.id_fields for _ in range(f.length)]
        mixed = [names[c] for c in self._mixed_columns]
        num_segments = max(len(tables[name].segments) for name in mixed)
        # Segments that a table does not have start at its first id and jump by nothing.
        segment_ids_CK = torch.zeros(len(mixed), num_segments, dtype=torch.int32)
        segment_steps_CK = torch.zeros_like(segment_ids_CK)
        for c, name in enumerate(mixed):
            first_ids = [0, *itertools.accumulate(rows for rows, _ in tables[name].segments)][:-1]
            shifts = [start - first for start, first in zip(self.segment_starts[name], first_ids, strict=True)]
            segment_ids_CK[c, : len(first_ids)] = torch.tensor(first_ids)
            segment_steps_CK[c, : len(shifts)] = torch.tensor([b - a for a, b in itertools.pairwise([0, *shifts])])
        self._buffer("segment_ids_CK", segment_ids_CK.to(self.mixed_C.device))
        self._buffer("segment_steps_CK", segment_steps_CK.to(self.mixed_C.device))

    # ---- forward ----------------------------------------------------------------------------------------------

    def forward(self, ids_BC: Tensor) -> EmbeddingViews:
        """Look up a batch.

        Args:
            ids_BC: integer ids local to their table, PAD = -1; one column an id column of the schema.
        """
        assert ids_BC.shape[1] == len(self.shift_C), f"ids have {ids_BC.shape[1]} columns, tables {len(self.shift_C)}"
        pool_BC = self._pool_weights(ids_BC) if self.is_pooled else None
        if self.packed is not None and self.training and torch.is_grad_enabled():
            self.check_fp32()
        learns = self._optimizer is not None and self.training and torch.is_grad_enabled()
        # Rows of mixed tables are projected one by one, so distinct ones pay wherever shapes may vary.
        distinct = learns or self.row_gate is not None or (bool(self._mixed_columns) and self.training)
        distinct = distinct and self.packed is None
        if not distinct:
            self.settle()  # otherwise the rows that are read are caught up, and no others
        if distinct:
            concat, first_order = self._forward_distinct(ids_BC, pool_BC, learns)
        elif not self.is_fixed and ids_BC.shape[0] <= ELEMENT_GATHER_ROWS and hasattr(self, "element_S"):
            index_BS = ids_BC[:, self.field_S] * self.width_S + self.element_S
            concat = self.weight[index_BS]
            first_order = None if self.first_order is None else self.first_order[ids_BC + self.shift_C].sum(1)
        else:
            concat, first_order = self._forward_direct(ids_BC, pool_BC)
        if self.slot_gate is not None:
            concat = self.slot_gate(concat)
        return EmbeddingViews(self, concat, first_order)

    @property
    def is_fixed(self) -> bool:
        """Whether the tables have a form for inference only: split by width, or quantised."""
        return self.weight_by_width is not None or self.packed is not None

    def _pool_weights(self, ids_BC: Tensor) -> Tensor:
        """(B, C) factor of each id column: 0 for PAD, and 1 / count where a field takes the mean."""
        used_BC = (ids_BC != PAD).to(self._dtype)
        count_BF = used_BC.new_zeros(ids_BC.shape[0], self.num_fields).index_add(
            1, self.field_of_column_C.long(), used_BC
        )
        scale_BF = torch.where(self.mean_F, 1 / count_BF.clamp(min=1), 1.0)
        return used_BC * scale_BF.index_select(1, self.field_of_column_C)

    def storage_ids(self, ids_BC: Tensor) -> Tensor:
        """(B, C) storage rows of a batch of ids; PAD reads row 0 of its table, with weight zero."""
        ids_BC = ids_BC.clamp(min=0) if self.is_pooled else ids_BC
        rows_BC = (ids_BC + self.shift_C).to(torch.int32)
        if self._mixed_columns and self.is_fixed:
            ids = ids_BC.index_select(1, self.mixed_C)
            steps = torch.where(ids[..., None] >= self.segment_ids_CK, self.segment_steps_CK, 0).sum(-1)
            rows_BC = rows_BC.index_copy(1, self.mixed_C.long(), (ids + steps).to(torch.int32))
        elif self._mixed_columns:
            key = (ids_BC[:, self.mixed_C] + self.mixed_first_id).to(torch.int32)
            segment = torch.searchsorted(self.mixed_bounds, key, right=True) - 1
            rows_BC = rows_BC.index_copy(1, self.mixed_C, key + self.mixed_shifts[segment])
        return rows_BC

    def _forward_distinct(self, ids_BC: Tensor, pool_BC: Tensor | None, learns: bool) -> tuple[Tensor, Tensor | None]:
        """Look up each distinct row once, then expand; gates and gradients see the distinct rows."""
        kernels = kernels_for(self.group_view(self.groups[0]))
        expansion = Expansion(
            len(ids_BC),
            sum(self.widths),
            [self.get_buffer(name) for name in self._column_buffers],
            [self.get_buffer(f"outputs_{number}") for number in range(len(self.groups))],
            len(self._column_buffers) == 1 and not self.is_pooled,
        )
        distinct = kernels.distinct_rows(expansion, self.storage_ids(ids_BC), self.num_rows)
        rows_U = distinct.rows_U
        edges = torch.searchsorted(rows_U, self.group_starts).tolist()
        bounds = list(itertools.pairwise(edges))
        if self._optimizer is not None:
            self._optimizer.catch_up(rows_U)
        lookup = Lookup(rows_U, bounds, [])
        sources, mixed_sources, mixed_rows = [], [], []
        for group, (low, high) in zip(self.groups, bounds, strict=True):
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
        if self._mixed_columns:
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
        """Rows of `source`; where a row optimiser learns, as a leaf that enters `lookup` once it has a gradient."""
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
        rows_BC = self.storage_ids(ids_BC)
        sources = [self.group_view(g) for g in self.groups] if self.packed is None else list(self.packed)
        indices = [
            rows_BC.index_select(1, self.get_buffer(f"columns_{number}")) - group.start
            for number, group in enumerate(self.groups)
        ]
        mixed = None
        if self._mixed_columns:
            rows = rows_BC.index_select(1, self.mixed_C)
            mixed = rows.new_zeros((*rows.shape, self.width), dtype=self._dtype)
            for number, (group, source) in enumerate(zip(self.groups, sources, strict=True)):
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
        """Rows (*index.shape, width) of a group; packed ones of the stretches in a buffer of that name."""
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
            index = rows_BC.index_select(1, columns) - self._first_order_start(int(bits))
            first = store(index, self.get_buffer(f"first_order_stretches_{bits}")).squeeze(-1)
            first = (first if pool_BC is None else first * pool_BC.index_select(1, columns)).sum(1)
            total = first if total is None else total + first
        return total

    def _project(self, group: Group, values: Tensor) -> Tensor:
        """Rows of mixed tables at width D: x W_s (PME), width D as it is, width 0 as zero."""
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
        """(B, S): expand each group's rows by its index (B, columns), pool multi-valued fields, order the fields."""
        outputs: dict[int, Tensor] = {}
        for number, (group, source, index) in enumerate(zip(self.groups, sources, indices, strict=True)):
            if not group.fields or group.width == 0:
                continue
            found = self._gather(source, index, f"stretches_{number}")
            if pool_BC is None and len(group.fields) == self.num_fields:
                return found.view(found.shape[0], -1)
            weights = None if pool_BC is None else pool_BC.index_select(1, self.get_buffer(f"columns_{number}"))
            self._split_fields(outputs, found, group.fields, weights)
        if mixed is not None:
            weights = None if pool_BC is None else pool_BC.index_select(1, self.mixed_C)
            self._split_fields(outputs, mixed, self.mixed_fields, weights)
        if not outputs:
            return self.mean_F.new_zeros((indices[0].shape[0], 0), dtype=self._dtype)
        return torch.cat([outputs[i] for i in sorted(outputs)], 1)

    def _split_fields(
        self, outputs: dict[int, Tensor], found_BCW: Tensor, fields: tuple[int, ...], weights_BC: Tensor | None
    ) -> None:
        """Add each field's pooled (B, width) output to `outputs`."""
        if weights_BC is not None:
            found_BCW = found_BCW * weights_BC[..., None]
        parts = found_BCW.split([self._lengths[i] for i in fields], 1)
        for i, part in zip(fields, parts, strict=True):
            outputs[i] = part.sum(1) if self._lengths[i] > 1 else part.squeeze(1)

    # ---- alignment --------------------------------------------------------------------------------------------

    def own_projection_PD(self) -> Tensor:
        """(P, D) learned projections of the projected outputs; fields that share a table share theirs."""
        return self.projection.index_select(0, self.projection_rows)

    def projection_SD(self) -> Tensor:
        """(S, D) stacked projections P_f: 0/1 where a field is scattered or full, learned where it is projected."""
        fixed_SD = self.fixed_projection_SD
        if fixed_SD is None:
            fixed_SD = self._scatter_SD().to(self._dtype)
        if not self.has_projections:
            return fixed_SD
        return fixed_SD.index_copy(0, self.projected_outputs.long(), self.own_projection_PD().to(fixed_SD.dtype))

    def gram_PP(self) -> Tensor:
        """(P, P) blockdiag(P_f P_f^T) over the projected outputs."""
        own_PD = self.own_projection_PD()
        same_field_PP = self._same_field_PP() if self.same_field_PP is None else self.same_field_PP
        return (own_PD @ own_PD.T) * same_field_PP.to(own_PD.dtype)

    def _scatter_SD(self) -> Tensor:
        """(S, D) of 0 and 1: the column of the full width that each output stands for."""
        columns_D = torch.arange(self.width, device=self.place_S.device, dtype=self.place_S.dtype)
        return (self.place_S[:, None] % self.width == columns_D).float()

    def _same_field_PP(self) -> Tensor:
        """(P, P) of 0 and 1: which projected outputs are of one field."""
        field_P = torch.div(self.place_S, self.width, rounding_mode="floor").index_select(0, self.projected_outputs)
        return (field_P[:, None] == field_P).float()

    def align(self, concat_BS: Tensor) -> Tensor:
        """(B, F, D): each field's output at the full width."""
        shape = (concat_BS.shape[0], self.num_fields, self.width)
        if self.is_equal_width:
            return concat_BS.view(shape)
        flat_size = self.num_fields * self.width
        if not self.has_projections:
            return (
                concat_BS.new_zeros(concat_BS.shape[0], flat_size)
                .index_copy(1, self.place_S.long(), concat_BS)
                .view(shape)
            )
        # One product with the block matrix Q, whose block of field f is P_f.
        field_of_output = torch.div(self.place_S, self.width, rounding_mode="floor")
        blocks = torch.nn.functional.one_hot(field_of_output.long(), self.num_fields).to(concat_BS.dtype)
        q = blocks[:, :, None] * self.projection_SD().to(concat_BS.dtype)[:, None, :]
        return (concat_BS @ q.view(-1, flat_size)).view(shape)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        widths = ", ".join(f"{g.num_rows:,} x {g.width}" for g in self.groups)
        return f"fields={self.num_fields}, rows by width: {widths}, first_order={self.plan.first_order}"


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
