"""How lines of text are split into rows and cells, and which lines cannot be split.

A cell that starts with a quote ends with a quote, and holds separators, newlines and doubled quotes; a quote within any
other cell is a character like others. With backslash escapes, a backslash makes the quote, the separator, the newline
or the backslash after it a character like others.

Blocks are checked as a whole first. Only the parts of a block that fail are looked at row by row, so every check takes
time linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from embtrim.data.log_file import SHOWN_LINES

_BLANK = b" \r\n\x1a"  # a line of nothing else is no row; \x1a ended files of old systems
_PIECE_BYTES = 1 << 16  # rows that are checked together where a block as a whole fails
_MAX_CELL_BYTES = 16 << 20  # most text in which a quoted cell must end

# Bytes that stand for escaped ones until the cells are parsed, so that the text keeps its length.
STAND_INS = (b"\x0e", b"\x0f", b"\x10")
NOT_UTF8 = "is not UTF-8"
CELL_SEPARATOR = b"\x1f"  # replaces separators of several bytes, which the csv parser does not accept


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be split into the log's columns.

    Attributes:
        line: Its number, counted from that of the block.
        reason: What is wrong, for a message; it follows the number.
        text: The line itself.
    """

    line: int
    reason: str
    text: bytes


@dataclass
class Rows:
    """The rows of a block.

    Attributes:
        parts: Text of whole rows, all of them well formed, each with the number of its first line within the block.
        num_bad: Lines left out.
        bad: The first SHOWN_LINES of them.
        rest: Text at the end of the block whose row is not complete.
        num_lines: Lines in front of `rest`.
        plain: The text of all parts without its blank lines, if it has any.
    """

    parts: list[tuple[int, bytes]] = field(default_factory=list)
    num_bad: int = 0
    bad: list[BadLine] = field(default_factory=list)
    rest: bytes = b""
    num_lines: int = 0
    plain: bytes | None = None

    def take(self, text: bytes) -> None:
        """Add regular rows."""
        self.parts.append((self.num_lines, text))
        self.num_lines += text.count(b"\n")

    def leave_out(self, line: int, reason: str, text: bytes) -> None:
        """Count a bad line."""
        self.num_bad += 1
        if len(self.bad) < SHOWN_LINES:
            self.bad.append(BadLine(line, reason, text))

    @property
    def text(self) -> bytes:
        """All rows, without blank lines."""
        return b"".join(text for _, text in self.parts) if self.plain is None else self.plain


