"""The index tensors by which a batch of ids finds its rows and its columns of `concat`, made from a layout.

The tables register index tensors as buffers, which no file holds, since the layout gives them again. Their order matters:
the checksum of a model reads buffers in the order in which they are made here.

Axes: C id columns, F fields, G groups, D full width, S columns of `concat`, P projected ones among them, K segments of
the mixed table that has most.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from embtrim.tables.layout import Layout, places_of


class Indices:
    """Names and types of the buffers that are made from a layout. The class holds annotations alone.

    Each group has two more, named by its number: `columns_0` holds the id columns of its uniform tables, and `outputs_0`
    the columns of `concat` that their rows fill. Quantised tables have further ones; see `packed_tensors`.

    Attributes:
        group_starts: int32 (G + 1,). First storage row of each group, and R.
        shift_C: int32. Offset from an id of a uniform table to its storage row; 0 for a mixed table.
        mean_F: bool. Whether a field takes the mean of its embeddings rather than their sum.
        field_of_column_C: Field of each id column.
        place_S: Position of each column of `concat` in the flattened (F, D).
        element_S: First element of the flat buffer that a column of `concat` may read. Exists if the layout
            `gathers_elements`.
        field_S: Field of each column of `concat`. Exists if the layout `gathers_elements`.
        width_S: Width of the field of each column of `concat`. Exists if the layout `gathers_elements`.
        plain_outputs: Columns of `concat` that no uniform table projects. Exists unless every field is D wide.
        projected_S: For each row of `projection`, the first column of `concat` that it projects. Exists unless every
            field is D wide.
        projected_outputs: (P,) columns of `concat` that a uniform table projects. Exists unless every field is D wide.
        projection_rows: (P,) row of `projection` for each of `projected_outputs`. Exists unless every field is D wide.
        projection_places: Place of each row of `projection` among those of 32 bits and then those of 16. Exists in
            quantised tables of which one owns a projection.
        fixed_projection_SD: The `scatter_matrix`; None once tables are split by width. Exists unless every field is D
            wide.
        mixed_C: Id columns that read a mixed table. Exists if a table is mixed.
        mixed_outputs: Columns of `concat` that mixed tables fill. Exists if a table is mixed.
        mixed_first_id: int32, for each of `mixed_C`. Offset from an id to its key, which is unique over all mixed
            tables. Exists if a table is mixed.
        mixed_bounds: int32. First key of each segment of the mixed tables, ascending. Exists if a table is mixed.
        mixed_shifts: int32. Offset from the keys of each segment to their storage rows. Exists if a table is mixed.
        segment_ids_CK: int32, for each of `mixed_C`. First id of each segment. Exists in mixed tables for inference only.
        segment_steps_CK: int32, for each of `mixed_C`. Jump of the storage rows at each segment's first id. Exists in
            mixed tables for inference only.
    """

    group_starts: Tensor
    shift_C: Tensor
    mean_F: Tensor
    field_of_column_C: Tensor
    place_S: Tensor
    element_S: Tensor
    field_S: Tensor
    width_S: Tensor
    plain_outputs: Tensor
    projected_S: Tensor
    projected_outputs: Tensor
    projection_rows: Tensor
    projection_places: Tensor
    fixed_projection_SD: Tensor | None
    mixed_C: Tensor
    mixed_outputs: Tensor
    mixed_first_id: Tensor
    mixed_bounds: Tensor
    mixed_shifts: Tensor
    segment_ids_CK: Tensor
    segment_steps_CK: Tensor


def index_tensors(layout: Layout) -> dict[str, Tensor]:
    """The index tensors of tables that are stored in fp32, by name; see `Indices`."""
    starts = [0 if layout.tables[name].mixed else layout.segment_starts[name][0] for name in layout.table_of_column]
    found = {
        "group_starts": int32([*(group.start for group in layout.groups), layout.num_rows]),
        "shift_C": int32(starts),
    }
    if layout.mixed_columns:
        found |= _mixed_tensors(layout)
    for number, group in enumerate(layout.groups):
        found[f"columns_{number}"] = int64(group.columns)
        found[f"outputs_{number}"] = _outputs_of(layout, group.columns, group.width)
    if layout.mixed_columns:
        found["mixed_outputs"] = _outputs_of(layout, layout.mixed_columns, layout.width)
    found["mean_F"] = torch.tensor([field.pooling == "mean" for field in layout.fields])
    found["field_of_column_C"] = int64(layout.field_of_column)
    outputs = zip(layout.field_of_output, layout.column_of_output, strict=True)
    found["place_S"] = int64(i * layout.width + column for i, column in outputs)
    if not layout.is_equal_width:
        found |= _projection_tensors(layout, found["place_S"])
    if layout.gathers_elements:
        found |= _element_tensors(layout)
    return found


def _mixed_tensors(layout: Layout) -> dict[str, Tensor]:
    """Index tensors that take an id of a mixed table to its storage row, by the segment in which it lies."""
    names = [layout.table_of_column[c] for c in layout.mixed_columns]
    first_key, bounds, shifts = {}, [], []
    key = 0
    for name in dict.fromkeys(names):
        first_key[name] = key
        for (num_rows, _), start in zip(layout.tables[name].segments, layout.segment_starts[name], strict=True):
            bounds.append(key)
            shifts.append(start - key)
            key += num_rows
    return {
        "mixed_C": int64(layout.mixed_columns),
        "mixed_first_id": int32(first_key[name] for name in names),
        "mixed_bounds": int32(bounds),
        "mixed_shifts": int32(shifts),
    }


def _outputs_of(layout: Layout, columns: Iterable[int], width: int) -> Tensor:
    """The columns of `concat` that rows of one width fill, read by these id columns."""
    begins = [0, *itertools.accumulate(layout.widths)]
    return int64(begins[layout.field_of_column[c]] + w for c in columns for w in range(width))


def _projection_tensors(layout: Layout, place_S: Tensor) -> dict[str, Tensor]:
    """Index tensors and matrices that bring `concat` to the full width."""
    plain = sorted(set(range(len(place_S))) - set(layout.projected_outputs))
    row_of = {layout.projection_key(s): row for row, s in enumerate(layout.first_projected_outputs)}
    return {
        "plain_outputs": int64(plain),
        "projected_S": int64(layout.first_projected_outputs),
        "projected_outputs": int64(layout.projected_outputs),
        "projection_rows": int64(row_of[layout.projection_key(s)] for s in layout.projected_outputs),
        "fixed_projection_SD": scatter_matrix(place_S, layout.width),
    }


def scatter_matrix(place_S: Tensor, width: int) -> Tensor:
    """(S, D) of 0 and 1: the column of the full width that each column of `concat` stands for."""
    columns_D = torch.arange(width, device=place_S.device, dtype=place_S.dtype)
    return (place_S[:, None] % width == columns_D).float()


def _element_tensors(layout: Layout) -> dict[str, Tensor]:
    """The address of each column of `concat` in the flat buffer: `element_S` + id * `width_S`."""
    group_of = {i: group for group in layout.groups for i in group.fields}
    elements = []
    for i, (table, width) in enumerate(zip(layout.table_of_field, layout.widths, strict=True)):
        first = group_of[i].offset + (layout.segment_starts[table.name][0] - group_of[i].start) * width
        elements += range(first, first + width)
    return {
        "element_S": int64(elements),
        "field_S": int64(layout.field_of_output),
        "width_S": int64(layout.widths[i] for i in layout.field_of_output),
    }


def segment_tensors(layout: Layout) -> dict[str, Tensor]:
    """For each id column of a mixed table, the first id of each segment, and the jump of the storage rows there."""
    names = [layout.table_of_column[c] for c in layout.mixed_columns]
    num_segments = max(len(layout.tables[name].segments) for name in names)
    # Segments that a table does not have start at its first id and jump by nothing.
    segment_ids_CK = torch.zeros(len(names), num_segments, dtype=torch.int32)
    segment_steps_CK = torch.zeros_like(segment_ids_CK)
    for c, name in enumerate(names):
        first_ids = [0, *itertools.accumulate(rows for rows, _ in layout.tables[name].segments)][:-1]
        shifts = [start - first for start, first in zip(layout.segment_starts[name], first_ids, strict=True)]
        segment_ids_CK[c, : len(first_ids)] = torch.tensor(first_ids)
        segment_steps_CK[c, : len(shifts)] = torch.tensor([b - a for a, b in itertools.pairwise([0, *shifts])])
    return {"segment_ids_CK": segment_ids_CK, "segment_steps_CK": segment_steps_CK}


def packed_tensors(layout: Layout) -> dict[str, Tensor]:
    """The index tensors that quantised tables need as well, by name.

    A *stretch* is what one table stores in one group, or its first-order weights; it has a scale and an offset of its
    own for each column.

    Returns:
        For each group, named by its number, `stretches_0` with the stretch of each of its id columns, and
        `mixed_stretches_0` with the stretch of each id column of a mixed table. For each precision of the first-order
        weights, named by its bits, `first_order_columns_8` with id columns, and `first_order_stretches_8` with the stretch
        of each. If a table owns a projection, `projection_places`. If a table is mixed, the `segment_tensors`.
    """
    found = {}
    names = layout.table_of_column
    for number, group in enumerate(layout.groups):
        places = places_of(group.tables)
        found[f"stretches_{number}"] = int64(places[names[c]] for c in group.columns)
        # A mixed table without rows in this group reads rows of another table, which are multiplied by zero.
        found[f"mixed_stretches_{number}"] = int64(places.get(names[c], 0) for c in layout.mixed_columns)
    for bits in layout.first_order_bits:
        places = places_of(layout.first_order_tables(bits))
        columns = [c for c, name in enumerate(names) if name in places]
        found[f"first_order_columns_{bits}"] = int64(columns)
        found[f"first_order_stretches_{bits}"] = int64(places[names[c]] for c in columns)
    if layout.has_projections:
        in_order = sorted(range(len(layout.is_half_projection)), key=lambda p: layout.is_half_projection[p])
        found["projection_places"] = int64(sorted(range(len(in_order)), key=in_order.__getitem__))
    return found | segment_tensors(layout) if layout.mixed_columns else found


def int32(values: Iterable[int]) -> Tensor:
    """Integers that are compared with ids and storage rows, which are int32."""
    return torch.tensor(list(values), dtype=torch.int32)


def int64(values: Iterable[int]) -> Tensor:
    """Integers that index a tensor."""
    return torch.tensor(list(values), dtype=torch.int64)
