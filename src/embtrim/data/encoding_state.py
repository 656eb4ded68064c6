"""Checkpoints of an encoding: its state, kept beside its target, so that an interrupted run can go on.

    .<target>.encoding/checkpoint.json       SHA-256 of the lines after it: the inputs and an `EncodingState`
    .<target>.encoding/texts-<0|1>.parquet   the texts numbered so far
    .<target>.encoding/codes/                codes of the values of all rows, by split
    .<target>.encoding/data/                 the folder that replaces the target at the end
    .<target>.encoding/files/                on an engine: what is read of each file, see pieces.py

The order of writing makes a checkpoint safe. Data reaches the disk (fsync) before the checkpoint that counts on it, and
the checkpoint is renamed into place. Arrays only grow: rows that a checkpoint does not count are cut off. Every other
file belongs to one checkpoint, which holds its CRC-32. If anything differs from the checkpoint, the run starts from the
beginning.

Only a run with the same inputs can use a checkpoint. The inputs are all that the result depends on, including the size
and modification time of every source.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field

from embtrim.config import Config
from embtrim.data.clock import Clock
from embtrim.data.log_file import START, Position, Skipped
from embtrim.errors import DataError, EmbtrimError, UnreachableError, first_line_of, shown
from embtrim.system.files import flush_file, write_then_rename
from embtrim.system.folders import replace_folder
from embtrim.system.holding import hold, undo_replacement
from embtrim.system.interrupts import going_on_with, interrupts_not_replaced
from embtrim.untrusted import MAX_JSON_BYTES, parse_json, read_bytes

CHECKPOINT_VERSION = 5
# A checkpoint that takes longer is saved less often. With one checkpoint a minute, this is one percent of the time.
CHEAP_SECONDS = 0.6

logger = logging.getLogger(__name__)


class Coded(Config):
    """How far the rows are written as codes.

    Attributes:
        log: Index of the log being read.
        position: Where reading that log goes on.
        blocks: Rows of each block of codes written, by split.
        positives: Rows with label 1 written, by split.
        dense_missing: Missing values of each dense field, by split.
        num_sampled: Rows whose numbers are in the sample, by split.
        num_bytes: Length of each array file, by its path within the working folder.
        skipped: Lines skipped in each log that was read to its end, by name of the log.
    """

    log: int = 0
    position: Position = START
    blocks: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    positives: dict[str, int] = Field(default_factory=dict)
    dense_missing: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    num_sampled: dict[str, int] = Field(default_factory=dict)
    num_bytes: dict[str, int] = Field(default_factory=dict)
    skipped: dict[str, Skipped] = Field(default_factory=dict)


class FileRows(Config):
    """The rows of one file of a log.

    Attributes:
        num_rows: Rows that count.
        num_read: Rows that were read; a rule may have left some of them out.
        skipped: Lines that were skipped.
    """

    num_rows: int
    num_read: int
    skipped: Skipped


class EncodingState(Config):
    """How far an encoding is; what a checkpoint stores. Results of a stage that is not finished are None.

    Attributes:
        seconds: Time spent so far.
        file_rows: The rows of each file, by log, where each file is read apart.
        cuts: Times that cut the log, for a split by time.
        clock: What the time column holds.
        transforms: The learned transforms, by field.
        coded: How far the logs are read and their rows written as codes.
        is_fitted: Whether all logs are read and the encoder is saved.
        num_bytes: Length of each file of ids, by its path within the working folder.
        crcs: CRC-32 of the files that belong to this checkpoint, by path within the working folder.
    """

    seconds: float = 0.0
    file_rows: dict[str, tuple[FileRows, ...]] | None = None
    cuts: tuple[float, ...] | None = None
    clock: Clock | None = None
    transforms: dict[str, dict[str, Any]] | None = None
    coded: Coded = Coded()
    is_fitted: bool = False
    num_bytes: dict[str, int] = Field(default_factory=dict)
    crcs: dict[str, int] = Field(default_factory=dict)


class _Stored(Config):
    """What checkpoint.json holds below its digest."""

    inputs: dict[str, Any]
    checkpoint: EncodingState


class WorkingFolder:
    """The working folder of one run.

    Attributes:
        root: The working folder itself.
        folder: The folder in it that becomes the target.
        codes: The folder in it with the codes.
        state: The state that the last checkpoint holds. A new run takes over the state of an interrupted one, if it can
            be used.
    """

    def __init__(self, root: Path, inputs: Mapping[str, Any], checkpoint_seconds: float | None) -> None:
        self.root = root
        self.folder = root / "data"
        self.codes = root / "codes"
        self._inputs = dict(inputs)
        self._seconds = checkpoint_seconds
        self._path = root / "checkpoint.json"
        self.state = self._adopt() or EncodingState()
        self._before, self._started = self.state.seconds, time.monotonic()
        self._next = self._started + (checkpoint_seconds or 0.0)

    @property
    def is_resumable(self) -> bool:
        """Whether a run with the same inputs could go on from here."""
        return self._path.exists() and self.folder.exists()

    def save(self, files: Sequence[Path] | None = None, **changes: Any) -> None:
        """Save a checkpoint.

        Args:
            files: The files that the checkpoint counts on, arrays not included; None keeps the files of the last one.
            changes: New values of attributes of `EncodingState`.
        """
        if self._seconds is None:
            return
        if files is not None:
            for file in files:
                flush_file(file)
            changes["crcs"] = {file.relative_to(self.root).as_posix(): _crc(file) for file in files}
        changes["seconds"] = self._before + time.monotonic() - self._started
        self.state = self.state.replace(**changes)
        body = json.dumps({"inputs": self._inputs, "checkpoint": self.state.model_dump()})
        text = f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}"
        write_then_rename(self._path, lambda file: file.write(text.encode()))
        for path in self.root.glob("texts-*.parquet"):
            if path.name not in self.state.crcs:
                path.unlink()
        self._next = time.monotonic() + self._seconds

    def save_if_due(self, changes: Callable[[], Mapping[str, Any]]) -> None:
        """Save a checkpoint if it is time; `changes` makes the arguments of `save`."""
        started = time.monotonic()
        if self._seconds is None or started < self._next:
            return
        self.save(**changes())
        took = time.monotonic() - started
        self._next = started + took + self._seconds * max(1.0, took / CHEAP_SECONDS)

    def new_texts(self) -> Path:
        """Path for the texts of the next checkpoint; the file of the last one stays until then."""
        return self.root / ("texts-1.parquet" if "texts-0.parquet" in self.state.crcs else "texts-0.parquet")

    def texts(self) -> Path | None:
        """Path of the texts of the last checkpoint, if it has any."""
        return next((self.root / name for name in self.state.crcs if name.startswith("texts-")), None)

    def _adopt(self) -> EncodingState | None:
        """The state of an interrupted run, with the folder set back to it.

        If there is none that can be used, None, and the folder is empty.
        """
        if self._path.exists():
            try:
                state = self._read()
                logger.info("going on from where an interrupted run left %s", self.root)
                return state
            except EmbtrimError as error:
                logger.warning("starting from the beginning, %s cannot be used: %s", self.root, error)
        if self.root.exists():
            shutil.rmtree(self.root)
        self.folder.mkdir(parents=True)
        self.codes.mkdir()
        return None

    def _read(self) -> EncodingState:
        if self._seconds is None:
            raise DataError("this run has no checkpoints")
        try:
            digest, _, body = read_bytes(self._path, MAX_JSON_BYTES).partition(b"\n")
        except (OSError, ValueError) as error:
            raise DataError(f"its checkpoint cannot be read ({first_line_of(error)})") from None
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise DataError("its checkpoint is damaged")
        try:
            stored = _Stored.parse(parse_json(body, any_number=True), where="checkpoint.json")
        except ValueError as error:
            raise DataError(f"its checkpoint is damaged ({first_line_of(error)})") from None
        now = json.loads(json.dumps(self._inputs))
        changed = [name for name in now if stored.inputs.get(name) != now[name]]
        if changed:
            raise DataError(f"it was made with other {' and '.join(changed)}")
        state, inside = stored.checkpoint, self.root.resolve()
        for name in (*state.crcs, *state.coded.num_bytes, *state.num_bytes):
            if not (self.root / name).resolve().is_relative_to(inside):
                raise DataError(f"its checkpoint names {shown(name)}, which lies outside")
        for name, crc in state.crcs.items():
            if not (self.root / name).is_file() or _crc(self.root / name) != crc:
                raise DataError(f"{name} is damaged")
        for name, length in {**state.coded.num_bytes, **state.num_bytes}.items():
            path = self.root / name
            if not path.is_file() or path.stat().st_size < length:
                raise DataError(f"{name} is damaged")
            os.truncate(path, length)
        return state


@contextlib.contextmanager
def working_folder(
    target: Path, overwrite: bool, inputs: Mapping[str, Any], checkpoint_seconds: float | None
) -> Iterator[WorkingFolder]:
    """A working folder beside `target`, whose `folder` replaces the target at the end of the `with` block.

    An EmbtrimError removes the working folder, since the same inputs would raise it again. After any other end of the
    run (an interrupt, a full disk, a server that does not answer, a kill) the folder stays, if it has a checkpoint.

    Args:
        target: The folder to make.
        overwrite: Replace an encoded dataset at `target`.
        inputs: By name, all that the result depends on, as JSON values.
        checkpoint_seconds: Least time between two checkpoints within a stage; None makes no checkpoints.

    Raises:
        DataError: The target cannot be written, another run is writing it, or the disk is full.
        KeyboardInterrupt: At Ctrl-C, with a message if the same call can go on.
    """
    place = target.resolve()
    with contextlib.ExitStack() as stack:
        root = place.with_name(f".{place.name}.encoding")
        try:
            if not stack.enter_context(hold(target)):
                # Without locks, only a folder that no other run knows is safe; but then no run can go on with it.
                root, checkpoint_seconds = root.with_name(f"{root.name}-{uuid.uuid4().hex[:8]}"), None
            work = WorkingFolder(root, inputs, checkpoint_seconds)
        except OSError as error:
            raise DataError(f"cannot write beside {target}: {error.strerror or error}; choose another --out") from None
        stack.enter_context(going_on_with(root, root.exists))
        try:
            with interrupts_not_replaced():
                yield work
            check_target(target, overwrite)
            replace_folder(work.folder, target)
            shutil.rmtree(root, ignore_errors=True)
        except BaseException as error:
            stays = work.is_resumable and (isinstance(error, UnreachableError) or not isinstance(error, EmbtrimError))
            if not stays:
                shutil.rmtree(root, ignore_errors=True)
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
        DataError: `target` exists and may not be replaced, or is a URL.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", target.as_posix()):
        raise DataError(f"{target} is a URL; data are written to a folder: write them to one, and copy it")
    undo_replacement(target)
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise DataError(f"{target} exists; choose another folder, or pass overwrite=True (--overwrite)")
    if not (target / "meta.json").exists():
        raise DataError(f"{target} exists and is not an encoded dataset; it is not overwritten")


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
