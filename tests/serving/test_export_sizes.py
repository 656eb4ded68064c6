"""Export: the manifest's bytes are those of the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from embtrim.models import DeepFM, build
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.schema import FieldSpec, Schema
from embtrim.serving import graphs
from embtrim.serving.exporting import export
from tests.serving.export_models import READERS, TOLERANCE, batch_of

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")


def uniform_layout(alignment):
    return lambda ids: (Block(len(ids), (0, 3, 5), alignment),)


# Files that hold no part of the model.
OTHERS = ("README.md", "golden.json", "check.py")

LAYOUTS = {
    "scatter": uniform_layout("scatter"),
    "project": uniform_layout("project"),
    "dropped": lambda ids: (Block(len(ids) // 2, (1, 2, 4), "scatter", ids[::2]),),
    "mixed": lambda ids: (Block(2_000, 4, "project", ids[:2_000]), Block(8_000, 2, "project", ids[2_000:10_000])),
}


def sized_model(name: str, layout: str, bits: int, multi: bool = False) -> CTRModel:
    """A model of six fields with 20,000 values at width 16, some of which a layout keeps, and a tiny network."""
    many = {"type": "multi", "max_len": 2} if multi else {}
    fields = [FieldSpec(name=f"f{i}", vocab_size=20_000, **(many if i % 2 else {})) for i in range(6)]
    schema = Schema(label="y", fields=tuple(fields))
    blocks = LAYOUTS[layout](np.arange(20_000, dtype=np.int32))
    tables = tuple(TablePlan(t, rows, 16, blocks, bits) for t, rows in schema.tables.items())
    plan = SizePlan(schema.fingerprint, 6, tables, first_order=name in ("deepfm", "fm"))
    hparams = {} if name == "fm" else {"hidden_units": (2,)}
    model = build(name, schema, plan=plan, embedding_dim=16, init_std=0.1, **hparams).eval()
    if bits < 32:
        model.tables.quantize_()
    return model


def stored_bytes(folder: Path, format: str) -> int:
    """Bytes of all tensors of an export."""
    if format == "onnx":
        graph = onnx.load(str(folder / "model_ids.onnx")).graph
        return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
    if format == "torchrec":
        return sum(t.nbytes for path in folder.glob("*.safetensors") for t in load_file(path).values())
    program = torch.export.load(str(folder / "model.pt2"))
    return sum(t.nbytes for t in {**program.state_dict, **program.constants}.values() if isinstance(t, Tensor))


@pytest.mark.parametrize(("format", "name", "layout", "bits", "multi"), [
    ("onnx", "deepfm", "scatter", 4, True), ("onnx", "ipnn", "project", 8, False), ("onnx", "deepfm", "mixed", 16, False),
    ("pt2", "deepfm", "scatter", 16, False), ("pt2", "ipnn", "project", 8, True), ("pt2", "deepfm", "dropped", 4, False),
    ("pt2", "deepfm", "mixed", 4, True),
    ("torchrec", "deepfm", "scatter", 32, True), ("torchrec", "deepfm", "project", 32, False),
    ("torchrec", "ipnn", "dropped", 32, False),
])  # fmt: skip
def test_exported_tables_are_as_large_as_the_plan_says(format, name, layout, bits, multi, tmp_path):
    model = sized_model(name, layout, bits, multi)
    manifest = export(model, format, tmp_path / "out")
    planned = model.tables.plan.num_bytes({"pt2": "torch", "torchrec": "fbgemm"}.get(format, format))
    network = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("tables."))
    assert stored_bytes(tmp_path / "out", format) - network == pytest.approx(planned, rel=0.01)
    assert manifest["table_bytes"] == planned


@pytest.mark.parametrize("format", ["onnx", "pt2", "torchrec"])
def test_the_manifest_says_how_large_the_full_model_would_be(format, tmp_path):
    model = sized_model("deepfm", "scatter", 32)
    manifest = export(model, format, tmp_path / "out")
    full = DeepFM(model.schema, embedding_dim=16, hidden_units=(2,))
    of_full = export(full, format, tmp_path / "full")
    assert manifest["full_table_bytes"] == of_full["table_bytes"] == of_full["full_table_bytes"]
    assert of_full["full_model_bytes"] == of_full["model_bytes"]
    assert manifest["full_model_bytes"] == pytest.approx(of_full["model_bytes"], rel=0.005)
    for found in (manifest, of_full):
        files = [e["bytes"] for name, e in found["files"].items() if name not in OTHERS]
        assert found["model_bytes"] == sum(files) < found["table_bytes"] + 60_000


def test_weights_get_a_file_of_their_own_where_one_cannot_hold_them(monkeypatch, tmp_path):
    model = sized_model("fm", "dropped", 4)
    weights = model.tables.plan.num_bytes()
    for limit, files in ((weights + 10_000, 1), (weights - 1, 2)):
        monkeypatch.setattr(graphs, "ONNX_FILE_BYTES", limit)
        manifest = export(model, "onnx", tmp_path / f"{limit}")
        assert len([name for name in manifest["files"] if name.startswith("model_ids.onnx")]) == files
        if files == 2:
            assert (
                manifest["files"]["model_ids.onnx"]["bytes"]
                < 50_000
                < manifest["files"]["model_ids.onnx.data"]["bytes"]
            )
        batch = batch_of(model, 7)
        assert torch.allclose(READERS["onnx"](tmp_path / f"{limit}")(**batch), model(*batch.values()), atol=TOLERANCE)
