"""Logs whose columns have types: parquet files, and polars frames in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from io import BytesIO
from typing import Any, BinaryIO

import polars as pl

from embtrim.data.log_file import Chunk, LogFile, Position, row_locator, rows_per_slice
from embtrim.data.places import Place
from embtrim.errors import DataError, first_line_of


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
        with self.place.local() as path:
            scan = pl.scan_parquet(path, glob=False, hive_partitioning=False)
            first = start.offset
            try:
                num_rows = int(scan.select(pl.len()).collect().item())
                while first < num_rows:
                    part = scan.select(columns).slice(first, step).collect()
                    end = first + part.height
                    yield Chunk(part, 0, row_locator(self.name, first), end / num_rows, Position(offset=end))
                    first = end
            except (pl.exceptions.PolarsError, OSError) as error:
                raise DataError(f"{self.name} is damaged near row {first + 1:,} ({first_line_of(error)})") from None


def _footer(place: Place) -> bytes:
    """The end of a parquet file, with the types of its columns."""
    tail = place.tail(1 << 16)
    needed = 8 + int.from_bytes(tail[-8:-4], "little")
    return tail if needed <= len(tail) else place.tail(needed)
