"""update: new values get rows, dropped values return, other values keep id and weights, nothing is half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import embtrim
from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoder import digest
from embtrim.errors import BundleError, ConfigError, DataError
from embtrim.models import DeepFM
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, BlockShape, TablePlan, TableShape
from embtrim.schema import FieldSpec, Schema
from embtrim.serving import updating
from embtrim.serving.bundle import load_bundle, save
from embtrim.serving.updating import UpdateConfig, added_ids, update
from embtrim.system.folders import file_digest
from tests.cli.workshop import call
from tests.conftest import interrupt_encoding

KINDS = ("full", "columns", "rows", "rows_without_oov", "mixed")
TRAIN = {"epochs": 1, "batch_size": 32, "learning_rate": 0.05, "precision": "fp32"}
SCHEMA = Schema(
    label="click",
    time="day",
    fields=(
        FieldSpec(name="user", min_count=2),
        FieldSpec(name="friend", min_count=2, table="user"),
        FieldSpec(name="tags", type="multi", max_len=2),
        FieldSpec(name="page", hash_size=6),
    ),
)


def log_of(users: list[str], friends: list[str], tags: list[list[str]]) -> pl.DataFrame:
    """Rows of these users, friends and tags in turn; every third row is a click."""
    num_rows = len(users)
    return pl.DataFrame(
        {
            "click": [int(i % 3 == 0) for i in range(num_rows)],
            "day": range(num_rows),
            "user": users,
            "friend": [friends[i % len(friends)] for i in range(num_rows)],
            "tags": [tags[i % len(tags)] for i in range(num_rows)],
            "page": [f"p{i % 11}" for i in range(num_rows)],
        }
    )


# u00 is the most frequent user, so user i has id i + 1; with OOV there are 21 rows.
OLD = log_of(
    [f"u{u:02d}" for u in range(20) for _ in range(24 - u)],
    ["u00", "u01"],
    [["a", "b"], ["c"], [], ["a"], ["b"], ["a"]],
)
# x0, x1 (only as a friend, in the shared table) and the tag z are new; y occurs once. u12 and u13 may return; u14 occurs once.
NEW = log_of(
    [*["u01", "u12", "u13", "x0"] * 30, "u14", "y"], ["u02", "u01", "x1", "x1", "u12"], [["a", "z"], ["z"], ["b"]]
)
STAY = pl.concat([OLD.filter(pl.col("user") < "u08"), OLD.filter(pl.col("user") > "u13")])


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> EncodedDataset:
    return embtrim.encode(
        OLD,
        SCHEMA,
        out=tmp_path_factory.mktemp("logs") / "data",
        split="1:0:0",
        progress=False,
        checkpoint_seconds=None,
    )


def plan_of(kind: str, schema: Schema) -> SizePlan:
    """A plan of one kind; plans of rows keep users 0..7 or fewer and drop the others."""
    full = SizePlan.full(schema, 4, first_order=True)
    if kind == "full":
        return full
    if kind == "columns":
        return full.with_columns({"user": (0, 2), "tags": (1,), "page": (0, 1, 2, 3)})
    rows = {
        "rows": [Block(9, (0, 1, 2, 3), rows=np.arange(9, dtype=np.int32))],
        "rows_without_oov": [Block(8, (0, 1, 2, 3), rows=np.arange(1, 9, dtype=np.int32))],
        "mixed": [
            Block(4, 4, "project", rows=np.arange(4, dtype=np.int32)),
            Block(5, 2, "project", rows=np.arange(4, 9, dtype=np.int32)),
            Block(2, 3, "project", rows=np.arange(9, 11, dtype=np.int32)),
        ],
    }[kind]
    sizes = {t.name: t for t in full.tables}
    sizes["user"] = TablePlan("user", sizes["user"].num_rows, 4, tuple(rows))
    pages = np.arange(4, dtype=np.int32)
    sizes["page"] = TablePlan("page", sizes["page"].num_rows, 4, (Block(4, (0, 1, 2, 3), rows=pages),))
    return SizePlan(full.fingerprint, full.num_fields, tuple(sizes.values()), True, kind)


def bundle_of(kind: str, encoded: EncodedDataset, folder: Path) -> Path:
    """A bundle with random weights, also in its OOV and DROPPED rows."""
    plan = plan_of(kind, encoded.schema)
    return save_random(plan, encoded, folder)


def save_random(plan: SizePlan, encoded: EncodedDataset, folder: Path) -> Path:
    model = DeepFM(encoded.schema, plan=plan, embedding_dim=4, hidden_units=(4,))
    with torch.no_grad():
        model.tables.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.tables.first_order.normal_(generator=torch.Generator().manual_seed(2))
    if plan.is_quantized:
        model.tables.quantize_()
    save(model, folder, encoded.recode(plan))
    return folder


@pytest.fixture(scope="module")
def bundles(encoded, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return {kind: bundle_of(kind, encoded, root / kind) for kind in KINDS}


def digests(folder: Path) -> dict[str, str]:
    return {str(path): file_digest(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_values_that_stay_keep_ids_weights_and_scores(bundles, kind, tmp_path):
    before = digests(bundles[kind])
    report = update(bundles[kind], NEW, out=tmp_path / "new", split="1:0:0", retrain=False)
    assert digests(bundles[kind]) == before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    parent, child = load_bundle(bundles[kind]), load_bundle(tmp_path / "new")

    user, tags, page = report.tables
    returned = {"full": 0, "columns": 0, "rows": 2, "rows_without_oov": 0, "mixed": 2}[kind]
    new = (
        4 if kind == "rows_without_oov" else 2
    )  # without OOV the bundle lists no dropped values, so u12 and u13 count as new
    assert (user.new, user.returned) == (new, returned)
    assert (tags.new, tags.returned) == (1, 0)
    assert (page.new, page.returned, page.rows_before) == (0, 0, page.rows_after)
    assert user.rows_after == user.rows_before + new + returned
    sizes = child.model.schema.tables
    assert sizes == {"user": 21 + new, "tags": 5, "page": 7}
    assert child.model.tables.plan.num_bytes() == report.table_bytes_after > report.table_bytes_before

    frames = STAY.filter(pl.col("user") < "u08")
    ids = parent.encoder.encode_chunk(frames).ids
    np.testing.assert_array_equal(child.encoder.encode_chunk(frames).ids, ids)
    for name, column in (("user", 0), ("tags", 2), ("page", 4)):
        found = np.unique(ids[:, column][ids[:, column] >= 0])
        pairs = zip(child.model.tables.get_rows(name, found), parent.model.tables.get_rows(name, found), strict=True)
        assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    # Values still dropped and values never seen score as before; so do all others if the rows have one width.
    unknown = STAY.with_columns(pl.lit("nobody").alias("user"))
    known = (
        NEW if kind != "mixed" else NEW.filter(pl.col("user").is_in(["u01", "u14", "y"]) & (pl.col("friend") < "u12"))
    )
    added = NEW.head(4).with_columns(pl.Series("user", ["x0", "x1", "u12", "u13"]))
    ids_of_added = set(child.encoder.encode_chunk(added).ids[:, 0].tolist())
    assert len(ids_of_added) == 4
    assert ids_of_added.isdisjoint(child.encoder.encode_chunk(pl.concat([STAY, unknown])).ids[:, 0].tolist())
    for frame in (STAY, unknown, known):
        np.testing.assert_allclose(child.predict(frame), parent.predict(frame), atol=1e-6)


def test_new_and_returned_values_learn_and_a_second_update_goes_on(bundles, tmp_path):
    first = update(bundles["rows"], NEW, out=tmp_path / "one", train=TRAIN)
    one = load_bundle(tmp_path / "one")
    rows = NEW.head(1)
    scores = {u: one.predict(rows.with_columns(pl.lit(u).alias("user")))[0] for u in ("x0", "u12", "u15", "y", "no")}
    assert scores["y"] == scores["no"]
    assert len({scores["x0"], scores["u12"], scores["u15"], scores["no"]}) == 4
    assert set(first.after) == set(first.before) == {"valid", "test"}
    assert first.after != first.before
    assert first.before["test"]["num_rows"] == first.num_rows["test"]
    assert sum(first.num_rows.values()) == NEW.height

    later = NEW.with_columns(pl.col("user").replace({"x0": "x7", "u13": "u14"}))
    second = update(tmp_path / "one", later, out=tmp_path / "two", split="time:8:1:1", train=TRAIN)
    assert (first.version, second.version) == (2, 3)
    assert second.of == file_digest(tmp_path / "one" / "bundle.json")
    assert (second.tables[0].new, second.tables[0].returned) == (1, 1)
    two = load_bundle(tmp_path / "two")
    np.testing.assert_array_equal(two.encoder.encode_chunk(NEW).ids[:100], one.encoder.encode_chunk(NEW).ids[:100])
    noted = two.info["update"]
    assert noted["tables"] == {"user": {"new": 1, "returned": 1}}
    plans = [
        load_bundle(path).model.tables.plan.digest for path in (bundles["rows"], tmp_path / "one", tmp_path / "two")
    ]
    schemas = [load_bundle(path).info["schema"] for path in (bundles["rows"], tmp_path / "one", tmp_path / "two")]
    for before, after, report in ((0, 1, first), (1, 2, second)):
        assert (report.plan_before, report.plan_after) == (plans[before], plans[after])
        assert (report.schema_before, report.schema_after) == (schemas[before], schemas[after])
    assert len({*plans, *schemas}) == 6
    card = (tmp_path / "two" / "README.md").read_text()
    assert "Version 3 of plan and schema" in card
    assert f"version 2: schema {schemas[1]} -> {schemas[2]}, plan {plans[1]} -> {plans[2]} |" in card


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_an_update_that_brings_nothing_new_keeps_the_schema(bundles, kind, tmp_path):
    update(bundles[kind], NEW, out=tmp_path / "one", retrain=False)
    encoder = load_bundle(tmp_path / "one").encoder
    assert digest(encoder.vocabularies, encoder.transforms) == encoder.schema.vocabulary_digest
    report = update(tmp_path / "one", NEW, out=tmp_path / "two", retrain=False)
    assert {(table.new, table.returned) for table in report.tables} == {(0, 0)}
    assert report.schema_after == report.schema_before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_renumbered_values_have_the_ids_of_a_fresh_encode_and_score_as_before(bundles, encoded, kind, tmp_path):
    update(bundles[kind], NEW, out=tmp_path / "same", split="1:0:0", retrain=False)
    report = update(bundles[kind], NEW, out=tmp_path / "new", split="1:0:0", retrain=False, renumber=True)
    parent, same, child = (load_bundle(path) for path in (bundles[kind], tmp_path / "same", tmp_path / "new"))
    assert report.renumbered
    assert "values re-numbered by frequency" in (tmp_path / "new" / "README.md").read_text()
    assert report.tables == embtrim.serving.updating.table_changes(parent.model.tables.plan, child.model.tables.plan)

    fresh = embtrim.encode(NEW, SCHEMA, out=tmp_path / "fresh", split="1:0:0", progress=False, checkpoint_seconds=None)
    order = pl.read_parquet(fresh.folder / "vocab.parquet")
    moved = 0
    for table in child.model.tables.plan.tables:
        if table.name == "page":  # hashed: its ids come from the hash
            continue
        found = child.encoder.vocabularies[table.name].filter(pl.col("id") != (table.dropped_id or -1))
        before = same.encoder.vocabularies[table.name].filter(pl.col("id") != (table.dropped_id or -1))
        assert found["id"].to_list() == sorted(before["id"])
        assert found["id"].n_unique() == len(found)
        width = np.repeat([w for _, w in table.segments], [rows for rows, _ in table.segments])
        listed = order.filter(pl.col("table") == table.name)["value"].to_list()
        for one in set(width.tolist()):
            here = [v for v, i in zip(found["value"], found["id"], strict=True) if width[i] == one]
            then = [v for v, i in before.sort("id").select("value", "id").rows() if width[i] == one]
            seen = [v for v in listed if v in here]
            assert here == seen + [v for v in then if v not in seen]
            moved += here != then
    assert moved
    rows = pl.concat([OLD, NEW])
    unknown = rows.with_columns(pl.lit("nobody").alias("user"))
    for frame in (rows, unknown):
        np.testing.assert_array_equal(child.predict(frame), same.predict(frame))
    np.testing.assert_allclose(child.predict(STAY), parent.predict(STAY), atol=1e-6)
    np.testing.assert_array_equal(child.encoder.encode_chunk(OLD).ids[:, 4], parent.encoder.encode_chunk(OLD).ids[:, 4])
    trained = update(bundles[kind], NEW, out=tmp_path / "trained", train=TRAIN, renumber=True)
    plain = update(bundles[kind], NEW, out=tmp_path / "plain", train=TRAIN)
    assert trained.before == plain.before
    assert trained.after["test"]["auc"] == pytest.approx(plain.after["test"]["auc"], abs=0.05)


def test_renumbering_moves_rows_of_one_width_only():
    """Ids 0 (OOV) and 4 (DROPPED) stay. Among the wide values d now comes first, among the narrow ones f."""
    table = TableShape(
        "t", 7, 4, (BlockShape(3, 4, "project"), BlockShape(1, 4, "project"), BlockShape(2, 2, "project"))
    )
    vocabulary = pl.DataFrame(
        {"value": ["b", "c", "d", "e", "f", "x"], "id": [1, 2, 3, 5, 6, 4], "count": [6, 5, 4, 3, 2, 1]}
    )
    frequent = pl.DataFrame({"value": ["f", "d", "x", "b"]})
    assert table.dropped_id == 4
    found = updating.renumbered(table, vocabulary, frequent)
    assert found.select("value", "id").rows() == [("d", 1), ("b", 2), ("c", 3), ("x", 4), ("f", 5), ("e", 6)]


@pytest.mark.parametrize("bits", [16, 8])
def test_a_quantised_bundle_trains_on_and_is_quantised_again(encoded, bits, tmp_path):
    bundle = save_random(plan_of("mixed", encoded.schema).with_bits(bits), encoded, tmp_path / "old")
    parent = load_bundle(bundle)
    kept = update(bundle, NEW, out=tmp_path / "kept", split="1:0:0", retrain=False)
    child = load_bundle(tmp_path / "kept")
    assert {t.bits for t in child.model.tables.plan.tables} == {bits}
    assert child.model.tables.packed is not None
    np.testing.assert_allclose(child.predict(STAY), parent.predict(STAY), atol=0.02)
    assert kept.table_bytes_after == child.model.tables.plan.num_bytes()
    trained = update(bundle, NEW, out=tmp_path / "new", train=TRAIN)
    assert trained.after != trained.before
    assert np.isfinite(load_bundle(tmp_path / "new").predict(NEW)).all()


def test_metrics_before_are_those_of_the_parent(bundles, tmp_path):
    report = update(bundles["mixed"], NEW, out=tmp_path / "new", split="time:5:5:0", retrain=False)
    rows = NEW.tail(report.num_rows["valid"])
    found = load_bundle(bundles["mixed"]).predict(rows).astype(float)
    labels = rows["click"].to_numpy()
    expected = -np.where(labels == 1, np.log(found), np.log1p(-found)).mean()
    assert report.before["valid"]["logloss"] == pytest.approx(expected, abs=1e-5)
    assert report.after["valid"]["logloss"] != pytest.approx(expected, abs=1e-5)  # narrow rows start at zero


def test_min_count_can_be_given(bundles, tmp_path):
    report = update(bundles["rows"], NEW, out=tmp_path / "new", split="1:0:0", min_count=1, retrain=False)
    assert (report.tables[0].new, report.tables[0].returned) == (3, 3)
    assert load_bundle(tmp_path / "new").model.schema.fields[0].min_count == 2


def test_interrupted_it_leaves_nothing_half_written_and_goes_on(bundles, tmp_path, monkeypatch):
    update(bundles["full"], NEW, out=tmp_path / "whole", train=TRAIN)
    with monkeypatch.context() as patch:

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(updating, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            update(bundles["full"], NEW, out=tmp_path / "new", train=TRAIN)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", ".new.unfinished"}
    saved = (tmp_path / ".new.unfinished" / "training.safetensors").read_bytes()
    assert saved
    update(bundles["full"], NEW, out=tmp_path / "new", train=TRAIN)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "new"}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "new")]
    assert weights[0] == weights[1]


def test_what_was_interrupted_is_not_taken_for_an_update_that_renumbers(bundles, tmp_path):
    log = tmp_path / "log.parquet"
    NEW.write_parquet(log)
    update(bundles["full"], log, out=tmp_path / "whole", retrain=False, renumber=True)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_encoding(patch)
        with pytest.raises(KeyboardInterrupt):
            update(bundles["full"], log, out=tmp_path / "new", retrain=False)
    assert (tmp_path / ".new.unfinished" / ".data.encoding" / "checkpoint.json").exists()
    update(bundles["full"], log, out=tmp_path / "new", retrain=False, renumber=True)
    found = [pl.read_parquet(tmp_path / name / "encoder" / "vocab.parquet") for name in ("whole", "new")]
    assert found[0].equals(found[1])


@pytest.mark.parametrize(
    ("log", "error", "words"),
    [
        (NEW.drop("friend"), DataError, "friend"),
        (NEW.drop("click"), DataError, "click"),
        (NEW.head(0), DataError, "empty"),
        (NEW.with_columns(pl.lit(1).alias("click")), DataError, "both classes are needed"),
    ],
    ids=["no column", "no label", "no rows", "one class"],
)
def test_it_refuses_what_cannot_be_trained_on(bundles, tmp_path, log, error, words):
    with pytest.raises(error, match=words):
        update(bundles["full"], log, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_it_refuses_what_would_be_overwritten_and_what_is_no_bundle(bundles, tmp_path):
    with pytest.raises(BundleError, match="exists; choose another"):
        update(bundles["full"], NEW, out=bundles["rows"])
    with pytest.raises(BundleError, match="is the bundle to update"):
        update(bundles["full"], NEW, out=bundles["full"], overwrite=True)
    with pytest.raises(BundleError, match="holds the bundle to update"):
        update(bundles["full"], NEW, out=bundles["full"].parent, overwrite=True)
    with pytest.raises(BundleError, match="is not a bundle, so it is not overwritten"):
        update(bundles["full"], NEW, out=bundles["full"] / "encoder", overwrite=True)
    with pytest.raises(BundleError, match="is not a bundle"):
        update(tmp_path, NEW, out=tmp_path / "new")
    with pytest.raises(ConfigError, match="8:1:1"):
        update(bundles["full"], NEW, out=tmp_path / "new", split="80/20")
    assert not list(tmp_path.iterdir())
    assert UpdateConfig.parse({"train": {"learning_rate": 0.1}}).train.epochs == updating.EPOCHS


def widths(table: TablePlan) -> list[int]:
    return [width for rows, width in table.segments for _ in range(rows)]


W4, W2, W0 = (4, "project"), (2, "project"), (0, "project")


@pytest.mark.parametrize(
    ("num_rows", "blocks", "new", "returned", "ids", "num_blocks"),
    [
        (3, [(3, *W4)], 2, 0, [3, 4], 1),
        (5, [(3, *W4)], 1, 1, [3, 4], 1),  # DROPPED moves from 3 to 5
        (5, [(3, *W4)], 0, 2, [3, 4], 1),  # DROPPED disappears
        (7, [(2, *W4), (2, *W2)], 1, 1, [5, 6], 2),  # DROPPED stays, at 2
        (6, [(2, *W4), (2, *W2)], 0, 2, [2, 5], 2),  # no value reads DROPPED any more, so a new row takes its place
        (7, [(2, *W2), (2, *W4)], 1, 1, [5, 6], 3),
        (7, [(2, *W4), (2, *W0)], 2, 0, [2, 5], 3),  # new rows take the only width, and DROPPED moves behind them
        (4, [], 1, 1, [0, 1], 1),
    ],
)
def test_rows_are_added_behind_those_that_stay(num_rows, blocks, new, returned, ids, num_blocks):
    table = TableShape("t", num_rows, 4, tuple(BlockShape(*block) for block in blocks))
    grown = table.grown(new, returned)
    assert added_ids(table, grown).tolist() == ids
    assert (grown.num_rows, grown.num_kept, len(grown.blocks)) == (
        num_rows + new,
        table.num_kept + new + returned,
        num_blocks,
    )
    stay = [i for i in range(table.num_compact_rows) if i != table.dropped_id]
    assert [widths(grown)[i] for i in stay] == [widths(table)[i] for i in stay]
    assert table.grown(0, 0) is table


def test_the_command_reports_what_changed(bundles, tmp_path):
    NEW.with_columns(pl.lit("a").alias("tags")).write_parquet(tmp_path / "flat.parquet")
    NEW.write_parquet(tmp_path / "new.parquet")
    out = tmp_path / "out"
    words = ["update", bundles["rows"], tmp_path / "new.parquet", "--out", out, "--no-train", "--split", "4:1:0"]
    shown = call(*words, "--dry-run")
    assert shown.code == 0, shown.err
    assert not out.exists()
    done = call(*words, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["tables"][0]["returned"] == 2
    assert report["before"]["valid"]["auc"] == report["after"]["valid"]["auc"]
    done = call(*words, "--overwrite", "--set", "train.epochs=2")
    assert done.code == 0, done.err
    for word in (
        "returned",
        "dropped",
        "valid: auc",
        "table bytes after",
        "num rows: train",
        "version 2 of plan and schema",
    ):
        assert word in done.out
    assert "re-numbered" not in done.out
    done = call(*words, "--overwrite", "--renumber")
    assert "values re-numbered by frequency" in done.out
    assert load_bundle(out).info["update"]["renumbered"]
    assert call(*words).code == 1
    refused = call("update", bundles["rows"], tmp_path / "flat.parquet", "--out", tmp_path / "b")
    assert refused.code == 1
    assert "'tags'" in refused.err


def test_ids_that_an_upcast_wrote_are_not_new_values(tmp_path):
    """pandas writes integers as 100.0 once a cell of their column is missing."""
    frame = pl.DataFrame({"click": [0, 1] * 60, "user": [100 + i % 12 for i in range(120)]})
    data = embtrim.encode(frame, label="click", out=tmp_path / "data", split="8:1:1", progress=False)
    model = DeepFM(data.schema, embedding_dim=2)
    save(model, tmp_path / "bundle", data)
    frame.with_columns(pl.col("user").cast(pl.Float64)).write_csv(tmp_path / "later.csv")
    assert np.array_equal(
        load_bundle(tmp_path / "bundle").predict(tmp_path / "later.csv"),
        load_bundle(tmp_path / "bundle").predict(frame),
    )
    report = update(tmp_path / "bundle", tmp_path / "later.csv", out=tmp_path / "next", retrain=False)
    assert [(table.new, table.returned) for table in report.tables] == [(0, 0)]
    assert load_bundle(tmp_path / "next").encoder.schema.fields[0].kind == "integer"
