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
    show_facts,
    show_records,
    show_rows,
    show_schema,
    show_update,
    start_log,
    wants_progress,
)
from embtrim.config import Config, apply_overrides, describe_settings, merge, read_toml, to_toml
from embtrim.errors import BudgetError, ConfigError, DataError, EmbtrimError
from embtrim.plan.budget import Budget

if TYPE_CHECKING:  # rooms that import torch are imported by the commands that need them: --help must not wait
    from embtrim.data.read_options import ReadOptions
    from embtrim.experiments.grid import CompareConfig
    from embtrim.experiments.settings import RunConfig

SettingsT = TypeVar("SettingsT", bound=Config)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Shrink the embedding tables of CTR models: find the size of every field within a budget, retrain, prove it.",
)

# --- flags that several commands take -------------------------------------------------------------------------------

DataName = Annotated[str, typer.Argument(metavar="DATA", help="Encoded folder, or a known dataset such as flights.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a saved model.")]
OutPath = Annotated[Path | None, typer.Option("--out", help="What to write; needed unless --dry-run.")]
ConfigPath = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, no log but warnings.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Base model: see `embtrim models`.")]
MethodName = Annotated[str | None, typer.Option("--method", help="Search method: see `embtrim methods`.")]
BudgetText = Annotated[str | None, typer.Option("--budget", help="Such as 10%, 200MB, '1.5M params'.")]
InitName = Annotated[
    str | None, typer.Option("--init", metavar="scratch|initial|inherit", help="How a compact model starts.")
]
BitsName = Annotated[
    str | None, typer.Option("--bits", metavar="32|16|8|4|mixed|auto", help="Of a stored value of the compact tables.")
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="torch|onnx|fbgemm",
        help="What will store the tables: bytes are its, and a budget in bytes holds the vocabulary too.",
    ),
]
FormatName = Annotated[str | None, typer.Option("--format", metavar="csv|parquet|libsvm|libfm", help="Of the log.")]
NoHeader = Annotated[bool | None, typer.Option("--no-header", help="The first line of the log holds data.")]
Columns = Annotated[str | None, typer.Option("--columns", help="Names of the log's columns, separated by commas.")]
Separator = Annotated[str | None, typer.Option("--separator", help="What separates the log's cells.")]
Encoding = Annotated[str | None, typer.Option("--encoding", metavar="utf-8|latin-1", help="Of the log's text.")]


