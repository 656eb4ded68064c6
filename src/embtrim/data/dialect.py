"""The dialect of a text file with separators, found from its head: what is told apart, quoted, escaped and left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from embtrim.data.log_file import is_number, listed, suffix_of
from embtrim.data.places import Place
from embtrim.data.read_options import ReadOptions
from embtrim.data.text_rows import STAND_INS, Grammar
from embtrim.data.text_stream import PLAIN, Encoding, decoded, find_encoding, read_head, text_head
from embtrim.errors import DataError

_SEPARATORS = ("\t", ",", ";", "|", "::", "^", "\x01", " ")
_SAMPLE_ROWS = 200
_SAMPLE_BYTES = 1 << 16
_SEP_LINE = re.compile(rb'^"?sep=(.)"?\r?$', re.IGNORECASE)  # Excel's note of the separator
_CONTROLS = bytes({*range(32)} - set(b"\t\n\r\x01\x1a"))  # characters that text hardly ever has
_INDEX_NAME = re.compile(r"^(Unnamed: 0(\.\d+)?|__index_level_0__)?$")


@dataclass(frozen=True)
class Dialect:
    """How a text file with separators is read.

    Attributes:
        encoding: Its character encoding.
        line_end: "cr" if lines end in CR alone, else "lf".
        separator: Text between two cells.
        quote: The character that quotes cells; empty if cells are not quoted.
        escape: How a quoted cell holds a quote, "double" or "backslash"; None takes it as doubled where it occurs.
        names: Names of all columns, those of the index included.
        index: Number of the column that is left out because it only numbers the rows, or None.
        offset: Bytes in front of the first row of data.
        line: Number of the line of the first row of data.
    """

    encoding: Encoding
    line_end: str
    separator: str
    quote: str
    escape: str | None
    names: tuple[str, ...]
    index: int | None
    offset: int
    line: int

    @property
    def grammar(self) -> Grammar:
        """How the file's text is split into rows and cells; see `TextLines` for its encoding."""
        return Grammar(_encode(self.separator, self.encoding), self.quote.encode(), self.escape == "backslash")

    def describe(self) -> str:
        """The dialect in words."""
        words = [f"separator {self.separator!r}"]
        if self.quote:
            words.append(f"quote {self.quote}" + (f" escaped by {self.escape}" if self.escape else ""))
        else:
            words.append("no quotes")
        words.append(f"encoding {self.encoding.name}" + (" with a byte order mark" if self.encoding.has_mark else ""))
        if self.line_end == "cr":
            words.append("lines end in CR")
        if self.index is not None:
            words.append(f"index column {self.names[self.index]!r} left out")
        return ", ".join(words)


def find_dialect(place: Place, options: ReadOptions) -> Dialect:
    """Find the dialect of a text file from its head; what the options state is taken as it is.

    Raises:
        DataError: The file is empty, is not text, or its first line does not fit the options.
    """
    raw, is_whole = read_head(place)
    encoding = find_encoding(raw, options.encoding)
    head, line_end = text_head(raw, is_whole, encoding, options.line_end)
    start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    start = _past_blank_lines(head, start)
    if start >= len(head):
        raise DataError(f"{place.name} is empty")
    if len(head) - len(head.translate(None, _CONTROLS)) > len(head) // 50:
        raise DataError(
            f"{place.name} is not text, or not {encoding.name} text; if it is, say its encoding with ReadOptions(encoding=..) "
            "(--encoding)"
        )
    separators = _separators(place, head[start:], options, encoding)
    note = _SEP_LINE.match(head[start:].partition(b"\n")[0])
    if note is not None and (options.separator or note[1].decode("latin-1")) == note[1].decode("latin-1"):
        separators = [note[1].decode("latin-1")]
        start = _past_blank_lines(head, head.find(b"\n", start) + 1 or len(head))
    sample = _sample(head[start:])
    grammar = _best_grammar(sample, [_encode(s, encoding) for s in separators], options)
    escape = options.escape or ("backslash" if grammar.is_backslash else _escape_of(head[start:], grammar))
    grammar = Grammar(grammar.separator, grammar.quote, escape == "backslash")
    first, *others = [grammar.cells(row) for _, row, _ in _rows(grammar, sample)]
    data = others if options.header else [first, *others]
    first_row = next(iter(grammar.rows(grammar.unescaped(head[start:]))))
    if options.header:
        start += first_row[0] + len(first_row[1])
    names, index = _names(place, [_text(cell, encoding) for cell in first], data, options)
    return Dialect(
        encoding, line_end, _text(grammar.separator, encoding), grammar.quote.decode(), escape, names, index, start,
        1 + head.count(b"\n", 0, start),
    )  # fmt: skip


