"""Labels and sample weights of a chunk of a raw log."""

from __future__ import annotations

import numpy as np
import polars as pl

from embtrim.data.log_file import Chunk
from embtrim.data.rule_cells import holds
from embtrim.errors import DataError
from embtrim.rules import quoted, rule_or_none
from embtrim.schema import Schema


def read_labels(chunk: Chunk, schema: Schema) -> np.ndarray:
    """Labels of a chunk: float32 (N,), 0 or 1, from the label's column or rule.

    Raises:
        DataError: A label is missing, or is not 0, 1, true or false; the message names file and line.
    """
    column, rule = schema.label, rule_or_none(schema.label)
    if rule is not None:
        truth = holds(rule, chunk, schema.nulls)
        if truth.null_count():
            raise DataError(
                f"{chunk.locate(truth.is_null().arg_true()[0])}: label {column!r} is missing, since a cell that it reads is; "
                f"drop such rows: where = '{' AND '.join(f'{quoted(name)} IS NOT NULL' for name in rule.columns)}' (--where)"
            )
        return truth.cast(pl.Float32).to_numpy()
    raw = chunk.frame[column]
    if not (raw.dtype.is_numeric() or raw.dtype in (pl.String, pl.Boolean, pl.Null, pl.Categorical, pl.Enum)):
        raise DataError(f"label column {column!r} holds {raw.dtype}; it must hold 0 and 1, or true and false")
    raw = raw.cast(pl.String) if raw.dtype in (pl.Categorical, pl.Enum) else raw
    labels = raw.cast(pl.Float64, strict=False)
    if raw.dtype == pl.String and labels.null_count() > raw.null_count():
        word = raw.str.strip_chars().str.to_lowercase()
        is_word = word.is_in(["true", "false"]).fill_null(False)
        labels = labels.fill_null(word.cast(pl.Float64, strict=False)).set(is_word, None)
        labels = labels.fill_null((word == "true").cast(pl.Float64).set(~is_word, None))
    bad = (~labels.is_in([0.0, 1.0])).fill_null(True).arg_true()
    if len(bad):
        value = raw[bad[0]]
        if value is None or value != value:
            raise DataError(
                f"{chunk.locate(bad[0])}: label {column!r} is missing; drop the row or fill it in, or drop all such rows: "
                f"where = '{quoted(column)} IS NOT NULL' (--where)"
            )
        raise DataError(
            f"{chunk.locate(bad[0])}: label {column!r} is {value!r}; a label is 0 or 1, or true or false, or a rule such as "
            f"label = '{quoted(column)} >= 4': is this the right column?"
        )
    return labels.cast(pl.Float32).to_numpy()


def read_weights(chunk: Chunk, column: str) -> np.ndarray:
    """Sample weights of a chunk: float32 (N,), finite and not negative.

    Raises:
        DataError: A weight is missing, not a number, not finite in float32, or negative; the message names file and
            line.
    """
    raw = chunk.frame[column]
    weights = raw.cast(pl.Float64, strict=False).cast(pl.Float32)
    bad = (~(weights.is_finite() & (weights >= 0))).fill_null(True).arg_true()
    if len(bad):
        raise DataError(
            f"{chunk.locate(bad[0])}: weight {column!r} is {raw[bad[0]]!r}; a weight is a finite number, 0 or more"
        )
    return weights.to_numpy()
