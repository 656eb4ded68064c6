"""Encoding on an engine writes the same bytes as in one process, whatever the order, the repeats and the deaths of workers."""

import dataclasses
import gzip
import itertools
import json
import os
import pickle
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.data import parts, passes, pieces, splitting, tally, writing
from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoding import encode
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import open_log
from embtrim.data.splitting import Splitter
from embtrim.errors import DataError, EmbtrimError
from embtrim.schema import FieldSpec
from tests.data.small_logs import schema_of
from tests.engines.tasks import Backwards, die_once

ROWS, FILES = 900, 5
FIELDS = (
    FieldSpec(name="user", min_count=2),
    FieldSpec(name="item", table="items"),
    FieldSpec(name="last", table="items"),
    FieldSpec(name="flag"),
    FieldSpec(name="at"),
    FieldSpec(name="page", hash_size=37),
    FieldSpec(name="price", type="numeric", transform="log2", nulls=("-1",)),
    FieldSpec(name="age", type="numeric", transform="quantile:5"),
    FieldSpec(name="tags", type="multi", separator="|", max_len=3, min_count=2),
    FieldSpec(name="height", type="dense", transform="standard"),
    FieldSpec(name="size", type="dense", transform="log1p"),
)
SCHEMA = schema_of(*FIELDS, weight="w", time="t")
SMALL = schema_of(FieldSpec(name="user"))


class Dying:
    """Two worker processes, one of which is killed while it writes the codes of a file."""

    def __init__(self, marker):
        self.marker = marker

    @contextmanager
    def started(self):
        with embtrim.engines.Local(jobs=2).started() as kept:
            yield lambda function, items: kept(partial(die_once, self.marker, function), items)


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(5)
    number = rng.integers(0, 60, ROWS)
    texts = [None if n % 13 == 0 else f"u{n}" for n in number]
    return pl.DataFrame(
        {
            "y": rng.integers(0, 2, ROWS),
            "user": texts,
            "item": [f"{n % 20}" if n % 3 else f"{n % 20}.0" for n in number],
            "last": [f"{n % 25}" for n in number],
            "flag": [n % 7 == 0 for n in number],
            "at": [f"2024-01-{1 + n % 9:02} 10:00:00" for n in number],
            "page": [f"p{n * n}" for n in number],
            "price": rng.integers(-1, 3000, ROWS),
            "age": rng.normal(40, 9, ROWS),
            "tags": [None if n % 11 == 0 else "|".join(f"g{n % k}" for k in range(1, 2 + n % 4)) for n in number],
            "height": [None if n % 17 == 0 else 1.1 * n for n in number],
            "size": rng.normal(0, 100, ROWS),
            "w": rng.random(ROWS),
            "t": np.arange(ROWS) // 3,
        }
    )


@pytest.fixture(scope="module")
def folder(frame, tmp_path_factory):
    """The log as parquet files of unequal types, as csv files (one zipped, one with broken lines, one empty), and in folders."""
    root = tmp_path_factory.mktemp("logs")
    starts = [0, 100, 350, 360, 700, ROWS]
    for name in ("parquet", "csv"):
        (root / name).mkdir()
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        part = frame[start:end]
        typed = part.with_columns(
            pl.col("page").cast(pl.Categorical), pl.col("price").cast(pl.Int64 if i % 2 else pl.Float64)
        )
        typed.write_parquet(root / "parquet" / f"{i}.parquet")
        text = part.write_csv().encode()
        if i == 1:
            broken = text.replace(b"\n", b"\n1,2\n", 3) + b"1,\xff\xc3\xa9" + b"," * 12 + b"\n"
            (root / "csv" / "1.csv").write_bytes(broken)
        elif i == 2:
            (root / "csv" / "2.csv").write_bytes(gzip.compress(text))
        else:
            (root / "csv" / f"{i}.csv").write_bytes(text)
        (root / "days" / f"day={i % 2}").mkdir(parents=True, exist_ok=True)
        part.write_parquet(root / "days" / f"day={i % 2}" / f"{i}.parquet")
    (root / "csv" / "3b.csv").write_bytes(frame.head(0).write_csv().encode())
    return root


