"""Paths that one process at a time writes, and what dead processes left beside them.

    .NAME.lock       locked while a process writes NAME; the system unlocks it when that process ends, however it ends
    .NAME.PID.tmp    what process PID writes before it takes the name NAME
    .NAME.PID.old    the folder NAME, while another takes its place
    NAME/.lock       the lock of a folder that is filled in place

The lock, not the number of a process, says who is alive: numbers are used again, and other machines have their own.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from embtrim.errors import DataError

logger = logging.getLogger(__name__)

LOCK = ".lock"

# Seconds that a reader waits for a living process between its two renames.
WAIT_SECONDS = 1.0

_held: dict[Path, tuple[IO[bytes], int, bool]] = {}  # by lock file: the open file, its thread, whether it is locked
_watched: dict[Path, int] = {}  # by folder: a descriptor that keeps its number from being used again


class HeldError(DataError):
    """Another process, or another thread, writes the same path."""


class RemovedError(OSError):
    """A folder was removed, or moved away, while it was being written."""


@contextmanager
def hold(target: Path) -> Iterator[bool]:
    """Keep others from writing a path inside a `with` block; False if this file system has no locks.

    A replacement of the path that a killed process left half done is undone, and what dead processes left is removed. A
    block inside another one for the same path changes nothing.

    Args:
        target: The file or folder, which need not exist; its parent is made.

    Raises:
        HeldError: It is held elsewhere; the message says by whom.
        OSError: Nothing can be written beside it.
    """
    place = target.resolve()  # a link stays a link: its target is replaced
    lock = place.with_name(f".{place.name}.lock")
    is_first = lock not in _held
    with _locked(lock, target) as can_lock:
        if can_lock and is_first:
            _tidy(place)
        yield can_lock


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep others from writing into a folder inside a `with` block, see `watch_folder`; the folder is made.

    Raises:
        HeldError: It is held elsewhere; the message says by whom.
        OSError: Nothing can be written into it.
        RemovedError: It was removed inside the block.
    """
    with _locked(folder / LOCK, folder), watch_folder(folder):
        yield


@contextmanager
def watch_folder(folder: Path) -> Iterator[None]:
    """`watch` a folder inside a `with` block.

    Raises:
        RemovedError: It was removed inside the block, or before.
    """
    place = folder.resolve()
    if place in _watched:
        yield
        return
    watch(place)
    try:
        yield
        check_there(place)
    finally:
        os.close(_watched.pop(place))


def content(folder: Path) -> list[Path]:
    """What lies in a folder, beside its lock and what dead processes left."""
    return [path for path in folder.iterdir() if not re.fullmatch(rf"{re.escape(LOCK)}|\..+\.\d+\.tmp", path.name)]


def watch(folder: Path) -> None:
    """Have every write into a folder fail from now on once it has been removed, rather than make it again.

    Raises:
        RemovedError: It has been removed before.
    """
    place = folder.resolve()
    if place not in _watched:
        try:
            _watched[place] = os.open(place, os.O_RDONLY)
        except FileNotFoundError:
            raise _removed(place) from None


def check_there(path: Path) -> None:
    """Raise RemovedError if a watched folder that holds the path is no longer the one it was."""
    for place, descriptor in _watched.items():
        if path.resolve().is_relative_to(place) and not _is_at(place, descriptor):
            raise _removed(place)


def check_written(*paths: Path) -> None:
    """Raise RemovedError if files that were written in a `hold_folder` block are not there."""
    for path in paths:
        if not path.exists():
            raise RemovedError(
                errno.ENOENT,
                "it was removed while this command was working; start again, and what is missing is made again",
                str(path),
            )


def _removed(place: Path) -> RemovedError:
    words = (
        "it was removed or moved while this command was writing into it; put it back and start again to go on, or start "
        "again from the beginning"
    )
    return RemovedError(errno.ENOENT, words, str(place))


