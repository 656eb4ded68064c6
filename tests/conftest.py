"""Small data made in memory, with a planted signal of known shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embtrim.dataset import EncodedDataset, SplitArrays
from embtrim.schema import PAD, FieldSpec, Schema


def planted_data(
    num_rows: int = 6000, noise_vocab: int = 2000, seed: int = 0, multi: bool = False, dense: bool = False
) -> EncodedDataset:
    """Fields: strong (30 values), weak (20), noise (many values, no signal); optionally a multi-valued and a dense one."""
    rng = np.random.default_rng(seed)
    fields = [
        FieldSpec(name="strong", vocab_size=30),
        FieldSpec(name="weak", vocab_size=20),
        FieldSpec(name="noise", vocab_size=noise_vocab),
    ]
    columns = [rng.integers(0, f.vocab_size, num_rows) for f in fields]
    score = 2.0 * rng.normal(size=30)[columns[0]] + 0.7 * rng.normal(size=20)[columns[1]]
    if multi:
        fields.append(FieldSpec(name="tags", vocab_size=12, type="multi", max_len=3))
        tags = rng.integers(0, 12, (num_rows, 3))
        tags[:, 1:][rng.random((num_rows, 2)) < 0.4] = PAD
        columns += list(tags.T)
        score = score + rng.normal(size=12)[tags[:, 0]]
    dense_values = None
    if dense:
        fields.append(FieldSpec(name="price", type="dense", transform="none"))
        dense_values = rng.normal(size=(num_rows, 1)).astype(np.float32)
        score = score + 0.5 * dense_values[:, 0]
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-score))).astype(np.float32)
    ids = np.stack(columns, 1).astype(np.int32)
    cuts = {
        "train": slice(0, num_rows * 8 // 10),
        "valid": slice(num_rows * 8 // 10, num_rows * 9 // 10),
        "test": slice(num_rows * 9 // 10, None),
    }
    splits = {
        name: SplitArrays(ids[rows], labels[rows], None if dense_values is None else dense_values[rows])
        for name, rows in cuts.items()
    }
    return EncodedDataset(Schema(label="y", fields=tuple(fields)), splits)


@pytest.fixture(scope="session")
def data() -> EncodedDataset:
    return planted_data()


@pytest.fixture(scope="session")
def wide_data() -> EncodedDataset:
    """With a multi-valued and a dense field."""
    return planted_data(num_rows=3000, noise_vocab=300, multi=True, dense=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
