"""Paths that look like globs, folders of folders, partitions, markers, and parts that do not fit together."""

import logging
from typing import ClassVar

import polars as pl
import pytest

from embtrim.data.drafting import infer_schema
from embtrim.data.encoding import encode
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import open_log
from embtrim.errors import DataError
from tests.data.small_logs import ONE, ids

ROWS = "y,a\n0,u\n1,v\n"


def names(source, **options):
    """The files of a log, relative to the folder that pytest gives, and their partitions."""
    return [
        (file.name.rpartition("/")[2], dict(file.constants)) for file in open_log(source, ReadOptions(**options)).files
    ]


def rows(source, columns=None):
    return pl.concat([chunk.frame for chunk in open_log(source).chunks(columns)]).rows()


@pytest.fixture
def tree(tmp_path):
    """Writes files of two rows by their path."""

    def write_files(*paths: str, content: str = ROWS):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)
        return tmp_path

    return write_files


@pytest.mark.parametrize(
    "name", ["log[1].csv", "log*.csv", "log?.csv", "[a-z].csv", "a[!b].csv", "{x}.csv", "sub[1]/a.csv"]
)
def test_a_path_that_exists_is_that_file(tree, name):
    folder = tree(name, "log1.csv", "loga.csv", "b.csv", "sub1/a.csv", content=ROWS)
    (folder / name).write_text("y,a\n0,mine\n1,mine\n")
    for source in (folder / name, str(folder / name)):
        assert rows(source, ["a"]) == [("mine",), ("mine",)]


def test_globs_keep_names_that_exist(tree):
    folder = tree("day[1]/a1.csv", "day[1]/b2.csv", "day1/a1.csv", "day1/c3.csv", "day2/a[0].csv", "day2/a0.csv")
    for pattern, expected in [
        ("day[1]/*.csv", ["a1.csv", "b2.csv"]),
        ("day?/*.csv", ["a1.csv", "c3.csv", "a0.csv", "a[0].csv"]),
        ("day[12]/a?.csv", ["a1.csv", "a0.csv"]),
        ("day*/a[0].csv", ["a[0].csv"]),
        ("**/c3.csv", ["c3.csv"]),
        ("day2", ["a0.csv", "a[0].csv"]),
        ("day?", ["a1.csv", "c3.csv", "a0.csv", "a[0].csv"]),
    ]:
        assert [name for name, _ in names(str(folder / pattern))] == expected, pattern
    with pytest.raises(DataError, match=r"no file matches '.*day3\[1\].csv'"):
        open_log(folder / "day3[1].csv")


def test_all_places_may_have_brackets(tree, tmp_path):
    from embtrim.data.dataset import EncodedDataset
    from embtrim.data.encoder import Encoder

    folder = tree("exp1/x.csv", "log[1].csv")
    pl.DataFrame({"y": [0, 1] * 9, "a": ["u", "v", "w"] * 6}).write_parquet(folder / "log[1].parquet")
    pl.DataFrame({"y": [0], "a": ["other"]}).write_parquet(folder / "log1.parquet")
    data = encode(folder / "log[1].parquet", ONE, out=folder / "exp[1]" / "data[x]", split="1:0:0", progress=False)
    assert data.schema.tables == {"a": 4}
    assert EncodedDataset.load(folder / "exp[1]" / "data[x]").num_rows("train") == 18
    assert Encoder.load(folder / "exp[1]" / "data[x]").vocabularies["a"].height == 3


def test_folders_are_read_with_their_sub_folders_and_without_markers(tree, caplog):
    folder = tree("log/b/2.csv", "log/b/1.csv", "log/a.csv", "log/c/d/3.csv.gz")
    tree("log/_SUCCESS", "log/b/._1.csv", "log/b/.2.csv.crc", "log/_temporary/0/4.csv", "log/.ipynb_checkpoints/a.csv",
         "log/_metadata", "log/README.md", content="x")  # fmt: skip
    (folder / "log/empty.csv").touch()
    expected = ["a.csv", "1.csv", "2.csv", "3.csv.gz"]
    with caplog.at_level(logging.INFO):
        for source in ("log", "log/", "log/[a-e]*", "log/**/*.csv*"):
            assert [name for name, _ in names(str(folder / source))] == expected, source
    assert f"left out of folder {folder / 'log'}, without the suffix of a log: README.md" in caplog.text


def test_the_folder_may_be_the_present_one(tree, monkeypatch):
    monkeypatch.chdir(tree("k=1/a.csv", ".hidden/b.csv"))
    assert names(".") == [("a.csv", {"k": "1"})]
    assert names("*/*.csv") == [("a.csv", {"k": "1"})]


def test_partitions_are_columns(tree, run):
    folder = tree(
        "log/day=2024-01-02/hour=7/b.csv",
        "log/day=2024-01-01/hour=23/a.csv",
        "log/day=__HIVE_DEFAULT_PARTITION__/hour=a%3Db/c.csv",
    )
    keys = [("2024-01-01", "23"), ("2024-01-02", "7"), (None, "a=b")]
    log = open_log(folder / "log")
    assert log.columns == ("y", "a", "day", "hour")
    assert rows(folder / "log", ["hour", "a", "day"]) == [(h, a, d) for d, h in keys for a in "uv"]
    assert rows(folder / "log", ["day"]) == [(d,) for d, _ in keys for _ in "uv"]  # no column of the files is asked for
    # The same file has the same columns, however its path is given.
    for source in (
        "log/day=2024-01-01",
        "log/day=2024-01-01/hour=23/a.csv",
        "log/day=2024-01-01/*/*.csv",
        "log/day=*/hour=23",
    ):
        assert rows(folder / source) == [("0", "u", "2024-01-01", "23"), ("1", "v", "2024-01-01", "23")], source
    data = run(folder / "log", label="y")
    assert {field.name for field in data.schema.fields} | {data.schema.time} >= {"a", "day", "hour"}


