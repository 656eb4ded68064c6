import gzip
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtrim.data import writing
from embtrim.data.cells import hash_values
from embtrim.data.dataset import EncodedDataset
from embtrim.data.drafting import infer_schema
from embtrim.data.encoder import Encoder
from embtrim.data.encoding import encode
from embtrim.data.numbering import Numbering
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import open_log
from embtrim.data.splitting import Split, random_bits
from embtrim.data.transforms import quantile_edges
from embtrim.errors import ConfigError, DataError
from embtrim.schema import FieldSpec, Schema
from embtrim.system.progress import StageBar

DATA = Path(__file__).parents[3] / "shared" / "data"
ALL_TRAIN = "1:0:0"


def schema_of(*fields: FieldSpec, **settings) -> Schema:
    return Schema(label="y", fields=fields, **settings)


ONE = schema_of(FieldSpec(name="a"))
PRICED = schema_of(FieldSpec(name="a"), FieldSpec(name="price", type="numeric", transform="log2"))


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.fixture
def run(tmp_path):
    """encode() into a fresh folder, without a bar."""
    count = [0]

    def run_encode(source, schema=None, **options) -> EncodedDataset:
        count[0] += 1
        options.setdefault("split", ALL_TRAIN)
        return encode(source, schema, **{"out": tmp_path / f"out{count[0]}", "progress": False, **options})

    return run_encode


def ids(data: EncodedDataset, split: str = "train") -> list:
    return data.split(split).ids.tolist()


def vocabulary(data: EncodedDataset, table: str) -> list[tuple]:
    assert data.folder is not None
    return Encoder.load(data.folder).vocabularies[table].rows()


class TestByHand:
    """A dozen rows whose ids are worked out on paper."""

    def test_categorical_ids_fall_with_frequency_and_ties_rise_with_value(self, run):
        frame = pl.DataFrame({"y": [0, 1] * 4, "a": ["c", "b", "b", None, "a", "a", None, None]})
        data = run(frame, ONE)
        # counts: missing 3, a 2, b 2, c 1
        assert vocabulary(data, "a") == [(None, 1, 3), ("a", 2, 2), ("b", 3, 2), ("c", 4, 1)]
        assert ids(data) == [[4], [3], [3], [1], [2], [2], [1], [1]]
        assert data.schema.tables == {"a": 5}
        assert data.split("train").labels.tolist() == [0, 1] * 4

    def test_min_count_sends_rare_values_to_oov(self, run):
        frame = pl.DataFrame({"y": [0, 1, 0, 1, 0], "a": ["x", "x", "z", "q", None]})
        data = run(frame, schema_of(FieldSpec(name="a", min_count=2)))
        assert vocabulary(data, "a") == [("x", 1, 2)]
        assert ids(data) == [[1], [1], [0], [0], [0]]  # a rare missing value is not an exception

    def test_missing_tie_comes_last(self, run):
        data = run(pl.DataFrame({"y": [0, 1], "a": [None, "zz"]}), ONE)
        assert vocabulary(data, "a") == [("zz", 1, 1), (None, 2, 1)]

    def test_log2_is_the_criteo_rule(self, run):
        prices = [0.0, 2.0, 2.9, 3.0, 1000.0, -1.0, -2.5, None, 0.7]
        data = run(pl.DataFrame({"y": [0, 1, 0, 1, 0, 1, 0, 1, 0], "a": ["u"] * 9, "price": prices}), PRICED)
        value_of = {i: v for v, i, _ in vocabulary(data, "price")}
        buckets = [value_of[row[1]] for row in ids(data)]
        by_rule = [None if v is None else math.floor(math.log(v) ** 2) if v > 2 else math.floor(v) for v in prices]
        assert by_rule == [0, 2, 1, 1, 47, -1, -3, None, 0]
        assert buckets == [None if b is None else str(b) for b in by_rule]

    def test_quantile_buckets_use_training_rows_only(self, run):
        train = pl.DataFrame({"y": [0, 1] * 3, "q": [1.0, 2, 3, 4, 5, 6]})
        valid = pl.DataFrame({"y": [0, 1, 0], "q": [-100.0, 3.0, 1e9]})
        schema = schema_of(FieldSpec(name="q", type="numeric", transform="quantile:3"))
        data = run(train, schema, valid=valid, split=None)
        # edges 3 and 5: buckets {1,2} {3,4} {5,6}, two each, so ids 1 2 3
        assert ids(data) == [[1], [1], [2], [2], [3], [3]]
        assert ids(data, "valid") == [[1], [2], [3]]

    def test_dense_values(self, run):
        frame = pl.DataFrame({"y": [0, 1, 0], "a": ["u"] * 3, "d": [1.0, None, 5.0], "e": [-3.0, None, 7.0]})
        fields = (
            FieldSpec(name="a"),
            FieldSpec(name="s", column="d", type="dense", transform="standard"),
            FieldSpec(name="e", type="dense", transform="log1p"),
            FieldSpec(name="n", column="e", type="dense", transform="none"),
        )
        data = run(frame, schema_of(*fields))
        # mean 3, std 2 over {1, 5}; missing is 0 after the transform
        expected = [[-1, -math.log(4), -3], [0, 0, 0], [1, math.log(8), 7]]
        assert data.split("train").dense == pytest.approx(np.array(expected), rel=1e-6)
        assert data.schema.tables == {"a": 2}

    def test_standard_of_a_constant_column_is_zero(self, run):
        frame = pl.DataFrame({"y": [0, 1], "a": ["u", "v"], "d": [4.0, 4.0]})
        data = run(frame, schema_of(FieldSpec(name="a"), FieldSpec(name="d", type="dense", transform="standard")))
        assert data.split("train").dense.tolist() == [[0.0], [0.0]]

    @pytest.mark.parametrize("as_list", [True, False])
    def test_multi_valued(self, run, as_list):
        cells = [["a", "b", "c"], ["b"], [], None, ["b", None, "", "a"]]
        if not as_list:
            cells = ["a|b|c", "b", "", None, "b|NA||a"]
        field = FieldSpec(name="g", type="multi", separator=None if as_list else "|", max_len=2, nulls=("NA",))
        data = run(pl.DataFrame({"y": [0, 1, 0, 1, 0], "g": cells}), schema_of(field))
        # the first two values of each row count: b 3, a 2
        assert vocabulary(data, "g") == [("b", 1, 3), ("a", 2, 2)]
        assert ids(data) == [[2, 1], [1, -1], [-1, -1], [-1, -1], [1, 2]]

    def test_shared_table_counts_both_columns(self, run):
        frame = pl.DataFrame({"y": [0, 1, 0], "target": ["p", "q", "q"], "history": [["r", "p"], ["p"], None]})
        fields = (
            FieldSpec(name="target", table="item"),
            FieldSpec(name="history", type="multi", max_len=2, table="item"),
        )
        data = run(frame, schema_of(*fields))
        assert vocabulary(data, "item") == [("p", 1, 3), ("q", 2, 2), ("r", 3, 1)]
        assert ids(data) == [[1, 3, 1], [2, 1, -1], [2, -1, -1]]
        assert data.schema.tables == {"item": 4}

    def test_nulls_per_field_in_a_shared_table(self, run):
        frame = pl.DataFrame({"y": [0, 1, 0], "a": ["NA", "x", "x"], "b": ["NA", "NA", "x"]})
        fields = (FieldSpec(name="a", table="t", nulls=("NA",)), FieldSpec(name="b", table="t"))
        data = run(frame, schema_of(*fields))
        assert vocabulary(data, "t") == [("x", 1, 3), ("NA", 2, 2), (None, 3, 1)]
        assert ids(data) == [[3, 2], [1, 2], [1, 1]]

    def test_hash_is_stable_across_processes_and_releases(self, run):
        # blake2b-64 with key "embtrim", little endian, mod 1000, plus 1: fixed for ever, bundles rely on it
        assert hash_values(pl.Series(["ann", "bob", None, "", "é"]), 1000).tolist() == HASHES
        data = run(
            pl.DataFrame({"y": [0, 1, 0], "a": ["ann", "NA", None]}),
            schema_of(FieldSpec(name="a", hash_size=1000, nulls=("NA",))),
        )
        assert ids(data) == [[HASHES[0]], [HASHES[2]], [HASHES[2]]]
        assert data.schema.tables == {"a": 1001}

    def test_weights(self, run):
        frame = pl.DataFrame({"y": [0, 1], "a": ["u", "v"], "w": [0.5, 2]})
        data = run(frame, ONE.replace(weight="w"))
        assert data.split("train").weights.tolist() == [0.5, 2.0]


