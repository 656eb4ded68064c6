"""Models for benchmarks/serving_load.py: two logs, and for each an export of the full model and one of a tenth of its bytes.

The bytes are those of model.onnx, which holds tables and vocabulary.

`flights` is the bundled log. `large` is a generated one of 20 fields and millions of distinct values, half of them text: the
tables of its full model take hundreds of megabytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

import embtrim
import growth
from embtrim.data.catalog import BUNDLED_FOLDER

WIDTH, HIDDEN = 16, (128, 128)
SHARE = 0.1
ROWS = 8192
LARGE_ROWS, LARGE_VALUES = 2_000_000, 5_000_000
EPOCHS = {"flights": 3, "large": 1}


def make(name: str, folder: Path) -> None:
    """Write what the contenders of a log need, unless it is there.

    full, small     ONNX exports
    rows.json       raw rows of the log by column, and their ids in each model
    fuxictr.json    the sizes of the full model
    """
    if (folder / "fuxictr.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    log, data = (flights if name == "flights" else large)(folder)
    full = embtrim.models.DeepFM(data.schema, embedding_dim=WIDTH, hidden_units=HIDDEN, dropout=0.2)
    train = embtrim.TrainConfig(epochs=EPOCHS[name], embedding_l2=0)
    embtrim.fit(full, data, train)
    exported(full, data, folder / "full")
    budget = int(SHARE * (folder / "full" / "model.onnx").stat().st_size)
    task = embtrim.CTRTask(full, data)
    plan = embtrim.search(task, embtrim.methods.GuidedConfig(), f"{budget}B", bits="mixed", target="onnx")
    small = embtrim.compact(full, plan, init="low_rank", task=task)
    embtrim.fit(small, data, train)
    embtrim.quantize_(small)
    exported(small, data, folder / "small")
    rows = log.select(name for name in log.collect_schema() if name != data.schema.label).tail(ROWS).collect()
    contents: dict[str, Any] = {}
    for kind in ("full", "small"):
        encoder = embtrim.load_bundle(folder / f"{kind}-bundle").encoder
        contents[kind] = {f"f{i}": ids.tolist() for i, ids in enumerate(encoder.encode_chunk(rows).ids.T)}
        contents["raw"] = rows.select(encoder.columns).to_dict(as_series=False)
    (folder / "rows.json").write_text(json.dumps(contents, default=str))
    sizes = {
        "sizes": [field.vocab_size for field in data.schema.id_fields],
        "width": WIDTH,
        "hidden": HIDDEN,
        "dropout_rates": 0.2,
    }
    (folder / "fuxictr.json").write_text(json.dumps(sizes))


def exported(model: Any, data: Any, out: Path) -> None:
    """Save a model's bundle, and export it."""
    bundle = out.with_name(f"{out.name}-bundle")
    embtrim.save(model, bundle, data, overwrite=True)
    embtrim.export(embtrim.load_bundle(bundle), "onnx", out, overwrite=True)


def flights(folder: Path) -> tuple[pl.LazyFrame, Any]:
    """The bundled log and its encoded data."""
    return pl.scan_parquet(BUNDLED_FOLDER / "flights_2024_01.parquet"), embtrim.load("flights")


def large(folder: Path) -> tuple[pl.LazyFrame, Any]:
    """A generated log and its encoded data, in which every value has a row of its own."""
    log = folder / "log.parquet"
    growth.write_log(log, LARGE_ROWS, LARGE_VALUES)
    columns = [name for name in pl.read_parquet_schema(log) if name != "click"]
    schema = embtrim.Schema.parse({"label": "click", "fields": [{"name": name, "min_count": 1} for name in columns]})
    data = embtrim.encode(log, schema, out=folder / "data", progress=False, overwrite=True)
    return pl.scan_parquet(log), data
