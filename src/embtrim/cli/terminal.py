"""Output of the commands: results on stdout, logs on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from embtrim.config import Config, all_settings, to_toml
from embtrim.untrusted import printable

if TYPE_CHECKING:  # --help must wait neither for rich nor for torch, which the others import
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment
    from rich.table import Table

    from embtrim.data.dataset import EncodedDataset
    from embtrim.data.profile import LogProfile
    from embtrim.experiments.grid import Skipped
    from embtrim.experiments.records import RunRecord
    from embtrim.methods.curves import SizeCurve
    from embtrim.schema import Schema
    from embtrim.serving.updating import UpdateReport

# Width of a table, in characters, on a file or a pipe: these have no width of their own.
PIPE_WIDTH = 160


class _LogLines(logging.Handler):
    """Writes log lines to the present sys.stderr, which tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(printable(self.format(record)), err=True)


def start_log(quiet: bool) -> None:
    """Log to stderr: only warnings if quiet."""
    logger = logging.getLogger("embtrim")
    if not any(isinstance(handler, _LogLines) for handler in logger.handlers):
        logger.addHandler(_LogLines())
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def log_line(text: str) -> None:
    """Write one line to the log."""
    logging.getLogger("embtrim.cli").info(text)


class RecordLog:
    """A callback that logs each trained model of a run or a grid."""

    def on_record(self, record: RunRecord, done: int, total: int) -> None:
        """Log one."""
        from embtrim.reports.numbers import format_bytes, format_seconds

        words = [record.model, record.variant, *([] if record.budget is None else [record.budget])]
        log_line(
            f"{done} of {total}: {' '.join(words)}, seed {record.seed}: test AUC {record.test['auc']:.4f}, "
            f"tables {format_bytes(record.table_bytes)}, search {format_seconds(record.search_seconds)}, "
            f"training {format_seconds(record.train_seconds)}"
        )


def print_text(text: str) -> None:
    """Print a text; control characters are shown as escapes."""
    typer.echo(printable(text.rstrip("\n")))


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=1))


def _print_table(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False).print(_Printable(table))


class _Printable:
    """A table whose control characters are shown as escapes."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for segment in console.render(self.table, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def show_records(records: Sequence[RunRecord], as_json: bool, many: bool = True) -> None:
    """Print records as a table or as JSON: a list if `many`, else the one record."""
    if as_json:
        dumped = [record.model_dump(mode="json") for record in records]
        print_json(dumped if many else dumped[0])
        return
    from embtrim.reports.run_tables import terminal_table

    _print_table(terminal_table(records))


def show_comparison(records: Sequence[RunRecord], skipped: Sequence[Skipped]) -> None:
    """Print the tables of a grid."""
    from embtrim.reports.comparison_tables import comparison_terminal

    for table in comparison_terminal(records, skipped):
        _print_table(table)


def show_curve(curve: SizeCurve, as_json: bool) -> None:
    """Print the predicted scores of a curve as a table, and its knee in words."""
    if as_json:
        print_json(curve.to_dict())
        return
    from embtrim.reports.curve_tables import curve_headline, curve_terminal

    _print_table(curve_terminal(curve))
    print_text(curve_headline(curve))


def show_update(report: UpdateReport) -> None:
    """Print the changes of an update: a table of tables, the metrics, the facts."""
    facts = report.to_dict()
    show_rows(
        [{k.replace("_", " "): f"{v:,}" if isinstance(v, int) else v for k, v in t.items()} for t in facts["tables"]],
        as_json=False,
    )
    print_text(
        f"version {report.version} of plan and schema: schema {report.schema_before} -> {report.schema_after}, "
        f"plan {report.plan_before} -> {report.plan_after}"
        + (", values re-numbered by frequency" if report.renumbered else "")
    )
    for split, before in report.before.items():
        pairs = [f"{key} {before[key]:.4f} -> {report.after[split][key]:.4f}" for key in ("auc", "logloss")]
        print_text(f"{split}: {', '.join(pairs)}")
    for name in ("table_bytes", "bundle_bytes"):
        show_facts({f"{name}_{when}": facts[f"{name}_{when}"] for when in ("before", "after")}, as_json=False)
    show_facts({name: facts[name] for name in ("num_rows", "epochs", "seconds")}, as_json=False)


def show_dry_run(settings: Config | Mapping[str, Any], facts: Mapping[str, Any], as_json: bool) -> None:
    """Print the settings that a command would use, and facts."""
    values = settings.model_dump(mode="json") if isinstance(settings, Config) else settings
    if as_json:
        print_json({"config": values, **facts})
        return
    print_text(all_settings(values))
    print_text("")
    show_facts(facts, as_json=False)


def show_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts line by line, in the unit that the name tells, or as JSON."""
    if as_json:
        print_json(facts)
        return
    from embtrim.reports.numbers import format_bytes, format_count, format_seconds

    for name, value in facts.items():
        words = name.replace("_", " ")
        unit = format_bytes if "bytes" in name else format_seconds if name.startswith("seconds") else None
        if unit is not None and isinstance(value, dict):  # a range
            words = words.removesuffix(" bytes").replace("seconds", "time")
            print_text(f"{words}: {unit(value['least'])} to {unit(value['most'])}")
        elif unit is not None:
            print_text(f"{words.replace('seconds', 'time')}: {unit(value)}")
        elif isinstance(value, dict):
            parts = (f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items() if v is not None)
            print_text(f"{words}: {', '.join(parts)}")
        elif isinstance(value, list):
            print_text(f"{words}: {', '.join(str(v) for v in value)}")
        else:
            print_text(f"{words}: {format_count(value) if isinstance(value, int) else value}")


