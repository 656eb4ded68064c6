"""The layout of three tables by hand: one of full width, one of two widths, one of 8 bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.schema import Schema
from embtrim.tables.indices import index_tensors, packed_tensors
from embtrim.tables.layout import Group, lay_out

SCHEMA = Schema.from_sizes([4, 3, 5])
ROWS = [np.array(ids, np.int32) for ids in ([0], [1, 2])]
PLAN = SizePlan(SCHEMA.fingerprint, 3, (
    TablePlan("f0", 4, 2, (Block(4, (0, 1)),)),
    TablePlan("f1", 3, 2, (Block(1, 2, "project", ROWS[0]), Block(2, 1, "project", ROWS[1]))),
    TablePlan("f2", 5, 2, (Block(5, (1,)),), bits=8),
), first_order=True)  # fmt: skip


def test_groups_descend_in_bits_and_width_and_hold_uniform_tables_first():
    layout = lay_out(SCHEMA, PLAN)
    assert layout.groups == (
        Group(
            2, 32, False, start=0, num_rows=5, offset=0, mixed_start=4, columns=(0,), fields=(0,), tables=("f0", "f1")
        ),
        Group(1, 32, False, start=5, num_rows=2, offset=10, mixed_start=5, columns=(), fields=(), tables=("f1",)),
        Group(1, 8, False, start=7, num_rows=5, offset=12, mixed_start=12, columns=(2,), fields=(2,), tables=("f2",)),
    )
    assert [(group.name, group.has_mixed) for group in layout.groups] == [("2", True), ("1", True), ("1_8bit", False)]
    assert (layout.num_rows, layout.num_elements) == (12, 17)
    assert layout.segment_starts == {"f0": (0,), "f1": (4, 5), "f2": (7,)}
    assert layout.storage_rows("f1", np.array([2, 0, 1])).tolist() == [6, 4, 5]
    assert layout.first_order_bits == (8, 32)
    assert (layout.first_order_tables(32), layout.first_order_start(8)) == (["f0", "f1"], 7)


def test_outputs_stand_field_by_field():
    layout = lay_out(SCHEMA, PLAN)
    assert (layout.widths, layout.mixed_fields, layout.mixed_columns) == ((2, 2, 1), (1,), (1,))
    assert layout.field_of_output == (0, 0, 1, 1, 2)
    assert layout.column_of_output == (0, 1, 0, 1, 1)
    assert not any((layout.is_equal_width, layout.has_projections, layout.is_pooled, layout.gathers_elements))


def test_index_tensors_by_hand():
    found = {name: value.tolist() for name, value in index_tensors(lay_out(SCHEMA, PLAN)).items()}
    assert found["group_starts"] == [0, 5, 7, 12]
    assert found["shift_C"] == [0, 0, 7]
    assert [found[f"columns_{number}"] for number in range(3)] == [[0], [], [2]]
    assert [found[f"outputs_{number}"] for number in range(3)] == [[0, 1], [], [4]]
    assert (found["mixed_C"], found["mixed_outputs"]) == ([1], [2, 3])
    assert (found["mixed_first_id"], found["mixed_bounds"], found["mixed_shifts"]) == ([0], [0, 1], [4, 4])
    assert found["place_S"] == [0, 1, 2, 3, 5]


def test_index_tensors_of_packed_rows_by_hand():
    found = {name: value.tolist() for name, value in packed_tensors(lay_out(SCHEMA, PLAN)).items()}
    assert [found[f"stretches_{number}"] for number in range(3)] == [[0], [], [0]]
    assert [found[f"mixed_stretches_{number}"] for number in range(3)] == [[1], [0], [0]]
    assert (found["first_order_columns_8"], found["first_order_stretches_8"]) == ([2], [0])
    assert (found["first_order_columns_32"], found["first_order_stretches_32"]) == ([0, 1], [0, 1])
    assert (found["segment_ids_CK"], found["segment_steps_CK"]) == ([[0, 1]], [[4, 0]])


def test_a_layout_follows_from_schema_and_plan_alone_and_is_frozen():
    layout = lay_out(SCHEMA, PLAN)
    assert layout.groups == lay_out(SCHEMA, PLAN).groups
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.width = 3  # type: ignore[misc]
