"""Folders written whole or not at all; their bytes and digests."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from safetensors import SafetensorError

from embtrim.errors import BundleError, EmbtrimError
from embtrim.system.files import flush_file, flush_names
from embtrim.system.holding import RemovedError, hold, undo_replacement


@contextmanager
def write_folder(folder: Path, what: str) -> Iterator[Path]:
    """Yield a temporary folder to fill inside a `with` block; at the end it takes the place of `folder`.

    Raises:
        BundleError: The folder could not be written; `folder` is unchanged.
        DataError: It is held elsewhere, see `hold`.
    """
    try:
        with temporary_folder(folder) as temporary:
            yield temporary
            replace_folder(temporary, folder)
    except RemovedError:
        raise
    except (OSError, SafetensorError, pl.exceptions.PolarsError) as error:
        # safetensors and polars write from Rust and report a full disk by errors of their own.
        raise BundleError(
            f"{what} {folder} could not be written: {getattr(error, 'strerror', None) or error}; "
            "free space or choose another place"
        ) from None


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside a path that is held inside a `with` block."""
    with hold(target):
        place = target.resolve()
        temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename a folder to another one, which it replaces, once its content is on the disk; `folder` is held.

    Raises:
        OSError: It cannot be done; `folder` is unchanged.
    """
    place = folder.resolve()
    aside = place.with_name(f".{place.name}.{os.getpid()}.old")
    flush_folder(new)
    try:
        if place.exists():
            os.replace(place, aside)
        os.replace(new, place)
    except BaseException:
        if aside.exists() and not place.exists():
            os.replace(aside, place)
        raise
    flush_names(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Wait until all below a folder is on the disk; its files get the mode that new files have, whoever wrote them."""
    mode = new_file_mode(folder)
    for inside, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush_file(Path(inside, name), mode)
        flush_names(Path(inside))


def new_file_mode(folder: Path) -> int:
    """The mode of new files, from that of a new folder; to ask the system for the umask would change it for a moment."""
    return stat.S_IMODE(folder.stat().st_mode) & 0o666


def check_replaceable(
    folder: Path, overwrite: bool, what: str, is_earlier: Callable[[Path], bool], error: type[EmbtrimError]
) -> None:
    """Check that a folder may be written: it does not exist, or it may be replaced.

    Args:
        folder: Folder to write.
        overwrite: Whether an earlier result, or an empty folder, may be replaced.
        what: Name of such a result, such as "a bundle".
        is_earlier: Whether a path is such a result.
        error: Class of the error.

    Raises:
        EmbtrimError: Something is there that may not be replaced; of the class `error`.
    """
    undo_replacement(folder)
    if not folder.exists():
        return
    if not overwrite:
        raise error(f"{folder} exists; choose another name or pass overwrite=True (--overwrite)")
    if not is_earlier(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise error(f"{folder} is not {what}, so it is not overwritten; choose another name")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
