"""Valid files of every kind that embtrim reads, what opens them, and mutations of them.

`tests/test_broken_files.py` draws some mutations with hypothesis; `benchmarks/fuzz_files.py` draws many.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import embtrim
from embtrim.config import read_toml
from embtrim.data.dataset import EncodedDataset, SplitArrays
from embtrim.data.encoder import Encoder
from embtrim.data.profile import Profile
from embtrim.experiments.grid import read_skipped
from embtrim.experiments.records import read_records
from embtrim.experiments.settings import RunConfig
from embtrim.models import build
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.reports.run_page import render_page
from embtrim.reports.run_tables import terminal_table
from embtrim.schema import FieldSpec, Schema
from embtrim.serving.bundle import load_bundle, save
from embtrim.serving.bundle_files import contents_digest, files_of
from embtrim.serving.manifest import is_export
from embtrim.system.folders import file_digest
from embtrim.training.fitting import fit
from embtrim.training.settings import Hooks, TrainConfig

RAW = pl.DataFrame(
    {
        "user": [f"u{i % 5}" for i in range(40)],
        "item": [f"i{i % 7}" for i in range(40)],
        "tags": ["|".join(f"t{j % 4}" for j in range(i % 3)) for i in range(40)],
        "price": [float(i % 11) for i in range(40)],
        "age": [float(i % 9) for i in range(40)],
        "click": [int(i % 5 < 2) for i in range(40)],
    }
)
SCHEMA = Schema(
    label="click",
    fields=(
        FieldSpec(name="user"),
        FieldSpec(name="item", hash_size=16),
        FieldSpec(name="tags", type="multi", separator="|", max_len=2),
        FieldSpec(name="price", type="numeric", transform="quantile:4"),
        FieldSpec(name="age", type="dense", transform="standard"),
    ),
)
TRAIN = TrainConfig(epochs=1, batch_size=16, precision="fp32", checkpoint_seconds=0)
# What a stranger writes where a number, a text or a list belongs.
ODD_VALUES = (
    None, True, -1, 0, 1, 2, 1.5, -0.0, 2**31, 2**63 - 1, 10**40, 1e300, float("nan"), float("inf"), "", "x", "1", "é\x1b[31m\n",
    "../../x", "a" * 5000, [], {}, [1], ["x"], {"x": 1}, [[[[]]]], [None], "=1+1", 65_536, 10**9,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A folder of valid files, and what opens it.

    Attributes:
        name: Name of the folder.
        make: Writes the files into the folder.
        open: Opens them, and uses what they hold.
        seal: Brings digests in line with the files, as a stranger can.
    """

    name: str
    make: Callable[[Path], object]
    open: Callable[[Path], object]
    seal: Callable[[Path], object] = lambda folder: None


# ---- the kinds ---------------------------------------------------------------------------------------------------


def _encoded(folder: Path) -> EncodedDataset:
    return embtrim.encode(RAW, SCHEMA, out=folder, split="8:1:1", overwrite=True)


def _use_encoded(folder: Path) -> None:
    Encoder.load(folder).encode_chunk(RAW)
    data = EncodedDataset.load(folder)
    for split in data.splits:
        for _ in data.batches(split, 16):
            pass
        data.value_counts(split)
    Profile.load(folder)


def _plan_of(schema: Schema) -> SizePlan:
    """Rows and columns are dropped; tables have several widths and bits."""
    full = SizePlan.full(schema, 4)
    user, item, tags, price = full.tables
    listed = np.arange(item.num_rows - 4, dtype=np.int32)
    tables = (
        TablePlan("user", user.num_rows, 4, (Block(user.num_rows, (0, 2)),), bits=8),
        TablePlan("item", item.num_rows, 4, (Block(len(listed), (0, 1, 2, 3), rows=listed),), bits=4),
        TablePlan(tags.name, tags.num_rows, 4, (Block(tags.num_rows, (1, 3), "project"),), bits=16),
        price,
    )
    return SizePlan(full.fingerprint, 4, tables, method="guided", details={"config": {"min_dim": 1}, "scores": [0.5]})


def _saved(folder: Path) -> None:
    data = _encoded(folder.with_name("bundle-data"))
    model = embtrim.compact(build("deepfm", data.schema, embedding_dim=4, hidden_units=[4]), _plan_of(data.schema))
    model.tables.quantize_()
    metrics = {"test": {"auc": 0.75, "logloss": 0.5}}
    save(model, folder, data.recode(_plan_of(data.schema)), metrics=metrics, seed=0, overwrite=True)


