"""The bundle: a trained model that scores raw logs, in a folder without pickle; loads without search code or data.

bundle.json          format version, model name and hyper-parameters, metrics, digest of every file; of an updated model
                     which update it is, and of what
model.safetensors    weights and batch-norm statistics
plan.json            layout of the tables (which rows were kept is in the vocabulary, not here)
encoder/             schema.json, vocab.parquet, transforms.json: from raw values to the compact model's ids
README.md            model card
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import embtrim
from embtrim.dataset import EncodedDataset
from embtrim.encoder import Encoder
from embtrim.errors import BundleError, ConfigError, DataError, EmbtrimError
from embtrim.models import MODELS
from embtrim.models.ctr_model import CTRModel
from embtrim.plan import Block, SizePlan
from embtrim.progress import progress_bar
from embtrim.reading import Chunk, ReadOptions, open_log
from embtrim.train import EVAL_BATCH_SIZE, check_data

BUNDLE_VERSION = 1


class Bundle:
    """A saved model with the encoder that feeds it.

    Attributes:
        model: the model in eval mode, full or compact.
        encoder: raw rows -> ids of this model.
        info: contents of bundle.json.
    """

    def __init__(self, model: CTRModel, encoder: Encoder, info: dict[str, Any]) -> None:
        self.model = model
        self.encoder = encoder
        self.info = info

    def predict(self, rows: pl.DataFrame | str | Path, options: ReadOptions | None = None) -> np.ndarray:
        """float32 probabilities (N,) of raw rows, in order; values never seen read the OOV row.

        Args:
            rows: a frame, or a log on disk.
            options: how to read the log, see ReadOptions.

        Raises:
            DataError: a column is missing or holds what its field cannot read.
        """
        if isinstance(rows, pl.DataFrame):
            return self.predict_chunk(rows)
        parts = list(self.predict_chunks(rows, options))
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def predict_chunks(self, source: str | Path, options: ReadOptions | None = None) -> Iterator[np.ndarray]:
        """Probabilities of a log on disk chunk by chunk, in bounded memory."""
        for chunk in open_log(source, options).chunks(self.encoder.columns):
            yield self.predict_chunk(chunk)

    @torch.no_grad()
    def predict_chunk(self, rows: pl.DataFrame | Chunk) -> np.ndarray:
        """Probabilities of one chunk of raw rows."""
        encoded = self.encoder.encode_chunk(rows)
        scores = np.empty(len(encoded), np.float32)
        for start in range(0, len(encoded), EVAL_BATCH_SIZE):
            part = slice(start, start + EVAL_BATCH_SIZE)
            dense = None if encoded.dense is None else torch.from_numpy(encoded.dense[part])
            scores[part] = self.model(torch.from_numpy(encoded.ids[part]), dense).sigmoid().numpy()
        return scores


def write_predictions(
    bundle: Bundle,
    source: str | Path,
    out: str | Path,
    *,
    keep: Sequence[str] = (),
    options: ReadOptions | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> int:
    """Score a log on disk in bounded memory and write a column `score`; returns the number of rows.

    Args:
        bundle: the model.
        source: the raw log.
        out: file to write, `.parquet` or `.csv`; under a temporary name until it is complete.
        keep: columns of the log to copy beside the scores.
        options: how to read the log.
        overwrite: replace an existing file.
        progress: show a bar on stderr.

    Raises:
        ConfigError: `out` has another suffix.
        DataError: the log lacks a column or holds what a field cannot read; `out` exists; the disk is full.
    """
    out = Path(out)
    if out.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"--out takes a .parquet or .csv file, given {str(out)!r}")
    if out.is_dir() or (out.exists() and not overwrite):
        raise DataError(f"{out} exists; choose another name or pass overwrite=True (--overwrite)")
    if "score" in keep:
        raise DataError("column 'score' of the log would collide with the scores; leave it out of keep")
    log = open_log(source, options)
    log.require([*bundle.encoder.columns, *keep])
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder, progress_bar(progress) as bar:
        task = bar.add_task("predict", total=None)
        parts: list[Path] = []
        try:
            for chunk in log.chunks(list(dict.fromkeys([*bundle.encoder.columns, *keep]))):
                scores = pl.Series("score", bundle.predict_chunk(chunk))
                part = pl.DataFrame([*(chunk.frame[name] for name in keep), scores])
                parts.append(Path(folder) / f"{len(parts):06d}.parquet")
                part.write_parquet(parts[-1])
                rows += len(part)
                bar.update(task, completed=rows, total=rows / max(chunk.done, 1e-9))
            whole = (
                pl.scan_parquet(parts) if parts else pl.LazyFrame(schema=dict.fromkeys([*keep, "score"], pl.Float32))
            )
            complete = Path(folder) / f"complete{out.suffix}"
            (whole.sink_parquet if out.suffix == ".parquet" else whole.sink_csv)(complete)
            os.replace(complete, out)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{out} could not be written: {error}; free space or choose another place") from None
    return rows


def save(
    model: CTRModel,
    folder: str | Path,
    data: EncodedDataset,
    *,
    plan: SizePlan | None = None,
    metrics: dict[str, Any] | None = None,
    update: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a model as a bundle; written under a temporary name, then renamed.

    Args:
        model: full or compact zoo model; quantised, if its plan says fewer than 32 bits.
        folder: where to.
        data: the encoded data it was trained on (either the stored or the re-coded ids): their folder holds the
            vocabulary, without which raw logs cannot be scored.
        plan: the plan with its rows, if rows were dropped and `data` are not re-coded.
        metrics: noted in bundle.json and the model card.
        update: which update of which bundle this is, noted likewise; see `embtrim.update`.
        overwrite: replace an existing bundle.

    Raises:
        BundleError: the folder exists, or the data were made in memory and have no vocabulary.
        EmbtrimError: the plan says fewer than 32 bits and the tables are fp32.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise BundleError(f"{folder} exists; choose another name or pass overwrite=True")
    if data.folder is None:
        raise BundleError("these data were made in memory and have no vocabulary on disk; encode a log first")
    model.tables.check_quantized()
    id_maps = data.id_maps or (data.recode(plan).id_maps if plan is not None else {})
    check_data(model, data.with_id_maps(id_maps))
    encoder = Encoder.load(data.folder)
    encoder = encoder.with_id_maps(id_maps) if id_maps else encoder
    with write_folder(folder, what="bundle") as temporary:
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(state, temporary / "model.safetensors")
        layout_only(model.tables.plan).save(temporary / "plan.json")
        encoder.save(temporary / "encoder")
        info = {
            "bundle_version": BUNDLE_VERSION,
            "embtrim": embtrim.__version__,
            "model": model.name,
            "hparams": model.hparams,
            "schema": model.schema.fingerprint,
            "metrics": metrics or {},
            **({} if update is None else {"update": update}),
        }
        (temporary / "README.md").write_text(model_card(model, info), "utf-8")
        info["files"] = {
            str(path.relative_to(temporary)): file_digest(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        (temporary / "bundle.json").write_text(json.dumps(info, indent=1), "utf-8")


@contextmanager
def write_folder(folder: Path, what: str) -> Iterator[Path]:
    """A folder under a temporary name, to be filled inside a `with` block; it then takes the place of `folder`.

    Raises:
        BundleError: it could not be written; `folder` is as it was.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except (OSError, SafetensorError, pl.exceptions.PolarsError) as error:
        # safetensors and polars write from Rust, and wrap a full disk in errors of their own.
        raise BundleError(
            f"{what} {folder} could not be written: {getattr(error, 'strerror', None) or error}; "
            "free space or choose another place"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_bundle(folder: str | Path) -> Bundle:
    """Open a bundle; every file's digest is checked.

    Raises:
        BundleError: the folder is no bundle, a file is missing, truncated or changed, or the version is newer.
    """
    folder = Path(folder)
    try:
        info = json.loads((folder / "bundle.json").read_text("utf-8"))
        version, files = info["bundle_version"], info["files"]
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{folder} is no bundle: it has no bundle.json; write one with `embtrim run` or embtrim.save"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder / 'bundle.json'} is damaged ({error}); save the bundle again") from None
    if version != BUNDLE_VERSION:
        raise BundleError(
            f"{folder} has bundle version {version}, this release reads {BUNDLE_VERSION}; upgrade embtrim"
        )
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{folder} is incomplete: {name} is missing; copy or save the bundle again")
        if file_digest(path) != digest:
            raise BundleError(f"{path} was changed or truncated (its digest differs); copy or save the bundle again")
    try:
        encoder = Encoder.load(folder / "encoder")
        plan = SizePlan.load(folder / "plan.json", rows=False)
        model = MODELS[info["model"]](encoder.schema, plan=plan, **info["hparams"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (KeyError, TypeError, RuntimeError, SafetensorError, EmbtrimError) as error:
        raise BundleError(
            f"{folder} cannot be opened ({type(error).__name__}: {error}); save the bundle again"
        ) from None
    return Bundle(model.eval(), encoder, info)


def layout_only(plan: SizePlan) -> SizePlan:
    """The plan without the rows it chose and without search details: all that loading a model needs."""
    tables = tuple(
        dataclasses.replace(t, blocks=tuple(Block(b.num_rows, b.columns, b.alignment) for b in t.blocks))
        for t in plan.tables
    )
    return dataclasses.replace(plan, tables=tables, details={})


def model_card(model: CTRModel, info: dict[str, Any]) -> str:
    """README.md of a bundle."""
    plan = model.tables.plan
    lines = [
        f"# {model.name} ({plan.method})",
        "",
        f"Saved by embtrim {info['embtrim']}. Schema {model.schema.describe()}.",
        "",
        "```",
        plan.summary(),
        "```",
        "",
    ]
    if "update" in info:
        lines.append(f"- update {info['update']['number']}, of the bundle {info['update']['of'][:12]}")
    for split, values in info["metrics"].items():
        numbers = ", ".join(f"{k} {v:.5f}" for k, v in values.items() if isinstance(v, float))
        lines.append(f"- {split}: {numbers}")
    lines += ["", "Score a raw log with `embtrim predict THIS_FOLDER LOG --out scores.parquet`.", ""]
    return "\n".join(lines)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
