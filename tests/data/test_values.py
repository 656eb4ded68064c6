"""A value has one text: later files in other types, the kinds that texts say, and numbers that mean "missing"."""

from datetime import date, datetime, timedelta
from decimal import Decimal

import numpy as np
import polars as pl
import pytest

from embtrim.data.encoder import Encoder
from embtrim.data.kinds import kind_of_texts
from embtrim.errors import DataError
from embtrim.schema import FieldSpec
from tests.data.small_logs import ONE, ids, schema_of, vocabulary

NOON = datetime(2024, 3, 1, 12, 0, 0, 250_000)
UNSEEN, ABSENT = "unseen", None


def typed(values, dtype):
    return (
        pl.Series(values, dtype=pl.String).str.to_decimal(scale=2)
        if dtype == "decimal"
        else pl.Series(values, dtype=dtype)
    )


def encoder_of(run, values: pl.Series, **settings) -> tuple[Encoder, FieldSpec]:
    frame = pl.DataFrame({"y": [i % 2 for i in range(len(values) + 2)], "a": values.extend_constant(values[0], 2)})
    data = run(frame, schema_of(FieldSpec(name="a", **settings)))
    return Encoder.load(data.folder), data.schema.fields[0]


def read(encoder: Encoder, cells: pl.Series) -> list:
    """The value of each cell as the vocabulary has it, UNSEEN for the OOV row."""
    value_of = {i: value for value, i, _ in encoder.vocabularies["a"].rows()}
    return [value_of.get(i, UNSEEN) for i in encoder.encode_chunk(pl.DataFrame({"a": cells})).ids[:, 0].tolist()]


LATER = {
    "integers": (
        typed([1034, 7, -2, None], pl.Int64),
        "integer",
        [
            (typed(["1034.0", " 1034", "001034", "+1034", "1.034e3", "7.00", "-2."], pl.String), ["1034"] * 5 + ["7", "-2"]),
            (typed(["12.5", "x", "", "nan", "NULL"], pl.String), [UNSEEN, UNSEEN, None, None, UNSEEN]),
            (typed([1034.0, 7.5, float("nan"), None], pl.Float64), ["1034", UNSEEN, None, None]),
            (typed([1034.0, 7.0], pl.Float32), ["1034", "7"]),
            (pl.Series([Decimal("1034.00"), Decimal("7.50")]), ["1034", UNSEEN]),
            (typed([1034, 7], pl.UInt16), ["1034", "7"]),
            (typed(["7", "1034.0"], pl.Categorical), ["7", "1034"]),
        ],
    ),
    "integers in text": (
        typed(["1034", "7", "NULL", ""], pl.String),
        "integer",
        [(typed(["1034.0", "0007", "NULL", ""], pl.String), ["1034", "7", "NULL", None]), (typed([7], pl.Int8), ["7"])],
    ),
    "integers after an upcast": (
        typed(["1034.0", "7.0", "", "7"], pl.String),
        "integer",
        [(typed(["1034", "7"], pl.String), ["1034", "7"]), (typed([7], pl.Int8), ["7"])],
    ),
    "flags of 0 and 1": (
        typed([0, 1], pl.Int64),
        "integer",
        [(typed([True, False], pl.Boolean), ["1", "0"]), (typed(["True", "false"], pl.String), ["1", "0"])],
    ),
    "large integers": (
        typed([2**53 + 1, 2**53], pl.Int64),
        "integer",
        [(typed([str(2**53 + 1), f"0{2**53}"], pl.String), [str(2**53 + 1), str(2**53)])],
    ),
    "floats": (
        typed([1034.5, 7.0, 0.1, 1e20], pl.Float64),
        "float",
        [
            (typed(["1034.50", "7", "7.0", ".1", "1e20", "100000000000000000000"], pl.String), ["1034.5", "7", "7", "0.1", "1e+20", "1e+20"]),
            (typed(["0.1", "1034.5"], "decimal"), ["0.1", "1034.5"]),
            (typed([0.1], pl.Float32), ["0.1"]),
        ],
    ),
    "small floats": (typed([0.1, 2.5], pl.Float32), "float32", [(typed([float(np.float32(0.1)), 2.5], pl.Float64), ["0.1", "2.5"])]),
    "prices": (typed(["12.50", "7.00"], "decimal"), "decimal", [(typed(["12.5", "7", "7.000"], pl.String), ["12.5", "7", "7"]), (typed([12.5, 7], pl.Float64), ["12.5", "7"])]),
    "booleans": (
        typed([True, False, None], pl.Boolean),
        "boolean",
        [(typed(["True", "1", "1.0", "yes", "T", "FALSE", "0", "maybe", ""], pl.String), ["true"] * 5 + ["false"] * 2 + [UNSEEN, None]), (typed([1, 0], pl.Int8), ["true", "false"])],
    ),
    "booleans of pandas": (typed(["True", "False"], pl.String), "boolean", [(typed([True, False], pl.Boolean), ["true", "false"])]),
    "text": (
        typed(["1034", "x", "007"], pl.String),
        "text",
        [(typed(["001034", "1034.0", " x", "7", "007"], pl.String), [UNSEEN, UNSEEN, UNSEEN, UNSEEN, "007"]), (typed([1034], pl.Int64), ["1034"])],
    ),
    "timestamps": (
        typed([NOON, datetime(2024, 3, 2)], pl.Datetime("us")),
        "timestamp",
        [
            (typed([NOON, datetime(2024, 3, 2)], pl.Datetime("ms")), ["2024-03-01 12:00:00.25", "2024-03-02 00:00:00"]),
            (typed([NOON, datetime(2024, 3, 2)], pl.Datetime("ns")), ["2024-03-01 12:00:00.25", "2024-03-02 00:00:00"]),
            (typed(["2024-03-01T12:00:00.250", "2024-03-02", "2024-3-2 0:00"], pl.String), ["2024-03-01 12:00:00.25"] + ["2024-03-02 00:00:00"] * 2),
            (typed([date(2024, 3, 2)], pl.Date), ["2024-03-02 00:00:00"]),
        ],
    ),
    "instants": (
        typed([NOON, datetime(2024, 3, 2)], pl.Datetime("us", "UTC")).dt.convert_time_zone("Europe/Berlin"),
        "instant",
        [
            (typed([NOON], pl.Datetime("ms", "UTC")), ["2024-03-01 12:00:00.25Z"]),
            (typed(["2024-03-01 13:00:00.25+01:00", "2024-03-02T00:00Z"], pl.String), ["2024-03-01 12:00:00.25Z", "2024-03-02 00:00:00Z"]),
        ],
    ),
    "days": (typed([date(2024, 3, 2)], pl.Date), "date", [(typed(["2024-03-02 00:00:00", "2024-3-2", "2024-03-02 01:00"], pl.String), ["2024-03-02"] * 2 + [UNSEEN]), (typed([datetime(2024, 3, 2)], pl.Datetime("ns")), ["2024-03-02"])]),
}  # fmt: skip


