"""The figures of a comparison but its widths: a metric against bytes, and bars of the cost of searches."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from embtrim.experiments.grid import FULL
from embtrim.reports.entries import Entry, Value, groups, labels, mean_of, scopes
from embtrim.reports.figures import COLORS, FULL_COLOR, SYMBOLS, bytes_axis, make_figure, plotly_text, tick_text


class Point(NamedTuple):
    """A metric at one budget: bytes, mean and spread over seeds, the budget as written, the number of seeds."""

    size: float
    mean: float
    spread: float
    budget: str
    num_seeds: int


def metric_against_bytes(entries: Sequence[Entry], names: Sequence[str], title: str, value: Value) -> dict[str, Any]:
    """A line with a band for each label, with a point for each budget; the full model is a horizontal line.

    Args:
        entries: Entries of one data set and model.
        names: All labels of the comparison; their order gives colours and symbols.
        title: Name of the metric.
        value: The metric of a record.
    """
    scored = [group for group in groups(entries) if mean_of(group, value) is not None]
    sizes = [size for group in scored if (size := mean_of(group, lambda r: r.table_bytes)) is not None]
    if not sizes:
        return make_figure([], {}, {}, height=100)
    traces = []
    for name in [FULL, *names]:
        own = [g for g in scored if (FULL if g[0].budget is None else g[0].label) == name]
        points = sorted(_point(group, value) for group in own)
        if name == FULL and points:
            points = [points[0]._replace(size=size) for size in (min(sizes), max(sizes))]
        if points:
            traces += _line_with_band(name, points, _look(name, names))
    return make_figure(traces, bytes_axis(sizes), {"title": {"text": title}, "tickformat": ".4f"}, height=460)


def _point(group: Sequence[Entry], value: Value) -> Point:
    values = [v for e in group if (v := value(e.record)) is not None]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    size = statistics.fmean(e.record.table_bytes for e in group)
    return Point(size, statistics.fmean(values), spread, group[0].record.budget or "", len(values))


def _look(name: str, names: Sequence[str]) -> dict[str, str]:
    """Colour, symbol and dash; six labels differ in colour, further ones in dashes too."""
    if name == FULL:
        return {"color": FULL_COLOR, "symbol": "line-ew", "dash": "solid"}
    number = list(names).index(name)
    dash = ("solid", "dash", "dot")[number // len(COLORS) % 3]
    return {"color": COLORS[number % len(COLORS)], "symbol": SYMBOLS[number % len(SYMBOLS)], "dash": dash}


def _line_with_band(name: str, points: Sequence[Point], look: dict[str, str]) -> list[dict[str, Any]]:
    """Plotly's traces; the band is drawn only where there are several seeds."""
    sizes = [p.size for p in points]
    shared = {"type": "scatter", "legendgroup": plotly_text(name), "name": plotly_text(name)}
    above, below = [p.mean + p.spread for p in points], [p.mean - p.spread for p in points]
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
        "y": [p.mean for p in points],
        "text": [plotly_text(f"{name} {p.budget}: ± {p.spread:.4f} over {p.num_seeds} seeds") for p in points],
        "hovertemplate": "%{text}<br>%{y:.4f}, %{x:.3s}B<extra></extra>",
        "mode": "lines" if name == FULL else "lines+markers",
        "line": {"color": look["color"], "width": 1.5, "dash": look["dash"]},
        "marker": {"color": look["color"], "symbol": look["symbol"], "size": 8},
    }
    return [band, line] if any(p.spread for p in points) else [line]


def _faint(color: str) -> str:
    red, green, blue = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def cost_bars(entries: Sequence[Entry], title: str, value: Value, log_axis: bool = False) -> dict[str, Any]:
    """One bar for each label and model: the mean over budgets and seeds.

    Args:
        entries: All entries.
        title: Name of the cost, with its unit.
        value: The cost of a record.
        log_axis: Draw a logarithmic axis, which leaves out costs of zero.
    """
    names = labels(entries)
    traces = []
    for number, (scope, part) in enumerate(scopes(entries)):
        means = [mean_of((e for e in part if e.label == name and e.budget is not None), value) for name in names]
        shown = [(place, mean) for place, mean in enumerate(means) if mean is not None and (mean > 0 or not log_axis)]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": plotly_text(scope),
                "x": [mean for _, mean in shown],
                "y": [place for place, _ in shown],
                "text": [plotly_text(names[place]) for place, _ in shown],
                "textposition": "none",
                "hovertemplate": "%{text}: %{x:.3g}<extra>%{fullData.name}</extra>",
                "marker": {"color": COLORS[number % len(COLORS)]},
            }
        )
    x = {"title": {"text": title}, "type": "log" if log_axis else "linear"}
    y = {
        "tickvals": list(range(len(names))),
        "ticktext": [tick_text(name) for name in names],
        "range": [len(names) - 0.5, -0.5],
        "zeroline": False,
    }
    return make_figure([t for t in traces if t["x"]], x, y, height=130 + 34 * len(names) + 8 * len(traces))
