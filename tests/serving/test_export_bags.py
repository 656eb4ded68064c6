"""Embedding bags in ONNX: gathers and sums without a loop over rows; names of inputs, outputs and the batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import compact, quantize_
from embtrim.serving.exporting import export
from embtrim.tables.gathered_bags import GatheredBag
from embtrim.testing.toys import PooledModel, foreign_batches, foreign_task
from tests.serving.export_models import TOLERANCE
from tests.serving.triton_config import check_repository

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


class Bags(nn.Module):
    """A bag of any kind, read with or without offsets, and outputs by name."""

    def __init__(self, with_weights: bool = False, **settings) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 6, **settings)
        self.with_weights = with_weights

    def forward(self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> dict[str, Tensor]:
        pooled = self.bag(ids, offsets, weights if self.with_weights else None)
        return {"click": pooled.sum(1), "parts": pooled}


SETTINGS = [
    {"mode": "sum"},
    {"mode": "mean"},
    {"mode": "mean", "padding_idx": 3},
    {"mode": "max"},
    {"mode": "max", "padding_idx": 3},
    {"mode": "sum", "padding_idx": 3, "with_weights": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bags_of_rows_agree_at_any_batch_size(settings, tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = Bags(**settings)

    def inputs(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 6, (rows, 5), generator=generator)
        ids[0] = 3  # a bag of padding alone
        return {"ids": ids, "weights": torch.rand(rows, 5, generator=generator)}

    names = ["ids", "weights"] if model.with_weights else ["ids"]
    example = {name: inputs(4)[name] for name in names}
    export(model, "onnx", tmp_path / "out", example=example)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    assert [(i.name, i.shape[0]) for i in session.get_inputs()] == [(name, "batch") for name in names]
    assert [(o.name, o.shape[0]) for o in session.get_outputs()] == [("click", "batch"), ("parts", "batch")]
    for rows in (1, 7):
        feeds = {name: inputs(rows)[name] for name in names}
        outputs = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        for found, expected in zip(outputs, model(**feeds).values(), strict=True):
            np.testing.assert_allclose(found, expected.detach().numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("settings", [s for s in SETTINGS if s["mode"] != "max"], ids=str)
def test_bags_with_offsets_agree_and_hold_no_loop(settings, last, tmp_path):
    model = Bags(**settings, include_last_offset=last)
    ids = torch.tensor([3, 1, 2, 3, 4, 5, 3])
    offsets = torch.tensor([0, 3, 3, 4] + [7] * last)  # the second bag is empty, the third is padding alone
    weights = torch.linspace(0.1, 0.7, 7)
    example = {"ids": ids, "offsets": offsets} | ({"weights": weights} if model.with_weights else {})
    export(model, "onnx", tmp_path / "out", example=example, triton="bags")
    check_repository(tmp_path / "out" / "triton", "bags", batches=False)
    path = str(tmp_path / "out" / "model.onnx")
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "Loop"]
    outputs = onnxruntime.InferenceSession(path).run(None, {name: value.numpy() for name, value in example.items()})
    for found, expected in zip(outputs, model(**example).values(), strict=True):
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_the_largest_of_bags_with_offsets_agrees(padding_idx, tmp_path):
    model = Bags(mode="max", padding_idx=padding_idx)
    example = {"ids": torch.tensor([3, 1, 2, 4, 5]), "offsets": torch.tensor([0, 3])}
    export(model, "onnx", tmp_path / "out", example=example)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    outputs = session.run(None, {name: value.numpy() for name, value in example.items()})
    for found, expected in zip(outputs, model(**example).values(), strict=True):
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("bits", [32, 8])
def test_compact_bags_hold_no_loop(bits, tmp_path):
    task = foreign_task(PooledModel)
    small = compact(task.model, task.full_plan().with_bits(bits), "scratch", seed=0).eval()
    if bits < 32:
        quantize_(small)
    ids = next(foreign_batches())[0]
    export(small, "onnx", tmp_path / "out", example=ids[:4])
    path = str(tmp_path / "out" / "model.onnx")
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "Loop"]
    (found,) = onnxruntime.InferenceSession(path).run(["output_0"], {"ids_BC": ids.numpy()})
    np.testing.assert_allclose(found, small(ids).detach().numpy(), atol=TOLERANCE)


def test_a_bag_may_be_the_whole_module(tmp_path):
    bag = nn.EmbeddingBag(10, 3)
    export(bag, "onnx", tmp_path / "out", example=torch.zeros(2, 4, dtype=torch.int64))
    ids = torch.randint(0, 10, (5, 4))
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx")).run(None, {"input": ids.numpy()})
    np.testing.assert_allclose(found, bag(ids).detach().numpy(), atol=TOLERANCE)
    assert not isinstance(bag, GatheredBag)


def test_the_exporter_is_silent(tmp_path):
    script = (
        "import torch, embtrim\nfrom torch import nn\n"
        f"embtrim.export(nn.Sequential(nn.EmbeddingBag(10, 3), nn.Linear(3, 1)), 'onnx', {str(tmp_path / 'out')!r}, "
        "example=torch.zeros(2, 4, dtype=torch.int64))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert (Path(tmp_path) / "out" / "model.onnx").exists()
