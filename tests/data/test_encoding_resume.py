"""Interrupted or killed encodings go on to the same bytes, or start from the beginning if going on could be wrong."""

import contextlib
import errno
import gzip
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embtrim.data import encoding, encoding_state, writing
from embtrim.data.encoding import encode
from embtrim.data.encoding_state import CHEAP_SECONDS, WorkingFolder, working_folder
from embtrim.data.read_options import ReadOptions
from embtrim.errors import DataError
from embtrim.schema import FieldSpec, Schema
from embtrim.system import holding
from embtrim.system.holding import hold
from embtrim.system.progress import Counter

SCHEMA = Schema(
    label="y",
    time="t",
    weight="w",
    fields=(
        FieldSpec(name="a", min_count=2),
        FieldSpec(name="h", column="a", hash_size=50),
        FieldSpec(name="tags", type="multi", separator="|", max_len=3),
        FieldSpec(name="q", type="numeric", transform="quantile:7"),
        FieldSpec(name="d", type="dense", transform="standard"),
    ),
)
CHUNK_BYTES = {"csv": 2_000, "csv.gz": 2_000, "parquet": 10_000}


def rows(num_rows: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "y": rng.integers(0, 2, num_rows),
            "t": np.sort(rng.integers(0, 10**6, num_rows)),
            "w": rng.integers(1, 4, num_rows),
            "a": pl.Series(rng.zipf(1.5, num_rows) % 500).cast(pl.String),
            "tags": [f"{i % 7}|{i % 3}" if i % 11 else "" for i in range(num_rows)],
            "q": rng.normal(size=num_rows).round(3),
            "d": rng.normal(size=num_rows).round(3),
        }
    )


