"""Export of modules of one's own: agreement, inputs, bytes of the full model."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import compact, quantize_
from embtrim.errors import ConfigError
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block
from embtrim.serving import exporting
from embtrim.serving.exporting import export
from embtrim.testing.toys import ForeignModel, PooledModel, foreign_batches, foreign_task, odd_task, pooled_task
from tests.serving.export_models import TOLERANCE

pytestmark = pytest.mark.slow

onnxruntime = pytest.importorskip("onnxruntime")


class NestedModel(nn.Module):
    """Takes a dict, and a tensor by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.head = nn.Embedding(50, 4), nn.Embedding(30, 4), nn.Linear(5, 1)

    def forward(self, ids: dict[str, Tensor], price: Tensor) -> tuple[Tensor, Tensor]:
        pair = self.user(ids["user"]) * self.item(ids["item"])
        return self.head(torch.cat([pair, price[:, None]], 1)).squeeze(1), pair.sum(1)


def foreign_plan(task, layouts: dict[str, tuple[Block, ...]]) -> SizePlan:
    full = task.full_plan()
    tables = [dataclasses.replace(t, blocks=layouts.get(t.name, t.blocks)) for t in full.tables]
    return dataclasses.replace(full, tables=tuple(tables))


def drops(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("model_class", [ForeignModel, PooledModel])
def test_a_module_of_ones_own_agrees(model_class, format, tmp_path, monkeypatch):
    task = foreign_task(model_class)
    layouts = {
        "user": (Block(5, (1, 4), "project", drops(0, 3, 8, 21, 30)),),
        "item": (Block(9, (0, 2), "scatter", np.arange(9, dtype=np.int32)),),
        "flat": (Block(6, (0, 2, 5), "scatter", drops(0, 3, 8, 21, 30, 50)),),
        "history": (Block(4, 4, "project", drops(1, 3, 5, 7)), Block(6, 2, "project", drops(10, 12, 14, 16, 18, 20))),
    }
    plan = foreign_plan(task, layouts)
    small = compact(task.model, plan, "scratch", seed=0)
    batches = [ids for ids, _ in foreign_batches()]
    manifest = export(small, format, tmp_path / "out", example=batches[0])
    assert small.training, "the model was changed"
    assert manifest["inputs"] == {"ids_BC": {"dtype": "int64", "shape": ["batch", 3]}}
    biases = 4 * 40 if model_class is ForeignModel else 0  # first-order weights, which no plan counts
    assert manifest["table_bytes"] == plan.num_bytes() + biases
    assert manifest["full_table_bytes"] == 4 * plan.num_full_params + biases
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), flags=re.DOTALL)
    for ids in (batches[0][:1], batches[1][:7], torch.cat(batches)):
        names = {"ids_BC": ids.numpy() if format == "onnx" else ids}
        with monkeypatch.context() as patch:  # contextlib.chdir needs Python 3.11
            patch.chdir(tmp_path / "out")
            exec(code, names)
        outputs = torch.as_tensor(names["outputs"][0] if format == "onnx" else names["outputs"])
        expected = small.eval()(ids)
        assert ((outputs - expected).abs() / (1 + expected.abs())).max() < TOLERANCE
    small.train()


@pytest.fixture(scope="module")
def full_model_bytes(tmp_path_factory) -> Callable[..., int]:
    """Bytes of the export of a task's model, which is made once for each name and format."""
    known: dict[tuple[str, str], int] = {}

    def found(name: str, model: nn.Module, format: str, example: Tensor) -> int:
        if (name, format) not in known:
            out = tmp_path_factory.mktemp("full") / "out"
            known[name, format] = export(model, format, out, example=example)["model_bytes"]
        return known[name, format]

    return found