@pytest.fixture
def small(monkeypatch):
    """Samples smaller than the log, and more files than are summed at once."""
    monkeypatch.setattr(splitting, "SAMPLE_ROWS", 150)
    monkeypatch.setattr(tally, "SAMPLE_ROWS", 1500)
    monkeypatch.setattr(passes, "FAN_IN", 2)


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    meta = json.loads(found.pop("meta.json"))
    assert meta.pop("seconds") > 0
    return {**found, "meta.json": json.dumps(meta).encode()}


def assert_same(one: Path, other: Path) -> None:
    found, expected = files(one), files(other)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


SKIPPING = ReadOptions(on_error="skip", encoding="utf-8", max_skipped=0.1)
CASES = {
    "parquet, at random": ("parquet", {}),
    "csv, at random, some rows": ("csv", {"where": "price > 50", "options": SKIPPING, "seed": 4}),
    "parquet, by quantiles of time": ("parquet", {"split": "time:5:3:2"}),
    "partitions, at moments": ("days", {"split": "time:100,200"}),
}


@pytest.mark.parametrize("case", CASES)
def test_any_order_gives_the_same_bytes(case, folder, small, tmp_path):
    name, options = CASES[case]
    schema = SCHEMA if name != "days" else SCHEMA.replace(fields=(*FIELDS, FieldSpec(name="day")))
    options = {"progress": False, "chunk_bytes": 20_000, **options}
    encode(folder / name, schema, out=tmp_path / "alone", **options)
    encode(folder / name, schema, out=tmp_path / "engine", engine=Backwards(), **options)
    assert_same(tmp_path / "engine", tmp_path / "alone")
    assert len(files(tmp_path / "alone")) == 17
    assert not list(tmp_path.glob(".*"))