def test_a_column_of_the_file_wins_over_its_partition(tree):
    folder = tree("log/a=from the folder/1.csv")
    assert rows(folder / "log") == [("0", "u"), ("1", "v")]


def test_text_of_hadoop_has_no_suffix(tree):
    folder = tree("log/part-00000", "log/part-00001", "log/_SUCCESS")
    assert len(rows(folder / "log")) == 4
    tree("hive/000000_0", "hive/000001_0")
    assert len(rows(folder / "hive/000000_0")) == 2
    tree("plain/one", "plain/two")
    assert len(names(folder / "plain", format="csv")) == 2


def test_tables_whose_files_hold_deleted_rows_are_refused(tree):
    folder = tree("table/part-0.csv", "table/_delta_log/00000000000000000000.json")
    with pytest.raises(
        DataError, match=r"table is a Delta Lake table, whose files also hold rows that the table has deleted"
    ):
        open_log(folder / "table")
    assert len(rows(str(folder / "table" / "*.csv"))) == 2


def test_linked_folders_are_followed_once(tree):
    folder = tree("log/a/1.csv", "other/2.csv")
    (folder / "log/b").symlink_to(folder / "other")
    (folder / "log/a/back").symlink_to(folder / "log")
    assert [name for name, _ in names(folder / "log")] == ["1.csv", "2.csv"]


def test_parts_that_lack_a_column_are_named(tree, caplog):
    folder = tree("log/1.csv")
    tree("log/2.csv", content="y,b\n0,1\n")
    with pytest.raises(DataError, match=r"2.csv has no column 'a'; it has y, b; .*1.csv has a"):
        rows(folder / "log")
    tree("log/2.csv", content="y,a,b\n0,u,1\n")
    infer_schema(folder / "log", "y")
    assert "2.csv has columns that 1.csv lacks; they are left out: b" in caplog.text.replace(f"{folder}/log/", "")


def test_parts_of_several_dialects_are_one_log(tree, caplog):
    folder = tree("log/1.csv", "log/3.csv")
    tree("log/2.csv", content=ROWS.replace(",", ";"))
    with caplog.at_level(logging.INFO):
        assert len(rows(folder / "log")) == 6
    assert "1.csv and 1 more: separator ','" in caplog.text
    assert "2.csv: separator ';'" in caplog.text


def test_a_file_that_may_not_be_read_is_named(tree, monkeypatch):
    folder = tree("1.csv")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("embtrim.data.places.open", refuse, raising=False)
    with pytest.raises(DataError, match=r"1.csv cannot be opened \(Permission denied\)"):
        open_log(folder / "1.csv")


def test_file_urls_are_paths(tree):
    folder = tree("a b/1.csv")
    assert rows(f"file://{str(folder).replace(' ', '%20')}/a%20b/1.csv") == [("0", "u"), ("1", "v")]
    assert ids(encode(f"file://{folder}/a%20b", ONE, out=folder / "out", split="1:0:0", progress=False)) == [[1], [2]]


def test_urls_that_cannot_be_read_are_explained(monkeypatch):
    import sys

    with pytest.raises(DataError, match=r"ftpx://host/a.csv cannot be read .*; allowed: paths, s3://"):
        open_log("ftpx://host/a.csv")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://bucket/a.csv needs gcsfs: pip install 'embtrim\[cloud\]'"):
        open_log("gs://bucket/a.csv")


@pytest.mark.parametrize("scheme", ["gs", "gcs", "az", "abfs"])
def test_urls_of_object_stores_go_to_their_own_file_system(scheme, monkeypatch):
    registry = pytest.importorskip("fsspec.registry")
    memory = pytest.importorskip("fsspec.implementations.memory")

    class Bucket(memory.MemoryFileSystem):
        """Stands for gcsfs or adlfs."""

        protocol = scheme
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix(f"{scheme}://"))

    monkeypatch.setitem(registry._registry, scheme, Bucket)
    bucket = Bucket()
    for day, content in (("day=1", ROWS), ("day=2", "y,a\n1,w\n")):
        bucket.pipe(f"/logs/{day}/part.csv", content.encode())
    bucket.pipe("/logs/_SUCCESS", b"")
    assert [file.columns for file in open_log(f"{scheme}://logs").files] == [("y", "a"), ("y", "a")]
    assert sorted(rows(f"{scheme}://logs", ["a", "day"])) == [("u", "1"), ("v", "1"), ("w", "2")]
    assert rows(f"{scheme}://logs/*/part.csv", ["a"]) == [("u",), ("v",), ("w",)]
    with pytest.raises(DataError, match=rf"{scheme}://logs/none.csv does not exist|none.csv does not exist"):
        open_log(f"{scheme}://logs/none.csv")
