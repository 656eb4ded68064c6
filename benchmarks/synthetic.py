"""Synthetic logs like Criteo's: 39 fields, ids by Zipf's law, labels with a planted signal.

This module needs NumPy only, so that contenders in other environments draw the very same batches, from synthetic and from
real data. A *source* is either the number of rows of all synthetic tables together, or the folder of an encoded dataset of
single-valued fields.

The 160,000 lookups of a batch of 4096 find about 19,000 / 21,000 / 23,000 distinct rows in tables of 1M / 5M / 50M rows: the
rows that a step must touch hardly grow with the tables.
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
# Widths of "mixed" tables, repeated over the fields: 4 columns on average.
MIXED_WIDTHS = (8, 1, 8, 3, 2, 4, 2, 4)

LABEL = "label"
NUMERIC = [f"I{i}" for i in range(1, NUM_NUMERIC + 1)]
CATEGORICAL = [f"C{i}" for i in range(1, NUM_CATEGORICAL + 1)]
LOG_CHUNK_ROWS = 200_000


def table_sizes(source: int | str) -> list[int]:
    """Rows of each table. Synthetic numeric tables are small; the categorical ones share the other rows as i^-1.5."""
    if isinstance(source, str):
        return [field["vocab_size"] for field in json.loads((Path(source) / "schema.json").read_text())["fields"]]
    shares = np.arange(1, NUM_CATEGORICAL + 1) ** -1.5
    categorical = shares / shares.sum() * (source - NUM_NUMERIC * NUMERIC_ROWS)
    return [NUMERIC_ROWS] * NUM_NUMERIC + np.maximum(10, categorical).astype(int).tolist()


def widths_of(layout: str, num_fields: int = NUM_FIELDS) -> list[int]:
    """Columns of each field in the layout "full" or "mixed"; 39 mixed fields have 156 columns in total."""
    widths = (FULL_WIDTH,) if layout == "full" else MIXED_WIDTHS
    return [widths[i % len(widths)] for i in range(num_fields)]


def zipf_ids(sizes: list[int], num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """int32 (num_rows, fields): id k has a probability of about k^-1.3, so that ids are in order of frequency."""
    power = 1 - ZIPF_EXPONENT
    uniform = rng.random((num_rows, len(sizes)))
    top = np.array(sizes, float) ** power - 1
    ids = (uniform * top + 1) ** (1 / power) - 1
    return np.minimum(ids, np.array(sizes) - 1).astype(np.int32)


def labels_of(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 (N,), 0 or 1: every feature value adds its own small term to the logit, and logits are around 0."""
    logits = ((ids + np.arange(ids.shape[1])) % 11 - 5.0).sum(1) * 0.1
    return (rng.random(len(ids)) < 1 / (1 + np.exp(-logits))).astype(np.float32)


def batches(source: int | str, batch_size: int, num_batches: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids, int32 (B, F), and labels, float32 (B,), of each batch. Real batches are random rows of the training split."""
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
    """Fewest bytes of fp32 tables that a step of Adam moves.

    The step reads the row of each lookup, and reads and writes the weight and two moments of each distinct row. The same
    number is used for contenders with other optimisers, so that shares of the bandwidth compare like speeds.
    """
    ids, _ = next(batches(source, batch_size, 1))
    distinct = [len(np.unique(column)) for column in ids.T]
    return 4 * sum((batch_size + 6 * num) * width for num, width in zip(distinct, widths, strict=True))


def write_log(path: Path, num_rows: int, seed: int = 0) -> None:
    """Write a log in Criteo's layout with a header line: label, 13 integers, 26 hexadecimal words; a tenth is empty."""
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
