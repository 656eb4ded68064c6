"""The commands that take all steps, and their reports: run, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import embtrim
from embtrim.cli.flags import (
    AsJson,
    BitsName,
    BudgetText,
    ConfigPath,
    DataName,
    DryRun,
    InitName,
    MethodName,
    ModelName,
    NumSeeds,
    OutPath,
    Overrides,
    Quiet,
    Seed,
    TargetName,
    Tolerance,
    TrackerName,
)
from embtrim.cli.settings import closed_after, compare_config, needed, parse_bits, run_config, split_commas, trackers_of
from embtrim.cli.terminal import (
    RecordLog,
    log_line,
    print_json,
    show_comparison,
    show_dry_run,
    show_records,
    start_log,
)
from embtrim.errors import ConfigError


def run(
    data: DataName,
    model: ModelName = None,
    method: MethodName = None,
    budget: BudgetText = None,
    tolerance: Tolerance = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss",
            help="Largest loss of validation AUC to accept. Replaces --budget: the search finds the smallest plan that loses no more.",
        ),
    ] = None,
    bits: BitsName = None,
    target: TargetName = None,
    seeds: NumSeeds = None,
    init: InitName = None,
    controls: Annotated[
        str | None,
        typer.Option(
            "--controls",
            help="Methods to compare with, run at the same budget, separated by commas, such as sseds,uniform:8; '' for none.",
        ),
    ] = None,
    track: TrackerName = None,
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
        "model": model, "method": method, "budget": budget, "tolerance": tolerance, "max_loss": max_loss, "bits": parse_bits(bits), "target": target,
        "seeds": seeds, "init": init, "seed": seed, "controls": None if controls is None else split_commas(controls),
    }  # fmt: skip
    settings, trackers = run_config(data, config, overrides, flags), trackers_of(track, out)
    from embtrim.experiments import estimates
    from embtrim.experiments.run import run as run_all
    from embtrim.reports.run_page import write_report
    from embtrim.system.holding import watch_folder

    encoded = embtrim.load(data)
    if dry_run:
        facts = estimates.dry_run(encoded, settings)
        show_dry_run(facts.pop("config"), facts, as_json)
        return
    path = needed(out)
    with closed_after(trackers):
        records = run_all(encoded, settings, path, progress=not quiet, callbacks=[RecordLog(), *trackers])
    with watch_folder(path):  # which somebody may have removed
        write_report(records, path / "report.html")
    show_records(records, as_json)
    log_line(f"report: {path / 'report.html'}")


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
    track: TrackerName = None,
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
    flags = {name: None if text is None else split_commas(text) for name, text in lists.items()}
    settings = compare_config(
        data, config, overrides, {**flags, "seeds": seeds, "init": init, "target": target, "seed": seed}
    )
    trackers = trackers_of(track, out)
    from embtrim.experiments import comparison
    from embtrim.experiments.grid import read_skipped
    from embtrim.experiments.records import read_records
    from embtrim.reports.comparison_page import write_comparison
    from embtrim.system.holding import watch_folder

    encoded = embtrim.load(data)
    if dry_run:
        show_dry_run(settings, comparison.estimate(encoded, settings, out), as_json)
        return
    folder = needed(out)
    with closed_after(trackers):
        told = [RecordLog(), *trackers]
        made = comparison.compare(encoded, settings, folder, jobs=jobs, progress=not quiet, callbacks=told)
    if made.records:
        with watch_folder(folder):
            write_comparison(read_records(folder), folder, read_skipped(folder))
    if as_json:
        parts = {"records": made.records, "skipped": made.skipped}
        print_json({name: [part.model_dump(mode="json") for part in found] for name, found in parts.items()})
    elif made.records:
        show_comparison(made.records, made.skipped)
    log_line(f"tables: {folder / 'README.md'}, page: {folder / 'report.html'}")


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
