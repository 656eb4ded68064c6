"""Export to TorchRec: configs and weights say what the model reads."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from embtrim.errors import EmbtrimError, PlanError
from embtrim.schema import FieldSpec, Schema
from embtrim.serving.exporting import export
from embtrim.serving.torchrec import torchrec_name
from tests.serving.export_models import batch_of, mixed_blocks, model_of, schema_of, uniform_blocks


def test_torchrec_tables_pool_to_what_the_model_reads(tmp_path):
    """Configs and weights, read with embedding_bag alone, give every field's columns of `concat`."""
    model = model_of("deepfm", schema_of(), uniform_blocks)
    export(model, "torchrec", tmp_path / "out")
    ids = batch_of(model, 9)["ids"]
    tables = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert tables["removed_tables"] == ["f2"]
    assert torchrec_name("item.type") == "table_item%2Etype"
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
    # All other weights of the model are in network.safetensors.
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
