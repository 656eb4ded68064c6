"""run: the whole way from encoded data to a smaller, retrained, verified model, with one record a trained model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from embtrim._version import __version__
from embtrim.compaction.compacting import Init, Verification, compact, verify
from embtrim.config import Config, describe_errors, first_change, read_toml, to_toml
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import BudgetError, ConfigError, DataError, EmbtrimError
from embtrim.methods import check_budget, counts_vocabulary, method_named, method_of, search, target_settings
from embtrim.methods.precision import Bits
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel, HyperParameters
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan, Target, write_then_rename
from embtrim.serving.bundle import folder_bytes, note_spread, save
from embtrim.system.memory import peak_memory
from embtrim.tasks.sites import CTRTask
from embtrim.training.checkpoint import CheckpointFolder, checksum, claim
from embtrim.training.fitting import (
    FitResult,
    TrainConfig,
    device_of,
    evaluate,
    fast_matmul,
    fit,
    kernels_used,
    logloss_of_batch,
    make_optimizers,
    training_settings,
)

log = logging.getLogger(__name__)

RECORD_VERSION = 1
# Bisection over budgets for `max_loss`: the smallest budget tried, and how many budgets are tried at most.
SMALLEST_SHARE = 0.01
BISECTIONS = 6
# What bits = "auto" tries. Codes of 8 bits lose nothing that AUC shows (docs/results.md), so that more would be wasted.
TRIED_BITS: tuple[Bits, ...] = (8, "mixed", 4)
# Steps timed for the estimate of a dry run, after one that warms up.
TIMED_STEPS = 5


class RunConfig(Config):
    """Everything that a run depends on, beside the data.

    Attributes:
        model: name of the base model (`embtrim models`).
        hparams: its arguments, such as embedding_dim and hidden_units.
        train: how full and compact models are trained.
        method: name of the search method (`embtrim methods`).
        search: its settings.
        budget: such as "10%", "200MB", "1.5M params".
        max_loss: if set, the budget is ignored and the smallest plan is sought whose validation AUC is at most this
            much below the full model's, by bisection over budgets.
        init: how the compact model starts: "scratch", "initial" or "inherit".
        bits: precision that compact tables are stored in: 32, 16, 8 or 4, see plan.py, or "mixed" for 16, 8 or 4 by
            table, see precision.py. They are trained in fp32 and quantised after that; the same budget then has room for more
            parameters. "auto" trains with 8, mixed and 4 and keeps what has the best validation AUC.
        target: what will store the tables, whose bytes the budget counts, and the vocabulary if it is one in bytes; see
            `search`. None counts the tables' bytes of "torch" alone.
        controls: methods run at the same budget for comparison, with their default settings.
        seed: first seed.
        seeds: how many seeds.
    """

    model: str = "deepfm"
    hparams: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    method: str = "guided"
    search: dict[str, Any] = Field(default_factory=dict)
    budget: str = "10%"
    max_loss: float | None = Field(default=None, gt=0, lt=0.5)
    init: Init = "scratch"
    bits: Literal[Bits, "auto"] = 32
    target: Target | None = None
    controls: tuple[str, ...] = ("uniform",)
    seed: int = Field(default=0, ge=0)
    seeds: int = Field(default=1, ge=1)


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
        """Read a record; DataError if it is none."""
        try:
            values = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no run record ({error})") from None
        version = values.get("record_version") if isinstance(values, dict) else None
        if version != RECORD_VERSION:
            given = (
                "it has no record_version"
                if version is None
                else f"version {version}, this release reads {RECORD_VERSION}"
            )
            raise DataError(f"{path} is no run record that can be read: {given}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise DataError(
                f"{path} is a damaged run record: {describe_errors(cls, error, '').splitlines()[0]}"
            ) from None


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


def run(
    data: EncodedDataset,
    config: RunConfig,
    out: str | Path,
    *,
    progress: bool = False,
    on_record: Callable[[RunRecord], None] | None = None,
) -> list[RunRecord]:
    """Train the full model, search, compact, verify, retrain, and save, for the method and the controls.

    Writes into `out`: config.toml (resolved), records/*.json, plans/*.json, bundles/*. The report is report.py's.
    What is not finished keeps its state in `out`/unfinished, every `train.checkpoint_seconds`: a run that was interrupted
    and is started again goes on from there, and ends as if nothing had happened.

    Args:
        data: encoded data with splits train, valid and test.
        config: see RunConfig.
        out: a new folder, or one of an earlier start with the same config.
        progress: show progress bars on stderr.
        on_record: called with each record as it is written.

    Returns:
        The records: for each seed the full model, the method, the controls.

    Raises:
        DataError: a split is missing, or `out` holds something else.
        BudgetError: the budget is below the smallest plan.
    """
    out = Path(out)
    check_run(data, config)
    _check_folder(out, config)
    out.mkdir(parents=True, exist_ok=True)
    write_then_rename(out / "config.toml", lambda file: file.write(to_toml(config).encode()))
    records = []
    for seed in range(config.seed, config.seed + config.seeds):
        variants = ("full", *dict.fromkeys((config.method, *config.controls)))
        found = {name: _finished(out, name, seed, data, config.target) for name in variants}
        if all(found.values()):
            records += found.values()
            continue
        unfinished = out / "unfinished" / f"seed{seed}"
        # The full model of a run that goes on comes out of its last checkpoint.
        full = train_full(data, config, seed, progress, unfinished / "full.safetensors")
        full.record = found["full"] or _keep(full, data, out, on_record)
        records.append(full.record)
        budget = config.budget
        for variant in variants[1:]:
            record = found[variant]
            if record is None:
                work = unfinished / variant
                if variant == config.method and config.max_loss is not None:
                    trained = smallest_within(full, data, config, seed, config.max_loss, progress, work)
                else:
                    settings = config.search if variant == config.method else {}
                    trained = shrink(full, data, config, variant, settings, budget, seed, progress, unfinished=work)
                record = _keep(trained, data, out, on_record)
                shutil.rmtree(work, ignore_errors=True)
            if variant == config.method:
                budget = record.budget or budget  # with max_loss the controls get what the method needed
            records.append(record)
        shutil.rmtree(unfinished, ignore_errors=True)
    with suppress(OSError):
        (out / "unfinished").rmdir()
    if config.seeds > 1:
        _note_spread(records, out)
    return records


def _check_folder(out: Path, config: RunConfig) -> None:
    """Raise DataError unless `out` is free, or was begun by a run of this config."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    settings = out / "config.toml"
    values = read_toml(settings) if settings.is_file() else {}
    if "method" not in values:
        raise DataError(f"output folder {out} exists and is not empty; choose another or remove it")

    def told(config: RunConfig) -> dict[str, Any]:
        values = config.model_dump(mode="json", exclude={"train": {"checkpoint_seconds"}})
        return {**values, **target_settings(None if config.max_loss else config.budget, config.target)}

    change = first_change(told(RunConfig.parse(values, where=str(settings))), told(config))
    if change is not None:
        raise DataError(
            f"{out} is of a run with {change}; choose another --out, or give the settings of before to go on with it"
        )


def _finished(out: Path, variant: str, seed: int, data: EncodedDataset, target: Target | None) -> RunRecord | None:
    """The record of a model that an earlier start has finished; DataError if it is of other data, or of another budget."""
    path = out / "records" / f"{variant}-seed{seed}.json"
    if not path.exists():
        return None
    record = RunRecord.load(path)
    if record.data["fingerprint"] != data.schema.fingerprint:
        raise DataError(
            f"{path} was made on data {record.data['fingerprint']}, these are {data.schema.fingerprint}; choose another --out"
        )
    if counts_vocabulary(record.budget, target) and record.counted_vocabulary_bytes is None:
        raise DataError(
            f"{path} was made with the vocabulary beside its budget of {record.budget}; choose another --out"
        )
    return record


def check_run(data: EncodedDataset, config: RunConfig) -> None:
    """Raise what a run would raise late: a missing split, unknown names or settings, an impossible budget."""
    for split in ("train", "valid", "test"):
        data.split(split)
    for name in (config.method, *config.controls):
        method_named(name)
    method_named(config.method).parse(config.search)
    device_of(config.train)
    if "embedding_dim" in config.hparams:
        HyperParameters.parse({"embedding_dim": config.hparams["embedding_dim"]}, where="hparams")
    model = build(
        config.model,
        data.schema,
        **{**config.hparams, "embedding_dim": 1} if "embedding_dim" in config.hparams else config.hparams,
    )
    if model.tables.width == 0:
        raise ConfigError(
            f"model {config.model!r} has no embedding tables to shrink, only first-order weights; choose another"
        )
    plan, budget = model.tables.plan, Budget.parse(config.budget)
    if config.max_loss is None:
        width = config.hparams.get("embedding_dim", plan.width)
        bits: Bits = "mixed" if config.bits == "auto" else config.bits
        if bits == 32 or config.target != "fbgemm":
            full = SizePlan.full(data.schema, width, plan.first_order)
            check_budget(full, budget, bits, config.target, method_named(config.method).adds)


def train_full(
    data: EncodedDataset, config: RunConfig, seed: int, progress: bool = False, checkpoint: Path | None = None
) -> Trained:
    """Train the full model of a run and record it; see `fit` for the checkpoint."""
    with peak_memory() as peak:
        model = build(config.model, data.schema, **{**config.hparams, "seed": seed})
        result = fit(model, data, config.train.replace(seed=seed), progress=progress, checkpoint=checkpoint)
    epoch_seconds = data.num_rows("train") / max(result.rows_per_second, 1e-9)
    record = make_record("full", model, data, config, result, seed, peak.bytes, epoch_seconds=epoch_seconds)
    return Trained(model, record)


def shrink(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    method: str,
    settings: dict[str, Any],
    budget: str,
    seed: int,
    progress: bool = False,
    label: str | None = None,
    unfinished: Path | None = None,
) -> Trained:
    """Search, verify, compact, retrain and quantise within one budget, and record it.

    Args:
        full: the trained full model.
        data: its data.
        config: init, bits and the settings of training are read here.
        method: name of the search method.
        settings: its settings.
        budget: such as "10%".
        seed: of the search and of retraining.
        progress: show progress bars on stderr.
        label: the record's variant, if that is not the name of the method.
        unfinished: folder for the state of search and training, from which an interrupted one of the same settings goes
            on.
    """
    bits = config.bits
    if bits == "auto":

        def shrink_to(bits: Bits) -> Trained:
            work = None if unfinished is None else unfinished / f"{bits}-bits"
            return shrink(full, data, config.replace(bits=bits), method, settings, budget, seed, progress, label, work)

        return best_precision(shrink_to)
    train = config.train.replace(seed=seed)
    found = method_named(method)
    parsed = found.parse(settings)
    task = CTRTask(full.model, data, train)
    task.progress = progress
    if unfinished is not None:
        of_search = search_settings(task, parsed, budget, seed, bits, config.target)
        claim(unfinished, {**of_search, "init": config.init})
    with peak_memory() as peak:
        plan, search_seconds, search_peak = _searched(task, parsed, budget, seed, bits, config.target, unfinished)
        verification = verify(full.model, plan, data)
        verification.require()
        small = compact(full.model, plan, init=config.init, seed=seed)
        recoded = data.recode(plan)
        checkpoint = None if unfinished is None else unfinished / "retraining.safetensors"
        result = fit(small, recoded, train, progress=progress, checkpoint=checkpoint)
        if plan.is_quantized:
            small.tables.quantize()
    record = make_record(
        label or method,
        small,
        recoded,
        config,
        result,
        seed,
        peak.bytes,
        method=method if label else None,
        search=parsed.model_dump(mode="json"),
        budget=budget,
        bits=bits,
        search_seconds=search_seconds,
        search_peak_bytes=search_peak,
        epoch_seconds=full.record.data["num_rows"]["train"] / max(full.record.rows_per_second, 1e-9),
        verification=verification,
    )
    return Trained(small, record, plan)


def allowed_bytes(full: SizePlan, config: RunConfig, budget: str | None) -> int:
    """Bytes that compact tables may take within a budget, or without one: at the fewest bits that a table may get."""
    stored = full.with_bits(4 if config.bits in ("mixed", "auto") else config.bits)
    most = stored.num_bytes(config.target)
    return most if budget is None else int(min(most, stored.max_bytes(Budget.parse(budget), config.target)))


def best_precision(shrink_to: Callable[[Bits], Trained]) -> Trained:
    """Of the compact models at 8, mixed and 4 bits the one of the best validation AUC."""
    trials: list[Trained] = []
    for bits in TRIED_BITS:
        trials.append(shrink_to(bits))
        log.info("%s bits: validation AUC %.4f", bits, trials[-1].record.valid["auc"])
    best = max(trials, key=lambda trained: trained.record.valid["auc"])
    return with_search_seconds(best, sum(t.record.search_seconds + t.record.train_seconds for t in trials))


def with_search_seconds(best: Trained, seconds: float) -> Trained:
    """The model that was kept of several, all of whose `seconds` but those of its own training were search."""
    record = best.record
    seconds -= record.train_seconds
    epochs = seconds * record.search_epochs / max(record.search_seconds, 1e-9)
    best.record = record.replace(search_seconds=seconds, search_epochs=epochs)
    return best


def search_settings(
    task: CTRTask, config: Config, budget: str, seed: int, bits: Bits, target: Target | None
) -> dict[str, Any]:
    """What a search depends on: of its unfinished state, to tell it by."""
    return {
        "method": method_of(config).name,
        **{f"search.{key}": value for key, value in config.model_dump(mode="json").items()},
        "budget": budget,
        "search_seed": seed,
        "bits": bits,
        # What earlier releases left says nothing of a vocabulary, and counted none.
        **{name: value for name, value in target_settings(budget, target).items() if value},
        **training_settings(task.model, task.data, task.config),
        "weights": checksum(task.model),
    }


def _searched(
    task: CTRTask, config: Config, budget: str, seed: int, bits: Bits, target: Target | None, unfinished: Path | None
) -> tuple[SizePlan, float, int | None]:
    """A plan, the seconds of its search, and the peak memory above the start's; out of `unfinished` if it is there."""
    if unfinished is not None:
        plan_path, cost_path = unfinished / "plan.json", unfinished / "search.json"
        if cost_path.exists():  # written last
            cost = json.loads(cost_path.read_text("utf-8"))
            return SizePlan.load(plan_path), cost["seconds"], cost["peak_bytes"]
        task.checkpoints = CheckpointFolder(unfinished, task.config.checkpoint_seconds)
    with peak_memory() as peak:
        started = time.perf_counter()
        plan = search(task, config, budget, seed, bits, target)
        seconds = time.perf_counter() - started
    if unfinished is not None:
        assert task.checkpoints is not None
        seconds += task.checkpoints.spent_seconds
        plan.save(plan_path)
        text = json.dumps({"seconds": seconds, "peak_bytes": peak.above_start})
        write_then_rename(cost_path, lambda file: file.write(text.encode()))
        for path in unfinished.glob("training-*.safetensors"):
            path.unlink()
    return plan, seconds, peak.above_start


def smallest_within(
    full: Trained,
    data: EncodedDataset,
    config: RunConfig,
    seed: int,
    max_loss: float,
    progress: bool = False,
    unfinished: Path | None = None,
) -> Trained:
    """The smallest plan whose validation AUC is at most `max_loss` below the full model's.

    Bisects the share of the full tables on a log scale, on the assumption that more budget does no harm; what comes
    back was measured, whether or not that holds.

    Args:
        full, data, config, seed, progress, unfinished: see `shrink`.
        max_loss: of validation AUC.

    Raises:
        BudgetError: not even the largest budget tried is within the tolerance.
    """
    seconds = 0.0
    wanted = full.record.valid["auc"] - max_loss
    low, high = SMALLEST_SHARE, 1.0
    best: Trained | None = None
    for _ in range(BISECTIONS):
        share = (low * high) ** 0.5
        budget = f"{share:.4%}"
        try:
            trained = shrink(
                full, data, config, config.method, config.search, budget, seed, progress,
                unfinished=None if unfinished is None else unfinished / budget,
            )  # fmt: skip
        except BudgetError as error:  # so small that the method keeps nothing
            log.info("budget %.2f%%: %s", share * 100, error)
            low = share
            continue
        seconds += trained.record.search_seconds + trained.record.train_seconds
        log.info("budget %.2f%%: validation AUC %.4f, wanted %.4f", share * 100, trained.record.valid["auc"], wanted)
        if trained.record.valid["auc"] >= wanted:
            best, high = trained, share
        else:
            low = share
    if best is None:
        raise EmbtrimError(
            f"no plan of method {config.method!r} up to {low:.0%} of the tables is within {max_loss} of the full model's "
            f"validation AUC {full.record.valid['auc']:.4f}; allow more loss, or name a budget"
        )
    return with_search_seconds(best, seconds)


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
        counted_vocabulary_bytes=plan.details.get("vocabulary_bytes"),
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


def _keep(
    trained: Trained, data: EncodedDataset, out: Path, on_record: Callable[[RunRecord], None] | None
) -> RunRecord:
    """Write the bundle, the plan and the record of a trained model."""
    name = f"{trained.record.variant}-seed{trained.record.seed}"
    record = trained.record
    if data.folder is not None:
        save(
            trained.model,
            out / "bundles" / name,
            data,
            plan=trained.plan,
            metrics={"valid": record.valid, "test": record.test},
            seed=record.seed,
            overwrite=True,  # of a run that was killed before it wrote the record
        )
        bundle = out / "bundles" / name
        record = record.replace(bundle_bytes=folder_bytes(bundle), vocabulary_bytes=folder_bytes(bundle / "encoder"))
    if trained.plan is not None:
        trained.plan.save(out / "plans" / f"{name}.json")
    record.save(out / "records" / f"{name}.json")
    if on_record is not None:
        on_record(record)
    return record


def _note_spread(records: list[RunRecord], out: Path) -> None:
    """Tell the bundles of each variant how its metrics spread over the seeds."""
    for variant in dict.fromkeys(record.variant for record in records):
        metrics = {r.seed: {"valid": r.valid, "test": r.test} for r in records if r.variant == variant}
        for seed in metrics:
            bundle = out / "bundles" / f"{variant}-seed{seed}"
            if bundle.exists():  # not of data that were made in memory
                note_spread(bundle, metrics)


def dry_run(data: EncodedDataset, config: RunConfig) -> dict[str, Any]:
    """What a run would do: the resolved settings, bytes before and after, and an estimate of its longest time.

    The estimate times a few training steps of the full model and assumes every model trains all epochs; early stopping
    usually ends well before.
    """
    check_run(data, config)
    model = build(config.model, data.schema, **config.hparams)
    plan = model.tables.plan
    step_seconds = seconds_per_step(model, data, config.train)
    models = len(dict.fromkeys((config.method, *config.controls)))
    models += 0 if config.max_loss is None else BISECTIONS - 1
    models = 1 + models * (len(TRIED_BITS) if config.bits == "auto" else 1)
    steps = data.num_batches("train", config.train.batch_size) * config.train.epochs
    return {
        "config": config.model_dump(mode="json"),
        "table_bytes_before": plan.num_bytes(config.target),
        "table_bytes_allowed": allowed_bytes(plan, config, None if config.max_loss is not None else config.budget),
        "seconds_per_step": step_seconds,
        "seconds_at_most": step_seconds * steps * models * config.seeds,
    }


def seconds_per_step(model: CTRModel, data: EncodedDataset, train: TrainConfig) -> float:
    """Wall time of one training step of a model, the median of a few; moves its weights a little."""
    device = device_of(train)
    model.to(device).train()
    optimizers = make_optimizers(model, train)
    seconds = []
    with fast_matmul(train.precision, device) as (autocast, _):
        for batch in islice(data.batches("train", train.batch_size), TIMED_STEPS + 1):
            started = time.perf_counter()
            for optimizer in optimizers:
                optimizer.zero_grad()
            with autocast():
                loss = logloss_of_batch(model, batch.to(device))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            float(loss.detach())  # a GPU is waited for
            seconds.append(time.perf_counter() - started)
    timed = sorted(seconds[1:] or seconds)
    return timed[len(timed) // 2]


def processor_name() -> str:
    """Model name of the processor, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