HASHES = [36, 714, 670, 805, 790]


class TestCanonicalValues:
    def test_the_same_log_as_csv_and_parquet_gives_the_same_ids(self, run, tmp_path):
        frame = pl.DataFrame(
            {
                "y": [True, False, True, False],
                "a": [3, 12, 3, None],
                "f": [1.0, 2.5, None, 1.0],
                "d": [None, 1, 2, 2],
                "n": [5.0, None, 70.0, 5.0],
            },
            schema_overrides={"d": pl.Int32},
        ).with_columns(pl.date(2024, 1, pl.col("d") + 1).alias("d"))
        fields = [FieldSpec(name=n) for n in "afd"] + [FieldSpec(name="n", type="numeric", transform="log2")]
        frame.write_parquet(tmp_path / "log.parquet")
        as_text = frame.with_columns(pl.col("f").map_elements(lambda v: f"{v:g}", return_dtype=pl.String))
        as_text.write_csv(tmp_path / "log.csv")
        one, two = (run(tmp_path / f"log.{suffix}", schema_of(*fields)) for suffix in ("parquet", "csv"))
        assert ids(one) == ids(two)
        assert one.schema.fingerprint == two.schema.fingerprint
        assert one.split("train").labels.tolist() == two.split("train").labels.tolist() == [1, 0, 1, 0]

    def test_two_fields_may_read_one_column(self, run):
        frame = pl.DataFrame({"y": [0, 1], "a": [3, 100]})
        fields = (
            FieldSpec(name="id", column="a"),
            FieldSpec(name="size", column="a", type="numeric", transform="log2"),
        )
        assert ids(run(frame, schema_of(*fields))) == [[2, 1], [1, 2]]

    @pytest.mark.parametrize("nulls", [(), ("-1",)])
    def test_numbers_are_the_same_whether_a_chunk_parses_as_numbers_or_not(self, run, write, nulls):
        cells = [
            "5",
            " 5",
            "5 ",
            "+5",
            "5.",
            ".5",
            "1e1",
            "-1",
            "-1.0",
            "nan",
            "NaN",
            "",
            "007",
            "3.5",
            "1000000",
            "-7.25",
        ]
        fields = (
            FieldSpec(name="n", type="numeric", transform="log2", nulls=nulls),
            FieldSpec(name="q", column="n", type="numeric", transform="quantile:4", nulls=nulls),
            FieldSpec(name="d", column="n", type="dense", transform="log1p", nulls=nulls),
        )
        frame = pl.DataFrame({"y": ["0", "1"] * 32, "n": [cells[i % 16] for i in range(64)]})
        expected = run(frame, schema_of(*fields))
        path = write("log.tsv", "y\tn\n" + "\n".join("\t".join(row) for row in frame.rows()))
        parsed = [chunk.frame["n"].dtype for chunk in open_log(path).chunks(chunk_bytes=20, numbers=["n"])]
        assert set(parsed) == {pl.Float64, pl.String}
        for chunk_bytes in (20, 1 << 24):
            data = run(path, schema_of(*fields), chunk_bytes=chunk_bytes)
            assert ids(data) == ids(expected)
            assert data.split("train").dense.tolist() == expected.split("train").dense.tolist()

    def test_lists_need_a_multi_field(self, run):
        with pytest.raises(DataError, match="column 'a' holds lists; declare field 'a' as type = 'multi'"):
            run(pl.DataFrame({"y": [0, 1], "a": [[1], [2]]}), ONE)

    def test_text_needs_a_separator(self, run):
        with pytest.raises(DataError, match="needs separator"):
            run(pl.DataFrame({"y": [0, 1], "a": ["p", "q"]}), schema_of(FieldSpec(name="a", type="multi")))

    def test_structs_are_refused(self, run):
        with pytest.raises(DataError, match="column 'a' holds Struct"):
            run(pl.DataFrame({"y": [0, 1], "a": [{"b": 1}, {"b": 2}]}), ONE)

    def test_padded_numbers_and_stated_nulls(self, run, write):
        path = write("log.csv", "y,a,price\n0,u, 5\n1,u,NA\n0,u,-1\n1,u,nan\n0,u,\n")
        schema = PRICED.replace(nulls=("NA", "-1"))
        data = run(path, schema)
        value_of = {i: v for v, i, _ in vocabulary(data, "price")}
        assert [value_of[row[1]] for row in ids(data)] == ["2", None, None, None, None]


