"""RunRecord: one trained model, what it was, what it cost, how well it does."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from embtrim._version import __version__
from embtrim.compaction.verification import Verification
from embtrim.config import Config, describe_errors
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError
from embtrim.experiments.settings import RunConfig
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Bits, Target
from embtrim.system.files import write_then_rename
from embtrim.system.machine import processor_name
from embtrim.training.devices import kernels_used
from embtrim.training.evaluation import evaluate
from embtrim.training.settings import FitResult

RECORD_VERSION = 1

# The file of published records: one record a line.
RECORDS_FILE = "records.jsonl"


class RunRecord(Config):
    """One trained model: what it was, what it cost, how well it does. Written as JSON.

    Attributes:
        variant: "full", or the label of what sized it: the name of the method, or of a variant in `compare`.
        method: name of the method in the records of `compare`; None in those of `run`, whose variant is the method.
        budget: as asked for; None for the full model.
        data: fingerprint, folder and rows of the encoded data.
        valid, test: metrics of the splits, see Metrics; empty where the split is missing.
        num_params: embedding parameters, projections included, without first-order weights.
        target: of the run, see RunConfig.
        counted_vocabulary_bytes: what the vocabulary takes of the budget; None where that need not hold it, see `search`.
        bits: of the stored values, "mixed" if tables may differ; metrics and bytes are those of the quantised model, if there
            are fewer than 32.
        table_bytes: bytes of embedding tables and first-order weights, as the target of the run stores them.
        bundle_bytes: bytes of the saved bundle on disk, vocabulary included.
        vocabulary_bytes: of these those of the encoder; 0 where no bundle was saved.
        widths: columns that each field's rows store; their mean over the compact rows where these have several.
        kept_rows: compact rows of each table.
        search_seconds: of the search alone, its own pretraining included; 0 for the full model.
        search_peak_bytes: peak anonymous memory of the search alone, above what was resident at its start.
        epoch_seconds: one training epoch of the full model, validation not included.
        search_epochs: search_seconds / epoch_seconds.
        train_seconds: of training this model, validation included.
        rows_per_second: see FitResult, as for compile_seconds.
        peak_memory_bytes: peak anonymous memory of the process over search and training; None where the system does
            not tell.
        verification: compact against masked, see Verification; None for the full model.
        versions: of embtrim, see `code_version`, torch, Python, and the kernels.
        hardware: processor, threads and device.
    """

    record_version: int = RECORD_VERSION
    variant: str
    method: str | None = None
    model: str
    hparams: dict[str, Any]
    train: dict[str, Any]
    search: dict[str, Any] = Field(default_factory=dict)
    budget: str | None = None
    init: str | None = None
    seed: int
    data: dict[str, Any]
    valid: dict[str, Any]
    test: dict[str, Any]
    num_params: int
    num_full_params: int
    num_first_order_params: int
    bits: Bits = 32
    target: Target | None = None
    table_bytes: int
    model_params: int
    bundle_bytes: int
    vocabulary_bytes: int = 0
    counted_vocabulary_bytes: int | None = None
    widths: dict[str, int | float]
    full_width: int
    kept_rows: dict[str, int]
    num_rows: dict[str, int]
    search_seconds: float
    search_peak_bytes: int | None = None
    epoch_seconds: float | None = None
    search_epochs: float
    train_seconds: float
    epochs: int
    rows_per_second: float
    compile_seconds: float = 0.0
    precision: str
    peak_memory_bytes: int | None
    verification: dict[str, Any] | None = None
    versions: dict[str, str]
    hardware: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write the record as JSON."""
        write_then_rename(Path(path), lambda file: file.write(self.model_dump_json(indent=1).encode()))

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a record.

        Raises:
            DataError: the file is not a record, is damaged, or is of another version.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a run record ({error})") from None
        return _parse_record(text, str(path))


def _parse_record(text: str, where: str) -> RunRecord:
    """The record that a JSON text holds; errors name `where` it stands."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not a run record ({error})") from None
    version = values.get("record_version") if isinstance(values, dict) else None
    if version != RECORD_VERSION:
        given = (
            "it has no record_version" if version is None else f"version {version}, this release reads {RECORD_VERSION}"
        )
        raise DataError(f"{where} is not a run record that can be read: {given}")
    try:
        return RunRecord.model_validate(values)
    except ValidationError as error:
        first = describe_errors(RunRecord, error, "").splitlines()[0]
        raise DataError(f"{where} is a damaged run record: {first}") from None


@cache
def code_version() -> str:
    """The release, and a digest of the sources that run: what a change of the code may have changed shows in a record."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{__version__}+{digest[:8]}"


