"""Files made to harm: each is a valid folder of `tests/broken_files.py` with one thing changed, and digests that fit.

`tests/test_broken_files.py` opens the small ones; `benchmarks/hostile_files.py` opens all and measures.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Hostile:
    """A hostile folder.

    Attributes:
        name: What is wrong with it.
        kind: Kind of its files, see `tests.broken_files.KINDS`.
        harm: Changes a valid folder.
        words: What the answer says.
        large: Whether the file takes seconds to write.
        sealed: Whether digests are brought in line.
    """

    name: str
    kind: str
    harm: Callable[[Path], object]
    words: str
    large: bool = False
    sealed: bool = True


def edit(file: str, *keys: Any, value: Any = None, delete: bool = False) -> Callable[[Path], None]:
    """Set or delete one value of a JSON file."""

    def change(folder: Path) -> None:
        values = json.loads((folder / file).read_text("utf-8"))
        node = values
        for key in keys[:-1]:
            node = node[key]
        if delete:
            del node[keys[-1]]
        elif keys:
            node[keys[-1]] = value
        else:
            values = value
        (folder / file).write_text(json.dumps(values), "utf-8")

    return change


def text(file: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def instead(file: str, put: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something else in the place of a file."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        put(folder / file)

    return change


def rows_of_vocabulary(file: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    return lambda folder: change(pl.read_parquet(folder / file, glob=False)).write_parquet(folder / file)


def bomb(file: str, name: str, num_bytes: int, header: bytes = b"") -> Callable[[Path], None]:
    """An npz whose one member unpacks to that many zeros."""

    def write(folder: Path) -> None:
        with (
            zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(f"{name}.npy", "w", force_zip64=True) as member,
        ):
            member.write(header)
            for _ in range(num_bytes >> 20):
                member.write(bytes(1 << 20))

    return write


def _big_map(folder: Path) -> None:
    """A schema that asks for a hashed table of 250 million rows, and a map of them in a megabyte."""
    rows = 250_000_001
    schema = json.loads((folder / "schema.json").read_text())
    item = next(field for field in schema["fields"] if field["name"] == "item")
    item |= {"hash_size": rows - 1, "vocab_size": rows}
    (folder / "schema.json").write_text(json.dumps(schema))
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({rows},), }}".ljust(117) + "\n"
    bomb("hash_maps.npz", "item", 4 * rows, b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode())(folder)


def _other_ids(folder: Path) -> None:
    ids = np.load(folder / "train" / "ids.npy")
    ids[3, 0] = 1_000
    np.save(folder / "train" / "ids.npy", ids)


def _tensor(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header[name] |= changes
        head = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])

    return change


def _nan(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name].view(-1)[0] = float("nan")
        save_file(weights, folder / "model.safetensors")

    return change


def _link(target: str) -> Callable[[Path], None]:
    return instead("README.md", lambda path: path.symlink_to(target))


VOCAB = "encoder/vocab.parquet"
HOSTILE = (
    # ---- JSON -----------------------------------------------------------------------------------------------------
    Hostile("plan.json of 100,000 [", "plan", text("plan.json", "[" * 100_000), "nested too deeply"),
    Hostile("plan.json with num_rows Infinity", "plan", edit("plan.json", "tables", 0, "num_rows", value=float("inf")), "holds Infinity"),
    Hostile("plan.json with 10**30 columns", "plan", edit("plan.json", "tables", 0, "width", value=10**30), "integer of 31 digits"),
    Hostile("plan.json with width 10**9", "plan", edit("plan.json", "tables", 0, "width", value=10**9), "given 1000000000 columns"),
    Hostile("plan.json with details 'x'", "plan", edit("plan.json", "details", value="x"), "details, given 'x'"),
    Hostile("bundle.json with seed 10**40", "bundle", edit("bundle.json", "hparams", "seed", value=10**40), "integer of 41 digits"),
    Hostile("bundle.json of 100,000 {", "bundle", text("bundle.json", '{"a":' * 100_000), "nested too deeply", sealed=False),
    Hostile("bundle.json with 10**9 hidden units", "bundle", edit("bundle.json", "hparams", "hidden_units", value=[10**9]), "hidden_units"),
    Hostile("bundle.json with 1,000 wide layers", "bundle", edit("bundle.json", "hparams", "hidden_units", value=[1 << 20] * 1000), "cannot be opened"),
    Hostile("plan.json of a bundle with width 60,000", "bundle", edit("plan.json", "tables", 0, "width", value=60_000), "cannot be opened"),
    Hostile("plan.json of a bundle with other rows", "bundle", edit("plan.json", "tables", 0, "num_rows", value=10**9), "not those of its schema"),
    Hostile("transforms.json []", "encoded", text("transforms.json", "[]"), "holds []"),
    Hostile("transforms.json fields [1]", "encoded", text("transforms.json", '{"fields": [1]}'), "fields, given [1]"),
    Hostile("transforms.json unseen_ids 1", "encoded", edit("transforms.json", "unseen_ids", value=1), "unseen_ids, given 1"),
    Hostile("transforms.json field {}", "encoded", edit("transforms.json", "fields", "price", value={}), "lacks edges of field 'price'"),
    Hostile("transforms.json unseen id 10**6", "bundle", edit("encoder/transforms.json", "unseen_ids", value={"user": 10**6}), "'user' has id 1000000"),
    Hostile("meta.json with num_rows 1.5", "encoded", edit("meta.json", "num_rows", "train", value=1.5), "num_rows.train, given 1.5"),
    Hostile('meta.json ["x"]', "encoded", text("meta.json", '["x"]'), "holds ['x']"),
    Hostile("meta.json with split [1]", "encoded", edit("meta.json", "split", value=[1]), "split, given [1]"),
    Hostile("schema.json with hash_size 3,000,000,000", "encoded", edit("schema.json", "fields", 1, "hash_size", value=3 * 10**9), "hash_size, given 3000000000"),
    Hostile("a record with auc NaN", "run", edit("records/full.json", "test", "auc", value=float("nan")), "holds NaN"),
    Hostile("a record with num_rows '1'", "run", edit("records/full.json", "data", "num_rows", "train", value="1"), "num_rows.train, given '1'"),
    Hostile("skipped.json with a model of 300 letters", "run", edit("skipped.json", 0, "model", value="a" * 300), "File name too long"),
    Hostile("a record without auc", "run", edit("records/full.json", "test", "auc", delete=True), "test"),
    # ---- binary files ---------------------------------------------------------------------------------------------
    Hostile("plan.npz PK....", "plan", text("plan.npz", b"PK\x03\x04xxxx"), "not an npz file"),
    Hostile("plan.npz with float rows", "plan", lambda folder: np.savez(folder / "plan.npz", t1b0=np.zeros(13)), "float64 (13,)"),
    Hostile("plan.npz with rows of two dimensions", "plan", lambda folder: np.savez(folder / "plan.npz", t1b0=np.zeros((1, 13), np.int32)), "int32 (1, 13)"),
    Hostile("plan.npz of 1 MB, 1 GB unpacked", "plan", bomb("plan.npz", "t1b0", 1 << 30), "unpacks from", large=True),
    Hostile("hash_maps.npz of 1 MB, 1 GB unpacked", "encoded", _big_map, "unpacks from", large=True),
    Hostile("vocab.parquet of 50 million equal texts", "encoded", rows_of_vocabulary("vocab.parquet", lambda frame: frame.head(1).select(pl.all().repeat_by(50_000_000).explode())), "unpacks to", large=True),
    Hostile("vocab.parquet with 300 texts of 1 MB", "encoded", rows_of_vocabulary("vocab.parquet", lambda frame: pl.concat([frame.head(1)] * 300).with_columns(value=pl.concat_str(pl.lit("a" * 1_000_000), pl.int_range(300).cast(pl.String)))), "unpacks to", large=True),
    Hostile("vocabulary with a value twice", "bundle", rows_of_vocabulary(VOCAB, lambda frame: pl.concat([frame, frame.head(1)])), "twice"),
    Hostile("vocabulary with id -1000000", "bundle", rows_of_vocabulary(VOCAB, lambda frame: frame.with_columns(id=pl.lit(-1_000_000, pl.Int32))), "ids -1000000..-1000000"),
    Hostile("ids beyond their table", "encoded", _other_ids, "ids of field 'user' lie in"),
    Hostile("labels that are NaN", "encoded", lambda folder: np.save(folder / "train" / "labels.npy", np.full(len(np.load(folder / "train" / "labels.npy")), np.nan, np.float32)), "labels lie in nan..nan"),
    Hostile("safetensors with a header of 10**18 bytes", "bundle", text("model.safetensors", struct.pack("<Q", 10**18) + b"{}"), "header is damaged"),
    Hostile("safetensors with a weight of 10**12 rows", "bundle", _tensor("mlp.0.weight", shape=[10**12, 4]), "size mismatch"),
    Hostile("safetensors with codes as another type", "bundle", _tensor("mlp.0.weight", dtype="I32"), "has type I32"),
    Hostile("safetensors with a weight that is NaN", "bundle", _nan("mlp.0.weight"), "'mlp.0.weight' holds nan or infinity"),
    Hostile("8 bits over fp32 weights", "bundle", lambda folder: [edit("plan.json", "tables", place, "bits", value=8)(folder) for place in (3,)], "cannot be opened"),
    Hostile("a missing, unlisted model.safetensors", "bundle", lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    # ---- not files ------------------------------------------------------------------------------------------------
    Hostile("a pipe for plan.json", "bundle", instead("plan.json", os.mkfifo), "not a regular file", sealed=False),
    Hostile("a pipe for meta.json", "encoded", instead("meta.json", os.mkfifo), "not a regular file"),
    Hostile("a link to /dev/zero", "bundle", _link("/dev/zero"), "link out of the folder", sealed=False),
    Hostile("a link to /etc/passwd", "bundle", _link("/etc/passwd"), "link out of the folder", sealed=False),
    # ---- settings and logs ----------------------------------------------------------------------------------------
    Hostile("config.toml of 20,000 [", "settings", text("config.toml", "x = " + "[" * 20_000), "nested too deeply"),
    Hostile("config.toml with an integer of 5,000 digits", "settings", text("config.toml", "seed = " + "9" * 5_000), "more than 64 bits"),
    Hostile("config.toml with seed 2**63", "settings", text("config.toml", f"seed = {2**63}"), "integers have 64 bits"),
    Hostile("schema.toml with hash_size 3,000,000,000", "settings", text("schema.toml", 'label = "click"\n[[fields]]\nname = "a"\nhash_size = 3000000000'), "hash_size, given 3000000000"),
    Hostile("schema.toml with 10**9 buckets", "settings", text("schema.toml", 'label = "click"\n[[fields]]\nname = "a"\ntype = "numeric"\ntransform = "quantile:1000000000"'), "at most 1,048,576 buckets"),
    Hostile("schema.toml with a rule of 20,000 (", "settings", text("schema.toml", f'label = "click"\nwhere = "{"(" * 20_000}a = 1"\n[[fields]]\nname = "a"'), "words and signs"),
    Hostile("a header cell of 140,000 letters", "log", lambda folder: (folder / "log.csv").write_text((folder / "log.csv").read_text().replace("item", "x" * 140_000, 1)), ""),
    Hostile("a header cell with CR", "log", lambda folder: (folder / "log.csv").write_text((folder / "log.csv").read_text().replace("item", '"it\rem"', 1), newline=""), ""),
    Hostile("a checkpoint with deep nesting", "checkpoint", lambda folder: _state(folder, "[" * 100_000), ""),
    Hostile("a checkpoint with a text as best weights", "checkpoint", lambda folder: _best_state(folder, ""), "'str' object has no attribute"),
    Hostile("a checkpoint with no best weight", "checkpoint", lambda folder: _best_state(folder, {"items": []}), "is damaged (KeyError"),
)  # fmt: skip


def _best_state(folder: Path, value: Any) -> None:
    content = (folder / "state.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    state = json.loads(header["__metadata__"]["state"])
    next(item for item in state["values"]["items"] if item[0] == "best_state")[1] = value
    header["__metadata__"]["state"] = json.dumps(state)
    head = json.dumps(header).encode()
    (folder / "state.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])


def _state(folder: Path, state: str) -> None:
    head = json.dumps({"__metadata__": {"state": state}}).encode()
    (folder / "state.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
