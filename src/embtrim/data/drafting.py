"""Draft a schema from the first rows of a raw log, for the user to edit."""

from __future__ import annotations

import logging
import re

import polars as pl

from embtrim.data.kinds import kind_in_files
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import RawLog, Source, open_log
from embtrim.data.rule_cells import check_rule
from embtrim.data.sparse_text import SparseFile
from embtrim.data.text_lists import TextList, find_text_lists
from embtrim.data.time_column import choose_time, holds_times
from embtrim.data.values import cell_text
from embtrim.data.written_numbers import find_decimal, written_numbers
from embtrim.errors import DataError, hint
from embtrim.rules import parse_rule, rule_or_none
from embtrim.schema import FieldSpec, Schema

logger = logging.getLogger(__name__)

INFER_ROWS = 100_000
NO_LABEL = "(no label)"

_LABEL_NAMES = ("label", "click", "clicked", "is_click", "clk", "target", "y", "conversion", "is_clicked")
_ID_NAME = re.compile(r"(^|_)(id|ids|code|zip|zipcode|user|item|ad|hash|category|cate|brand|site|app)($|_)|[a-z]Id$")


def infer_schema(
    source: Source,
    label: str | None = None,
    options: ReadOptions | None = None,
    *,
    where: str | None = None,
    time: str | None = None,
    time_format: str | None = None,
) -> Schema:
    """Draft a schema from the first rows of a log (up to INFER_ROWS), for the user to edit.

    - Text, booleans, integers, and numbers with at most 50 different values are categorical.
    - Very skewed integers whose most frequent value is -1..2 are counts: numeric with log2.
    - Numbers with fractions are numeric, with log2 if they are very skewed, otherwise with quantile:20.
    - Lists are multi, and so are lists written as text: in brackets, or with parts between `|`, `;`, `^`, `,` or spaces
      that recur or look like ids.
    - Numbers may have decimal commas, or commas between thousands; what was taken is logged.
    - One column of dates or times becomes the schema's time column: one that rises from row to row, has a usual name, or
      holds times of day. No column of dates or times is a field, and a birthday is not the time column.
    - Columns that are empty, or that differ in nearly every row, are left out.
    - min_count grows with the log: 1, then 2 from 50,000 rows, 4 from 500,000 and 10 from 5,000,000.

    Args:
        source: The log, see `open_log`.
        label: The label column, or a rule that makes the label; None looks for a usual name (label, click, ..).
        options: How the log is read; None finds out from names and content.
        where: A rule that chooses the rows.
        time: The time column; None looks for one.
        time_format: Form of the times in text, see `Schema`.

    Raises:
        DataError: There is no label column, or no usable field.

    Example:
        >>> import polars as pl
        >>> log = pl.DataFrame({"click": [0, 1], "user": ["a", "b"], "tags": [["x"], ["x", "y"]]})
        >>> [(field.name, field.type) for field in infer_schema(log, "click").fields]
        [('user', 'categorical'), ('tags', 'multi')]
    """
    return draft_schema(open_log(source, options), label, where, time, time_format)


def _check_label(label: str | None, log: RawLog) -> None:
    """Raise DataError unless the label is a column of the log or a rule over its columns."""
    names = list(log.columns)
    if label in names or log.is_sparse or (label is not None and is_label_rule(label, log)):
        return
    given = "no label column is named" if label is None else f"there is no column {label!r}"
    advice = f"label takes one of: {', '.join(names[:40])}{log.files[0].hint([label or ''])}"
    near = hint(label or "", names)
    if near.startswith("did you mean"):
        advice = f"{near} {advice}"
    raise DataError(f"{log.name}: {given}; {advice}")


def is_label_rule(label: str, log: RawLog) -> bool:
    """Whether a label is a rule and not a column of the log.

    Raises:
        ConfigError: The label looks like a rule and is not one.
        DataError: The rule reads a column that the log lacks.
    """
    is_rule = label not in log.columns and (any(sign in label for sign in "<>=") or rule_or_none(label) is not None)
    if is_rule and not log.is_sparse:
        check_rule(parse_rule(label), log.columns, log.name)
    return is_rule


