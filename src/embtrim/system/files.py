"""Files written whole or not at all, and JSON read with an error that names the file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from embtrim import untrusted
from embtrim.errors import DataError, shown
from embtrim.system.holding import RemovedError, check_there, left_beside, remove_dead, try_lock


def write_then_rename(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, then rename it: a reader never sees half a file, not even after a power cut.

    Args:
        path: The file; its folder is made.
        write: Writes to the open file, or to a file of its name.

    Raises:
        OSError: It cannot be written; the error names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        check_there(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in left_beside(path, "tmp"):
            remove_dead(left)
        with open(temporary, "wb") as file:
            try_lock(file)
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            write(file)
            file.flush()
            take_place(temporary, path, mode)  # by name: safetensors puts a file of its own there
    except RemovedError:
        raise
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def take_place(temporary: Path, path: Path, mode: int) -> None:
    """Rename a file once its content is on the disk, with the mode that a new file has."""
    flush_file(temporary, mode)
    os.replace(temporary, path)
    flush_names(path.parent)


def read_json(path: Path, hint: str = "encode again") -> dict[str, Any]:
    """Read a JSON object of bounded size; DataError if the file is missing or broken."""
    try:
        values = untrusted.read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); {hint}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds {shown(values)} where keys with their values belong; {hint}")
    return values


def flush_file(path: Path, mode: int | None = None) -> None:
    """Wait until the content of a file is on the disk, and give it a mode."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if mode is not None and stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network disks cannot
            raise
    finally:
        os.close(descriptor)