class TestLeaks:
    def test_vocabulary_counts_and_moments_see_training_rows_only(self, run):
        train = pl.DataFrame({"y": [0, 1, 0], "a": ["p", "q", "p"], "d": [0.0, 2.0, 1.0]})
        later = pl.DataFrame({"y": [0, 1, 1, 1], "a": ["q", "q", "q", "new"], "d": [500.0] * 4})
        schema = schema_of(FieldSpec(name="a"), FieldSpec(name="d", type="dense", transform="standard"))
        with_test = run(train, schema, test=later, split=None)
        assert vocabulary(with_test, "a") == [("p", 1, 2), ("q", 2, 1)]
        assert ids(with_test, "test") == [[2], [2], [2], [0]]
        assert with_test.schema.fingerprint == run(train, schema).schema.fingerprint

    def test_transforms_see_training_rows_only(self, run):
        numbers = [1.0, 2, 3, 4, 5, 6, -500, 500]
        frame = pl.DataFrame({"y": [0, 1] * 4, "t": range(8), "q": numbers, "d": numbers})
        fields = (
            FieldSpec(name="q", type="numeric", transform="quantile:3"),
            FieldSpec(name="d", type="dense", transform="standard"),
        )
        data = run(frame, schema_of(*fields, time="t"), split="time:6")
        transforms = Encoder.load(data.folder).transforms
        assert transforms["q"] == {"edges": [3.0, 5.0]}
        assert transforms["d"] == pytest.approx({"mean": 3.5, "std": (35 / 12) ** 0.5})

    def test_ratio_split_of_one_log(self, run):
        frame = pl.DataFrame({"y": [0, 1] * 500, "a": [str(i) for i in range(1000)]})
        data = run(frame, ONE, split="8:1:1")
        num_train = data.num_rows("train")
        assert data.schema.tables == {"a": 1 + num_train}
        assert sorted(row[0] for row in ids(data)) == list(range(1, 1 + num_train))
        assert set(np.ravel(ids(data, "valid") + ids(data, "test"))) == {0}


class TestSplits:
    FRAME = pl.DataFrame(
        {"y": [0, 1, 1] * 400, "a": [str(i % 50) for i in range(1200)], "t": [i // 2 for i in range(1200)]}
    )

    def test_ratio_does_not_depend_on_chunks(self, run, tmp_path):
        self.FRAME.write_csv(tmp_path / "log.csv")
        many = run(tmp_path / "log.csv", ONE, split="8:1:1", chunk_bytes=100)
        one = run(tmp_path / "log.csv", ONE, split="8:1:1")
        for name in one.splits:
            assert ids(many, name) == ids(one, name)
        sizes = [one.num_rows(name) for name in one.splits]
        assert sum(sizes) == 1200
        # standard deviation of a tenth of 1200 rows is 10.4
        assert sizes[1] == pytest.approx(120, abs=42)
        assert sizes[2] == pytest.approx(120, abs=42)

    def test_seed_changes_the_split_and_repeats_it(self, run):
        first, same, other = (run(self.FRAME, ONE, split="8:1:1", seed=seed) for seed in (0, 0, 1))
        assert ids(first) == ids(same)
        assert ids(first) != ids(other)

    def test_random_bits_are_fixed(self):
        assert random_bits(5, 2, seed=3).tolist() == random_bits(0, 7, seed=3).tolist()[5:]
        ones = np.unpackbits(random_bits(0, 20_000, seed=0).view(np.uint8)).mean()
        assert ones == pytest.approx(0.5, abs=0.002)

    def test_time_quantiles_never_part_a_moment(self, run):
        data = run(self.FRAME, ONE.replace(time="t"), split="time:8:1:1")
        assert [data.num_rows(name) for name in data.splits] == [960, 120, 120]
        meta = json.loads((data.folder / "meta.json").read_text())
        assert meta["split"]["cuts"] == [480.0, 540.0]
        assert meta["positives"] == {"train": 640, "valid": 80, "test": 80}

    def test_time_cuts(self, run):
        days = [f"2024-01-{1 + i // 60:02}" for i in range(1200)]
        frame = self.FRAME.with_columns(pl.Series("t", days))
        for dated in (frame, frame.with_columns(pl.col("t").str.to_date())):
            data = run(dated, ONE.replace(time="t"), split="time:2024-01-11,2024-01-16")
            assert [data.num_rows(name) for name in data.splits] == [600, 300, 300]
        data = run(frame, ONE.replace(time="t"), split=Split(by="time", cuts=("2024-01-11",)))
        assert list(data.splits) == ["train", "valid"]

    def test_zero_parts_leave_splits_out(self, run):
        data = run(self.FRAME, ONE, split="9:1:0")
        assert list(data.splits) == ["train", "valid"]
        both = run(self.FRAME, ONE, split="9:1:0", test=self.FRAME)
        assert both.num_rows("test") == 1200

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"split": "8:1"}, "split '8:1' is not understood"),
            ({"split": "0:1:1"}, "needs a positive part for train"),
            ({"split": "time:8:1:1"}, "needs the schema's time column"),
            ({"split": "8:1:1", "test": FRAME}, "a test log is given, and the split also cuts test rows"),
            ({"split": "time:5,x", "schema": ONE.replace(time="t")}, "holds numbers such as 0.0, the cuts are 5, x"),
            ({"split": "time:9,5", "schema": ONE.replace(time="t")}, "must not decrease"),
            ({"split": "time:9999,99999", "schema": ONE.replace(time="t")}, "split 'valid' is empty"),
        ],
    )
    def test_bad_splits(self, run, options, message):
        with pytest.raises((DataError, ConfigError), match=message):
            run(self.FRAME, **{"schema": ONE, **options})

    def test_us_dates_do_not_sort(self, run):
        frame = pl.DataFrame({"y": [0, 1], "a": ["p", "q"], "t": ["1/2/2024", "2/1/2023"]})
        with pytest.raises(DataError, match="row 1: time column 't' holds '1/2/2024', which does not sort"):
            run(frame, ONE.replace(time="t"), split="time:8:1:1")

    def test_empty_and_one_class_splits(self, run):
        ten = self.FRAME.head(3)
        with pytest.raises(DataError, match=r"split '(valid|test)' is empty \(split by ratio, 98:1:1\)"):
            run(ten, ONE, split="98:1:1")
        with pytest.raises(DataError, match="split 'train' has 1,200 rows, all with label 'y' = 1"):
            run(self.FRAME.with_columns(y=1), ONE)
        with pytest.raises(DataError, match="split 'test' has 2 rows, all with label 'y' = 0"):
            run(self.FRAME, ONE, split=None, test=self.FRAME.head(2).with_columns(y=0))


