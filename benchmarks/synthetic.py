"""Synthetic logs like Criteo's: 39 fields, ids by Zipf's law, labels with a planted signal. NumPy alone, so that
contenders in other environments draw the very same batches; for the same reason it draws those of real data too.

A *source* is one or the other: rows of all tables together, or the folder of an encoded dataset of single-valued fields.

About 19,000 / 21,000 / 23,000 distinct rows are among the 160,000 lookups of a batch of 4096, for tables of 1M / 5M /
50M rows in all: what a step must touch hardly grows with the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NUM_NUMERIC, NUM_CATEGORICAL = 13, 26
NUM_FIELDS = NUM_NUMERIC + NUM_CATEGORICAL
NUMERIC_ROWS = 50
ZIPF_EXPONENT = 1.3
FULL_WIDTH = 16
# Of "mixed" tables, repeated over the fields: 4 columns on average.
MIXED_WIDTHS = (8, 1, 8, 3, 2, 4, 2, 4)

LABEL = "label"
NUMERIC = [f"I{i}" for i in range(1, NUM_NUMERIC + 1)]
CATEGORICAL = [f"C{i}" for i in range(1, NUM_CATEGORICAL + 1)]
LOG_CHUNK_ROWS = 200_000


def table_sizes(source: int | str) -> list[int]:
    """Rows of each table; of synthetic ones `source` in all: small numeric fields, categorical ones falling as i^-1.5."""
    if isinstance(source, str):
        return [field["vocab_size"] for field in json.loads((Path(source) / "schema.json").read_text())["fields"]]
    shares = np.arange(1, NUM_CATEGORICAL + 1) ** -1.5
    categorical = shares / shares.sum() * (source - NUM_NUMERIC * NUMERIC_ROWS)
    return [NUMERIC_ROWS] * NUM_NUMERIC + np.maximum(10, categorical).astype(int).tolist()


def widths_of(layout: str, num_fields: int = NUM_FIELDS) -> list[int]:
    """Columns of each field: "full" or "mixed"; of 39 mixed fields 156 in all."""
    widths = (FULL_WIDTH,) if layout == "full" else MIXED_WIDTHS
    return [widths[i % len(widths)] for i in range(num_fields)]


def zipf_ids(sizes: list[int], num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """int32 (num_rows, fields): id k with probability about k^-1.3, most frequent first."""
    power = 1 - ZIPF_EXPONENT
    uniform = rng.random((num_rows, len(sizes)))
    top = np.array(sizes, float) ** power - 1
    ids = (uniform * top + 1) ** (1 / power) - 1
    return np.minimum(ids, np.array(sizes) - 1).astype(np.int32)


def labels_of(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 (N,), 0 or 1: every feature value adds its own small term to the logit, which is around 0."""
    logits = ((ids + np.arange(ids.shape[1])) % 11 - 5.0).sum(1) * 0.1
    return (rng.random(len(ids)) < 1 / (1 + np.exp(-logits))).astype(np.float32)


def batches(source: int | str, batch_size: int, num_batches: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids, labels) of each batch: int32 (B, F), float32 (B,); of real data, random rows of the training split."""
    rng = np.random.default_rng(0)
    if isinstance(source, str):
        all_ids, all_labels = (np.load(Path(source) / "train" / f"{name}.npy", "r") for name in ("ids", "labels"))
        for _ in range(num_batches):
            rows = rng.integers(len(all_labels), size=batch_size)
            yield all_ids[rows], all_labels[rows]
        return
    sizes = table_sizes(source)
    for _ in range(num_batches):
        ids = zipf_ids(sizes, batch_size, rng)
        yield ids, labels_of(ids, rng)


def step_bytes(source: int | str, batch_size: int, widths: list[int]) -> int:
    """Bytes of fp32 tables that a step moves at least: the row of each lookup, and weight and two moments of each distinct row,
    read and written. Adam's, for any contender, so that shares of the bandwidth compare like speeds."""
    ids, _ = next(batches(source, batch_size, 1))
    distinct = [len(np.unique(column)) for column in ids.T]
    return 4 * sum((batch_size + 6 * num) * width for num, width in zip(distinct, widths, strict=True))


def write_log(path: Path, num_rows: int, seed: int = 0) -> None:
    """Write a log in Criteo's layout, with a header line: label, 13 integers, 26 hexadecimal words, a tenth empty."""
    import polars as pl

    rng = np.random.default_rng(seed)
    sizes = table_sizes(max(num_rows, 10_000))
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    shifts = np.arange(28, -1, -4, dtype=np.uint32)
    with open(path, "wb") as file:
        for start in range(0, num_rows, LOG_CHUNK_ROWS):
            ids = zipf_ids(sizes, min(LOG_CHUNK_ROWS, num_rows - start), rng)
            columns = {LABEL: pl.Series(labels_of(ids, rng).astype(np.int8))}
            for i, name in enumerate([*NUMERIC, *CATEGORICAL]):
                if i < NUM_NUMERIC:
                    values = pl.Series(ids[:, i].astype(np.int64) ** 2)
                else:
                    hashed = (ids[:, i].astype(np.uint32) + np.uint32(i << 26)) * np.uint32(2654435761)
                    words = digits[(hashed[:, None] >> shifts) & 15]
                    values = pl.Series(words.view("S8").ravel()).cast(pl.String)
                columns[name] = values.set(pl.Series(rng.random(len(ids)) < 0.1), None)
            pl.DataFrame(columns).write_csv(file, separator="\t", include_header=start == 0)
