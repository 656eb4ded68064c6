"""Paths that one process at a time writes: locks, replacements that were killed, what dead processes left."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embtrim.errors import BundleError
from embtrim.system import holding
from embtrim.system.files import write_then_rename
from embtrim.system.folders import check_replaceable, write_folder
from embtrim.system.holding import HeldError, RemovedError, hold, hold_folder, undo_replacement
from embtrim.system.unfinished import unfinished
from tests.cli.workshop import environment
from tests.system.kills import killed, names

HOLDER = (
    "import sys, pathlib\nfrom embtrim.system.holding import hold, hold_folder\n"
    "with (hold_folder if sys.argv[2] == 'folder' else hold)(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n    sys.stdin.read()\n"
)


def fill(folder: Path, text: str) -> None:
    with write_folder(folder, what="bundle") as inside:
        (inside / "in").mkdir()
        (inside / "in" / "text").write_text(text)


def text_of(folder: Path) -> str:
    return (folder / "in" / "text").read_text()


@pytest.mark.parametrize("how", ["path", "folder"])
def test_another_process_holds_it_until_it_is_killed(tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(out), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(HeldError, match=rf"out is being written by process {process.pid} on \S+ since .* \(-c "):
            with hold_folder(out) if how == "folder" else hold(out):
                pass
        process.kill()
    lock = out / ".lock" if how == "folder" else tmp_path / ".out.lock"
    assert lock.exists()
    with hold_folder(out) if how == "folder" else hold(out):
        assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()


def test_threads_and_blocks_inside_blocks(tmp_path: Path) -> None:
    with hold(tmp_path / "out") as can_lock, ThreadPoolExecutor(1) as other:
        assert can_lock
        with pytest.raises(HeldError, match="another thread of this process is writing"):
            other.submit(fill, tmp_path / "out", "other").result()
        fill(tmp_path / "out", "own")
        with unfinished(tmp_path / "out"):
            assert (tmp_path / ".out.lock").exists()
    assert names(tmp_path) == {"out"}


def test_a_lock_on_a_file_that_a_finished_process_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, locks, lock_descriptor = tmp_path / ".data.lock", [], holding.lock_descriptor

    def remove_first(descriptor: int, *, blocking: bool) -> bool:
        is_free = lock_descriptor(descriptor, blocking=blocking)
        locks.append(os.fstat(descriptor).st_ino)
        if len(locks) == 1:
            path.unlink()
            path.with_name("keeps the number in use").touch()
        return is_free

    monkeypatch.setattr(holding, "lock_descriptor", remove_first)
    with hold(tmp_path / "data") as can_lock:
        assert can_lock
        assert len(locks) == 2
        assert path.stat().st_ino == locks[1]
    assert not path.exists()


def test_a_damaged_or_strange_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "lock_descriptor", lambda *_, **__: False)
    for text, words in (("", "another process"), ('{"pid": 1}', "another process"), ("[]", "another process"),
                        ('{"pid": 1, "host": "\\u001b[2J", "since": 2, "command": ""}', r"process 1 on \?\[2J since")):  # fmt: skip
        (tmp_path / ".out.lock").write_text(text)
        with pytest.raises(HeldError, match=rf"out is being written by {words}"), hold(tmp_path / "out"):
            pass


@pytest.mark.parametrize(("number", "found"), [(1, "old"), (2, "old"), (3, "new")])
def test_killed_while_a_folder_takes_the_place_of_another(tmp_path: Path, number: int, found: str) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    with killed(number, "replace") if number < 3 else killed(1, "rmdir", to="old"):
        fill(out, "new")
    assert len(names(tmp_path)) > 1
    if number == 2:
        assert not out.exists()
    undo_replacement(out)
    assert text_of(out) == found
    with pytest.raises(BundleError, match="exists; choose another name or pass overwrite"):
        check_replaceable(out, False, "a bundle", Path.exists, BundleError)
    fill(out, "again")
    assert text_of(out) == "again"
    assert names(tmp_path) == {"out"}


def test_killed_between_the_renames_it_is_seen_before_it_is_written(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with killed(2):
        fill(tmp_path / "out", "new")
    with pytest.raises(BundleError, match="exists; choose another name"):
        check_replaceable(tmp_path / "out", False, "a bundle", Path.exists, BundleError)


def test_a_reader_waits_for_a_living_writer_between_its_renames(tmp_path: Path, monkeypatch, caplog) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    monkeypatch.setattr(holding, "WAIT_SECONDS", 0.2)
    with hold(out), ThreadPoolExecutor(1) as other:
        aside = tmp_path / f".out.{os.getpid()}.old"
        out.rename(aside)
        reader = other.submit(undo_replacement, out)
        assert reader.result() is None
        assert "out is missing: " in caplog.text
        assert not out.exists()
        monkeypatch.setattr(holding, "WAIT_SECONDS", 60.0)
        reader = other.submit(undo_replacement, out)
        aside.rename(out)
        assert reader.result(30) is None
    assert text_of(out) == "old"


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    """A number that a living process has, a file that a living process of another machine has locked."""
    dead, parent = 2**22 + 5, os.getppid()
    for name in (f".out.{dead}.tmp", f".out.{dead}.old", ".out.my.tmp", ".outer.1.tmp", ".out.old"):
        (tmp_path / name).mkdir()
    (tmp_path / f".out.{dead + 1}.tmp").write_text("half")
    (tmp_path / f".out.{parent}.tmp").write_text("half")
    with open(tmp_path / f".out.{dead + 2}.tmp", "wb") as locked:
        assert holding.try_lock(locked)
        fill(tmp_path / "out", "text")
    kept = {".out.my.tmp", ".outer.1.tmp", ".out.old", f".out.{parent}.tmp", f".out.{dead + 2}.tmp"}
    assert names(tmp_path) == kept | {"out"}
    (tmp_path / f".file.{dead}.tmp").write_text("half")
    write_then_rename(tmp_path / "file", lambda file: file.write(b"whole"))
    assert names(tmp_path) == kept | {"out", "file"}


def test_where_files_cannot_be_locked_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(holding, "lock_descriptor", unsupported)
    (tmp_path / ".out.7.tmp").mkdir()
    (tmp_path / f".file.{2**22 + 5}.tmp").touch()
    fill(tmp_path / "out", "text")
    write_then_rename(tmp_path / "file", lambda file: None)
    assert names(tmp_path) == {"out", "file", ".out.7.tmp", f".file.{2**22 + 5}.tmp"}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    def write(path: Path) -> None:
        path.write_text("x")
        path.chmod(0o600 if mask == 0o022 else 0o644)

    before = os.umask(mask)
    try:
        with write_folder(tmp_path / "out", what="bundle") as inside:
            write(inside / "private")
        write_then_rename(tmp_path / "file", lambda file: write(Path(file.name)))
    finally:
        os.umask(before)
    for path in (tmp_path / "out" / "private", tmp_path / "file"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_all_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []

    def path_of(descriptor: int) -> str:
        return next(str(p.relative_to(tmp_path)) for p in [*tmp_path.rglob("*"), tmp_path]
                    if os.path.samestat(p.stat(), os.fstat(descriptor)))  # fmt: skip

    replace, pid = os.replace, os.getpid()
    monkeypatch.setattr(os, "fsync", lambda descriptor: told.append(("flushed", path_of(descriptor))))
    monkeypatch.setattr(os, "replace", lambda a, b: (told.append(("renamed", Path(b).name)), replace(a, b)))
    fill(tmp_path / "out", "text")
    assert told == [*(("flushed", f".out.{pid}.tmp{end}") for end in ("/in/text", "/in", "")), ("renamed", "out"),
                    ("flushed", ".")]  # fmt: skip
    told.clear()
    write_then_rename(tmp_path / "file", lambda file: file.write(b"text"))
    assert told == [("flushed", f".file.{pid}.tmp"), ("renamed", "file"), ("flushed", ".")]


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_folder_that_is_removed_while_it_is_written_is_not_made_again(tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"

    def work() -> None:
        with hold_folder(out):
            write_then_rename(out / "records" / "a", lambda file: None)
            out.rename(tmp_path / "moved") if how == "moved" else shutil.rmtree(out)
            if how == "replaced":
                out.mkdir()
            with pytest.raises(RemovedError, match="it was removed or moved while"):
                write_then_rename(out / "records" / "b", lambda file: None)
            with pytest.raises(RemovedError, match="it was removed or moved while"):
                fill(out / "bundles" / "c", "text")

    with pytest.raises(RemovedError, match="it was removed or moved while"):
        work()
    assert not (out / "records").exists()
    assert not (out / "bundles").exists()
    assert holding._watched == holding._held == {}


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as raised, hold(tmp_path / "file" / "out"):
        pass
    assert raised.value.filename == str(tmp_path / "file" / "out")
    with pytest.raises(OSError) as raised:
        write_then_rename(tmp_path / "file" / "out", lambda file: None)
    assert raised.value.filename == str(tmp_path / "file" / "out")