class TestReading:
    ROWS = "y,a\n0,u\n1,v\n1,u\n"

    @pytest.mark.parametrize(
        "name, content, options",
        [
            ("log.csv", ROWS, {}),
            ("log.csv", ROWS.replace("\n", "\r\n"), {}),
            ("log.csv", ROWS.rstrip("\n"), {}),
            ("log.csv", "\n" + ROWS.replace("\n", "\n\n"), {}),
            ("log.csv", "\ufeff" + ROWS, {}),
            ("log.csv", 'y,a\n0,"u"\n1,"v"\n1,u\n', {}),
            ("log.csv.gz", gzip.compress(ROWS.encode(), mtime=0), {}),
            ("misnamed.csv", gzip.compress(ROWS.encode(), mtime=0), {}),
            ("log.tsv", ROWS.replace(",", "\t"), {}),
            ("log.txt", ROWS.replace(",", ";"), {}),
            ("log.dat", ROWS.replace(",", "::"), {}),
            ("log.csv", ROWS.replace("y,a\n", ""), {"header": False, "columns": ["y", "a"]}),
            ("log.csv", ROWS.replace("y,a\n", "label,user\n"), {"columns": ["y", "a"]}),
            ("log.csv", ROWS.replace(",", "^"), {"separator": "^"}),
            ("log", ROWS, {"format": "csv"}),
        ],
    )
    @pytest.mark.parametrize("chunk_bytes", [4, 1 << 20])
    def test_layouts(self, run, write, name, content, options, chunk_bytes):
        data = run(write(name, content), ONE, chunk_bytes=chunk_bytes, **options)
        assert ids(data) == [[1], [2], [1]]
        assert data.split("train").labels.tolist() == [0, 1, 1]

    def test_quoted_cells_may_hold_separators_newlines_and_quotes(self, run, write):
        path = write("log.csv", 'y,a\n0,"u, ""v""\n\nw"\n1,x\n1,"u, ""v""\n\nw"\n')
        for chunk_bytes in (3, 11, 1 << 20):
            data = run(path, ONE, chunk_bytes=chunk_bytes)
            assert vocabulary(data, "a")[0] == ('u, "v"\n\nw', 1, 2)
            assert ids(data) == [[1], [2], [1]]

    def test_tabs_have_no_quotes(self, run, write):
        data = run(write("log.tsv", 'y\ta\n0\t"u\n1\tv\n'), ONE)
        assert [row[0] for row in vocabulary(data, "a")] == ['"u', "v"]

    def test_latin_1(self, run, write):
        path = write("log.csv", "y,a\n0,é\n1,v\n".encode("latin-1"))
        with pytest.raises(DataError, match=r"log.csv line 2 is not UTF-8; pass encoding='latin-1'"):
            run(path, ONE)
        assert vocabulary(run(path, ONE, encoding="latin-1"), "a")[1][0] == "é"

    def test_many_files_folder_and_glob(self, run, tmp_path):
        folder = tmp_path / "parts"
        folder.mkdir()
        for i, row in enumerate(["0,u", "1,v", "1,u"]):
            (folder / f"part{i}.csv").write_text("y,a\n" + row + "\n")
        (folder / "_SUCCESS").touch()
        files = sorted(folder.glob("*.csv"))
        for source in (files, folder, str(folder / "part?.csv")):
            assert ids(run(source, ONE)) == [[1], [2], [1]]
        assert ids(run(files[::-1], ONE)) == [[1], [2], [1]]  # u v u again, from the other end

    def test_columns_may_differ_in_order_between_files(self, run, write):
        paths = [write("1.csv", "y,a\n0,u\n"), write("2.csv", "a,y,z\nv,1,?\n")]
        assert ids(run(paths, ONE)) == [[1], [2]]

    def test_parquet_in_slices(self, run, tmp_path):
        frame = TestSplits.FRAME
        frame.write_parquet(tmp_path / "log.parquet", row_group_size=100)
        small, large = (run(tmp_path / "log.parquet", ONE, chunk_bytes=size) for size in (1 << 10, 1 << 24))
        assert ids(small) == ids(large) == ids(run(frame, ONE))

    def test_libsvm(self, run, write):
        path = write("log.svm", "0 1:1 5:1\n+1 5:1 9:1\n-1 5:1 7:0 # comment\n\n1\n")
        data = run(path)
        assert data.schema.fields[0].model_dump(include={"name", "type", "max_len"}) == {
            "name": "features",
            "type": "multi",
            "max_len": 2,
        }
        assert ids(data) == [[2, 1], [1, 3], [1, -1], [-1, -1]]
        assert data.split("train").labels.tolist() == [0, 1, 0, 1]

    def test_libsvm_values(self, run, write):
        path = write("log.svm", "0 1:0.5 5:1\n1 5:2 9:1\n")
        schema = Schema(label="label", fields=(FieldSpec(name="features", type="multi", max_len=3),))
        with pytest.raises(
            DataError, match=r"line 1 holds '1:0\.5': an index in column 'features' has no value but 0 or 1"
        ):
            run(path, schema)
        dense = [FieldSpec(name=f"x{i}", column=f"{i}", type="dense", transform="none") for i in (1, 5, 9)]
        data = run(path, schema.replace(fields=(*dense, FieldSpec(name="five", column="5"))))
        assert data.split("train").dense.tolist() == [[0.5, 1, 0], [0, 2, 1]]
        assert [field.type for field in infer_schema(path).fields] == ["numeric"] * 3

    def test_libfm_with_fields(self, run, write):
        path = write("log.ffm", "0 1:3:1 2:5:0.5\n1 1:4:1 1:3:1 2:5:1.5\n")
        fields = (
            FieldSpec(name="one", column="1", type="multi", max_len=2),
            FieldSpec(name="two", column="2:5", type="dense", transform="none"),
        )
        data = run(path, Schema(label="label", fields=fields))
        assert ids(data) == [[1, -1], [2, 1]]
        assert data.split("train").dense.tolist() == [[0.5], [1.5]]

    def test_chunks_cover_the_log_and_know_their_lines(self, write):
        text = "y,a\n" + "".join(f"{i % 2},v{i}\n" for i in range(100))
        log = open_log(write("log.csv", text))
        chunks = list(log.chunks(["a"], chunk_bytes=64))
        assert len(chunks) > 5
        assert [chunk.first_row for chunk in chunks] == [0, *np.cumsum([c.frame.height for c in chunks])[:-1]]
        assert pl.concat(c.frame for c in chunks)["a"].to_list() == [f"v{i}" for i in range(100)]
        for chunk in chunks:
            line = int(chunk.locate(1).split("line ")[1])
            assert text.split("\n")[line - 1].endswith("," + chunk.frame["a"][1])
        assert chunks[-1].done == 1.0

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("log.csv", "", "is empty"),
            ("log.csv", "y,a\n", "split 'train' is empty"),
            ("log.csv", "y,a\n0,u\n1\n", r"line 3 has 1 cells, the log has 2 columns"),
            ("log.csv", 'y,a\n0,"u,v"\n\n1,v,w\n', r"line 4 has 3 cells, the log has 2 columns"),
            ("log.csv", "y,a,a\n0,u,u\n", "names a column twice: a"),
            ("log.csv", "0,u\n1,v\n", "no column 'y', 'a'.* the first line looks like data: pass header=False"),
            ("log.csv", "y;b\n0;u\n", "no column 'a'; it has y, b; needed: y, a"),
            ("log.csv", 'y,a\n0,"u\n1,v\n', "a quote left open|cannot be parsed"),
            ("log.xlsx", b"PK\x03\x04...", "zip archive"),
            ("log.csv", "y,a\n".encode("utf-16"), "UTF-16"),
            ("log.foo", "y,a\n0,u\n", "unknown suffix '.foo'"),
            ("log.parquet", "y,a\n0,u\n", "not a readable parquet file"),
            ("log.csv", gzip.compress(b"y,a\n0,u\n" * 99, mtime=0)[:-9], "damaged gz file"),
            ("log.svm", "1 1:1 x\n", "line 1 holds 'x', which is not index:value"),
            ("log.svm", "1 1:1 2:x\n", "line 1 holds '2:x', whose value is not a number"),
        ],
    )
    def test_bad_files(self, run, write, name, content, message):
        with pytest.raises(DataError, match=message):
            run(write(name, content), ONE if "svm" not in name else None)

    def test_bad_sources(self, run, tmp_path):
        (tmp_path / "void").mkdir()
        (tmp_path / "a.csv").write_text("y,a\n0,u\n")
        (tmp_path / "b.svm").write_text("0 1:1\n")
        for source, message in [
            (tmp_path / "nope.csv", "does not exist"),
            (str(tmp_path / "*.nope"), "no file matches"),
            (tmp_path / "void", "holds no log"),
            ([], "list of files is empty"),
            ([tmp_path / "a.csv", tmp_path / "b.svm"], "different formats"),
            (3, "cannot read a int"),
        ]:
            with pytest.raises(DataError, match=message):
                run(source, ONE)


