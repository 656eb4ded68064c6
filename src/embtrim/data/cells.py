"""Raw cells to values: texts, lists of texts, numbers and hashes, and the matrix of what is stored for them.

A categorical value is its text, see values.py. Whole floats are written without a fraction (`5.0` in parquet is `5`),
booleans as `true` and `false`, times in ISO form. A missing value is null, NaN in a number, or a text or number in
`nulls`. In a multi field a missing cell is an empty list, and missing or empty elements are left out.

Values of hashed fields: see hashing.py.

Shapes: N rows, C id columns, E dense fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import polars as pl

from embtrim.data.hashing import hash_values
from embtrim.data.text_lists import split_texts
from embtrim.data.transforms import bucket_numbers, bucket_texts, transformed
from embtrim.data.values import as_float32, cell_text, one_texts
from embtrim.data.written_numbers import written_numbers
from embtrim.errors import DataError
from embtrim.schema import PAD, FieldSpec, Schema


def needed_columns(schema: Schema) -> tuple[str, ...]:
    """The raw columns that the fields read, without repetition."""
    return tuple(dict.fromkeys(field.raw_column for field in schema.fields))


def log_columns(schema: Schema, with_time: bool) -> list[str]:
    """The raw columns that encoding reads: those of the label, fields, weight, and time if asked for."""
    extra = [schema.weight, schema.time if with_time else None]
    names = [*schema.label_columns, *needed_columns(schema), *(name for name in extra if name is not None)]
    return list(dict.fromkeys(names))


def require_columns(frame: pl.DataFrame, columns: Sequence[str]) -> None:
    """Check that `frame` has `columns`.

    Raises:
        DataError: A column is missing; the message names the columns there are and the columns needed.
    """
    there = set(frame.columns)
    missing = [name for name in columns if name not in there]
    if missing:
        raise DataError(
            f"the rows have no column {', '.join(map(repr, missing))}; they have {', '.join(frame.columns)}; "
            f"needed: {', '.join(columns)}"
        )


def number_columns(schema: Schema) -> tuple[str, ...]:
    """The raw columns that may be parsed as numbers at once, without repetition.

    Only numeric and dense fields read them, and no text of a number in them means "missing".
    """
    others = {field.raw_column for field in schema.fields if field.type not in ("numeric", "dense")}
    others |= {f.raw_column for f in schema.fields if _compares_null_texts(schema, f) or f.decimal}
    others |= {name for name in (*schema.label_columns, schema.weight, schema.time) if name is not None}
    return tuple(name for name in needed_columns(schema) if name not in others)


def number_cells(
    frame: pl.DataFrame,
    schema: Schema,
    transforms: Mapping[str, Mapping[str, Any]],
    locate: Callable[[int], str],
    codes: Mapping[str, pl.Expr],
    finish: Callable[[FieldSpec, np.ndarray, pl.Series | None, Callable[[int], str]], np.ndarray],
) -> np.ndarray:
    """The id fields of raw rows as a matrix: int32 (C, N), PAD where a multi field has no more values.

    Args:
        frame: The rows.
        schema: The fields of the rows.
        transforms: Learned transforms of the numeric fields.
        locate: Says where a row lies.
        codes: For each listed categorical or multi field, an expression that turns the texts of the column with the
            field's name into integer codes.
        finish: Turns a field's codes, hashed ids (0 for a missing value) or buckets (MISSING_BUCKET for one) into the
            stored values. Its further arguments are the texts of a listed field, and what says where the n-th of them lies.

    Raises:
        DataError: A value or a column's type does not fit its field.
    """
    texts, buckets = canonical_values(frame, schema, transforms, locate)
    # One select runs its columns in parallel.
    coded = texts.select(codes[f.name] for f in schema.id_fields if f.name in codes and f.type != "multi")
    stored_CN = np.full((schema.num_id_columns, frame.height), PAD, np.int32)
    for field, columns in zip(schema.id_fields, schema.column_slices, strict=True):
        if field.type == "multi":
            length_N = texts[field.name].list.len().fill_null(0).to_numpy().astype(np.int64)
            flat = flatten(texts[field.name])
            row = np.repeat(np.arange(frame.height), length_N)
            where = partial(_located, locate, row)
            if field.hash_size:
                code = hash_values(one_texts(flat, field, nulls_of(schema, field), where), field)
            else:
                code = flat.to_frame().select(codes[field.name]).to_series().to_numpy()
            place = np.arange(len(flat)) - np.repeat(np.cumsum(length_N) - length_N, length_N)
            stored_CN[columns.start + place, row] = finish(field, code, flat, where)
            continue
        if field.type == "numeric":
            code = buckets[field.name]
            if field.hash_size:
                code = _hashes(bucket_texts(pl.Series(code)), field)
            stored_CN[columns.start] = finish(field, code, None, locate)
            continue
        values = texts[field.name]
        if field.hash_size:
            code = _hashes(one_texts(values, field, nulls_of(schema, field), locate), field)
        else:
            code = coded[field.name].to_numpy()
        stored_CN[columns.start] = finish(field, code, values, locate)
    return stored_CN


def _hashes(values: pl.Series, field: FieldSpec) -> np.ndarray:
    """Hashed ids of texts, int32 (N,); 0 for a missing value, so that it is told apart from values of its hash."""
    hash_N = hash_values(values, field)
    if values.null_count():
        hash_N = np.where(values.is_null().to_numpy(), np.int32(0), hash_N)
    return hash_N


def canonical_values(
    frame: pl.DataFrame, schema: Schema, transforms: Mapping[str, Mapping[str, Any]], locate: Callable[[int], str]
) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """Canonical values by field: texts (lists of texts for a multi field) as columns, and buckets as int32 (N,).

    Texts that mean "missing" become null in multi and hashed fields. In a listed categorical field they stay as they
    are; counting and lookup take care of them.
    """
    numeric = [field for field in schema.id_fields if field.type == "numeric"]
    numbers = to_numbers(frame, numeric, schema, locate)
    dtypes = frame.schema  # made anew at each call
    texts: list[pl.Expr] = []
    for field in schema.id_fields:
        dtype, column = dtypes[field.raw_column], pl.col(field.raw_column)
        nulls = nulls_of(schema, field)
        if field.type == "numeric":
            continue
        if field.type == "multi":
            lists = _lists(field, frame)
            is_kept = pl.element().is_not_null() & ~pl.element().is_in([*nulls, ""])
            if field.kind is not None and (numbers_null := null_numbers(schema, field)):
                number = pl.element().str.strip_chars().cast(pl.Float64, strict=False)
                is_kept &= ~number.is_in(numbers_null).fill_null(False)
            lists = lists.list.eval(pl.element().filter(is_kept)).list
            used = lists.tail(field.max_len) if field.keep == "last" else lists.head(field.max_len)
            texts.append(used.alias(field.name))
            continue
        if isinstance(dtype, (pl.List, pl.Array)):
            raise DataError(f"column {field.raw_column!r} holds lists; declare field {field.name!r} as type = 'multi'")
        text = cell_text(field, dtype, column)
        if field.hash_size:
            text = pl.when(~text.is_in(nulls)).then(text)
        texts.append(text.alias(field.name))
    return frame.select(texts), {f.name: bucket_numbers(numbers[f.name].to_numpy(), f, transforms) for f in numeric}


def to_numbers(
    frame: pl.DataFrame, fields: Sequence[FieldSpec], schema: Schema, locate: Callable[[int], str]
) -> pl.DataFrame:
    """Numbers of numeric and dense fields, as one float64 column per field; a missing value is null.

    Raises:
        DataError: A cell does not hold a finite number.
    """
    dtypes = frame.schema
    for field in fields:
        dtype = dtypes[field.raw_column]
        if not (dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Null, pl.Categorical, pl.Enum)):
            is_duration = isinstance(dtype, pl.Duration)
            advice = "write its seconds as a number" if is_duration else f"declare field {field.name!r} categorical"
            raise DataError(f"column {field.raw_column!r} holds {dtype}, which is not a number; {advice}")
    numbers = frame.select(_number_cells(f, dtypes[f.raw_column], schema) for f in fields)
    # A second pass over the cells is made only where a column holds more than finite numbers and nulls.
    num_null = numbers.null_count()
    num_null_raw = frame.select(list(dict.fromkeys(f.raw_column for f in fields))).null_count()
    is_infinite = numbers.select(pl.all().is_infinite().any())
    repaired = []
    for f in fields:
        is_odd = is_infinite[f.name][0] or num_null[f.name][0] > num_null_raw[f.raw_column][0]
        if is_odd or _compares_null_texts(schema, f):
            repaired.append(_repair(numbers[f.name], frame[f.raw_column], f, schema, locate))
    return numbers.with_columns(repaired)


def _number_cells(field: FieldSpec, dtype: pl.DataType, schema: Schema) -> pl.Expr:
    """The cells of a numeric or dense field as float64; null where they are missing or not a number."""
    number = _number(field, dtype, pl.col(field.raw_column)).fill_nan(None)
    missing = [] if field.kind is None else [*null_numbers(schema, field)]
    if dtype == pl.Float32:
        missing += as_float32(missing).tolist()
    if missing:
        number = pl.when(~number.is_in(missing)).then(number)
    return number.alias(field.name)


def _repair(
    numbers: pl.Series, raw: pl.Series, field: FieldSpec, schema: Schema, locate: Callable[[int], str]
) -> pl.Series:
    """Numbers with stated nulls and padded text understood; DataError for cells that are still not finite numbers."""
    texts, nulls = raw.cast(pl.String), nulls_of(schema, field)
    stripped = texts.str.strip_chars()
    if field.kind == "boolean":
        stripped = one_texts(stripped, field, (), locate).replace({"true": "1", "false": "0"})
    found = stripped.alias("text").to_frame().select(_number(field, pl.String(), pl.col("text"))).to_series()
    found = found.fill_nan(None)
    is_stated = texts.is_in(nulls)
    if field.kind is not None:
        is_stated |= stripped.is_in(nulls) | found.is_in(null_numbers(schema, field)).fill_null(False)
    is_word = stripped.str.to_lowercase().is_in(["nan", "+nan", "-nan"])
    is_missing = (is_stated | is_word).fill_null(False)
    numbers = numbers.fill_null(found).set(is_missing, None)
    is_bad = (numbers.is_null() & texts.is_not_null() & ~is_missing) | numbers.is_infinite().fill_null(False)
    bad = is_bad.arg_true()
    if len(bad):
        row = bad[0]
        what = "not a number" if numbers[row] is None else "not finite"
        raise DataError(
            f"{locate(row)}: column {field.raw_column!r} holds {texts[row]!r}, which is {what}; declare it categorical or "
            f"add {texts[row]!r} to nulls"
        )
    return numbers


def dense_values(
    frame: pl.DataFrame, schema: Schema, transforms: Mapping[str, Mapping[str, Any]], locate: Callable[[int], str]
) -> np.ndarray | None:
    """The dense fields of raw rows: float32 (N, E), NaN if missing; or None if the schema has no dense field.

    Raises:
        DataError: A cell does not hold a finite number, or its transformed value is not finite in float32.
    """
    if not schema.dense_fields:
        return None
    numbers = to_numbers(frame, schema.dense_fields, schema, locate)
    dense_NE = np.empty((frame.height, len(schema.dense_fields)), np.float32)
    for e, field in enumerate(schema.dense_fields):
        value_N = transformed(numbers[field.name].to_numpy(), field, transforms)  # null becomes NaN
        with np.errstate(over="ignore"):
            dense_NE[:, e] = value_N
        too_large = np.flatnonzero(np.isinf(dense_NE[:, e]))
        if len(too_large):
            raise DataError(
                f"{locate(too_large[0])}: column {field.raw_column!r} gives {value_N[too_large[0]]:g}, which float32 cannot "
                "hold; declare transform = 'log1p' for it"
            )
    return dense_NE


def _is_category(dtype: pl.DataType) -> bool:
    return dtype in (pl.Categorical, pl.Enum)


def _number(field: FieldSpec, dtype: pl.DataType, column: pl.Expr) -> pl.Expr:
    """The cells of a column as float64; null where a text is not a number."""
    column = column.cast(pl.String) if _is_category(dtype) else column
    if field.decimal is not None and (dtype == pl.String or _is_category(dtype)):
        return written_numbers(column, field.decimal)
    return column.cast(pl.Float64, strict=False)


def _lists(field: FieldSpec, frame: pl.DataFrame) -> pl.Expr:
    """The cells of a multi field's column as lists of texts."""
    dtype, column = frame.schema[field.raw_column], pl.col(field.raw_column)
    if isinstance(dtype, pl.Array):
        dtype, column = pl.List(dtype.inner), column.arr.to_list()
    if isinstance(dtype, pl.List):
        return column.list.eval(cell_text(field, dtype.inner, pl.element()))  # type: ignore[arg-type]
    if dtype == pl.Null:
        return column.cast(pl.List(pl.String))
    if dtype not in (pl.String, pl.Categorical, pl.Enum):
        raise DataError(
            f"column {field.raw_column!r} holds {dtype}, but multi field {field.name!r} needs lists or text with a separator"
        )
    if field.separator is None:
        raise DataError(
            f"column {field.raw_column!r} holds text, so multi field {field.name!r} needs separator = '|', or the text "
            "between its values"
        )
    texts = frame[field.raw_column].cast(pl.String)
    # A field without a kind was encoded by a release that kept white space and brackets.
    return pl.lit(texts.str.split(field.separator) if field.kind is None else split_texts(texts, field.separator))


