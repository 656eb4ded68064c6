"""Small data made in memory, with a planted signal of known shape."""

from __future__ import annotations

import pytest
import torch

from embtrim.dataset import EncodedDataset
from embtrim.testing import planted_data


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
