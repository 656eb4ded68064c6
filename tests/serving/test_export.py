"""Export: what leaves embtrim agrees with the eager model, at any batch size and without embtrim."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import GetAttrKey, register_pytree_node

import embtrim
from embtrim.compaction.compacting import compact, quantize
from embtrim.data.encoder import Encoder
from embtrim.errors import ConfigError, DataError, EmbtrimError, PlanError
from embtrim.models import MODELS, DeepFM, build
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.reports.numbers import format_bytes
from embtrim.schema import PAD, FieldSpec, Schema
from embtrim.serving import exporting
from embtrim.serving.bundle import load_bundle, save
from embtrim.serving.exporting import export
from embtrim.tables.row_optimizers import RowAdam
from embtrim.testing.checks import ForeignModel, PooledModel, foreign_batches, foreign_task, odd_task, pooled_task
from tests.cli.bad_inputs import call

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

BATCHES = (1, 7, 64)
TOLERANCE = 1e-5


# ---- models and batches ------------------------------------------------------------------------------------------------


def schema_of(multi: bool = True, dense: bool = True) -> Schema:
    """Three plain fields; two that share a table, one of them with several values; a dense one."""
    fields = [FieldSpec(name=f"f{i}", vocab_size=20 + i) for i in range(3)]
    if multi:
        fields.append(FieldSpec(name="tags", type="multi", max_len=3, vocab_size=12))
        fields.append(FieldSpec(name="last", type="multi", max_len=1, vocab_size=12, table="tags"))
    if dense:
        fields.append(FieldSpec(name="price", type="dense", transform="none"))
    return Schema(label="y", fields=tuple(fields))


def uniform_blocks(number: int, rows: int) -> tuple[Block, ...]:
    """Of f0 all columns, of f1 two that are projected and some rows, of f2 nothing, of the tags a scattered column."""
    some = np.arange(1, 10, dtype=np.int32)
    return (
        (Block(rows, (0, 1, 2, 3)),),
        (Block(9, (0, 2), "project", some),),
        (),
        (Block(rows, (1,), "scatter"),),
    )[number]


def mixed_blocks(number: int, rows: int) -> tuple[Block, ...]:
    """The same, but of f0 and of the tags rows of several widths, the rest dropped."""
    ids = np.arange(rows, dtype=np.int32)
    if number in (1, 2):
        return uniform_blocks(number, rows)
    return (Block(3, 4, "project", ids[:3]), Block(4, 2, "project", ids[3:7]), Block(3, 0, "project", ids[8:11]))


def model_of(
    name: str, schema: Schema, blocks: Callable[[int, int], tuple[Block, ...]] | None = None, seed: int = 0
) -> CTRModel:
    """A model in eval mode whose weights and running statistics are all random; without `blocks` a full one."""
    plan = None
    if blocks is not None:
        width = 0 if name == "lr" else 4
        tables = [
            TablePlan(t, rows, width, blocks(number, rows) if width else (Block(rows, ()),))
            for number, (t, rows) in enumerate(schema.tables.items())
        ]
        plan = SizePlan(schema.fingerprint, len(schema.id_fields), tuple(tables))
    hparams = {} if name == "lr" else {"embedding_dim": 4}
    if name not in ("lr", "fm"):
        hparams["hidden_units"] = (8,)
    model = build(name, schema, plan=plan, **hparams).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "running_var" in name:
                value.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(value, nn.Parameter) or "running_mean" in name:
                value.uniform_(-0.5, 0.5, generator=generator)
    return model


def batch_of(model: CTRModel, num_rows: int, seed: int = 0) -> dict[str, Tensor]:
    """ids, with PAD where a field has several values, and dense values if the schema has any."""
    generator = torch.Generator().manual_seed(seed)
    rows = {table.name: table.num_compact_rows for table in model.tables.plan.tables}
    columns = [
        torch.randint(PAD if f.type == "multi" else 0, rows[f.table_name], (num_rows,), generator=generator)
        for f in model.schema.id_fields
        for _ in range(f.length)
    ]
    batch = {"ids": torch.stack(columns, 1).int()}
    if model.num_dense:
        batch["dense"] = torch.randn(num_rows, model.num_dense, generator=generator)
    return batch


def onnx_model(folder: Path) -> Callable[..., Tensor]:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert [output.name for output in session.get_outputs()] == ["logits"]
    return lambda **batch: torch.from_numpy(session.run(["logits"], {n: x.numpy() for n, x in batch.items()})[0])


def pt2_model(folder: Path) -> Callable[..., Tensor]:
    return torch.export.load(str(folder / "model.pt2")).module()


READERS = {"onnx": onnx_model, "pt2": pt2_model}


@torch.no_grad()
def check_agreement(model: CTRModel, folder: Path, format: str) -> None:
    served = READERS[format](folder)
    for num_rows in BATCHES:
        batch = batch_of(model, num_rows, seed=num_rows)
        expected = model(*batch.values())
        difference = (served(**batch) - expected).abs() / (1 + expected.abs())
        assert difference.max() < TOLERANCE, f"batch of {num_rows}"
    assert expected.std() > 1e-3


# ---- agreement -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_compact_model_agrees_as_onnx(name, tmp_path):
    model = model_of(name, schema_of(multi=False), uniform_blocks)
    export(model, "onnx", tmp_path / "out")
    check_agreement(model, tmp_path / "out", "onnx")
    assert not (tmp_path / "out" / "model.onnx.data").exists()


def test_rows_of_several_widths_agree_as_onnx(tmp_path):
    # Without dense fields, of which the first-order term must stay free: a product over none is left unset.
    model = model_of("deepfm", schema_of(dense=False), mixed_blocks)
    export(model, "onnx", tmp_path / "out")
    check_agreement(model, tmp_path / "out", "onnx")


def test_several_values_agree_as_onnx_with_weights_in_a_file_of_their_own(tmp_path):
    model = model_of("lr", schema_of())
    manifest = export(model, "onnx", tmp_path / "out", external_data=True)
    check_agreement(model, tmp_path / "out", "onnx")
    assert manifest["files"]["model.onnx.data"]["bytes"] >= 4 * model.tables.num_rows


@pytest.mark.parametrize("name", MODELS)
def test_every_full_model_agrees_as_pt2(name, tmp_path):
    model = model_of(name, schema_of(multi=False))
    export(model, "pt2", tmp_path / "out")
    check_agreement(model, tmp_path / "out", "pt2")


def test_the_exported_model_needs_no_embtrim_and_holds_no_path(tmp_path):
    model = model_of("deepfm", schema_of(), mixed_blocks)
    export(model, "pt2", tmp_path / "out")
    batch = batch_of(model, 5)
    torch.save(batch, tmp_path / "batch.pt")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), flags=re.DOTALL)
    script = (
        "import sys\nsys.modules['embtrim'] = None\nimport torch\n"
        f"globals().update(torch.load({str(tmp_path / 'batch.pt')!r}))\n{code}\n"
        "assert not any(name.startswith('embtrim.') for name in sys.modules)\nprint(logits.tolist())"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "out", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    expected = model(*batch.values()).tolist()
    np.testing.assert_allclose(json.loads(done.stdout), expected, rtol=TOLERANCE, atol=TOLERANCE)
    source = str(Path(embtrim.__file__).parent).encode()
    assert source not in (tmp_path / "out" / "model.pt2").read_bytes()


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = model_of("deepfm", schema_of(), mixed_blocks).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, "pt2", tmp_path / "out")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


# ---- bundles -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    columns = {name: [f"{name}{i}" for i in rng.integers(0, 30, 400)] for name in ("user", "item")}
    return pl.DataFrame({**columns, "price": rng.normal(size=400), "click": rng.integers(0, 2, 400)})


@pytest.fixture(scope="module")
def bundle_folder(raw, tmp_path_factory) -> Path:
    """The bundle of a compact model with dropped rows; untrained, but with weights that matter."""
    folder = tmp_path_factory.mktemp("exported")
    fields = (
        FieldSpec(name="user"),
        FieldSpec(name="item"),
        FieldSpec(name="price", type="dense", transform="standard"),
    )
    data = embtrim.encode(raw, Schema(label="click", fields=fields), out=folder / "data")
    full = DeepFM(data.schema, embedding_dim=4, hidden_units=(8,), init_std=0.5)
    rows = np.arange(1, 11, dtype=np.int32)
    tables = [TablePlan(t, n, 4, (Block(10, (0, 2), "scatter", rows),)) for t, n in data.schema.tables.items()]
    plan = SizePlan(data.schema.fingerprint, 2, tuple(tables), first_order=True)
    save(compact(full, plan), folder / "bundle", data.recode(plan), metrics={"test": {"auc": 0.5}})
    return folder / "bundle"


def test_a_bundle_is_exported_with_all_a_server_needs(bundle_folder, raw, tmp_path, caplog):
    out = tmp_path / "out"
    done = call("export", bundle_folder, "--format", "onnx", "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    manifest = json.loads((out / "manifest.json").read_text())
    assert json.loads(done.out) == manifest
    assert str(Path(embtrim.__file__).parent).encode() not in (out / "model.onnx").read_bytes()
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"manifest.json"}
    encoder_files = {f"encoder/{name}" for name in ("schema.json", "vocab.parquet", "transforms.json")}
    assert found == set(manifest["files"]) == {"model.onnx", "README.md", *encoder_files}
    for name, entry in manifest["files"].items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    # 11 rows of 2 columns and a first-order weight for each table; of the full one 31 rows (OOV first) of 4 columns.
    assert manifest["table_bytes"] == 2 * 4 * 11 * 3
    assert manifest["full_table_bytes"] == 2 * 4 * 31 * 5
    assert manifest["metrics"] == {"test": {"auc": 0.5}}
    assert manifest["inputs"]["ids"] == {"dtype": "int32", "shape": ["batch", 2], "columns": ["user", "item"]}

    encoded = Encoder.load(out / "encoder").encode_chunk(raw)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    names = {"ids": encoded.ids, "dense": encoded.dense}
    with contextlib.chdir(out):
        exec(code, names)
    expected = load_bundle(bundle_folder).predict(raw)
    np.testing.assert_allclose(1 / (1 + np.exp(-names["logits"])), expected, atol=1e-6)
    assert expected.std() > 0.01


def test_the_command_shows_what_it_does(bundle_folder, tmp_path):
    dry = call("export", bundle_folder, "--format", "pt2", "--dry-run")
    assert dry.code == 0, dry.err
    assert "full table bytes" in dry.out
    assert not list(tmp_path.iterdir())
    done = call("export", bundle_folder, "--format", "pt2", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "encoder/vocab.parquet" in done.out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["vocabulary_bytes"] == sum(
        e["bytes"] for n, e in manifest["files"].items() if n.startswith("encoder/")
    )
    for name in ("table_bytes", "full_table_bytes", "model_bytes", "full_model_bytes", "vocabulary_bytes"):
        assert f"\n{name.replace('_', ' ')}: {format_bytes(manifest[name])}\n" in done.out
    again = call("export", bundle_folder, "--format", "pt2", "--out", tmp_path / "out")
    assert (again.code, "out exists" in again.err, "--overwrite" in again.err) == (1, True, True)
    assert call("export", bundle_folder, "--format", "torchrec", "--out", tmp_path / "out", "--overwrite").code == 0
    assert not (tmp_path / "out" / "model.pt2").exists()
    done = call("export", bundle_folder, "--format", "onnx", "--external-data", "--out", tmp_path / "apart")
    assert (done.code, (tmp_path / "apart" / "model.onnx.data").exists()) == (0, True)
    done = call("export", bundle_folder, "--format", "pt2", "--external-data", "--out", tmp_path / "no")
    assert (done.code, "external_data is for format 'onnx'" in done.err) == (2, True)


def test_bad_commands(bundle_folder, tmp_path):
    done = call("export", bundle_folder, "--format", "tflite", "--out", tmp_path / "out")
    assert (done.code, "unknown format 'tflite'; allowed: pt2, onnx, torchrec" in done.err) == (2, True)
    done = call("export", bundle_folder, "--format", "pt2")
    assert (done.code, "--out is needed" in done.err) == (2, True)
    done = call("export", tmp_path, "--format", "pt2", "--out", tmp_path / "out")
    assert (done.code, "is not a bundle" in done.err) == (1, True)
    assert not list(tmp_path.iterdir())


# ---- sizes ---------------------------------------------------------------------------------------------------------------


def uniform_layout(alignment):
    return lambda ids: (Block(len(ids), (0, 3, 5), alignment),)


LAYOUTS = {
    "scatter": uniform_layout("scatter"),
    "project": uniform_layout("project"),
    "dropped": lambda ids: (Block(len(ids) // 2, (1, 2, 4), "scatter", ids[::2]),),
    "mixed": lambda ids: (Block(2_000, 4, "project", ids[:2_000]), Block(8_000, 2, "project", ids[2_000:10_000])),
}


def sized_model(name: str, layout: str, bits: int, multi: bool = False) -> CTRModel:
    """Six fields of 20,000 values at width 16 of which a layout keeps some, and a network of next to nothing."""
    many = {"type": "multi", "max_len": 2} if multi else {}
    fields = [FieldSpec(name=f"f{i}", vocab_size=20_000, **(many if i % 2 else {})) for i in range(6)]
    schema = Schema(label="y", fields=tuple(fields))
    blocks = LAYOUTS[layout](np.arange(20_000, dtype=np.int32))
    tables = tuple(TablePlan(t, rows, 16, blocks, bits) for t, rows in schema.tables.items())
    plan = SizePlan(schema.fingerprint, 6, tables, first_order=name in ("deepfm", "fm"))
    hparams = {} if name == "fm" else {"hidden_units": (2,)}
    model = build(name, schema, plan=plan, embedding_dim=16, init_std=0.1, **hparams).eval()
    if bits < 32:
        model.tables.quantize()
    return model


def stored_bytes(folder: Path, format: str) -> int:
    """Bytes of all tensors of an export."""
    if format == "onnx":
        graph = onnx.load(str(folder / "model.onnx")).graph
        return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
    if format == "torchrec":
        return sum(t.nbytes for path in folder.glob("*.safetensors") for t in load_file(path).values())
    program = torch.export.load(str(folder / "model.pt2"))
    return sum(t.nbytes for t in {**program.state_dict, **program.constants}.values() if isinstance(t, Tensor))


@pytest.mark.parametrize(("format", "name", "layout", "bits", "multi"), [
    ("onnx", "deepfm", "scatter", 32, False), ("onnx", "deepfm", "scatter", 4, True), ("onnx", "deepfm", "project", 4, False),
    ("onnx", "ipnn", "project", 8, False), ("onnx", "deepfm", "mixed", 16, False), ("onnx", "deepfm", "mixed", 4, True),
    ("pt2", "deepfm", "scatter", 16, False), ("pt2", "fm", "project", 4, False), ("pt2", "ipnn", "project", 8, True),
    ("pt2", "deepfm", "dropped", 4, False), ("pt2", "deepfm", "mixed", 4, True), ("pt2", "deepfm", "mixed", 8, False),
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
        files = [e["bytes"] for name, e in found["files"].items() if name != "README.md"]
        assert found["model_bytes"] == sum(files) < found["table_bytes"] + 60_000


def test_weights_get_a_file_of_their_own_where_one_cannot_hold_them(monkeypatch, tmp_path):
    model = sized_model("fm", "dropped", 4)
    weights = model.tables.plan.num_bytes()
    for limit, files in ((weights + 10_000, 1), (weights - 1, 2)):
        monkeypatch.setattr(exporting, "ONNX_FILE_BYTES", limit)
        manifest = export(model, "onnx", tmp_path / f"{limit}")
        assert len([name for name in manifest["files"] if name.startswith("model.onnx")]) == files
        if files == 2:
            assert manifest["files"]["model.onnx"]["bytes"] < 50_000 < manifest["files"]["model.onnx.data"]["bytes"]
        batch = batch_of(model, 7)
        assert torch.allclose(READERS["onnx"](tmp_path / f"{limit}")(**batch), model(*batch.values()), atol=TOLERANCE)


# ---- modules of one's own ------------------------------------------------------------------------------------------------


class NestedModel(nn.Module):
    """Takes a dict, and a tensor by keyword; a table that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.head = nn.Embedding(50, 4), nn.Embedding(30, 4), nn.Linear(5, 1)

    def forward(self, ids: dict[str, Tensor], price: Tensor) -> tuple[Tensor, Tensor]:
        pair = self.user(ids["user"]) * self.item(ids["item"])
        return self.head(torch.cat([pair, price[:, None]], 1)).squeeze(1), pair.sum(1)