def _use_bundle(folder: Path) -> None:
    bundle = load_bundle(folder)
    scores = bundle.predict(RAW)
    assert scores.shape == (len(RAW),)


def seal_bundle(folder: Path) -> None:
    """Bring the digests of bundle.json in line with the files."""
    path = folder / "bundle.json"
    with contextlib.suppress(ValueError, TypeError, AttributeError, OSError, RecursionError):
        info = json.loads(path.read_text("utf-8"))
        info["files"] = {name: file_digest(folder / name) for name in files_of(folder)}
        info["digest"] = contents_digest(info)
        path.write_text(json.dumps(info), "utf-8")


def _saved_plan(folder: Path) -> None:
    _plan_of(_encoded(folder.with_name("plan-data")).schema).save(folder / "plan.json")


def _use_plan(folder: Path) -> None:
    data = EncodedDataset.load(folder.with_name("plan-data"))
    for cls in (PlanShape, SizePlan):
        plan = cls.load(folder / "plan.json")
        plan.summary(), plan.num_bytes(), plan.digest, plan.slot_ratio, plan.diff(plan)
    model = embtrim.compact(build("fm", data.schema, embedding_dim=4), plan)
    for batch in data.recode(plan).batches("train", 16):
        model(batch.ids_BC, batch.dense_BE)


def _record(**changes: Any) -> dict[str, Any]:
    scores = {
        "auc": 0.75,
        "logloss": 0.5,
        "calibration": 1.0,
        "num_rows": 9,
        "auc_by_decile": [[1, 9, 2.0, 0.5], [2, 9, 3.0, None]],
    }
    return {
        "record_version": 1, "variant": "full", "model": "fm", "hparams": {"embedding_dim": 4}, "train": {**TRAIN.model_dump(), "embedding_l2": 0.0},
        "seed": 0, "data": {"fingerprint": "0123456789ab", "folder": "data", "num_rows": {"train": 9}}, "valid": scores, "test": scores,
        "num_params": 100, "num_full_params": 100, "num_first_order_params": 10, "table_bytes": 440, "model_params": 120,
        "bundle_bytes": 0, "widths": {"user": 4, "item": 2.5}, "full_width": 4, "kept_rows": {"user": 5}, "num_rows": {"user": 5},
        "search_seconds": 0.0, "search_epochs": 0.0, "train_seconds": 1.0, "epochs": 1, "rows_per_second": 9.0, "precision": "fp32",
        "peak_memory_bytes": None, "versions": {"embtrim": "0.1", "torch": "2"},
        "hardware": {"processor": "p", "threads": 1, "device": "cpu"}, **changes,
    }  # fmt: skip


def _records(folder: Path) -> None:
    verified = {
        "max_difference": 1e-9,
        "num_rows": 9,
        "tolerance": 1e-6,
        "passed": True,
        "against": "masked",
        "checked": {},
    }
    small = _record(
        variant="sseds", budget="50%", num_params=50, table_bytes=200, search={"keep": 1}, verification=verified
    )
    (folder / "records").mkdir(parents=True)
    for name, record in (("full", _record()), ("sseds", small)):
        (folder / "records" / f"{name}.json").write_text(json.dumps(record), "utf-8")
    cell = {"model": "fm", "label": "sseds", "budget": "10%", "seed": 0, "reason": "x"}
    (folder / "skipped.json").write_text(json.dumps([cell]), "utf-8")


def _use_records(folder: Path) -> None:
    records = read_records(folder)
    terminal_table(records)
    render_page(records)
    read_skipped(folder)


def _settings(folder: Path) -> None:
    folder.mkdir(parents=True)
    SCHEMA.replace(where="price >= 1 AND user != 'x'").save_draft(folder / "schema.toml")
    (folder / "config.toml").write_text(
        'seed = 1\nbudget = "10%"\n[train]\nepochs = 2\n[hparams]\nhidden_units = [4]\n', "utf-8"
    )
    (folder / "manifest.json").write_text('{"export_version": 1}', "utf-8")


def _use_settings(folder: Path) -> None:
    is_export(folder)
    Schema.load_draft(folder / "schema.toml")
    config = RunConfig.parse(read_toml(folder / "config.toml"), where="config.toml")
    build(config.model, Schema.from_sizes([3, 4]), **config.hparams)


def _toy() -> EncodedDataset:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (48, 2)).astype(np.int32)
    split = SplitArrays(rows, (rows[:, 0] < 2).astype(np.float32))
    return EncodedDataset(Schema.from_sizes([4, 4]), {"train": split, "valid": split})