class EncodeSettings(Config):
    """Settings of `embtrim encode`: arguments of the functions `encode` and `encode_known`.

    Attributes:
        schema_file: TOML file with the schema; None infers one.
        label: column with the binary label.
        split: such as "8:1:1", "time:8:1:1" or "time:CUT,CUT".
        valid: log of the validation split.
        test: log of the test split.
        dataset: name of a known dataset whose layout the log has.
        min_count: for the fields of a known dataset.
        seed: of a random split.
        read: how the log is read, see ReadOptions.
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
        keep: columns of the log to copy beside the score.
        read: how the log is read, see ReadOptions.
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
        typer.Option("--schema", help="Schema as TOML; if not given, it is inferred and written beside --out."),
    ] = None,
    draft: Annotated[
        Path | None, typer.Option("--draft", help="Only infer the schema, and write it to this file.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="8:1:1 (default), time:8:1:1 or time:CUT,CUT.")] = None,
    valid: Annotated[str | None, typer.Option("--valid", help="Log of the validation split.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Log of the test split.")] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Layout of a known dataset: see `embtrim datasets`.")
    ] = None,
    min_count: Annotated[
        int | None, typer.Option("--min-count", help="With --dataset: rarer values are out of vocabulary.")
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
    """Encode a raw log: vocabulary from the training rows, ids on disk."""
    start_log(quiet)
    flags = {
        "schema_file": schema, "label": label, "split": split, "valid": valid, "test": test, "dataset": dataset,
        "min_count": min_count, "seed": seed, "read": _read_flags(format, no_header, columns, separator, encoding),
    }  # fmt: skip
    settings = _settle(EncodeSettings, config, overrides, flags)
    from embtrim.data.catalog import encode_known, known
    from embtrim.data.drafting import infer_schema
    from embtrim.data.splitting import Split
    from embtrim.schema import Schema

    options = _read_options(settings.read)
    if settings.split is not None:
        Split.from_text(settings.split)
    source: Any = log[0] if log and len(log) == 1 else log
    if settings.dataset is not None:
        _check_known(settings, log)
        drafted = known(settings.dataset).schema if draft is not None or dry_run else None
    elif not log:
        raise ConfigError("encode needs LOG, one or more files (or --dataset with the name of a bundled dataset)")
    elif settings.min_count is not None:
        raise ConfigError("--min-count goes with --dataset; otherwise set min_count of each field in the schema")
    elif settings.schema_file is not None:
        drafted = Schema.load_draft(settings.schema_file)
    else:
        drafted = infer_schema(source, settings.label, options) if draft is not None or dry_run else None
    if draft is not None:
        if draft.exists() and not overwrite:
            raise DataError(f"{draft} exists; choose another name or pass --overwrite")
        if drafted is not None and not dry_run:
            drafted.save_draft(draft)
            log_line(f"wrote {draft}; edit it, then: embtrim encode .. --schema {draft}")
        show_schema(drafted, as_json)
        return
    if dry_run:
        if as_json:
            assert drafted is not None
            print_json({"config": settings.model_dump(mode="json"), "schema": drafted.model_dump(mode="json")})
            return
        print_text(to_toml(settings))
        show_schema(drafted, as_json)
        return
    out = _needed(out)
    progress = wants_progress(quiet)
    try:
        if settings.dataset is not None:
            data = encode_known(
                settings.dataset, source, out, split=settings.split, seed=settings.seed, min_count=settings.min_count,
                overwrite=overwrite, progress=progress,
            )  # fmt: skip
        else:
            data = embtrim.encode(
                source, settings.schema_file, label=settings.label, out=out, split=settings.split, valid=settings.valid,
                test=settings.test, seed=settings.seed, options=options, overwrite=overwrite, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            raise
        raise _Resumable from None
    if as_json:
        print_json(
            {
                "folder": str(out),
                "fingerprint": data.schema.fingerprint,
                "num_rows": {name: data.num_rows(name) for name in data.splits},
                "schema": data.schema.model_dump(mode="json"),
            }
        )
        return
    show_schema(data.schema, as_json)
    rows = ", ".join(f"{name} {data.num_rows(name):,}" for name in data.splits)
    print_text(f"{out}: rows {rows}; schema {data.schema.describe()}")


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
    """Find what to keep of a trained model's tables within a budget: a plan, as JSON."""
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
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="JSON file that `embtrim search` wrote.")],
    data: DataName,
    init: InitName = None,
    no_train: Annotated[
        bool, typer.Option("--no-train", help="Do not retrain; only sensible with --init inherit.")
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
    """Apply a plan: verify that compact equals masked, build the smaller model, retrain, quantise and save it."""
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
    """Score a raw log with a saved model; values that training never saw read the OOV row."""
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
    log: Annotated[str, typer.Argument(metavar="NEWLOG", help="New raw log, with labels: a file, a glob or a folder.")],
    out: OutPath = None,
    split: Annotated[str | None, typer.Option("--split", help="8:1:1 (default), time:8:1:1 or time:CUT,CUT.")] = None,
    min_count: Annotated[
        int | None, typer.Option("--min-count", help="Occurrences a value needs for a row; otherwise each field's own.")
    ] = None,
    renumber: Annotated[
        bool,
        typer.Option("--renumber", help="New ids by frequency in the new log; otherwise ids that stay do not change."),
    ] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Only add the rows; all weights stay.")] = False,
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
    """Take a saved model to a new log: rows for new values, dropped ones back, training on from its weights."""
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
    format: Annotated[str, typer.Option("--format", metavar="pt2|onnx|torchrec", help="What the server reads.")],
    out: OutPath = None,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="onnx: weights in a file of their own, as always above 2 GB.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Write a saved model for serving without embtrim: torch.export, ONNX, or TorchRec's configs and tables."""
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
            "--max-loss", help="Instead of a budget: the smallest plan that loses at most this validation AUC."
        ),
    ] = None,
    bits: BitsName = None,
    target: TargetName = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="How many seeds, from --seed on.")] = None,
    init: InitName = None,
    controls: Annotated[
        str | None, typer.Option("--controls", help="Methods run at the same budget, separated by commas; '' for none.")
    ] = None,
    out: OutPath = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Do it all: train, search, compact, verify, retrain, save, report; started again with the same --out, it goes on."""
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
        str | None, typer.Option("--methods", help="Search methods, separated by commas; 'all' for every one.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="Separated by commas, such as 50%,20%,10%,5%.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="How many seeds, from --seed on.")] = None,
    init: InitName = None,
    target: TargetName = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Worker processes, which share the cores.")] = 1,
    out: OutPath = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid of models, methods, budgets and seeds; started again with the same --out, it goes on or grows."""
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
    out: Annotated[Path | None, typer.Option("--out", help="Page to write; RUN/report.html if not given.")] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Print the tables of a run's or a comparison's records, and write their page."""
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
    """Settings from, weakest first: the recipe, the file, --set, the flags that were given."""
    values: dict[str, Any] = dict(recipe or {})
    if config is not None:
        in_file = read_toml(config)
        kind.parse(in_file, where=str(config))  # alone first, so that a message says where the fault is
        values = merge(values, in_file)
    values = apply_overrides(values, overrides or ())
    kind.parse(values)  # before the flags, which would cover a fault
    return kind.parse(merge(values, {key: value for key, value in flags.items() if value is not None}))


def _bits(text: str | None) -> int | str | None:
    return int(text) if text and text.isdecimal() else text


def _run_config(data: str, config: Path | None, overrides: Sequence[str] | None, flags: Mapping[str, Any]) -> RunConfig:
    """The settings of a run; wrong ones are found before any work is done."""
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
    """The settings of a grid; wrong ones are found before any work is done."""
    from embtrim.experiments.grid import CompareConfig, resolve

    settings = _settle(CompareConfig, config, overrides, flags)
    recipe = _known_recipe(data, settings.models)
    return resolve(settings if recipe is None else _settle(CompareConfig, config, overrides, flags, recipe))


def _known_recipe(data: str, models: Sequence[str]) -> dict[str, Any] | None:
    """Settings that a dataset known by name brings, or None; it was written for one model, others take what they know."""
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
    """Raise ConfigError for what a known dataset brings itself."""
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
    flags = {
        "format": format,
        "header": False if no_header else None,
        "columns": None if columns is None else _split_commas(columns),
        "separator": None if separator is None else separator.replace("\\t", "\t"),
        "encoding": encoding,
    }
    return {key: value for key, value in flags.items() if value is not None}


def _read_options(values: Mapping[str, Any]) -> ReadOptions:
    from embtrim.data.read_options import ReadOptions

    return ReadOptions.parse(values, where="read")


def _split_commas(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _needed(out: Path | None) -> Path:
    if out is None:
        raise ConfigError("--out is needed: where to write (or --dry-run)")
    return out


# --- errors ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point: a user's errors become one clear line and an exit code, ours keep their traceback."""
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
        show = getattr(error, "show", None)  # a usage error of click, of which typer has its own copy or not
        if show is None:
            raise
        show(file=sys.stderr)
        code = 2
    if code == _INTERRUPTED:
        _fail(f"interrupted; {advice}", _INTERRUPTED)
    sys.exit(code or 0)


_INTERRUPTED: Literal[130] = 130


class _Resumable(Exception):
    """An interrupt of a command that can go on; typer would swallow the interrupt itself, and what it says."""


def _fail(message: str, code: int) -> int:
    with suppress(OSError):
        typer.echo(f"embtrim: {message}", err=True)
    return code


def _fail_os(error: OSError) -> int:
    if isinstance(
        error, BrokenPipeError
    ):  # whoever read stdout has gone, which is not a fault: `embtrim report X | head`
        return 1
    where = f"{error.filename}: " if error.filename else ""
    advice = "; free space or choose another --out" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
    return _fail(f"{where}{error.strerror or error}{advice}", 1)
