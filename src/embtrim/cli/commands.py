"""The command line: one command a verb, each a thin mirror of a Python function.

Results go to stdout, logs and errors to stderr. Exit codes: 0 done; 1 failed; 2 usage (a flag or a setting is wrong);
130 interrupted. Settings of one run, from the weakest: defaults, the recipe of a known dataset, --config, --set, flags.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from pydantic import Field

import embtrim
from embtrim.cli.terminal import (
    first_line,
    log_cell,
    log_line,
    log_record,
    print_json,
    print_text,
    show_comparison,
    show_dry_run,
    show_encode_dry_run,
    show_encoded,
    show_facts,
    show_records,
    show_rows,
    show_schema,
    show_update,
    start_log,
    wants_progress,
)
from embtrim.config import Config, apply_overrides, describe_settings, merge, read_toml
from embtrim.errors import BudgetError, ConfigError, DataError, EmbtrimError
from embtrim.plan.budget import Budget

if TYPE_CHECKING:  # rooms that import torch are imported by the commands that need them: --help must not wait
    from embtrim.data.read_options import ReadOptions
    from embtrim.experiments.grid import CompareConfig
    from embtrim.experiments.settings import RunConfig
    from embtrim.schema import Schema

SettingsT = TypeVar("SettingsT", bound=Config)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Shrink the embedding tables of CTR models: find sizes within a budget, retrain, and verify the result.",
)

# --- flags that several commands take -------------------------------------------------------------------------------

DataName = Annotated[
    str, typer.Argument(metavar="DATA", help="Folder that `embtrim encode` wrote, or a known dataset such as flights.")
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a saved model.")]
OutPath = Annotated[Path | None, typer.Option("--out", help="File or folder to write; needed unless --dry-run.")]
ConfigPath = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of all random choices.")]
NumSeeds = Annotated[
    int | None, typer.Option("--seeds", help="Number of seeds; the first is --seed, each next one is larger by 1.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file or folder at --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what the command would do, and write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars, and log only warnings.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Base model; `embtrim models` lists them.")]
MethodName = Annotated[str | None, typer.Option("--method", help="Search method; `embtrim methods` lists them.")]
BudgetText = Annotated[
    str | None, typer.Option("--budget", help="Size limit of the compact tables: 10%, 200MB or '1.5M params'.")
]
InitName = Annotated[
    str | None,
    typer.Option("--init", metavar="scratch|initial|inherit", help="Initial weights of a compact model."),
]
BitsName = Annotated[
    str | None,
    typer.Option("--bits", metavar="32|16|8|4|mixed|auto", help="Bits per stored value in the compact tables."),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="torch|onnx|fbgemm",
        help="Where the tables will be served. Sizes are counted as that backend stores them, and a budget in bytes then "
        "includes the vocabulary.",
    ),
]
SplitText = Annotated[
    str | None,
    typer.Option("--split", help="How rows are split: 8:1:1 (random, the default), time:8:1:1 or time:CUT,CUT."),
]
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="csv|parquet|libsvm|libfm", help="Format of the log; if not given, its suffix decides."
    ),
]
NoHeader = Annotated[
    bool | None, typer.Option("--no-header", help="The log has no header line; its first line is data.")
]
Columns = Annotated[str | None, typer.Option("--columns", help="Names of the log's columns, separated by commas.")]
Separator = Annotated[str | None, typer.Option("--separator", help="Character between the cells of the log.")]
Encoding = Annotated[str | None, typer.Option("--encoding", metavar="utf-8|latin-1", help="Text encoding of the log.")]


class EncodeSettings(Config):
    """Settings of `embtrim encode`.

    Attributes:
        schema_file: TOML file with the schema; if None, the schema is inferred.
        label: Column with the binary label.
        split: How rows are split: "8:1:1", "time:8:1:1" or "time:CUT,CUT".
        valid: Log of the validation split.
        test: Log of the test split.
        dataset: Name of a known dataset; the log has its layout.
        min_count: Occurrences that a value needs for a row of its own, in the fields of a known dataset.
        seed: Seed of a random split.
        read: How the log is read; see ReadOptions.
    """

    schema_file: str | None = None
    label: str | None = None
    split: str | None = None
    valid: str | None = None
    test: str | None = None
    dataset: str | None = None
    min_count: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    read: dict[str, Any] = Field(default_factory=dict)


class PredictSettings(Config):
    """Settings of `embtrim predict`.

    Attributes:
        keep: Columns of the log that are copied beside the score.
        read: How the log is read; see ReadOptions.
    """

    keep: tuple[str, ...] = ()
    read: dict[str, Any] = Field(default_factory=dict)


# --- the commands ---------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"embtrim {embtrim.__version__}")
        raise typer.Exit


@app.command()
def encode(
    log: Annotated[
        list[str] | None,
        typer.Argument(metavar="LOG...", help="Raw log: files, a glob or a folder; csv, tsv, parquet, libsvm, libfm."),
    ] = None,
    label: Annotated[str | None, typer.Option("--label", help="Column with the binary label.")] = None,
    out: OutPath = None,
    schema: Annotated[
        str | None,
        typer.Option("--schema", help="TOML file with the schema; if not given, the schema is inferred."),
    ] = None,
    draft: Annotated[
        Path | None, typer.Option("--draft", help="Infer the schema, write it to this TOML file, and encode nothing.")
    ] = None,
    split: SplitText = None,
    valid: Annotated[str | None, typer.Option("--valid", help="Log of the validation split.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Log of the test split.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Known dataset that the log is; `embtrim datasets` lists them."),
    ] = None,
    min_count: Annotated[
        int | None,
        typer.Option("--min-count", help="With --dataset: occurrences that a value needs for a row of its own."),
    ] = None,
    format: FormatName = None,
    no_header: NoHeader = None,
    columns: Columns = None,
    separator: Separator = None,
    encoding: Encoding = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Encode a raw log as ids. The vocabulary is built from the training rows."""
    start_log(quiet)
    flags = {
        "schema_file": schema, "label": label, "split": split, "valid": valid, "test": test, "dataset": dataset,
        "min_count": min_count, "seed": seed, "read": _read_flags(format, no_header, columns, separator, encoding),
    }  # fmt: skip
    settings = _settle(EncodeSettings, config, overrides, flags)
    options = _read_options(settings.read)
    _check_encode(settings, log)
    source: Any = log[0] if log and len(log) == 1 else log
    if draft is None and not dry_run:
        out = _needed(out)
        data = _encode_log(settings, source, options, out, overwrite, wants_progress(quiet))
        show_encoded(data, out, as_json)
        return
    drafted = _draft_schema(settings, source, options)
    if draft is None:
        show_encode_dry_run(settings, drafted, as_json)
        return
    if draft.exists() and not overwrite:
        raise DataError(f"{draft} exists; choose another name or pass --overwrite")
    if not dry_run:
        drafted.save_draft(draft)
        log_line(f"wrote {draft}; edit it, then: embtrim encode .. --schema {draft}")
    show_schema(drafted, as_json)


