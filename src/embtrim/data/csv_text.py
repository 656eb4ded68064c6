"""csv, tsv and other text with separators: its columns, the parsing of its lines, and the line that is at fault."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from embtrim.data.log_file import Chunk, LogFile, Position, first_line_of, listed, suffix_of
from embtrim.data.read_options import ReadOptions
from embtrim.data.text_blocks import QUOTES_ARE_TEXT, first_nonblank_line, row_blocks
from embtrim.errors import DataError

_NOT_UTF8 = "is not UTF-8; if the text is latin-1, read it with ReadOptions(encoding='latin-1') (--encoding latin-1)"
_CELL_SEPARATOR = b"\x1f"  # replaces separators of several characters, which the csv parser does not accept


class CsvFile(LogFile):
    """A text file with separators between cells, such as csv and tsv.

    Attributes:
        path: Path of the file.
        latin: Whether the text is latin-1 instead of UTF-8.
        header: Whether the first line names the columns.
        separator: Bytes between two cells.
        quoted: Whether `"` quotes cells.
    """

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self.path = path
        self.name = str(path)
        self.size = path.stat().st_size
        self.latin = options.encoding == "latin-1"
        self.header = options.header
        first = first_nonblank_line(path)
        separator = options.separator or _find_separator(path, first)
        self.separator = separator.encode()
        self.quoted = options.quoted if options.quoted is not None else separator != "\t" and len(separator) == 1
        try:
            text = first.decode("latin-1" if self.latin else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path} line 1 {_NOT_UTF8}") from None
        if self.quoted:
            cells = next(csv.reader([text], delimiter=separator))
        else:
            cells = text.split(separator)
        if options.columns is not None:
            if len(options.columns) != len(cells):
                raise DataError(f"{path} line 1 has {len(cells)} cells, {len(options.columns)} column names were given")
            self.columns = options.columns
        elif options.header:
            self.columns = tuple(cells)
        else:
            self.columns = tuple(f"column_{i}" for i in range(1, len(cells) + 1))
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise DataError(f"{path} names a column twice: {listed(twice)}{self.hint(twice)}")

    def hint(self, missing: Sequence[str]) -> str:
        """Guess at a missing header or another separator; see `LogFile.hint`."""
        if self.header and sum(_is_number(name) or not name for name in self.columns) * 2 >= len(self.columns):
            return "; the first line looks like data: read it with ReadOptions(header=False, columns=..) (--no-header --columns ..)"
        if len(self.columns) == 1:
            return f"; is {self.separator.decode()!r} the separator?"
        return ""

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        """Yield the rows in order; see `LogFile.chunks`."""
        schema = dict.fromkeys(self.columns, pl.String)
        separator = self.separator if len(self.separator) == 1 else _CELL_SEPARATOR
        blocks = row_blocks(self.path, chunk_bytes, self.quoted, skip_lines=int(self.header), start=start)
        for block, first_line, done, end in blocks:
            rows = block
            if not self._is_even(rows):
                rows = _without_blank_lines(rows)
                if not rows:
                    continue
                if not self._is_even(rows):
                    raise self._fault(block, first_line, "lines of unequal length")
            if self.latin:
                rows = rows.decode("latin-1").encode()
            if len(self.separator) > 1:
                rows = rows.replace(self.separator, _CELL_SEPARATOR)
            parse = partial(
                pl.read_csv,
                rows,
                has_header=False,
                columns=[self.columns.index(name) for name in columns],
                separator=separator.decode(),
                quote_char='"' if self.quoted else None,
            )
            try:
                try:
                    frame = parse(schema={**schema, **dict.fromkeys(numbers, pl.Float64)})
                except pl.exceptions.PolarsError:
                    frame = parse(schema=schema)
            except pl.exceptions.PolarsError as error:
                raise self._fault(block, first_line, first_line_of(error)) from None
            yield Chunk(frame.select(columns), 0, self._locator(block, first_line), done, end)

    def _is_even(self, rows: bytes) -> bool:
        """Whether the block has the number of separators that it has if every line has a cell for each column."""
        if self.quoted and b'"' in rows:
            rows = re.sub(rb'"[^"]*"', b"", rows)
        num_lines = rows.count(b"\n") + (not rows.endswith(b"\n"))
        if len(self.separator) == 1:  # several times faster than bytes.count if every tenth byte is a separator
            num_separators = int(np.count_nonzero(np.frombuffer(rows, np.uint8) == self.separator[0]))
        else:
            num_separators = rows.count(self.separator)
        return num_separators == num_lines * (len(self.columns) - 1)

    def _width_error(self, block: bytes, first_line: int) -> DataError | None:
        """The error for the first line with too few or too many cells, if there is such a line."""
        for line, row in _logical_rows(block, self.quoted):
            if self.quoted:
                row = re.sub(rb'"[^"]*"', b"", row)
            num_cells = row.count(self.separator) + 1
            if num_cells != len(self.columns):
                return DataError(
                    f"{self.path} line {first_line + line:,} has {num_cells} cells, the log has {len(self.columns)} columns; "
                    "repair or drop the line"
                )
        return None

    def _fault(self, block: bytes, first_line: int, reason: str) -> DataError:
        """The error for a block that does not parse, found by a slow look at every line."""
        if not self.latin:
            for line, row in _logical_rows(block, self.quoted):
                try:
                    row.decode()
                except UnicodeDecodeError:
                    return DataError(f"{self.path} line {first_line + line:,} {_NOT_UTF8}")
        return self._width_error(block, first_line) or DataError(
            f"{self.path} cannot be parsed after line {first_line:,} ({reason}); {QUOTES_ARE_TEXT}"
        )

    def _locator(self, block: bytes, first_line: int) -> Callable[[int], str]:
        """The `locate` of the chunk that a block gives."""

        def locate(row: int) -> str:
            for index, (line, _) in enumerate(_logical_rows(block, self.quoted)):
                if index == row:
                    return f"{self.path} line {first_line + line:,}"
            return f"{self.path} row {row + 1:,}"

        return locate


def _find_separator(path: Path, first_line: bytes) -> str:
    """The separator by the file's suffix, otherwise the most frequent one in the first line."""
    if suffix_of(path) in (".tsv", ".tab"):
        return "\t"
    counts = {sep: first_line.count(sep.encode()) for sep in ("\t", ",", ";", "|", "::")}
    if counts["::"]:
        return "::"
    best = max(counts, key=lambda sep: counts[sep])
    return best if counts[best] else ","


def _without_blank_lines(block: bytes) -> bytes:
    return re.sub(rb"(?m)^\r?(\n|\Z)", b"", block)


def _logical_rows(block: bytes, quoted: bool) -> Iterator[tuple[int, bytes]]:
    """Yield (line offset in the block, row) for each row, which may span lines. Slow: for error messages only."""
    row, start = b"", 0
    for offset, line in enumerate(block.split(b"\n")):
        if not row:
            if not line.strip(b"\r"):
                continue
            start = offset
        row = row + b"\n" + line if row else line
        if not quoted or row.count(b'"') % 2 == 0:
            yield start, row
            row = b""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
