"""The commands that make models step by step: train, curve, search, compact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import embtrim
from embtrim.cli.flags import (
    AsJson,
    BitsName,
    BudgetText,
    BundlePath,
    ConfigPath,
    DataName,
    DryRun,
    InitName,
    MethodName,
    ModelName,
    OutPath,
    Overrides,
    Overwrite,
    Quiet,
    Seed,
    TargetName,
    Tolerance,
    TrackerName,
)
from embtrim.cli.settings import closed_after, needed, parse_bits, parse_budgets, run_config, trackers_of
from embtrim.cli.terminal import (
    log_line,
    print_json,
    print_text,
    show_curve,
    show_dry_run,
    show_facts,
    show_records,
    start_log,
)
from embtrim.errors import ConfigError, DataError


def train(
    data: DataName,
    model: ModelName = None,
    track: TrackerName = None,
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
    settings = run_config(data, config, overrides, {"model": model, "seed": seed})
    trackers = trackers_of(track, out)
    from embtrim.experiments.estimates import estimate_training
    from embtrim.experiments.room import check_room, room_of_training
    from embtrim.experiments.steps import train_full
    from embtrim.serving.bundle import check_out, save
    from embtrim.system.folders import folder_bytes
    from embtrim.system.unfinished import unfinished
    from embtrim.training.callbacks import ForModel, tell_record

    encoded = embtrim.load(data)
    for split in ("train", "valid", "test"):
        encoded.split(split)
    if dry_run:
        facts = estimate_training(encoded, settings)
        show_dry_run(facts.pop("config"), facts, as_json)
        return
    target = needed(out)
    check_out(target, overwrite)  # before hours of training, not after them
    with closed_after(trackers), unfinished(target) as work:
        check_room(target, room_of_training(encoded, settings), work)
        told = [ForModel(trackers, f"{settings.model}-full-seed{settings.seed}")]
        trained = train_full(encoded, settings, not quiet, work / "full.safetensors", told)
        record = trained.record
        tell_record(trackers, record, 1, 1)
        metrics = {"valid": record.valid, "test": record.test}
        save(trained.model, target, encoded, metrics=metrics, seed=settings.seed, overwrite=overwrite)
    show_records([record.replace(bundle_bytes=folder_bytes(target))], as_json, many=False)
    log_line(f"bundle: {target}")


def search(
    bundle: BundlePath,
    data: DataName,
    method: MethodName = None,
    budget: BudgetText = None,
    tolerance: Tolerance = None,
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
    flags = {
        "method": method, "budget": budget, "tolerance": tolerance, "bits": parse_bits(bits), "target": target, "seed": seed,
    }  # fmt: skip
    settings = run_config(data, config, overrides, flags)
    from embtrim.experiments.estimates import estimate_search
    from embtrim.experiments.settings import method_config
    from embtrim.experiments.steps import find_plan, load_full
    from embtrim.system.unfinished import unfinished

    method_config(settings)
    encoded = embtrim.load(data)
    full = load_full(bundle, encoded)
    if dry_run:
        show_dry_run(settings, estimate_search(full, encoded, settings), as_json)
        return
    path = needed(out)
    if path.suffix != ".json":
        raise ConfigError(f"a plan is written as .json, --out is {path}")
    if path.exists() and not overwrite:  # before hours of searching, not after them
        raise DataError(f"{path} exists; choose another --out or pass --overwrite")
    with unfinished(path) as work:
        plan = find_plan(full, encoded, settings, progress=not quiet, unfinished=work).plan
        plan.save(path)
    if as_json:
        print_json(json.loads(path.read_text("utf-8")))
    else:
        print_text(plan.summary())
    log_line(f"plan: {path}")


def curve(
    bundle: BundlePath,
    data: DataName,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", help="Size limits of the compact tables, separated by commas: 50%,20%,10%,5%."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Predicted loss of validation AUC at the knee; 0.001 if not given."),
    ] = None,
    bits: BitsName = None,
    target: TargetName = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="RUN", help="Folder of a run whose measured points are drawn beside the lines."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for curve.json and the page curve.html; it may be RUN.")
    ] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Predict the validation AUC of every size. The trained model is read once, and nothing is trained."""
    start_log(quiet)
    flags = {"tolerance": tolerance, "bits": parse_bits(bits), "target": target, "seed": seed}
    settings = run_config(data, config, overrides, flags)
    if settings.method != "guided":
        raise ConfigError(f"method {settings.method!r} predicts no losses; a curve is that of method 'guided'")
    from embtrim.experiments.curve import size_curve
    from embtrim.experiments.estimates import estimate_curve
    from embtrim.experiments.records import read_records
    from embtrim.experiments.steps import load_full
    from embtrim.reports.curve_page import PAGE, VALUES, write_curve

    asked = None if budgets is None else parse_budgets(budgets)
    encoded = embtrim.load(data)
    full = load_full(bundle, encoded)
    records = () if run is None else read_records(run)
    if dry_run:
        show_dry_run(settings, estimate_curve(full, encoded, settings), as_json)
        return
    for path in () if out is None else (out / VALUES, out / PAGE):
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists; choose another --out or pass --overwrite")
    found = size_curve(full, encoded, settings, budgets=asked, progress=not quiet)
    show_curve(found, as_json)
    if out is not None:
        write_curve(found, out, records)
        log_line(f"values: {out / VALUES}, page: {out / PAGE}")


def compact(
    bundle: BundlePath,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan: the JSON file that `embtrim search` wrote.")],
    data: DataName,
    init: InitName = None,
    no_train: Annotated[
        bool,
        typer.Option(
            "--no-train",
            help="Do not retrain the compact model; needs --init inherit or low_rank, or a plan with the start low_rank.",
        ),
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
    settings = run_config(data, config, overrides, {"init": init, "seed": seed})
    from embtrim.experiments.estimates import estimate_compacting
    from embtrim.experiments.records import started_as
    from embtrim.experiments.steps import compact_and_retrain, load_full, verify_plan
    from embtrim.plan.plan import SizePlan
    from embtrim.serving.bundle import check_out, save
    from embtrim.system.folders import folder_bytes
    from embtrim.system.unfinished import unfinished
    from embtrim.training.evaluation import evaluate

    retrain, progress = not no_train, not quiet
    sizes = SizePlan.load(plan)
    if no_train and (start := started_as(sizes, settings.init)) not in ("inherit", "low_rank"):
        raise ConfigError(
            f"--no-train would save the untrained weights of --init {start}; add --init inherit or --init low_rank"
        )
    encoded = embtrim.load(data)
    full = load_full(bundle, encoded)
    sizes.check_schema(full.schema)
    if dry_run:
        show_dry_run(settings, estimate_compacting(full, sizes, encoded, settings, retrain), as_json)
        return
    target = needed(out)
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
