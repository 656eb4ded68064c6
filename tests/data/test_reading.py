"""Logs of all formats: layouts, sparse text, chunks, faults, and reading that goes on after a chunk."""

import gzip

import numpy as np
import polars as pl
import pytest

from embtrim.data.drafting import infer_schema
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import open_log
from embtrim.errors import DataError
from embtrim.schema import FieldSpec, Schema
from tests.data.small_logs import DATED, ONE, ids, vocabulary


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
        data = run(write(name, content), ONE, chunk_bytes=chunk_bytes, options=ReadOptions.parse(options))
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

    @pytest.mark.slow
    def test_parquet_in_slices(self, run, tmp_path):
        frame = DATED
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
            (
                "log.csv",
                "0,u\n1,v\n",
                "no column 'y', 'a'.* the first line looks like data: .*ReadOptions\\(header=False",
            ),
            ("log.csv", "y;b\n0;u\n", "no column 'a'; it has y, b; needed: y, a"),
            ("log.csv", 'y,a\n0,"u\n1,v\n', r"line 2 opens a quote that is not closed; .*\(quoted=False\)"),
            ("log.xlsx", b"PK\x03\x04...", "zip archive"),
            ("log.csv", b"BZh91AY", "is a bzip2 file"),
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


READERS = {
    "csv": ("y,a\n" + "".join(f"{i % 2},v{i}\n" for i in range(40)), {}),
    "bom and blank lines": ("\ufeff\n\ny,a\n" + "".join(f"{i % 2},v{i}\n\n" for i in range(40)), {}),
    "quoted lines": ("y,a\n" + "".join(f'{i % 2},"v\n{i}"\n' for i in range(40)), {}),
    "no header, no end of line": ("\n".join(f"{i % 2}\tv{i}" for i in range(40)), {"header": False, "columns": ("y", "a")}),
    "libffm": ("".join(f"{i % 2} 1:{i}:1 2:7:1\n# note\n" for i in range(8)), {"format": "libfm"}),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", READERS)
@pytest.mark.slow
def test_reading_goes_on_after_any_chunk(tmp_path, case, zipped):
    text, options = READERS[case]
    content = text.encode()
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path in paths:
        path.write_bytes(gzip.compress(content) if zipped else content)
    log = open_log(paths, ReadOptions(**options))
    whole = list(log.chunks(chunk_bytes=64))
    assert len(whole) >= 8
    for i, chunk in enumerate(whole):
        rest = list(log.chunks(chunk_bytes=64, start=chunk.end))
        assert len(rest) == len(whole) - i - 1
        for one, other in zip(rest, whole[i + 1 :], strict=True):
            assert one.frame.equals(other.frame)
            assert (one.first_row, one.locate(0), one.end) == (other.first_row, other.locate(0), other.end)
            assert one.done == pytest.approx(other.done)


def test_parsed_text_is_not_parsed_again(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text(READERS["csv"][0])
    log = open_log(tmp_path / "log.csv")
    *_, before_last, _ = log.chunks(chunk_bytes=64)
    parsed, read_csv = [], pl.read_csv
    monkeypatch.setattr(pl, "read_csv", lambda rows, **options: parsed.append(len(rows)) or read_csv(rows, **options))
    assert len(list(log.chunks(chunk_bytes=64, start=before_last.end))) == 1
    assert len(parsed) == 1