def draft_schema(
    log: RawLog,
    label: str | None,
    where: str | None,
    time: str | None = None,
    time_format: str | None = None,
) -> Schema:
    """Do the work of `infer_schema` for an opened log; with the label NO_LABEL, all columns may be fields."""
    names = list(log.columns)
    log.say_further_columns()
    label = label or next((name for name in names if name.lower() in _LABEL_NAMES), None)
    if label != NO_LABEL:
        _check_label(label, log)
    assert label is not None
    log.choose_rows(where, nulls=("",))
    rule = rule_or_none(label)
    label_columns = (label,) if rule is None else rule.columns
    if log.is_sparse:
        return _infer_sparse(log, label, where)
    for name in names:
        kind_in_files(name, log.files)
    frames, num_rows, done = [], 0, 1.0
    for chunk in log.chunks(None):
        frames.append(chunk.frame)
        num_rows, done = num_rows + chunk.frame.height, chunk.done
        if num_rows >= INFER_ROWS:
            break
    if not num_rows:
        raise DataError(f"{log.name} holds no rows" + (f" where {where}" if where else ""))
    min_count = _min_count(num_rows / max(done, 1e-9))
    sample = _joined(frames, log.name).head(INFER_ROWS)
    fields, times = [], []
    for name in names:
        if name in label_columns:
            if rule is not None:
                logger.info("column %r is left out of the schema: label %r reads it", name, label)
            continue
        found = "time" if name == time else _infer_field(sample[name], min_count)
        if found == "time":
            times.append(name)
        elif isinstance(found, FieldSpec):
            fields.append(found)
        else:
            logger.info("column %r is left out of the schema: %s", name, found)
    if not fields:
        raise DataError(
            f"{log.name} has no column that could be a field beside label {label!r}; write a schema by hand"
        )
    if time is not None and time not in names:
        raise DataError(f"{log.name}: there is no column {time!r}; {hint(time, names)}")
    clock = choose_time(sample, times) if time is None else time
    return Schema(label=label, where=where, time=clock, time_format=time_format, fields=tuple(fields))


def _joined(frames: list[pl.DataFrame], log: str) -> pl.DataFrame:
    """The rows of all frames; columns of several types become text, or lists of texts."""
    schemas = [frame.schema for frame in frames]
    mixed = [name for name in frames[0].columns if len({schema[name] for schema in schemas}) > 1]
    parts = [
        frame.with_columns(_as_texts(name, schema[name]) for name in mixed)
        for frame, schema in zip(frames, schemas, strict=True)
    ]
    schemas = [part.schema for part in parts]
    for name in mixed:
        if len({schema[name] for schema in schemas}) > 1:
            raise DataError(
                f"{log}: column {name!r} holds lists in some files and text in others; write a schema in which its field "
                "has type = 'multi' and the text's separator"
            )
    return pl.concat(parts)


def _as_texts(name: str, dtype: pl.DataType) -> pl.Expr:
    field, column = FieldSpec(name=name, kind="text"), pl.col(name)
    if isinstance(dtype, pl.Array):
        dtype, column = pl.List(dtype.inner), column.arr.to_list()
    if isinstance(dtype, pl.List):
        return column.list.eval(cell_text(field, dtype.inner, pl.element()))  # type: ignore[arg-type]
    return cell_text(field, dtype, column)


def _min_count(num_rows: float) -> int:
    for least, min_count in ((5_000_000, 10), (500_000, 4), (50_000, 2)):
        if num_rows >= least:
            return min_count
    return 1


