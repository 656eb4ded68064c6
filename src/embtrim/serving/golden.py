"""Golden rows: raw rows with their ids and scores, by which an export proves itself wherever it runs.

The rows are made, not taken from a log, so that an export gives away no row of anyone's. One row is missing everywhere and one
unseen everywhere; the others mix frequent, rare, unseen and missing values, numbers on the edges of buckets and next to them,
and lists that are empty or too long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import torch

from embtrim.data.encoder import Encoder
from embtrim.data.tally import KNOWN
from embtrim.models.ctr_model import CTRModel
from embtrim.schema import PAD, FieldSpec
from embtrim.serving.bundle import Bundle
from embtrim.serving.raw_inputs import Dtype, dtype_of
from embtrim.serving.served import copy_for_export

NUM_ROWS = 32

_FREQUENT = 10
_MOST_KNOWN = 1_000
_MISSING_SHARE = _UNSEEN_SHARE = 1 / 8
_TYPES: dict[Dtype, type[pl.DataType]] = {"string": pl.String, "int64": pl.Int64, "float64": pl.Float64}


def golden_rows(bundle: Bundle) -> dict[str, Any]:
    """Contents of golden.json: "rows" (a list of dicts by raw column), "ids", "dense" (None without dense fields), "scores"."""
    frame = _made_rows(bundle.encoder)
    few = Bundle(bundle.model, bundle.encoder.for_rows(frame), bundle.info, bundle.profile)
    encoded = few.encoder.encode_chunk(frame)
    return {
        "rows": frame.to_dicts(),
        "ids": encoded.ids.tolist(),
        "dense": None if encoded.dense is None else encoded.dense.tolist(),
        "scores": few.predict_chunk(frame).tolist(),
    }


@torch.no_grad()
def golden_ids(model: CTRModel) -> dict[str, Any]:
    """Contents of golden.json for a model without an encoder, which has no raw rows."""
    rng = np.random.default_rng(0)
    rows = {table.name: table.num_compact_rows for table in model.tables.plan.tables}
    columns = [
        rng.integers(PAD if field.type == "multi" else 0, rows[field.table_name], NUM_ROWS)
        for field in model.schema.id_fields
        for _ in range(field.length)
    ]
    ids = np.stack(columns, 1).astype(np.int32)
    num_dense = len(model.schema.dense_fields)
    dense = rng.normal(size=(NUM_ROWS, num_dense)).astype(np.float32) if num_dense else None
    served = copy_for_export(model)
    logits = served(torch.from_numpy(ids), None if dense is None else torch.from_numpy(dense))
    return {
        "rows": None,
        "ids": ids.tolist(),
        "dense": None if dense is None else dense.tolist(),
        "scores": logits.sigmoid().tolist(),
    }


def _made_rows(encoder: Encoder) -> pl.DataFrame:
    readers: dict[str, FieldSpec] = {}
    for field in encoder.schema.fields:
        first = readers.setdefault(field.raw_column, field)
        if first.type not in ("numeric", "dense") and field.type in ("numeric", "dense"):
            readers[field.raw_column] = field  # its numbers are texts too; not every text is a number
    whole = {field.raw_column for field in encoder.schema.fields if dtype_of(encoder, field) == "int64"}
    rng = np.random.default_rng(0)
    columns = []
    for name, field in readers.items():
        draw = _drawer(encoder, field, rng)
        cells = [draw(row) for row in range(NUM_ROWS)]
        dtype: Any = _TYPES["int64" if name in whole else dtype_of(encoder, field)]
        if name in whole:
            cells = [None if cell is None else int(cell) for cell in cells]
        columns.append(pl.Series(name, cells, pl.List(dtype) if field.type == "multi" else dtype))
    return pl.DataFrame(columns)


def _drawer(encoder: Encoder, field: FieldSpec, rng: np.random.Generator) -> Callable[[int], Any]:
    """Draws the cell of a field for the n-th row."""
    dtype = dtype_of(encoder, field)
    known = _known_values(encoder, field, rng)
    unseen = _unseen_values(known, dtype)

    def value(row: int) -> Any:
        chance = rng.random()
        if not len(known) or row == 1 or chance < _UNSEEN_SHARE:
            return unseen[rng.integers(len(unseen))]
        if row != 0 and chance < _UNSEEN_SHARE + _MISSING_SHARE:
            return None
        return known[rng.integers(min(_FREQUENT, len(known)) if chance > 0.5 else len(known))]

    if field.type == "multi":
        return lambda row: None if row == 0 else [value(row) for _ in range(rng.integers(field.max_len + 3))]
    return lambda row: None if row == 0 else value(row)


def _known_values(encoder: Encoder, field: FieldSpec, rng: np.random.Generator) -> list[Any]:
    """Values that a field reads in its own ways, the frequent ones first."""
    if field.type in ("numeric", "dense"):
        return _numbers(encoder, field, rng)
    if field.hash_size:
        return [*range(100)] if dtype_of(encoder, field) == "int64" else [f"value {i}" for i in range(100)]
    listing = encoder.listing(field)
    known = listing.values.filter(pl.Series(listing.status_V == KNOWN))
    others = np.sort(rng.permutation(len(known))[:_MOST_KNOWN])
    texts = pl.concat([known.head(_FREQUENT), known.gather(others)]).to_list()
    dtype = dtype_of(encoder, field)
    return texts if dtype == "string" else [int(text) if dtype == "int64" else float(text) for text in texts]


def _numbers(encoder: Encoder, field: FieldSpec, rng: np.random.Generator) -> list[float]:
    if field.transform is not None and field.transform.startswith("quantile"):
        edges = np.array(encoder.transforms[field.name]["edges"], float)
        numbers = np.concatenate([edges, np.nextafter(edges, -np.inf), edges + 1, edges - 1])
        return rng.permutation(numbers).tolist()
    if field.transform == "standard":
        fitted = encoder.transforms[field.name]
        return (fitted["mean"] + fitted["std"] * rng.normal(size=100)).tolist()
    if field.kind == "boolean":
        return [0.0, 1.0]
    return [0.0, 1.0, 2.0, 3.0, -1.0, 2.5, *rng.integers(0, 1000, 50).tolist(), *(10 * rng.normal(size=50)).tolist()]


def _unseen_values(known: list[Any], dtype: Dtype) -> list[Any]:
    """Values that are not among the known ones."""
    if dtype == "string":
        taken = set(known)
        return [text for text in (f"unseen {i}" for i in range(len(taken) + 3)) if text not in taken][:3]
    largest = max(map(abs, known), default=0)
    beyond = largest + 1 if dtype == "int64" else 2 * largest + 1.25
    return [beyond, -beyond]