class TestBadValues:
    @pytest.mark.parametrize(
        "row, message",
        [
            (
                "0,u,n/a",
                r"log.csv line 18,204: column 'price' holds 'n/a', which is not a number; declare it categorical or add 'n/a'",
            ),
            ("0,u,inf", r"line 18,204: column 'price' holds 'inf', which is not finite"),
            ("2,u,1", r"line 18,204: label 'y' is '2'; a label is 0 or 1"),
            (",u,1", r"line 18,204: label 'y' is missing; drop the row"),
            ("yes,u,1", r"line 18,204: label 'y' is 'yes'"),
        ],
    )
    def test_text_names_the_line(self, run, write, row, message):
        rows = [f"{i % 2},u,{i}" for i in range(20_000)]
        rows[18_204 - 2] = row
        path = write("log.csv", "y,a,price\n" + "\n".join(rows))
        for chunk_bytes in (1 << 24, 50_000):
            with pytest.raises(DataError, match=message):
                run(path, PRICED, chunk_bytes=chunk_bytes)

    @pytest.mark.parametrize(
        "column, message",
        [
            ({"y": [0.0, 1.0, float("nan")]}, "row 3: label 'y' is missing"),
            ({"y": [0, 1, None]}, "row 3: label 'y' is missing"),
            ({"y": [0.0, 1.0, 0.3]}, "row 3: label 'y' is 0.3"),
            ({"y": [[0], [1], [1]]}, "label column 'y' holds List"),
            ({"w": [1.0, -1.0, 1.0]}, "row 2: weight 'w' is -1.0"),
            ({"w": [1.0, None, 1.0]}, "row 2: weight 'w' is None"),
            ({"w": [1.0, 1.0, 1e39]}, r"row 3: weight 'w' is 1e[+]?39; a weight is a finite number"),
            ({"price": [[1], [2], [3]]}, "column 'price' holds List.* not a number"),
        ],
    )
    def test_frames_name_the_row(self, run, column, message):
        frame = pl.DataFrame({"y": [0, 1, 1], "a": ["u"] * 3, "price": [1, 2, 3], "w": [1, 1, 1], **column})
        with pytest.raises(DataError, match=message):
            run(frame, PRICED.replace(weight="w"))

    def test_numbers_beyond_float32(self, run):
        """They would be infinite in what is written, and every loss from then on no number."""
        dense = schema_of(FieldSpec(name="a"), FieldSpec(name="price", type="dense", transform="none"))
        frame = pl.DataFrame({"y": [0, 1, 1], "a": ["u"] * 3, "price": [1.0, -1e39, 3.0]})
        with pytest.raises(
            DataError, match=r"row 2: column 'price' gives -1e[+]39, which float32 cannot hold; declare"
        ):
            run(frame, dense)
        fields = (dense.fields[0], dense.fields[1].replace(transform="log1p"))
        assert np.isfinite(run(frame, dense.replace(fields=fields)).split("train").dense).all()

    def test_words_for_labels(self, run, write):
        data = run(write("log.csv", "y,a\nTrue,u\nfalse,v\n 1,u\n0.0,u\n"), ONE)
        assert data.split("train").labels.tolist() == [1, 0, 1, 0]


