"""RunRecord: what one trained model is, what it cost, and how well it does."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from embtrim._version import __version__
from embtrim.compaction.verification import Verification
from embtrim.config import Config, Entry, describe_errors
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError
from embtrim.experiments.settings import RunConfig, method_config
from embtrim.experiments.sweep import L2Sweep
from embtrim.methods.readings import Readings
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.budget import Budget
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Bits, Target
from embtrim.system.files import write_then_rename
from embtrim.system.machine import processor_name
from embtrim.training.devices import kernels_used
from embtrim.training.evaluation import evaluate
from embtrim.training.settings import FitResult, TrainConfig
from embtrim.untrusted import MAX_JSON_BYTES, open_regular, parse_json, read_bytes

RECORD_VERSION = 1

# The file of published records: one record a line.
RECORDS_FILE = "records.jsonl"


Count = Annotated[int, Field(ge=0)]


class _Scores(Entry):
    """Metrics of a split, as far as tables and pages read them."""

    model_config = ConfigDict(extra="allow")

    auc: FiniteFloat
    logloss: FiniteFloat
    calibration: FiniteFloat
    auc_by_decile: list[tuple[int, int, FiniteFloat, FiniteFloat | None]] | None = None


class _Data(Entry):
    fingerprint: str
    folder: str | None
    num_rows: dict[str, Count]


class _Training(Entry):
    model_config = ConfigDict(extra="allow")

    embedding_l2: FiniteFloat | None = None
    monitor: str = ""


class _Verified(Entry):
    model_config = ConfigDict(extra="allow")

    max_difference: FiniteFloat
    num_rows: Count
    tolerance: FiniteFloat
    passed: bool


class _Hardware(Entry):
    model_config = ConfigDict(extra="allow")

    processor: str = ""
    threads: int = 0
    device: str = ""


def _held_as(kind: type[BaseModel]) -> AfterValidator:
    """A dict that holds what a class describes, or nothing."""

    def check(values: dict[str, Any]) -> dict[str, Any]:
        try:
            if values:
                kind.model_validate_json(json.dumps(values), strict=True)  # "1" is not a number: it stays as it is
        except ValidationError as error:
            raise ValueError(describe_errors(kind, error, "").partition("\n")[0].partition(": ")[2]) from None
        return values

    return AfterValidator(check)


def _check_budget(text: str) -> str:
    return Budget.parse(text).text


Scores = Annotated[dict[str, Any], _held_as(_Scores)]


class RunRecord(Config):
    """What one trained model is, what it cost, and how well it does. Written as JSON.

    Attributes:
        record_version: Version of the record's format.
        variant: "full", or what sized the model: the name of the method, or the label of a variant in `compare`.
        method: Name of the search method in records of `compare`; None in records of `run`, where the variant names it.
        model: Name of the base model.
        hparams: Arguments of the base model.
        train: Settings of training; see TrainConfig.
        search: Settings of the search method; empty for the full model.
        budget: Size limit of the compact tables, as asked for; None for the full model.
        init: Initial weights of the compact model, as asked for; None for the full model.
        started: Initial weights that the compact model had: one of the kinds of `init`, not "auto". None for the full model
            and in records that do not tell.
        predicted_loss: Loss of the validation score that the search predicted; None if it predicts none.
        teacher: Share of the full model's probability in the labels of the compact model's training; see RunConfig. 0
            for the full model.
        seed: Seed of training and search.
        data: Fingerprint, folder and number of rows of the encoded data.
        valid: Metrics on the validation split; see Metrics.
        test: Metrics on the test split; see Metrics.
        num_params: Number of embedding parameters, projections included, without first-order weights.
        num_full_params: Number of embedding parameters of the full model.
        num_first_order_params: Number of first-order weights.
        bits: Bits per stored value in the compact tables, "mixed" if tables may differ. With fewer than 32, metrics and
            bytes are those of the quantised model.
        target: Backend that sizes are counted for; see RunConfig.
        table_bytes: Bytes of embedding tables and first-order weights, as the target stores them.
        model_params: Number of all parameters of the model.
        bundle_bytes: Bytes of the saved bundle on disk, vocabulary included; 0 if no bundle was saved.
        vocabulary_bytes: Bytes of the encoder in the saved bundle; 0 if no bundle was saved.
        counted_vocabulary_bytes: Bytes of the budget that the vocabulary takes; None if the budget does not include it.
        widths: Stored columns per row of each field; the mean over the compact rows if rows differ.
        full_width: Embedding dimension of the full model.
        bits_by_field: Bits per stored value in the table of each field, the mean over its rows if they differ; None in
            records of earlier releases.
        kept_rows: Number of compact rows of each table.
        bytes_by_table: Bytes of each table, first-order weights included, as the target stores it; None in records of
            earlier releases.
        num_rows: Number of rows of each full table.
        search_seconds: Wall time of the search, its own pretraining included; 0 for the full model.
        search_peak_bytes: Peak anonymous memory of the search above what was resident at its start.
        epoch_seconds: Wall time of one training epoch of the full model, without validation.
        search_epochs: Cost of the search in training epochs of the full model: search_seconds / epoch_seconds.
        train_seconds: Wall time of training this model, validation included.
        epochs: Number of epochs trained.
        best_epoch: Epoch whose weights the model has, as in FitResult; None in records of earlier releases.
        l2_sweep: How `train.embedding_l2` was chosen, see `embtrim.experiments.sweep`; None if it was given, and for
            compact models, which train with that of their full model.
        rows_per_second: Training rows per second; see FitResult.
        compile_seconds: Wall time of compilation; see FitResult.
        precision: Precision of the forward pass in training, in words.
        peak_memory_bytes: Peak anonymous memory of the process over search and training; None if the system does not
            tell.
        verification: Comparison of the compact with the masked model; see Verification. None for the full model.
        versions: Versions of embtrim (see `code_version`), torch, Python and the kernels.
        hardware: Processor, number of threads, and device.
    """

    record_version: int = RECORD_VERSION
    variant: str
    method: str | None = None
    model: str
    hparams: dict[str, Any]
    train: Annotated[dict[str, Any], _held_as(_Training)]
    search: dict[str, Any] = Field(default_factory=dict)
    budget: Annotated[str, AfterValidator(_check_budget)] | None = None
    init: str | None = None
    started: str | None = None
    predicted_loss: float | None = None
    teacher: float = 0.0
    seed: int
    data: Annotated[dict[str, Any], _held_as(_Data)]
    valid: Scores
    test: Scores
    num_params: Count
    num_full_params: Count
    num_first_order_params: Count
    bits: Bits = 32
    target: Target | None = None
    table_bytes: Count
    model_params: Count
    bundle_bytes: Count
    vocabulary_bytes: Count = 0
    counted_vocabulary_bytes: Count | None = None
    widths: dict[str, int | float]
    full_width: Count
    bits_by_field: dict[str, FiniteFloat] | None = None
    kept_rows: dict[str, Count]
    bytes_by_table: dict[str, Count] | None = None
    num_rows: dict[str, Count]
    search_seconds: float
    search_peak_bytes: int | None = None
    epoch_seconds: float | None = None
    search_epochs: float
    train_seconds: float
    epochs: int
    best_epoch: int | None = None
    l2_sweep: Annotated[dict[str, Any], _held_as(L2Sweep)] | None = None
    rows_per_second: float
    compile_seconds: float = 0.0
    precision: str
    peak_memory_bytes: int | None
    verification: Annotated[dict[str, Any], _held_as(_Verified)] | None = None
    versions: dict[str, str]
    hardware: Annotated[dict[str, Any], _held_as(_Hardware)]

    def save(self, path: str | Path) -> None:
        """Write the record as JSON."""
        write_then_rename(Path(path), lambda file: file.write(self.model_dump_json(indent=1).encode()))

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a record.

        Raises:
            DataError: The file is not a record, is damaged, or is of another version.
        """
        try:
            text = read_bytes(path, MAX_JSON_BYTES).decode("utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a run record ({error})") from None
        return _parse_record(text, str(path))


