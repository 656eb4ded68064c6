"""Logs whose columns have types: parquet files, and polars frames in memory."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl

from embtrim.data.log_file import Chunk, LogFile, Position, row_locator, rows_per_slice
from embtrim.data.parquet_sizes import RowGroup, row_groups
from embtrim.data.places import Place
from embtrim.errors import DataError, first_line_of

# Ranges of a remote file that lie closer are read together.
_NEAR_BYTES = 1 << 16


class FrameFile(LogFile):
    """A polars frame, as the one file of a log."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.name = "the frame"
        self.frame = frame
        self.size = frame.height
        self.columns = tuple(frame.columns)
        self.types = frame.schema

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        """Yield the rows in order; see `LogFile.chunks`."""
        step = rows_per_slice(len(columns), chunk_bytes)
        for first in range(start.offset, self.frame.height, step):
            part = self.frame.select(columns).slice(first, step)
            end = first + part.height
            yield Chunk(part, 0, row_locator(self.name, first), end / self.frame.height, Position(offset=end))


class ParquetFile(LogFile):
    """A parquet file, read in slices of rows."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.name = place.name
        self.size = place.size
        with self._end() as file:
            self.types = dict(pl.read_parquet_schema(file))
        self.columns = tuple(self.types)

    def num_rows(self) -> int:
        """See `LogFile.num_rows`."""
        with self._end() as file:
            return int(pl.scan_parquet(file).select(pl.len()).collect().item())

    @contextlib.contextmanager
    def _end(self) -> Iterator[BinaryIO]:
        """The file, or its end, which says what the file holds."""
        try:
            with open(self.place.path, "rb") if self.place.remote is None else BytesIO(_footer(self.place)) as file:
                yield file
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{self.name} is not a readable parquet file ({first_line_of(error)})") from None

    def identity(self) -> list[Any]:
        """See `LogFile.identity`."""
        return self.place.identity()

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        """Yield the rows in order; see `LogFile.chunks`."""
        # Slices of a scan, because the batches of polars's streaming engine read ahead by several hundred megabytes.
        step = rows_per_slice(len(columns), chunk_bytes)
        first = start.offset
        for path, stop, num_rows in self._pieces(columns, first, step):
            try:
                scan = pl.scan_parquet(path, glob=False, hive_partitioning=False).select(columns)
                while first < stop:
                    part = scan.slice(first, min(step, stop - first)).collect()
                    end = first + part.height
                    yield Chunk(part, 0, row_locator(self.name, first), end / num_rows, Position(offset=end))
                    first = end
            except (pl.exceptions.PolarsError, OSError) as error:
                raise DataError(f"{self.name} is damaged near row {first + 1:,} ({first_line_of(error)})") from None

    def _pieces(self, columns: list[str], first: int, step: int) -> Iterator[tuple[Path, int, int]]:
        """Files with the chosen columns from row `first` on, the row before which each of them stops, and the rows of all.

        What lies behind a URL is copied some row groups at a time, of at least `step` rows together.
        """
        if self.place.remote is None or not self.place.size:  # some servers do not say how long a file is
            with self.place.local() as path:
                num_rows = self.num_rows()
                yield path, num_rows, num_rows
            return
        end = _footer(self.place)
        try:
            groups = row_groups(end)
        except ValueError as error:
            raise DataError(f"{self.name} is not a readable parquet file ({error})") from None
        num_rows = sum(group.num_rows for group in groups)
        row, chosen = 0, []
        for group in groups:
            row += group.num_rows
            if row > first:
                chosen.append(group)
            if chosen and (row == num_rows or sum(one.num_rows for one in chosen) >= step):
                with self._copied(chosen, columns, end) as path:
                    yield path, row, num_rows
                chosen = []

    @contextlib.contextmanager
    def _copied(self, groups: list[RowGroup], columns: list[str], end: bytes) -> Iterator[Path]:
        """A temporary file like the whole one, with holes in place of other row groups and columns."""
        spans: list[tuple[int, int]] = []
        for start, stop in sorted((a, b) for group in groups for name, a, b in group.ranges if name in columns):
            if spans and start - spans[-1][1] <= _NEAR_BYTES:
                spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
            else:
                spans.append((start, stop))
        held = self.place.size - len(end)
        spans = [(start, min(stop, held)) for start, stop in spans if start < held]
        descriptor, name = tempfile.mkstemp(prefix="embtrim-", suffix=".parquet")
        try:
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(b"PAR1")
                    if spans:
                        self.place.copy_ranges(spans, file)
                    file.seek(held)
                    file.write(end)
            except OSError as error:
                raise DataError(
                    f"a part of {self.name} could not be copied to {tempfile.gettempdir()} ({error.strerror or error}); make "
                    "room there, or set TMPDIR to another folder"
                ) from None
            yield Path(name)
        finally:
            os.unlink(name)


def _footer(place: Place) -> bytes:
    """The end of a parquet file, with the types of its columns."""
    tail = place.tail(1 << 16)
    needed = 8 + int.from_bytes(tail[-8:-4], "little")
    return tail if needed <= len(tail) else place.tail(needed)