class TestEncoder:
    FRAME = pl.DataFrame(
        {
            "y": [0, 1, 1, 0],
            "a": ["u", "u", "v", None],
            "q": [1.0, 2.0, 3.0, None],
            "d": [0.5, 1.5, None, 2.5],
            "g": [["x", "z"], ["x"], None, ["z"]],
            "h": ["k", "l", "m", None],
        }
    )
    SCHEMA = schema_of(
        FieldSpec(name="a"),
        FieldSpec(name="q", type="numeric", transform="quantile:2"),
        FieldSpec(name="d", type="dense", transform="standard"),
        FieldSpec(name="g", type="multi", max_len=2),
        FieldSpec(name="h", hash_size=50),
    )

    @pytest.fixture
    def data(self, run):
        return run(self.FRAME, self.SCHEMA)

    def test_needs_no_label_and_gives_what_encode_wrote(self, data):
        chunk = Encoder.load(data.folder).encode_chunk(self.FRAME.drop("y").reverse().with_columns(extra=1))
        assert chunk.ids[::-1].tolist() == ids(data)
        assert chunk.dense[::-1].tolist() == data.split("train").dense.tolist()
        assert chunk.ids.dtype == np.int32
        assert chunk.dense.dtype == np.float32

    def test_unseen_values_are_oov(self, data):
        frame = pl.DataFrame({"a": ["w"], "q": [9.0], "d": [0.0], "g": [["w", "x"]], "h": ["w"]})
        row = Encoder.load(data.folder).encode_chunk(frame).ids[0]
        assert row[0] == 0
        assert row[1] > 0
        assert row[2:4].tolist() == [0, 1]
        assert row[4] > 0  # a hashed value is never unseen

    def test_empty_frame(self, data):
        assert Encoder.load(data.folder).encode_chunk(self.FRAME.clear()).ids.shape == (0, 5)

    def test_missing_columns_and_wrong_types(self, data):
        encoder = Encoder.load(data.folder)
        with pytest.raises(DataError, match="no column 'd', 'h'; they have y, a, q, g; needed: a, q, d, g, h"):
            encoder.encode_chunk(self.FRAME.drop("d", "h"))
        with pytest.raises(DataError, match="row 2: column 'd' holds 'x', which is not a number"):
            encoder.encode_chunk(self.FRAME.with_columns(d=pl.Series(["1", "x", "2", "3"])))

    def test_save_and_load(self, data, tmp_path):
        first = Encoder.load(data.folder)
        first.save(tmp_path / "copy")
        second = Encoder.load(tmp_path / "copy")
        assert second.schema == first.schema
        assert second.transforms == first.transforms
        assert second.encode_chunk(self.FRAME).ids.tolist() == ids(data)

    def test_damaged_folders(self, data, tmp_path):
        for name in ("schema.json", "vocab.parquet", "transforms.json"):
            folder = tmp_path / name.replace(".", "-")
            Encoder.load(data.folder).save(folder)
            (folder / name).write_bytes((folder / name).read_bytes()[:20])
            with pytest.raises(DataError, match=name):
                Encoder.load(folder)

    def test_id_maps(self, data, tmp_path):
        encoder = Encoder.load(data.folder)
        sizes = data.schema.tables
        maps = {name: np.arange(size, dtype=np.int32) for name, size in sizes.items()}
        maps["a"][:] = [0, 1, 0, 2]  # u kept, v merged into OOV, missing moves up
        maps["h"] = (np.arange(sizes["h"]) % 7).astype(np.int32)
        mapped = encoder.with_id_maps(maps)
        mapped.save(tmp_path / "mapped")
        mapped = Encoder.load(tmp_path / "mapped")
        found = mapped.encode_chunk(self.FRAME).ids
        stored = np.array(ids(data))
        assert found[:, 0].tolist() == [1, 1, 0, 2]
        assert found[:, 1:4].tolist() == stored[:, 1:4].tolist()
        assert found[:, 4].tolist() == (stored[:, 4] % 7).tolist()
        assert mapped.vocabularies["a"]["value"].to_list() == ["u", None]  # the vocabulary shrinks with the table
        by_dataset = next(data.with_id_maps(maps).batches("train", 4)).ids_BC
        assert by_dataset.tolist() == found.tolist()

    def test_id_maps_may_move_oov_and_be_chained(self, data):
        encoder = Encoder.load(data.folder)
        once = encoder.with_id_maps({"a": np.array([3, 2, 1, 0])})
        assert once.encode_chunk(self.FRAME).ids[:, 0].tolist() == [2, 2, 1, 0]
        unseen = self.FRAME.with_columns(a=pl.lit("w"))
        assert once.encode_chunk(unseen).ids[:, 0].tolist() == [3] * 4
        twice = once.with_id_maps({"a": np.array([5, 6, 7, 8])})
        assert twice.encode_chunk(self.FRAME).ids[:, 0].tolist() == [7, 7, 6, 5]
        assert twice.encode_chunk(unseen).ids[0, 0] == 8
        with pytest.raises(DataError, match="unknown table 'nope'"):
            encoder.with_id_maps({"nope": np.arange(3)})
        with pytest.raises(DataError, match="has 2 rows, its ids go up to 3"):
            encoder.with_id_maps({"a": np.arange(2)})

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), min_size=1, max_size=30
        ),
        st.integers(1, 3),
    )
    def test_any_text_round_trips(self, values, min_count):
        frame = pl.DataFrame({"a": pl.Series(values, dtype=pl.String)})
        draft = schema_of(FieldSpec(name="a", min_count=min_count))
        numbering = Numbering(draft, {})
        codes = numbering.codes(next(open_log(frame).chunks()))
        vocabularies = numbering.vocabularies([[codes]])
        encoder = Encoder(draft.replace(fields=(draft.fields[0].replace(vocab_size=99),)), vocabularies)
        found = encoder.encode_chunk(frame).ids[:, 0]
        clean = [None if value in (None, "") else value for value in values]
        value_of = {i: v for v, i, _ in vocabularies["a"].rows()}
        for value, i in zip(clean, found, strict=True):
            assert (value_of[i] == value) if clean.count(value) >= min_count else i == 0
        assert numbering.encoded_by(encoder)(codes)[0].tolist() == found.tolist()


