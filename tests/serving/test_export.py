"""Export: what leaves embtrim agrees with the eager model, at any batch size and without embtrim."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import GetAttrKey, register_pytree_node

import embtrim
from embtrim.compaction.compacting import compact
from embtrim.data.encoder import Encoder
from embtrim.errors import ConfigError, DataError, EmbtrimError
from embtrim.models import MODELS, DeepFM
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.reports.numbers import format_bytes
from embtrim.schema import FieldSpec, Schema
from embtrim.serving import graphs
from embtrim.serving.bundle import load_bundle, save
from embtrim.serving.exporting import export
from embtrim.tables.row_optimizers import RowAdam
from embtrim.testing.toys import foreign_batches, foreign_task
from tests.cli.workshop import call
from tests.serving.export_models import (
    TOLERANCE,
    batch_of,
    check_agreement,
    mixed_blocks,
    model_of,
    schema_of,
    uniform_blocks,
)

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")

# ---- agreement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_compact_model_agrees_as_onnx(name, tmp_path):
    model = model_of(name, schema_of(multi=False), uniform_blocks)
    export(model, "onnx", tmp_path / "out")
    check_agreement(model, tmp_path / "out", "onnx")
    assert not (tmp_path / "out" / "model_ids.onnx.data").exists()


def test_rows_of_several_widths_agree_as_onnx(tmp_path):
    # Without dense fields the export must leave out their first-order term: ONNX leaves a product over nothing unset.
    model = model_of("deepfm", schema_of(dense=False), mixed_blocks)
    export(model, "onnx", tmp_path / "out")
    check_agreement(model, tmp_path / "out", "onnx")


def test_several_values_agree_as_onnx_with_weights_in_a_file_of_their_own(tmp_path):
    model = model_of("lr", schema_of())
    manifest = export(model, "onnx", tmp_path / "out", external_data=True)
    check_agreement(model, tmp_path / "out", "onnx")
    assert manifest["files"]["model_ids.onnx.data"]["bytes"] >= 4 * model.tables.num_rows


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
    trained = [p.requires_grad for p in model.parameters()]
    export(model, "pt2", tmp_path / "out")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == trained


# ---- bundles -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    columns = {name: [f"{name}{i}" for i in rng.integers(0, 30, 400)] for name in ("user", "item")}
    return pl.DataFrame({**columns, "price": rng.normal(size=400), "click": rng.integers(0, 2, 400)})


@pytest.fixture(scope="module")
def bundle_folder(raw, tmp_path_factory) -> Path:
    """The bundle of a compact model with dropped rows; untrained, with weights large enough to tell scores apart."""
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


def test_a_bundle_is_exported_with_all_a_server_needs(bundle_folder, raw, tmp_path, caplog, monkeypatch):
    out = tmp_path / "out"
    done = call("export", bundle_folder, "--format", "onnx", "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    manifest = json.loads((out / "manifest.json").read_text())
    assert json.loads(done.out) == manifest
    assert str(Path(embtrim.__file__).parent).encode() not in (out / "model_ids.onnx").read_bytes()
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"manifest.json"}
    encoder_files = {f"encoder/{name}" for name in ("schema.json", "vocab.parquet", "transforms.json")}
    programs, graph_files = ("encode.py", "check.py"), ("model.onnx", "model_ids.onnx")
    assert found == set(manifest["files"]) == {*programs, *graph_files, "README.md", "golden.json", *encoder_files}
    for name, entry in manifest["files"].items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    # Each table has 11 rows of 2 columns and a first-order weight; in the full model 31 rows (OOV first) of 4 columns.
    assert manifest["table_bytes"] == 2 * 4 * 11 * 3
    assert manifest["full_table_bytes"] == 2 * 4 * 31 * 5
    assert manifest["metrics"] == {"test": {"auc": 0.5}}
    assert manifest["inputs"]["ids"] == {"dtype": "int32", "shape": ["batch", 2], "columns": ["user", "item"]}

    encoded = Encoder.load(out / "encoder").encode_chunk(raw)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    names = {"ids": encoded.ids, "dense": encoded.dense}
    with monkeypatch.context() as patch:  # contextlib.chdir needs Python 3.11
        patch.chdir(out)
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
    assert (done.code, (tmp_path / "apart" / "model_ids.onnx.data").exists()) == (0, True)
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


# ---- errors ------------------------------------------------------------------------------------------------------------
class Jagged:
    """A container that reads the tensors it is made of, as a KeyedJaggedTensor does."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.size = values, values.numel()


register_pytree_node(
    Jagged,
    lambda x: ([x.values], None),
    lambda parts, _: Jagged(*parts),
    flatten_with_keys_fn=lambda x: ([(GetAttrKey("values"), x.values)], None),
)


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
    with pytest.raises(
        EmbtrimError, match=r"8 bits for the table of 'item', which is fp32 still; .*quantize_\(model\)"
    ):
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
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbtrimError, match=r"needs onnx and onnxscript; pip install embtrim\[export\]"):
        export(model_of("lr", schema_of()), "onnx", tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path):
    """Runs in a process of its own, since torch's writer would abort it."""
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
