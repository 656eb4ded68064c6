"""Logs behind URLs: a real S3 server in a process of its own, and a plain web server."""

import functools
import gzip
import http.server
import threading

import numpy as np
import polars as pl
import pytest

from embtrim.data.encoding import encode
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import open_log
from embtrim.errors import DataError, UnreachableError
from tests.data.s3_server import s3_server
from tests.data.small_logs import ONE, ids
from tests.engines.tasks import Backwards

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store():
    """A file system of a bucket `logs`; the environment leads to its server."""
    with pytest.MonkeyPatch.context() as patch, s3_server() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        files.mkdir("logs")
        yield files
    s3fs.S3FileSystem.clear_instance_cache()


def parts(num_parts=12):
    """Rows of some days, by the path of their file."""
    for i in range(num_parts):
        rows = [(str((i + j) % 2), f"u{j % 7}") for j in range(20)]
        text = "".join(f"{y},{a}\n" for y, a in [("y", "a"), *rows])
        zipped = gzip.compress(text.encode(), mtime=0) if i % 2 else text.encode()
        yield f"day=2024-01-{i + 1:02}/part-{i}.csv{'.gz' if i % 2 else ''}", zipped


def test_a_partitioned_log_of_s3_equals_the_local_one(store, tmp_path):
    for path, content in parts():
        (tmp_path / "log" / path).parent.mkdir(parents=True)
        (tmp_path / "log" / path).write_bytes(content)
        store.pipe_file(f"logs/daily/{path}", content)
    store.pipe_file("logs/daily/_SUCCESS", b"")
    store.pipe_file("logs/daily/_temporary/0/part-0.csv", b"y,a\n1,x\n")
    settings = {"label": "y", "split": "6:2:2", "progress": False}
    local = encode(tmp_path / "log", out=tmp_path / "local", **settings)
    for i, url in enumerate(
        ["s3://logs/daily", "s3://logs/daily/", "s3://logs/daily/day=*/*", "s3://logs/daily/**/*.csv*"]
    ):
        remote = encode(url, out=tmp_path / f"remote{i}", **settings)
        assert remote.schema.fingerprint == local.schema.fingerprint
        for name in ("train", "valid", "test"):
            assert ids(remote, name) == ids(local, name)
    log = open_log("s3://logs/daily/day=2024-01-03")
    assert log.columns == ("y", "a", "day")
    assert next(log.chunks()).locate(0) == "s3://logs/daily/day=2024-01-03/part-2.csv line 2"
    assert log.identity()[0][0] == "s3://logs/daily/day=2024-01-03/part-2.csv"


def test_workers_of_an_engine_read_s3(store, tmp_path):
    for i, (path, content) in enumerate(parts(4)):
        store.pipe_file(f"logs/many/{path}", content)
        (tmp_path / "log" / path).parent.mkdir(parents=True)
        (tmp_path / "log" / path).write_bytes(content)
        frame = pl.DataFrame({"y": ["0", "1"] * 10, "a": [f"v{i + j % 4}" for j in range(20)]})
        place = f"of={i}/part.parquet"
        (tmp_path / "log" / place).parent.mkdir(parents=True)
        frame.write_parquet(tmp_path / "log" / place)
        store.put_file(str(tmp_path / "log" / place), f"logs/many-parquet/{place}")
    for url, local in (("s3://logs/many", "log/day=*/*"), ("s3://logs/many-parquet", "log/of=*/*")):
        out = [tmp_path / f"{local[4:6]}-{name}" for name in ("local", "remote")]
        settings = {"label": "y", "split": "6:2:2", "progress": False}
        alone = encode(tmp_path / local, out=out[0], **settings)
        remote = encode(url, out=out[1], engine=Backwards(), **settings)
        assert remote.schema.fingerprint == alone.schema.fingerprint
        for name in ("train", "valid", "test"):
            assert ids(remote, name) == ids(alone, name)


