"""The bundle: a folder with a trained model that scores raw logs; no pickle, and no search code or data to load it.

bundle.json          see `Contents` in bundle_files.py: model and hyper-parameters, their origin, metrics, digest of every file and of
                     itself; for an updated model, what the update changed
model.safetensors    weights and batch-norm statistics
plan.json            layout of the tables; the vocabulary, not the plan, says which rows were kept
encoder/             schema.json, vocab.parquet, transforms.json: from raw values to the compact model's ids
profile.json         what the fields of the data hold, see profile.py; older bundles lack it
README.md            model card, see model_card.py
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from embtrim._version import __version__
from embtrim.data.cells import number_columns, row_number
from embtrim.data.dataset import EncodedDataset, Meta
from embtrim.data.encoder import EncodedChunk, Encoder
from embtrim.data.encoder_files import read_schema
from embtrim.data.frames import as_polars
from embtrim.data.log_file import START, Chunk
from embtrim.data.profile import Profile, describe_drift, find_drift
from embtrim.data.read_options import ReadOptions
from embtrim.data.reading import RawLog, open_log, read_ahead
from embtrim.data.recounting import recounted
from embtrim.data.rule_cells import chunk_rows, holds
from embtrim.data.tally import Tally, sample_of
from embtrim.errors import BundleError, EmbtrimError, ModelError
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.rules import parse_rule
from embtrim.serving.bundle_files import (
    BUILD_ERRORS,
    BUNDLE_VERSION,
    check_files,
    check_values,
    check_weights,
    files_of,
    read_contents,
    with_digest,
)
from embtrim.serving.model_card import model_card
from embtrim.system.folders import check_replaceable, file_digest, folder_bytes, write_folder
from embtrim.system.memory import freed_pages_kept
from embtrim.system.tensor_file import write_tensors
from embtrim.training.evaluation import rows_per_batch
from embtrim.training.recoding import data_for

logger = logging.getLogger(__name__)

# Batch norms are folded for so many rows and more: to fold them takes as long as to score some hundred rows.
FOLD_ROWS = 4_096


class Bundle:
    """A saved model with the encoder that feeds it.

    Attributes:
        model: Full or compact model, in eval mode.
        encoder: Encoder from raw rows to the model's ids.
        info: Contents of bundle.json, see Contents.
        profile: Profile of the data that trained the model; None if an earlier release wrote the bundle.
    """

    def __init__(self, model: CTRModel, encoder: Encoder, info: dict[str, Any], profile: Profile | None = None) -> None:
        self.model = model
        self.encoder = encoder
        self.info = info
        self.profile = profile
        self._warned: set[tuple[str, str]] = set()

    def predict(self, rows: pl.DataFrame | str | Path, options: ReadOptions | None = None) -> np.ndarray:
        """float32 probabilities (N,) of raw rows, in order; values never seen read the OOV row.

        Args:
            rows: Frame of polars or pandas, or log on disk.
            options: How to read the log.

        Raises:
            DataError: A column is missing or holds a value that its field cannot read.
        """
        rows = as_polars(rows)
        if isinstance(rows, pl.DataFrame):
            tally = self.tally(rows)
            scores = self.predict_chunk(rows, tally)
            self._warn(tally)
            return scores
        parts = list(self.predict_chunks(rows, options))
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def predict_chunks(self, source: str | Path, options: ReadOptions | None = None) -> Iterator[np.ndarray]:
        """Probabilities of a log on disk, chunk by chunk in bounded memory."""
        with freed_pages_kept():
            log = open_log(source, options)
            tally = self.tally(log)
            columns, numbers = self.columns_of(log)
            chunks = log.chunks(columns, numbers=numbers)
            for encoded in read_ahead(self.encode_chunk(chunk, tally) for chunk in chunks):
                yield self.score(encoded)
            self._warn(tally)

    def predict_chunk(self, rows: pl.DataFrame | Chunk, tally: Tally | None = None) -> np.ndarray:
        """Probabilities of one chunk of raw rows; see `encode_chunk` and `score`."""
        return self.score(self.encode_chunk(rows, tally))

    def encode_chunk(self, rows: pl.DataFrame | Chunk, tally: Tally | None = None) -> EncodedChunk:
        """The ids and dense values of one chunk of raw rows; `tally` counts its values, if given.

        Rows that the schema's `where` leaves out were not among those of training: they are encoded, and not counted.
        """
        kept_N = None if tally is None else self._counted(rows)
        if kept_N is None or kept_N.all():
            return self.encoder.encode_chunk(rows, tally)
        schema = self.encoder.schema
        ids = np.empty((len(kept_N), schema.num_id_columns), np.int32)
        dense = np.empty((len(kept_N), len(schema.dense_fields)), np.float32) if schema.dense_fields else None
        for is_counted in (True, False):
            places = np.flatnonzero(kept_N == is_counted)
            if len(places):
                part = chunk_rows(rows, places) if isinstance(rows, Chunk) else rows[places]
                encoded = self.encoder.encode_chunk(part, tally if is_counted else None)
                ids[places] = encoded.ids
                if dense is not None:
                    dense[places] = encoded.dense
        return EncodedChunk(ids, dense)

    @torch.no_grad()
    def score(self, rows: EncodedChunk) -> np.ndarray:
        """Probabilities of encoded rows: float32 (N,)."""
        scores = np.empty(len(rows), np.float32)
        size = rows_per_batch(torch.device("cpu"))
        model = self.model.folded() if len(rows) >= FOLD_ROWS else self.model
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            dense = None if rows.dense is None else torch.from_numpy(rows.dense[part])
            scores[part] = model(torch.from_numpy(rows.ids[part]), dense).sigmoid().numpy()
        return scores

    def columns_of(self, log: RawLog) -> tuple[list[str], set[str]]:
        """The columns to read of a log that is scored, and those of them that may be read as numbers.

        Columns that only the schema's `where` reads are among them if the log has them all.
        """
        schema = self.encoder.schema
        where = schema.where_columns if set(schema.where_columns) <= set(log.columns) else ()
        return [*self.encoder.columns, *where], set(number_columns(schema)) - set(where)

    def _counted(self, rows: pl.DataFrame | Chunk) -> np.ndarray | None:
        """Whether the schema's `where` keeps each row: bool (N,); None without it, or if the rows lack its columns."""
        schema = self.encoder.schema
        frame = rows.frame if isinstance(rows, Chunk) else rows
        if schema.where is None or not set(schema.where_columns) <= set(frame.columns):
            return None
        chunk = rows if isinstance(rows, Chunk) else Chunk(rows, 0, row_number, 1.0, START)
        return holds(parse_rule(schema.where), chunk, schema.nulls).fill_null(False).to_numpy()

    def tally(self, log: RawLog | pl.DataFrame) -> Tally:
        """An empty tally for a log that this bundle scores."""
        return Tally(self.encoder.schema, sample_of(self.encoder.schema, log), self.profile)

    def _warn(self, tally: Tally) -> None:
        """Log a warning for each field that has drifted, once for each bundle that is open."""
        if self.profile is None:
            return
        found = find_drift(self.profile, tally.counts(), examples=tally.examples)
        new = [drift for drift in found if (drift.field, drift.what) not in self._warned]
        self._warned |= {(drift.field, drift.what) for drift in new}
        for line in describe_drift(new):
            logger.warning("drift: %s", line)


