"""The bytes of a plan: tables of fewer bits, FBGEMM's padding, and the limits of a budget, by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from embtrim.errors import PlanError
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import BITS, Block, TablePlan
from embtrim.schema import Schema

SCHEMA = Schema.from_sizes([10, 6, 3])


def test_bytes_by_hand():
    rows = np.array([0, 2, 5], np.int32)
    plan = SizePlan(SCHEMA.fingerprint, 3, (
        TablePlan("f0", 10, 4, (Block(10, (0, 1, 2)),), bits=4),
        TablePlan("f1", 6, 4, (Block(3, (0, 1), "concat", rows),), bits=8),
        TablePlan("f2", 3, 4, (Block(3, (0, 1, 2, 3)),), bits=16),
    ), first_order=True)  # fmt: skip
    values = 10 * 2 + 3 * 4 + (3 + 1) * 2 + 2 * 4 + 3 * 4 * 2
    assert plan.num_bytes() == values + (10 + 4) + (4 + 4) + 3 * 2
    assert plan.num_params == 30 + 8 + 12
    assert plan.with_bits(32).num_bytes() == 4 * (50 + 17)
    assert plan.tables[0] in plan.with_bits({"f2": 8}).tables
    assert "10 rows x 3 of 10 x 4 (columns [0, 1, 2]), 4 bits" in plan.summary()
    assert plan.digest != plan.with_bits(32).digest
    assert "bits" in plan.diff(plan.with_bits(32))


def banded(*blocks: Block, bits: int = 8) -> SizePlan:
    return SizePlan(SCHEMA.fingerprint, 3, (TablePlan("f0", 10, 6, blocks, bits),), first_order=True)


def test_bytes_of_bands_by_hand():
    """Five columns: two rows and the DROPPED row in 8 bits, three in 3, four in 2; each band has scales of its own."""
    rows = [np.array(ids, np.int32) for ids in ([4, 9], [0, 1, 2], [3, 5, 6, 7])]
    blocks = [Block(len(r), (0, 1, 2, 3, 4), "scatter", r, bits=b) for r, b in zip(rows, (8, 3, 2), strict=True)]
    plan = banded(*blocks)
    (table,) = plan.tables
    assert table.bands == ((3, 8), (3, 3), (4, 2))
    assert (table.dropped_id, table.oov_id(), table.segments) == (2, 3, ((10, 5),))
    assert table.id_map().tolist() == [3, 4, 5, 6, 0, 7, 8, 9, 2, 1]
    values = (3 * 5 + 5 * 4) + (3 * (2 + 1) + 5 * 4) + (4 * 2 + 5 * 4)
    assert plan.num_bytes() == values + (10 + 4)
    assert "8 (3 rows), 3 (3 rows), 2 (4 rows) bits" in plan.summary()
    plain = plan.with_bits(4)
    assert plain.tables[0].bands == ((10, 4),)
    assert {block.bits for block in plain.tables[0].blocks} == {None}
    assert plan.digest != banded(*blocks[:2], dataclasses.replace(blocks[2], bits=3)).digest
    assert "bits" in plan.diff(plain)


def test_a_saved_plan_keeps_its_bands(tmp_path: Path):
    rows = [np.arange(3, dtype=np.int32), np.arange(3, 10, dtype=np.int32)]
    plan = banded(*(Block(len(r), (0, 2), "concat", r, bits=b) for r, b in zip(rows, (4, 2), strict=True)), bits=4)
    plan.save(tmp_path / "plan.json")
    again = SizePlan.load(tmp_path / "plan.json")
    assert again.digest == plan.digest
    assert again.tables[0].bands == ((3, 4), (7, 2))
    assert plan.shape().num_bytes() == plan.num_bytes()


@pytest.mark.parametrize(
    ("blocks", "bits", "message"),
    [
        ((Block(10, (0,), bits=5),), 8, "a block of 5 bits in a table of 8; bands have 8, 4, 3, 2 bits"),
        ((Block(10, (0,), bits=4),), 16, "a block of 4 bits in a table of 16"),
        (
            (Block(1, 2, "project", np.array([0]), bits=4), Block(1, 1, "project", np.array([1]), bits=2)),
            8,
            "rows of several widths cannot have bits of their own",
        ),
        (
            (Block(1, (0,), "concat", np.array([0]), bits=2), Block(1, (0,), "concat", np.array([1]), bits=4)),
            8,
            r"blocks of \[2, 4\] bits; the bits of the blocks must descend",
        ),
    ],
)
def test_bands_that_no_table_can_have(blocks, bits, message):
    with pytest.raises(PlanError, match=message):
        banded(*blocks, bits=bits)


def test_a_saved_plan_keeps_its_bits(tmp_path: Path):
    plan = SizePlan.full(SCHEMA, 4)
    plan.save(tmp_path / "old.json")
    assert "bits" not in (tmp_path / "old.json").read_text()
    plan.with_bits({"f1": 4}).save(tmp_path / "new.json")
    assert [t.bits for t in SizePlan.load(tmp_path / "new.json").tables] == [32, 4, 32]
    values = json.loads((tmp_path / "new.json").read_text())
    values["tables"][1]["bits"] = 5
    (tmp_path / "new.json").write_text(json.dumps(values))
    with pytest.raises(PlanError, match="'f1': bits must be 32, 16, 8, 4, 3 or 2, given 5"):
        SizePlan.load(tmp_path / "new.json")
    with pytest.raises(PlanError, match="names table 'f9', the plan has f0, f1, f2"):
        plan.with_bits({"f9": 8})


def test_limits_of_fewer_bits_by_hand():
    plan = SizePlan.full(SCHEMA, 4, first_order=True)  # 76 parameters, 19 first-order weights
    assert [plan.with_bits(bits).max_bytes(Budget.parse("50%")) for bits in BITS] == [
        152 + 4 * 19, 152 + 2 * 19, *[152 + 19 + 3 * 4] * 4
    ]  # fmt: skip
    assert plan.with_bits(8).max_bytes(Budget.parse("200b")) == 200
    assert plan.with_bits(16).max_bytes(Budget.parse("38 params")) == (76 + 19)


def test_bytes_of_one_table_by_hand():
    """A table of 8 bits with first-order weights and a projection of its own, and one of two widths."""
    rows = [np.array(ids, np.int32) for ids in ([0, 2], [1, 4, 5])]
    plan = SizePlan(SCHEMA.fingerprint, 2, (
        TablePlan("f0", 10, 4, (Block(10, (0, 2), "project"),), bits=8),
        TablePlan("f1", 6, 4, (Block(2, (0, 1, 2, 3), "project", rows[0]), Block(3, (0,), "project", rows[1]))),
    ), first_order=True)  # fmt: skip
    one, two = plan.tables
    values, projection, first_order = 10 * 2 + 2 * 4, 2 * 2 * 4, 10 + 4
    assert (
        plan.table_bytes(one) == plan.table_bytes(one, budget=Budget.parse("80b")) == values + projection + first_order
    )
    assert plan.table_bytes(one, budget=Budget.parse("80%")) == values + projection
    assert plan.table_bytes(two) == 4 * (3 * 4 + 3 * 1) + 4 * 6
    assert plan.num_bytes() == plan.table_bytes(one) + plan.table_bytes(two) + 4 * 1 * 4
    foreign = dataclasses.replace(plan, standalone=True)  # W_1 is the table's own, and so is a map of a byte an id
    assert foreign.table_bytes(two) == plan.table_bytes(two) + 4 * 1 * 4 + 6
    assert foreign.num_bytes() == foreign.table_bytes(one) + foreign.table_bytes(two)
    narrow = TablePlan("f1", 6, 4, (Block(6, (0,), "concat"),))
    assert plan.table_bytes(narrow, "fbgemm") == 4 * 6 * (4 + 4)
    assert plan.table_bytes(narrow, "fbgemm", Budget.parse("80%")) == 4 * 6 * 4


@pytest.mark.parametrize("budget", ["220 b", "60%", "64.5%"])
def test_a_plan_is_within_a_budget_where_its_tables_are(budget):
    full, limit = SizePlan.full(SCHEMA, 4, first_order=True), Budget.parse(budget)
    within = {True: 0, False: 0}
    for bits in itertools.product(BITS, repeat=3):
        plan = full.with_bits(dict(zip(("f0", "f1", "f2"), bits, strict=True)))
        fits = sum(full.table_bytes(table, budget=limit) for table in plan.tables) <= full.counted_bytes(limit)
        assert fits == (plan.num_bytes() <= plan.max_bytes(limit))
        within[fits] += 1
    assert min(within.values()) > 0


def test_bytes_of_fbgemm_by_hand():
    rows = np.array([0, 2, 5], np.int32)
    plan = SizePlan(SCHEMA.fingerprint, 3, (
        TablePlan("f0", 10, 6, (Block(10, (0, 2, 5)),)),
        TablePlan("f1", 6, 6, (Block(3, (0, 1), "project", rows),)),
        TablePlan("f2", 3, 6, (Block(3, (0, 1, 2, 3)),)),
    ), first_order=True)  # fmt: skip
    projection = 2 * 6
    assert plan.num_bytes("onnx") == plan.num_bytes("torch") == plan.num_bytes()
    assert plan.num_bytes("fbgemm") == 4 * (10 * 4 + 4 * 4 + projection + 3 * 4 + (10 + 4 + 3) * 4)
    free = plan.with_free_columns()
    assert [t.columns for t in free.tables] == [(0, 1, 2, 5), (0, 1), (0, 1, 2, 3)]
    assert free.num_bytes("fbgemm") == plan.num_bytes("fbgemm")
    assert plan.max_bytes(Budget.parse("50%"), "fbgemm") == 0.5 * 4 * 19 * 6 + 4 * 4 * (10 + 4 + 3)
    with pytest.raises(PlanError, match="'f0' has 8 bits, which fbgemm's tables cannot"):
        plan.with_bits(8).num_bytes("fbgemm")