def _parse_record(text: str, where: str) -> RunRecord:
    """The record that a JSON text holds; errors name `where` it stands."""
    try:
        values = parse_json(text)
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
    """The release and a digest of all sources: a record tells whether the code has changed since it was made."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{__version__}+{digest[:8]}"


@dataclass
class Trained:
    """A trained model of a run.

    Attributes:
        model: The model.
        record: Its record.
        plan: Plan of a compact model; None for a full one.
        lessons: Data with soft labels of a full model by its share in them, see `taught`; made when first needed, for
            all compact models.
        readings: What `guided` read of a full model; made when first needed, for all budgets.
    """

    model: CTRModel
    record: RunRecord
    plan: SizePlan | None = None
    lessons: dict[float, EncodedDataset] = field(default_factory=dict)
    readings: Readings | None = None


@dataclass(frozen=True)
class FoundPlan:
    """A plan and the cost of its search.

    Attributes:
        plan: The plan found.
        seconds: Wall time of the search, its own pretraining included.
        peak_bytes: Peak anonymous memory of the search above what was resident at its start; None where the system does
            not tell.
        readings: What `guided` read of the full model; None for other methods, and if the plan was on disk.
    """

    plan: SizePlan
    seconds: float
    peak_bytes: int | None
    readings: Readings | None = None


def started_as(plan: PlanShape, init: str) -> str:
    """Initial weights of a plan's compact model: as asked for; for "auto" those that its search planned for, or new ones."""
    if init != "auto":
        return init
    config = plan.details.get("config", {}) if plan.method == "guided" else {}  # "start" of hard_mask is of its search
    return config.get("start") or "scratch"


