"""Numbers written with commas: `12,17` with a decimal comma, `1,217.5` with commas between thousands.

A field says which by `decimal`. With "," a point, a space or an apostrophe may stand between thousands; with "." a comma, a
space or an apostrophe may. A text of another form is not a number: 12.17 does not become 1217.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import polars as pl

Decimal: TypeAlias = Literal[",", "."]

_SPACES = r" '\u{00a0}\u{202f}\u{2019}"
_BETWEEN = {",": rf"[.{_SPACES}]", ".": rf"[,{_SPACES}]"}
# An exponent may follow, as in 1,5E+03.
_FORM = {
    mark: rf"^\s*[+-]?(?:\d{{1,3}}(?:{between}\d{{3}})+|\d+)?(?:[{mark}]\d*)?(?:[eE][+-]?\d+)?\s*$"
    for mark, between in _BETWEEN.items()
}
_LEAST_SHARED = 0.5


def written_numbers(text: pl.Expr, decimal: Decimal) -> pl.Expr:
    """Texts as float64; null where a text has another form."""
    plain = text.str.replace_all(rf"{_BETWEEN[decimal]}|\s", "").str.replace(",", ".", literal=True)
    return pl.when(text.str.contains(_FORM[decimal])).then(plain.cast(pl.Float64, strict=False))


def find_decimal(values: pl.Series) -> Decimal | None:
    """The decimal mark of a column of text whose cells are numbers with commas; None if they are not, or may be lists.

    Groups of three digits after each comma are thousands, unless the first group always has three digits too, as ids have. One
    comma in a cell is a decimal mark, unless the same values stand before and after it, as in a list of two ids.
    """
    texts = values.str.strip_chars().drop_nulls().unique()
    commas = texts.filter(texts.str.contains(",", literal=True))
    spaced = texts.str.contains(rf"^[+-]?\d{{1,3}}(?:[{_SPACES}]\d{{3}})+(?:[.,]\d+)?$")
    if not len(commas) and not spaced.any():
        return None
    if texts.str.contains(_FORM["."]).all():
        first = commas.str.extract(r"^[+-]?(\d+),")
        is_grouped = spaced.any() or (first.str.len_bytes() < 3).any() or texts.str.contains(".", literal=True).any()
        if is_grouped and not first.str.starts_with("0").any():
            return "."
    if not len(commas) or not texts.str.contains(_FORM[","]).all():
        return None
    before, after = commas.str.extract(r"(\d+),"), commas.str.extract(r",(\d*)")
    is_fraction = after.str.contains(r"^0\d|^$").any() or spaced.any() or texts.str.contains(".", literal=True).any()
    if is_fraction or (after.str.len_bytes().n_unique() == 1 and before.str.len_bytes().n_unique() > 1):
        return ","
    one, other = before.unique(), after.unique()
    shared = one.is_in(other.to_list()).sum()
    return None if shared >= _LEAST_SHARED * (len(one) + len(other) - shared) else ","