class TestLaterFiles:
    @pytest.mark.parametrize("name", LATER)
    def test_a_value_keeps_its_id_in_another_type(self, run, name):
        trained, kind, later = LATER[name]
        encoder, field = encoder_of(run, trained)
        assert field.kind == kind
        for cells, expected in later:
            assert read(encoder, cells) == expected

    @pytest.mark.parametrize(
        "trained, cells, message",
        [
            (typed([1, 2], pl.Int64), typed([2.0, 2.0**53 + 2], pl.Float64), "row 2: column 'a' holds '9007199254740994.0', which is a float"),
            (typed([1, 2], pl.Int64), typed(["1", "9.1e+15"], pl.String), "row 2: column 'a' holds '9.1e.15'"),
            (typed([NOON], pl.Datetime("us")), typed([NOON], pl.Datetime("us", "UTC")), "has a zone, and the times of training had none"),
            (typed([NOON], pl.Datetime("us", "UTC")), typed(["2024-03-01 12:00"], pl.String), "has no zone, and the times of training had zones"),
        ],
    )  # fmt: skip
    def test_what_would_be_a_guess_is_refused(self, run, trained, cells, message):
        encoder, _ = encoder_of(run, trained)
        with pytest.raises(DataError, match=message):
            encoder.encode_chunk(pl.DataFrame({"a": cells}))

    def test_lists_and_hashes(self, run, write):
        frame = pl.DataFrame({"y": [0, 1, 1], "a": [[12, 7], [7], [12]], "h": [1034, 7, 12], "g": ["1034", "7", "12"]})
        fields = (
            FieldSpec(name="a", type="multi", max_len=2),
            FieldSpec(name="h", hash_size=1000),
            FieldSpec(name="g", hash_size=1000),
        )
        frame = frame.with_columns(pl.Series("a", frame["a"], pl.List(pl.Int32)))
        data = run(frame, schema_of(*fields))
        assert [field.kind for field in data.schema.fields] == ["integer"] * 3
        later = pl.DataFrame(
            {"a": [["12.0", " 7"], [], ["7"]], "h": ["1034.0", " 7", "0012"], "g": [1034.0, 7.0, 12.0]}
        )
        expected = np.array(ids(data))
        expected[1:, :2] = [[-1, -1], [expected[1, 0], -1]]
        assert Encoder.load(data.folder).encode_chunk(later).ids.tolist() == expected.tolist()

    def test_fields_of_one_table_have_kinds_of_their_own(self, run):
        fields = (FieldSpec(name="a", table="t"), FieldSpec(name="b", table="t"))
        frame = pl.DataFrame({"y": [0, 1, 1], "a": ["001", "x", "1"], "b": [1, 2, 2]})
        data = run(frame, schema_of(*fields))
        assert [field.kind for field in data.schema.fields] == ["text", "integer"]
        later = Encoder.load(data.folder).encode_chunk(pl.DataFrame({"a": ["001", "1"], "b": ["001", "1.0"]}))
        one, padded = (later.ids[i, 0] for i in (1, 0))
        assert later.ids[:, 1].tolist() == [one, one]
        assert padded != one

    def test_a_kind_may_be_declared(self, run):
        frame = pl.DataFrame({"y": [0, 1, 1], "a": ["1", "2.0", "2"]})
        assert vocabulary(run(frame, schema_of(FieldSpec(name="a"))), "a") == [("2", 1, 2), ("1", 2, 1)]
        kept = vocabulary(run(frame, schema_of(FieldSpec(name="a", kind="text"))), "a")
        assert [value for value, _, _ in kept] == ["1", "2", "2.0"]

    def test_a_vocabulary_without_kinds_goes_on_as_it_is_and_says_so(self, run, caplog):
        encoder, field = encoder_of(run, typed([1034, 7], pl.Int64))
        schema = encoder.schema.replace(fields=(field.replace(kind=None),))
        assert schema.fingerprint == encoder.schema.fingerprint
        old = Encoder(schema, encoder.vocabularies)
        cells = typed(["1034", "1034.0", "1034.0"], pl.String)
        assert read(old, cells) == read(old, cells) == ["1034", UNSEEN, UNSEEN]
        assert caplog.text.count("without the kinds of its columns") == 1

    def test_booleans_in_a_dense_field(self, run):
        fields = (FieldSpec(name="a", type="dense", transform="none"),)
        data = run(
            pl.DataFrame({"y": [0, 1], "a": [True, False]}), schema_of(FieldSpec(name="y2", column="a"), *fields)
        )
        encoder = Encoder.load(data.folder)
        for cells in (["True", "0", " false", ""], [1.0, 0.0, 0.0, None]):
            dense = encoder.encode_chunk(pl.DataFrame({"a": cells})).dense
            assert dense is not None
            assert dense.ravel().tolist() == [1, 0, 0, 0]
        numbers = run(pl.DataFrame({"y": [0, 1], "a": [1, 0]}), schema_of(FieldSpec(name="y2", column="a"), *fields))
        with pytest.raises(DataError, match="'True', which is not a number"):
            Encoder.load(numbers.folder).encode_chunk(pl.DataFrame({"a": ["True"]}))


