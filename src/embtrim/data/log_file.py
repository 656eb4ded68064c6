"""One file of a raw log of any format: its columns, and its rows in chunks that know their place in the log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

import polars as pl

from embtrim.config import Config

CHUNK_BYTES = 16 << 20  # bytes of text per chunk
SLICE_ROWS = 131_072  # most rows per chunk of parquet or of a frame
SLICE_CELLS = 6_000_000  # most cells per chunk of parquet or of a frame


SHOWN_LINES = 10  # skipped lines that are kept in words


class Skipped(Config):
    """The lines of a log that were skipped because they could not be split into its columns.

    Attributes:
        num_lines: How many there are.
        first: The first SHOWN_LINES of them: place, fault and text.
    """

    num_lines: int = 0
    first: tuple[str, ...] = ()

    def plus(self, more: Skipped) -> Skipped:
        """These lines and further ones."""
        if not more.num_lines:
            return self
        first = (*self.first, *more.first)[:SHOWN_LINES]
        return Skipped(num_lines=self.num_lines + more.num_lines, first=first)


NONE_SKIPPED = Skipped()


class Position(Config):
    """A place between two rows of a log, where reading can go on without parsing the rows before it.

    Attributes:
        file: Index of the file.
        offset: Place within the file: bytes of unzipped text, or rows of parquet and frames.
        line: Number of the line that starts at `offset`, for messages.
        row: Index of the next row in the whole log.
        num_read: Rows of the whole log that were read so far; a rule may have left some of them out.
        skipped: Lines of the whole log that were skipped so far.
    """

    file: int = 0
    offset: int = 0
    line: int = 1
    row: int = 0
    num_read: int = 0
    skipped: Skipped = NONE_SKIPPED


START = Position()


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a raw log.

    Attributes:
        frame: The rows; text cells are strings, parquet columns keep their type.
        first_row: Index of the first row in the whole log, over all files.
        locate: Says where a row of this chunk lies, such as `logs.csv line 18,204`.
        done: Share of the log, in 0..1, that is read up to the end of this chunk.
        end: Place in the log after this chunk.
        skipped: Lines skipped since the chunk before; `end` counts all of them.
    """

    frame: pl.DataFrame
    first_row: int
    locate: Callable[[int], str]
    done: float
    end: Position
    skipped: Skipped = NONE_SKIPPED


class LogFile:
    """One file of a log.

    Attributes:
        name: Name for messages.
        size: Bytes of the file, or rows of a frame.
        columns: Names of the columns.
        types: Types of the columns by name; a column without a type holds text.
        constants: Columns with one value for all rows, which the names of the file's folders state.
    """

    name: str
    size: int
    columns: tuple[str, ...]
    types: Mapping[str, pl.DataType] = MappingProxyType({})
    constants: Mapping[str, str | None] = MappingProxyType({})

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        """Yield the rows in order, with places counted within the file.

        `done` and `end` (its offset and line) of a chunk are those of the file, and its row numbers are not set;
        `RawLog` sets them. See `RawLog.chunks` for the arguments.
        """
        raise NotImplementedError

    def missing(self, columns: Sequence[str]) -> list[str]:
        """The names in `columns` that the file does not have."""
        there = set(self.columns)
        return [name for name in columns if name not in there]

    def hint(self, missing: Sequence[str]) -> str:
        """What may be wrong if columns are missing, for the end of a message: empty, or text that starts with `; `."""
        return ""

    def num_rows(self) -> int | None:
        """Number of rows, where a file says it without being read."""
        return None

    def identity(self) -> list[Any] | None:
        """What tells whether the file is still the same; None for a frame."""
        return None

    def describe(self) -> str:
        """How the file's text is read, in words; empty if it is not text."""
        return ""


def suffix_of(path: str) -> str:
    """The suffix of a path or URL in small letters, without `.gz`."""
    name = path.rpartition("/")[2].partition("?")[0] if "://" in path else path
    return PurePosixPath(name.lower().removesuffix(".gz")).suffix


def row_locator(name: str, start: int) -> Callable[[int], str]:
    """The `locate` of a chunk of parquet or of a frame, whose first row is row `start` of the file."""
    return lambda row: f"{name} row {start + row + 1:,}"


def rows_per_slice(num_columns: int, chunk_bytes: int) -> int:
    """Rows per chunk of parquet or of a frame; fewer than usual if `chunk_bytes` is below CHUNK_BYTES."""
    rows = min(SLICE_ROWS, max(4_096, SLICE_CELLS // max(1, num_columns)))
    return max(1, rows * min(chunk_bytes, CHUNK_BYTES) // CHUNK_BYTES)


def listed(names: Sequence[str], limit: int = 12) -> str:
    """The names for a message, cut off after `limit` names."""
    more = f", .. ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def is_number(text: str) -> bool:
    """Whether a text is a number as Python reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True
