"""Run records -> the terminal table and one self-contained HTML page.

Records of one variant over several seeds are shown as mean ± sample standard deviation; differences are taken seed by
seed against the full model of the same data, model and seed. Every figure shown is computed from the records, which
the page carries as JSON (`<script id="records">`). Its look and its safety are page.py's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from embtrim.errors import DataError
from embtrim.experiments.records import RunRecord
from embtrim.methods import METHODS
from embtrim.reports.numbers import (
    NONE,
    byte_ticks,
    format_bytes,
    format_count,
    format_seconds,
    format_share,
    format_values,
)
from embtrim.reports.page import details, figure_section, html_table, make_figure, render, safe_text, short_text
from embtrim.system.files import write_then_rename

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey is the full model's.
FULL_COLOR = "#555555"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


@dataclass(frozen=True)
class Variant:
    """The records of one variant over its seeds.

    Attributes:
        label: what tells it apart in tables and plots, such as "sseds 10%".
        records: one a seed.
        full: the records of the full model with the same data, model and seed; None where there is none.
    """

    label: str
    records: tuple[RunRecord, ...]
    full: tuple[RunRecord | None, ...]

    @property
    def is_full(self) -> bool:
        """Whether this is the full model."""
        return self.records[0].variant == "full"

    def mean(self, value: Callable[[RunRecord], float | None]) -> float | None:
        """Mean of a value over the seeds that have it."""
        found = [v for r in self.records if (v := value(r)) is not None]
        return statistics.fmean(found) if found else None


def variants(records: Sequence[RunRecord]) -> list[Variant]:
    """Group records over seeds: full models first, then searches, then controls; large before small.

    Budgets (and then search settings) tell groups apart where one seed has several records of a method.

    Raises:
        DataError: no records.
    """
    if not records:
        raise DataError("there are no records to report")
    fulls = {_origin(r): r for r in records if r.variant == "full"}
    several = len({(r.data["fingerprint"], r.model) for r in records}) > 1
    groups: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.data["fingerprint"], record.model, record.variant), []).append(record)
    found: list[Variant] = []
    for group in groups.values():
        parts = _apart(_apart([group], lambda r: r.budget), lambda r: json.dumps(r.search, sort_keys=True))
        for part in parts:
            ordered = tuple(sorted(part, key=lambda r: r.seed))
            label = _label(ordered[0], {r.budget for r in ordered}, several, len(parts))
            found.append(Variant(label, ordered, tuple(fulls.get(_origin(r)) for r in ordered)))
    controls = {name for name, method in METHODS.items() if method.needs == "nothing"}

    def place(variant: Variant) -> tuple[int, str, float]:
        name = variant.records[0].variant
        return (0 if variant.is_full else 1 + (name in controls), name, -(variant.mean(lambda r: r.table_bytes) or 0))

    return sorted(found, key=place)


def _origin(record: RunRecord) -> tuple[str, str, int]:
    return (record.data["fingerprint"], record.model, record.seed)


def _apart(groups: list[list[RunRecord]], key: Callable[[RunRecord], Any]) -> list[list[RunRecord]]:
    """Split those groups by `key` in which a seed occurs twice."""
    result: list[list[RunRecord]] = []
    for group in groups:
        if len({r.seed for r in group}) == len(group):
            result.append(group)
            continue
        parts: dict[Any, list[RunRecord]] = {}
        for record in group:
            parts.setdefault(key(record), []).append(record)
        result += parts.values()
    return result


def _label(record: RunRecord, budgets: set[str | None], several: bool, num_parts: int) -> str:
    words = [record.variant]
    if several:
        words.insert(0, f"{record.data['folder'] or record.data['fingerprint']} {record.model}")
    # Seeds whose budgets differ sought the smallest plan: the table shows what each kept.
    if len(budgets) == 1 and record.budget is not None:
        words.append(record.budget)
    if num_parts > 1 and record.search:
        words.append(", ".join(f"{key}={value}" for key, value in record.search.items()))
    return " ".join(words)


# --- numbers as text ------------------------------------------------------------------------------------------------


# --- the table ------------------------------------------------------------------------------------------------------


def table_rows(groups: Sequence[Variant]) -> list[tuple[str, list[str]]]:
    """The table as text: (name of the row, a cell a variant)."""
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, cell: Callable[[Variant], str]) -> None:
        rows.append((name, [cell(v) for v in groups]))

    row("test AUC", lambda v: format_values([r.test.get("auc") for r in v.records]))
    row("  difference to full", lambda v: NONE if v.is_full else format_values(auc_differences(v), signed=True))
    row("test logloss", lambda v: format_values([r.test.get("logloss") for r in v.records]))
    row("calibration", lambda v: format_values([r.test.get("calibration") for r in v.records], digits=3))
    row("embedding params", lambda v: format_count(v.mean(lambda r: r.num_params)))
    row("  of the full tables", lambda v: format_share(v.mean(lambda r: r.num_params / max(1, r.num_full_params))))
    if any(r.bits != 32 for v in groups for r in v.records):
        row("bits of a value", lambda v: ", ".join(dict.fromkeys(str(r.bits) for r in v.records)))
    row("table bytes", lambda v: format_bytes(v.mean(lambda r: r.table_bytes)))
    row("bundle on disk", lambda v: format_bytes(v.mean(lambda r: r.bundle_bytes or None)))
    row("vocabulary in it", lambda v: format_bytes(v.mean(lambda r: r.vocabulary_bytes or None)))
    row("peak memory", lambda v: format_bytes(v.mean(lambda r: r.peak_memory_bytes)))
    row("search time", lambda v: NONE if v.is_full else format_seconds(v.mean(lambda r: r.search_seconds)))
    row("training time", lambda v: format_seconds(v.mean(lambda r: r.train_seconds)))
    row("seeds", lambda v: format_count(len(v.records)))
    return rows


def auc_differences(variant: Variant) -> list[float | None]:
    """Test AUC minus the full model's, seed by seed; None where there is no full model to compare with."""
    pairs = zip(variant.records, variant.full, strict=True)
    return [
        record.test["auc"] - full.test["auc"] if full is not None and record.test and full.test else None
        for record, full in pairs
    ]


