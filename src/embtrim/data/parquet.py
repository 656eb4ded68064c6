"""Logs whose columns have types: parquet files, and polars frames in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import polars as pl

from embtrim.data.log_file import Chunk, LogFile, Position, first_line_of, row_locator, rows_per_slice
from embtrim.errors import DataError


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

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.size = path.stat().st_size
        try:
            self.types = pl.read_parquet_schema(path)
            self.columns = tuple(self.types)
            self.num_rows = int(pl.scan_parquet(path).select(pl.len()).collect().item())
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path} is not a readable parquet file ({first_line_of(error)})") from None

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        """Yield the rows in order; see `LogFile.chunks`."""
        # Slices of a scan, because the batches of polars's streaming engine read ahead by several hundred megabytes.
        step = rows_per_slice(len(columns), chunk_bytes)
        scan = pl.scan_parquet(self.path).select(columns)
        for first in range(start.offset, self.num_rows, step):
            try:
                part = scan.slice(first, step).collect()
            except (pl.exceptions.PolarsError, OSError) as error:
                raise DataError(f"{self.path} is damaged near row {first + 1:,} ({first_line_of(error)})") from None
            end = first + part.height
            yield Chunk(part, 0, row_locator(self.name, first), end / self.num_rows, Position(offset=end))