def _infer_field(column: pl.Series, min_count: int) -> FieldSpec | str:
    """The field for a column, or "time", or the reason why the column gives no field."""
    name, values = column.name, column.drop_nulls()
    if not len(values):
        return "it is empty"
    if isinstance(column.dtype, (pl.List, pl.Array)):
        longest = (
            int(values.list.len().quantile(0.99, "higher") or 1)
            if isinstance(column.dtype, pl.List)
            else column.dtype.size
        )
        return FieldSpec(name=name, type="multi", max_len=max(1, min(longest, 50)), min_count=min_count)
    if isinstance(column.dtype, pl.Duration):
        return "it holds durations; write their seconds as numbers to use them"
    num_distinct, decimal = values.n_unique(), None
    if holds_times(column, num_distinct):
        return "time"
    categorical = FieldSpec(name=name, min_count=1 if num_distinct <= 1000 else min_count)
    if column.dtype == pl.String:
        numbers = values.cast(pl.Float64, strict=False)
        if numbers.null_count() or values.str.contains(r"^[+-]?0\d").any():
            decimal = find_decimal(values)
            if decimal is None:
                return _infer_text(values, numbers, min_count) or categorical
            numbers = values.to_frame().select(written_numbers(pl.col(name), decimal)).to_series()
            if num_distinct > 50:
                _say_decimal(values, decimal)
        values = numbers
    elif not column.dtype.is_numeric():
        return categorical
    values = values.cast(pl.Float64).drop_nans()
    is_whole = bool((values == values.floor()).all())
    if num_distinct <= 50 or (is_whole and _ID_NAME.search(name)):
        return categorical
    middle, top = values.abs().median(), values.abs().max()
    is_skewed = isinstance(top, float) and isinstance(middle, float) and top > 20 * max(middle, 1e-9)
    if is_whole:
        most_frequent = values.value_counts().sort("count", name, descending=True)[name][0]
        if is_skewed and -1 <= most_frequent <= 2:
            return FieldSpec(name=name, type="numeric", transform="log2", decimal=decimal)
        if len(values) >= 1000 and num_distinct > 0.995 * len(values):
            return "its values differ from row to row"
        return categorical
    transform = "log2" if is_skewed and isinstance(top, float) and top > 100 else "quantile:20"
    return FieldSpec(name=name, type="numeric", transform=transform, decimal=decimal)


def _say_if_nearly_numbers(values: pl.Series, numbers: pl.Series) -> None:
    """Log the dirty cells that make a column of numbers categorical, so that a user can declare them as nulls."""
    words = values.filter(numbers.is_null())
    if 0 < len(words) <= 0.05 * len(values):
        listed = ", ".join(map(repr, words.unique(maintain_order=True).head(10)))
        logger.info(
            "column %r is taken as categorical: %.2g%% of its values are not numbers, such as %s; if they stand for missing "
            'values, list them in the draft: type = "numeric", nulls = [..]',
            values.name, 100 * len(words) / len(values), listed,
        )  # fmt: skip


def _say_decimal(values: pl.Series, decimal: str) -> None:
    """Log that a column has commas in its numbers, and what to do if they are something else."""
    example = next((text for text in values if "," in text), values[0])
    logger.info(
        "column %r is taken as numbers with %s, such as %r; if it holds lists, declare it in the draft: type = \"multi\", "
        'separator = ","',
        values.name, "a decimal comma" if decimal == "," else "commas between thousands", example,
    )  # fmt: skip


def _infer_text(values: pl.Series, numbers: pl.Series, min_count: int) -> FieldSpec | str | None:
    """The field for a column of text, or why there is none; None if the column is categorical."""
    _say_if_nearly_numbers(values, numbers)
    found = find_text_lists(values)
    if isinstance(found, TextList):
        logger.info("column %r is taken as lists with %r between their values", values.name, found.separator)
        return FieldSpec(
            name=values.name, type="multi", separator=found.separator, max_len=found.max_len, min_count=min_count
        )
    if found is None and len(values) >= 1000 and values.n_unique() > 0.995 * len(values):
        return "its values differ from row to row"
    return found


def _infer_sparse(log: RawLog, label: str, where: str | None) -> Schema:
    """The schema of libsvm or libfm text: multi fields if all values are 0 or 1, else one numeric field per index."""
    file = log.files[0]
    assert isinstance(file, SparseFile)
    fields = []
    for column in log.columns:
        if column == "label":
            continue
        numbered = file.valued_indices(column)
        if len(numbered) > 500:
            raise DataError(
                f"{log.name}: column {column!r} has values other than 0 and 1 at {len(numbered)} indices; write a schema with "
                f"the fields to keep, such as name = 'x', column = {numbered[0]!r}, type = 'dense', transform = 'log1p'"
            )
        if numbered:
            fields += [
                FieldSpec(name=f"f{index}", column=index, type="numeric", transform="quantile:20") for index in numbered
            ]
            continue
        chunk = next(log.chunks([column]), None)
        if chunk is None:
            raise DataError(f"{log.name} holds no rows")
        longest = int(chunk.frame[column].list.len().max() or 1)  # type: ignore[arg-type]
        name = column if column == "features" else f"field_{column}"
        min_count = _min_count(chunk.frame.height / max(chunk.done, 1e-9))
        fields.append(
            FieldSpec(
                name=name, column=column, type="multi", max_len=min(longest, 200), pooling="sum", min_count=min_count
            )
        )
    return Schema(label=label, where=where, fields=tuple(fields))