class TestFolder:
    FRAME = TestSplits.FRAME

    def test_contents(self, run):
        data = run(self.FRAME, ONE, split="8:1:1", seed=4)
        meta = json.loads((data.folder / "meta.json").read_text())
        assert meta["num_rows"] == {name: data.num_rows(name) for name in ("train", "valid", "test")}
        assert meta["positives"] == {name: int(data.split(name).labels.sum()) for name in data.splits}
        assert meta["seed"] == 4
        assert meta["split"]["ratio"] == [8, 1, 1]
        assert data.schema.vocabulary_digest
        assert isinstance(data.split("train").ids, np.memmap)
        counts = data.value_counts()["a"]
        assert counts[1:].tolist() == [count for _, _, count in vocabulary(data, "a")]

    def test_digest_follows_the_vocabulary(self, run):
        one = run(self.FRAME, ONE)
        two = run(self.FRAME.with_columns(a=pl.col("a").replace("49", "fifty")), ONE)
        assert one.schema.tables == two.schema.tables
        assert one.schema.fingerprint != two.schema.fingerprint

    def test_existing_target_is_refused_and_kept_on_failure(self, run, tmp_path):
        out = tmp_path / "data"
        first = run(self.FRAME, ONE, out=out)
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(DataError, match="exists; choose another folder, or pass overwrite=True"):
            run(self.FRAME, ONE, out=out)
        with pytest.raises(DataError, match="all with label"):
            run(self.FRAME.with_columns(y=0), ONE, out=out, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert EncodedDataset.load(out).schema.fingerprint == first.schema.fingerprint
        run(self.FRAME.head(90), ONE, out=out, overwrite=True)
        assert EncodedDataset.load(out).num_rows("train") == 90
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    def test_a_folder_of_something_else_is_never_overwritten(self, run, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.txt").write_text("years of work")
        with pytest.raises(DataError, match="is not an encoded dataset; it is not overwritten"):
            run(self.FRAME, ONE, out=tmp_path / "home", overwrite=True)
        assert (tmp_path / "home" / "thesis.txt").exists()

    def test_killed_between_the_renames(self, run, tmp_path):
        run(self.FRAME.head(60), ONE, out=tmp_path / "data")
        (tmp_path / "data").rename(tmp_path / ".data.replaced")
        with pytest.raises(DataError, match="all with label"):
            run(self.FRAME.with_columns(y=0), ONE, out=tmp_path / "data", overwrite=True)
        assert EncodedDataset.load(tmp_path / "data").num_rows("train") == 60

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_full_disk_and_interrupt_leave_nothing(self, run, tmp_path, monkeypatch, error):
        calls = []

        def fail(self, rows):
            calls.append(rows)
            if len(calls) > 3:
                raise error

        monkeypatch.setattr(writing.ArrayFile, "append", fail)
        expected = DataError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="the disk is full while writing" if isinstance(error, OSError) else None):
            run(self.FRAME, ONE, out=tmp_path / "data", split="8:1:1")
        assert list(tmp_path.iterdir()) == []

    def test_unwritable_parent(self, run, write):
        with pytest.raises(DataError, match="cannot write beside"):
            run(self.FRAME, ONE, out=write("file", "") / "data")

    def test_a_bar_appears_after_two_seconds_only(self, monkeypatch, capsys):
        with StageBar(True) as bar:
            bar.update("writing ids", 0.5)
            assert bar._progress is None
            bar.started -= 3
            bar.update("writing ids", 0.6)
            assert bar._progress is not None
        assert capsys.readouterr().out == ""
        with StageBar(False) as bar:
            bar.started -= 3
            bar.update("writing ids", 0.6)
            assert bar._progress is None


class TestInference:
    @pytest.fixture
    def frame(self):
        rng = np.random.default_rng(0)
        n = 3000
        return pl.DataFrame(
            {
                "when": pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2024, 1, 2), "1s", eager=True).head(n),
                "click": rng.integers(0, 2, n),
                "user_id": rng.integers(0, 500, n),
                "device": rng.choice(["ios", "android"], n),
                "visits": np.floor(rng.pareto(0.8, n)).astype(int),
                "price": rng.normal(size=n),
                "genres": rng.choice(["a|b", "b|c", "a|c|d", "d", "a", "c", "b|d"], n),
                "tags": [["x"] * int(k) for k in rng.integers(0, 4, n)],
                "session": [f"s{i}" for i in range(n)],
                "void": [None] * n,
            }
        )

    def test_draft(self, frame):
        draft = infer_schema(frame)
        found = {field.name: (field.type, field.transform, field.separator, field.max_len) for field in draft.fields}
        assert found == {
            "user_id": ("categorical", None, None, 1),
            "device": ("categorical", None, None, 1),
            "visits": ("numeric", "log2", None, 1),
            "price": ("numeric", "quantile:20", None, 1),
            "genres": ("multi", None, "|", 3),
            "tags": ("multi", None, None, 3),
        }
        assert (draft.label, draft.time) == ("click", "when")

    def test_draft_is_written_and_can_be_edited_and_used(self, frame, run, tmp_path):
        out = tmp_path / "data"
        first = run(frame, out=out)
        path = tmp_path / "data.schema.toml"
        assert Schema.load_draft(path) == infer_schema(frame)
        run(frame, out=out, overwrite=True)  # the same draft again is no conflict
        path.write_text(path.read_text().replace('"quantile:20"', '"quantile:5"'))
        with pytest.raises(DataError, match=r"data.schema.toml exists and is not what would be inferred now"):
            run(frame, out=out, overwrite=True)
        edited = run(frame, path, out=out, overwrite=True)
        assert edited.schema.tables["price"] == 6
        assert edited.schema.fingerprint != first.schema.fingerprint

    def test_labels(self, frame):
        assert infer_schema(frame.rename({"click": "bought"}), "bought").label == "bought"
        with pytest.raises(
            DataError, match=r"no column 'clicc'; did you mean 'click'\? label takes one of: when, click"
        ):
            infer_schema(frame, "clicc")
        with pytest.raises(DataError, match="no label column is named"):
            infer_schema(frame.drop("click"))
        with pytest.raises(DataError, match="no column that could be a field"):
            infer_schema(frame.select("click", "void"))

    def test_a_few_dirty_cells_in_a_column_of_numbers_are_said(self, caplog):
        price = [f"{n / 7:.2f}" for n in range(500)]
        price[3], price[77], price[78] = "$12.30", "1,200", "$12.30"
        frame = pl.DataFrame({"click": [0, 1] * 250, "price": price, "word": ["a", "7"] * 250})
        with caplog.at_level(logging.INFO, logger="embtrim"):
            assert [field.type for field in infer_schema(frame, "click").fields] == ["categorical"] * 2
        (said,) = [r.getMessage() for r in caplog.records if "categorical" in r.getMessage()]
        assert "'price'" in said
        assert "0.6% of its values are not numbers, such as '$12.30', '1,200';" in said

    def test_header_hint(self, write):
        with pytest.raises(DataError, match="the first line looks like data: pass header=False"):
            infer_schema(write("log.csv", "0,5,1\n1,6,2\n"), "label")
        draft = infer_schema(write("log.csv", "0,5,1\n1,6,2\n"), "column_1", ReadOptions(header=False))
        assert [field.name for field in draft.fields] == ["column_2", "column_3"]


