"""Checkpoints of an encoding: how far it is, kept beside its target, so that an interrupted run can go on.

    .<target>.encoding/checkpoint.json       the SHA-256 of what follows it: the inputs and a `Checkpoint`
    .<target>.encoding/texts-<0|1>.parquet   the texts numbered so far
    .<target>.encoding/codes/                the numbers of the values of all rows, by split
    .<target>.encoding/data/                 the folder that takes the target's place at the end
    .<target>.encoding.lock                  locked by the run at work; the system unlocks it when that run dies
    .<target>.replaced                       the dataset being replaced, between two renames

Order makes it safe. Data reaches the disk (fsync) before the checkpoint that counts on it, and the checkpoint is renamed
into place. Arrays only grow: rows that a checkpoint does not count are cut off. Any other file belongs to one checkpoint, which
holds its CRC-32. Whatever is not as a checkpoint says makes the run start anew.

A checkpoint is of use only to a run with the same inputs: all that the result depends on, the size and the time of the
last change of every source among them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import polars as pl
from pydantic import Field

from embtrim.config import Config
from embtrim.data.log_file import START, Position
from embtrim.errors import DataError, EmbtrimError
from embtrim.system.files import flush_file, write_then_rename

try:
    import fcntl
except ImportError:  # pragma: no cover - not a Unix
    fcntl = None

CHECKPOINT_VERSION = 2
CHEAP_SECONDS = 0.6  # a checkpoint that takes longer comes less often: with one a minute, one percent of the time

logger = logging.getLogger(__name__)


class Coded(Config):
    """How far writing codes is.

    Attributes:
        log: index of the log being read.
        position: where it goes on.
        blocks: rows of each block of codes written, by split.
        positives: rows with label 1 written, by split.
        num_bytes: length of each array file, by its path within the working folder.
    """

    log: int = 0
    position: Position = START
    blocks: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    positives: dict[str, int] = Field(default_factory=dict)
    num_bytes: dict[str, int] = Field(default_factory=dict)


class Checkpoint(Config):
    """How far an encoding is: what a stage that is not finished, or not begun, would hold is None.

    Attributes:
        seconds: spent so far.
        cuts: of the split by time.
        times_are_text: how times are compared with them.
        transforms: what was learned, by field.
        coded: how far the log is read, and its rows written as codes.
        is_fitted: whether all is read, and the encoder saved.
        num_bytes: length of each file of ids, by its path within the working folder.
        crcs: of the files that belong to this checkpoint, by path within the working folder.
    """

    seconds: float = 0.0
    cuts: tuple[str | float, ...] | None = None
    times_are_text: bool | None = None
    transforms: dict[str, dict[str, Any]] | None = None
    coded: Coded = Coded()
    is_fitted: bool = False
    num_bytes: dict[str, int] = Field(default_factory=dict)
    crcs: dict[str, int] = Field(default_factory=dict)


class Work:
    """The working folder of one run.

    Attributes:
        root: the working folder.
        folder: the folder in it that becomes the target.
        codes: the folder in it with the codes.
        checkpoint: the last one; that of an interrupted run to begin with, if there is one that can be used.
    """

    def __init__(self, root: Path, inputs: Mapping[str, Any], checkpoint_seconds: float | None) -> None:
        self.root = root
        self.folder = root / "data"
        self.codes = root / "codes"
        self._inputs = dict(inputs)
        self._seconds = checkpoint_seconds
        self._path = root / "checkpoint.json"
        self.checkpoint = self._adopt() or Checkpoint()
        self._before, self._started = self.checkpoint.seconds, time.monotonic()
        self._next = self._started + (checkpoint_seconds or 0.0)

    @property
    def is_resumable(self) -> bool:
        """Whether a run with the same inputs could go on from here."""
        return self._path.exists() and self.folder.exists()

    def save(self, files: Sequence[Path] | None = None, **changes: Any) -> None:
        """Save a checkpoint with these changes.

        Args:
            files: what it counts on instead of the files of the last one, arrays not among them.
            changes: of the attributes of `Checkpoint`.
        """
        if self._seconds is None:
            return
        if files is not None:
            for file in files:
                flush_file(file)
            changes["crcs"] = {file.relative_to(self.root).as_posix(): _crc(file) for file in files}
        changes["seconds"] = self._before + time.monotonic() - self._started
        self.checkpoint = self.checkpoint.replace(**changes)
        body = json.dumps({"inputs": self._inputs, "checkpoint": self.checkpoint.model_dump()})
        text = f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}"
        write_then_rename(self._path, lambda file: (file.write(text.encode()), file.flush(), os.fsync(file.fileno())))
        for path in self.root.glob("texts-*.parquet"):
            if path.name not in self.checkpoint.crcs:
                path.unlink()
        self._next = time.monotonic() + self._seconds

    def save_if_due(self, changes: Callable[[], Mapping[str, Any]]) -> None:
        """Save a checkpoint with what `changes` makes, the arguments of `save`, if it is time."""
        started = time.monotonic()
        if self._seconds is None or started < self._next:
            return
        self.save(**changes())
        took = time.monotonic() - started
        self._next = started + took + self._seconds * max(1.0, took / CHEAP_SECONDS)

    def new_texts(self) -> Path:
        """A file for the texts of the next checkpoint, beside that of the last one."""
        return self.root / ("texts-1.parquet" if "texts-0.parquet" in self.checkpoint.crcs else "texts-0.parquet")

    def texts(self) -> Path | None:
        """The file with the texts of the last checkpoint, if it has one."""
        return next((self.root / name for name in self.checkpoint.crcs if name.startswith("texts-")), None)

    def _adopt(self) -> Checkpoint | None:
        """The checkpoint that an interrupted run has left, the folder set back to it; None and an empty folder if there is none."""
        if self._path.exists():
            try:
                checkpoint = self._read()
                logger.info("going on from where an interrupted run left %s", self.root)
                return checkpoint
            except EmbtrimError as error:
                logger.warning("starting anew, %s is of no use: %s", self.root, error)
        if self.root.exists():
            shutil.rmtree(self.root)
        self.folder.mkdir(parents=True)
        self.codes.mkdir()
        return None

    def _read(self) -> Checkpoint:
        if self._seconds is None:
            raise DataError("this run has no checkpoints")
        digest, _, body = self._path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise DataError("its checkpoint is damaged")
        stored = json.loads(body)
        now = json.loads(json.dumps(self._inputs))
        changed = [name for name in now if stored["inputs"].get(name) != now[name]]
        if changed:
            raise DataError(f"it was made with other {' and '.join(changed)}")
        checkpoint = Checkpoint.parse(stored["checkpoint"], where="checkpoint.json")
        for name, crc in checkpoint.crcs.items():
            if not (self.root / name).is_file() or _crc(self.root / name) != crc:
                raise DataError(f"{name} is damaged")
        for name, length in {**checkpoint.coded.num_bytes, **checkpoint.num_bytes}.items():
            path = self.root / name
            if not path.is_file() or path.stat().st_size < length:
                raise DataError(f"{name} is damaged")
            os.truncate(path, length)
        return checkpoint


@contextlib.contextmanager
def working_folder(
    target: Path, overwrite: bool, inputs: Mapping[str, Any], checkpoint_seconds: float | None
) -> Iterator[Work]:
    """A working folder beside `target`, whose `folder` takes the target's place at the end.

    An EmbtrimError removes it: the same inputs would meet it again. It stays, if it has a checkpoint, after whatever else
    ends the run: an interrupt, a full disk, a kill.

    Args:
        target: the folder to make.
        overwrite: replace an encoded dataset there.
        inputs: by name, all that the result depends on, as JSON.
        checkpoint_seconds: least time between two checkpoints within a stage; None makes none.

    Raises:
        DataError: the target cannot be written, or another run is at work on it; the disk is full.
        KeyboardInterrupt: with a message, if the same call can go on.
    """
    old = target.with_name(f".{target.name}.replaced")
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            root = target.with_name(f".{target.name}.encoding")
            if not stack.enter_context(_locked(target)):
                # A folder that no other run knows is safe without a lock, but nobody goes on with it.
                root, checkpoint_seconds = root.with_name(f"{root.name}-{uuid.uuid4().hex[:8]}"), None
            if old.exists() and not target.exists():
                old.rename(target)
            work = Work(root, inputs, checkpoint_seconds)
        except OSError as error:
            raise DataError(f"cannot write beside {target}: {error.strerror or error}; choose another --out") from None
        try:
            yield work
            check_target(target, overwrite)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)  # if there is one, a kill after the renames has left it
                target.rename(old)
            work.folder.rename(target)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(root, ignore_errors=True)
        except BaseException as error:
            stays = work.is_resumable and not isinstance(error, EmbtrimError)
            if not stays:
                shutil.rmtree(root, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt) and stays:
                raise KeyboardInterrupt(f"interrupted; the same call goes on with {root}") from None
            way = f"and start again to go on, or remove {root} and" if stays else "or"
            if _is_disk_full(error):
                raise DataError(
                    f"the disk is full while writing {target}; free space {way} choose another --out"
                ) from None
            if isinstance(error, OSError):
                raise DataError(f"cannot write {target}: {error}; repair that {way} choose another --out") from error
            raise


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a dataset may be written to `target`.

    Raises:
        DataError: something is there that may not be replaced.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise DataError(f"{target} exists; choose another folder, or pass overwrite=True (--overwrite)")
    if not (target / "meta.json").exists():
        raise DataError(f"{target} exists and is not an encoded dataset; it is not overwritten")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """Keep other runs away from the target's working folder; False where the system cannot lock files."""
    path = target.with_name(f".{target.name}.encoding.lock")
    while True:
        with open(path, "ab") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                can_lock = fcntl is not None
            except BlockingIOError:
                raise DataError(
                    f"another run is encoding into {target}; wait for it, or choose another --out"
                ) from None
            except OSError:  # some network file systems
                can_lock = False
            if not _is_at(path, file):  # a run that has just ended removed it: this lock would keep nobody away
                continue
            try:
                yield can_lock
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return crc


def _is_disk_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return isinstance(error, pl.exceptions.PolarsError) and any(os.strerror(code) in str(error) for code in full)