def write_log(frame: pl.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.write_parquet(path, row_group_size=300)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    else:
        path.write_text(frame.write_csv())
    return path


class Job:
    """One call of encode() on a log of three files, which are written if absent; the last holds the validation rows."""

    def __init__(self, folder: Path, kind: str = "csv", num_rows: int = 600) -> None:
        self.folder, self.out = folder, folder / "data"
        paths = [folder / f"{name}.{kind}" for name in ("one", "two", "valid")]
        if not paths[0].exists():
            frame, cuts = rows(num_rows), [0, num_rows // 3, num_rows * 2 // 3, num_rows]
            for path, start, end in zip(paths, cuts, cuts[1:], strict=False):
                write_log(frame[start:end], path)
        self.source: list[Path] = paths[:2]
        self.options = {
            "schema": SCHEMA, "valid": paths[2], "split": "time:8:0:2", "chunk_bytes": CHUNK_BYTES[kind],
            "progress": False, "checkpoint_seconds": 0.0,
        }  # fmt: skip

    def run(self, **changes) -> dict[str, bytes]:
        """Encode; the files, without the seconds."""
        out = changes.get("out", self.out)
        encode(self.source, **{"out": out, **self.options, **changes})
        return self.files(out)

    @staticmethod
    def files(out: Path) -> dict[str, bytes]:
        files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        meta = json.loads(files.pop("meta.json"))
        del meta["seconds"]
        return {**files, "meta": json.dumps(meta).encode()}

    def whole(self, **changes) -> dict[str, bytes]:
        """The files of a run that is not interrupted."""
        return self.run(out=self.folder / "whole", **changes)

    def left(self) -> set[str]:
        """What lies beside the sources."""
        return {path.name for path in self.folder.iterdir()} - {"whole"} - {path.name for path in self.sources()}

    def sources(self) -> list[Path]:
        return [*self.source, self.options["valid"]]


class Interrupts:
    """Runs that end in KeyboardInterrupt after a chunk is read or a block is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.count = lambda: False, 0
        reach = Counter.reach

        def interrupted(bar, stage, done):
            reach(bar, stage, done)
            self.count += 1
            if self.now():
                raise KeyboardInterrupt

        monkeypatch.setattr(Counter, "reach", interrupted)
        monkeypatch.setattr(writing, "COUNTED_ROWS", 90)

    def run(self, job: Job, after: int = sys.maxsize) -> dict[str, bytes] | None:
        """The files; None if the run was interrupted, one after so many chunks and blocks of all passes."""
        self.count = 0
        return self._run(job, lambda: self.count > after)

    def into(self, stage: str, job: Job) -> None:
        """Run until a checkpoint says that a stage, "coded" or "written", has begun."""
        path = job.folder / ".data.encoding/checkpoint.json"

        def begun() -> bool:
            if not path.exists():
                return False
            checkpoint = json.loads(path.read_text().partition("\n")[2])["checkpoint"]
            return bool(checkpoint["num_bytes"] if stage == "written" else checkpoint["coded"]["num_bytes"])

        assert self._run(job, begun) is None

    def _run(self, job: Job, now: Callable[[], bool]) -> dict[str, bytes] | None:
        self.now = now
        try:
            return job.run()
        except KeyboardInterrupt:
            return None
        finally:
            self.now = lambda: False


@pytest.fixture
def interrupts(monkeypatch) -> Interrupts:
    return Interrupts(monkeypatch)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(encoding_state.os, "fsync", lambda descriptor: None)


@pytest.fixture
def default_ctrl_c() -> Iterator[None]:
    """A shell starts processes in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
class TestSameBytes:
    @pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
    def test_interrupted_at_every_chunk(self, tmp_path, interrupts, kind):
        job = Job(tmp_path, kind)
        whole = job.whole()
        num_chunks = interrupts.count
        assert num_chunks > 20
        for after in range(0, num_chunks, 2 if kind == "csv" else 7):
            assert interrupts.run(job, after) is None
            assert not job.out.exists()
            assert interrupts.run(job) == whole
            if after > num_chunks / 2:
                assert interrupts.count < num_chunks / 2 + 1
            assert job.left() == {"data"}
            job.out.rename(tmp_path / "whole" / f"{after}")

    @pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
    def test_interrupted_again_and_again(self, tmp_path, interrupts, kind):
        job = Job(tmp_path, kind)
        whole = job.whole()
        num_chunks, num_read, files = interrupts.count, 0, None
        for _ in range(8):
            files = files or interrupts.run(job, after=num_chunks // 4 + 2)
            num_read += interrupts.count
            interrupts.count = 0
            assert len(list(tmp_path.glob(".data.encoding/texts-*"))) <= 1
        assert files == whole
        # No finished stage and no chunk read or written is repeated; stages over times, numbers and counts have no checkpoints.
        assert num_chunks <= num_read < 1.5 * num_chunks

    @pytest.mark.parametrize("call", range(3, 30, 6))
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
    def test_interrupted_within_a_chunk(self, tmp_path, monkeypatch, call, error):
        job = Job(tmp_path)
        whole = job.whole()
        calls, append = [], writing.ArrayFile.append

        def fail(self, rows):
            append(self, rows)
            calls.append(rows)
            if len(calls) == call:
                raise error

        monkeypatch.setattr(writing.ArrayFile, "append", fail)
        with pytest.raises((DataError, KeyboardInterrupt), match=r"to go on|goes on with .*\.data\.encoding"):
            job.run()
        assert job.left() == {".data.encoding"}
        assert job.run() == whole
        assert job.left() == {"data"}

    def test_an_interrupt_that_a_library_drops_for_an_error_of_the_data(self, tmp_path, monkeypatch, default_ctrl_c):
        job = Job(tmp_path)
        whole = job.whole()
        append = writing.ArrayFile.append

        def fail(self, rows):
            append(self, rows)
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise DataError("no such value")

        with monkeypatch.context() as patched:
            patched.setattr(writing.ArrayFile, "append", fail)
            with pytest.raises(KeyboardInterrupt, match=r"goes on with .*\.data\.encoding"):
                job.run()
        assert job.run() == whole

    def test_an_old_dataset_is_replaced(self, tmp_path, interrupts):
        job = Job(tmp_path)
        whole = job.whole()
        job.run(seed=1, split="8:0:2")
        job.options["overwrite"] = True
        before = (job.out / "meta.json").read_bytes()
        interrupts.into("written", job)
        assert (job.out / "meta.json").read_bytes() == before
        assert interrupts.run(job) == whole
        assert job.left() == {"data"}

    def test_times_of_several_forms(self, tmp_path, interrupts):
        job = Job(tmp_path)
        for source, form in zip(job.source, ("%Y-%m-%dT%H:%M:%S", "%b %d %Y %H:%M:%S"), strict=True):
            write_log(rows(200).with_columns(t=pl.from_epoch(pl.col("t").cast(pl.Int64)).dt.to_string(form)), source)
        whole = job.whole()
        for after in range(1, interrupts.count, 4):
            assert interrupts.run(job, after) is None
            assert interrupts.run(job) == whole
            job.out.rename(tmp_path / "whole" / f"{after}")

    @pytest.mark.parametrize("split", ["time:400000,800000", "8:1:1"])
    def test_one_log_without_learned_transforms(self, tmp_path, interrupts, split):
        job = Job(tmp_path)
        job.source, fields = [*job.source, job.options.pop("valid")], SCHEMA.fields[:3]
        job.sources = lambda: job.source
        job.options |= {"split": split, "schema": SCHEMA.replace(fields=fields, weight=None)}
        whole = job.whole()
        for after in range(1, interrupts.count, 4):
            assert interrupts.run(job, after) is None
            assert interrupts.run(job) == whole
            job.out.rename(tmp_path / "whole" / f"{after}")


@pytest.mark.slow
class TestStartsFromTheBeginning:
    """A run that cannot go on says why in one line, and gives the result of a run without a checkpoint."""

    def starts_again(self, job: Job, caplog, reason: str, whole: dict[str, bytes]) -> None:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            files = job.run()
        (record,) = caplog.records
        assert "starting from the beginning" in record.message
        assert reason in record.message
        assert files == whole
        assert job.left() == {"data"}

    @pytest.mark.parametrize("stage", ["coded", "written"])
    def test_changed_source(self, tmp_path, interrupts, caplog, stage):
        job = Job(tmp_path)
        interrupts.into(stage, job)
        write_log(rows(200, seed=1), job.source[0])
        self.starts_again(job, caplog, "made with other source files", job.whole())

    def test_same_size_and_another_time(self, tmp_path, interrupts, caplog):
        job = Job(tmp_path)
        interrupts.into("written", job)
        stat = job.source[0].stat()
        job.source[0].write_text(job.source[0].read_text().replace("|1", "|2"))
        os.utime(job.source[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        self.starts_again(job, caplog, "made with other source files", job.whole())

    @pytest.mark.parametrize(
        "changes, reason",
        [
            ({"schema": SCHEMA.replace(nulls=("3",))}, "schema"),
            ({"split": "time:7:0:3"}, "split"),
            ({"seed": 1}, "seed"),
            ({"chunk_bytes": 5_000}, "chunk_bytes"),
            ({"options": ReadOptions(quoted=False)}, "read options"),
            ({"checkpoint_seconds": None}, "no checkpoints"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_changed_settings(self, tmp_path, interrupts, caplog, changes, reason):
        job = Job(tmp_path)
        interrupts.into("written", job)
        job.options |= changes
        self.starts_again(job, caplog, reason, job.whole())

    def test_other_release(self, tmp_path, interrupts, caplog, monkeypatch):
        job = Job(tmp_path)
        interrupts.into("coded", job)
        monkeypatch.setattr(encoding, "CHECKPOINT_VERSION", 0)
        self.starts_again(job, caplog, "made with other versions", job.whole())

    @pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
    def test_truncated_checkpoint(self, tmp_path, interrupts, caplog, keep):
        job = Job(tmp_path)
        interrupts.into("written", job)
        path = tmp_path / ".data.encoding/checkpoint.json"
        os.truncate(path, int(keep * path.stat().st_size))
        self.starts_again(job, caplog, "checkpoint is damaged", job.whole())

    @pytest.mark.parametrize(
        "stage, name",
        [
            ("coded", "checkpoint.json"),
            ("coded", "texts-*.parquet"),
            ("written", "data/vocab.parquet"),
            ("written", "data/transforms.json"),
            ("written", "data/schema.json"),
        ],
    )
    def test_one_wrong_byte(self, tmp_path, interrupts, caplog, stage, name):
        job = Job(tmp_path)
        interrupts.into(stage, job)
        (path,) = (tmp_path / ".data.encoding").glob(name)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        self.starts_again(job, caplog, "damaged", job.whole())

    @pytest.mark.parametrize("how", ["short", "gone"])
    def test_arrays_shorter_than_the_checkpoint_says(self, tmp_path, interrupts, caplog, how):
        job = Job(tmp_path)
        interrupts.into("written", job)
        path = tmp_path / ".data.encoding/data/train/labels.npy"
        os.truncate(path, path.stat().st_size - 1) if how == "short" else path.unlink()
        self.starts_again(job, caplog, "labels.npy is damaged", job.whole())

    def test_killed_before_the_first_checkpoint(self, tmp_path, caplog):
        job = Job(tmp_path)
        (tmp_path / ".data.encoding/data/train").mkdir(parents=True)
        (tmp_path / ".data.encoding/data/train/dense.npy").write_text("half")
        (tmp_path / ".data.lock").touch()
        assert job.run() == job.whole()
        assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.slow
class TestWorkingFolder:
    @pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
    def test_a_fault_in_the_data_is_found_where_it_is_and_ends_it_all(self, tmp_path, interrupts, kind):
        job = Job(tmp_path, kind)
        frame = rows(100)
        write_log(frame.with_columns(y=pl.when(pl.int_range(100) == 70).then(3).otherwise("y")), job.source[1])
        job.options["split"] = "8:0:2"
        where = "row 71" if kind == "parquet" else "line 72"
        with pytest.raises(DataError, match=f"two.{kind} {where}: label 'y' is"):
            job.run()
        assert job.left() == set()
        num_chunks = interrupts.count
        for after in range(1, num_chunks):
            assert interrupts.run(job, after) is None
            with pytest.raises(DataError, match=f"two.{kind} {where}: label 'y' is"):
                interrupts.run(job)
            assert job.left() == set()

    @pytest.mark.parametrize("as_frame", [True, False])
    def test_no_checkpoints(self, tmp_path, interrupts, as_frame):
        job = Job(tmp_path)
        if as_frame:
            job.options |= {"schema": SCHEMA.replace(weight=None)}
            encode_once = lambda: encode(rows(600), out=job.out, **job.options)  # noqa: E731
        else:
            encode_once = lambda: job.run(checkpoint_seconds=None)  # noqa: E731
        encode_once()
        job.out.rename(tmp_path / "whole")
        num_chunks, interrupts.count = interrupts.count, 0
        interrupts.now = lambda: interrupts.count == num_chunks - 1
        with pytest.raises(KeyboardInterrupt) as raised:
            encode_once()
        assert raised.value.args == ()
        assert job.left() == set()
        interrupts.now = lambda: False
        encode_once()

    def test_another_run_is_at_work(self, tmp_path, interrupts):
        job = Job(tmp_path)
        interrupts.into("written", job)
        before = (tmp_path / ".data.encoding/checkpoint.json").read_bytes()
        with ThreadPoolExecutor(1) as other, hold(job.out), pytest.raises(DataError, match="another thread of this"):
            other.submit(interrupts.run, job).result()
        assert (tmp_path / ".data.encoding/checkpoint.json").read_bytes() == before
        assert interrupts.run(job) is not None

    @pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP])
    def test_files_that_cannot_be_locked(self, tmp_path, monkeypatch, interrupts, code):
        job = Job(tmp_path)
        whole = job.whole()

        def unsupported(*_, **__):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(holding, "lock_descriptor", unsupported)
        assert interrupts.run(job, after=12) is None
        assert job.left() == set()
        assert job.run() == whole
        assert job.left() == {"data"}

    def test_a_full_disk_that_polars_reports(self, tmp_path):
        if not Path("/dev/full").exists():
            pytest.skip("needs /dev/full")
        with pytest.raises(DataError, match="the disk is full while writing"):
            with working_folder(tmp_path / "data", False, {}, None):
                rows(10).write_parquet("/dev/full")
        assert list(tmp_path.iterdir()) == []

    def test_checkpoints_come_at_times_and_less_often_where_they_take_long(self, tmp_path, monkeypatch):
        clock = [100.0]
        monkeypatch.setattr(encoding_state.time, "monotonic", lambda: clock[0])
        work = WorkingFolder(tmp_path / "work", {}, 60.0)
        saved = []

        def changes(seconds: float) -> dict:
            saved.append(clock[0] - 100)
            clock[0] += seconds
            return {}

        for _ in range(1000):
            work.save_if_due(lambda: changes(0.1 if len(saved) < 3 else 6.0))
            clock[0] += 1
        assert saved[:5] == pytest.approx([60, 120, 180, 240, 846], abs=1)
        assert clock[0] > 1000
        assert CHEAP_SECONDS == 0.01 * 60
        assert json.loads(work._path.read_text().partition("\n")[2])["checkpoint"]["seconds"] > 800
