"""Lists that are written as text: `a|b`, `Action, Comedy`, `[9, 5, 6]`, `['a', "b, c"]`, `[1 2 3]`.

White space around a part does not belong to it. Brackets around the whole text, as Python, JSON, numpy and databases write
them, are left out. Inside them quotes around a part are left out too, a quoted part may hold the separator, and unquoted
words such as None are missing. A separator of one space is white space of any length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl

_OPENING, _CLOSING = "[({", "])}"
_SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace()]
_MISSING_WORDS = ["None", "null", "NULL", "nan", "NaN"]
_SEPARATORS = ("|", ";", "^", ",")
# Shares of the cells of a sample.
_LEAST_BRACKETED = 0.9
_LEAST_SEPARATED = 0.1
_LEAST_LIKE_IDS = 0.95


def split_texts(texts: pl.Series, separator: str) -> pl.Series:
    """The parts of texts: lists of texts, without empty parts; null for a null."""
    # Most columns have neither white space nor brackets, and a look costs less than a pass over all parts.
    if not texts.str.contains_any([*_OPENING, *_SPACES]).any():
        return _filled(texts.str.split(separator))
    texts = texts.str.strip_chars()
    is_open = _in_brackets(texts)
    if not is_open.any():
        return _filled(_split(texts, separator))
    inner = texts.str.slice(1, texts.str.len_chars() - 2).str.strip_chars()
    parts = _split(inner, separator)
    has_quotes = inner.str.contains_any(["'", '"']).fill_null(False)
    if has_quotes.any():
        between = r"\s" if separator == " " else re.escape(separator[0])
        quoted = rf"""\s*'(?:[^'\\]|\\.)*'\s*|\s*"(?:[^"\\]|\\.)*"\s*|[^{between}]+"""
        found = inner.str.extract_all(quoted).list.eval(pl.element().str.strip_chars())
        parts = found if has_quotes.all() else found.zip_with(has_quotes, parts)
    if inner.str.contains_any(_MISSING_WORDS).any():
        parts = parts.list.eval(pl.element().filter(~pl.element().is_in(_MISSING_WORDS)))
    for mark in "'\"" if has_quotes.any() else "":
        part = pl.element()
        is_quoted = part.str.starts_with(mark) & part.str.ends_with(mark) & (part.str.len_bytes() >= 2)
        bare = part.str.strip_prefix(mark).str.strip_suffix(mark).str.replace_all(r"\\(['\"\\])", "$1")
        parts = parts.list.eval(pl.when(is_quoted).then(bare).otherwise(part))
    return _filled(parts if is_open.all() else parts.zip_with(is_open, _split(texts, separator)))


def _split(texts: pl.Series, separator: str) -> pl.Series:
    """The parts of texts without white space around them."""
    texts = texts.str.replace_all(r"\s+", " ") if separator == " " else texts
    return texts.str.split(separator).list.eval(pl.element().str.strip_chars())


def _in_brackets(texts: pl.Series) -> pl.Series:
    """Whether each text stands in brackets; False for a null."""
    is_open = pl.repeat(False, len(texts), eager=True)
    for left, right in zip(_OPENING, _CLOSING, strict=True):
        is_open |= texts.str.starts_with(left) & texts.str.ends_with(right)
    return (is_open & (texts.str.len_bytes() >= 2)).fill_null(False)


def _filled(parts: pl.Series) -> pl.Series:
    # A filter and another step in one `eval` would work on the parts of each list apart, a hundred times slower.
    return parts.list.eval(pl.element().filter(pl.element() != ""))


@dataclass(frozen=True)
class TextList:
    """How the cells of a column of text are lists.

    Attributes:
        separator: Text between two parts.
        max_len: Parts of a long row: the 99th percentile.
    """

    separator: str
    max_len: int


def find_text_lists(values: pl.Series) -> TextList | str | None:
    """How a column of text holds lists; a text if it holds what no field reads, None if it holds no lists.

    Brackets around nearly all cells make lists, whatever is in them. Without brackets, a separator in a tenth of the cells
    makes lists if its parts recur from row to row, or look like ids.
    """
    texts = values.str.strip_chars().drop_nulls()
    texts = texts.filter(texts != "")
    is_open = _in_brackets(texts)
    if len(texts) and float(is_open.mean()) >= _LEAST_BRACKETED:  # type: ignore[arg-type]
        inner = texts.filter(is_open).str.slice(1, texts.filter(is_open).str.len_chars() - 2).str.strip_chars()
        if inner.str.contains(r"[\[{]").any() or inner.str.contains(r"""^["'][^"']*["']\s*:""").any():
            return "it holds objects or nested lists as text; write the values that matter as a list"
        bare = inner.str.replace_all(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", "")
        separator = next((mark for mark in (",", *_SEPARATORS) if bare.str.contains(mark, literal=True).any()), None)
        if separator is None:
            separator = " " if inner.str.contains(r"\S\s+\S").any() else ","
        longest = _longest(split_texts(texts, separator))
        # One word in brackets is a remark, such as (new); one value in square brackets is a list.
        return None if longest < 2 and not texts.str.starts_with("[").all() else TextList(separator, longest)
    for separator in (*_SEPARATORS, " "):
        if float(texts.str.contains(separator, literal=True).mean() or 0) < _LEAST_SEPARATED:  # type: ignore[arg-type]
            continue
        lists = split_texts(texts, separator)
        parts = lists.explode().drop_nulls()
        distinct = parts.n_unique()
        recurs = distinct < texts.n_unique() and len(parts) >= 2 * distinct
        if (recurs and separator != " ") or _are_ids(parts, separator):
            return TextList(separator, _longest(lists))
    return None


def _are_ids(parts: pl.Series, separator: str) -> bool:
    """Whether parts look like ids: one word each and, if a comma or a space lies between them, with digits."""
    form = r"^[A-Za-z]{0,3}\d+$" if separator in (",", " ") else r"^[\w.:-]{1,40}$"
    return bool(len(parts)) and float(parts.str.contains(form).mean()) >= _LEAST_LIKE_IDS  # type: ignore[arg-type]


def _longest(lists: pl.Series) -> int:
    return max(1, min(int(lists.list.len().quantile(0.99, "higher") or 1), 50))