@contextmanager
def _locked(lock: Path, target: Path) -> Iterator[bool]:
    """Lock a file inside a `with` block; False if this file system has no locks. See `hold`."""
    if lock in _held:
        if _held[lock][1] != threading.get_ident():
            raise HeldError(f"another thread of this process is writing {target}; wait for it, or choose another --out")
        yield _held[lock][2]
        return
    try:
        check_there(lock)
        lock.parent.mkdir(parents=True, exist_ok=True)
        file, can_lock = _open(lock, target)
    except RemovedError:
        raise
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise
    _held[lock] = file, threading.get_ident(), can_lock
    try:
        yield can_lock
    finally:
        lock.unlink(missing_ok=True)
        _held.pop(lock)[0].close()


def _open(lock: Path, target: Path) -> tuple[IO[bytes], bool]:
    """The lock file, open and locked; False if it cannot be locked."""
    while True:
        file = open(lock, "ab+")  # noqa: SIM115 - closed by _locked
        try:
            is_free = try_lock(file)
            if is_free is False:
                raise HeldError(f"{target} is being written by {_holder(lock)}; wait for it, or choose another --out")
            if _is_at(lock, file.fileno()):
                with suppress(OSError):  # a full disk: the lock holds without its text
                    file.truncate(0)
                    file.write(_myself())
                    file.flush()
                return file, is_free is True
        except BaseException:
            file.close()
            raise
        file.close()  # a process that has just ended removed the file: its lock keeps nobody away


def try_lock(file: IO[bytes]) -> bool | None:
    """Lock an open file; False if it is locked elsewhere, None where files cannot be locked (some network disks)."""
    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError:
        return None


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _myself() -> bytes:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    values = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    return json.dumps({**values, "command": command[:200]}).encode()


def _holder(lock: Path) -> str:
    """Who holds a lock file, in words."""
    try:
        found = json.loads(lock.read_bytes())
        text = f"process {found['pid']} on {found['host']} since {found['since']} ({found['command']})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _forget_locks() -> None:
    """Close the lock files in a forked child: a child that outlives its parent must not keep the locks."""
    for file, _, _ in _held.values():
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


# --- what dead processes left ---------------------------------------------------------------------------------------


def undo_replacement(folder: Path) -> None:
    """Put an earlier folder back that a killed process had set aside, if nothing has taken its place."""
    place = folder.resolve()
    if place.exists() or not (asides := left_beside(place, "old")):
        return
    with suppress(DataError, OSError), hold(place):
        pass
    end = time.monotonic() + WAIT_SECONDS
    while not place.exists():
        if time.monotonic() > end:
            logger.warning("%s is missing: %s holds what was there; rename it if nothing writes it", folder, asides[-1])
            return
        time.sleep(WAIT_SECONDS / 50)


def _tidy(place: Path) -> None:
    """Undo a half replacement and remove what dead processes left; the lock is held."""
    asides = left_beside(place, "old")
    if asides and not place.exists():
        os.replace(asides.pop(), place)
        logger.warning("%s was being replaced when a process was killed; the earlier one is back", place)
    for path in [*asides, *left_beside(place, "tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            remove_dead(path)


def remove_dead(path: Path) -> None:
    """Remove the temporary file of a process that has ended: nobody has it locked, and none of its number lives here."""
    with suppress(OSError), open(path, "rb+") as file:
        if not _is_alive(int(path.name.split(".")[-2])) and try_lock(file):
            path.unlink()


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def left_beside(place: Path, end: str) -> list[Path]:
    """The paths `.NAME.PID.end` beside a path, the one that changed last at the end."""
    form = re.compile(rf"\.{re.escape(place.name)}\.\d+\.{end}")
    with suppress(OSError), os.scandir(place.parent) as entries:
        found = [place.with_name(entry.name) for entry in entries if form.fullmatch(entry.name)]
        if end == "old" and (place.with_name(f".{place.name}.replaced") / "meta.json").exists():
            found.append(place.with_name(f".{place.name}.replaced"))  # earlier releases set encoded data aside there
        return sorted(found, key=lambda path: path.stat().st_ctime_ns)
    return []
