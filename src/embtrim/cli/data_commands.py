"""The commands that read raw logs: encode, profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import embtrim
from embtrim.cli.flags import (
    AsJson,
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
from embtrim.cli.settings import EncodeSettings, check_known, needed, read_flags, read_options, settle
from embtrim.cli.terminal import (
    log_line,
    show_encode_dry_run,
    show_encoded,
    show_profile,
    show_schema,
    start_log,
)
from embtrim.errors import ConfigError, DataError
from embtrim.rules import parse_rule

if TYPE_CHECKING:  # these modules import torch: commands import them when they need them, --help does not wait
    from embtrim.data.dataset import EncodedDataset
    from embtrim.data.read_options import ReadOptions
    from embtrim.schema import Schema


def encode(
    log: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="LOG...", help="Raw log: files, a glob, a folder or URLs; csv, tsv, parquet, libsvm, libfm."
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", help="Column with the binary label, or a rule that makes it, such as 'rating >= 8'."),
    ] = None,
    where: Annotated[
        str | None, typer.Option("--where", help="Rule that chooses the rows of the log, such as 'rating > 0'.")
    ] = None,
    out: OutPath = None,
    schema: Annotated[
        str | None,
        typer.Option("--schema", help="TOML file with the schema; if not given, the schema is inferred."),
    ] = None,
    draft: Annotated[
        Path | None, typer.Option("--draft", help="Infer the schema, write it to this TOML file, and encode nothing.")
    ] = None,
    split: SplitText = None,
    time: Annotated[
        str | None, typer.Option("--time", help="Column that orders the rows for --split time:..; else the schema's.")
    ] = None,
    time_format: Annotated[
        str | None,
        typer.Option(
            "--time-format", help="Form of the times in text, as strptime takes it, such as '%d/%m/%Y %H:%M'."
        ),
    ] = None,
    valid: Annotated[str | None, typer.Option("--valid", help="Log of the validation split.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Log of the test split.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Name of the known dataset that this log holds; `embtrim datasets` lists them."),
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
    quote: Quote = None,
    escape: Escape = None,
    on_error: OnError = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Number of worker processes; each reads whole files of the log.")
    ] = 1,
    parts: Annotated[
        bool, typer.Option("--parts", help="Write parquet parts, one or more for each file of the log, not arrays.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Encode a raw log as ids. The vocabulary is built from the training rows."""
    start_log(quiet)
    flags = {
        "schema_file": schema, "label": label, "where": where, "time": time, "time_format": time_format, "split": split,
        "valid": valid, "test": test, "dataset": dataset, "min_count": min_count, "seed": seed,
        "read": read_flags(format, no_header, columns, separator, encoding, quote, escape, on_error),
    }  # fmt: skip
    settings = settle(EncodeSettings, config, overrides, flags)
    options = read_options(settings.read)
    _check_encode(settings, log)
    source: Any = log[0] if log and len(log) == 1 else log
    if draft is None and not dry_run:
        data = _encode_log(settings, source, options, needed(out), jobs, parts, overwrite, not quiet)
        show_encoded(data, needed(out), as_json)
        return
    drafted = _draft_schema(settings, source, options)
    if draft is None:
        show_encode_dry_run(settings, drafted, as_json)
        return
    _write_draft(drafted, draft, overwrite, dry_run)
    show_schema(drafted, as_json)


def _write_draft(drafted: Schema, path: Path, overwrite: bool, dry_run: bool) -> None:
    """Write a drafted schema to a TOML file; with dry_run only check that it could be written."""
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists; choose another name or pass --overwrite")
    if dry_run:
        return
    drafted.save_draft(path)
    log_line(f"wrote {path}; edit it, then: embtrim encode .. --schema {path}")


def _check_encode(settings: EncodeSettings, log: Sequence[str] | None) -> None:
    """Raise ConfigError for settings that do not go together, before the log is read."""
    from embtrim.data.catalog import known
    from embtrim.data.splitting import Split
    from embtrim.schema import Schema

    if settings.split is not None:
        Split.from_text(settings.split)
    if settings.where is not None:
        parse_rule(settings.where)
    if settings.dataset is not None:
        check_known(settings, log)
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
    return infer_schema(
        source, settings.label, options, where=settings.where, time=settings.time, time_format=settings.time_format
    )


def _encode_log(
    settings: EncodeSettings,
    source: Any,
    options: ReadOptions,
    out: Path,
    jobs: int,
    parts: bool,
    overwrite: bool,
    progress: bool,
) -> EncodedDataset:
    from embtrim.data.catalog import encode_known

    engine = embtrim.engines.Local(jobs) if jobs > 1 else None
    if settings.dataset is not None:
        return encode_known(
            settings.dataset, source, out, split=settings.split, seed=settings.seed, min_count=settings.min_count,
            overwrite=overwrite, progress=progress, engine=engine, parts=parts,
        )  # fmt: skip
    return embtrim.encode(
        source, settings.schema_file, label=settings.label, where=settings.where, time=settings.time,
        time_format=settings.time_format, out=out, split=settings.split, valid=settings.valid, test=settings.test, seed=settings.seed, options=options,
        overwrite=overwrite, progress=progress, engine=engine, parts=parts,
    )  # fmt: skip


def profile(
    log: Annotated[list[str], typer.Argument(metavar="LOG...", help="Raw log: files, a glob or a folder.")],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="DATA|BUNDLE", help="Encoded data or a saved model to compare the log with."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="HTML page to write, with small histograms.")] = None,
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
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what the fields of a raw log hold: distinct, missing and unseen values, the most frequent ones, quantiles."""
    start_log(quiet)
    from embtrim.data.profile import TOLERANCE, describe_drift
    from embtrim.reports.profile_page import write_profile

    if out is not None and out.suffix != ".html":
        raise ConfigError(f"--out takes a .html file, given {str(out)!r}")
    if out is not None and out.exists() and not overwrite:
        raise DataError(f"{out} exists; choose another name or pass --overwrite")
    options = read_options(read_flags(format, no_header, columns, separator, encoding, quote, escape, on_error))
    tolerance = TOLERANCE if drift_tolerance is None else drift_tolerance
    source: Any = log[0] if len(log) == 1 else log
    found = embtrim.profile(source, against, options, tolerance=tolerance)
    if out is not None:
        write_profile(found, out)
    show_profile(found, as_json)
    if found.drift and strict:
        raise DataError("the log has drifted (strict is set): " + "; ".join(describe_drift(found.drift)))
    if out is not None:
        log_line(f"page: {out}")
