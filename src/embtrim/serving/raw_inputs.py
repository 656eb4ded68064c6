"""The inputs of a graph that takes raw values: one for each field, with the type of the values that its training column held.

- Integers are int64; a missing one is the least int64.
- Floats, decimals, and the values of numeric and dense fields are float64; a missing one is NaN.
- All other values are text, as docs/values.md writes them; a missing one is the empty text, or MISSING_TOKEN if the empty text
  is a value.
- A field of several values takes texts, (rows, any number of values); the places that are left over hold a missing value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import polars as pl

from embtrim.data.cells import null_numbers, nulls_of
from embtrim.data.encoder import Encoder, Listing
from embtrim.data.hashing import MISSING_TOKEN
from embtrim.data.tally import MISSING
from embtrim.data.values import BOOLEAN_WORDS, NUMBERS, as_float32, float_text
from embtrim.schema import PAD, FieldSpec, Schema
from embtrim.serving.manifest import Input

Dtype: TypeAlias = Literal["string", "int64", "float64"]

MISSING_INTEGER = -(2**63)

_INTEGER = r"^(?:0|-?[1-9]\d{0,17})$"
# Decimal digits that every float64 keeps.
_FLOAT_DIGITS = 15


@dataclass(frozen=True)
class Keys:
    """The values that a listed field knows, as its input holds them.

    Attributes:
        dtype: Type of the input.
        values: Distinct texts, int64 or float64 numbers.
        ids_V: The id of each value, int64; PAD for a part that a field of several values leaves out.
        unseen: The id of other values.
        missing: The id of missing values.
    """

    dtype: Dtype
    values: Sequence[str] | np.ndarray
    ids_V: np.ndarray
    unseen: int
    missing: int


_dtypes: WeakKeyDictionary[Encoder, dict[str, Dtype]] = WeakKeyDictionary()


def raw_inputs(encoder: Encoder) -> dict[str, Input]:
    """The inputs of a graph that takes raw values, by field."""
    inputs: dict[str, Input] = {}
    for field in encoder.schema.fields:
        dtype = dtype_of(encoder, field)
        shape: list[str | int] = ["batch", f"{field.name} values"] if field.type == "multi" else ["batch"]
        missing = {"string": missing_text(encoder.schema, field), "int64": MISSING_INTEGER, "float64": "NaN"}[dtype]
        inputs[field.name] = {"dtype": dtype, "shape": shape, "column": field.raw_column, "missing": missing}
    return inputs


def keys_bytes(encoder: Encoder) -> int:
    """Bytes of the vocabulary in a graph, about: each field has texts and ids of its own."""
    listed = [f for f in encoder.schema.id_fields if not f.hash_size]
    frames = [encoder.vocabularies[f.table_name] for f in listed]
    return sum(int(frame["value"].str.len_bytes().sum()) + 12 * len(frame) for frame in frames)


def dtype_of(encoder: Encoder, field: FieldSpec) -> Dtype:
    """The type of a field's input."""
    if field.type in ("numeric", "dense"):
        return "float64"
    if field.hash_size:
        return "int64" if field.kind == "integer" and field.type == "categorical" else "string"
    if field.kind not in NUMBERS or field.type != "categorical":
        return "string"
    noted = _dtypes.get(encoder, {}).get(field.name)
    return noted or keys_of(encoder, field).dtype


def missing_text(schema: Schema, field: FieldSpec) -> str:
    """The text that stands for a missing value in an input of texts."""
    return "" if field.type == "multi" or "" in nulls_of(schema, field) else MISSING_TOKEN


def keys_of(encoder: Encoder, field: FieldSpec) -> Keys:
    """The values of a listed categorical or multi field; `dtype_of` recalls their type: to look at millions takes seconds."""
    keys = _keys_of(encoder, field)
    _dtypes.setdefault(encoder, {})[field.name] = keys.dtype
    return keys


def _keys_of(encoder: Encoder, field: FieldSpec) -> Keys:
    listing = encoder.listing(field)
    numbers = null_numbers(encoder.schema, field)
    if field.type == "categorical" and (keys := _number_keys(field, listing, numbers)) is not None:
        return keys
    values, ids = listing.values.to_list(), listing.ids_V.astype(np.int64).tolist()
    missing = listing.missing
    if field.type == "multi":
        missing = PAD
        values += nulls_of(encoder.schema, field)
    if field.kind == "boolean":
        by_text = dict(zip(values, ids, strict=False))
        for text, words in BOOLEAN_WORDS.items():
            spelled = [form for word in words for form in (word, word.upper(), word.capitalize())]
            values += spelled
            ids += [by_text.get(text, listing.unseen)] * len(spelled)
    if field.kind is not None:
        values += pl.select(float_text(pl.lit(pl.Series(numbers, dtype=pl.Float64)))).to_series().to_list()
    values.append(missing_text(encoder.schema, field))
    ids += [missing] * (len(values) - len(ids))
    known = dict(zip(reversed(values), reversed(ids), strict=True))  # the vocabulary's own entries come first
    return Keys("string", list(known), np.array(list(known.values()), np.int64), listing.unseen, missing)


def _number_keys(field: FieldSpec, listing: Listing, null_numbers: Sequence[float]) -> Keys | None:
    """The values of a field of numbers as numbers; None if its vocabulary holds other texts, or numbers that float64 cannot."""
    if field.kind not in NUMBERS:
        return None
    is_null = listing.status_V == MISSING
    texts, ids_V = listing.values.filter(pl.Series(~is_null)), listing.ids_V[~is_null].astype(np.int64)
    if field.kind == "integer":
        if not texts.str.contains(_INTEGER).all():
            return None
        values = texts.cast(pl.Int64).to_numpy()
        null_values = np.array([int(number) for number in null_numbers if number.is_integer()], np.int64)
        null_values = np.append(null_values, MISSING_INTEGER)
    else:
        numbers = texts.cast(pl.Float64, strict=False)
        is_exact = field.kind != "decimal" or (texts.str.count_matches(r"\d") <= _FLOAT_DIGITS).all()
        if not is_exact or not numbers.is_finite().fill_null(False).all():
            return None
        values = numbers.to_numpy()
        if len(np.unique(values)) < len(values):
            return None
        null_values = np.array(null_numbers, float)
        # A number that comes as float32 is not the float64 of the same text.
        null_values = np.concatenate([null_values, as_float32(null_values)])
        values, ids_V = np.concatenate([values, as_float32(values)]), np.tile(ids_V, 2)
    values = np.concatenate([null_values, values])
    ids_V = np.concatenate([np.full(len(null_values), listing.missing), ids_V])
    values, first = np.unique(values, return_index=True)
    is_finite = np.isfinite(values)
    dtype: Dtype = "int64" if field.kind == "integer" else "float64"
    return Keys(dtype, values[is_finite], ids_V[first][is_finite], listing.unseen, listing.missing)
