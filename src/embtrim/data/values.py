"""A value has one text: the texts of typed cells, and how texts are brought to the kind of the training column.

docs/values.md lists the rules. Cells keep the text that their own type or file gives them while they are counted and
looked up. Only texts that a vocabulary lacks are brought to the kind, once for each distinct text of a chunk, so that
usual cells cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from embtrim.data.instants import read_moments
from embtrim.errors import DataError
from embtrim.schema import FieldSpec, Kind

# Words in small letters; `_number` turns true and false into 1 and 0.
BOOLEAN_WORDS = {"true": ("true", "1", "t", "yes", "y"), "false": ("false", "0", "f", "no", "n")}
NUMBERS = ("integer", "decimal", "float", "float32")
_EXACT = ("integer", "decimal")

_PLAIN = r"^[+-]?(?:\d+\.?\d*|\.\d+)$"
# Texts that are already the one text of their number: all exact ones, and those of usual floats.
_ONE_EXACT = r"^(?:0|-?[1-9]\d*|-?(?:0|[1-9]\d*)\.\d*[1-9])$"
_USUAL_FLOAT = r"^(?:0|-?[1-9]\d{0,8}(?:\.\d{0,4}[1-9])?|-?0\.\d{0,3}[1-9])$"
_USUAL_FLOAT32 = r"^(?:0|-?[1-9]\d{0,5})$"
_EXACT_FLOAT = 2.0**53


# --- typed cells ------------------------------------------------------------------------------------------------------


def cell_text(field: FieldSpec, dtype: pl.DataType, column: pl.Expr) -> pl.Expr:
    """The cells of a column as texts, as their own type writes them.

    Raises:
        DataError: No field can read the type.
    """
    if dtype == pl.String:
        return column
    if dtype.is_float():
        return float_text(column)
    if field.kind is not None:  # without a kind, times and decimals stay as their type writes them
        if isinstance(dtype, pl.Datetime):
            if dtype.time_zone is not None:
                column = column.dt.convert_time_zone("UTC")
            text = _trimmed(column.dt.to_string("%Y-%m-%d %H:%M:%S%.f"))
            return text if dtype.time_zone is None else text + "Z"
        if dtype == pl.Time:
            return _trimmed(column.dt.to_string("%H:%M:%S%.f"))
        if isinstance(dtype, pl.Decimal):
            return _trimmed(column.cast(pl.String))
    if dtype == pl.Duration or not (
        dtype.is_integer() or dtype.is_temporal() or dtype in (pl.Boolean, pl.Null, pl.Categorical, pl.Enum, pl.Decimal)
    ):
        advice = "write its seconds as a number" if dtype == pl.Duration else "convert it to text or lists"
        raise DataError(f"column {field.raw_column!r} holds {dtype}, which field {field.name!r} cannot read; {advice}")
    return column.cast(pl.String)


def float_text(column: pl.Expr) -> pl.Expr:
    """Floats as texts: whole ones below 2^53 without a fraction, NaN as null."""
    is_whole = (column == column.floor()) & (column.abs() < _EXACT_FLOAT)
    text = column.fill_nan(None).cast(pl.String)
    return pl.when(is_whole).then(column.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(text)


def _trimmed(text: pl.Expr) -> pl.Expr:
    """Texts without the zeros that end a fraction."""
    return text.str.replace(r"(\.\d*?)0+$", "${1}").str.strip_suffix(".")


def as_float32(numbers: ArrayLike) -> np.ndarray:
    """Numbers as float32 holds them: -999.1 is -999.0999755859375; float64 (N,)."""
    with np.errstate(over="ignore"):
        return np.asarray(numbers, np.float32).astype(float)


# --- texts of a kind --------------------------------------------------------------------------------------------------


def one_texts(cells: pl.Series, field: FieldSpec, nulls: Sequence[str], where: Callable[[int], str]) -> pl.Series:
    """The one text of each cell's value: texts brought to the field's kind, and null where they mean "missing".

    A text that is not of the kind stays as it is. A field without a kind compares texts as they are.

    Args:
        cells: Texts of cells.
        field: The field that reads them.
        nulls: Texts that mean "missing"; a number covers all its texts.
        where: Says where a cell lies.

    Raises:
        DataError: A text cannot be brought to the kind without a guess.
    """
    if field.kind is None:
        return cells
    texts = _unusual(cells.drop_nulls().unique(), field.kind, nulls)
    if texts.is_empty():
        return cells
    if (refused := _refusal(texts, field.kind)) is not None:
        text, why = refused
        place = (cells == text).arg_true()[0]
        raise DataError(f"{where(place)}: column {field.raw_column!r} holds {text!r}, which {why}")
    brought = brought_texts(texts, field, nulls)
    changed = brought.ne_missing(texts)
    return cells.replace(texts.filter(changed), brought.filter(changed)) if changed.any() else cells


def brought_texts(texts: pl.Series, field: FieldSpec, nulls: Sequence[str]) -> pl.Series:
    """Distinct texts brought to the field's kind, see `one_texts`; nothing is refused."""
    kind = field.kind
    if kind is None:
        return texts
    result = _number(texts, kind) if kind in NUMBERS else texts if kind == "text" else _of_kind(texts, kind)
    is_missing = result.is_in(_missing_texts(kind, tuple(nulls)))
    if kind not in NUMBERS and (numbers := _missing_texts("text", tuple(nulls))):
        is_missing |= _plain_numbers(texts).is_in(numbers).fill_null(False)
    is_missing |= texts.is_in(nulls)
    if kind != "text":
        is_missing |= result.str.strip_chars().is_in(nulls)
    return result.set(is_missing.fill_null(True), None)


