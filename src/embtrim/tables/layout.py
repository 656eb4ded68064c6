"""Layout: where the rows of all tables lie in one flat storage, worked out from a schema and a plan.

A *segment* is a run of compact ids of one table that are stored at one width: a uniform table has one segment, a mixed
table has one for each of its blocks. Segments of one width and precision lie together and form a *group*, whichever
tables they belong to, so there are as many groups as distinct widths and precisions, not as many as fields. A *storage
row* is the number of a row over all groups. First-order weights, one for each row, have the same numbering, so a table
of width 0 has storage rows too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from embtrim.plan.plan import PlanShape
from embtrim.plan.table import TableShape, projects
from embtrim.schema import FieldSpec, Schema

# Most columns of `concat` in a run of fields, unless one field has more.
RUN_OUTPUTS = 512


@dataclass(frozen=True)
class Group:
    """The rows of one width and precision, or of one width in tables with bands.

    Attributes:
        width: Columns of each row.
        bits: Bits of each value; in tables with bands, of their widest band.
        banded: Whether the tables have bands of several precisions.
        start: First storage row.
        num_rows: Number of storage rows.
        offset: First element in the flat buffer.
        mixed_start: First storage row of a mixed table. The rows from here to the group's end are projected to D.
        columns: Id columns that read the uniform tables of this group.
        fields: Fields that read the uniform tables of this group.
        tables: Names of the tables that have rows here, in order.
    """

    width: int
    bits: int
    banded: bool
    start: int
    num_rows: int
    offset: int
    mixed_start: int
    columns: tuple[int, ...]
    fields: tuple[int, ...]
    tables: tuple[str, ...]

    @property
    def stop(self) -> int:
        """The storage row after the last one."""
        return self.start + self.num_rows

    @property
    def name(self) -> str:
        """The width as text, with the bits where there are fewer than 32."""
        bits = "" if self.bits == 32 else f"_{self.bits}bit"
        return f"{self.width}{bits}{'_bands' if self.banded else ''}"

    @property
    def has_mixed(self) -> bool:
        """Whether any of the rows belong to mixed tables."""
        return self.mixed_start < self.stop


@dataclass(frozen=True)
class Run:
    """Consecutive fields whose columns of `concat` are brought to the full width in one product.

    Attributes:
        num_fields: Number of fields.
        num_outputs: Their columns of `concat`.
        num_projected: Columns among them that a uniform table projects.
    """

    num_fields: int
    num_outputs: int
    num_projected: int


@dataclass(frozen=True)
class Layout:
    """Which storage rows each table has, and which columns of `concat` each field fills.

    Attributes:
        fields: The fields that read a table, in order.
        tables: The plan of each table, by name.
        width: Full width D.
        first_order: Whether each row has a first-order weight.
        groups: The groups, by descending precision and width.
        segment_starts: For each table, the first storage row of each of its segments.
    """

    fields: tuple[FieldSpec, ...]
    tables: Mapping[str, TableShape]
    width: int
    first_order: bool
    groups: tuple[Group, ...]
    segment_starts: Mapping[str, tuple[int, ...]]

    # ---- rows -------------------------------------------------------------------------------------------------

    @cached_property
    def num_rows(self) -> int:
        """Storage rows, R."""
        return self.groups[-1].stop if self.groups else 0

    @cached_property
    def num_elements(self) -> int:
        """Elements of the flat buffer."""
        return sum(group.num_rows * group.width for group in self.groups)

    def storage_rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Storage rows of compact ids of a table."""
        ends = np.cumsum([rows for rows, _ in self.tables[name].segments])
        segment = np.searchsorted(ends, ids, side="right")
        starts = ends - [rows for rows, _ in self.tables[name].segments]
        return ids - starts[segment] + np.array(self.segment_starts[name])[segment]

    @cached_property
    def first_order_bits(self) -> tuple[int, ...]:
        """The precisions of the first-order weights, ascending."""
        return tuple(sorted({t.first_order_bits for t in self.tables.values()})) if self.first_order else ()

    def bands(self, group: Group) -> list[tuple[tuple[int, int], ...]]:
        """For each table of a group, (rows, bits) of the runs of rows of one precision that it has there."""
        tables = [self.tables[name] for name in group.tables]
        return [
            t.bands if not t.mixed else ((sum(rows for rows, width in t.segments if width == group.width), t.bits),)
            for t in tables
        ]

    @cached_property
    def is_half_projection(self) -> tuple[bool, ...]:
        """For each row of `projection`, whether its table has fewer than 32 bits, so that fp16 stores it."""
        keys = [self.projection_key(output) for output in self.first_projected_outputs]
        return tuple(self.tables[name].bits < 32 for name, _ in keys)

    def first_order_tables(self, bits: int) -> list[str]:
        """Names of the tables whose first-order weights have this precision."""
        return [t.name for t in self.tables.values() if t.first_order_bits == bits]

    def first_order_start(self, bits: int) -> int:
        """First storage row whose first-order weight has this precision: groups descend in precision."""
        return sum(t.num_compact_rows for t in self.tables.values() if t.first_order_bits > bits)

    # ---- id columns and output columns --------------------------------------------------------------------------

    @cached_property
    def table_of_field(self) -> tuple[TableShape, ...]:
        """The plan of the table that each field reads."""
        return tuple(self.tables[field.table_name] for field in self.fields)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Id columns of each field."""
        return tuple(field.length for field in self.fields)

    @cached_property
    def field_of_column(self) -> tuple[int, ...]:
        """The field of each id column."""
        return tuple(i for i, length in enumerate(self.lengths) for _ in range(length))

    @cached_property
    def table_of_column(self) -> tuple[str, ...]:
        """The name of the table that each id column reads."""
        return tuple(self.fields[i].table_name for i in self.field_of_column)

    @cached_property
    def is_pooled(self) -> bool:
        """Whether any field may have several values or none, so that its embeddings are pooled."""
        return any(field.length > 1 or field.type == "multi" for field in self.fields)

    @cached_property
    def mixed_fields(self) -> tuple[int, ...]:
        """Fields that read a mixed table."""
        return tuple(i for i, table in enumerate(self.table_of_field) if table.mixed)

    @cached_property
    def mixed_columns(self) -> tuple[int, ...]:
        """Id columns that read a mixed table."""
        mixed = set(self.mixed_fields)
        return tuple(c for c, i in enumerate(self.field_of_column) if i in mixed)

    @cached_property
    def column_buffers(self) -> tuple[str, ...]:
        """Names of the index tensors that hold the id columns of each group, then those of mixed tables."""
        uniform = tuple(f"columns_{number}" for number in range(len(self.groups)))
        return (*uniform, "mixed_C") if self.mixed_columns else uniform

    @cached_property
    def gathers_elements(self) -> bool:
        """Whether each column of `concat` is one element of the flat buffer."""
        return not self.mixed_fields and not self.is_pooled

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Columns of each field in `concat`."""
        return tuple(table.output_width for table in self.table_of_field)

    @cached_property
    def is_equal_width(self) -> bool:
        """Whether every field is D wide."""
        return all(width == self.width for width in self.widths)

    @cached_property
    def field_of_output(self) -> tuple[int, ...]:
        """The field of each column of `concat`."""
        return tuple(i for i, width in enumerate(self.widths) for _ in range(width))

    @cached_property
    def column_of_output(self) -> tuple[int, ...]:
        """The column of the full table that each column of `concat` stands for."""
        return tuple(column for table in self.table_of_field for column in table.columns)

    @cached_property
    def has_projections(self) -> bool:
        """Whether a uniform table owns a projection."""
        return any(projects(table) for table in self.table_of_field)

    @cached_property
    def projected_outputs(self) -> tuple[int, ...]:
        """The columns of `concat` that a uniform table projects to D."""
        return tuple(s for s, i in enumerate(self.field_of_output) if projects(self.table_of_field[i]))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The fields in runs of about RUN_OUTPUTS columns of `concat`: products grow with the columns, not their square."""
        runs = [Run(0, 0, 0)]
        for table, width in zip(self.table_of_field, self.widths, strict=True):
            last = runs[-1]
            if last.num_outputs and last.num_outputs + width > RUN_OUTPUTS:
                last = Run(0, 0, 0)
                runs.append(last)
            projected = width if projects(table) else 0
            runs[-1] = Run(last.num_fields + 1, last.num_outputs + width, last.num_projected + projected)
        return tuple(runs)

    @cached_property
    def first_projected_outputs(self) -> tuple[int, ...]:
        """For each row of `projection`, the first column of `concat` that it projects.

        A projection belongs to its table: fields that share the table share its rows of `projection`.
        """
        first: dict[tuple[str, int], int] = {}
        for s in self.projected_outputs:
            first.setdefault(self.projection_key(s), s)
        return tuple(first.values())

    def projection_key(self, output: int) -> tuple[str, int]:
        """Table and column whose row of `projection` a column of `concat` is projected by."""
        return self.table_of_field[self.field_of_output[output]].name, self.column_of_output[output]


def lay_out(schema: Schema, plan: PlanShape) -> Layout:
    """Number the storage rows: groups descend in bits and width; in a group uniform tables stand before mixed ones."""
    tables = {table.name: table for table in plan.tables}
    segment_starts = {table.name: [0] * len(table.segments) for table in plan.tables}
    kinds = {(*_precision(table), width) for table in plan.tables for _, width in table.segments}
    in_order = sorted(plan.tables, key=lambda table: table.mixed)  # stable: the plan's order otherwise
    groups: list[Group] = []
    row = element = 0
    for bits, banded, width in sorted(kinds, reverse=True):
        start, mixed_rows = row, 0
        members: list[str] = []
        for table in in_order:
            for number, (num_rows, own_width) in enumerate(table.segments):
                if (*_precision(table), own_width) == (bits, banded, width):
                    segment_starts[table.name][number] = row
                    members.append(table.name)
                    row += num_rows
                    mixed_rows += num_rows * table.mixed
        fields = tuple(
            i
            for i, table in enumerate(tables[field.table_name] for field in schema.id_fields)
            if not table.mixed and (*_precision(table), table.output_width) == (bits, banded, width)
        )
        columns = tuple(
            itertools.chain.from_iterable(
                range(*schema.column_slices[i].indices(schema.num_id_columns)) for i in fields
            )
        )
        members = list(dict.fromkeys(members))
        groups.append(
            Group(width, bits, banded, start, row - start, element, row - mixed_rows, columns, fields, tuple(members))
        )
        element += (row - start) * width
    starts = {name: tuple(rows) for name, rows in segment_starts.items()}
    return Layout(schema.id_fields, tables, plan.width, plan.first_order, tuple(groups), starts)


def places_of(names: Sequence[str]) -> dict[str, int]:
    """The place of each name in a list, so that a search for many names takes one pass."""
    return {name: place for place, name in enumerate(names)}


def _precision(table: TableShape) -> tuple[int, bool]:
    """By what tables share a group, beside the width: their bits, and whether they have bands."""
    return table.top_bits, len(table.bands) > 1
