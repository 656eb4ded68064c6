"""ONNX files in parts are the files that onnx itself reads and writes, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from embtrim.serving import onnx_files  # noqa: E402
from embtrim.serving.onnx_files import read_parts, write_parts  # noqa: E402


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with two large tensors, a small one, and fields of all kinds around them."""
    rng = np.random.default_rng(0)
    tensors = {"large": rng.normal(size=(300, 7)).astype(np.float32), "small": np.arange(3), "ids": np.arange(1000)}
    constants = [onnx.numpy_helper.from_array(values, name) for name, values in tensors.items()]
    constants[0].doc_string = "a field after the data"
    nodes = [onnx.helper.make_node("Gather", ["large", "x"], ["y"], axis=0, alpha=0.5)]
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["batch"]) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], constants)
    model = onnx.helper.make_model(graph, producer_name="p")
    onnx.save(model, tmp_path / "whole.onnx")
    return tmp_path / "whole.onnx"


@pytest.mark.parametrize("large_bytes", [1, 4096, 1 << 20])
def test_a_file_comes_back_from_its_parts(path: Path, monkeypatch: pytest.MonkeyPatch, large_bytes: int):
    monkeypatch.setattr(onnx_files, "LARGE_BYTES", large_bytes)
    parts, whole = read_parts(path), onnx.load(path)
    expected = {t.name: t.raw_data for t in whole.graph.initializer if len(t.raw_data) >= large_bytes}
    assert {name: bytes(values) for name, values in parts.data.items()} == expected
    assert all(not t.raw_data for t in parts.model.graph.initializer if t.name in expected)
    write_parts(parts, path.with_name("again.onnx"))
    assert path.with_name("again.onnx").read_bytes() == path.read_bytes()


def test_a_model_of_an_exporter_is_written_as_onnx_ir_writes_it(path: Path, monkeypatch: pytest.MonkeyPatch):
    onnx_ir = pytest.importorskip("onnx_ir")
    monkeypatch.setattr(onnx_files, "LARGE_BYTES", 4096)
    model = onnx_ir.load(path)
    for value in model.graph.initializers.values():
        value.const_value = onnx_ir.Tensor(value.const_value.numpy(), name=value.name)
    onnx_ir.save(model, path.with_name("expected.onnx"))
    parts = onnx_files.parts_of(model)
    assert parts.data.keys() == {"large", "ids"}
    write_parts(parts, path.with_name("found.onnx"))
    assert path.with_name("found.onnx").read_bytes() == path.with_name("expected.onnx").read_bytes()