def show_encoded(data: EncodedDataset, folder: Path, as_json: bool) -> None:
    """Print the result of encoding: the fields, the rows of each split, the schema."""
    num_rows = {name: data.num_rows(name) for name in data.splits}
    from embtrim.data.dataset import Meta

    skipped = {name: lines.model_dump(mode="json") for name, lines in Meta.load(folder).skipped.items()}
    if as_json:
        facts = {"folder": str(folder), "fingerprint": data.schema.fingerprint, "num_rows": num_rows}
        print_json({**facts, "skipped": skipped, "schema": data.schema.model_dump(mode="json")})
        return
    show_schema(data.schema, as_json)
    rows = ", ".join(f"{name} {count:,}" for name, count in num_rows.items())
    print_text(f"{folder}: rows {rows}; schema {data.schema.describe()}")
    for name, lines in skipped.items():
        print_text(f"skipped {lines['num_lines']:,} lines of the {name} log that cannot be read")


def show_profile(found: LogProfile, as_json: bool) -> None:
    """Print the profile of a log: a table of its fields, and what has drifted."""
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    from embtrim.data.profile import describe_drift
    from embtrim.reports.profile_tables import profile_rows

    show_rows(profile_rows(found), as_json=False)
    print_text(f"{found.log}: {found.rows:,} rows")
    for lines in found.profile.skipped.values():
        print_text(f"skipped {lines.num_lines:,} lines that cannot be read")
    for line in describe_drift(found.drift):
        print_text(f"drift: {line}")


def show_encode_dry_run(settings: Config, drafted: Schema, as_json: bool) -> None:
    """Print the settings and the schema that encoding would use."""
    if as_json:
        print_json({"config": settings.model_dump(mode="json"), "schema": drafted.model_dump(mode="json")})
        return
    print_text(to_toml(settings))
    show_schema(drafted, as_json)


def show_schema(schema: Schema, as_json: bool) -> None:
    """Print the fields of a schema."""
    if as_json:
        print_json(schema.model_dump(mode="json"))
        return
    rows = []
    for field in schema.fields:
        row = {
            "field": field.name,
            "type": field.type,
            "transform": field.transform or "",
            "min_count": field.min_count,
        }
        if field.vocab_size is not None:
            row["rows"] = f"{field.vocab_size:,}"
        rows.append({**row, "table": field.table_name if field.table else ""})
    show_rows(rows, as_json=False, shown=list(dict.fromkeys(key for row in rows for key in row)))
    if schema.time is not None:
        print_text(f"time column: {schema.time}")


def show_rows(rows: Sequence[Mapping[str, Any]], as_json: bool, shown: Sequence[str] | None = None) -> None:
    """Print rows as JSON or as a table of the columns `shown`, by default all columns of the first row."""
    if as_json:
        print_json(rows)
        return
    from rich.table import Table
    from rich.text import Text

    names = list(shown or rows[0])
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(name, ""))) for name in names))
    _print_table(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, dict):
        return ", ".join(f"{key} = {json.dumps(v)}" for key, v in value.items())
    return str(value)


def first_line(doc: str | None) -> str:
    """The first line of a module's docstring, without the name before the colon."""
    return (doc or "").strip().partition("\n")[0].partition(": ")[2]