def terminal_table(records: Sequence[RunRecord]) -> Table:
    """The table for a terminal: a column a variant (full, compact, controls), means ± spread over seeds.

    Raises:
        DataError: no records.
    """
    groups = variants(records)
    table = Table(title=Text(_title(groups)), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for variant in groups:
        table.add_column(Text(variant.label), justify="right", no_wrap=True)
    for name, cells in table_rows(groups):
        table.add_row(Text(name), *map(Text, cells))
    return table


def _title(groups: Sequence[Variant]) -> str:
    records = [r for v in groups for r in v.records]
    models = ", ".join(dict.fromkeys(r.model for r in records))
    datasets = ", ".join(dict.fromkeys(r.data["folder"] or r.data["fingerprint"] for r in records))
    return f"{models} on {datasets}"


# --- the page -------------------------------------------------------------------------------------------------------


def write_report(records: Sequence[RunRecord], path: str | Path) -> None:
    """Write one self-contained HTML page: it works offline, and carries the records as JSON.

    Args:
        records: of one run or several; see `read_records`.
        path: of the page; written under a temporary name, then renamed.

    Raises:
        DataError: no records.
    """
    page = render_page(records)
    write_then_rename(Path(path), lambda file: file.write(page.encode()))


def render_page(records: Sequence[RunRecord]) -> str:
    """The page as text; see `write_report`."""
    groups = variants(records)
    figures = {
        "auc-bytes": _auc_against_bytes(groups),
        "widths": _widths_figure(groups),
        "deciles": _deciles_figure(groups),
        "calibration": _calibration_figure(groups),
    }
    title = f"embtrim: {_title(groups)}"
    body = [
        f"<h1>{safe_text(_title(groups))}</h1>",
        *(f"<p class=lead>{safe_text(line)}</p>" for line in _headlines(groups)),
        _table_section(groups),
        figure_section(
            "auc-bytes",
            "AUC against bytes",
            "Small points are seeds, large ones their mean. Bytes are those of the embedding tables with first-order "
            "weights, as they are stored.",
        ),
        figure_section(
            "widths",
            "Width of each field",
            "Columns of each field's embedding before and after, mean over seeds. A field at 0 keeps no embedding "
            "(its first-order weights, if the model has them, stay).",
        ),
        _widths_table(groups),
        figure_section(
            "deciles",
            "AUC by frequency of the row's rarest value",
            "Test rows in ten equal groups, from those with the rarest feature value (1) to those with only frequent "
            "ones (10). What is lost for rare values hides in the overall AUC.",
        ),
        figure_section(
            "calibration", "Calibration", "Mean predicted probability over mean label on the test rows; 1 is right."
        ),
        _verification_section(groups),
        _cost_section(groups),
        _settings_section(groups),
    ]
    data = [record.model_dump(mode="json") for variant in groups for record in variant.records]
    return render(title, body, data, figures)


def _headlines(groups: Sequence[Variant]) -> list[str]:
    """One sentence for each variant that is not a control."""
    lines = []
    for variant in groups:
        method = METHODS.get(variant.records[0].variant)
        if variant.is_full or (method is not None and method.needs == "nothing"):
            continue
        share = format_share(variant.mean(lambda r: r.num_params / max(1, r.num_full_params)))
        tables = format_bytes(variant.mean(lambda r: r.table_bytes))
        line = f"{variant.label} keeps {share} of the embedding parameters"
        fulls = [full for full in variant.full if full is not None]
        if not fulls:
            lines.append(f"{line}: {tables} of tables.")
            continue
        before = format_bytes(statistics.fmean(f.table_bytes for f in fulls))
        difference = format_values(auc_differences(variant), signed=True)
        lines.append(f"{line}: tables of {before} become {tables}; test AUC changes by {difference}.")
    return lines


def _color(groups: Sequence[Variant], variant: Variant) -> str:
    if variant.is_full:
        return FULL_COLOR
    return COLORS[[v for v in groups if not v.is_full].index(variant) % len(COLORS)]


def _symbol(groups: Sequence[Variant], variant: Variant) -> str:
    return SYMBOLS[list(groups).index(variant) % len(SYMBOLS)]


def _auc_against_bytes(groups: Sequence[Variant]) -> dict[str, Any]:
    traces = []
    for variant in groups:
        scored = [r for r in variant.records if r.test]
        if not scored:
            continue
        marker = {"color": _color(groups, variant), "symbol": _symbol(groups, variant)}
        seeds = {
            "x": [r.table_bytes for r in scored],
            "y": [r.test["auc"] for r in scored],
            "text": [safe_text(f"{variant.label}, seed {r.seed}: {format_bytes(r.table_bytes)}") for r in scored],
        }
        mean = {
            "x": [statistics.fmean(seeds["x"])],
            "y": [statistics.fmean(seeds["y"])],
            "text": [
                safe_text(f"{variant.label}, mean of {len(scored)}: {format_bytes(statistics.fmean(seeds['x']))}")
            ],
        }
        shared = {
            "type": "scatter",
            "mode": "markers",
            "name": safe_text(variant.label),
            "legendgroup": variant.label,
            "hovertemplate": "%{text}<br>AUC %{y:.4f}<extra></extra>",
        }
        if len(scored) > 1:
            traces.append({**shared, **seeds, "marker": {**marker, "size": 7, "opacity": 0.5}, "showlegend": False})
        traces.append({**shared, **mean, "marker": {**marker, "size": 14}})
    # A logarithmic axis in bytes: the sizes to compare lie factors apart.
    sizes = [r.table_bytes for v in groups for r in v.records]
    ticks = byte_ticks(min(sizes), max(sizes))
    axis = {
        "title": {"text": "table bytes"},
        "type": "log",
        "tickvals": ticks,
        "ticktext": [format_bytes(t) for t in ticks],
    }
    return make_figure(traces, axis, {"title": {"text": "test AUC"}, "tickformat": ".4f"}, height=400)


def _field_names(groups: Sequence[Variant]) -> list[str]:
    return list(dict.fromkeys(name for v in groups for r in v.records for name in r.widths))


def _widths_figure(groups: Sequence[Variant]) -> dict[str, Any]:
    names = _field_names(groups)
    # Positions are numbers, not names: names cut to one text must not fall together.
    traces = []
    for variant in groups:
        places, widths, texts = [], [], []
        for place, name in enumerate(names):
            width = variant.mean(lambda r, name=name: r.widths.get(name))
            if width is not None:
                places.append(place)
                widths.append(width)
                texts.append(safe_text(f"{name}: {width:g} ({variant.label})"))
        color = _color(groups, variant)
        marker: dict[str, Any] = {"color": color, "symbol": _symbol(groups, variant), "size": 9, "opacity": 0.85}
        if variant.is_full:
            marker = {"color": color, "symbol": "line-ns-open", "size": 12, "line": {"width": 2}}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": safe_text(variant.label),
                "x": widths,
                "y": places,
                "text": texts,
                "hovertemplate": "%{text}<extra></extra>",
                "marker": marker,
                "cliponaxis": False,
            }
        )
    vertical = {
        "tickvals": list(range(len(names))),
        "ticktext": [short_text(name) for name in names],
        "range": [len(names) - 0.4, -0.6],
        "automargin": True,
        "zeroline": False,
    }
    return make_figure(
        traces, {"title": {"text": "columns"}, "rangemode": "tozero"}, vertical, height=150 + 24 * len(names)
    )


