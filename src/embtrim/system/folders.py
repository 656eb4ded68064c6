"""Folders written whole or not at all; their bytes and digests."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from safetensors import SafetensorError

from embtrim.errors import BundleError, EmbtrimError


@contextmanager
def write_folder(folder: Path, what: str) -> Iterator[Path]:
    """Yield a temporary folder to fill inside a `with` block; at the end it takes the place of `folder`.

    A process killed in between leaves the earlier folder as `.<name of folder>.<process>.old` beside the new one.

    Raises:
        BundleError: The folder could not be written; `folder` is unchanged.
    """
    place = folder.resolve()  # a link stays a link: its target is replaced
    temporary, aside = (place.with_name(f".{place.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            if place.exists():
                os.replace(place, aside)
            os.replace(temporary, place)
        except BaseException:
            if aside.exists() and not place.exists():
                os.replace(aside, place)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError, pl.exceptions.PolarsError) as error:
        # safetensors and polars write from Rust and report a full disk by errors of their own.
        raise BundleError(
            f"{what} {folder} could not be written: {getattr(error, 'strerror', None) or error}; "
            "free space or choose another place"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