# --- separator, quotes, escapes ---------------------------------------------------------------------------------------


def _separators(place: Place, head: bytes, options: ReadOptions, encoding: Encoding) -> list[str]:
    """The separators that the first line may have, the most frequent first."""
    if options.separator is not None:
        return [options.separator]
    first = head.partition(b"\n")[0]
    counts = {s: first.count(_encode(s, encoding)) for s in _SEPARATORS}
    if counts["\t"] and suffix_of(place.path) in (".tsv", ".tab"):
        return ["\t"]
    found = sorted((s for s in counts if counts[s]), key=lambda s: (s == " ", s != "::", -counts[s]))
    return found or [","]


def _sample(head: bytes) -> bytes:
    """The first lines of the head."""
    return head[: head.find(b"\n", _SAMPLE_BYTES) + 1 or len(head)]


def _rows(grammar: Grammar, text: bytes) -> list[tuple[int, bytes, bool]]:
    """The first rows of text; the last one may be cut."""
    rows = []
    for row in grammar.rows(grammar.unescaped(text)):
        rows.append(row)
        if len(rows) > _SAMPLE_ROWS:
            break
    return rows


def _best_grammar(sample: bytes, separators: Sequence[bytes], options: ReadOptions) -> Grammar:
    """The grammar under which most rows of the sample have the same number of cells.

    Of equals the first counts: a separator that is more frequent in the first line, quotes before none.
    """
    best, best_score = None, (-1.0, -1)
    for separator in separators:
        for quote in _quotes(sample, separator, options):
            for is_backslash in _backslashes(sample, quote, options):
                grammar = Grammar(separator, quote, is_backslash)
                score = _score(grammar, sample, options)
                if score > best_score:
                    best, best_score = grammar, score
    assert best is not None
    return best


def _quotes(sample: bytes, separator: bytes, options: ReadOptions) -> list[bytes]:
    """The quotes to try."""
    if options.quoted is False:
        return [b""]
    if options.quote is not None:
        return [options.quote.encode("latin-1", "replace")]
    is_double = _is_quoted(sample, separator, b'"')
    if not is_double and _is_quoted(sample, separator, b"'"):
        return [b"'"]
    if not is_double and not options.quoted and (separator == b"\t" or len(separator) > 1):
        return [b""]  # in dumps separated by tabs a quote is a character like others, unless it proves otherwise
    return [b""] if not options.quoted and _is_never_quoted(sample, separator) else [b'"']


def _backslashes(sample: bytes, quote: bytes, options: ReadOptions) -> list[bool]:
    """Whether a backslash escapes: the answers to try."""
    if options.escape is not None:
        return [options.escape == "backslash"]
    return [False, True] if b"\\" in sample and not any(byte in sample for byte in STAND_INS) else [False]


def _score(grammar: Grammar, sample: bytes, options: ReadOptions) -> tuple[float, int]:
    """The share of rows that have the most frequent number of cells, in steps of 2%, and whether there are two or more."""
    rows = _rows(grammar, sample)
    counts = Counter(len(grammar.cells(row)) for _, row, is_whole in rows if is_whole)
    if not counts:
        return 0.0, 0
    num_cells, num_rows = max(counts.items(), key=lambda item: (item[1], item[0]))
    first = len(grammar.cells(rows[0][1])) if rows[0][2] else 0
    fits = first == num_cells or (options.header and first == num_cells - 1)
    share = num_rows / len(rows) if fits or len(rows) == 1 else 0.5 * num_rows / len(rows)
    return round(share * 50) / 50 if num_cells > 1 else 0.25 * share, int(num_cells > 1)


