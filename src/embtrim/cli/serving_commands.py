"""The commands that use a saved model: predict, update, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import embtrim
from embtrim.cli.flags import (
    AsJson,
    BundlePath,
    Columns,
    ConfigPath,
    DriftTolerance,
    DryRun,
    Encoding,
    Escape,
    FormatName,
    NoHeader,
    OnError,
    OutPath,
    Overrides,
    Overwrite,
    Quiet,
    Quote,
    Seed,
    Separator,
    SplitText,
    Strict,
)
from embtrim.cli.settings import PredictSettings, needed, read_flags, read_options, settle, split_commas
from embtrim.cli.terminal import log_line, print_json, show_dry_run, show_facts, show_update, start_log

if TYPE_CHECKING:
    from embtrim.data.read_options import ReadOptions


def predict(
    bundle: BundlePath,
    log: Annotated[str, typer.Argument(metavar="LOG", help="Raw log to score: a file, a glob, a folder or a URL.")],
    out: OutPath = None,
    keep: Annotated[
        str | None, typer.Option("--keep", help="Columns of the log to copy beside the score, separated by commas.")
    ] = None,
    raw_text: Annotated[
        bool,
        typer.Option(
            "--raw-text",
            help="Copy texts into a csv as they are; otherwise those that begin like formulas get a ' in front.",
        ),
    ] = False,
    format: FormatName = None,
    no_header: NoHeader = None,
    columns: Columns = None,
    separator: Separator = None,
    encoding: Encoding = None,
    quote: Quote = None,
    escape: Escape = None,
    on_error: OnError = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    drift_tolerance: DriftTolerance = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Score a raw log with a saved model. Values that are not in the model's vocabulary use the OOV row."""
    start_log(quiet)
    flags = {
        "keep": None if keep is None else split_commas(keep),
        "raw_text": raw_text or None,
        "drift_tolerance": drift_tolerance,
        "strict": strict or None,
        "read": read_flags(format, no_header, columns, separator, encoding, quote, escape, on_error),
    }
    settings = settle(PredictSettings, config, overrides, flags)
    options = read_options(settings.read)
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
    target = needed(out)
    done = write_predictions(
        loaded, log, target, keep=settings.keep, options=options, overwrite=overwrite,
        drift_tolerance=settings.drift_tolerance, strict=settings.strict, raw_text=settings.raw_text,
        progress=not quiet,
    )  # fmt: skip
    facts = {"out": str(target), "num_rows": done.num_rows}
    if as_json:
        drift = [found.model_dump(mode="json") for found in done.drift]
        print_json({**facts, "skipped": done.skipped.model_dump(mode="json"), "drift": drift, "shares": done.shares})
        return
    if done.skipped.num_lines:
        facts["skipped_lines"] = done.skipped.num_lines
    show_facts(facts, as_json=False)


def update(
    bundle: BundlePath,
    log: Annotated[
        str, typer.Argument(metavar="NEWLOG", help="New raw log with labels: a file, a glob, a folder or a URL.")
    ],
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
    drift_tolerance: DriftTolerance = None,
    strict: Strict = False,
    format: FormatName = None,
    no_header: NoHeader = None,
    columns: Columns = None,
    separator: Separator = None,
    encoding: Encoding = None,
    quote: Quote = None,
    escape: Escape = None,
    on_error: OnError = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Update a saved model with a new log. Values that are new, or that compaction had dropped, get rows, and training continues."""
    start_log(quiet)
    from embtrim.serving.updating import UpdateConfig

    read = read_flags(format, no_header, columns, separator, encoding, quote, escape, on_error)
    flags = {
        "split": split,
        "min_count": min_count,
        "renumber": renumber or None,
        "drift_tolerance": drift_tolerance,
        "strict": strict or None,
        "seed": seed,
        "read": read,
    }
    settings = settle(UpdateConfig, config, overrides, flags)
    if dry_run:
        show_dry_run(settings, _update_facts(bundle, log, settings.read), as_json)
        return
    target = needed(out)
    report = embtrim.update(
        bundle,
        log,
        out=target,
        config=settings,
        retrain=not no_train,
        overwrite=overwrite,
        progress=not quiet,
    )
    if as_json:
        print_json(report.to_dict())
        return
    show_update(report)
    log_line(f"bundle: {target}, version {report.version}")


def _update_facts(bundle: Path, log: str, read: ReadOptions) -> dict[str, Any]:
    """What an update starts from; the log must have the columns that it needs."""
    from embtrim.data.reading import open_log
    from embtrim.serving.bundle import load_bundle

    loaded = load_bundle(bundle)
    opened = open_log(log, read)
    schema = loaded.model.schema
    opened.require([*schema.label_columns, *schema.where_columns, *loaded.encoder.columns])
    plan = loaded.model.tables.plan
    return {
        "model": loaded.info["model"],
        "version": loaded.info["version"] + 1,
        "table_bytes_before": plan.num_bytes(plan.target),
        "log": opened.describe(),
    }


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
    triton: Annotated[
        str | None,
        typer.Option(
            "--triton",
            metavar="NAME",
            help="With onnx: also write a model repository of NVIDIA's Triton server, with a model of this name.",
        ),
    ] = None,
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
    target = needed(out)
    manifest = exporting.export(
        loaded, checked, target, external_data=external_data, triton=triton, overwrite=overwrite
    )
    if as_json:
        print_json(manifest)
        return
    facts = {name: value for name, value in manifest.items() if name in ("model", "format") or name.endswith("_bytes")}
    show_facts({"out": str(target), **facts, "files": list(manifest["files"])}, as_json=False)
