"""The width of each field: as a plot and tables of a run, and as a heat map of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embtrim.reports.entries import Entry, labels, mean_of
from embtrim.reports.figures import make_figure, markers, plotly_text, tick_text
from embtrim.reports.numbers import NONE, format_count
from embtrim.reports.variants import Variant


def widths_figure(variants: Sequence[Variant]) -> dict[str, Any]:
    """A run's fields from top to bottom, with one marker a variant at the field's width."""
    names = field_names(variants)
    # Fields are placed by number: shortened names may be equal.
    traces = []
    for variant, marker in zip(variants, markers([v.is_full for v in variants]), strict=True):
        places, widths, texts = [], [], []
        for place, name in enumerate(names):
            width = variant.mean(lambda r, name=name: r.widths.get(name))
            if width is not None:
                places.append(place)
                widths.append(width)
                texts.append(plotly_text(f"{name}: {width:g} ({variant.label})"))
        look: dict[str, Any] = {**marker, "size": 9, "opacity": 0.85}
        if variant.is_full:
            look = {"color": marker["color"], "symbol": "line-ns-open", "size": 12, "line": {"width": 2}}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plotly_text(variant.label),
                "x": widths,
                "y": places,
                "text": texts,
                "hovertemplate": "%{text}<extra></extra>",
                "marker": look,
                "cliponaxis": False,
            }
        )
    y = {
        "tickvals": list(range(len(names))),
        "ticktext": [tick_text(name) for name in names],
        "range": [len(names) - 0.4, -0.6],
        "automargin": True,
        "zeroline": False,
    }
    return make_figure(traces, {"title": {"text": "columns"}, "rangemode": "tozero"}, y, height=150 + 24 * len(names))


def width_rows(variants: Sequence[Variant]) -> list[list[str]]:
    """A run's mean width of each field: the field's name, and one text a variant."""
    rows = []
    for name in field_names(variants):
        widths = [v.mean(lambda r, name=name: r.widths.get(name)) for v in variants]
        rows.append([name, *(NONE if width is None else f"{width:.3g}" for width in widths)])
    return rows


def kept_rows(variants: Sequence[Variant]) -> list[list[str]]:
    """A run's mean number of rows of each compact table; empty where every table keeps all its rows."""
    if all(r.kept_rows == r.num_rows for v in variants for r in v.records):
        return []
    tables = dict.fromkeys(name for v in variants for r in v.records for name in r.kept_rows)
    return [
        [name, *(format_count(v.mean(lambda r, name=name: r.kept_rows.get(name))) for v in variants)] for name in tables
    ]


def field_names(variants: Sequence[Variant]) -> list[str]:
    """The fields of all records, in the order of the schema."""
    return list(dict.fromkeys(name for v in variants for r in v.records for name in r.widths))


def widths_heat_map(entries: Sequence[Entry]) -> dict[str, Any]:
    """A comparison's mean width by field and label; a menu chooses the budget."""
    names = labels(entries)
    fields = list(dict.fromkeys(field for e in entries for field in e.record.widths))
    budgets = {e.budget: e.record.budget for e in entries if e.budget is not None}
    traces = []
    for number, budget in enumerate(budgets):
        by_label = [[e for e in entries if e.budget == budget and e.label == name] for name in names]
        widths = [[mean_of(own, lambda r, field=field: r.widths.get(field)) for own in by_label] for field in fields]
        texts = [[plotly_text(f"{field}, {name}") for name in names] for field in fields]
        traces.append(
            {
                "type": "heatmap",
                "z": widths,
                "text": texts,
                "hovertemplate": "%{text}: %{z:.3g}<extra></extra>",
                "zmin": 0,
                "zmax": max(e.record.full_width for e in entries),
                "colorscale": "Blues",
                "visible": number == 0,
                "colorbar": {"title": {"text": "columns"}},
            }
        )
    x = {"tickvals": list(range(len(names))), "ticktext": [tick_text(name) for name in names], "showgrid": False}
    y = {
        "tickvals": list(range(len(fields))),
        "ticktext": [tick_text(field) for field in fields],
        "range": [len(fields) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
    }
    figure = make_figure(traces, x, y, height=200 + 24 * len(fields))
    figure["layout"]["updatemenus"] = [_budget_menu([text or "" for text in budgets.values()])]
    return figure


def _budget_menu(budgets: Sequence[str]) -> dict[str, Any]:
    """A menu that shows the trace of one budget and hides the others."""
    buttons = [
        {
            "label": plotly_text(f"budget {text}"),
            "method": "restyle",
            "args": [{"visible": [other == number for other in range(len(budgets))]}],
        }
        for number, text in enumerate(budgets)
    ]
    return {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"}