class Jagged:
    """A container that looks into the tensors it is made of."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.size = values, values.numel()


register_pytree_node(
    Jagged,
    lambda x: ([x.values], None),
    lambda parts, _: Jagged(*parts),
    flatten_with_keys_fn=lambda x: ([(GetAttrKey("values"), x.values)], None),
)


def foreign_plan(task, layouts: dict[str, tuple[Block, ...]]) -> SizePlan:
    full = task.full_plan()
    tables = [dataclasses.replace(t, blocks=layouts.get(t.name, t.blocks)) for t in full.tables]
    return dataclasses.replace(full, tables=tuple(tables))


def drops(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("model_class", [ForeignModel, PooledModel])
def test_a_module_of_ones_own_agrees(model_class, format, tmp_path):
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
        with contextlib.chdir(tmp_path / "out"):
            exec(code, names)
        outputs = torch.as_tensor(names["outputs"][0] if format == "onnx" else names["outputs"])
        expected = small.eval()(ids)
        assert ((outputs - expected).abs() / (1 + expected.abs())).max() < TOLERANCE
    small.train()


@pytest.mark.parametrize("reads", [None, {"head.0": ["user", "item", "item"]}], ids=["full width", "narrowed"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_quantised_module_says_its_bytes(bits, reads, tmp_path):
    task = foreign_task()
    plan = task.full_plan().with_columns({"user": (1, 4, 5), "item": (0, 3)}).with_bits(bits)
    small = compact(task.model, plan, "inherit", reads=reads).eval()
    if bits < 32:
        quantize(small)
    batches = [ids for ids, _ in foreign_batches()]
    manifest = export(small, "pt2", tmp_path / "out", example=batches[0])
    served = torch.export.load(str(tmp_path / "out" / "model.pt2")).module()
    assert torch.allclose(served(batches[1]), small(batches[1]), atol=TOLERANCE)
    biases = 4 * 40
    assert manifest["table_bytes"] == plan.num_bytes() + biases
    assert manifest["full_table_bytes"] == 4 * (40 * 6 + 25 * 4) + biases
    full_bytes = export(task.model, "pt2", tmp_path / "full", example=batches[0])["model_bytes"]
    assert manifest["full_model_bytes"] == pytest.approx(full_bytes, rel=0.01)


class WideModel(nn.Module):
    """Tables of many rows, padded and not, two bags of one weight, of which one padding row is far from the first."""

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


@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("kind", ["columns", "rows", "sizes", "4 bits", "narrowed", "flat", "norm", "as it is"])
def test_full_model_bytes_are_those_of_the_full_models_export(format, kind, tmp_path):
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
        quantize(small)
    manifest = export(small, format, tmp_path / "small", example=example)
    full_bytes = export(task.model, format, tmp_path / "full", example=example)["model_bytes"]
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


# ---- torchrec ------------------------------------------------------------------------------------------------------------


def test_torchrec_tables_pool_to_what_the_model_reads(tmp_path):
    """The configs and weights, looked up with nn.EmbeddingBag alone, give every field's columns of `concat`."""
    model = model_of("deepfm", schema_of(), uniform_blocks)
    export(model, "torchrec", tmp_path / "out")
    ids = batch_of(model, 9)["ids"]
    tables = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert tables["removed_tables"] == ["f2"]
    assert exporting.torchrec_name("item.type") == "table_item%2Etype"
    assert tables["kept_columns"] == {"table_f0": [0, 1, 2, 3], "table_f1": [0, 2], "table_tags": [1]}
    assert tables["tables"][1:] == [
        {"name": "table_f1", "embedding_dim": 4, "num_embeddings": 10, "feature_names": ["f1"], "pooling": "SUM", "data_type": "FP32"},
        {"name": "table_tags", "embedding_dim": 4, "num_embeddings": 12, "feature_names": ["tags", "last"], "pooling": "MEAN", "data_type": "FP32"},
    ]  # fmt: skip
    bags = [{key: value for key, value in c.items() if key != "pooling"} for c in tables["tables"]]
    assert tables["unpooled"] == bags[:2], "the tags are pooled"

    slices = dict(zip([f.name for f in model.schema.id_fields], model.schema.column_slices, strict=True))

    def pooled(kind: str) -> dict[str, Tensor]:
        found, weights = {}, load_file(tmp_path / "out" / f"{kind}.safetensors")
        for config in tables[kind]:
            weight = weights[config["name"]]
            assert weight.shape == (config["num_embeddings"], config["embedding_dim"])
            for feature in config["feature_names"]:
                part = ids[:, slices[feature]]
                values, lengths = part[part >= 0], (part >= 0).sum(1)
                offsets = lengths.cumsum(0) - lengths
                found[feature] = nn.functional.embedding_bag(
                    values.long(), weight, offsets, mode=config["pooling"].lower()
                )
        return found

    views = model.tables(ids)
    kept = {c["name"]: len(tables["kept_columns"][c["name"]]) for c in tables["tables"]}
    widths = {feature: kept[c["name"]] for c in tables["tables"] for feature in c["feature_names"]}
    by_field = pooled("tables")
    assert all(not values[:, widths[name] :].any() for name, values in by_field.items()), "rows end in zeros"
    by_field = {name: values[:, : widths[name]] for name, values in by_field.items()}
    concat = torch.cat([by_field[name] for name in slices if name in by_field], 1)
    assert torch.allclose(concat, views.concat, atol=1e-6)
    assert torch.allclose(sum(pooled("first_order").values())[:, 0], views.first_order, atol=1e-6)  # type: ignore[index]
    # Everything else the model knows is beside it.
    network = load_file(tmp_path / "out" / "network.safetensors")
    state = {n: v for n, v in model.state_dict().items() if n not in ("tables.weight", "tables.first_order")}
    assert set(network) == set(state)
    assert all(torch.equal(network[name], state[name]) for name in state)