def make_record(
    model: CTRModel,
    data: EncodedDataset,
    config: RunConfig,
    training: FitResult,
    *,
    peak_bytes: int | None,
    epoch_seconds: float,
    label: str | None = None,
    found: FoundPlan | None = None,
    verification: Verification | None = None,
) -> RunRecord:
    """Evaluate a trained model and write down everything about it.

    Args:
        model: Full or compact model.
        data: Encoded data in the ids that the model reads.
        config: Settings of the run; for a compact model with its method, budget and bits.
        training: Result of `fit`.
        peak_bytes: Peak memory of search and training.
        epoch_seconds: Seconds of one training epoch of the full model; see RunRecord.
        label: Variant of a compact model, if it is not the name of the method.
        found: Plan and cost of the search that sized the model; None for the full model.
        verification: Result of `verify` for a compact model.
    """
    search_seconds = 0.0 if found is None else found.seconds
    sized: dict[str, Any] = {"variant": "full"}
    if found is not None:
        sized = {
            "variant": label or config.method,
            "method": config.method if label else None,
            "search": method_config(config).model_dump(mode="json"),
            "budget": config.limit and config.limit.text,
            "init": config.init,
            "started": started_as(found.plan, config.init),
            "predicted_loss": found.plan.details.get("predicted_loss"),
            "teacher": config.teacher,
            "bits": config.stored_bits,
            "search_peak_bytes": found.peak_bytes,
        }
    return RunRecord(
        **sized,
        **_sizes(model, data, config.target),
        model=config.model,
        hparams=model.hparams,
        train=config.train.replace(seed=config.seed, embedding_l2=config.train.embedding_l2 or 0.0).model_dump(),
        seed=config.seed,
        data={
            "fingerprint": data.schema.fingerprint,
            "folder": None if data.folder is None else data.folder.name,
            "num_rows": {name: data.num_rows(name) for name in data.splits},
        },
        valid=evaluate(model, data, "valid", config.train).to_dict(),
        test=evaluate(model, data, "test", config.train, deciles=True).to_dict(),
        target=config.target,
        search_seconds=search_seconds,
        epoch_seconds=epoch_seconds,
        search_epochs=search_seconds / max(epoch_seconds, 1e-9),
        train_seconds=training.seconds,
        epochs=len(training.history),
        best_epoch=training.best_epoch,
        rows_per_second=training.rows_per_second,
        compile_seconds=training.compile_seconds,
        precision=training.precision,
        peak_memory_bytes=peak_bytes,
        verification=None if verification is None else vars(verification),
        versions=_versions(model, config.train),
        hardware={"processor": processor_name(), "threads": torch.get_num_threads(), "device": config.train.device},
    )


def _sizes(model: CTRModel, data: EncodedDataset, target: Target | None) -> dict[str, Any]:
    """Entries of a record about the sizes of a model's tables; no bundle is saved yet."""
    plan = model.tables.plan
    other_params = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tables."))
    stored_widths = {t.name: t.mean_width for t in plan.tables}
    mean_bits = {
        t.name: sum(rows * bits for rows, bits in t.bands) / rows_of if (rows_of := t.num_compact_rows) else 0.0
        for t in plan.tables
    }
    return {
        "num_params": plan.num_params,
        "num_full_params": plan.num_full_params,
        "num_first_order_params": plan.num_first_order_params,
        "table_bytes": plan.num_bytes(target),
        "counted_vocabulary_bytes": plan.vocabulary_bytes,
        "model_params": plan.num_params + plan.num_first_order_params + other_params,
        "bundle_bytes": 0,
        "widths": {f.name: stored_widths[f.table_name] for f in data.schema.id_fields},
        "bits_by_field": {f.name: mean_bits[f.table_name] for f in data.schema.id_fields},
        "bytes_by_table": {t.name: plan.table_bytes(t, target) for t in plan.tables},
        "full_width": plan.width,
        "kept_rows": {t.name: t.num_compact_rows for t in plan.tables},
        "num_rows": {t.name: t.num_rows for t in plan.tables},
    }


def _versions(model: CTRModel, train: TrainConfig) -> dict[str, str]:
    versions = {"embtrim": code_version(), "torch": torch.__version__, "python": platform.python_version()}
    kernels = kernels_used(model.tables, train)
    return versions if kernels is None else {**versions, "kernels": kernels}


def read_records(folder: str | Path) -> list[RunRecord]:
    """The records of a run or a comparison.

    A run and a grid in progress write one file a record, `records/*.json`. Records that are published stand in one
    file, `records.jsonl`: one record a line, in the order of the names that their files had. Both give the same list. A
    folder with both `records/*.json` and `records.jsonl` is rejected: nothing tells which of them is meant.

    Args:
        folder: The folder of the run or comparison, or a folder that holds the `*.json` files themselves.

    Raises:
        DataError: The folder does not exist, holds no records or both kinds of files, or a record is damaged.
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
    records, number = [], 0
    try:
        with open_regular(path) as file:
            while line := file.readline(MAX_JSON_BYTES + 1):
                number += 1
                if line.strip():
                    records.append(_parse_record(line.decode("utf-8"), f"{path} line {number:,}"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    if not records:
        raise DataError(f"{path} holds no records; give the --out folder of `embtrim run`")
    return records
