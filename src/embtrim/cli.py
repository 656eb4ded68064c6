"""The command line: one command per verb, each a thin mirror of a Python function.

Exit codes: 0 done, 1 failed, 2 usage (a flag or setting is wrong), 130 interrupted. Results go to stdout, logs to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

import embtrim
from embtrim.errors import ConfigError, EmbtrimError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigFile = Annotated[Optional[Path], typer.Option("--config", help="TOML file with settings.")]  # noqa: UP045
Settings = Annotated[list[str], typer.Option("--set", help="section.key=value; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    if version:
        typer.echo(f"embtrim {embtrim.__version__}")
        raise typer.Exit


@app.command()
def encode(
    log: Annotated[
        list[str], typer.Argument(help="Raw log: files, or a folder (csv, tsv, parquet, libsvm, libfm; .gz too).")
    ],
    out: Annotated[Optional[Path], typer.Option(help="Folder to write.")] = None,  # noqa: UP045
    label: Annotated[Optional[str], typer.Option(help="Column with the binary label, to infer a schema.")] = None,  # noqa: UP045
    schema: Annotated[
        Optional[Path], typer.Option(help="Schema as TOML; without it one is inferred and written beside OUT.")
    ] = None,  # noqa: UP045
    dataset: Annotated[Optional[str], typer.Option(help="Layout of a known dataset, see `embtrim datasets`.")] = None,  # noqa: UP045
    draft: Annotated[Optional[Path], typer.Option(help="Only infer the schema and write it here.")] = None,  # noqa: UP045
    split: Annotated[Optional[str], typer.Option(help="8:1:1, time:8:1:1 or time:CUT,CUT.")] = None,  # noqa: UP045
    valid: Annotated[Optional[str], typer.Option(help="Log of the validation split.")] = None,  # noqa: UP045
    test: Annotated[Optional[str], typer.Option(help="Log of the test split.")] = None,  # noqa: UP045
    header: Annotated[
        bool, typer.Option("--header/--no-header", help="Whether the first line names the columns.")
    ] = True,
    columns: Annotated[Optional[str], typer.Option(help="Names of the columns, separated by commas.")] = None,  # noqa: UP045
    separator: Annotated[Optional[str], typer.Option(help="What separates cells.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Of a random split.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an encoded dataset at OUT.")] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Encode a raw click log into memory-mapped ids."""
    from embtrim.catalog import encode_known
    from embtrim.drafting import infer_schema
    from embtrim.reading import ReadOptions

    source: Any = log[0] if len(log) == 1 else log
    names = tuple(columns.split(",")) if columns else None
    if draft is not None or dry_run:
        drafted = infer_schema(source, label, ReadOptions(header=header, columns=names, separator=separator))
        if draft is not None and not dry_run:
            drafted.save_draft(draft)
            typer.echo(f"wrote {draft}: edit it, then run embtrim encode with --schema {draft}", err=True)
        typer.echo(json.dumps(drafted.model_dump(mode="json"), indent=1))
        return
    if out is None:
        raise ConfigError("encode needs --out, the folder to write (or --draft to see the schema first)")
    if dataset is not None:
        data = encode_known(dataset, log[0], out, split=split, seed=seed, overwrite=overwrite, progress=not quiet)
    else:
        data = embtrim.encode(
            source, schema, label=label, out=out, split=split, valid=valid, test=test, seed=seed, header=header,
            columns=names, separator=separator, overwrite=overwrite, progress=not quiet,
        )  # fmt: skip
    facts = {
        "folder": str(out),
        "fingerprint": data.schema.fingerprint,
        "num_rows": {name: data.num_rows(name) for name in data.splits},
        "tables": data.schema.tables,
    }
    _show(facts, as_json, title=f"encoded {out}")


