"""The memory of bundles, exports and updates, in multiples of the full tables' bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoding import encode
from embtrim.models import FNN
from embtrim.schema import FieldSpec, Schema
from embtrim.serving.bundle import load_bundle, save
from embtrim.serving.exporting import export
from embtrim.serving.manifest import Format
from embtrim.serving.updating import update
from tests.resident import stays_within

NUM_ROWS, WIDTH = 100_000, 64
TABLE_BYTES = 4 * NUM_ROWS * WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large bundle, and a tiny one by which everything is imported before it is measured."""
    folder = tmp_path_factory.mktemp("memory")
    for name, num_rows in (("large", NUM_ROWS), ("tiny", 1000)):
        log = pl.DataFrame({"click": np.arange(num_rows) % 2, "user": np.arange(num_rows)})
        schema = Schema(label="click", fields=(FieldSpec(name="user", min_count=1),))
        data = encode(log, schema, out=folder / f"{name}-data", split="1:0:0", progress=False)
        assert data.schema.tables["user"] == num_rows + 1
        save(FNN(data.schema, embedding_dim=WIDTH, hidden_units=(4,)), folder / name, data)
    return folder


def test_saving_and_opening(folder: Path):
    def save_again(name: str) -> None:
        save(models[name], folder / f"{name}-again", data[name], overwrite=True)

    models = {name: load_bundle(folder / name).model for name in ("tiny", "large")}
    data = {name: EncodedDataset.load(folder / f"{name}-data") for name in models}
    save_again("tiny")
    assert stays_within(0.5 * TABLE_BYTES, lambda: save_again("large"))
    assert stays_within(2.3 * TABLE_BYTES, lambda: load_bundle(folder / "large"))


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_exporting(folder: Path, format: Format):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    export(load_bundle(folder / "tiny"), format, folder / f"tiny-{format}")
    bundle = load_bundle(folder / "large")
    limit = (0.8 if format == "pt2" else 2.3) * TABLE_BYTES
    assert stays_within(limit, lambda: export(bundle, format, folder / f"large-{format}", overwrite=True))


def test_updating(folder: Path):
    log = pl.DataFrame({"click": np.arange(1000) % 2, "user": np.arange(500, 2500, 2)})
    update(folder / "tiny", log, out=folder / "tiny-updated", retrain=False)
    out = folder / "large-updated"
    assert stays_within(5 * TABLE_BYTES, lambda: update(folder / "large", log, out=out, retrain=False, overwrite=True))