def _deciles_figure(groups: Sequence[Variant]) -> dict[str, Any]:
    traces = []
    for variant in groups:
        by_decile: dict[int, list[list[Any]]] = {}
        for record in variant.records:
            for entry in record.test.get("auc_by_decile") or ():
                by_decile.setdefault(entry[0], []).append(entry)
        if not by_decile:
            continue
        deciles = sorted(by_decile)
        aucs = [[e[3] for e in by_decile[d] if e[3] is not None] for d in deciles]
        frequencies = [statistics.fmean(e[2] for e in by_decile[d]) for d in deciles]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": safe_text(variant.label),
                "x": deciles,
                "y": [statistics.fmean(found) if found else None for found in aucs],
                "text": [
                    safe_text(
                        f"{variant.label}: rarest value seen {f:,.0f} times, {format_count(by_decile[d][0][1])} rows"
                    )
                    for d, f in zip(deciles, frequencies, strict=True)
                ],
                "hovertemplate": "%{text}<br>AUC %{y:.4f}<extra></extra>",
                "marker": {"color": _color(groups, variant), "symbol": _symbol(groups, variant), "size": 7},
                "line": {"color": _color(groups, variant), "width": 1.5},
            }
        )
    axis = {"title": {"text": "decile (1: rarest)"}, "dtick": 1}
    return make_figure(traces, axis, {"title": {"text": "test AUC"}, "tickformat": ".3f"}, height=380)