def _checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)

    def stop(step: int) -> bool | None:
        if step == 2:
            raise KeyboardInterrupt
        return None

    data = _toy()
    with contextlib.suppress(KeyboardInterrupt):
        fit(
            build("fm", data.schema, embedding_dim=2),
            data,
            TRAIN,
            hooks=Hooks(on_step=stop),
            checkpoint=folder / "state.safetensors",
        )


def _use_checkpoint(folder: Path) -> None:
    data = _toy()
    fit(
        build("fm", data.schema, embedding_dim=2),
        data,
        TRAIN,
        hooks=Hooks(on_step=lambda step: None),
        checkpoint=folder / "state.safetensors",
    )


def _log(folder: Path) -> None:
    folder.mkdir(parents=True)
    RAW.write_csv(folder / "log.csv")


def _use_log(folder: Path) -> None:
    folder.with_name("log-data.schema.toml").unlink(missing_ok=True)
    embtrim.encode(folder / "log.csv", label="click", out=folder.with_name("log-data"), overwrite=True)


KINDS = (
    Kind("encoded", _encoded, _use_encoded),
    Kind("bundle", _saved, _use_bundle, seal_bundle),
    Kind("plan", _saved_plan, _use_plan),
    Kind("run", _records, _use_records),
    Kind("settings", _settings, _use_settings),
    Kind("checkpoint", _checkpoint, _use_checkpoint),
    Kind("log", _log, _use_log),
)


def make_all(root: Path) -> None:
    """Write the valid files of all kinds below `root`."""
    for kind in KINDS:
        kind.make(root / kind.name)
        kind.open(root / kind.name)