def test_logs_of_each_split_and_a_drafted_schema_give_the_same_bytes(folder, small, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    logs = {"valid": "parquet/3.parquet", "test": ["parquet/4.parquet", "parquet/2.parquet"]}
    for engine in (None, Backwards()):
        out = tmp_path / str(engine is None)
        encode("parquet/[01].parquet", label="y", out=out, engine=engine, progress=False, chunk_bytes=20_000, **logs)
    assert_same(tmp_path / "False", tmp_path / "True")
    assert (tmp_path / "False.schema.toml").read_bytes() == (tmp_path / "True.schema.toml").read_bytes()


def test_sparse_text_gives_the_same_bytes_and_sends_no_text(tmp_path):
    for i in range(3):
        lines = [f"{(i + j) % 2} {j % 5}:1 {10 + j % (7 + i)}:1" for j in range(2_000)]
        (tmp_path / f"{i}.libsvm").write_text("\n".join(lines))
    files = str(tmp_path / "*.libsvm")
    encode(files, label="label", out=tmp_path / "alone", progress=False)
    encode(files, label="label", out=tmp_path / "engine", engine=Backwards(), progress=False)
    assert_same(tmp_path / "engine", tmp_path / "alone")
    assert len(pickle.dumps(open_log(files).of_file(0))) < 2_000


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
    """The log as arrays and as parts."""
    root = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PART_ROWS", 100)
        patch.setattr(parts, "GROUP_ROWS", 64)
        options = {"split": "time:5:3:2", "progress": False, "chunk_bytes": 20_000}
        encode(folder / "parquet", SCHEMA, out=root / "arrays", **options)
        encode(folder / "parquet", SCHEMA, out=root / "parts", parts=True, engine=Backwards(), **options)
    return root / "arrays", root / "parts"


class TestParts:
    """The same rows as parquet parts (format version 2)."""

    def test_they_open_as_the_same_data(self, folders):
        arrays, found = (EncodedDataset.load(path) for path in folders)
        assert found.schema.fingerprint == arrays.schema.fingerprint
        for name in ("schema.json", "vocab.parquet", "transforms.json", "profile.json"):
            assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes()
        meta = json.loads((folders[1] / "meta.json").read_text())
        assert meta["format_version"] == 2
        listed = [part["file"] for part in meta["parts"]["train"]]
        assert listed == sorted(path.name for path in (folders[1] / "train").iterdir())
        assert "part-000001-001.parquet" in listed
        for split in arrays.splits:
            for batch, same in zip(
                found.batches(split, 70, shuffle_seed=3), arrays.batches(split, 70, shuffle_seed=3), strict=True
            ):
                for tensor, other in zip(batch.tensors(), same.tensors(), strict=True):
                    assert tensor.equal(other)

    def test_arrays_are_made_once_and_again_when_a_part_changes(self, folders, tmp_path):
        shutil.copytree(folders[1], tmp_path / "data", ignore=shutil.ignore_patterns(".arrays"))
        made = [EncodedDataset.load(tmp_path / "data").split("train").ids.filename for _ in range(2)]
        times = os.stat(made[0]).st_mtime_ns
        assert made[0] == made[1] == tmp_path / "data" / ".arrays" / "train" / "ids.npy"
        part = tmp_path / "data" / "train" / "part-000000-000.parquet"
        pl.read_parquet(part).with_columns(label=pl.lit(1.0, pl.Float32)).write_parquet(part)
        assert EncodedDataset.load(tmp_path / "data").split("train").labels[:50].tolist() == [1.0] * 50
        assert os.stat(made[0]).st_mtime_ns > times
        assert {path.name for path in (tmp_path / "data" / ".arrays").iterdir()} == {"train", "valid", "test"}

    def test_a_folder_that_cannot_be_written_has_its_arrays_elsewhere(self, folders, tmp_path, monkeypatch):
        shutil.copytree(folders[1], tmp_path / "data", ignore=shutil.ignore_patterns(".arrays"))
        (tmp_path / "data" / ".arrays").write_text("in the way")
        monkeypatch.setattr(parts.tempfile, "tempdir", str(tmp_path))
        data = EncodedDataset.load(tmp_path / "data")
        assert data.split("train").ids.tolist() == EncodedDataset.load(folders[0]).split("train").ids.tolist()
        assert {path.name for path in tmp_path.iterdir()} == {"data"}

    @pytest.mark.parametrize("place", [0, 1])
    def test_ranks_divide_the_rows(self, folders, place):
        whole = EncodedDataset.load(folders[0])
        ranks = [EncodedDataset.load(folders[place], share=(rank, 4)) for rank in range(4)]
        for split, arrays in whole.splits.items():
            for name in ("ids", "labels", "dense", "weights"):
                found = np.concatenate([getattr(rank.split(split), name) for rank in ranks])
                expected = getattr(arrays, name)
                assert len(expected) - len(found) == (len(arrays) % 4 if split == "train" else 0)
                assert np.array_equal(found, expected[: len(found)])
        assert len({rank.num_rows("train") for rank in ranks}) == 1
        assert len(whole.split("train")) % 4

    def test_shares_that_are_none(self, folders):
        for share in ((4, 4), (-1, 2), (0, 0)):
            with pytest.raises(DataError, match=r"share is \(rank, number of ranks\), given"):
                EncodedDataset.load(folders[1], share=share)
        with pytest.raises(DataError, match="too few for 100000 ranks"):
            EncodedDataset.load(folders[1], share=(0, 100_000))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda frame: frame.head(3), "holds 3 rows, meta.json says"),
            (lambda frame: frame.drop("id_1"), "does not have the columns of the schema"),
            (lambda frame: frame.with_columns(extra=pl.lit(1)), "does not have the columns of the schema .*extra"),
            (
                lambda frame: frame.with_columns(pl.col("id_0").cast(pl.Int64)),
                "does not have the columns of the schema",
            ),
            (lambda frame: frame.with_columns(label=pl.lit(None, pl.Float32)), "has missing values"),
            (lambda frame: frame.with_columns(id_0=pl.lit(10**6, pl.Int32)), "ids of field 'user' lie in"),
            (None, "does not exist; encode again"),
        ],
    )
    def test_damaged_parts_are_refused(self, folders, tmp_path, change, message):
        shutil.copytree(folders[1], tmp_path / "data", ignore=shutil.ignore_patterns(".arrays"))
        part = tmp_path / "data" / "train" / "part-000001-000.parquet"
        if change is None:
            part.unlink()
        else:
            change(pl.read_parquet(part)).write_parquet(part)
        with pytest.raises(DataError, match=message):
            EncodedDataset.load(tmp_path / "data").split("train")
        assert not list((tmp_path / "data" / ".arrays").glob(".*"))

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("parts", None, "parts belong to format_version 2, and are needed there"),
            ("format_version", 1, "parts belong to format_version 2"),
            ("format_version", 3, "has dataset format 3, this release reads 1 and 2"),
            ("parts", {"train": [{"file": "../x.parquet", "rows": 1}]}, "parts.train.0.file"),
            ("parts", {"train": []}, "the parts of split 'train' do not have its"),
        ],
    )
    def test_meta_that_does_not_fit_is_refused(self, folders, tmp_path, key, value, message):
        shutil.copytree(folders[1], tmp_path / "data")
        meta = json.loads((tmp_path / "data" / "meta.json").read_text())
        (tmp_path / "data" / "meta.json").write_text(json.dumps({**meta, key: value}))
        with pytest.raises(DataError, match=message):
            EncodedDataset.load(tmp_path / "data")

    def test_without_an_engine_this_process_writes_them(self, folder, tmp_path):
        encode(folder / "csv" / "0.csv", SMALL, out=tmp_path / "data", parts=True, progress=False)
        assert [path.name for path in (tmp_path / "data" / "train").iterdir()] == ["part-000000-000.parquet"]


