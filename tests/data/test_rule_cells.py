"""Rules on cells of every type: labels by rule, rows by rule, and cells that cannot be read as the rule asks."""

import datetime as dt

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.data.drafting import infer_schema
from embtrim.data.log_file import START, Chunk
from embtrim.data.rule_cells import holds
from embtrim.errors import ConfigError, DataError
from embtrim.rules import parse_rule
from embtrim.schema import FieldSpec, Schema
from tests.data.small_logs import ids, vocabulary

CELLS = pl.DataFrame(
    {
        "whole": [8, 9, None, -1],
        "event": ["buy", "view", "", None],
        "text": ["8", " 9.0", "", "nan"],
        "t": ["2024-01-31", "2024-01-31T10:00", "2024-02-01 00:00:00.5", ""],
        "day": [dt.date(2024, 1, 31)] * 3 + [None],
        "ok": ["true", "False", "1", "0"],
        "real": [0.5, float("nan"), 8.0, 9.0],
        "big": ["9007199254740993", "9007199254740992", "1", ""],
        "word": pl.Series(["8", "9", "x", "y"], dtype=pl.Categorical),
    }
)


def truth(text: str, frame: pl.DataFrame = CELLS, nulls: tuple[str, ...] = ("",)) -> list:
    return holds(parse_rule(text), Chunk(frame, 0, lambda row: f"log line {row + 2}", 1.0, START), nulls).to_list()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("whole >= 8", [True, True, None, False]),
        ("-whole <= 0.5 - 9 + 0.5", [True, True, None, False]),
        ("text >= 8", [True, True, None, None]),
        ("text IN (8, 10)", [True, False, None, None]),
        ("event <> 'buy'", [False, True, None, None]),
        ("event NOT IN ('buy')", [False, True, None, None]),
        ("event IS NULL or event = 'buy'", [True, False, True, True]),
        ("t >= '2024-01-31 10:00:00'", [False, True, True, None]),
        ("day < '2024-01-31T00:00:01'", [True, True, True, None]),
        ("ok", [True, False, True, False]),
        ("not ok and whole > 0", [False, True, False, False]),
        ("not ok or whole > 0", [True, True, None, True]),
        ("ok = TRUE", [True, False, True, False]),
        ("real between 0.5 and 8", [True, None, True, False]),
        ("real = '8'", [False, None, True, False]),
        ("real / 0 > 1", [None, None, None, None]),
        ("whole = real + 7.5", [True, None, None, False]),
        ("big = 9007199254740993", [True, False, False, None]),
        ("word = '8'", [True, False, False, False]),
    ],
)
def test_cells(text, expected):
    assert truth(text) == expected


def test_a_missing_value_may_be_a_number():
    frame = pl.DataFrame({"text": ["-999.0", "5"], "real": [-999.0, 5.0]})
    assert truth("text < 9", frame, ("", "-999")) == [None, True]
    assert truth("real IS NULL", frame, ("", "-999")) == [True, False]


@pytest.mark.parametrize(
    "text, words",
    [
        ("event > 5", "log line 2: column 'event' holds 'buy', but rule 'event > 5' needs a number"),
        ("event", "log line 2: column 'event' holds 'buy', but rule 'event' needs 0, 1, true or false"),
        ("event < '2024-01-01'", "line 2: column 'event' holds 'buy', but .* needs a time"),
        ("day > 5", "needs a number"),
        ("evnt = 'buy'", "reads 'evnt', which is not a column; did you mean 'event'"),
        ('event = "buy"', "a text stands in single quotes: 'buy'"),
    ],
)
def test_cells_that_cannot_be_read(text, words):
    with pytest.raises(DataError, match=words):
        truth(text)


def test_a_name_that_is_not_one_word_is_quoted():
    frame = pl.DataFrame({"Book-Rating": [8, 5]})
    assert truth('"Book-Rating" >= 8', frame) == truth("`Book-Rating` >= 8", frame) == [True, False]
    with pytest.raises(DataError, match="write the column 'Book-Rating' in double quotes: \"Book-Rating\""):
        truth("Book-Rating >= 8", frame)


@pytest.fixture
def rated() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "user": [f"u{k}" for k in rng.integers(0, 40, 3000)],
            "price": rng.normal(size=3000),
            "t": np.arange(3000),
            "rating": rng.integers(0, 11, 3000),
        }
    )


@pytest.mark.parametrize("split", ["8:1:1", "time:8:1:1", "time:500,2000"])
@pytest.mark.parametrize("form", ["frame", "csv"])
def test_rows_that_are_left_out_count_for_nothing(rated, tmp_path, split, form):
    schema = Schema(
        label="y",
        time="t",
        fields=(FieldSpec(name="user"), FieldSpec(name="price", type="numeric", transform="quantile:5")),
    )
    ready = rated.filter(pl.col("rating") > 0).with_columns(y=(pl.col("rating") >= 8).cast(pl.Int8))
    expected = embtrim.encode(ready, schema, out=tmp_path / "expected", split=split)
    log: pl.DataFrame | str = rated
    if form == "csv":
        log = str(tmp_path / "log.csv")
        rated.write_csv(log)
    data = embtrim.encode(
        log, schema, label="rating >= 8", where="rating > 0", out=tmp_path / "data", split=split, chunk_bytes=20_000
    )
    assert data.schema.tables == expected.schema.tables
    assert vocabulary(data, "price") == vocabulary(expected, "price")
    for name in ("train", "valid", "test"):
        assert ids(data, name) == ids(expected, name)
        assert data.split(name).labels.tolist() == expected.split(name).labels.tolist()


def test_the_draft_leaves_out_what_makes_the_label(rated):
    schema = infer_schema(rated, "rating >= 8", where="rating > 0")
    assert (schema.label, schema.where) == ("rating >= 8", "rating > 0")
    assert [field.name for field in schema.fields] == ["user", "price"]
    with pytest.raises(ConfigError, match="field 'rating' reads the label column 'rating'"):
        Schema(label="rating >= 8", fields=(FieldSpec(name="rating"),))
    # Of several columns, one may be a feature.
    Schema(label="seen >= 0.5 * length", fields=(FieldSpec(name="length"),))


def test_a_log_line_is_named_after_rows_were_left_out(run, write):
    rows = "".join(f"{k},{k % 11}\n" for k in range(100))
    path, missing = write("log.csv", f"a,rating\n{rows}7,\n8,x\n"), write("missing.csv", f"a,rating\n{rows}7,\n")
    schema = Schema(label="rating >= 8", fields=(FieldSpec(name="a"),))
    with pytest.raises(DataError, match=r"line 102: label 'rating >= 8' is missing.* where = 'rating IS NOT NULL'"):
        run(missing, schema)
    with pytest.raises(DataError, match=r"line 103: column 'rating' holds 'x', but rule .* needs a number"):
        run(path, schema.replace(where="rating IS NOT NULL AND a <> '3'"))


def test_a_schema_without_rows_chosen_keeps_its_fingerprint():
    assert Schema.from_sizes([3, 4]).fingerprint == "a037393d87db"
    assert Schema.from_sizes([3, 4]).replace(where="f0 > 1").fingerprint != "a037393d87db"


def test_no_rows_are_left(rated, tmp_path):
    with pytest.raises(DataError, match="holds no rows where rating > 10"):
        embtrim.encode(rated, label="rating >= 8", where="rating > 10", out=tmp_path / "data")
