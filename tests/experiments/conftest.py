"""Data and a finished grid that the tests of experiments share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embtrim.data.dataset import EncodedDataset
from embtrim.experiments.comparison import Comparison, compare
from tests.cli.workshop import call, write_log
from tests.conftest import planted_data
from tests.experiments.grids import CONFIG


@pytest.fixture(scope="package")
def small() -> EncodedDataset:
    return planted_data(num_rows=1000, noise_vocab=100)


@pytest.fixture(scope="package")
def first(small: EncodedDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("compare") / "grid"
    return out, compare(small, CONFIG, out)


@pytest.fixture(scope="package")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    write_log(folder / "log.csv", num_rows=1500)
    assert call("encode", folder / "log.csv", "--label", "click", "--out", folder / "data").code == 0
    return folder / "data"