@pytest.mark.parametrize(
    "texts, kind",
    [
        (["1", " 2 ", "2.0", "NaN", "-3"], "integer"),
        (["1", "a"], "text"),
        (["+1"], "text"),
        (["02139", "10001"], "text"),
        (["1.9", "1.10"], "text"),
        (["1.90", "1.10", "2"], "float"),
        (["0.5", "1e-05", "-2"], "float"),
        (["12e5", "3456"], "text"),
        (["true", "FALSE"], "boolean"),
        (["True", "1", "0.0"], "boolean"),
        (["yes", "no"], "text"),
        (["2024-03-01", "2024-3-2"], "date"),
        (["2024-03-01", "2024-03-01T12:00:00"], "timestamp"),
        (["2024-03-01 12:00+02:00", "2024-03-01T12:00:00Z"], "instant"),
        (["2024-03-01 12:00", "2024-03-01T12:00:00Z"], "text"),
        (["2024-13-01"], "text"),
        (["", "null"], "text"),
    ],
)
def test_what_texts_say(texts, kind):
    assert kind_of_texts(pl.Series([*texts, None])) == kind


class TestPartsOfDifferentTypes:
    @pytest.mark.parametrize(
        "types, kind",
        [
            ((pl.Int64, pl.Float64), "integer"),
            ((pl.Float64, pl.Int64, pl.Float32), "integer"),
            ((pl.Float32, pl.Float64), "float"),
            ((pl.Int64, pl.String), "integer"),
            ((pl.Boolean, pl.Int64), "integer"),
            ((pl.Int64, pl.Null), "integer"),
        ],
    )
    def test_a_value_has_one_id_in_all_parts(self, run, tmp_path, types, kind):
        for part, dtype in enumerate(types):
            cells = pl.Series([1, 0, 1], dtype=pl.Int64) if dtype != pl.Null else pl.Series([None] * 3, dtype=pl.Null)
            frame = pl.DataFrame({"y": [0, 1, 1], "a": cells.cast(dtype)})
            frame.write_parquet(tmp_path / f"part{part}.parquet")
        paths = [tmp_path / f"part{part}.parquet" for part in range(len(types))]
        for schema in (None, ONE):
            data = run(paths, schema, **({} if schema else {"label": "y"}))
            assert data.schema.fields[0].kind == kind
            assert [value for value, _, _ in vocabulary(data, "a") if value] == ["1", "0"]

    @pytest.mark.parametrize("cells", [[[1], [2], [1]], [NOON] * 3])
    def test_types_with_nothing_in_common_name_files_and_column(self, run, tmp_path, cells):
        pl.DataFrame({"y": [0, 1, 1], "a": [1, 0, 1]}).write_parquet(tmp_path / "one.parquet")
        pl.DataFrame({"y": [0, 1, 1], "a": cells}).write_parquet(tmp_path / "two.parquet")
        paths = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
        for schema in (None, ONE):
            with pytest.raises(DataError, match=r"column 'a' holds Int64 in .*one.parquet and .* in .*two.parquet"):
                run(paths, schema, label="y")

    @pytest.mark.parametrize("settings", [{}, {"hash_size": 9}, {"type": "dense", "transform": "none"}])
    def test_durations_are_refused(self, run, settings):
        frame = pl.DataFrame({"y": [0, 1], "a": [timedelta(seconds=1), timedelta(seconds=2)], "b": ["u", "v"]})
        with pytest.raises(DataError, match=r"column 'a' holds Duration.*; write its seconds as a number"):
            run(frame, schema_of(FieldSpec(name="b"), FieldSpec(name="a", **settings)))
        assert [field.name for field in run(frame, label="y").schema.fields] == ["b"]