def _calibration_figure(groups: Sequence[Variant]) -> dict[str, Any]:
    traces = []
    for place, variant in enumerate(groups):
        values = [r.test["calibration"] for r in variant.records if r.test]
        if not values:
            continue
        marker = {"color": _color(groups, variant), "symbol": _symbol(groups, variant)}
        shared = {
            "type": "scatter",
            "mode": "markers",
            "name": safe_text(variant.label),
            "hovertemplate": "%{text}: %{x:.3f}<extra></extra>",
            "showlegend": False,
        }
        seeds = [safe_text(f"{variant.label}, seed {r.seed}") for r in variant.records if r.test]
        if len(values) > 1:
            dots = {"x": values, "y": [place] * len(values), "text": seeds}
            traces.append({**shared, **dots, "marker": {**marker, "size": 7, "opacity": 0.5}})
        large = {"x": [statistics.fmean(values)], "y": [place], "text": [safe_text(f"{variant.label}, mean")]}
        traces.append({**shared, **large, "marker": {**marker, "size": 14}})
    vertical = {
        "tickvals": list(range(len(groups))),
        "ticktext": [safe_text(v.label) for v in groups],
        "range": [len(groups) - 0.4, -0.6],
        "automargin": True,
        "zeroline": False,
    }
    found = [1.0, *(r.test["calibration"] for v in groups for r in v.records if r.test)]
    room = 0.08 * (max(found) - min(found)) or 0.01
    axis = {"title": {"text": "predicted / observed"}, "range": [min(found) - room, max(found) + room]}
    figure = make_figure(traces, axis, vertical, height=130 + 34 * len(groups))
    line = {"color": "#999999", "dash": "dot", "width": 1}
    figure["layout"]["shapes"] = [{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": line}]
    return figure


def _table_section(groups: Sequence[Variant]) -> str:
    note = "Means ± sample standard deviation over seeds; differences are taken seed by seed."
    rows = [[name, *cells] for name, cells in table_rows(groups)]
    return f"<section><h2>Results</h2>{html_table(['', *(v.label for v in groups)], rows)}<p class=note>{note}</p></section>"


def _widths_table(groups: Sequence[Variant]) -> str:
    rows = []
    for name in _field_names(groups):
        widths = [v.mean(lambda r, name=name: r.widths.get(name)) for v in groups]
        rows.append([name, *(NONE if w is None else f"{w:.3g}" for w in widths)])
    parts = [details("Widths as a table", html_table(["field", *(v.label for v in groups)], rows))]
    if any(r.kept_rows != r.num_rows for v in groups for r in v.records):
        tables = dict.fromkeys(name for v in groups for r in v.records for name in r.kept_rows)
        rows = [[n, *(format_count(v.mean(lambda r, n=n: r.kept_rows.get(n))) for v in groups)] for n in tables]
        parts.append(details("Rows of each table", html_table(["table", *(v.label for v in groups)], rows)))
    return "\n".join(parts)


def _verification_section(groups: Sequence[Variant]) -> str:
    rows = []
    for variant in groups:
        for record in variant.records:
            found = record.verification
            if found is not None:
                rows.append(
                    [
                        variant.label,
                        str(record.seed),
                        format_count(found["num_rows"]),
                        f"{found['max_difference']:.1e}",
                        f"{found['tolerance']:.0e}",
                        "yes" if found["passed"] else "NO",
                    ]
                )
    if not rows:
        return ""
    worst = max(r.verification["max_difference"] for v in groups for r in v.records if r.verification)
    note = (
        f"Before retraining, each compact model is compared with the masked full model on real rows in float64. Largest "
        f"difference of a logit, |compact - masked| / (1 + |masked|): {worst:.1e}."
    )
    header = ["variant", "seed", "rows compared", "max difference", "allowed", "equal"]
    return f"<section><h2>Compact equals masked</h2><p class=note>{safe_text(note)}</p>{html_table(header, rows)}</section>"


def _cost_section(groups: Sequence[Variant]) -> str:
    header = ["variant", "seed", "search", "in epochs", "training", "epochs", "rows/s", "peak memory", "precision"]
    rows = [
        [
            variant.label,
            str(record.seed),
            NONE if variant.is_full else format_seconds(record.search_seconds),
            NONE if variant.is_full else f"{record.search_epochs:.2f}",
            format_seconds(record.train_seconds),
            str(record.epochs),
            format_count(record.rows_per_second),
            format_bytes(record.peak_memory_bytes),
            record.precision,
        ]
        for variant in groups
        for record in variant.records
    ]
    note = (
        "Search time includes the search's own pretraining; “in epochs” counts it in training epochs of the full model. "
        "Peak memory is the anonymous memory of the process over search and training."
    )
    return f"<section><h2>Cost</h2><p class=note>{safe_text(note)}</p>{html_table(header, rows)}</section>"


def _settings_section(groups: Sequence[Variant]) -> str:
    parts = []
    for variant in groups:
        first = variant.records[0]
        settings = {
            "model": first.model,
            "hparams": first.hparams,
            "train": first.train,
            "method": first.variant,
            "search": first.search,
            "budget": [r.budget for r in variant.records],
            "init": first.init,
            "seeds": [r.seed for r in variant.records],
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        parts.append(details(f"Settings: {variant.label}", f"<pre>{safe_text(text)}</pre>"))
    records = [r for v in groups for r in v.records]
    facts = {
        "data": _distinct(f"{r.data['folder'] or 'in memory'}, schema {r.data['fingerprint']}" for r in records),
        "rows": _distinct(", ".join(f"{k} {v:,}" for k, v in r.data["num_rows"].items()) for r in records),
        "versions": _distinct(", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records),
        "hardware": _distinct(", ".join(f"{k}: {v}" for k, v in r.hardware.items()) for r in records),
    }
    rows = [[name, text] for name, text in facts.items()]
    return f"<section><h2>Settings and surroundings</h2>{''.join(parts)}{html_table(['', ''], rows, 'facts')}</section>"


def _distinct(texts: Any) -> str:
    return "; ".join(dict.fromkeys(texts))
