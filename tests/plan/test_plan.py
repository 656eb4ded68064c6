"""Plans and budgets: counts by hand, files, id maps, and what users get wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embtrim.errors import BudgetError, PlanError
from embtrim.plan.budget import Budget
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Block, TablePlan, TableShape, block_rows, describe_table, smallest_dtype
from embtrim.schema import Schema
from embtrim.tables.embedding_tables import EmbeddingTables
from tests.system.kills import killed, names

SCHEMA = Schema.from_sizes([10, 6, 3])


def rows(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def mixed_table(name: str = "f0") -> TablePlan:
    """10 rows x 4: three at width 4, two at width 1, four at width 2, one dropped."""
    return TablePlan(name, 10, 4, (
        Block(3, 4, "project", rows(0, 2, 4)),
        Block(2, 1, "project", rows(1, 9)),
        Block(4, 2, "project", rows(3, 5, 6, 7)),
    ))  # fmt: skip


def example_plan() -> SizePlan:
    """A mixed table, one with kept columns and rows, and one without columns."""
    tables = (
        mixed_table(),
        TablePlan("f1", 6, 4, (Block(4, (0, 3), "scatter", rows(0, 1, 2, 5)),)),
        TablePlan("f2", 3, 4, (Block(3, ()),)),
    )
    return SizePlan(
        SCHEMA.fingerprint, 3, tables, True, "manual", {"scores": [1.5]}, seed=3, budget=Budget.parse("10%")
    )


# ---- counts by hand ----------------------------------------------------------------------------------------------


def test_full_plan_counts():
    plan = SizePlan.full(SCHEMA, 4, first_order=True)
    assert plan.num_params == plan.num_full_params == (10 + 6 + 3) * 4
    assert plan.num_first_order_params == 19
    assert plan.num_bytes() == 4 * (76 + 19)
    assert plan.slot_ratio == 1.0
    assert plan.num_projection_params == 0


def test_mixed_plan_counts():
    plan = example_plan()
    # f0: the DROPPED row joins the widest block: 4 x 4 + 2 x 1 + 4 x 2 = 26; f1: (4 kept + DROPPED) x 2 = 10; f2: 0.
    # W_1 and W_2 of 1 x 4 and 2 x 4 = 12.
    assert plan.shared_projection_widths == (1, 2)
    assert plan.num_projection_params == 12
    assert plan.num_params == 26 + 10 + 12
    assert plan.num_first_order_params == 10 + 5 + 3
    assert plan.num_bytes() == 4 * (48 + 18)
    assert plan.num_full_params == 76
    assert plan.slot_ratio == pytest.approx((26 / 10 + 2 + 0) / 12)


@pytest.mark.parametrize("alignment, own", [("concat", 0), ("scatter", 0), ("project", 2 * 4 + 1 * 4)])
def test_own_projections_count_only_where_a_narrow_table_projects(alignment, own):
    plan = SizePlan.full(SCHEMA, 4).with_columns({"f0": [2, 0], "f1": [1], "f2": range(4)}, alignment)
    assert plan.tables[0].blocks[0].columns == (0, 2)
    assert plan.num_params == 10 * 2 + 6 * 1 + 3 * 4 + own
    assert plan.slot_ratio == pytest.approx(7 / 12)


def test_a_plan_that_keeps_no_row_at_all():
    table = TablePlan("f2", 3, 4, ())
    assert (table.num_compact_rows, table.output_width, table.dropped_id) == (1, 0, 0)
    assert table.id_map().tolist() == [0, 0, 0]


# ---- ids ---------------------------------------------------------------------------------------------------------


def test_id_map_by_hand():
    table = mixed_table()
    # Blocks in order: 0 2 4 -> 0 1 2, DROPPED (row 8) -> 3, then 1 9 -> 4 5, then 3 5 6 7 -> 6 7 8 9.
    assert table.segments == ((4, 4), (2, 1), (4, 2))
    assert table.dropped_id == 3
    assert table.oov_id() == 0
    assert table.id_map().tolist() == [0, 4, 1, 6, 2, 7, 8, 9, 3, 5]
    assert table.num_compact_rows == 10


def test_dropped_row_comes_last_in_a_uniform_table_and_in_the_last_of_the_widest_blocks():
    uniform = TablePlan("a", 6, 2, (Block(2, (1,), rows=rows(1, 4)), Block(1, (1,), rows=rows(3))))
    assert uniform.id_map().tolist() == [3, 0, 3, 2, 1, 3]
    assert uniform.oov_id() is None
    two = TablePlan("a", 6, 2, (Block(1, 2, "project", rows(5)), Block(1, 2, "project", rows(0)), Block(1, 1, "project", rows(1))))  # fmt: skip
    assert two.id_map().tolist() == [1, 3, 2, 2, 2, 0]
    assert two.oov_id() == 1


def test_a_field_level_plan_changes_no_id():
    assert TablePlan("a", 6, 2, (Block(6, (1,)),)).id_map() is None


def test_kept_mask_by_hand():
    table = TablePlan("a", 3, 3, (Block(1, (0, 2), rows=rows(1)),))
    assert table.kept_mask().tolist() == [[False] * 3, [True, False, True], [False] * 3]
    counts = TablePlan("a", 2, 3, (Block(1, 1, "project", rows(0)), Block(1, 2, "project", rows(1))))
    assert counts.kept_mask().astype(int).tolist() == [[1, 0, 0], [1, 1, 0]]


# ---- contradictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda: TablePlan("t", 3, 4, (Block(4, (0,)),)), "'t': its blocks hold 4 rows, the table 3"),
    (lambda: TablePlan("t", 3, 4, (Block(3, (1, 0)),)), r"columns must ascend within 0..3, given \(1, 0\)"),
    (lambda: TablePlan("t", 3, 4, (Block(3, (1, 1)),)), "columns must ascend"),
    (lambda: TablePlan("t", 3, 4, (Block(3, (4,)),)), "columns must ascend within 0..3"),
    (lambda: TablePlan("t", 3, 4, (Block(3, 5),)), "columns must ascend within 0..3, given 5"),
    (lambda: TablePlan("t", 3, 4, (Block(2, (0,), rows=rows(0, 1, 2)),)), "says 2 rows and lists 3"),
    (lambda: TablePlan("t", 3, 4, (Block(2, (0,), rows=rows(1, 0)),)), "row ids must ascend within 0..2"),
    (lambda: TablePlan("t", 3, 4, (Block(2, (0,), rows=rows(0, 3)),)), "row ids must ascend within 0..2"),
    (lambda: TablePlan("t", 3, 4, (Block(1, 4, rows=rows(0)), Block(1, 4, rows=rows(0)))), "a row is in two blocks"),
    (lambda: TablePlan("t", 3, 4, (Block(1, 2, rows=rows(0)), Block(1, 3, rows=rows(1)))), "need alignment 'project'"),
])  # fmt: skip
def test_contradictions(make, message):
    with pytest.raises(PlanError, match=message):
        make()


@pytest.mark.parametrize(("block", "message"), [
    (Block(10, -1, "project"), "a block keeps 10 rows and -1 columns; 0 or more are allowed"),
    (Block(-5, (0,)), "a block keeps -5 rows and (0,) columns; 0 or more are allowed"),
    (Block(10, (0,), "bogus"), "alignment must be concat, scatter or project, given 'bogus'"),  # type: ignore[arg-type]
])  # fmt: skip
def test_impossible_blocks(block, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        TablePlan("f0", 10, 4, (block,))


def test_rows_of_another_plan_are_refused(tmp_path):
    """Files of two plans that somebody copied together."""
    full = SizePlan.full(SCHEMA, 4)
    for name, kept in (("old", rows(0, 1, 2)), ("new", rows(7, 8, 9))):
        tables = (TablePlan("f0", 10, 4, (Block(3, (0, 1), "concat", kept),)), *full.tables[1:])
        dataclasses.replace(full, tables=tables).save(tmp_path / f"{name}.json")
    (tmp_path / "new.npz").rename(tmp_path / "old.npz")
    with pytest.raises(PlanError, match=r"old.npz holds the rows of another plan; save or copy both again"):
        SizePlan.load(tmp_path / "old.json")
    text = json.loads((tmp_path / "old.json").read_text())
    del text["rows_crc32"]  # as older releases wrote it
    (tmp_path / "old.json").write_text(json.dumps(text))
    assert SizePlan.load(tmp_path / "old.json").tables[0].blocks[0].rows.tolist() == [7, 8, 9]


@pytest.mark.parametrize(("number", "found"), [(1, 0), (2, 0), (3, 0), (4, 1)])
def test_a_plan_saved_over_another_and_killed_is_the_earlier_or_the_new_one(tmp_path, number, found):
    full, path = SizePlan.full(SCHEMA, 4), tmp_path / "plan.json"
    plans = [
        dataclasses.replace(
            full, tables=(TablePlan("f0", 10, 4, (Block(3, (0, 1), "concat", kept),)), *full.tables[1:])
        )
        for kept in (rows(0, 1, 2), rows(7, 8, 9))
    ]
    plans[0].save(path)
    with killed(number, "replace") if number < 4 else killed(1, "unlink", to=".old"):
        plans[1].save(path)
    assert SizePlan.load(path).digest == plans[found].digest
    plans[1].save(path)
    assert SizePlan.load(path).digest == plans[1].digest
    assert names(tmp_path) == {"plan.json", "plan.npz"}


def test_another_schema():
    other = Schema.from_sizes([10, 6])
    with pytest.raises(PlanError, match=rf"schema {SCHEMA.fingerprint} \(3 fields\), this is {other.fingerprint} \(2"):
        example_plan().check_schema(other)
    with pytest.raises(PlanError, match="search again"):
        EmbeddingTables(other, example_plan())


# ---- files -------------------------------------------------------------------------------------------------------


def same_tables(left: SizePlan, right: SizePlan) -> bool:
    for a, b in zip(left.tables, right.tables, strict=True):
        if (a.name, a.num_rows, a.width, a.segments, a.columns) != (b.name, b.num_rows, b.width, b.segments, b.columns):
            return False
        for x, y in zip(a.blocks, b.blocks, strict=True):
            same_rows = (x.rows is None) == (y.rows is None) and (x.rows is None or np.array_equal(x.rows, y.rows))
            if (x.num_rows, x.columns, x.alignment) != (y.num_rows, y.columns, y.alignment) or not same_rows:
                return False
    return True


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    example_plan().save(tmp_path / "deep" / "plan.json")
    return tmp_path / "deep" / "plan.json"


def test_saved_is_loaded(saved):
    plan, loaded = example_plan(), SizePlan.load(saved)
    assert same_tables(plan, loaded)
    assert (loaded.fingerprint, loaded.num_fields, loaded.first_order) == (plan.fingerprint, 3, True)
    assert (loaded.method, loaded.details, loaded.seed, loaded.budget) == (
        "manual",
        {"scores": [1.5]},
        3,
        Budget.parse("10%"),
    )
    assert sorted(p.name for p in saved.parent.iterdir()) == ["plan.json", "plan.npz"]


def test_a_plan_without_chosen_rows_needs_no_npz(tmp_path):
    SizePlan.full(SCHEMA, 4).save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert same_tables(SizePlan.load(tmp_path / "plan.json"), SizePlan.full(SCHEMA, 4))


def test_layout_alone_counts_the_same_and_has_no_id_map(saved):
    saved.with_suffix(".npz").unlink()
    layout = PlanShape.load(saved)
    assert (layout.num_params, layout.num_bytes()) == (example_plan().num_params, example_plan().num_bytes())
    assert layout.tables[0].oov_id() is None
    assert isinstance(layout.tables[0], TableShape)
    assert not isinstance(layout.tables[0], TablePlan), "a shape has no map of ids"
    layout.save(saved.parent / "layout.json")
    with pytest.raises(
        PlanError, match=r"keeps 3 of 10 rows and does not say which; .* give the plan that the search wrote"
    ):
        SizePlan.load(saved.parent / "layout.json")


def test_a_plan_edited_by_hand_is_applied(saved):
    values = json.loads(saved.read_text())
    values["tables"][2]["blocks"][0]["columns"] = [1, 2]
    saved.write_text(json.dumps(values))
    assert SizePlan.load(saved).num_params == example_plan().num_params + 3 * 2
    assert example_plan().diff(SizePlan.load(saved)) == (
        "f2: 3 rows x 0 of 3 x 4 -> 3 rows x 2 of 3 x 4 (columns [1, 2])"
    )


def edit(path: Path, *keys, value) -> None:
    values = json.loads(path.read_text())
    node = values
    for key in keys[:-1]:
        node = node[key]
    if value is None:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("break_it, message", [
    (lambda p: p.unlink(), "plan.json does not exist; a plan is a .json and"),
    (lambda p: p.with_suffix(".npz").unlink(), "plan.npz does not exist; a plan is a .json and"),
    (lambda p: p.with_suffix(".npz").write_bytes(b"PK\x03\x04xxxx"), "plan.npz is damaged .it is not an npz file"),
    (lambda p: np.savez(p.with_suffix(".npz"), t0b0=rows(1, 3, 5).astype(float)), "'t0b0' is float64 .3,.; integers of shape .3,."),
    (lambda p: np.savez(p.with_suffix(".npz"), t0b0=rows(1, 3, 5)[None]), "'t0b0' is int32 .1, 3.; integers"),
    (lambda p: np.savez(p.with_suffix(".npz"), t0b1=rows(1, 3, 5)), "plan.npz is damaged .it has no array 't0b0'"),
    (lambda p: np.savez(p.with_suffix(".npz"), t0b0=np.array([1, 3, 2**40])), "'t0b0' holds integers of more than 32 bits"),
    (lambda p: np.savez_compressed(p.with_suffix(".npz"), t0b0=np.zeros(17 << 20, np.int32)), "'t0b0' unpacks from"),
    (lambda p: p.write_text("[" * 100_000), "not a valid plan .it is nested too deeply"),
    (lambda p: p.write_text('{"plan_version": ' + "9" * 5000 + "}"), "it holds an integer of 5,000 digits"),
    (lambda p: (p.with_suffix(".npz").unlink(), os.mkfifo(p.with_suffix(".npz"))), "plan.npz is damaged .it is not a regular file"),
    (lambda p: edit(p, "tables", 0, "num_rows", value=float("inf")), "not a valid plan .it holds Infinity"),
    (lambda p: edit(p, "tables", 0, "num_rows", value=10**30), "it holds an integer of 31 digits"),
    (lambda p: edit(p, "tables", 0, "num_rows", value=1.5), "not a valid plan .*num_rows, given 1.5"),
    (lambda p: edit(p, "tables", 0, "width", value=10**9), "given 1000000000 columns"),
    (lambda p: edit(p, "tables", 1, "blocks", 0, "columns", value=2**31 - 1), "columns must ascend within 0..3"),
    (lambda p: edit(p, "details", value="x"), "not a valid plan .*details, given 'x'"),
    (lambda p: edit(p, "details", value={"budget": "nothing"}), "budget 'nothing' is not understood"),
    (lambda p: p.write_text("{"), "not a valid plan"),
    (lambda p: p.write_bytes(b"\xff\xfe\x00"), "not a valid plan"),
    (lambda p: p.write_text("[1, 2]"), "plan.json: this is not an embtrim plan: it has no plan_version"),
    (lambda p: p.write_text("{}"), "plan.json: this is not an embtrim plan: it has no plan_version"),
    (lambda p: edit(p, "plan_version", value=2), "plan version 2, this release reads 1; upgrade embtrim"),
    (lambda p: edit(p, "tables", value=None), "not a valid plan"),
    (lambda p: edit(p, "tables", 0, "num_rows", value=None), "not a valid plan .*num_rows: Field required"),
    (lambda p: edit(p, "tables", 0, "num_rows", value="ten"), "not a valid plan"),
    (lambda p: edit(p, "tables", 0, "num_rows", value=8), "its blocks hold 9 rows, the table 8"),
    (lambda p: edit(p, "tables", 1, "blocks", 0, "columns", value=[3, 0]), "columns must ascend"),
    (lambda p: edit(p, "tables", 1, "blocks", 0, "columns", value=["a"]), "not a valid plan"),
    (lambda p: edit(p, "tables", 1, "blocks", 0, "alignment", value="diagonal"), "concat, scatter or project, given 'diag"),
    (lambda p: edit(p, "tables", 1, "blocks", 0, "num_rows", value=5), "integers of shape .5,. are needed"),
    (lambda p: edit(p, "tables", 1, "blocks", 0, "rows", value="t9b9"), "it has no array 't9b9'"),
    (lambda p: edit(p, "colour", value="red"), "not a valid plan .*colour"),
])  # fmt: skip
def test_broken_files(saved, break_it, message):
    break_it(saved)
    with pytest.raises(PlanError, match=message) as raised:
        SizePlan.load(saved)
    assert str(saved.parent) in str(raised.value)
    assert str(raised.value).count("plan.json") <= 1, "the path is said once"


def test_diff_and_summary():
    plan = example_plan()
    assert plan.diff(plan) == ""
    lines = plan.diff(SizePlan.full(SCHEMA, 4)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["f0", "f1", "f2"]
    gone = SizePlan(plan.fingerprint, 3, (*plan.tables[:2], TablePlan("g", 3, 4, (Block(3, 4),))))
    assert plan.diff(gone).splitlines() == ["f2: 3 rows x 0 of 3 x 4 -> gone", "g: new"]
    assert repr(plan) == "<SizePlan by manual: 48 of 76 embedding parameters, 3 tables>"
    assert plan.summary().startswith("manual: 48 of 76 embedding parameters (63.16%), 38.3% of the slots, 264 bytes")
    assert describe_table(plan.tables[1]) == "5 rows x 2 of 6 x 4 (columns [0, 3])"


def test_blocks_of_equal_size_and_other_rows_differ():
    left, right = (SizePlan("x", 1, (TablePlan("a", 3, 2, (Block(1, 2, rows=rows(r)),)),)) for r in (0, 1))
    assert left.diff(right) == "a: 2 rows x 2 of 3 x 2 -> 2 rows x 2 of 3 x 2, other rows"


# ---- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, kind, amount", [
    ("10%", "percent", 0.1), (" 12.5 % ", "percent", 0.125), ("100%", "percent", 1.0),
    ("1.5M params", "params", 1.5e6), ("20000 params", "params", 2e4), ("20,000 parameters", "params", 2e4),
    ("20_000 params", "params", 2e4), ("3k params", "params", 3e3), ("2B params", "params", 2e9),
    ("1e6 params", "params", 1e6),
    ("200MB", "bytes", 2e8), ("200 mb", "bytes", 2e8), ("64MiB", "bytes", 64 * 2**20), ("1.5GB", "bytes", 1.5e9),
    ("512 b", "bytes", 512), ("3KiB", "bytes", 3072),
])  # fmt: skip
def test_budgets_parse(text, kind, amount):
    budget = Budget.parse(text)
    assert budget.kind == kind
    assert budget.amount == pytest.approx(amount)
    assert Budget.parse(budget) is budget
    if kind != "bytes":
        assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text, message", [
    ("", "not understood"), ("ten", "not understood"), ("-5%", "not understood"), ("%", "not understood"),
    ("10", "unknown unit"), ("10 %%", "not understood"), ("10% params", "unknown unit"), ("5 furlongs", "unknown unit"),
    ("5MB params", "unknown unit"), ("0%", "must be a positive number"), ("0 params", "positive"), ("0MB", "positive"),
    ("150%", "150% is more than the full tables"), ("1.2.3MB", "not understood"), ("nan%", "not understood"),
    ("10%; 20%", "not understood"),
])  # fmt: skip
def test_bad_budgets(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


def test_limits_by_hand():
    assert Budget.parse("10%").max_params(1000, 100) == 100
    assert Budget.parse("0.1%").max_params(999) == 0
    assert Budget.parse("29%").max_params(100) == 29  # 0.29 * 100 is a hair below 29 in floating point
    assert Budget.parse("120 params").max_params(1000, 100) == 120
    assert Budget.parse("1000b").max_params(1000, 100) == 150
    assert Budget.parse("402b").max_params(1000, 100) == 0
    with pytest.raises(BudgetError, match=r"below the first-order weights alone \(400 bytes\)"):
        Budget.parse("396b").max_params(1000, 100)


@pytest.mark.parametrize(("budget", "amount", "words"), [
    ("1%", 2 / 1600, "0.125%"), ("1%", 1 / 3, "33.4%"), ("1%", 1.25, "125%"), ("1%", 0.1, "10.0%"), ("1%", 0.0123, "1.23%"),
    ("1%", 3.01e-7, "0.0000301%"), ("8 b", 24, "24 bytes"), ("8 b", 1080.5, "1,081 bytes"), ("1 params", 2, "2 params"),
])  # fmt: skip
def test_another_amount_in_words(budget, amount, words):
    assert Budget.parse(budget).words_for(amount) == words
    assert amount > 1 or Budget.parse(words).amount >= amount * (1 - 1e-9)


def test_a_plan_knows_its_limit():
    plan = SizePlan.full(SCHEMA, 4, first_order=True)
    assert plan.max_params(Budget.parse("50%")) == 38
    assert plan.max_params(Budget.parse("200b")) == 50 - 19


@given(st.integers(1, 10**9), st.floats(1e-4, 1))
def test_a_percentage_is_never_exceeded(full, share):
    limit = Budget("percent", share).max_params(full)
    assert limit <= share * full + 1e-6
    assert limit >= share * full - 1


def test_a_plan_must_list_the_tables_of_the_model():
    schema = Schema.from_sizes([10, 4])
    full = SizePlan.full(schema, 8)
    full.check_tables(SizePlan.full(schema, 8))
    with pytest.raises(PlanError, match="table 'f0' of 10 x 8 where the model has table 'f0' of 10 x 4"):
        full.check_tables(SizePlan.full(schema, 4))
    shorter = dataclasses.replace(full, tables=full.tables[:1])
    with pytest.raises(PlanError, match="plan has nothing where the model has table 'f1'"):
        shorter.check_tables(full)
    with pytest.raises(PlanError, match="plan has table 'f1' of 4 x 8 where the model has nothing"):
        dataclasses.replace(full, tables=(*full.tables, full.tables[1])).check_tables(full)


def test_an_unknown_key_in_a_plan_is_an_error(tmp_path):
    SizePlan.full(Schema.from_sizes([10]), 4).save(tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    values["tables"][0]["columns"] = [0, 1]
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(PlanError, match=r"unknown key 'tables.0.columns' for PlanFile; allowed: name"):
        SizePlan.load(tmp_path / "plan.json")


def large_plan() -> SizePlan:
    """The first rows of one table of five billion, some rows beyond 2^31 of another, and all of a third."""
    many, some = 5 * 10**9, np.array([7, 2**31 + 1, 4 * 10**9], np.int64)
    tables = (
        TablePlan("first", many, 4, (Block(3 * 10**9, (0, 2), rows=range(3 * 10**9)),)),
        TablePlan("some", many, 4, (Block(3, (1,), rows=some),)),
        TablePlan("whole", many, 4, (Block(many, (0, 1, 2, 3)),)),
    )
    return SizePlan("f" * 16, 3, tables, standalone=True)


def test_tables_of_more_rows_than_32_bits_count(tmp_path):
    plan = large_plan()
    first, some, whole = plan.tables
    assert (first.keeps_first_rows, some.keeps_first_rows, whole.renumbers) == (True, False, False)
    assert plan.num_params == (3 * 10**9 + 1) * 2 + 4 + 5 * 10**9 // 4 + 4 * 5 * 10**9  # the map of `some` has bytes
    assert some.map_dtype == np.uint8
    assert first.id_map(range(3 * 10**9 - 2, 3 * 10**9 + 2)).tolist() == [
        3 * 10**9 - 2,
        3 * 10**9 - 1,
        3 * 10**9,
        3 * 10**9,
    ]
    assert some.id_map(range(2**31, 2**31 + 3)).tolist() == [3, 1, 3]
    assert some.block_of_row(range(4 * 10**9 - 1, 4 * 10**9 + 2)).tolist() == [-1, 0, -1]
    assert whole.kept_mask(range(4 * 10**9, 4 * 10**9 + 2)).all()
    assert first.kept_mask(range(3 * 10**9 - 1, 3 * 10**9 + 1)).tolist() == [[True, False, True, False], [False] * 4]
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.npz").stat().st_size < 1000, "the first rows are a number"
    loaded = SizePlan.load(tmp_path / "plan.json")
    assert loaded.digest == plan.digest
    assert loaded.tables[0].blocks[0].rows == range(3 * 10**9)
    assert loaded.tables[1].blocks[0].rows.tolist() == [7, 2**31 + 1, 4 * 10**9]
    assert plan.diff(loaded) == ""
    assert smallest_dtype(2**31 + 1) == np.int64


def test_first_rows_are_those_that_a_list_of_ids_gives(tmp_path):
    full = SizePlan.full(Schema.from_sizes([9]), width=2)

    def cut(rows: object) -> SizePlan:
        return dataclasses.replace(
            full, tables=(dataclasses.replace(full.tables[0], blocks=(Block(4, (0, 1), rows=rows),)),)
        )

    number, listed = cut(range(4)), cut(np.arange(4, dtype=np.int32))
    assert number.digest == listed.digest
    assert number.diff(listed) == ""
    for rows in (None, range(3), range(2, 7), range(6, 9)):
        for name in ("id_map", "block_of_row", "kept_mask"):
            found, expected = (getattr(plan.tables[0], name)(rows) for plan in (number, listed))
            assert found.tolist() == expected.tolist(), (name, rows)
    assert block_rows(np.arange(4), 9) == range(4)
    assert block_rows(np.arange(9), 9) is None
    assert block_rows(np.array([0, 2]), 9).dtype == np.int32
    with pytest.raises(PlanError, match="a range of rows is from 0 in steps of 1"):
        cut(range(1, 5))
    two = (Block(2, (0, 1), rows=range(2)), Block(1, (0, 1), rows=np.array([1], np.int32)))
    with pytest.raises(PlanError, match="a row is in two blocks"):
        dataclasses.replace(full.tables[0], blocks=two)
    number.save(tmp_path / "plan.json")
    assert not (tmp_path / "plan.npz").exists()
    assert SizePlan.load(tmp_path / "plan.json").tables[0].blocks[0].rows == range(4)