def _unusual(texts: pl.Series, kind: Kind, nulls: Sequence[str]) -> pl.Series:
    """The texts that may have another text; the others are left out by one quick look."""
    has_numbers = bool(_missing_texts("text", tuple(nulls)))
    if kind in NUMBERS and not has_numbers:
        usual = {"float": _USUAL_FLOAT, "float32": _USUAL_FLOAT32}.get(kind, _ONE_EXACT)
        return texts.filter(~texts.str.contains(usual))
    if kind == "text" and not has_numbers:
        return texts.filter(texts.is_in(nulls))
    return texts


def _refusal(texts: pl.Series, kind: Kind) -> tuple[str, str] | None:
    """The first text that cannot be brought to the kind without a guess, and why; None if there is none."""
    if kind in _EXACT:
        sign = "[eE]" if kind == "decimal" else "[.eE]"
        bad = (texts.str.strip_chars().cast(pl.Float64, strict=False).abs() >= _EXACT_FLOAT) & texts.str.contains(sign)
        why = (
            "is a floating-point number of more than 15 digits, which may have lost its last digits; "
            "write the column as integers or text"
        )
    elif kind in ("timestamp", "instant"):
        bad = read_moments(texts)["is_zoned"] != (kind == "instant")
        has, had = ("no zone", "zones") if kind == "instant" else ("a zone", "none")
        why = f"has {has}, and the times of training had {had}; write both in one way"
    else:
        return None
    found = bad.fill_null(False).arg_true()
    return (texts[found[0]], why) if len(found) else None


@cache
def _missing_texts(kind: Kind, nulls: tuple[str, ...]) -> list[str]:
    """Texts that mean "missing" brought to a kind; for text, the one text of each number among them."""
    stated = pl.Series(nulls, dtype=pl.String)
    if kind in NUMBERS:
        return _number(stated, kind).drop_nulls().to_list()
    return (_plain_numbers(stated) if kind == "text" else _of_kind(stated, kind)).drop_nulls().to_list()


def _plain_numbers(texts: pl.Series) -> pl.Series:
    """The one text of each number without leading zeros, null for other texts."""
    stripped = texts.str.strip_chars()
    is_number = stripped.cast(pl.Float64, strict=False).is_finite() & ~stripped.str.contains(r"^[+-]?0\d")
    return _number(stripped, "decimal").set(~is_number.fill_null(False), None)


def _number(texts: pl.Series, kind: Kind) -> pl.Series:
    """Texts of numbers as the one text of a kind of numbers; NaN is null, other texts stay."""
    text = pl.col("text")
    stripped = text.str.strip_chars()
    exact = stripped.str.strip_prefix("+").str.replace(r"^(-?)\.", "${1}0.").str.replace(r"^(-?)0+(\d)", "${1}${2}")
    exact = pl.when(exact.str.contains(".", literal=True)).then(_trimmed(exact)).otherwise(exact)
    exact = pl.when(exact == "-0").then(pl.lit("0")).otherwise(exact)
    value = stripped.cast(pl.Float64, strict=False)
    if kind == "float32":
        value = value.cast(pl.Float32)
    word = stripped.str.to_lowercase()
    number = float_text(value)
    if kind in _EXACT:
        number = pl.when(stripped.str.contains(_PLAIN)).then(exact).otherwise(number)
    result = (
        pl.when(value.is_nan())
        .then(None)
        .when(value.is_not_null())
        .then(number)
        .when(word == "true")
        .then(pl.lit("1"))
        .when(word == "false")
        .then(pl.lit("0"))
        .otherwise(text)
    )
    return texts.alias("text").to_frame().select(result).to_series()


def _of_kind(texts: pl.Series, kind: Kind) -> pl.Series:
    """Texts as the one text of booleans, days, timestamps or instants; other texts stay."""
    if kind == "boolean":
        word = _number(texts.str.to_lowercase(), "integer").str.strip_chars()
        for text, words in BOOLEAN_WORDS.items():
            texts = texts.set(word.is_in(words).fill_null(False), text)
        return texts
    frame = read_moments(texts).with_columns(text=texts)
    whole = pl.col("moment").dt.to_string("%Y-%m-%d %H:%M:%S")
    if kind == "date":
        is_day = (pl.col("moment").dt.time() == pl.time(0)) & (pl.col("digits") == "") & ~pl.col("is_zoned")
        return frame.select(
            pl.when(is_day).then(pl.col("moment").dt.to_string("%Y-%m-%d")).otherwise("text")
        ).to_series()
    fraction = pl.when(pl.col("digits") != "").then("." + pl.col("digits")).otherwise(pl.lit(""))
    text = whole + fraction + ("Z" if kind == "instant" else "")
    fits = pl.col("is_zoned") == (kind == "instant")
    return frame.select(pl.when(fits).then(text).otherwise("text")).to_series()