@pytest.mark.parametrize("reads", [None, {"head.0": ["user", "item", "item"]}], ids=["full width", "narrowed"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_quantised_module_says_its_bytes(bits, reads, full_model_bytes, tmp_path):
    task = foreign_task()
    plan = task.full_plan().with_columns({"user": (1, 4, 5), "item": (0, 3)}).with_bits(bits)
    small = compact(task.model, plan, "inherit", reads=reads).eval()
    if bits < 32:
        quantize_(small)
    batches = [ids for ids, _ in foreign_batches()]
    manifest = export(small, "pt2", tmp_path / "out", example=batches[0])
    served = torch.export.load(str(tmp_path / "out" / "model.pt2")).module()
    assert torch.allclose(served(batches[1]), small(batches[1]), atol=TOLERANCE)
    biases = 4 * 40
    assert manifest["table_bytes"] == plan.num_bytes() + biases
    assert manifest["full_table_bytes"] == 4 * (40 * 6 + 25 * 4) + biases
    full_bytes = full_model_bytes("foreign", task.model, "pt2", batches[0])
    assert manifest["full_model_bytes"] == pytest.approx(full_bytes, rel=0.01)


class WideModel(nn.Module):
    """Tables of many rows, with padding and without, and two bags that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(900, 8), nn.Embedding(500, 8, padding_idx=-1)
        self.history = nn.EmbeddingBag(700, 8, mode="sum", padding_idx=3)
        self.recent = nn.EmbeddingBag(700, 8, mode="sum", padding_idx=3)
        self.recent.weight = self.history.weight
        self.left = nn.Embedding(50, 1)
        self.head = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) logits of (user, item, item) ids."""
        user, items = ids_BC[:, 0], ids_BC[:, 1:]
        parts = [self.user(user), self.item(items[:, 0]), self.history(items), self.recent(items)]
        return (self.head(torch.cat(parts, 1)) + self.left(user)).squeeze(1)


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        *itertools.product(["pt2"], ["columns", "rows", "sizes", "4 bits", "narrowed", "flat", "norm", "as it is"]),
        *itertools.product(["onnx"], ["rows", "sizes", "4 bits", "flat"]),
    ],
)
def test_full_model_bytes_are_those_of_the_full_models_export(format, kind, full_model_bytes, tmp_path):
    makers = {"flat": pooled_task, "norm": odd_task}
    task = makers[kind]() if kind in makers else foreign_task(WideModel)
    plan, reads = task.full_plan(), None
    if kind in ("columns", "4 bits", "narrowed"):
        plan = plan.with_columns(dict.fromkeys(("user", "item", "history"), (1, 4)))
    if kind == "4 bits":
        plan = plan.with_bits(4)
    if kind == "narrowed":
        reads = {"head.0": ["user", "item", "history", "recent"]}
    if kind == "rows":
        plan = foreign_plan(task, {"user": (Block(90, tuple(range(8)), "scatter", np.arange(9, 99, dtype=np.int32)),)})
    if kind == "sizes":
        rows = np.arange(700, dtype=np.int32)
        plan = foreign_plan(
            task, {"history": (Block(10, 8, "project", rows[:10]), Block(60, 2, "project", rows[10:70]))}
        )
    if kind in makers:
        plan = plan.with_columns({t.name: (0, 3) for t in plan.tables})
    example = next(foreign_batches())[0]
    small = task.model if kind == "as it is" else compact(task.model, plan, "scratch", seed=0, reads=reads).eval()
    if kind == "4 bits":
        quantize_(small)
    manifest = export(small, format, tmp_path / "small", example=example)
    full_bytes = full_model_bytes(kind if kind in makers else "wide", task.model, format, example)
    assert manifest["full_model_bytes"] == pytest.approx(full_bytes, rel=0.01)
    files = {str(path.relative_to(tmp_path / "small")) for path in (tmp_path / "small").rglob("*") if path.is_file()}
    assert files == {*manifest["files"], "manifest.json"}, "nothing of the full model is left there"
    assert manifest["model_bytes"] == manifest["files"][f"model.{format}"]["bytes"]


def test_bytes_of_a_full_model_that_no_exporter_takes_are_estimated(monkeypatch, caplog, tmp_path):
    task = foreign_task()
    plan = task.full_plan().with_columns({"user": (1, 4, 5), "item": (0, 3)})
    example, calls, write = next(foreign_batches())[0], [], exporting.FORMATS["pt2"]

    def once(served, folder):
        if calls:
            raise RuntimeError("no such operator")
        calls.append(served)
        write(served, folder)

    monkeypatch.setitem(exporting.FORMATS, "pt2", once)
    manifest = export(compact(task.model, plan, "scratch", seed=0), "pt2", tmp_path / "out", example=example)
    assert manifest["full_model_bytes"] - manifest["model_bytes"] == 4 * plan.num_full_params - plan.num_bytes()
    assert "full ForeignModel cannot be exported (no such operator); its bytes are estimated" in caplog.text


def test_the_rows_of_the_example_do_not_leave_with_the_model(tmp_path):
    task = foreign_task()
    small = compact(task.model, task.full_plan().with_columns({"user": (1, 4, 5)}))
    many = torch.stack([torch.randint(1, size, (50_000,)) for size in (40, 25, 25)], 1)
    manifest = export(small, "pt2", tmp_path / "out", example=many[:9])
    assert manifest["model_bytes"] < many.nbytes / 2
    program = torch.export.load(str(tmp_path / "out" / "model.pt2"))
    (ids,), _ = program.example_inputs
    assert ids.shape == (9, 3)
    assert not ids.any()
    assert program.module()(ids).shape == (9,)


def test_an_example_that_forward_does_not_take_is_refused(tmp_path):
    ids, price = {name: torch.randint(0, 30, (9,)) for name in ("user", "item")}, torch.randn(9)
    message = r"the example does not fit NestedModel\.forward\(ids, price\): too many .*; give export an example= of its arguments"
    with pytest.raises(ConfigError, match=message):
        export(NestedModel(), "pt2", tmp_path / "out", example=(ids, price, price))
    with pytest.raises(ConfigError, match="argument: 'price'; give"):
        export(NestedModel(), "pt2", tmp_path / "out", example={"ids": ids, "prices": price})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_module_may_take_what_it_likes(format, tmp_path):
    ids, price = {name: torch.randint(0, 30, (9,)) for name in ("user", "item")}, torch.randn(9)
    model = NestedModel()
    for example in ((ids, price), {"ids": ids, "price": price}):
        manifest = export(model, format, tmp_path / "out", example=example, overwrite=True)
        whole, ids_only = {"dtype": "float32", "shape": ["batch"]}, {"dtype": "int64", "shape": ["batch"]}
        assert manifest["inputs"] == {"ids.user": ids_only, "ids.item": ids_only, "price": whole}
        assert manifest["table_bytes"] == manifest["full_table_bytes"] == 4 * 80 * 4
        small = {name: values[:4] for name, values in ids.items()}
        if format == "onnx":
            session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
            feeds = {"ids.user": small["user"], "ids.item": small["item"], "price": price[:4]}
            outputs = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        else:
            served = torch.export.load(str(tmp_path / "out" / "model.pt2")).module()
            outputs = served(ids=small, price=price[:4]) if isinstance(example, dict) else served(small, price[:4])
        for found, expected in zip(outputs, model(small, price[:4]), strict=True):
            assert torch.allclose(torch.as_tensor(found), expected, atol=TOLERANCE)