def save(
    model: CTRModel,
    folder: str | Path,
    data: EncodedDataset,
    *,
    plan: SizePlan | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int | None = None,
    version: int = 1,
    update: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a model as a bundle, under a temporary name that is then renamed.

    Args:
        model: Full or compact model of embtrim.models; quantised, if its plan says fewer than 32 bits.
        folder: Folder to write.
        data: Encoded data that it was trained on, re-coded or not. Their folder holds the vocabulary, without which raw
            logs cannot be scored.
        plan: Plan with its rows. Only a compact model that comes from a bundle needs it, and only if `data` are not
            re-coded.
        metrics: Metrics by split, for bundle.json and the model card.
        seed: Seed of training, for bundle.json and the model card.
        version: Version of plan and schema; 1 unless this is an update.
        update: What the update changed; see `embtrim.update`.
        overwrite: Replace an existing bundle or an empty folder; any other folder stays.

    Raises:
        BundleError: The folder exists, or the data were made in memory and have no vocabulary.
        ModelError: The model is not one of embtrim.models; or its plan says fewer than 32 bits and its tables are fp32.
    """
    if not isinstance(model, CTRModel):
        raise ModelError(
            f"a bundle holds a model of embtrim.models, given a {type(model).__name__}; keep its state_dict() and plan.save(), "
            "and load them into compact(model, plan)"
        )
    folder = Path(folder)
    check_out(folder, overwrite)
    if data.folder is None:
        raise BundleError("these data were made in memory and have no vocabulary on disk; encode a log first")
    model.tables.check_quantized()
    id_maps = data_for(model, data if plan is None or data.id_maps else data.recode(plan)).id_maps
    whole = Encoder.load(data.folder)
    encoder = whole.with_id_maps(id_maps) if id_maps else whole
    profile = Profile.load(data.folder)
    with write_folder(folder, what="bundle") as temporary:
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        write_tensors(state, temporary / "model.safetensors")
        layout = model.tables.plan.shape()
        layout.save(temporary / "plan.json")
        encoder.save(temporary / "encoder")
        if profile is not None:
            recounted(profile, data, whole, encoder, id_maps).save(temporary)
        meta = Meta.load(data.folder)
        info = {
            "bundle_version": BUNDLE_VERSION,
            "embtrim": __version__,
            "model": model.name,
            "hparams": model.hparams,
            "schema": model.schema.fingerprint,
            "version": version,
            "data": {
                "num_rows": meta.num_rows,
                "split": None if meta.split is None else meta.split.model_dump(mode="json"),
                "split_seed": meta.seed,
            },
            "seed": seed,
            "metrics": metrics or {},
            "spread": None,
            "update": update,
        }
        (temporary / "README.md").write_text(
            model_card(model.schema, layout, info, folder_bytes(temporary / "encoder")), "utf-8"
        )
        info["files"] = {name: file_digest(temporary / name) for name in files_of(temporary)}
        (temporary / "bundle.json").write_text(with_digest(info), "utf-8")


def check_out(folder: Path, overwrite: bool) -> None:
    """Check that a bundle may be written to a folder.

    Raises:
        BundleError: The folder exists and may not be replaced, or is neither a bundle nor empty.
    """
    check_replaceable(folder, overwrite, "a bundle", lambda path: (path / "bundle.json").exists(), BundleError)


def note_spread(folder: str | Path, metrics: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> None:
    """Note in a bundle and its card how the metrics spread over the seeds of its run.

    Args:
        folder: Folder of the bundle.
        metrics: Metrics by seed and split, of the models of the run that differ only in the seed.

    Raises:
        BundleError: The folder is not a bundle, or its bundle.json is damaged.
    """
    folder = Path(folder)
    info = read_contents(folder)
    if info["bundle_version"] < BUNDLE_VERSION:
        return  # version 1 lacks the facts of a card
    spread: dict[str, Any] = {"seeds": list(metrics)}
    for split, values in info["metrics"].items():
        found = {name: [m[split][name] for m in metrics.values()] for name, v in values.items() if isinstance(v, float)}
        spread[split] = {
            name: {"mean": statistics.fmean(parts), "std": statistics.stdev(parts)} for name, parts in found.items()
        }
    info["spread"] = spread
    schema = read_schema(folder / "encoder")
    plan = PlanShape.load(folder / "plan.json")
    card = model_card(schema, plan, info, folder_bytes(folder / "encoder")).encode()
    info["files"]["README.md"] = hashlib.sha256(card).hexdigest()
    with write_folder(folder, what="bundle") as temporary:
        shutil.copytree(folder, temporary, copy_function=_linked, dirs_exist_ok=True)
        for name, content in (("README.md", card), ("bundle.json", with_digest(info).encode())):
            (temporary / name).unlink()  # a link to the file of the earlier bundle, which stays as it is
            (temporary / name).write_bytes(content)


def _linked(source: str, target: str) -> None:
    """One more name for a file; a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def load_bundle(folder: str | Path) -> Bundle:
    """Open a bundle; every file's digest, shape and size is checked before memory is taken for it.

    Raises:
        BundleError: The folder is not a bundle or its version is newer; a file is missing, truncated, changed, not listed, not
            regular, or a link out of the folder; the files contradict each other; or a weight is NaN or infinite.
    """
    folder = Path(folder)
    info = read_contents(folder)
    check_files(folder, info["files"])
    try:
        plan = PlanShape.load(folder / "plan.json")
        schema = read_schema(folder / "encoder")
        plan.check_schema(schema)
        encoder = Encoder.load(folder / "encoder", {table.name: table.num_compact_rows for table in plan.tables})
        profile = Profile.load(folder)
        make = partial(build, info["model"], schema, plan=plan, **info["hparams"])
        check_weights(folder / "model.safetensors", make)
        model = make()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        check_values(model)
    except (*BUILD_ERRORS, SafetensorError, OSError) as error:
        kind = "" if isinstance(error, EmbtrimError) else f"{type(error).__name__}: "
        words = " ".join(str(error).split())  # torch lists every weight
        words = words if len(words) <= 500 else f"{words[:500]}.."
        raise BundleError(f"{folder} cannot be opened ({kind}{words}); save the bundle again") from None
    return Bundle(model.eval(), encoder, info, profile)
