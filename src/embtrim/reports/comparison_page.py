"""Records of `compare` -> README.md and one self-contained HTML page with plots."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embtrim.experiments.grid import FULL, Skipped
from embtrim.experiments.records import RunRecord
from embtrim.reports.comparison_report import (
    Entry,
    Value,
    auc_of,
    comparison_tables,
    entries,
    groups,
    labels,
    logloss_of,
    mean_of,
    scopes,
    sheets,
)
from embtrim.reports.numbers import byte_ticks, format_bytes
from embtrim.reports.page import figure_section, html_table, make_figure, render, safe_text, short_text
from embtrim.reports.run_page import COLORS, FULL_COLOR, SYMBOLS
from embtrim.system.files import write_then_rename

log = logging.getLogger(__name__)

# The first line of a README.md that may be written over.
MARK = "<!-- written by embtrim from the records; changes are lost -->"


def write_comparison(
    records: Sequence[RunRecord], folder: str | Path, skipped: Sequence[Skipped] = (), page: Path | None = None
) -> None:
    """Write README.md into the folder, and the page.

    A README.md that embtrim did not write is left as it is.

    Args:
        records: of a grid.
        folder: the grid's.
        skipped: cells that could not be made.
        page: where the page goes; folder/report.html if not given.

    Raises:
        DataError: no records, or two of the same.
    """
    readme = Path(folder) / "README.md"
    text = f"{MARK}\n\n# {_title(records)}\n\n{_facts(records)}\n\n{comparison_tables(records, skipped)}"
    if readme.exists() and not readme.read_text("utf-8", errors="replace").startswith(MARK):
        log.warning("%s was not written by embtrim and is left as it is", readme)
    else:
        write_then_rename(readme, lambda file: file.write(text.encode()))
    html = render_comparison(records, skipped)
    write_then_rename(page or Path(folder) / "report.html", lambda file: file.write(html.encode()))


def render_comparison(records: Sequence[RunRecord], skipped: Sequence[Skipped] = ()) -> str:
    """The page as text; it works offline, and carries the records as JSON.

    Raises:
        DataError: no records, or two of the same.
    """
    found = entries(records)
    figures: dict[str, dict[str, Any]] = {}
    body = [f"<h1>{safe_text(_title(records))}</h1>", f"<p class=note>{safe_text(_facts(records))}</p>"]

    def show(figure: dict[str, Any], title: str, note: str) -> None:
        name = f"figure{len(figures)}"
        figures[name] = figure
        body.append(figure_section(name, title, note))

    band = "Means over seeds with a band of one sample standard deviation; grey: the full model."
    for name, part in scopes(found):
        show(_against_bytes(part, labels(found), "test AUC", auc_of), f"AUC against bytes: {name}", band)
        show(_against_bytes(part, labels(found), "test logloss", logloss_of), f"Logloss against bytes: {name}", band)
    for name, part in scopes(found):
        show(_widths(part), f"Width of each field: {name}", "Columns of each field by label, mean over seeds.")
    epochs = _bars(found, "search in epochs of the full model", lambda r: r.search_epochs, log_axis=True)
    show(epochs, "Search time", "Mean over budgets and seeds, on a logarithmic axis.")
    memory = _bars(found, "MB", lambda r: None if r.search_peak_bytes is None else r.search_peak_bytes / 1e6)
    show(memory, "Search memory", "Peak above what was resident at the start; mean over budgets and seeds.")
    for sheet in sheets(records, skipped):
        kind = "facts" if sheet.header[-1] == "reason" else "numbers"
        table = html_table(sheet.header, sheet.rows, kind)
        body.append(
            f"<section><h2>{safe_text(sheet.title)}</h2><p class=note>{safe_text(sheet.note)}</p>{table}</section>"
        )
    data = [e.record.model_dump(mode="json") for e in found]
    return render(f"embtrim: {_title(records)}", body, data, figures)


def _title(records: Sequence[RunRecord]) -> str:
    models = ", ".join(dict.fromkeys(r.model for r in records))
    datasets = ", ".join(dict.fromkeys(r.data["folder"] or r.data["fingerprint"] for r in records))
    return f"Comparison of {models} on {datasets}"


def _facts(records: Sequence[RunRecord]) -> str:
    rows = dict.fromkeys(", ".join(f"{k} {v:,}" for k, v in r.data["num_rows"].items()) for r in records)
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records)
    hardware = dict.fromkeys(", ".join(f"{k}: {v}" for k, v in r.hardware.items()) for r in records)
    return f"{len(records)} records. Rows: {'; '.join(rows)}. {'; '.join(versions)}. {'; '.join(hardware)}."


# --- the figures ----------------------------------------------------------------------------------------------------


def _against_bytes(found: Sequence[Entry], names: Sequence[str], title: str, value: Value) -> dict[str, Any]:
    """A line with a band a label, one point a budget; the full model as a horizontal line."""
    scored = [group for group in groups(found) if mean_of(group, value) is not None]
    sizes = [size for group in scored if (size := mean_of(group, lambda r: r.table_bytes)) is not None]
    if not sizes:
        return make_figure([], {}, {}, height=100)
    traces = []
    for name in [FULL, *names]:
        points = []
        for group in scored:
            if (group[0].budget is None) != (name == FULL) or (name not in (FULL, group[0].label)):
                continue
            values = [v for e in group if (v := value(e.record)) is not None]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            size = statistics.fmean(e.record.table_bytes for e in group)
            points.append((size, statistics.fmean(values), spread, group[0].record.budget or "", len(values)))
        if name == FULL and points:
            points = [(size, *points[0][1:]) for size in (min(sizes), max(sizes))]
        if points:
            traces += _line_with_band(name, sorted(points), _look(name, names))
    ticks = byte_ticks(int(min(sizes)), int(max(sizes)))
    x = {
        "title": {"text": "table bytes"},
        "type": "log",
        "tickvals": ticks,
        "ticktext": [format_bytes(t) for t in ticks],
    }
    return make_figure(traces, x, {"title": {"text": title}, "tickformat": ".4f"}, height=460)


def _look(name: str, names: Sequence[str]) -> dict[str, str]:
    """Colour, symbol and dash; six colours are told apart, then dashes tell more."""
    if name == FULL:
        return {"color": FULL_COLOR, "symbol": "line-ew", "dash": "solid"}
    number = list(names).index(name)
    dash = ("solid", "dash", "dot")[number // len(COLORS) % 3]
    return {"color": COLORS[number % len(COLORS)], "symbol": SYMBOLS[number % len(SYMBOLS)], "dash": dash}


def _line_with_band(
    name: str, points: Sequence[tuple[float, float, float, str, int]], look: dict[str, str]
) -> list[dict[str, Any]]:
    """Traces of (bytes, mean, spread, budget, seeds): the band is drawn only where there are several seeds."""
    sizes = [point[0] for point in points]
    shared = {"type": "scatter", "legendgroup": safe_text(name), "name": safe_text(name)}
    above, below = [p[1] + p[2] for p in points], [p[1] - p[2] for p in points]
    band = {
        **shared,
        "x": [*sizes, *reversed(sizes)],
        "y": [*above, *reversed(below)],
        "fill": "toself",
        "fillcolor": _faint(look["color"]),
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
    }
    line = {
        **shared,
        "x": sizes,
        "y": [p[1] for p in points],
        "text": [safe_text(f"{name} {p[3]}: ± {p[2]:.4f} over {p[4]} seeds") for p in points],
        "hovertemplate": "%{text}<br>%{y:.4f}, %{x:.3s}B<extra></extra>",
        "mode": "lines" if name == FULL else "lines+markers",
        "line": {"color": look["color"], "width": 1.5, "dash": look["dash"]},
        "marker": {"color": look["color"], "symbol": look["symbol"], "size": 8},
    }
    return [band, line] if any(p[2] for p in points) else [line]


def _faint(color: str) -> str:
    red, green, blue = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _widths(found: Sequence[Entry]) -> dict[str, Any]:
    """A heat map field x label; a menu chooses the budget."""
    names = labels(found)
    fields = list(dict.fromkeys(field for e in found for field in e.record.widths))
    budgets = {e.budget: e.record.budget for e in found if e.budget is not None}
    traces = []
    for number, budget in enumerate(budgets):
        cells = [[e for e in found if e.budget == budget and e.label == name] for name in names]
        widths = [[mean_of(cell, lambda r, field=field: r.widths.get(field)) for cell in cells] for field in fields]
        texts = [[safe_text(f"{field}, {name}") for name in names] for field in fields]
        traces.append(
            {
                "type": "heatmap",
                "z": widths,
                "text": texts,
                "hovertemplate": "%{text}: %{z:.3g}<extra></extra>",
                "zmin": 0,
                "zmax": max(e.record.full_width for e in found),
                "colorscale": "Blues",
                "visible": number == 0,
                "colorbar": {"title": {"text": "columns"}},
            }
        )
    x = {"tickvals": list(range(len(names))), "ticktext": [short_text(name) for name in names], "showgrid": False}
    y = {
        "tickvals": list(range(len(fields))),
        "ticktext": [short_text(field) for field in fields],
        "range": [len(fields) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
    }
    figure = make_figure(traces, x, y, height=200 + 24 * len(fields))
    buttons = [
        {
            "label": safe_text(f"budget {text}"),
            "method": "restyle",
            "args": [{"visible": [k == number for k in range(len(budgets))]}],
        }
        for number, text in enumerate(budgets.values())
    ]
    figure["layout"]["updatemenus"] = [{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"}]
    return figure


def _bars(found: Sequence[Entry], title: str, value: Value, log_axis: bool = False) -> dict[str, Any]:
    """One bar a label and model."""
    names = labels(found)
    traces = []
    for number, (scope, part) in enumerate(scopes(found)):
        means = [mean_of((e for e in part if e.label == name and e.budget is not None), value) for name in names]
        shown = [(place, mean) for place, mean in enumerate(means) if mean is not None and (mean > 0 or not log_axis)]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": safe_text(scope),
                "x": [mean for _, mean in shown],
                "y": [place for place, _ in shown],
                "text": [safe_text(names[place]) for place, _ in shown],
                "textposition": "none",
                "hovertemplate": "%{text}: %{x:.3g}<extra>%{fullData.name}</extra>",
                "marker": {"color": COLORS[number % len(COLORS)]},
            }
        )
    x = {"title": {"text": title}, "type": "log" if log_axis else "linear"}
    y = {
        "tickvals": list(range(len(names))),
        "ticktext": [short_text(name) for name in names],
        "range": [len(names) - 0.5, -0.5],
        "zeroline": False,
    }
    return make_figure([t for t in traces if t["x"]], x, y, height=130 + 34 * len(names) + 8 * len(traces))
