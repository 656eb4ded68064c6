"""Small data made in memory, with a planted signal of known shape."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoding_state import WorkingFolder
from embtrim.testing.toys import planted_data


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


@pytest.fixture(autouse=True, scope="module")
def _heap_of_imports_frozen() -> None:
    """Collections, which every measurement of memory begins with, then pass over the modules and what other tests keep."""
    gc.collect()
    gc.freeze()


def interrupt_encoding(patch: pytest.MonkeyPatch) -> None:
    """Have encode() save a checkpoint after its first chunk, and be interrupted then."""
    save = WorkingFolder.save

    def interrupt(work: WorkingFolder, **changes: Any) -> None:
        save(work, **changes)
        raise KeyboardInterrupt

    patch.setattr(WorkingFolder, "save", interrupt)
    patch.setattr(WorkingFolder, "save_if_due", lambda work, changes: work.save(**changes()))
