"""What every file of a raw log gives, whatever its format: its columns, and its rows in chunks that know their place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from embtrim.config import Config

CHUNK_BYTES = 16 << 20


SLICE_ROWS = 131_072


SLICE_CELLS = 6_000_000


class Position(Config):
    """A place between two rows of a log, from which reading can go on without a look at what lies before.

    Attributes:
        file: index of the file.
        offset: within the file: bytes of text, unzipped; rows of parquet and frames.
        line: number of the line that starts at `offset`, for messages.
        row: index in the whole log of the row that comes next.
    """

    file: int = 0
    offset: int = 0
    line: int = 1
    row: int = 0


START = Position()


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a raw log.

    Attributes:
        frame: the rows; text cells are strings, parquet columns keep their type.
        first_row: index of the first row in the whole log, over all files.
        locate: says where a row of this chunk lies, such as `logs.csv line 18,204`.
        done: part of the log that has been read after this chunk, in 0..1.
        end: where the log goes on after this chunk.
    """

    frame: pl.DataFrame
    first_row: int
    locate: Callable[[int], str]
    done: float
    end: Position


class LogFile:
    """One file of a log. Its chunks count within the file: `done`, offset and line of `end`; their row numbers are not set."""

    name: str
    size: int
    columns: tuple[str, ...]

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        raise NotImplementedError

    def missing(self, columns: Sequence[str]) -> list[str]:
        """Those of `columns` that the file does not have."""
        there = set(self.columns)
        return [name for name in columns if name not in there]

    def hint(self, missing: Sequence[str]) -> str:
        """What might be wrong when columns are missing; starts with `; ` unless empty."""
        return ""


def suffix_of(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def row_locator(name: str, start: int) -> Callable[[int], str]:
    return lambda row: f"{name} row {start + row + 1:,}"


def rows_per_slice(num_columns: int, chunk_bytes: int) -> int:
    rows = min(SLICE_ROWS, max(4_096, SLICE_CELLS // max(1, num_columns)))
    return max(1, rows * min(chunk_bytes, CHUNK_BYTES) // CHUNK_BYTES)


def listed(names: Sequence[str], limit: int = 12) -> str:
    """The names for a message, cut after `limit`."""
    more = f", .. ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def first_line_of(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