@dataclass(frozen=True)
class Grammar:
    """How text is split into rows and cells.

    Attributes:
        separator: Bytes between two cells.
        quote: The byte that quotes cells; empty if cells are not quoted.
        is_backslash: Whether a backslash escapes the byte after it.
    """

    separator: bytes
    quote: bytes
    is_backslash: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """How the grammar reaches another process: without its patterns."""
        return Grammar, (self.separator, self.quote, self.is_backslash)

    # --- escapes ------------------------------------------------------------------------------------------------------

    def unescaped(self, text: bytes) -> bytes:
        """Whole lines with doubled quotes, and stand-ins for all other escaped bytes; the length stays."""
        if not self.is_backslash or b"\\" not in text:
            return text
        mark, newline, separator = STAND_INS
        text = text.replace(b"\\\\", mark + mark)
        if self.quote:
            return text.replace(b"\\" + self.quote, self.quote * 2)
        return text.replace(b"\\\n", mark + newline).replace(
            b"\\" + self.separator, mark + separator * len(self.separator)
        )

    def as_written(self, text: bytes) -> bytes:
        """Text from `unescaped` with its backslashes, for messages; quotes that were doubled get them too."""
        if not self.is_backslash:
            return text
        mark, newline, separator = STAND_INS
        text = text.replace(self.quote * 2, b"\\" + self.quote) if self.quote else text
        text = text.replace(mark + mark, b"\\\\").replace(mark + newline, b"\\\n")
        return text.replace(mark + separator * len(self.separator), b"\\" + self.separator)

    def restored(self, cell: str) -> str:
        """A cell with the bytes that the stand-ins of `unescaped` stand for; see `stand_ins`."""
        for stand_in, text in self.stand_ins():
            cell = cell.replace(stand_in, text)
        return cell

    def stand_ins(self) -> list[tuple[str, str]]:
        """The texts to replace in parsed cells, in this order."""
        if not self.is_backslash:
            return []
        mark, newline, separator = (stand_in.decode() for stand_in in STAND_INS)
        pairs = [(mark + mark, "\\")]
        if not self.quote:
            pairs += [
                (mark + newline, "\n"),
                (mark + separator * len(self.separator), self.separator.decode("latin-1")),
            ]
        return pairs

    # --- whole blocks -------------------------------------------------------------------------------------------------

    @cached_property
    def _one(self) -> bytes:
        """The byte that stands for a separator in `_structure`."""
        return self.separator if len(self.separator) == 1 else CELL_SEPARATOR

    @cached_property
    def _others(self) -> bytes:
        return bytes({*range(256)} - {10, *self._one})

    def _structure(self, text: bytes) -> bytes | None:
        """The separators and newlines of the text outside quotes; None if a quote is out of place."""
        if len(self.separator) > 1:
            text = text.replace(self.separator, CELL_SEPARATOR)
        if not self.quote or self.quote not in text:
            return text.translate(None, self._others)
        byte_N = np.frombuffer(b"\n%b\n" % text, np.uint8)
        is_quote_N = byte_N == self.quote[0]
        is_inside_N = np.bitwise_xor.accumulate(is_quote_N)
        if is_inside_N[-1]:
            return None
        at = np.flatnonzero(is_quote_N)
        is_fine = np.zeros((2, 256), bool)
        is_fine[0, list(b"\n" + self.quote + self._one)] = True
        is_fine[1, list(b"\r\n" + self.quote + self._one)] = True
        if not (is_fine[0, byte_N[at[::2] - 1]].all() and is_fine[1, byte_N[at[1::2] + 1]].all()):
            return None
        is_mark_N = ((byte_N == self._one[0]) | (byte_N == 10)) & ~is_inside_N
        return byte_N[1:-1][is_mark_N[1:-1]].tobytes()

    def is_regular(self, text: bytes, num_cells: int) -> bool:
        """Whether the text is whole lines, each a row of `num_cells` cells, with all quotes in their places."""
        structure = self._structure(text)
        if structure is None or (num_cells == 1 and re.search(rb"(?m)^\r?\n", text)):
            return False
        if not text.endswith(b"\n"):
            structure += b"\n"
        row = self._one * (num_cells - 1) + b"\n"
        return structure == row * (len(structure) // num_cells)

    # --- rows ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _quoted(self) -> bytes:
        q = re.escape(self.quote)
        return b"%b[^%b]*(?:%b%b[^%b]*)*%b" % (q, q, q, q, q, q)

    @cached_property
    def _cell(self) -> bytes:
        s = re.escape(self.separator)
        plain = b"[^%b\n]*" % s if len(self.separator) == 1 else b"(?:(?!%b)[^\n])*" % s
        if not self.quote:
            return plain
        q, pad = re.escape(self.quote), b"" if self.separator[:1] == b" " else b" *"  # `a, "b"`
        return b"(?:%b%b%b(?=%b|\r?\n|\r?\\Z)|(?!%b%b)%b)" % (pad, self._quoted, pad, s, pad, q, plain)

    @cached_property
    def _regular_rows(self) -> Callable[[int], re.Pattern[bytes]]:
        """By number of cells, the pattern of rows that need no change."""
        q, s = re.escape(self.quote), re.escape(self.separator)
        plain = b"[^%b%b\n]*" % (q, s) if len(self.separator) == 1 else b"(?:(?!%b)[^%b\n])*" % (s, q)
        cell = b"(?:%b|%b)" % (self._quoted, plain) if self.quote else plain
        return cache(lambda n: re.compile(b"(?:(?!\r?\n)%b(?:%b%b){%d}\r?\n)+" % (cell, s, cell, n - 1)))

    @cached_property
    def _row(self) -> re.Pattern[bytes]:
        return re.compile(b"%b(?:%b%b)*\r?(?:\n|\\Z)" % (self._cell, re.escape(self.separator), self._cell))

    @cached_property
    def _cells(self) -> re.Pattern[bytes]:
        return re.compile(b"(%b)(?:%b|\r?(?:\n|\\Z))" % (self._cell, re.escape(self.separator)))

    @cached_property
    def _open_quote(self) -> re.Pattern[bytes]:
        """Whole cells, and then one that a quote opens and nothing closes before the end of the text."""
        q = re.escape(self.quote)
        return re.compile(
            b"(?:%b%b)*%b[^%b]*(?:%b%b[^%b]*)*\\Z" % (self._cell, re.escape(self.separator), q, q, q, q, q)
        )

    def cells(self, row: bytes) -> list[bytes]:
        """The cells of a row, quotes taken off; not for hot paths."""
        found = []
        for cell in self._cells_of(self.unescaped(row)):
            if self.quote and cell.strip(b" ").startswith(self.quote):
                cell = cell.strip(b" ")[1:-1].replace(self.quote * 2, self.quote)
            found.append(self.restored(cell.decode("latin-1")).encode("latin-1"))
        return found

    def rows(self, text: bytes) -> Iterator[tuple[int, bytes, bool]]:
        """Yield each row that is not blank: offset, text, and whether it is well formed; else it is one line.

        Slow: for short text and for messages only.
        """
        start = 0
        while start < len(text):
            match = self._row.match(text, start)
            end = match.end() if match is not None and match.end() > start else text.find(b"\n", start) + 1 or len(text)
            row = text[start:end]
            if row.strip(_BLANK):
                yield start, row, match is not None
            start = end

    def is_row(self, text: bytes, num_cells: int) -> bool:
        """Whether text is one well-formed row of `num_cells` cells."""
        text = self.unescaped(text)
        match = self._row.match(text)
        return match is not None and match.end() == len(text) and len(self._cells_of(text)) == num_cells

    def keep(self, rows: Rows, is_text: Callable[[bytes], bool]) -> None:
        """Move rows that are not text to the bad lines."""
        parts, has_blanks = rows.parts, rows.plain is not None
        rows.parts, rows.plain = [], None
        for line, text in parts:
            if is_text(text) and not has_blanks:
                rows.parts.append((line, text))
                continue
            before = 0
            for start, row, _ in self.rows(text):
                line, before = line + text.count(b"\n", before, start), start
                if is_text(row):
                    rows.parts.append((line, row))
                else:
                    rows.leave_out(line, NOT_UTF8, row)
        rows.bad.sort(key=lambda bad: bad.line)

    def split(self, block: bytes, num_cells: int, is_last: bool, skips: bool) -> Rows:
        """Split a block of whole lines that is not regular; rows are made regular where that keeps their cells.

        Args:
            block: Lines as `unescaped` gives them.
            num_cells: Cells of a row.
            is_last: Whether no text follows.
            skips: Whether to go on after a bad line.
        """
        result = Rows()
        start = 0
        while start < len(block) and not result.rest and (skips or not result.bad):
            end = block.find(b"\n", start + _PIECE_BYTES) + 1 or len(block)
            piece = block[start:end]
            if self.is_regular(piece, num_cells):
                result.take(piece)
                start = end
            while start < end and not result.rest and (skips or not result.bad):
                if regular := self._regular_rows(num_cells).match(block, start, end):
                    result.take(regular[0])
                    start = regular.end()
                else:
                    start = self._take_row(block, start, num_cells, is_last, result)
        return result

    def _take_row(self, block: bytes, start: int, num_cells: int, is_last: bool, result: Rows) -> int:
        """Add the row at `start` to the result; the place after it."""
        match = self._row.match(block, start)
        if match is not None:
            row = match[0]
            cells = self._cells_of(row)
            if not row.strip(_BLANK):
                result.num_lines += row.count(b"\n")
            elif len(cells) == num_cells:
                result.take(self._requoted(cells))
            else:
                result.leave_out(result.num_lines, f"has {len(cells)} cells, the log has {num_cells} columns", row)
                result.num_lines += row.count(b"\n")
            return match.end()
        is_open = self._open_quote.match(block, start) is not None
        if is_open and not is_last and len(block) - start < _MAX_CELL_BYTES:
            result.rest = block[start:]
            return len(block)
        end = block.find(b"\n", start) + 1 or len(block)
        reason = "opens a quote that is not closed" if is_open else "has text after the quote that closes a cell"
        result.leave_out(result.num_lines, reason, block[start:end])
        result.num_lines += 1
        return end

    def _cells_of(self, row: bytes) -> list[bytes]:
        """The cells of one well-formed row, as they are written."""
        if not self.quote or self.quote not in row:
            return row.rstrip(b"\r\n").split(self.separator)
        cells = []
        for match in self._cells.finditer(row):
            cells.append(match[1].rstrip(b"\r"))
            if not match[0].endswith(self.separator):
                break
        return cells

    def _requoted(self, cells: Sequence[bytes]) -> bytes:
        """A row in which each cell that holds a quote is quoted, with no space around the quotes."""
        q, written = self.quote, []
        for cell in cells:
            if q and q in cell:
                cell = cell.strip(b" ") if cell.strip(b" ").startswith(q) else q + cell.replace(q, q * 2) + q
            written.append(cell)
        return self.separator.join(written) + b"\n"


_BLANK_LINE = re.compile(rb"(?m)^\r?(\n|\Z)")


def without_blank_lines(text: bytes) -> bytes:
    """Text without quotes, without its blank lines."""
    return _BLANK_LINE.sub(b"", text)


def row_at(parts: Sequence[tuple[int, bytes]], grammar: Grammar, row: int) -> int | None:
    """The line within its block at which a row of well-formed parts starts."""
    for first_line, text in parts:
        for start, _, _ in grammar.rows(text):
            if row == 0:
                return first_line + text.count(b"\n", 0, start)
            row -= 1
    return None