@app.command()
def train(
    data: Annotated[str, typer.Argument(help="Encoded folder, or a bundled dataset.")],
    out: Annotated[Path, typer.Option(help="Bundle to write.")],
    model: Annotated[Optional[str], typer.Option(help="Base model, see `embtrim models`.")] = None,  # noqa: UP045
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
    seed: Annotated[Optional[int], typer.Option(help="First seed.")] = None,  # noqa: UP045
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Train the full model and save it as a bundle."""
    from embtrim.bundle import save
    from embtrim.experiment import dry_run as estimate
    from embtrim.experiment import train_full

    encoded = embtrim.load(data)
    resolved = _resolve(data, config, settings, {"model": model, "seed": seed})
    if dry_run:
        _show(estimate(encoded, resolved), as_json, title="dry run")
        return
    trained = train_full(encoded, resolved, resolved.seed, progress=not quiet)
    record = trained.record
    save(trained.model, out, encoded, metrics={"valid": record.valid, "test": record.test})
    _show_records([record], as_json)


@app.command()
def search(
    bundle: Annotated[Path, typer.Argument(help="Bundle of a trained full model.")],
    data: Annotated[str, typer.Argument(help="Encoded folder, or a bundled dataset.")],
    out: Annotated[Path, typer.Option(help="Plan to write (JSON).")],
    method: Annotated[Optional[str], typer.Option(help="Search method, see `embtrim methods`.")] = None,  # noqa: UP045
    budget: Annotated[Optional[str], typer.Option(help="Such as 10%, 200MB, '1.5M params'.")] = None,  # noqa: UP045
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
    seed: Annotated[Optional[int], typer.Option(help="Seed of the search.")] = None,  # noqa: UP045
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Find what to keep of a model's embedding tables."""
    from embtrim.budget import Budget
    from embtrim.bundle import load_bundle
    from embtrim.methods import method_named
    from embtrim.sites import CTRTask

    encoded = embtrim.load(data)
    resolved = _resolve(data, config, settings, {"method": method, "budget": budget, "seed": seed})
    chosen = method_named(resolved.method)
    task = CTRTask(load_bundle(bundle).model, encoded, resolved.train)
    if dry_run:
        limit = task.full_plan().max_params(Budget.parse(resolved.budget))
        _show({"config": resolved.model_dump(mode="json"), "params_allowed": limit}, as_json, title="dry run")
        return
    plan = embtrim.search(task, chosen.config.parse(resolved.search, where="search"), resolved.budget, resolved.seed)
    plan.save(out)
    if as_json:
        typer.echo(out.read_text("utf-8"))
    else:
        typer.echo(plan.summary())


@app.command()
def compact(
    bundle: Annotated[Path, typer.Argument(help="Bundle of the full model.")],
    plan: Annotated[Path, typer.Argument(help="Plan to apply (JSON).")],
    data: Annotated[str, typer.Argument(help="Encoded folder, or a bundled dataset.")],
    out: Annotated[Path, typer.Option(help="Bundle to write.")],
    init: Annotated[str, typer.Option(help="scratch, initial or inherit.")] = "scratch",
    retrain: Annotated[bool, typer.Option("--train/--no-train", help="Whether to retrain.")] = True,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
    seed: Annotated[Optional[int], typer.Option(help="Seed of new weights and training.")] = None,  # noqa: UP045
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Apply a plan: verify, build the smaller model, retrain it, save it."""
    from embtrim.bundle import load_bundle, save
    from embtrim.compaction import compact as build_compact
    from embtrim.compaction import verify
    from embtrim.plan import SizePlan
    from embtrim.train import evaluate, fit

    encoded = embtrim.load(data)
    resolved = _resolve(data, config, settings, {"init": init, "seed": seed})
    full, sizes = load_bundle(bundle).model, SizePlan.load(plan)
    sizes.check_schema(full.schema)
    if dry_run:
        _show(
            {"table_bytes_before": full.tables.plan.num_bytes, "table_bytes_after": sizes.num_bytes},
            as_json,
            title="dry run",
        )
        return
    checked = verify(full, sizes, encoded)
    if not checked.passed:
        raise EmbtrimError(
            f"compact and masked model differ by {checked.max_difference:.2e}; please report this as a bug"
        )
    recoded = encoded.recode(sizes)
    small = build_compact(full, sizes, resolved.init, resolved.seed)
    if retrain:
        fit(small, recoded, resolved.train.replace(seed=resolved.seed), progress=not quiet)
    metrics = {name: evaluate(small, recoded, name).to_dict() for name in ("valid", "test") if name in recoded.splits}
    save(small, out, recoded, metrics=metrics)
    facts = {"bundle": str(out), "table_bytes": small.tables.plan.num_bytes, "verification": vars(checked), **metrics}
    _show(facts, as_json, title=f"wrote {out}")


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="Bundle of a model.")],
    log: Annotated[str, typer.Argument(help="Raw log to score.")],
    out: Annotated[Path, typer.Option(help="File to write: .parquet or .csv.")],
    keep: Annotated[list[str], typer.Option(help="Column of the log to copy into OUT; may be repeated.")] = [],  # noqa: B006
    header: Annotated[
        bool, typer.Option("--header/--no-header", help="Whether the first line names the columns.")
    ] = True,
    columns: Annotated[Optional[str], typer.Option(help="Names of the columns, separated by commas.")] = None,  # noqa: UP045
    separator: Annotated[Optional[str], typer.Option(help="What separates cells.")] = None,  # noqa: UP045
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Score a raw log; values that training never saw read the OOV row."""
    from embtrim.bundle import load_bundle, write_predictions
    from embtrim.reading import ReadOptions

    loaded = load_bundle(bundle)
    options = ReadOptions(header=header, columns=tuple(columns.split(",")) if columns else None, separator=separator)
    if dry_run:
        _show({"model": loaded.info["model"], "columns_needed": list(loaded.encoder.columns)}, as_json, title="dry run")
        return
    rows = write_predictions(loaded, log, out, keep=keep, options=options, progress=not quiet)
    _show({"out": str(out), "num_rows": rows}, as_json, title=f"wrote {out}")


@app.command()
def run(
    data: Annotated[str, typer.Argument(help="Encoded folder, or a bundled dataset such as flights.")],
    out: Annotated[Path, typer.Option(help="New folder for records, plans, bundles and the report.")],
    model: Annotated[Optional[str], typer.Option(help="Base model, see `embtrim models`.")] = None,  # noqa: UP045
    method: Annotated[Optional[str], typer.Option(help="Search method, see `embtrim methods`.")] = None,  # noqa: UP045
    budget: Annotated[Optional[str], typer.Option(help="Such as 10%, 200MB, '1.5M params'.")] = None,  # noqa: UP045
    max_loss: Annotated[
        Optional[float], typer.Option(help="Instead of a budget: validation AUC that may be lost.")
    ] = None,  # noqa: UP045
    seeds: Annotated[Optional[int], typer.Option(help="How many seeds.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="First seed.")] = None,  # noqa: UP045
    init: Annotated[
        Optional[str], typer.Option(help="How the compact model starts: scratch, initial, inherit.")
    ] = None,  # noqa: UP045
    controls: Annotated[
        Optional[str], typer.Option(help="Controls at the same budget, separated by commas; '' for none.")
    ] = None,  # noqa: UP045
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
    as_json: AsJson = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Train, search, compact, verify, retrain, save and report: the whole way."""
    from embtrim.experiment import dry_run as estimate
    from embtrim.experiment import run as run_experiment
    from embtrim.report import write_report

    encoded = embtrim.load(data)
    flags = {
        "model": model, "method": method, "budget": budget, "max_loss": max_loss, "seeds": seeds, "seed": seed, "init": init,
        "controls": None if controls is None else [c for c in controls.split(",") if c],
    }  # fmt: skip
    resolved = _resolve(data, config, settings, flags)
    if dry_run:
        _show(estimate(encoded, resolved), as_json, title="dry run")
        return
    records = run_experiment(encoded, resolved, out, progress=not quiet)
    write_report(records, out / "report.html")
    _show_records(records, as_json)
    typer.echo(f"report: {out / 'report.html'}", err=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Optional[Path], typer.Option(help="Page to write; FOLDER/report.html if not given.")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:
    """Write the HTML report of a run anew, and print its table."""
    from embtrim.report import read_records, write_report

    records = read_records(folder)
    target = out or folder / "report.html"
    write_report(records, target)
    _show_records(records, as_json)
    typer.echo(f"report: {target}", err=True)


@app.command()
def datasets(as_json: AsJson = False) -> None:
    """List the known datasets."""
    from embtrim.catalog import CATALOG

    rows = [
        {"name": e.name, "title": e.title, "bundled": e.bundled is not None, "licence": e.licence, "source": e.source,
         "how_to_get": e.how_to_get}
        for e in CATALOG.values()
    ]  # fmt: skip
    _show_rows(rows, as_json, hide=() if as_json else ("how_to_get",))


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the base models."""
    from embtrim.models import MODELS

    rows = [{"name": name, "what": _first_line(sys.modules[m.__module__].__doc__)} for name, m in MODELS.items()]
    _show_rows(rows, as_json)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the search methods and their settings."""
    from embtrim.methods import METHODS

    rows = [
        {
            "name": m.name,
            "what": _first_line(sys.modules[m.search.__module__].__doc__),
            "needs": m.needs,
            "settings": ", ".join(f"{key} = {value!r}" for key, value in m.config().model_dump().items()),
        }
        for m in METHODS.values()
    ]
    _show_rows(rows, as_json)


def _resolve(data: str, config: Path | None, settings: list[str], flags: dict[str, Any]) -> Any:
    """Settings of a run: a known dataset's recipe, below the file, below --set, below flags."""
    from embtrim.catalog import CATALOG
    from embtrim.config import apply_overrides, merge, read_toml
    from embtrim.experiment import RunConfig

    values: dict[str, Any] = {}
    if data in CATALOG:
        recipe = CATALOG[data].recipe
        values = {"hparams": dict(recipe.get("model", {})), "train": dict(recipe.get("train", {}))}
    if config is not None:
        values = merge(values, read_toml(config))
    values = apply_overrides(values, settings)
    values = merge(values, {key: value for key, value in flags.items() if value is not None})
    return RunConfig.parse(values, where=str(config) if config is not None else "settings")


def _show_records(records: list[Any], as_json: bool) -> None:
    from embtrim.report import terminal_table

    if as_json:
        typer.echo(json.dumps([record.model_dump(mode="json") for record in records], indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(terminal_table(records))


def _show(facts: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    typer.echo(title)
    for key, value in facts.items():
        typer.echo(f"  {key}: {json.dumps(value) if isinstance(value, (dict, list)) else value}")


def _show_rows(rows: list[dict[str, Any]], as_json: bool, hide: tuple[str, ...] = ()) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    shown = [key for key in rows[0] if key not in hide]
    table = Table(*shown, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(("yes" if row[key] else "") if isinstance(row[key], bool) else str(row[key]) for key in shown))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().splitlines()[0]


def main(arguments: list[str] | None = None) -> None:
    """Console entry point: errors become one clear line and an exit code."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("embtrim: interrupted; what was finished before is on disk, nothing is half-written")
        code = 130
    except ConfigError as error:
        errors.print(f"embtrim: {error}", markup=False)
        code = 2
    except (EmbtrimError, OSError) as error:
        errors.print(f"embtrim: {error}", markup=False)
        code = 1
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of click, which typer bundles or not, by version
        if show is None:
            raise
        show()
        code = 2
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