@dataclass
class Trained:
    """A model of a run with its record, and its plan unless it is the full one."""

    model: CTRModel
    record: RunRecord
    plan: SizePlan | None = None


def make_record(
    variant: str,
    model: CTRModel,
    data: EncodedDataset,
    config: RunConfig,
    result: FitResult,
    seed: int,
    peak_bytes: int | None,
    *,
    epoch_seconds: float,
    method: str | None = None,
    search: dict[str, Any] | None = None,
    budget: str | None = None,
    bits: Bits = 32,
    search_seconds: float = 0.0,
    search_peak_bytes: int | None = None,
    verification: Verification | None = None,
) -> RunRecord:
    """Evaluate a trained model and write down everything about it."""
    plan = model.tables.plan
    stored_widths = {t.name: t.mean_width for t in plan.tables}
    versions = {"embtrim": code_version(), "torch": torch.__version__, "python": platform.python_version()}
    kernels = kernels_used(model.tables, config.train)
    if kernels is not None:
        versions["kernels"] = kernels
    return RunRecord(
        variant=variant,
        method=method,
        model=config.model,
        hparams=model.hparams,
        train=config.train.replace(seed=seed).model_dump(),
        search=search or {},
        budget=budget,
        init=None if variant == "full" else config.init,
        seed=seed,
        data={
            "fingerprint": data.schema.fingerprint,
            "folder": None if data.folder is None else data.folder.name,
            "num_rows": {name: data.num_rows(name) for name in data.splits},
        },
        valid=evaluate(model, data, "valid", config.train).to_dict(),
        test=evaluate(model, data, "test", config.train, deciles=True).to_dict(),
        num_params=plan.num_params,
        num_full_params=plan.num_full_params,
        num_first_order_params=plan.num_first_order_params,
        bits=bits,
        target=config.target,
        table_bytes=plan.num_bytes(config.target),
        counted_vocabulary_bytes=plan.vocabulary_bytes,
        model_params=plan.num_params
        + plan.num_first_order_params
        + sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tables.")),
        bundle_bytes=0,
        widths={f.name: stored_widths[f.table_name] for f in data.schema.id_fields},
        full_width=plan.width,
        kept_rows={t.name: t.num_compact_rows for t in plan.tables},
        num_rows={t.name: t.num_rows for t in plan.tables},
        search_seconds=search_seconds,
        search_peak_bytes=search_peak_bytes,
        epoch_seconds=epoch_seconds,
        search_epochs=search_seconds / max(epoch_seconds, 1e-9),
        train_seconds=result.seconds,
        epochs=len(result.history),
        rows_per_second=result.rows_per_second,
        compile_seconds=result.compile_seconds,
        precision=result.precision,
        peak_memory_bytes=peak_bytes,
        verification=None if verification is None else vars(verification),
        versions=versions,
        hardware={"processor": processor_name(), "threads": torch.get_num_threads(), "device": config.train.device},
    )


def read_records(folder: str | Path) -> list[RunRecord]:
    """The records of a run or a comparison.

    A run and a grid in progress write one file a record, `records/*.json`. Records that are published stand in one
    file, `records.jsonl`: one record a line, in the order of the names that their files had. Both give the same list. A
    folder with both `records/*.json` and `records.jsonl` is rejected: nothing tells which of them is meant.

    Args:
        folder: The folder of the run or comparison, or a folder that holds the `*.json` files themselves.

    Raises:
        DataError: there is no such folder, it holds no records or both kinds of files, or a record is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the --out folder of `embtrim run`")
    inside = folder / "records" if (folder / "records").is_dir() else folder
    paths, lines = sorted(inside.glob("*.json")), folder / RECORDS_FILE
    if not lines.exists():
        if not paths:
            raise DataError(f"{folder} holds no records (records/*.json); give the --out folder of `embtrim run`")
        return [RunRecord.load(path) for path in paths]
    if inside != folder and paths:
        raise DataError(f"{folder} has both {inside.name}/*.json and {RECORDS_FILE}; remove one of them")
    return _read_lines(lines)


def _read_lines(path: Path) -> list[RunRecord]:
    """The records of a file with one record a line."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    records = [_parse_record(text, f"{path} line {n:,}") for n, text in enumerate(lines, start=1) if text.strip()]
    if not records:
        raise DataError(f"{path} holds no records; give the --out folder of `embtrim run`")
    return records