def test_parquet_of_s3_is_copied_by_row_groups_and_columns(store, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    columns = {"y": [0, 1] * 50_000, "a": rng.integers(0, 9, 100_000), "l": [[i, i + 1] for i in range(100_000)]}
    frame = pl.DataFrame({**columns, "unread": rng.random((100_000, 4)).tolist(), "z": rng.random(100_000)})
    frame.write_parquet(tmp_path / "log.parquet", row_group_size=10_000)
    size = (tmp_path / "log.parquet").stat().st_size
    store.put_file(str(tmp_path / "log.parquet"), "logs/groups.parquet")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    log, names, sizes = open_log("s3://logs/groups.parquet"), ["z", "y", "l"], []
    read = s3fs.S3File._fetch_range
    monkeypatch.setattr(s3fs.S3File, "_fetch_range", lambda file, a, b: sizes.append(b - a) or read(file, a, b))
    chunks, most = [], 0
    for chunk in log.chunks(names, chunk_bytes=1 << 19):
        chunks.append(chunk)
        blocks = [path.stat().st_blocks for path in (tmp_path / "temporary").iterdir()]
        assert len(blocks) == 1
        most = max(most, 512 * blocks[0])
    assert len(chunks) > 10
    assert pl.concat([chunk.frame for chunk in chunks]).equals(frame.select(names))
    assert most < size / 8
    assert sum(sizes) < size / 2
    rest = log.chunks(names, chunk_bytes=1 << 19, start=chunks[6].end)
    assert pl.concat([chunk.frame for chunk in rest]).equals(pl.concat([chunk.frame for chunk in chunks[7:]]))
    next(log.chunks(names))
    assert list((tmp_path / "temporary").iterdir()) == []
    few = list(log.chunks(names, chunk_bytes=1 << 26))
    assert len(few) == 1
    assert few[0].frame.equals(frame.select(names))


def test_parquet_of_s3_is_read_through_a_copy_that_goes_again(store, tmp_path, monkeypatch):
    frame = pl.DataFrame({"y": [0, 1] * 5000, "a": [str(i % 50) for i in range(10_000)]})
    frame.write_parquet(tmp_path / "log.parquet", row_group_size=1000)
    store.put_file(str(tmp_path / "log.parquet"), "logs/b[1]/log.parquet")
    store.pipe_file("logs/b1/log.parquet", b"another day")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    log = open_log("s3://logs/b[1]/log.parquet")
    assert log.columns == ("y", "a")
    chunks = list(log.chunks(chunk_bytes=1 << 18))
    assert len(chunks) > 3
    assert pl.concat([chunk.frame for chunk in chunks]).equals(frame)
    next(log.chunks())
    assert list((tmp_path / "temporary").iterdir()) == []


def test_reading_of_s3_goes_on_after_any_chunk(store):
    store.pipe_file("logs/one.csv", b"y,a\n" + b"".join(b"%d,v%d\n" % (i % 2, i) for i in range(200)))
    log = open_log("s3://logs/one.csv")
    chunks = list(log.chunks(chunk_bytes=256))
    rest = list(log.chunks(chunk_bytes=256, start=chunks[2].end))
    assert [chunk.frame.rows() for chunk in rest] == [chunk.frame.rows() for chunk in chunks[3:]]


def test_a_text_file_is_never_held_as_a_whole(store, monkeypatch):
    store.pipe_file("logs/large.csv", b"y,a\n" + b"1,0123456789012345678901234567\n" * 400_000)
    monkeypatch.setattr("embtrim.data.places._BLOCK_BYTES", 1 << 20)
    sizes = []
    read = s3fs.S3File._fetch_range
    monkeypatch.setattr(s3fs.S3File, "_fetch_range", lambda file, a, b: sizes.append(b - a) or read(file, a, b))
    assert sum(chunk.frame.height for chunk in open_log("s3://logs/large.csv").chunks(chunk_bytes=1 << 20)) == 400_000
    assert max(sizes) <= 4 << 20
    assert len(sizes) >= 4


def test_what_s3_does_not_have_is_said(store, tmp_path):
    for url, message in [
        ("s3://logs/nothing.csv", r"s3://logs/nothing.csv does not exist"),
        ("s3://logs/no*.csv", r"no file matches 's3://logs/no\*.csv'"),
        ("s3://no-such-bucket/log.csv", "s3://no-such-bucket/log.csv"),
    ]:
        with pytest.raises(DataError, match=message):
            open_log(url)


def test_a_server_that_stops_answering_leaves_the_work_to_go_on_with(store, tmp_path, monkeypatch):
    rows = b"".join(b"%d,v%d,%b\n" % (i % 2, i % 9, b"x" * 1000) for i in range(4000))
    store.pipe_file("logs/long.csv", b"y,a,b\n" + rows)
    settings = {"split": "1:0:0", "progress": False, "chunk_bytes": 1 << 18, "checkpoint_seconds": 0.0}
    whole = encode("s3://logs/long.csv", ONE, out=tmp_path / "whole", **settings)
    monkeypatch.setattr("embtrim.data.places._BLOCK_BYTES", 1 << 16)
    with monkeypatch.context() as patch:
        read = s3fs.S3File._fetch_range

        def fail(file, start, end):
            if end > 3 << 20:
                raise OSError("connection reset")
            return read(file, start, end)

        patch.setattr(s3fs.S3File, "_fetch_range", fail)
        with pytest.raises(UnreachableError, match=r"s3://logs/long.csv cannot be read \(OSError: connection reset\)"):
            encode("s3://logs/long.csv", ONE, out=tmp_path / "out", **settings)
    assert (tmp_path / ".out.encoding" / "checkpoint.json").exists()
    starts = []
    patched = s3fs.S3File._fetch_range
    monkeypatch.setattr(s3fs.S3File, "_fetch_range", lambda file, a, b: starts.append(a) or patched(file, a, b))
    assert ids(encode("s3://logs/long.csv", ONE, out=tmp_path / "out", **settings)) == ids(whole)
    assert any(start > 1 << 20 for start in starts)


def test_the_web_is_read_as_files_are(tmp_path):
    pytest.importorskip("aiohttp")
    (tmp_path / "a.csv").write_text("y;a\n0;u\n1;v\n")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"y,a\n0,u\n"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert next(open_log(f"{address}/a.csv").chunks()).frame.rows() == [("0", "u"), ("1", "v")]
        assert next(open_log(f"{address}/b.csv.gz?version=1").chunks()).frame.rows() == [("0", "u")]
        assert open_log(f"{address}/a.csv", ReadOptions(separator=",")).columns == ("y;a",)
        with pytest.raises(DataError, match=r"c.csv does not exist"):
            open_log(f"{address}/c.csv")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
