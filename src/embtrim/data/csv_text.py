"""csv, tsv and other text with separators: its columns, the parsing of its lines, and the lines that are at fault."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import polars as pl

from embtrim.data.dialect import find_dialect, guess_at_names
from embtrim.data.log_file import Chunk, LogFile, Position, Skipped
from embtrim.data.places import Place
from embtrim.data.read_options import ReadOptions
from embtrim.data.text_rows import CELL_SEPARATOR, NOT_UTF8, STAND_INS, BadLine, Rows, row_at, without_blank_lines
from embtrim.data.text_stream import PLAIN, TextLines, decoded, is_latin, is_utf8
from embtrim.errors import DataError, first_line_of

logger = logging.getLogger(__name__)

_QUOTES_ARE_TEXT = 'if " is plain text in this log, read it with ReadOptions(quoted=False) (--set read.quoted=false)'
_HIGH = re.compile(rb"[\x80-\xff]")
_SHOWN_CHARACTERS = 120  # of a bad line in a message


class CsvFile(LogFile):
    """A text file with separators between cells, such as csv and tsv.

    Attributes:
        place: Where the file is.
        dialect: How its text is read.
    """

    def __init__(self, place: Place, options: ReadOptions) -> None:
        self.place = place
        self.name = place.name
        self.size = place.size
        self.dialect = find_dialect(place, options)
        self.columns = tuple(name for i, name in enumerate(self.dialect.names) if i != self.dialect.index)
        self._skips = options.on_error == "skip"
        self._header = options.header
        self._is_latin_said = False

    def hint(self, missing: Sequence[str]) -> str:
        """Guess at a missing header or another separator; see `LogFile.hint`."""
        guess = guess_at_names(self.columns, self._header)
        if not guess and len(self.columns) == 1:
            return f"; is {self.dialect.separator!r} the separator?"
        return guess

    def identity(self) -> list[Any]:
        """See `LogFile.identity`."""
        return self.place.identity()

    def describe(self) -> str:
        """The dialect in words."""
        return self.dialect.describe()

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        """Yield the rows in order; see `LogFile.chunks`."""
        dialect, grammar = self.dialect, self.dialect.grammar
        offset, line = (start.offset, start.line) if start.offset else (dialect.offset, dialect.line)
        rest, skipped = b"", Skipped()
        with TextLines(self.place, dialect.encoding.name, dialect.line_end, offset, line) as lines:
            while (text := lines.read(max(chunk_bytes - len(rest), len(rest)))) or rest:
                offset += len(text)
                block = rest + grammar.unescaped(text)
                rows = self._split(block, is_last=not text)
                self._check(rows, line)
                frame = self._parse(rows, line, columns, numbers)
                words = tuple(self._words_on(bad, line) for bad in rows.bad)
                skipped = skipped.plus(Skipped(num_lines=rows.num_bad, first=words))
                locate, rest = self._locator(rows, line), rows.rest
                line += rows.num_lines
                if frame.height:
                    end = Position(offset=offset - len(rest), line=line)
                    yield Chunk(frame, 0, locate, lines.done, end, skipped)
                    skipped = Skipped()
        if skipped.num_lines:
            end = Position(offset=offset, line=line)
            none = pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
            yield Chunk(none, 0, self._locator(Rows(), line), 1.0, end, skipped)

    def _split(self, block: bytes, is_last: bool) -> Rows:
        """The rows of a block of lines."""
        grammar, num_cells = self.dialect.grammar, len(self.dialect.names)
        if grammar.is_regular(block, num_cells):
            return Rows([(0, block)], num_lines=block.count(b"\n"))
        if not (grammar.quote and grammar.quote in block):
            plain = without_blank_lines(block)
            if grammar.is_regular(plain, num_cells):
                return Rows([(0, block)], num_lines=block.count(b"\n"), plain=plain)
        return grammar.split(block, num_cells, is_last, self._skips)

    def _parse(self, rows: Rows, line: int, columns: list[str], numbers: Collection[str]) -> pl.DataFrame:
        """The rows as a frame; rows that are not text in the file's encoding are moved to the bad lines."""
        encoding = self.dialect.encoding
        name = encoding.name if encoding.name in PLAIN else "utf-8"
        text = rows.text
        try:
            return self._frame(decoded(text, name), columns, numbers)
        except pl.exceptions.PolarsError as error:
            if name != "utf-8" or is_utf8(text):
                raise DataError(
                    f"{self.name} cannot be parsed after line {line:,} ({first_line_of(error)}); {_QUOTES_ARE_TEXT}"
                ) from None
        if not encoding.is_sure and is_latin(text):
            self._say_latin(rows, line)
            return self._frame(decoded(text, "cp1252"), columns, numbers)
        self.dialect.grammar.keep(rows, is_utf8)
        self._check(rows, line)
        return self._frame(rows.text, columns, numbers)

    def _frame(self, text: bytes, columns: list[str], numbers: Collection[str]) -> pl.DataFrame:
        """The columns of regular rows in UTF-8; columns of `numbers` are float64 if all their cells are numbers."""
        names, separator = self.dialect.names, self.dialect.separator
        if not text:
            return pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
        if len(separator.encode()) > 1:
            text, separator = text.replace(separator.encode(), CELL_SEPARATOR), CELL_SEPARATOR.decode()
        parse = partial(
            pl.read_csv,
            text,
            has_header=False,
            columns=[names.index(name) for name in columns],
            separator=separator,
            quote_char=self.dialect.quote or None,
        )
        schema = dict.fromkeys(names, pl.String)
        try:
            frame = parse(schema={**schema, **dict.fromkeys(numbers, pl.Float64)})
        except pl.exceptions.PolarsError:
            frame = parse(schema=schema)
        if STAND_INS[0] in text:
            strings = pl.col(pl.String)
            for stand_in, original in self.dialect.grammar.stand_ins():
                strings = strings.str.replace_all(stand_in, original, literal=True)
            frame = frame.with_columns(strings)
        return frame.select(columns)

    def _words_on(self, bad: BadLine, first_line: int) -> str:
        """Place, fault and text of a bad line."""
        text = self.dialect.grammar.as_written(bad.text)
        shown = text.decode("utf-8" if is_utf8(text) else "cp1252", "replace").strip("\r\n")
        cut = ".." if len(shown) > _SHOWN_CHARACTERS else ""
        return f"{self.name} line {first_line + bad.line:,} {bad.reason}: {shown[:_SHOWN_CHARACTERS]}{cut}"

    def _check(self, rows: Rows, first_line: int) -> None:
        """Raise DataError for the first bad line, unless bad lines are skipped."""
        if self._skips or not rows.bad:
            return
        bad, grammar = rows.bad[0], self.dialect.grammar
        advice = "repair or drop the line, or skip such lines with ReadOptions(on_error='skip') (--on-error skip)"
        escaping = replace(grammar, is_backslash=True)
        if bad.reason != NOT_UTF8 and not grammar.is_backslash and escaping.is_row(bad.text, len(self.dialect.names)):
            advice = "its quotes are escaped by backslashes: ReadOptions(escape='backslash') (--escape backslash)"
        elif bad.reason == NOT_UTF8:
            advice = f"say the encoding, such as ReadOptions(encoding='cp1252') (--encoding cp1252); or {advice}"
        elif "quote" in bad.reason:
            advice = f"{advice}; {_QUOTES_ARE_TEXT}"
        elif self.dialect.separator.encode() not in bad.text:
            advice = f"is {self.dialect.separator!r} the separator? If it is, {advice}"
        raise DataError(f"{self.name} line {first_line + bad.line:,} {bad.reason}; {advice}")

    def _say_latin(self, rows: Rows, first_line: int) -> None:
        """Say once at which line the text proves not to be UTF-8."""
        if self._is_latin_said:
            return
        self._is_latin_said = True
        found = ((first, text, match) for first, text in rows.parts if (match := _HIGH.search(text)) is not None)
        first, text, match = next(found)
        number = first + text.count(b"\n", 0, match.start())
        logger.warning(
            "%s is not UTF-8 from line %s on, and is read as cp1252; if it is another encoding, say which with "
            "ReadOptions(encoding=..) (--encoding)", self.name, f"{first_line + number:,}",
        )  # fmt: skip

    def _locator(self, rows: Rows, first_line: int) -> Callable[[int], str]:
        """The `locate` of the chunk that a block gives."""
        parts, grammar = rows.parts, self.dialect.grammar

        def locate(row: int) -> str:
            line = row_at(parts, grammar, row)
            return f"{self.name} row {row + 1:,}" if line is None else f"{self.name} line {first_line + line:,}"

        return locate
