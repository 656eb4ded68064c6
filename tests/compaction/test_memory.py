"""The memory of compaction and of its proof, in multiples of the full tables' bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.data.dataset import EncodedDataset, SplitArrays
from embtrim.models import DeepFM
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block
from embtrim.schema import Schema
from tests.resident import peak_resident

NUM_ROWS, WIDTH = 200_000, 32
TABLE_BYTES = 4 * NUM_ROWS * (WIDTH + 1)


@pytest.fixture(scope="module")
def data() -> EncodedDataset:
    """One large table and a small one."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.integers(NUM_ROWS, size=2048), rng.integers(10, size=2048)], 1).astype(np.int32)
    labels = rng.integers(2, size=2048).astype(np.float32)
    return EncodedDataset(Schema.from_sizes([NUM_ROWS, 10]), {"valid": SplitArrays(ids, labels)})


@pytest.fixture(scope="module")
def model(data) -> DeepFM:
    return DeepFM(data.schema, embedding_dim=WIDTH, hidden_units=(8,))


def kept(model: DeepFM, alignment: str, *widths: int) -> SizePlan:
    """Every fifth row of the large table, divided over these widths; all of the small one."""
    full = SizePlan.full(model.schema, WIDTH)
    parts = np.array_split(np.arange(0, NUM_ROWS, 5, dtype=np.int32), len(widths))
    blocks = tuple(
        Block(len(rows), width if len(widths) > 1 else tuple(range(width)), alignment, rows)
        for rows, width in zip(parts, widths, strict=True)
    )
    large = dataclasses.replace(full.tables[0], blocks=blocks)
    return dataclasses.replace(full, tables=(large, full.tables[1]))


@pytest.mark.parametrize("widths", [(WIDTH // 2,), (WIDTH, 4)], ids=["masked", "looked up"])
def test_verify_takes_less_than_the_tables(model, data, widths):
    plan = kept(model, "project", *widths)
    verify(model, plan, data, max_rows=64).require()  # what is imported on first use
    result = []
    peak = peak_resident(lambda: result.append(verify(model, plan, data)))
    assert result[0].passed
    assert peak <= TABLE_BYTES


def test_compact_takes_little_more_than_its_tables(model):
    plan = kept(model, "scatter", WIDTH // 2)
    compact(model, plan, init="inherit")
    made = []
    assert peak_resident(lambda: made.append(compact(model, plan, init="inherit"))) <= 0.6 * TABLE_BYTES