def _check_encode(settings: EncodeSettings, log: Sequence[str] | None) -> None:
    """Raise ConfigError for settings that do not go together, before the log is read."""
    from embtrim.data.catalog import known
    from embtrim.data.splitting import Split
    from embtrim.schema import Schema

    if settings.split is not None:
        Split.from_text(settings.split)
    if settings.dataset is not None:
        _check_known(settings, log)
        known(settings.dataset)
    elif not log:
        raise ConfigError("encode needs LOG, one or more files (or --dataset with the name of a bundled dataset)")
    elif settings.min_count is not None:
        raise ConfigError("--min-count goes with --dataset; otherwise set min_count of each field in the schema")
    elif settings.schema_file is not None:
        Schema.load_draft(settings.schema_file)


def _draft_schema(settings: EncodeSettings, source: Any, options: ReadOptions) -> Schema:
    """The schema that `encode` would use, before there is a vocabulary."""
    from embtrim.data.catalog import known
    from embtrim.data.drafting import infer_schema
    from embtrim.schema import Schema

    if settings.dataset is not None:
        return known(settings.dataset).schema
    if settings.schema_file is not None:
        return Schema.load_draft(settings.schema_file)
    return infer_schema(source, settings.label, options)


def _encode_log(
    settings: EncodeSettings, source: Any, options: ReadOptions, out: Path, overwrite: bool, progress: bool
) -> EncodedDataset:
    from embtrim.data.catalog import encode_known

    try:
        if settings.dataset is not None:
            return encode_known(
                settings.dataset, source, out, split=settings.split, seed=settings.seed, min_count=settings.min_count,
                overwrite=overwrite, progress=progress,
            )  # fmt: skip
        return embtrim.encode(
            source, settings.schema_file, label=settings.label, out=out, split=settings.split, valid=settings.valid,
            test=settings.test, seed=settings.seed, options=options, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            raise
        raise _Resumable from None


@app.command()
def train(
    data: DataName,
    model: ModelName = None,
    out: OutPath = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Train the full model and save it as a bundle."""
    start_log(quiet)
    settings = _run_config(data, config, overrides, {"model": model, "seed": seed})
    from embtrim.experiments.estimates import estimate_training
    from embtrim.experiments.steps import train_full
    from embtrim.serving.bundle import check_out, save
    from embtrim.system.folders import folder_bytes
    from embtrim.system.unfinished import unfinished

    encoded = embtrim.load(data)
    for split in ("train", "valid", "test"):
        encoded.split(split)
    if dry_run:
        show_dry_run(settings, estimate_training(encoded, settings), as_json)
        return
    target = _needed(out)
    check_out(target, overwrite)  # before hours of training, not after them
    with unfinished(target) as work:
        trained = train_full(encoded, settings, wants_progress(quiet), work / "full.safetensors")
        record = trained.record
        metrics = {"valid": record.valid, "test": record.test}
        save(trained.model, target, encoded, metrics=metrics, seed=settings.seed, overwrite=overwrite)
    show_records([record.replace(bundle_bytes=folder_bytes(target))], as_json, many=False)
    log_line(f"bundle: {target}")


@app.command()
def search(
    bundle: BundlePath,
    data: DataName,
    method: MethodName = None,
    budget: BudgetText = None,
    bits: BitsName = None,
    target: TargetName = None,
    out: OutPath = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Find a size plan within a budget. The plan is a JSON file that says which parts of a trained model's tables to keep."""
    start_log(quiet)
    flags = {"method": method, "budget": budget, "bits": _bits(bits), "target": target, "seed": seed}
    settings = _run_config(data, config, overrides, flags)
    from embtrim.experiments.estimates import estimate_search
    from embtrim.experiments.settings import method_config
    from embtrim.experiments.steps import find_plan, load_full
    from embtrim.system.unfinished import unfinished

    method_config(settings)
    if settings.bits == "auto":
        raise ConfigError(
            "bits = 'auto' tries several plans by training; `embtrim run` does, a search needs a precision"
        )
    encoded = embtrim.load(data)
    full = load_full(bundle, encoded)
    if dry_run:
        show_dry_run(settings, estimate_search(full, encoded, settings), as_json)
        return
    path = _needed(out)
    if path.suffix != ".json":
        raise ConfigError(f"a plan is written as .json, --out is {path}")
    if path.exists() and not overwrite:  # before hours of searching, not after them
        raise DataError(f"{path} exists; choose another --out or pass --overwrite")
    with unfinished(path) as work:
        plan = find_plan(full, encoded, settings, progress=wants_progress(quiet), unfinished=work).plan
        plan.save(path)
    if as_json:
        print_json(json.loads(path.read_text("utf-8")))
    else:
        print_text(plan.summary())
    log_line(f"plan: {path}")


@app.command()
def compact(
    bundle: BundlePath,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan: the JSON file that `embtrim search` wrote.")],
    data: DataName,
    init: InitName = None,
    no_train: Annotated[
        bool, typer.Option("--no-train", help="Do not retrain the compact model; needs --init inherit.")
    ] = False,
    out: OutPath = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Apply a plan to a trained model. The compact model is built, verified, retrained, quantised and saved."""
    start_log(quiet)
    settings = _run_config(data, config, overrides, {"init": init, "seed": seed})
    from embtrim.experiments.estimates import estimate_compacting
    from embtrim.experiments.steps import compact_and_retrain, load_full, verify_plan
    from embtrim.plan.plan import SizePlan
    from embtrim.serving.bundle import check_out, save
    from embtrim.system.folders import folder_bytes
    from embtrim.system.unfinished import unfinished
    from embtrim.training.evaluation import evaluate

    retrain, progress = not no_train, wants_progress(quiet)
    if no_train and settings.init != "inherit":
        raise ConfigError(f"--no-train would save the untrained weights of --init {settings.init}; add --init inherit")
    encoded = embtrim.load(data)
    full = load_full(bundle, encoded)
    sizes = SizePlan.load(plan)
    sizes.check_schema(full.schema)
    if dry_run:
        show_dry_run(settings, estimate_compacting(full, sizes, encoded, settings, retrain), as_json)
        return
    target = _needed(out)
    check_out(target, overwrite)  # before hours of training, not after them
    checked = verify_plan(full, sizes, encoded)
    log_line(
        f"verified on {checked.num_rows:,} rows: compact equals masked, largest difference {checked.max_difference:.1e}"
    )
    with unfinished(target) as work:
        checkpoint = work / "retraining.safetensors"
        small = compact_and_retrain(
            full, sizes, encoded, settings, retrain=retrain, progress=progress, checkpoint=checkpoint
        )
        splits = [split for split in ("valid", "test") if split in encoded.splits]
        metrics = {split: evaluate(small.model, small.data, split, settings.train).to_dict() for split in splits}
        save(small.model, target, small.data, metrics=metrics, seed=settings.seed, overwrite=overwrite)
    result = {
        "bundle": str(target),
        "table_bytes_before": full.tables.plan.num_bytes(sizes.target),
        "table_bytes_after": small.model.tables.plan.num_bytes(sizes.target),
        "bundle_bytes": folder_bytes(target),
        "vocabulary_bytes": folder_bytes(target / "encoder"),
        "verification": vars(checked),
        **metrics,
    }
    show_facts(result, as_json)


@app.command()
def predict(
    bundle: BundlePath,
    log: Annotated[str, typer.Argument(metavar="LOG", help="Raw log to score: a file, a glob or a folder.")],
    out: OutPath = None,
    keep: Annotated[
        str | None, typer.Option("--keep", help="Columns of the log to copy beside the score, separated by commas.")
    ] = None,
    format: FormatName = None,
    no_header: NoHeader = None,
    columns: Columns = None,
    separator: Separator = None,
    encoding: Encoding = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Score a raw log with a saved model. Values that are not in the model's vocabulary use the OOV row."""
    start_log(quiet)
    flags = {
        "keep": None if keep is None else _split_commas(keep),
        "read": _read_flags(format, no_header, columns, separator, encoding),
    }
    settings = _settle(PredictSettings, config, overrides, flags)
    options = _read_options(settings.read)
    from embtrim.data.reading import open_log
    from embtrim.serving.bundle import load_bundle
    from embtrim.serving.predicting import write_predictions

    loaded = load_bundle(bundle)
    if dry_run:
        opened = open_log(log, options)
        opened.require([*loaded.encoder.columns, *settings.keep])
        facts = {"model": loaded.info["model"], "columns": list(loaded.encoder.columns), "log": opened.describe()}
        show_dry_run(settings, facts, as_json)
        return
    target = _needed(out)
    rows = write_predictions(
        loaded, log, target, keep=settings.keep, options=options, overwrite=overwrite, progress=wants_progress(quiet)
    )
    show_facts({"out": str(target), "num_rows": rows}, as_json)


@app.command()
def update(
    bundle: BundlePath,
    log: Annotated[str, typer.Argument(metavar="NEWLOG", help="New raw log with labels: a file, a glob or a folder.")],
    out: OutPath = None,
    split: SplitText = None,
    min_count: Annotated[
        int | None,
        typer.Option(
            "--min-count",
            help="Occurrences that a value needs for a row of its own; if not given, each field's min_count.",
        ),
    ] = None,
    renumber: Annotated[
        bool,
        typer.Option(
            "--renumber",
            help="Number all values again by frequency in the new log; otherwise old values keep their ids.",
        ),
    ] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Add the new rows, and do not train.")] = False,
    format: FormatName = None,
    no_header: NoHeader = None,
    columns: Columns = None,
    separator: Separator = None,
    encoding: Encoding = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Update a saved model with a new log. New and dropped values get rows, and training is continued."""
    start_log(quiet)
    from embtrim.serving.updating import UpdateConfig

    read = _read_flags(format, no_header, columns, separator, encoding)
    flags = {"split": split, "min_count": min_count, "renumber": renumber or None, "seed": seed, "read": read}
    settings = _settle(UpdateConfig, config, overrides, flags)
    if dry_run:
        from embtrim.data.reading import open_log
        from embtrim.serving.bundle import load_bundle

        loaded = load_bundle(bundle)
        opened = open_log(log, settings.read)
        opened.require([loaded.model.schema.label, *loaded.encoder.columns])
        plan = loaded.model.tables.plan
        facts = {
            "model": loaded.info["model"],
            "version": loaded.info["version"] + 1,
            "table_bytes_before": plan.num_bytes(plan.target),
            "log": opened.describe(),
        }
        show_dry_run(settings, facts, as_json)
        return
    target = _needed(out)
    report = embtrim.update(
        bundle,
        log,
        out=target,
        config=settings,
        retrain=not no_train,
        overwrite=overwrite,
        progress=wants_progress(quiet),
    )
    if as_json:
        print_json(report.to_dict())
        return
    show_update(report)
    log_line(f"bundle: {target}, version {report.version}")


@app.command()
def export(
    bundle: BundlePath,
    format: Annotated[str, typer.Option("--format", metavar="pt2|onnx|torchrec", help="Format of the export.")],
    out: OutPath = None,
    external_data: Annotated[
        bool,
        typer.Option(
            "--external-data", help="With onnx: write the weights to a second file; above 2 GB they always are."
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Export a saved model for serving without embtrim. Formats: torch.export, ONNX, or TorchRec's configs and tables."""
    start_log(quiet)
    from embtrim.serving import exporting
    from embtrim.serving.bundle import load_bundle
    from embtrim.serving.export_sizes import table_sizes
    from embtrim.serving.served import describe_inputs
    from embtrim.system.folders import folder_bytes

    checked = exporting.check_format(format)
    loaded = load_bundle(bundle)
    if dry_run:
        facts = {
            **table_sizes(loaded.model, checked),
            "vocabulary_bytes": folder_bytes(bundle / "encoder"),
            "inputs": list(describe_inputs(loaded.model.schema)),
        }
        show_facts({"model": loaded.info["model"], "format": format, **facts}, as_json)
        return
    target = _needed(out)
    manifest = exporting.export(loaded, checked, target, external_data=external_data, overwrite=overwrite)
    if as_json:
        print_json(manifest)
        return
    facts = {name: value for name, value in manifest.items() if name in ("model", "format") or name.endswith("_bytes")}
    show_facts({"out": str(target), **facts, "files": list(manifest["files"])}, as_json=False)


@app.command()
def run(
    data: DataName,
    model: ModelName = None,
    method: MethodName = None,
    budget: BudgetText = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss",
            help="Largest loss of validation AUC; the smallest plan within it is searched, instead of one within a budget.",
        ),
    ] = None,
    bits: BitsName = None,
    target: TargetName = None,
    seeds: NumSeeds = None,
    init: InitName = None,
    controls: Annotated[
        str | None,
        typer.Option(
            "--controls", help="Methods to compare with, run at the same budget, separated by commas; '' for none."
        ),
    ] = None,
    out: OutPath = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Train, search, compact, retrain, save and report. Started again with the same --out, a run is continued."""
    start_log(quiet)
    if budget is not None and max_loss is not None:
        raise ConfigError("--budget and --max-loss exclude each other; give one of them")
    flags = {
        "model": model, "method": method, "budget": budget, "max_loss": max_loss, "bits": _bits(bits), "target": target,
        "seeds": seeds, "init": init, "seed": seed, "controls": None if controls is None else _split_commas(controls),
    }  # fmt: skip
    settings = _run_config(data, config, overrides, flags)
    from embtrim.experiments import estimates
    from embtrim.experiments.run import run as run_all
    from embtrim.reports.run_page import write_report

    encoded = embtrim.load(data)
    if dry_run:
        facts = estimates.dry_run(encoded, settings)
        facts.pop("config")
        show_dry_run(settings, facts, as_json)
        return
    path = _needed(out)
    records = run_all(encoded, settings, path, progress=wants_progress(quiet), on_record=log_record)
    write_report(records, path / "report.html")
    show_records(records, as_json)
    log_line(f"report: {path / 'report.html'}")


@app.command()
def compare(
    data: DataName,
    models: Annotated[str | None, typer.Option("--models", help="Base models, separated by commas.")] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Search methods, separated by commas; 'all' for all of them.")
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", help="Size limits of the compact tables, separated by commas: 50%,20%,10%,5%."),
    ] = None,
    seeds: NumSeeds = None,
    init: InitName = None,
    target: TargetName = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Number of worker processes; they share the cores.")] = 1,
    out: OutPath = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid of models, methods, budgets and seeds. Started again with the same --out, it is continued or extended."""
    start_log(quiet)
    lists = {"models": models, "methods": methods, "budgets": budgets}
    flags = {name: None if text is None else _split_commas(text) for name, text in lists.items()}
    settings = _compare_config(
        data, config, overrides, {**flags, "seeds": seeds, "init": init, "target": target, "seed": seed}
    )
    from embtrim.experiments import comparison
    from embtrim.experiments.grid import read_skipped
    from embtrim.experiments.records import read_records
    from embtrim.reports.comparison_page import write_comparison

    encoded = embtrim.load(data)
    if dry_run:
        show_dry_run(settings, comparison.estimate(encoded, settings, out), as_json)
        return
    folder = _needed(out)
    progress = wants_progress(quiet)
    made = comparison.compare(encoded, settings, folder, jobs=jobs, progress=progress, on_record=log_cell)
    if made.records:
        write_comparison(read_records(folder), folder, read_skipped(folder))
    if as_json:
        parts = {"records": made.records, "skipped": made.skipped}
        print_json({name: [part.model_dump(mode="json") for part in found] for name, found in parts.items()})
    elif made.records:
        show_comparison(made.records, made.skipped)
    log_line(f"tables: {folder / 'README.md'}, page: {folder / 'report.html'}")


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that `embtrim run` or `embtrim compare` wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML page to write; if not given, RUN/report.html.")
    ] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Print the tables of a run or a comparison, and write its page."""
    start_log(quiet)
    from embtrim.experiments.grid import read_skipped
    from embtrim.experiments.records import read_records
    from embtrim.reports.comparison_page import write_comparison
    from embtrim.reports.entries import is_comparison
    from embtrim.reports.run_page import write_report

    records = read_records(folder)
    if is_comparison(records):
        skipped = read_skipped(folder)
        if as_json:
            show_records(records, as_json)
        else:
            show_comparison(records, skipped)
        if not dry_run:
            write_comparison(records, folder, skipped, page=out)
            log_line(f"tables: {folder / 'README.md'}, page: {out or folder / 'report.html'}")
        return
    show_records(records, as_json)
    if not dry_run:
        target = out or folder / "report.html"
        write_report(records, target)
        log_line(f"report: {target}")


@app.command()
def datasets(as_json: AsJson = False) -> None:
    """List the known datasets."""
    from embtrim.data.catalog import CATALOG

    rows = [
        {
            "name": entry.name,
            "title": entry.title,
            "bundled": entry.bundled is not None,
            "licence": entry.licence,
            "source": entry.source,
            "how_to_get": entry.how_to_get,
            "note": entry.note,
            "recipe": {section: dict(values) for section, values in entry.recipe.items()},
        }
        for entry in CATALOG.values()
    ]
    show_rows(rows, as_json, shown=("name", "bundled", "title", "licence", "source"))


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the base models and their arguments."""
    from embtrim.models import MODELS, arguments

    rows = [
        {"name": name, "what": first_line(sys.modules[model.__module__].__doc__), "arguments": arguments(name)}
        for name, model in MODELS.items()
    ]
    show_rows(rows, as_json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Method whose settings are shown.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the search methods, or the settings of one."""
    from embtrim.methods import METHODS, method_named

    if name is None:
        show_rows([{"name": m.name, "needs": m.needs, "what": m.what} for m in METHODS.values()], as_json)
        return
    method = method_named(name)
    facts: dict[str, Any] = {"name": method.name, "needs": method.needs, "what": method.what}
    if faithful := getattr(method.config, "faithful", None):
        facts["preset_faithful"] = faithful
    settings = describe_settings(method.config)
    if as_json:
        print_json({**facts, "settings": settings})
        return
    show_facts(facts, as_json)
    if settings:
        print_text("")
        show_rows([{**setting, "default": json.dumps(setting.get("default"))} for setting in settings], as_json)


# --- settings -------------------------------------------------------------------------------------------------------


def _settle(
    kind: type[SettingsT],
    config: Path | None,
    overrides: Sequence[str] | None,
    flags: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
) -> SettingsT:
    """Merge settings, from the weakest: the recipe, the file, --set, the flags that were given."""
    values: dict[str, Any] = dict(recipe or {})
    if config is not None:
        in_file = read_toml(config)
        kind.parse(in_file, where=str(config))  # parsed alone first: the message then names the file
        values = merge(values, in_file)
    values = apply_overrides(values, overrides or ())
    kind.parse(values)  # parsed before the flags, which would hide a fault
    return kind.parse(merge(values, {key: value for key, value in flags.items() if value is not None}))


def _bits(text: str | None) -> int | str | None:
    """The value of --bits: a number, or a word such as "mixed"."""
    return int(text) if text and text.isdecimal() else text


def _run_config(data: str, config: Path | None, overrides: Sequence[str] | None, flags: Mapping[str, Any]) -> RunConfig:
    """The settings of a run; faults are found before any work is done."""
    if isinstance(flags.get("budget"), str):
        _check_budget(flags["budget"], "--budget")
    from embtrim.experiments.settings import RunConfig
    from embtrim.methods import method_named

    settings = _settle(RunConfig, config, overrides, flags)
    _check_budget(settings.budget, "budget")
    for name in (settings.method, *settings.controls):
        method_named(name)
    recipe = _known_recipe(data, [settings.model])
    return settings if recipe is None else _settle(RunConfig, config, overrides, flags, recipe)


def _compare_config(
    data: str, config: Path | None, overrides: Sequence[str] | None, flags: Mapping[str, Any]
) -> CompareConfig:
    """The settings of a grid; faults are found before any work is done."""
    from embtrim.experiments.grid import CompareConfig, resolve

    settings = _settle(CompareConfig, config, overrides, flags)
    recipe = _known_recipe(data, settings.models)
    return resolve(settings if recipe is None else _settle(CompareConfig, config, overrides, flags, recipe))


def _known_recipe(data: str, models: Sequence[str]) -> dict[str, Any] | None:
    """The recipe of a known dataset, or None. It was written for one model; other models take the arguments they know."""
    from embtrim.data.catalog import CATALOG
    from embtrim.models import MODELS, arguments

    if data not in CATALOG or Path(data).is_dir():
        return None
    recipe = CATALOG[data].recipe
    known = {key for name in models if name in MODELS for key in arguments(name)}
    hparams = {key: value for key, value in recipe.get("model", {}).items() if key in known}
    return {"hparams": hparams, "train": recipe.get("train", {})}


def _check_budget(text: str, where: str) -> None:
    try:
        Budget.parse(text)
    except BudgetError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_known(settings: EncodeSettings, log: Sequence[str] | None) -> None:
    """Raise ConfigError for settings that a known dataset has of its own."""
    own = [key for key in ("schema_file", "label", "valid", "test", "read") if getattr(settings, key)]
    if own:
        raise ConfigError(
            f"dataset {settings.dataset!r} brings its own {', '.join(own)}; leave that out, or leave out --dataset"
        )
    if log and len(log) > 1:
        raise ConfigError(f"--dataset takes one folder (or file) as LOG, given {len(log)}: {', '.join(log)}")


def _read_flags(
    format: str | None, no_header: bool | None, columns: str | None, separator: str | None, encoding: str | None
) -> dict[str, Any]:
    """The [read] section that the flags about the log make; flags that were not given are left out."""
    flags = {
        "format": format,
        "header": False if no_header else None,
        "columns": None if columns is None else _split_commas(columns),
        "separator": None if separator is None else separator.replace("\\t", "\t"),
        "encoding": encoding,
    }
    return {key: value for key, value in flags.items() if value is not None}


def _read_options(values: Mapping[str, Any]) -> ReadOptions:
    """The options of a [read] section; ConfigError if one is wrong."""
    from embtrim.data.read_options import ReadOptions

    return ReadOptions.parse(values, where="read")


def _split_commas(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated flag, without empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _needed(out: Path | None) -> Path:
    """The value of --out; ConfigError if it was not given."""
    if out is None:
        raise ConfigError("--out is needed: where to write (or --dry-run)")
    return out


# --- errors ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point. A user's error becomes one clear line and an exit code; a fault of embtrim keeps its traceback."""
    code: Any
    advice = "nothing is half-written; train, search, compact, update, run and compare go on when started again"
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except _Resumable:
        code, advice = _INTERRUPTED, "the same command goes on from where it was"
    except ConfigError as error:
        code = _fail(str(error), 2)
    except EmbtrimError as error:
        code = _fail(str(error), 1)
    except OSError as error:
        code = _fail_os(error)
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of click, which some versions of typer have a copy of
        if show is None:
            raise
        show(file=sys.stderr)
        code = 2
    if code == _INTERRUPTED:
        _fail(f"interrupted; {advice}", _INTERRUPTED)
    sys.exit(code or 0)


_INTERRUPTED: Literal[130] = 130


class _Resumable(Exception):
    """An interrupt of a command that can be continued; typer would swallow a KeyboardInterrupt with its message."""


def _fail(message: str, code: int) -> int:
    """Print an error to stderr and return its exit code."""
    with suppress(OSError):
        typer.echo(f"embtrim: {message}", err=True)
    return code


def _fail_os(error: OSError) -> int:
    """Print an error of the operating system with its file and a remedy; return the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader of stdout has closed it, as in `embtrim report X | head`
        return 1
    where = f"{error.filename}: " if error.filename else ""
    advice = "; free space or choose another --out" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
    return _fail(f"{where}{error.strerror or error}{advice}", 1)