@pytest.mark.slow
def test_killed_workers_change_nothing(folder, tmp_path):
    options = {"split": "time:5:3:2", "progress": False, "chunk_bytes": 20_000}
    encode(folder / "parquet", SCHEMA, out=tmp_path / "alone", **options)
    encode(folder / "parquet", SCHEMA, out=tmp_path / "engine", engine=Dying(tmp_path / "marker"), **options)
    assert (tmp_path / "marker").exists()
    assert_same(tmp_path / "engine", tmp_path / "alone")


def test_an_interrupted_run_goes_on_with_the_files_that_are_done(folder, tmp_path, monkeypatch):
    done: list[str] = []
    written: list[str] = []

    def write_codes(numbering, parts, *rest):
        written.extend(log.files[0].name for log, _ in parts.values())
        return writing.write_codes(numbering, parts, *rest)

    monkeypatch.setattr(pieces, "write_codes", write_codes)

    class Interrupted:
        def __init__(self, limit):
            self.limit = limit

        @contextmanager
        def started(self):
            def run(function, items):
                for index, item in enumerate(items):
                    name = function.args[0].__name__
                    if name == "code" and len(done) == self.limit:
                        raise KeyboardInterrupt
                    done.append(name)
                    yield index, function(item)

            yield run

    options = {"progress": False, "split": "8:1:1"}
    encode(folder / "parquet", SCHEMA, out=tmp_path / "alone", **options)
    with pytest.raises(KeyboardInterrupt, match="the same call goes on with"):
        encode(folder / "parquet", SCHEMA, out=tmp_path / "out", engine=Interrupted(2 * FILES + 2), **options)
    assert done == ["count_rows"] * FILES + ["learn"] * FILES + ["code"] * 2
    done.clear()
    # Half of the work is done: rows and transforms are known.
    with pytest.raises(KeyboardInterrupt):
        encode(folder / "parquet", SCHEMA, out=tmp_path / "out", engine=Interrupted(FILES - 1), **options)
    assert done == ["code"] * (FILES - 1)
    encode(folder / "parquet", SCHEMA, out=tmp_path / "out", engine=Interrupted(99), **options)
    assert written == sorted(map(str, (folder / "parquet").iterdir()))
    assert_same(tmp_path / "out", tmp_path / "alone")