def files_below(folder: Path) -> list[Path]:
    """The files that may be mutated."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")


@contextlib.contextmanager
def mutated(kind: Kind, root: Path, random: random.Random) -> Iterator[tuple[Path, str]]:
    """The folder of a kind with one file mutated, and the mutation in words; afterwards the file is as before."""
    folder = root / kind.name
    path = random.choice(files_below(folder))
    before = {p: p.read_bytes() for p in {path, *(p for p in [folder / "bundle.json"] if p.exists())}}
    try:
        content, words = mutate(path, before[path], random)
        path.write_bytes(content)
        if random.random() < 0.8:
            kind.seal(folder)
        yield folder, f"{kind.name}/{path.relative_to(folder)}: {words}"
    finally:
        for place, content in before.items():
            place.write_bytes(content)


# ---- the mutations -----------------------------------------------------------------------------------------------


def mutate(path: Path, content: bytes, random: random.Random) -> tuple[bytes, str]:
    """Other content for a file, and how it differs."""
    if path.suffix == ".json" and random.random() < 0.8:
        return _other_json(content, random)
    if path.suffix == ".safetensors" and random.random() < 0.6:
        return _other_tensors(content, random)
    if path.suffix == ".npy" and random.random() < 0.4:
        return _other_array(path, random)
    if path.suffix == ".npz" and random.random() < 0.5:
        return _other_archive(path, random)
    if path.suffix == ".parquet" and random.random() < 0.5:
        return _other_table(path, random)
    return _other_bytes(content, random)


def _other_bytes(content: bytes, random: random.Random) -> tuple[bytes, str]:
    place, length = random.randrange(len(content) + 1), random.choice([1, 1, 4, 16, 200])
    junk = random.choice(
        [random.randbytes(length), b"\x00" * length, b"\xff" * length, b"[" * length, b'"' * length, b"9" * length]
    )
    how = random.choice(["cut", "remove", "insert", "replace", "repeat", "flip"])
    if how == "cut":
        return content[:place], f"cut at {place}"
    if how == "remove":
        return content[:place] + content[place + length :], f"without {length} bytes at {place}"
    if how == "insert":
        return content[:place] + junk + content[place:], f"{junk[:9]!r}.. ({length}) inserted at {place}"
    if how == "repeat":
        return content[:place] + content[max(0, place - length) :], f"{length} bytes before {place} twice"
    if how == "flip" and place < len(content):
        return content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[
            place + 1 :
        ], f"a bit at {place}"
    return content[:place] + junk + content[place + length :], f"{junk[:9]!r}.. ({length}) written at {place}"


def _other_json(content: bytes, random: random.Random) -> tuple[bytes, str]:
    values = json.loads(content)
    values, words = other_value(values, random)
    return json.dumps(values).encode(), words


def other_value(values: Any, random: random.Random) -> tuple[Any, str]:
    """JSON values with one of them, at any depth, replaced, removed or added."""
    root = [values]
    node: Any = root
    key: Any = 0
    keys: list[Any] = []
    while isinstance(node[key], (dict, list)) and node[key] and random.random() < 0.85:
        node = node[key]
        key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
        keys.append(key)
    how = random.choice(["replace", "replace", "replace", "remove", "add", "double"])
    where = ".".join(map(str, keys)) or "all"
    if how == "remove" and node is not root:
        del node[key]
        return root[0], f"without {where}"
    if how == "add" and isinstance(node, dict):
        node[random.choice(["x", "rows", "bits", "columns", "__class__"])] = random.choice(ODD_VALUES)
        return root[0], f"a key beside {where}"
    if how == "double" and isinstance(node, list) and node is not root:
        node.insert(key, node[key])
        return root[0], f"{where} twice"
    node[key] = value = random.choice(ODD_VALUES)
    return root[0], f"{where} = {str(value)[:40]!r}"


def _other_tensors(content: bytes, random: random.Random) -> tuple[bytes, str]:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    state = header.get("__metadata__", {}).get("state")
    if state is not None and random.random() < 0.7:
        values, words = other_value(json.loads(state), random)
        header["__metadata__"]["state"] = json.dumps(values)
    else:
        header, words = other_value(header, random)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :], f"header: {words}"


def _other_array(path: Path, random: random.Random) -> tuple[bytes, str]:
    array = np.load(path).copy()
    how = random.choice(["type", "shape", "value", "less"])
    if how == "type":
        array = array.astype(random.choice(["f8", "i8", "u1", "?"]))
    elif how == "shape":
        array = array.reshape(-1) if array.ndim > 1 else array[:, None]
    elif how == "less":
        array = array[:-1]
    elif array.size:
        allowed = [10**9, -(10**9), -1] if array.dtype.kind == "i" else [np.nan, np.inf, -1e30]
        array.reshape(-1)[random.randrange(array.size)] = random.choice(allowed)
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.save(file, array)
    content = path.with_suffix(".tmp").read_bytes()
    path.with_suffix(".tmp").unlink()
    return content, how


def _other_archive(path: Path, random: random.Random) -> tuple[bytes, str]:
    arrays = dict(np.load(path))
    name = random.choice(list(arrays))
    how = random.choice(["float", "matrix", "negative", "large", "longer", "gone", "zeros"])
    array = arrays.pop(name)
    changed = {
        "float": array.astype(float), "matrix": array[None], "negative": -array - 1, "large": array + 10**6,
        "longer": np.append(array, array[-1:] + 1), "zeros": np.zeros(10**6, np.int32),
    }  # fmt: skip
    if how in changed:
        arrays[name] = changed[how]
    target = path.with_suffix(".tmp")
    with open(target, "wb") as file:
        np.savez_compressed(file, **arrays)
    content = target.read_bytes()
    target.unlink()
    assert zipfile.is_zipfile(path)
    return content, f"{name} {how}"


def _other_table(path: Path, random: random.Random) -> tuple[bytes, str]:
    frame = pl.read_parquet(path, glob=False)
    row = random.randrange(max(1, frame.height))
    how = random.choice(["id", "value", "type", "column", "null", "rows", "table"])
    at = pl.int_range(pl.len()) == row
    if how == "id":
        frame = frame.with_columns(
            pl.when(at).then(random.choice([-1, 10**6, 2**31 - 1])).otherwise("id").cast(pl.Int32).alias("id")
        )
    elif how == "value":
        frame = frame.with_columns(pl.when(at).then(pl.lit("u1")).otherwise("value").alias("value"))
    elif how == "type":
        frame = frame.with_columns(
            pl.col(random.choice(["id", "count"])).cast(random.choice([pl.Float64, pl.String, pl.Int64]))
        )
    elif how == "column":
        frame = frame.drop(random.choice(frame.columns))
    elif how == "null":
        frame = frame.with_columns(
            pl.when(at).then(None).otherwise(pl.col(name := random.choice(frame.columns))).alias(name)
        )
    elif how == "rows":
        frame = pl.concat([frame, frame])
    else:
        frame = frame.with_columns(pl.when(at).then(pl.lit("x")).otherwise("table").alias("table"))
    target = path.with_suffix(".tmp")
    frame.write_parquet(target)
    content = target.read_bytes()
    target.unlink()
    return content, f"{how} of row {row}"


def clear(root: Path) -> None:
    """Remove what opening a log wrote."""
    shutil.rmtree(root / "log-data", ignore_errors=True)
