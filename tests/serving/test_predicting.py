"""Scores of a log on disk, and the columns that are copied beside them."""

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.errors import DataError
from embtrim.models import FM, DeepFM
from embtrim.schema import FieldSpec, Schema
from embtrim.serving.bundle import Bundle, load_bundle, save
from embtrim.serving.predicting import write_predictions


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """An untrained model of users."""
    folder = tmp_path_factory.mktemp("predicting")
    rng = np.random.default_rng(0)
    log = pl.DataFrame({"click": [0, 1] * 300, "user": [f"u{k}" for k in rng.integers(0, 30, 600)]})
    data = embtrim.encode(log, label="click", out=folder / "data")
    save(FM(data.schema, embedding_dim=2), folder / "bundle", data)
    return load_bundle(folder / "bundle")


@pytest.mark.parametrize("column", [[["a"], ["b", "c"]], [{"a": 1}, {"a": 2}], [b"a", b"b"]])
def test_a_column_that_csv_cannot_hold_is_named(bundle, tmp_path, column):
    log = pl.DataFrame({"user": ["u1", "u2"], "tags": column})
    log.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"column 'tags' holds .*, which csv cannot hold; write scores\.parquet"):
        write_predictions(bundle, tmp_path / "log.parquet", tmp_path / "scores.csv", keep=["tags"])
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]
    done = write_predictions(bundle, tmp_path / "log.parquet", tmp_path / "scores.parquet", keep=["tags"])
    assert done.num_rows == 2
    assert pl.read_parquet(tmp_path / "scores.parquet").columns == ["tags", "score"]


def test_formulas_of_a_log_are_texts_in_a_csv(bundle, tmp_path):
    cells = ["=1+1", "+x", "-5", "+1.5e3", "@a", "\ttab", "plain", "-1.217,5", None]
    pl.DataFrame({"user": "u1", "=name": cells}).write_parquet(tmp_path / "log.parquet")
    kept = {}
    for name, raw in (("safe.csv", False), ("raw.csv", True), ("safe.parquet", False)):
        write_predictions(bundle, tmp_path / "log.parquet", tmp_path / name, keep=["=name"], raw_text=raw)
        read = pl.read_parquet if name.endswith("parquet") else pl.read_csv
        frame = read(tmp_path / name)
        kept[name] = (frame.columns[0], frame.to_series().to_list())
    assert kept["safe.csv"] == (
        "'=name", ["'=1+1", "'+x", "-5", "+1.5e3", "'@a", "'\ttab", "plain", "-1.217,5", None],
    )  # fmt: skip
    assert kept["raw.csv"] == kept["safe.parquet"] == ("=name", cells)


@pytest.mark.parametrize("where", [None, "click >= 0 and user != 'u3'"])
def test_a_log_on_disk_scores_as_its_rows_do(tmp_path, where):
    rng = np.random.default_rng(0)
    rows = {"click": rng.integers(0, 2, 20_000), "user": rng.integers(0, 9, 20_000), "price": rng.random(20_000)}
    log = pl.DataFrame({**rows, "user": [f"u{user}" for user in rows["user"]]})
    log.write_parquet(tmp_path / "log.parquet", row_group_size=9_000)
    fields = (FieldSpec(name="user"), FieldSpec(name="price", type="dense", transform="standard"))
    data = embtrim.encode(log, Schema(label="click", where=where, fields=fields), out=tmp_path / "data")
    save(DeepFM(data.schema, embedding_dim=4, hidden_units=(16, 8), init_std=0.5), tmp_path / "bundle", data)
    bundle = load_bundle(tmp_path / "bundle")
    expected = np.concatenate([bundle.predict(log[start : start + 500]) for start in range(0, len(log), 500)])
    assert len(np.unique(expected)) > 5_000
    np.testing.assert_allclose(bundle.predict(log), expected, atol=1e-6)
    write_predictions(bundle, tmp_path / "log.parquet", tmp_path / "scores.parquet", keep=["price"])
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert scores["price"].equals(log["price"])
    np.testing.assert_allclose(scores["score"].to_numpy(), expected, atol=1e-6)


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """A bundle of a day, and a log of the next day in which half of the items are new and a price is missing more often."""
    folder = tmp_path_factory.mktemp("days")

    def day(items: tuple[int, int], no_price: float, seed: int) -> pl.DataFrame:
        rng = np.random.default_rng(seed)
        price = pl.Series(rng.integers(5, 90, 2000)).set(pl.Series(rng.random(2000) < no_price), None)
        item = rng.integers(*items, 2000)
        return pl.DataFrame({"click": rng.integers(0, 2, 2000), "item": item, "flag": item % 2 == 0, "price": price})

    fields = (
        FieldSpec(name="item"),
        FieldSpec(name="flag"),
        FieldSpec(name="price", type="dense", transform="log1p"),
    )
    first = day((1000, 1040), 0.1, 1)
    data = embtrim.encode(first, Schema(label="click", fields=fields), out=folder / "data")
    save(FM(data.schema, embedding_dim=2), folder / "bundle", data)
    first.write_parquet(folder / "first.parquet")
    day((1020, 1060), 0.3, 2).write_parquet(folder / "second.parquet")
    return folder