class TestNumbersThatMeanMissing:
    NULLS = ("", "-999", "-1.5")

    @pytest.mark.parametrize("dtype", [pl.Int64, pl.Float64, pl.Float32, pl.String, "decimal", "text"])
    @pytest.mark.parametrize("kind", ["categorical", "hashed", "multi", "numeric", "dense"])
    def test_in_every_kind_of_field(self, run, dtype, kind):
        settings = {
            "categorical": {},
            "hashed": {"hash_size": 1000},
            "multi": {"type": "multi", "separator": "|"},
            "numeric": {"type": "numeric", "transform": "log2"},
            "dense": {"type": "dense", "transform": "standard"},
        }[kind]
        words = ["-999", "-999.0", " -999.00", "-1.50", None]
        cells = pl.Series(["5", "7", *words])
        if dtype == "text":
            cells = pl.Series(["5", "x" if kind in ("categorical", "hashed", "multi") else "7", *words])
        elif dtype != pl.String:
            cells = typed(cells.str.strip_chars().to_list(), "decimal")
            cells = (
                cells if dtype == "decimal" else cells.cast(pl.Float64).round(0 if dtype == pl.Int64 else 1).cast(dtype)
            )
        if dtype == pl.Int64:
            cells = cells.set(cells == -2, -999)
        if kind == "multi" and cells.dtype != pl.String:
            cells = cells.reshape((-1, 1)).arr.to_list()
        frame = pl.DataFrame({"y": [0, 1, 0, 1, 0, 1, 0], "a": cells, "b": ["u"] * 7})
        data = run(frame, schema_of(FieldSpec(name="b"), FieldSpec(name="a", **settings), nulls=self.NULLS))
        if kind == "dense":
            dense = data.split("train").dense
            assert dense is not None
            assert np.allclose(dense.ravel(), [-1, 1, 0, 0, 0, 0, 0])
            return
        found = [row[1] for row in ids(data)]
        assert len(set(found[2:])) == 1
        assert len(set(found)) == 3
        later = Encoder.load(data.folder).encode_chunk(frame)
        assert later.ids.tolist() == ids(data)

    def test_a_text_with_leading_zeros_is_no_number(self, run):
        frame = pl.DataFrame({"y": [0, 1, 1], "a": ["0999", "999", "x"]})
        data = run(frame, schema_of(FieldSpec(name="a"), nulls=("999",)))
        assert [value for value, _, _ in vocabulary(data, "a")] == ["0999", "x", None]


def test_validation_rows_are_brought_to_the_kind_of_training_rows(run):
    """Only training rows say the kind; a value of the validation rows is brought to it."""
    train = pl.DataFrame({"y": [0, 1], "a": ["1", "2"]})
    valid = pl.DataFrame({"y": [0, 1], "a": ["1.0", "b"]})
    data = run(train, ONE, split=None, valid=valid)
    assert data.schema.fields[0].kind == "integer"
    assert ids(data, "valid") == [ids(data)[0], [0]]
    large = pl.DataFrame({"y": [0, 1], "a": ["1", "9e18"]})
    with pytest.raises(DataError, match="the log: column 'a' holds '9e18', which is a floating-point number"):
        run(train, ONE, split=None, valid=large)