def _is_quoted(sample: bytes, separator: bytes, quote: bytes) -> bool:
    """Whether the quote surely quotes cells: all cells of the first row, or one cell of every row."""
    if quote not in sample:
        return False
    grammar = Grammar(separator, quote)
    rows = [
        [cell[:1] == quote and cell[-1:] == quote and len(cell) > 1 for cell in row.rstrip(b"\r\n").split(separator)]
        for _, row, is_whole in _rows(grammar, sample)
        if is_whole
    ]
    if not rows:
        return False
    width = min(map(len, rows))
    return all(rows[0]) or any(all(row[i] for row in rows[1:]) for i in range(width) if len(rows) > 2)


def _is_never_quoted(sample: bytes, separator: bytes) -> bool:
    """Whether double quotes occur in several cells, and none of these cells is quoted."""
    cells = [cell for line in sample.split(b"\n") if b'"' in line for cell in line.rstrip(b"\r").split(separator)]
    starts, ends = (sum(cell[i : i + 1 or None] == b'"' for cell in cells) for i in (0, -1))
    return sum(b'"' in cell for cell in cells) >= 3 and (not starts or not ends)


def _escape_of(head: bytes, grammar: Grammar) -> str | None:
    """ "backslash" if the rows of the whole head that hold a backslash before a quote show it, else None."""
    mark = b"\\" + grammar.quote
    if not grammar.quote or mark not in head or any(byte in head for byte in STAND_INS):
        return None
    lines = [line for line in head.split(b"\n") if mark in line][:_SAMPLE_ROWS]
    text = b"\n".join(lines) + b"\n"
    escaping = Grammar(grammar.separator, grammar.quote, True)
    plain, escaped = (sum(is_whole for _, _, is_whole in _rows(g, text)) for g in (grammar, escaping))
    return "backslash" if escaped > plain else None


# --- the columns ------------------------------------------------------------------------------------------------------


def _names(
    place: Place, first: list[str], data: Sequence[Sequence[bytes]], options: ReadOptions
) -> tuple[tuple[str, ...], int | None]:
    """The names of the columns, and the number of the index column, if there is one."""
    width = Counter(map(len, data)).most_common(1)[0][0] if data else len(first)
    if options.columns is not None:
        given = options.columns
        if len(given) not in (len(first), width):
            raise DataError(f"{place.name} line 1 has {len(first)} cells, {len(given)} column names were given")
        return _without_repeats(place, given), 0 if options.index else None
    names = [name.strip() for name in first] if options.header else [f"column_{i}" for i in range(1, len(first) + 1)]
    is_short = (
        options.header and len(names) == width - 1
    )  # R names no column of row names; or all rows end in a separator
    if is_short and all(not row[-1] for row in data if len(row) == width):
        names.append("")
    elif is_short and options.index is not False:
        names.insert(0, "")
    index = 0 if options.index else None
    if options.index is None and options.header and _INDEX_NAME.match(names[0]) and len(names) > 1:
        values = [row[0] for row in data if len(row) == width]
        is_numbered = all(re.fullmatch(rb"\d+", value) for value in values) and len(set(values)) == len(values)
        index = 0 if values and (is_numbered or (is_short and len(set(values)) == len(values))) else None
    return _without_repeats(place, [name or f"column_{i}" for i, name in enumerate(names, 1)]), index


def _without_repeats(place: Place, names: Sequence[str]) -> tuple[str, ...]:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(f"{place.name} names a column twice: {listed(twice)}{guess_at_names(names, True)}")
    return tuple(names)


def guess_at_names(names: Sequence[str], has_header: bool) -> str:
    """A guess at a missing header, for the end of a message: empty, or text that starts with `; `."""
    if has_header and sum(is_number(name) or not name for name in names) * 2 >= len(names):
        return "; the first line looks like data: read it with ReadOptions(header=False, columns=..) (--no-header --columns ..)"
    return ""


def _encode(text: str, encoding: Encoding) -> bytes:
    """Text as bytes of the file's lines; see `TextLines`."""
    try:
        return text.encode(encoding.name if encoding.name in PLAIN else "utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"separator {text!r} does not exist in {encoding.name}; say the encoding with --encoding"
        ) from None


def _text(cell: bytes, encoding: Encoding) -> str:
    return decoded(cell, encoding.name if encoding.name in PLAIN else "utf-8").decode("utf-8", "replace")


def _past_blank_lines(text: bytes, start: int) -> int:
    """The place of the first line, from `start` on, that is not blank."""
    blank = re.compile(rb"(?:[ \t]*\r?\n)*").match(text, start)
    return blank.end() if blank is not None else start