def flatten(lists: pl.Series) -> pl.Series:
    """The elements of all lists in order."""
    return lists.filter(lists.list.len().fill_null(0) > 0).explode()


def nulls_of(schema: Schema, field: FieldSpec) -> tuple[str, ...]:
    """The texts that mean "missing" in a field."""
    return (*schema.nulls, *field.nulls)


def null_numbers(schema: Schema, field: FieldSpec) -> tuple[float, ...]:
    """The numbers that mean "missing" in a field."""
    return _numbers_of(nulls_of(schema, field))


@cache
def _numbers_of(nulls: tuple[str, ...]) -> tuple[float, ...]:
    """The finite numbers among texts that mean "missing"."""
    numbers = pl.Series(nulls, dtype=pl.String).str.strip_chars().cast(pl.Float64, strict=False)
    return tuple(numbers.filter(numbers.is_finite()))


def _compares_null_texts(schema: Schema, field: FieldSpec) -> bool:
    """Whether numbers that mean "missing" are compared as texts: so they are in a field without a kind."""
    return field.kind is None and bool(null_numbers(schema, field))


def _located(locate: Callable[[int], str], row_N: np.ndarray, place: int) -> str:
    """Where the row of the n-th element of all lists lies."""
    return locate(int(row_N[place]))


def row_number(row: int) -> str:
    """The place of a row in a frame, for messages."""
    return f"row {row + 1:,}"
