"""What kind of values a field's training column holds: from the types of its files, otherwise from its texts."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from embtrim.data.instants import ISO, read_moments
from embtrim.data.log_file import LogFile
from embtrim.data.reading import RawLog
from embtrim.data.text_lists import split_texts
from embtrim.data.values import NUMBERS
from embtrim.errors import DataError
from embtrim.schema import FieldSpec, Kind, Schema

# Rows whose texts say the kind of a hashed field: its texts are not kept.
HEAD_ROWS = 20_000

# Words for a missing value, which do not make a column of numbers one of text.
_MISSING_WORDS = ("", "nan", "null", "none", "na", "n/a", "<na>", r"\n", "nat", "-", "?")
_WHOLE = r"^-?(?:0|[1-9]\d*)(?:\.0*)?$"
# An exponent needs a point or a sign: 12e5 may be an id in hexadecimal digits.
_FRACTION = r"^-?(?:0|[1-9]\d*)(?:\.\d*)?$|^-?\d\.\d+[eE][+-]?\d+$|^-?\d[eE][+-]\d+$"


def kind_of_type(dtype: pl.DataType) -> Kind | None:
    """The kind of a column of a type; None for text, and for types that no field reads."""
    if dtype.is_float():
        return "float32" if dtype == pl.Float32 else "float"
    if dtype.is_integer():
        return "integer"
    if dtype == pl.Boolean:
        return "boolean"
    if dtype == pl.Date:
        return "date"
    if isinstance(dtype, pl.Datetime):
        return "timestamp" if dtype.time_zone is None else "instant"
    return "decimal" if isinstance(dtype, pl.Decimal) else None


def kind_of_texts(texts: pl.Series, nulls: Sequence[str] = ()) -> Kind:
    """The kind of which all texts are, "text" if there is none; the texts are distinct.

    Words for a missing value do not count. Leading zeros make a text (007 is not 7), and so do zeros that end a
    fraction, unless all fractions have as many digits (1.9 and 1.10 are versions, 1.90 and 1.10 are prices).

    Example:
        >>> kind_of_texts(pl.Series(["1034", "7.0", "NULL"])), kind_of_texts(pl.Series(["007", "7"]))
        ('integer', 'text')
    """
    return _kind_of_texts(texts, nulls) or "text"


def _kind_of_texts(texts: pl.Series, nulls: Sequence[str]) -> Kind | None:
    """See `kind_of_texts`; None if all texts are words for a missing value."""
    # Where some of the texts are of no kind, all together are of none: a few of them usually tell.
    if len(texts) > 100 and _kind_of_texts(texts.head(len(texts) // 20), nulls) == "text":
        return "text"
    texts = texts.str.strip_chars()
    texts = texts.filter(~texts.is_in([*nulls]) & ~texts.str.to_lowercase().is_in(_MISSING_WORDS))
    if not len(texts):
        return None
    if texts.str.contains(_WHOLE).all():
        return "integer"
    if texts.str.contains(_FRACTION).all():
        decimals = texts.filter(~texts.str.contains(_WHOLE)).str.extract(r"\.(\d*)$").drop_nulls()
        is_fixed = decimals.str.len_bytes().n_unique() <= 1
        return "float" if is_fixed or not decimals.str.ends_with("0").any() else "text"
    words = texts.str.to_lowercase().is_in(["true", "false"])
    if words.any() and (words | texts.is_in(["1", "0", "1.0", "0.0"])).all():
        return "boolean"
    if not texts.str.contains(ISO).all():  # which takes a part of the time that reading them takes
        return "text"
    moments = read_moments(texts)
    if moments["moment"].is_null().any() or moments["is_zoned"].n_unique() > 1:
        return "text"
    if moments["is_zoned"].all():
        return "instant"
    return "timestamp" if moments["has_time"].any() else "date"


def kinds_of_log(schema: Schema, log: RawLog) -> tuple[Schema, frozenset[str]]:
    """The schema with hash functions and the kinds that the types of the log's files say, and the fields whose texts must say it.

    Args:
        schema: The schema of a new dataset; kinds that it gives stay.
        log: The training log.

    Raises:
        DataError: No one kind fits the types that the files hold. The message names the files and the column.
    """
    fields, undecided = [], set()
    for field in schema.fields:
        kind = field.kind or kind_in_files(field.raw_column, log.files)
        if kind is None and field.type in ("numeric", "dense"):
            kind = "float"
        if kind is None and field.hash_size:
            kind = _kind_in_head(field, log, schema)
        if kind is None:
            undecided.add(field.name)
        hash_function = "murmur3" if field.hash_size else None
        fields.append(field.replace(kind=kind or "text", hash_function=hash_function))
    return schema.replace(fields=tuple(fields)), frozenset(undecided)


def kind_in_files(column: str, files: Sequence[LogFile]) -> Kind | None:
    """The kind of the types that a column, or the lists in it, has in the files; None if texts must say it.

    Raises:
        DataError: The types have no values in common; the message names the files and the column.
    """
    found: dict[tuple[bool, Kind | None], tuple[LogFile, pl.DataType]] = {}
    for file in files:
        dtype = file.types.get(column, pl.String())
        is_list = isinstance(dtype, (pl.List, pl.Array))
        inner: pl.DataType = dtype.inner if is_list else dtype  # type: ignore[union-attr]
        if inner != pl.Null:
            found.setdefault((is_list, kind_of_type(inner)), (file, dtype))
    kinds: set[Kind | None] = {kind for _, kind in found}
    is_clear = len({is_list for is_list, _ in found}) < 2 or (False, None) in found
    if is_clear and (not kinds or None in kinds):
        return None
    if is_clear and len(kinds) == 1:
        return kinds.pop()
    if is_clear and kinds <= {*NUMBERS, "boolean"}:
        if "integer" in kinds:
            return "integer"
        return "decimal" if "decimal" in kinds else "float"
    if is_clear and kinds == {"date", "timestamp"}:
        return "timestamp"
    (one, first), (other, second) = list(found.values())[:2]
    raise DataError(
        f"column {column!r} holds {first} in {one.name} and {second} in {other.name}, which have no values in common; "
        "write it with one type, or as text"
    )


def _kind_in_head(field: FieldSpec, log: RawLog, schema: Schema) -> Kind:
    """The kind of the texts in the first rows of a log."""
    texts, num_rows = [], 0
    for chunk in log.chunks([field.raw_column], 1 << 20):
        head = chunk.frame[field.raw_column].head(HEAD_ROWS - num_rows)
        num_rows += len(head)
        if isinstance(head.dtype, pl.List):
            head = head.explode()
        elif field.separator is not None and head.dtype == pl.String:
            head = split_texts(head, field.separator).explode()
        if head.dtype == pl.String:
            texts.append(head.unique(maintain_order=True))
        if num_rows >= HEAD_ROWS:
            break
    return (
        kind_of_texts(pl.concat(texts).unique(maintain_order=True), [*schema.nulls, *field.nulls]) if texts else "text"
    )