def test_drift_is_said(days, tmp_path, caplog):
    bundle = load_bundle(days / "bundle")
    done = write_predictions(bundle, days / "second.parquet", tmp_path / "scores.parquet")
    assert [(drift.field, drift.what) for drift in done.drift] == [("item", "unseen"), ("price", "missing")]
    assert 0.45 < done.drift[0].share < 0.55
    assert done.drift[0].expected == 0.0
    assert {1040 <= int(text) < 1060 for text in done.drift[0].examples} == {True}
    assert "drift: field 'item': " in caplog.text
    assert [share["field"] for share in done.shares] == ["item", "flag", "price"]
    with pytest.raises(DataError, match=r"the log has drifted .* field 'item'"):
        write_predictions(bundle, days / "second.parquet", tmp_path / "strict.parquet", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
    assert write_predictions(bundle, days / "second.parquet", tmp_path / "s.parquet", drift_tolerance=0.6).drift == []


def test_predict_in_python_warns_once(days, caplog):
    bundle, second = load_bundle(days / "bundle"), pl.read_parquet(days / "second.parquet")
    bundle.predict(second)
    assert caplog.text.count("drift: ") == 2
    bundle.predict(second)
    bundle.predict(days / "second.parquet")
    assert caplog.text.count("drift: ") == 2


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_an_upcast_is_no_drift(days, tmp_path, caplog, form):
    first = pl.read_parquet(days / "first.parquet")
    upcast = first.with_columns(pl.col("item", "price").cast(pl.Float64), flag=pl.col("flag").cast(pl.Int8))
    log = tmp_path / f"log.{form}"
    (upcast.write_csv if form == "csv" else upcast.write_parquet)(log)
    assert write_predictions(load_bundle(days / "bundle"), log, tmp_path / "scores.parquet", strict=True).drift == []
    assert "drift: " not in caplog.text


def test_update_reports_drift(days, tmp_path, caplog):
    settings = {"out": tmp_path / "new", "retrain": False}
    report = embtrim.update(days / "bundle", days / "second.parquet", **settings)
    assert [(drift["field"], drift["what"]) for drift in report.drift] == [("item", "unseen"), ("price", "missing")]
    assert 0.45 < report.shares[0]["unseen"] < 0.55
    assert report.to_dict()["drift"] == report.drift
    assert load_bundle(tmp_path / "new").info["update"]["drift"] == report.drift
    assert "drift: field 'price'" in caplog.text
    with pytest.raises(DataError, match="the log has drifted"):
        embtrim.update(days / "bundle", days / "second.parquet", out=tmp_path / "strict", strict=True, retrain=False)
    assert not (tmp_path / "strict").exists()
    # The new bundle knows the new items.
    caplog.clear()
    load_bundle(tmp_path / "new").predict(pl.read_parquet(days / "second.parquet"))
    assert "drift: " not in caplog.text


def test_a_bundle_without_a_profile_still_scores(days, tmp_path, caplog):
    bundle = load_bundle(days / "bundle")
    bundle.profile = None
    with caplog.at_level("INFO", "embtrim"):
        assert write_predictions(bundle, days / "second.parquet", tmp_path / "scores.parquet").drift == []
    assert "has no profile, so that drift is not checked" in caplog.text
    with pytest.raises(DataError, match="has no profile"):
        write_predictions(bundle, days / "second.parquet", tmp_path / "s.parquet", strict=True)


def test_drift_counts_rows_that_the_rule_keeps(tmp_path):
    rng = np.random.default_rng(0)
    log = pl.DataFrame({"click": [0, 1] * 300, "shown": [1] * 600, "user": [f"u{k}" for k in rng.integers(0, 30, 600)]})
    schema = Schema(label="click", where="shown > 0", fields=(FieldSpec(name="user"),))
    data = embtrim.encode(log, schema, out=tmp_path / "data")
    save(FM(data.schema, embedding_dim=2), tmp_path / "bundle", data)
    bundle = load_bundle(tmp_path / "bundle")
    # A third of the rows were not shown; their users are new.
    later = log.with_columns(user=pl.Series([f"new{k}" if k % 3 == 0 else f"u{k % 30}" for k in range(600)]))
    later = later.with_columns(shown=pl.Series([int(k % 3 != 0) for k in range(600)]))
    for suffix in ("csv", "parquet"):
        path = tmp_path / f"later.{suffix}"
        (later.write_csv if suffix == "csv" else later.write_parquet)(path)
        done = write_predictions(bundle, path, tmp_path / f"{suffix}.parquet", keep=["user"])
        scores = pl.read_parquet(tmp_path / f"{suffix}.parquet")
        assert (done.num_rows, done.drift, done.shares[0]["unseen"]) == (600, [], 0.0)
        assert scores["user"].to_list() == later["user"].to_list()
        np.testing.assert_array_equal(scores["score"], bundle.predict(later))
        np.testing.assert_allclose(scores["score"], bundle.predict(later.drop("shown")), rtol=1e-6)
    log.drop("shown").with_columns(user=later["user"]).write_parquet(tmp_path / "without.parquet")
    assert write_predictions(bundle, tmp_path / "without.parquet", tmp_path / "all.parquet").drift[0].field == "user"