class TestRefusals:
    def test_what_is_not_an_engine(self, tmp_path):
        for given in ("ray", 2, embtrim.engines.Ray):
            with pytest.raises(EmbtrimError, match=r"it takes embtrim.engines.Local\(jobs=2\), Ray\(\) or Spark"):
                encode(tmp_path / "none.csv", SCHEMA, out=tmp_path / "out", engine=given)

    @pytest.mark.parametrize("engine", [None, Backwards()])
    def test_a_url_to_write(self, folder, tmp_path, monkeypatch, engine):
        monkeypatch.chdir(tmp_path)
        for out in ("s3://bucket/data", Path("s3://bucket/data")):
            with pytest.raises(DataError, match=r"s3:/bucket/data is a URL; data are written to a folder"):
                encode(folder / "csv", SCHEMA, out=out, engine=engine)
        assert not list(tmp_path.iterdir())

    def test_a_frame(self, frame, tmp_path):
        for given in (frame, frame.to_pandas()):
            with pytest.raises(DataError, match="a DataFrame lies in the memory of this process"):
                encode(given, SCHEMA, out=tmp_path / "out", engine=Backwards())

    def test_a_pipe(self, folder, tmp_path):
        os.mkfifo(tmp_path / "pipe.csv")
        for log, valid in ((tmp_path / "pipe.csv", None), (folder / "csv", [str(tmp_path / "pipe.csv")])):
            with pytest.raises(DataError, match=r"pipe.csv is neither a file nor a folder: it can be read once"):
                encode(log, SCHEMA, out=tmp_path / "out", valid=valid, engine=Backwards())

    def test_one_file_is_said_to_be_read_by_one_worker(self, folder, tmp_path, caplog):
        encode(folder / "csv" / "0.csv", SMALL, out=tmp_path / "out", engine=Backwards(), progress=False)
        assert "the log is one file, which one worker reads; divide it" in caplog.text

    def test_a_fault_in_a_file_names_its_line_and_leaves_nothing(self, folder, tmp_path):
        for i in (0, 4):
            (tmp_path / f"{i}.csv").write_bytes((folder / "csv" / f"{i}.csv").read_bytes())
        bad = (tmp_path / "4.csv").read_text().splitlines()
        bad[7] = "7" + bad[7][1:]
        (tmp_path / "4.csv").write_text("\n".join(bad))
        with pytest.raises(DataError, match=r"4.csv line 8: label 'y' is '7'"):
            encode(tmp_path / "*.csv", SMALL, out=tmp_path / "out", engine=Backwards(), progress=False)
        assert {path.name for path in tmp_path.iterdir()} == {"0.csv", "4.csv"}

    def test_too_many_broken_lines_in_all(self, folder, tmp_path):
        options = ReadOptions(on_error="skip", encoding="utf-8", max_skipped=0.004)
        with pytest.raises(DataError, match=r"csv: 4 lines cannot be read, more than 0.004 of all lines"):
            encode(folder / "csv", SMALL, out=tmp_path / "out", engine=Backwards(), options=options, progress=False)

    def test_a_file_that_changes_while_it_is_encoded(self, folder, frame, tmp_path):
        for i in (0, 1):
            (tmp_path / f"{i}.parquet").write_bytes((folder / "parquet" / f"{i}.parquet").read_bytes())

        class Changing(Backwards):
            @contextmanager
            def started(self):
                def run(function, items):
                    for index, item in enumerate(items):
                        yield index, function(item)
                    frame.head(90).write_parquet(tmp_path / "0.parquet")

                yield run

        with pytest.raises(DataError, match=r"0.parquet had 100 rows, and now has 90: it was changed"):
            encode(tmp_path / "*.parquet", SCHEMA, out=tmp_path / "out", engine=Changing(), progress=False)

    def test_workers_that_cannot_take_part(self, folder, tmp_path):
        piece = pieces.Piece(0, "train", open_log(folder / "csv" / "0.csv").of_file(0))
        job = pieces.Job(tmp_path, "a", SCHEMA, Splitter(None, SCHEMA, 0), 0, 1 << 20, {}, frozenset(), pieces.VERSIONS)
        for content in (None, "b"):
            if content is not None:
                (tmp_path / "token").write_text(content)
            with pytest.raises(DataError, match=r"does not see .* on storage that all workers share"):
                pieces.count_rows(job, piece)
        (tmp_path / "token").write_text("a")
        assert pieces.count_rows(job, piece).num_rows == 100
        older = dataclasses.replace(job, versions={**pieces.VERSIONS, "polars": "1.0.0"})
        with pytest.raises(DataError, match=r"has polars 2.*all workers need .*polars 1.0.0"):
            pieces.count_rows(older, piece)