class TestNumbers:
    def test_quantile_edges(self):
        assert quantile_edges(np.array([]), 4) == []
        assert quantile_edges(np.array([7.0, 7.0, 7.0]), 4) == []
        assert quantile_edges(np.array([0.0] * 6 + [1.0, 2.0]), 4) == [1.0]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 10))
    def test_every_bucket_has_a_value(self, values, num_buckets):
        edges = quantile_edges(np.array(values), num_buckets)
        assert edges == sorted(set(edges))
        buckets = np.searchsorted(edges, values, side="right")
        assert set(buckets) == set(range(len(edges) + 1))

    def test_large_columns_are_sampled(self, run, monkeypatch):
        monkeypatch.setattr("embtrim.data.splitting.SAMPLE_ROWS", 5_000)
        values = np.random.default_rng(0).permutation(40_000).astype(float)
        frame = pl.DataFrame({"y": np.arange(40_000) % 2, "q": values})
        schema = schema_of(FieldSpec(name="q", type="numeric", transform="quantile:4"))
        sets = [run(frame, schema, chunk_bytes=size) for size in (1 << 24, 1 << 20)]
        edges = [Encoder.load(data.folder).transforms["q"]["edges"] for data in sets]
        assert edges[0] == edges[1]  # whatever the chunks
        assert edges[0] == pytest.approx([10_000, 20_000, 30_000], abs=1_100)  # 5 std of a quartile of 5,000 rows
        assert edges[0] != [10_000, 20_000, 30_000]


MEMORY_PROBE = """
import sys, threading, time
from embtrim.data.encoding import encode
from embtrim.schema import FieldSpec, Schema

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

peak, stop = [0.0], []
def watch():
    while not stop:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.003)

fields = tuple(FieldSpec(name=f"c{i}") for i in range(12)) + (
    FieldSpec(name="q", type="numeric", transform="quantile:50"),
    FieldSpec(name="d", type="dense", transform="standard"))
before = anonymous()
thread = threading.Thread(target=watch, daemon=True); thread.start()
encode(sys.argv[1], Schema(label="y", fields=fields), out=sys.argv[2], chunk_bytes=int(sys.argv[3]), progress=False)
stop.append(1); thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_memory_is_bounded_whatever_the_number_of_rows(tmp_path, kind):
    rng = np.random.default_rng(0)
    n = 40_000
    block = pl.DataFrame({"y": rng.integers(0, 2, n), "q": rng.normal(size=n), "d": rng.normal(size=n)})
    block = block.with_columns(pl.Series(f"c{i}", rng.integers(0, 2000, n)).cast(pl.String) for i in range(12))
    block = block.with_columns(pl.concat_str(pl.lit("value-"), f"c{i}").alias(f"c{i}") for i in range(12))
    repeats = 10
    path = tmp_path / f"log.{kind}"
    if kind == "csv":
        with open(path, "wb") as file:
            for i in range(repeats):
                block.write_csv(file, include_header=i == 0)
    else:
        pl.concat([block] * repeats).write_parquet(path, row_group_size=n)

    def peak(chunk_bytes: int) -> float:
        command = [sys.executable, "-c", MEMORY_PROBE, str(path), str(tmp_path / f"out{chunk_bytes}"), str(chunk_bytes)]
        env = {**os.environ, "POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    # 400,000 rows, 65 MB of text. In chunks of 2 MB the peak is about 60 MB (and levels off at 110 MB, the sample for
    # quantiles full, for any number of rows); read whole, the csv takes about 300 MB.
    assert peak(2 << 20) < 110
    if kind == "csv":
        assert peak(1 << 30) > 150


def test_interrupt_by_signal_leaves_what_is_done(tmp_path):
    code = (
        "import sys, polars as pl\nfrom embtrim.data.encoding import encode\nfrom embtrim.schema import *\n"
        "print('ready', flush=True)\n"
        "encode(sys.argv[1], Schema(label='y', fields=(FieldSpec(name='a'),)), out=sys.argv[2], chunk_bytes=20_000,\n"
        "       checkpoint_seconds=0.0)\n"
    )
    (tmp_path / "log.csv").write_text("y,a\n" + "0,u\n1,v\n" * 400_000)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log.csv"), str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    timer = threading.Timer(30, process.kill)
    timer.start()
    while not list(tmp_path.glob(".data.encoding/checkpoint.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(2)
    _, errors = process.communicate()
    timer.cancel()
    assert b"KeyboardInterrupt: interrupted; the same call goes on with" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.encoding", "log.csv"]


class TestRealData:
    @pytest.mark.skipif(not DATA.exists(), reason="shared data folder is absent")
    def test_frappe(self, run):
        folder = DATA / "frappe_x1"
        names = ["user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
        schema = Schema(label="label", fields=tuple(FieldSpec(name=name) for name in names))
        data = run(folder / "train.csv", schema, valid=folder / "valid.csv", test=folder / "test.csv", split=None)
        assert [data.num_rows(name) for name in data.splits] == [202_027, 57_722, 28_860]
        train = pl.read_csv(folder / "train.csv")
        assert data.schema.tables == {name: 1 + train[name].n_unique() for name in names}
        test = pl.read_csv(folder / "test.csv")
        seen = set(train["user"])
        is_oov = data.split("test").ids[:, 0] == 0
        assert is_oov.tolist() == [user not in seen for user in test["user"]]
        assert data.split("test").labels.tolist() == test["label"].to_list()

    @pytest.mark.skipif(not DATA.exists(), reason="shared data folder is absent")
    def test_ids_against_an_independent_encoding(self, run):
        names = ["y", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
        fields = [FieldSpec(name=n, type="numeric", transform="log2") for n in names[1:14]]
        fields += [FieldSpec(name=n, min_count=2) for n in names[14:]]
        path = DATA / "criteo_80k" / "raw_8k.tsv"
        data = run(path, schema_of(*fields), header=False, columns=names, chunk_bytes=100_000)
        rows = [line.split("\t") for line in path.read_text().split("\n") if line]
        assert data.num_rows("train") == len(rows)
        for column, name in enumerate(names[1:]):
            cells = [row[column + 1] or None for row in rows]
            if name[0] == "I":
                numbers = [None if cell is None else int(cell) for cell in cells]
                cells = [None if v is None else str(math.floor(math.log(v) ** 2) if v > 2 else v) for v in numbers]
            counts: dict[str | None, int] = {}
            for cell in cells:
                counts[cell] = counts.get(cell, 0) + 1
            kept = [v for v, n in counts.items() if n >= (1 if name[0] == "I" else 2)]
            kept.sort(key=lambda v: (-counts[v], v is None, v or ""))
            id_of = {value: i for i, value in enumerate(kept, start=1)}
            assert data.split("train").ids[:, column].tolist() == [id_of.get(cell, 0) for cell in cells], name
