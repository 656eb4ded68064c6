"""Array files of encoded data (.npy), written row by row."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from embtrim.schema import Schema


class ArrayFile:
    """An .npy file to which rows are appended. It is not memory-mapped, so a full disk is an error and not a crash.

    Attributes:
        path: Path of the file.
        dtype: Type of its elements.
        num_columns: Elements per row; None for a one-dimensional array.
        num_rows: Rows written so far.
        file: The open file.
    """

    # The length of the header that numpy writes: it leaves room for the number of rows to grow.
    HEADER_BYTES = 128

    def __init__(self, path: Path, dtype: str, num_columns: int | None, num_rows: int) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.num_columns = num_columns
        self.num_rows = num_rows
        self.file: IO[bytes] = open(path, "r+b" if num_rows else "wb", buffering=1 << 20)  # noqa: SIM115 - closed by completed_at_the_end
        if num_rows:
            self.file.seek(0, os.SEEK_END)
        else:
            self.file.write(bytes(self.HEADER_BYTES))

    def append(self, rows: np.ndarray) -> None:
        """Append rows."""
        self.file.write(np.ascontiguousarray(rows, self.dtype).data if rows.size else b"")
        self.num_rows += len(rows)

    def flush(self) -> int:
        """Wait until all rows are on the disk; the length of the file in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def complete(self) -> None:
        """Write the header with the final number of rows and close the file."""
        shape = (self.num_rows,) if self.num_columns is None else (self.num_rows, self.num_columns)
        header = {"descr": dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        self.file.seek(0)
        write_array_header_1_0(self.file, header)
        assert self.file.tell() == self.HEADER_BYTES
        self.file.close()


def array_files(folder: Path, schema: Schema) -> list[ArrayFile]:
    """New array files of a split: ids, labels, dense values and weights, as far as the schema has them."""
    files = [
        ArrayFile(folder / "ids.npy", "<i4", schema.num_id_columns, 0),
        ArrayFile(folder / "labels.npy", "<f4", None, 0),
    ]
    if schema.dense_fields:
        files.append(ArrayFile(folder / "dense.npy", "<f4", len(schema.dense_fields), 0))
    if schema.weight:
        files.append(ArrayFile(folder / "weights.npy", "<f4", None, 0))
    return files


def make_arrays(folder: Path, schema: Schema, num_rows: int) -> None:
    """Make the array files of a split with room for all rows, which others fill in."""
    folder.mkdir(exist_ok=True)
    for file in array_files(folder, schema):
        file.num_rows = num_rows
        file.file.truncate(ArrayFile.HEADER_BYTES + num_rows * (file.num_columns or 1) * file.dtype.itemsize)
        file.complete()


@contextlib.contextmanager
def completed_at_the_end() -> Iterator[list[ArrayFile]]:
    """A list of files that are completed at the end; after an error they are only closed."""
    files: list[ArrayFile] = []
    try:
        yield files
        for file in files:
            file.complete()
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                file.file.close()
