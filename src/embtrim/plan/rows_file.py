"""The rows of a plan in a file of their own, which belongs to the plan's JSON by its checksum."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from embtrim.errors import PlanError
from embtrim.system.arrays import read_integers
from embtrim.system.holding import left_beside

# Rows are stored as they are, and ids that ascend do not pack well; more comes from a file that was made to fill the memory.
_MAX_RATIO = 32


@contextmanager
def set_aside(rows: Path) -> Iterator[None]:
    """Keep the rows of an earlier plan inside a `with` block, until both files of the new one are there."""
    aside = rows.with_name(f".{rows.name}.{os.getpid()}.old")
    if rows.exists():
        os.replace(rows, aside)
    try:
        yield
    except BaseException:
        if aside.exists():
            os.replace(aside, rows)
        raise
    for path in left_beside(rows, "old"):
        path.unlink(missing_ok=True)


def read_rows(rows: Path, crc32: int | None, lengths: Mapping[str, int], wide: bool = False) -> dict[str, np.ndarray]:
    """The rows of a plan; those that a killed process had set aside, if they are the plan's and the others are not.

    Args:
        rows: Path of the npz.
        crc32: Checksum of the arrays; None in plans of earlier releases.
        lengths: Number of rows of each array.
        wide: Whether a table has ids of more than 32 bits.

    Raises:
        FileNotFoundError: The file is missing.
        PlanError: The file is damaged, or does not hold the rows of this plan.
    """
    arrays, fault = {}, None
    try:
        arrays = read_integers(rows, lengths, _MAX_RATIO, wide=wide) if rows.exists() else {}
    except (OSError, ValueError) as error:
        fault = error
    if arrays and crc32 in (None, crc32_of(arrays)):
        return arrays
    for aside in left_beside(rows, "old"):
        with suppress(OSError, ValueError):
            found = read_integers(aside, lengths, _MAX_RATIO, wide=wide)
            if crc32 == crc32_of(found):
                with suppress(OSError):
                    os.replace(aside, rows)
                return found
    if fault is not None:
        raise PlanError(f"{rows.name} is damaged ({fault}); save or copy the plan with its rows again")
    if not arrays:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(rows))
    raise PlanError(f"{rows.name} holds the rows of another plan; save or copy both again")


def crc32_of(arrays: Mapping[str, np.ndarray]) -> int:
    """Checksum of the rows of a plan, which tells that its two files belong together."""
    found = 0
    for _, array in sorted(arrays.items()):
        found = zlib.crc32(np.ascontiguousarray(array).data, found)
    return found
