"""Rules on the cells of a log: which rows they hold for.

Cells are read as the rule asks for them. A text that means "missing" in the schema is missing, and so is NaN. A cell that
cannot be read as asked (a word where a number is needed) is an error and not a missing cell.

Shapes: N rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import polars as pl

from embtrim.data.log_file import Chunk, is_number, listed
from embtrim.errors import DataError, hint
from embtrim.rules import Kind, Node, Rule

_WHAT = {
    "number": "a number",
    "time": "a time such as 2024-01-31 10:00",
    "truth": "0, 1, true or false",
    "text": "text",
}


def check_rule(rule: Rule, columns: Sequence[str], where: str) -> None:
    """Check that a log has the columns of a rule; `where` names the log.

    Raises:
        DataError: It lacks one; the message says how a name of several words is written.
    """
    for name in rule.columns:
        if name in columns:
            continue
        meant = [c for c in columns if c in rule.text and not c.isidentifier()]
        if meant:
            advice = f'write the column {meant[0]!r} in double quotes: "{meant[0]}"'
        elif f'"{name}"' in rule.text or f"`{name}`" in rule.text:
            advice = f"a text stands in single quotes: '{name}'; the columns are {listed(columns)}"
        else:
            near = hint(name, columns)
            advice = near if near.startswith("did you mean") else f"the columns are {listed(columns)}"
        raise DataError(f"{where}: rule {rule.text!r} reads {name!r}, which is not a column; {advice}")


def holds(rule: Rule, chunk: Chunk, nulls: Sequence[str]) -> pl.Series:
    """Whether the rule holds for each row: Boolean (N,), null where a missing cell leaves it open.

    Args:
        rule: The rule.
        chunk: The rows.
        nulls: Texts that mean "missing".

    Raises:
        DataError: A column is missing, or a cell cannot be read as the rule needs it; the message names file and line.
    """
    check_rule(rule, chunk.frame.columns, "the log")
    cells: dict[str, pl.Series] = {}
    truth = _expression(rule.test, rule, chunk, nulls, cells)
    return pl.DataFrame(list(cells.values())).select(truth.alias("truth")).to_series()


def _expression(node: Node, rule: Rule, chunk: Chunk, nulls: Sequence[str], cells: dict[str, pl.Series]) -> pl.Expr:
    """The node over columns of `cells`, to which the cells that it reads are added."""
    if node.sign == "value":
        return pl.lit(_time(pl.Series([node.value])).item() if node.kind == "time" else node.value)
    if node.sign == "column":
        assert node.kind
        name = f"{node.kind} {node.value}"
        if name not in cells:
            cells[name] = _cells(str(node.value), node.kind, rule, chunk, nulls).alias(name)
        return pl.col(name)
    parts = [_expression(part, rule, chunk, nulls, cells) for part in node.parts]
    if node.sign == "null":
        return parts[0].is_null()
    if node.sign == "not":
        return ~parts[0]
    if node.sign == "in":
        return reduce(lambda a, b: a | b, (parts[0] == part for part in parts[1:]))
    left, right = parts
    match node.sign:
        case "and":
            return left & right
        case "or":
            return left | right
        case "=":
            return left == right
        case "!=":
            return left != right
        case "<":
            return left < right
        case "<=":
            return left <= right
        case ">":
            return left > right
        case ">=":
            return left >= right
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    return pl.when(right != 0).then(left / right)


def _cells(name: str, kind: Kind, rule: Rule, chunk: Chunk, nulls: Sequence[str]) -> pl.Series:
    """A column as the rule reads it; missing cells are null."""
    raw = chunk.frame[name]
    if raw.dtype.is_nested() or raw.dtype in (pl.Binary, pl.Object, pl.Duration, pl.Time):
        raise DataError(f"rule {rule.text!r}: column {name!r} holds {raw.dtype}, which cannot be compared")
    if raw.dtype in (pl.Categorical, pl.Enum):
        raw = raw.cast(pl.String)
    if raw.dtype.is_float():
        raw = raw.fill_nan(None)
    texts = raw.cast(pl.String) if raw.dtype != pl.String else raw
    stripped = texts.str.strip_chars()
    is_missing = (raw.is_null() | stripped.is_in(["", *nulls]) | texts.is_in(list(nulls))).fill_null(True)
    if kind == "number":
        is_missing |= stripped.str.to_lowercase().is_in(["nan", "+nan", "-nan"]).fill_null(False)
    if raw.dtype.is_numeric() or kind == "number":
        is_missing |= _number(raw).cast(pl.Float64).is_in(list(map(float, filter(is_number, nulls)))).fill_null(False)
    read = {"number": _number, "time": _time, "truth": _truth, "text": _text}[kind](raw).set(is_missing, None)
    bad = (read.is_null() & ~is_missing).arg_true()
    if len(bad):
        given = raw[bad[0]]
        advice = f"; add {given!r} to nulls if it means missing" if raw.dtype == pl.String else ""
        if kind == "number":
            advice += "; a text is compared with a text in single quotes"
        raise DataError(
            f"{chunk.locate(bad[0])}: column {name!r} holds {given!r}, but rule {rule.text!r} needs {_WHAT[kind]}{advice}"
        )
    return read


def _number(raw: pl.Series) -> pl.Series:
    if raw.dtype == pl.Boolean:
        return raw.cast(pl.Int8)
    if raw.dtype.is_integer() or raw.dtype.is_float():
        return raw
    if raw.dtype.is_temporal():
        return pl.Series(raw.name, [None], pl.Float64).new_from_index(0, len(raw))
    # Large whole numbers, such as ids, keep all their digits as integers.
    stripped = raw.cast(pl.String).str.strip_chars()
    whole = stripped.cast(pl.Int64, strict=False)
    numbers = stripped.cast(pl.Float64, strict=False)
    return whole if whole.null_count() == numbers.null_count() else numbers


def _text(raw: pl.Series) -> pl.Series:
    if raw.dtype.is_float():
        whole = (raw == raw.floor()) & (raw.abs() < 2.0**53)
        return raw.cast(pl.Int64, strict=False).cast(pl.String).zip_with(whole.fill_null(False), raw.cast(pl.String))
    return raw.cast(pl.String)


def _truth(raw: pl.Series) -> pl.Series:
    if raw.dtype == pl.Boolean:
        return raw
    words = _text(raw).str.strip_chars().str.to_lowercase()
    return words.replace_strict({"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False},
                                default=None, return_dtype=pl.Boolean)  # fmt: skip


def _time(raw: pl.Series) -> pl.Series:
    """Moments without a zone; a column that has a zone counts in UTC."""
    if isinstance(raw.dtype, pl.Datetime) and raw.dtype.time_zone is not None:
        raw = raw.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    if raw.dtype.is_temporal():
        return raw.cast(pl.Datetime("us"))
    if raw.dtype != pl.String:
        return pl.Series(raw.name, [None], pl.Datetime("us")).new_from_index(0, len(raw))
    text = raw.str.strip_chars().str.replace("T", " ", literal=True)
    text = text.str.replace(r"^(\d{4}-\d\d-\d\d)$", "$1 00:00").str.replace(r"^(\d{4}-\d\d-\d\d \d\d:\d\d)$", "$1:00")
    return text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", strict=False, time_unit="us")


def chunk_where(chunk: Chunk, rule: Rule, nulls: Sequence[str]) -> Chunk:
    """The rows of a chunk for which the rule holds, with their place in the file."""
    kept = np.flatnonzero(holds(rule, chunk, nulls).fill_null(False).to_numpy())
    return chunk if len(kept) == chunk.frame.height else chunk_rows(chunk, kept)


def chunk_rows(chunk: Chunk, rows: np.ndarray) -> Chunk:
    """Some rows of a chunk, with their place in the file."""
    return Chunk(chunk.frame[rows], chunk.first_row, lambda row: chunk.locate(int(rows[row])), chunk.done, chunk.end)
