"""Runs, grids and trainings whose disk is full, read-only or too small, whose folder goes, or that are killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embtrim.cli.errors import fail_os
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError
from embtrim.experiments import comparison, room, steps
from embtrim.experiments import run as running
from embtrim.experiments.comparison import compare
from embtrim.experiments.records import read_records
from embtrim.experiments.room import check_room, room_of_grid, room_of_run, room_of_training
from embtrim.experiments.run import run
from embtrim.models import build
from embtrim.system import holding
from embtrim.system.files import write_then_rename
from embtrim.system.holding import HeldError, RemovedError, hold_folder
from embtrim.testing.toys import planted_data
from embtrim.training.checkpoint import Checkpoint
from tests.cli.workshop import call
from tests.experiments.grids import FM_ONLY, FM_RUN, outcome
from tests.system.kills import killed, names

CONFIG = FM_RUN.replace(method="uniform", controls=(), train=FM_RUN.train.replace(epochs=1))
GRID = FM_ONLY.replace(methods=("uniform",), variants={}, budgets=("40%",))


@pytest.fixture(scope="module")
def small() -> EncodedDataset:
    return planted_data(num_rows=400, noise_vocab=20)


@pytest.fixture(scope="module")
def whole(small: EncodedDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome(run(small, CONFIG, tmp_path_factory.mktemp("whole") / "run"))


def replaced(path: Path) -> dict[str, Any]:
    return outcome(read_records(path))


@pytest.mark.parametrize(
    ("number", "call", "to"),
    [(1, "replace", "config.toml"), (2, "replace", "full.safetensors"), (1, "replace", "full-seed0.json"),
     (1, "replace", "search.json"), (2, "replace", "retraining.safetensors"), (2, "replace", "uniform-seed0.json"),
     (1, "rmdir", "seed0")],
)  # fmt: skip
def test_a_killed_run_ends_the_same(
    small: EncodedDataset, whole: dict[str, Any], tmp_path: Path, number: int, call: str, to: str
) -> None:
    with killed(number, call, to):
        run(small, CONFIG, tmp_path / "run")
    assert outcome(run(small, CONFIG, tmp_path / "run")) == whole
    assert names(tmp_path / "run") == {"config.toml", "records", "plans"}
    assert not list((tmp_path / "run").rglob(".*"))


def test_another_process_writes_the_run_or_the_grid(small: EncodedDataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(running, "train_full_swept", None)
    monkeypatch.setattr(comparison, "in_processes", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    monkeypatch.setattr(holding, "lock_descriptor", lambda *_, **__: False)
    for work in (lambda: run(small, CONFIG, tmp_path / "out"), lambda: compare(small, GRID, tmp_path / "out")):
        with pytest.raises(HeldError, match="out is being written by another process; wait for it, or choose"):
            work()
    assert names(tmp_path / "out") == {".lock"}


@pytest.mark.parametrize("what", ["folder", "records"])
@pytest.mark.parametrize("command", ["run", "compare"])
def test_out_is_removed(small: EncodedDataset, tmp_path: Path, command: str, what: str) -> None:
    out = tmp_path / "out"

    def remove(*_: object) -> None:
        shutil.rmtree(out if what == "folder" else out / "records")

    work, config = (run, CONFIG) if command == "run" else (compare, GRID)
    with pytest.raises(RemovedError, match="it was removed"):
        work(small, config, out, callbacks=[SimpleNamespace(on_record=remove)])
    assert what == "records" or not out.exists(), "it is not made again"


@pytest.mark.parametrize(("file", "code"), [("full-seed0.json", errno.ENOSPC), ("search.json", errno.EROFS)])
def test_the_disk_is_full_or_read_only(
    small: EncodedDataset,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    file: str,
    code: int,
) -> None:
    replace = os.replace

    def broken(source: Any, target: Any) -> None:
        if Path(target).name == file:
            raise OSError(code, os.strerror(code))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match=os.strerror(code)) as raised:
            run(small, CONFIG, tmp_path / "run")
    assert fail_os(raised.value) == 1
    told = capsys.readouterr().err
    assert f"{file}: {os.strerror(code)}; " in told
    assert "and start again to go on, or choose another --out" in told
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("records/*.json")}
    assert outcome(run(small, CONFIG, tmp_path / "run")) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was finished stays"


def test_a_full_disk_is_not_a_reason_to_skip_a_cell(small: EncodedDataset, tmp_path: Path, monkeypatch) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "plan.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"plan\.json"):
            compare(small, GRID, tmp_path / "out")
    assert len(read_records(tmp_path / "out")) == 1
    assert len(compare(small, GRID, tmp_path / "out").records) == 2


def test_a_training_goes_on_without_room_for_its_checkpoints(
    small: EncodedDataset, whole: dict[str, Any], tmp_path: Path, monkeypatch, caplog
) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).suffix == ".safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert outcome(run(small, CONFIG, tmp_path / "run")) == whole
    assert "full.safetensors could not be written" in caplog.text


class TestRoom:
    @pytest.fixture
    def disk(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        def set_free(free: int) -> None:
            monkeypatch.setattr(room.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))

        return set_free

    def test_what_work_takes(self, small: EncodedDataset) -> None:
        tables = 4 * sum(rows * (4 + 1) for rows in small.schema.tables.values())  # columns and first-order weights
        assert room_of_training(small, CONFIG) == (tables, tables, 2 * 4 * tables)
        sgd = CONFIG.replace(train=CONFIG.train.replace(optimizer="sgd"))
        assert room_of_training(small, sgd).states == 2 * 2 * tables
        assert room_of_run(small, CONFIG).results == 0, "data in memory have no bundles"
        assert room_of_grid(small, [CONFIG] * 2, seeds=3, jobs=2) == (6 * tables, 2 * tables, 2 * 8 * tables)

    def test_bundles_of_a_run(self, encoded: Path) -> None:
        data = EncodedDataset.load(encoded)
        words = sum((encoded / name).stat().st_size for name in ("schema.json", "vocab.parquet", "transforms.json"))
        full = room_of_training(data, CONFIG).results
        one = CONFIG.replace(controls=(), bits=32)
        compact = room_of_run(data, one).results - full - words
        assert 0 < compact < 0.6 * (full - words)
        assert room_of_run(data, one.replace(seeds=2)).results == 2 * (full + words + compact)
        unknown = room_of_run(data, one.replace(budget="auto", method="guided"))
        assert unknown.results == full + words

    def test_too_little(
        self, small: EncodedDataset, tmp_path: Path, disk: Callable[[int], None], caplog, monkeypatch
    ) -> None:
        disk(4_999_999)
        work = room.Room(results=3_000_000, trained=2_000_000, states=10_000_000)
        with pytest.raises(DataError, match=r"new/out has 5.0 MB free, and what is .* takes at least 5.0 MB; free"):
            check_room(tmp_path / "new" / "out", work)
        (tmp_path / "state").write_bytes(bytes(10))
        check_room(tmp_path / "new" / "out", work, tmp_path)
        assert "has 5.0 MB free, and 13.0 MB are needed with checkpoints of the training" in caplog.text
        monkeypatch.setattr(running, "train_full_swept", None)
        monkeypatch.setattr(comparison, "in_processes", None)
        disk(0)
        for start in (lambda: run(small, CONFIG, tmp_path / "out"), lambda: compare(small, GRID, tmp_path / "out")):
            with pytest.raises(DataError, match="free space or choose another --out"):
                start()
        assert not (tmp_path / "out").exists()


class TestTrain:
    """What the command says before, and instead of, hours of training."""

    @pytest.fixture
    def arguments(self, encoded: Path, tmp_path: Path) -> list[str]:
        return ["train", str(encoded), "--model", "fm", "--out", str(tmp_path / "out")]

    def test_no_room(self, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "train_full", None)
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 9))
        done = call(*arguments)
        assert (done.code, names(tmp_path)) == (1, set())
        assert "out has 0.0 MB free, and what is going to be written there takes at least 0." in done.err

    def test_held(self, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "train_full", None)
        monkeypatch.setattr(holding, "lock_descriptor", lambda *_, **__: False)
        done = call(*arguments)
        assert done.code == 1
        assert "out is being written by another process; wait for it, or choose another --out" in done.err

    @pytest.mark.parametrize("kept", [True, False])
    def test_sigterm(self, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
        def train(data: Any, config: Any, progress: bool, checkpoint: Path, callbacks: Any) -> None:
            if kept:
                write_then_rename(checkpoint, lambda file: None)
            signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(steps, "train_full", train)
        done = call(*arguments)
        where = f"the same call goes on with {tmp_path / '.out.unfinished'}"
        if not kept:
            where = "nothing is half-written; there is no checkpoint, and the same call starts from the beginning"
        assert done.code == 143
        assert done.err.splitlines()[-1] == f"embtrim: interrupted by SIGTERM; {where}: embtrim {' '.join(arguments)}"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_checkpoint_in_a_removed_folder_ends_the_training(small: EncodedDataset, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "out" / "state", 0, {}, build("fm", small.schema, embedding_dim=4))

    def work() -> None:
        with hold_folder(tmp_path / "out"):
            shutil.rmtree(tmp_path / "out")
            checkpoint.save({})

    with pytest.raises(RemovedError):
        work()
    assert not (tmp_path / "out").exists()