@pytest.mark.skipif(importlib.util.find_spec("torchrec") is None, reason="torchrec is not installed")
def test_torchrec_reads_what_the_readme_says(tmp_path):
    model = model_of("deepfm", schema_of(), uniform_blocks)
    manifest = export(model, "torchrec", tmp_path / "out")
    batch = batch_of(model, 9)
    torch.save(batch["ids"], tmp_path / "ids.pt")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), flags=re.DOTALL)
    script = f"""{code}
ids = torch.load({str(tmp_path / "ids.pt")!r})
features = to_features(ids, {manifest["inputs"]["ids"]["columns"]!r})
for kind in ("tables", "first_order"):
    pooled = load_collection(".", kind)(features).to_dict()
    print(json.dumps({{name: values.tolist() for name, values in pooled.items()}}))
rows = {{name: f.values().tolist() for c in load_unpooled(".").values() for name, f in c(features).items()}}
print(json.dumps(rows))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    by_field, first_order, rows = (json.loads(line) for line in done.stdout.splitlines()[-3:])
    views = model.tables(batch["ids"])
    widths = dict(zip([f.name for f in model.schema.id_fields], model.tables.widths, strict=True))
    concat = torch.cat([torch.tensor(v)[:, : widths[name]] for name, v in by_field.items()], 1)
    assert torch.allclose(concat, views.concat, atol=1e-6)
    assert torch.allclose(sum(torch.tensor(v) for v in first_order.values())[:, 0], views.first_order, atol=1e-6)
    assert rows == {name: by_field[name] for name in ("f0", "f1")}


def test_torchrec_refuses_what_its_configs_cannot_say(tmp_path):
    with pytest.raises(PlanError, match=r"table 'f0' stores rows of several widths.*export as pt2 or onnx"):
        export(model_of("fnn", schema_of(), mixed_blocks), "torchrec", tmp_path / "out")
    fields = [FieldSpec(name=p, type="multi", max_len=2, pooling=p, table="t", vocab_size=9) for p in ("sum", "mean")]
    with pytest.raises(PlanError, match="fields 'sum' and 'mean' share table 't'"):
        export(model_of("fnn", Schema(label="y", fields=tuple(fields))), "torchrec", tmp_path / "out")
    with pytest.raises(EmbtrimError, match=r"no tables of torch.float64.*float\(\)"):
        export(model_of("fnn", schema_of()).double(), "torchrec", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- errors --------------------------------------------------------------------------------------------------------------


def test_it_refuses_models_that_are_not_ready(tmp_path):
    model = model_of("fnn", schema_of())
    with (
        model.tables.gated(slot_gate=lambda concat: concat),
        pytest.raises(EmbtrimError, match="masked by a gate"),
    ):
        export(model, "pt2", tmp_path / "out")
    RowAdam(model.tables)
    with pytest.raises(EmbtrimError, match=r"row optimiser .*attach\(None\)"):
        export(model, "pt2", tmp_path / "out")
    for example, given in ((None, "none"), (torch.zeros(1, 3), "one of 1")):
        with pytest.raises(ConfigError, match=f"a Linear does not say what it reads: .* two rows, .*; given {given}"):
            export(nn.Linear(3, 1), "pt2", tmp_path / "out", example=example)
    task = foreign_task()
    small = compact(task.model, task.full_plan().with_bits({"item": 8}))
    with pytest.raises(EmbtrimError, match=r"8 bits for the table of 'item', which is fp32 still; .*quantize\(model\)"):
        export(small, "pt2", tmp_path / "out", example=next(foreign_batches())[0])
    with pytest.raises(ConfigError, match=r"format .torchrec. describes models of embtrim\.models, not a Linear"):
        export(nn.Linear(3, 1), "torchrec", tmp_path / "out", example=torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"\(Jagged: .*'numel'\); export a module whose forward takes tensors"):
        export(nn.Linear(3, 1), "pt2", tmp_path / "out", example=Jagged(torch.zeros(2, 3)))
    with pytest.raises(ConfigError, match="fnn says itself what it reads; leave out example"):
        export(model_of("fnn", schema_of()), "pt2", tmp_path / "out", example=torch.zeros(2, 3))
    assert not list(tmp_path.iterdir())


def test_it_replaces_nothing_but_an_earlier_export(tmp_path):
    model = model_of("lr", schema_of())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match="mine exists"):
        export(model, "pt2", tmp_path / "mine")
    with pytest.raises(DataError, match="mine is not an earlier export"):
        export(model, "pt2", tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(ConfigError, match="external_data is for format 'onnx'"):
        export(model, "pt2", tmp_path / "out", external_data=True)


def test_onnx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbtrimError, match=r"needs onnx and onnxscript; pip install embtrim\[export\]"):
        export(model_of("lr", schema_of()), "onnx", tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path):
    """In a process of its own, which torch's writer would take down."""
    script = f"""
import resource
from embtrim import EmbtrimError, Schema, export, models
model = models.LR(Schema.from_sizes([200]))
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
for format in ("pt2", "torchrec"):
    try:
        export(model, format, {str(tmp_path / "out")!r})
    except EmbtrimError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out could not be written") == done.stdout.count("File too large") == 2
    assert not list(tmp_path.iterdir())
