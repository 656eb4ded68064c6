"""Charts: axes, series and the positions of everything in them, drawn by templates/chart.html.j2 as inline SVG.

A chart is as wide as its place: horizontal positions are percentages, vertical ones pixels, texts keep their size. Colours
are CSS classes, so that a page has a light and a dark look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from embtrim.reports.numbers import byte_ticks, format_bytes

# Looks that can be told apart, by colour blind readers too; more series than these are grey. `page.css` says their colours.
LOOKS = ("s0", "s1", "s2", "s3", "s4", "s5")
FULL, DIM = "full", "dim"
SYMBOLS = ("circle", "square", "diamond", "triangle", "cross", "star")

# A longer name is cut in the middle where it heads a row of a chart; the row's text has it whole.
MAX_TICK_LETTERS = 26
# Widths in pixels: of a letter, of the room left of an axis of numbers, of the most room for names.
_LETTER, _NUMBERS, _MOST_ROOM = 7.2, 64, 210
# Least pixels of a plot, on a narrow page.
_NARROW = 210
# Pixels between the base lines of two labels.
_LABEL_HEIGHT = 15


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        title: What it shows, with the unit.
        low: Value at the left or the bottom; larger than `high` on an axis that runs backwards.
        high: Value at the right or the top.
        ticks: Values with their texts.
        is_log: Whether it is logarithmic.
    """

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low end, 1 at the high end; values outside lie at the ends."""
        low, high = self._on(self.low), self._on(self.high)
        return min(1.0, max(0.0, (self._on(value) - low) / (high - low)))

    def _on(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.is_log else value


@dataclass(frozen=True)
class Point:
    """A point of a series.

    Attributes:
        x: Value on the horizontal axis.
        y: Value on the vertical axis.
        text: What pointing at it shows.
        interval: Ends of an interval around the value of the axis that the series measures; None without one.
        size: Pixels of the symbol; 0 draws none.
        hollow: Whether the symbol is an outline.
    """

    x: float
    y: float
    text: str
    interval: tuple[float, float] | None = None
    size: float = 9
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one name and look.

    Attributes:
        name: Name in legend and label.
        points: The points, in the order in which a line joins them.
        look: CSS class of the colour: one of LOOKS, FULL or DIM.
        symbol: One of SYMBOLS.
        joined: Whether a line joins the points.
        dashed: Whether the line is dashed.
        bars: Whether points are bars from the left end of the horizontal axis instead.
        across: Whether intervals lie along the horizontal axis; else along the vertical one.
        band: Whether intervals are one band; else a line a point.
        labelled: Whether the name stands in the legend, and at the end of the line where a chart has such labels.
    """

    name: str
    points: Sequence[Point]
    look: str
    symbol: str = "circle"
    joined: bool = False
    dashed: bool = False
    bars: bool = False
    across: bool = False
    band: bool = False
    labelled: bool = True


@dataclass(frozen=True)
class Rule:
    """A line across the whole chart at a value of the vertical (`is_flat`) or the horizontal axis."""

    value: float
    text: str
    is_flat: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        x: Horizontal axis.
        y: Vertical axis; an axis of names runs from top to bottom, see `names_axis`.
        series: What is drawn, the first below the others.
        summary: What a reader who cannot see the chart is told.
        height: Pixels of the plot without axis titles.
        rules: Lines across the chart.
        direct: Whether names stand at the right ends of their series; a narrow page has the legend alone.
        has_names: Whether the vertical axis is one of names.
        row_texts: A text at the right end of each name's row, or nothing.
    """

    x: Axis
    y: Axis
    series: Sequence[Series]
    summary: str
    height: int = 380
    rules: Sequence[Rule] = field(default_factory=tuple)
    direct: bool = True
    has_names: bool = False
    row_texts: Sequence[str] = ()


# --- axes -----------------------------------------------------------------------------------------------------------


def bytes_axis(sizes: Sequence[float]) -> Axis:
    """A logarithmic axis in bytes: full and compact tables lie factors apart. Small tables are on the right."""
    least, most = max(1.0, min(sizes)), max(1.0, *sizes)
    middle = math.sqrt(least * most)
    low, high = min(0.85 * least, middle / 2), max(most / 0.85, 2 * middle)  # room for some ticks
    ticks = [(t, format_bytes(t).replace(".0 ", " ")) for t in byte_ticks(int(low), int(high)) if low <= t <= high]
    return Axis("table bytes, smaller to the right", high, low, ticks, is_log=True)


def log_axis(title: str, low: float, high: float) -> Axis:
    """A logarithmic axis from 0 < low to high with ticks at powers of ten, and within them where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    values = [step * 10.0**power for power in powers for step in steps]
    return Axis(title, low, high, [(v, f"{v:.10g}") for v in values if 0.999 * low <= v <= 1.001 * high], is_log=True)


def number_axis(title: str, values: Sequence[float], *, most_ticks: int = 6, percent: bool = False) -> Axis:
    """A linear axis around the values, with some room."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or abs(high) * 0.01 or 1.0
    low, high = (0.0 if low == 0 else low - room), high + room
    rough = (high - low) / most_ticks
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= rough)
    first = math.ceil(low / step)
    ticks = [step * number for number in range(first, math.floor(high / step) + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if f"{step:e}".startswith("2.5") else 0))
    shown = [(t, f"{t:.{max(0, digits - 2)}%}" if percent else f"{t + 0.0:,.{digits}f}") for t in ticks]
    return Axis(title, low, high, shown)


def names_axis(names: Sequence[str]) -> Axis:
    """Names from top to bottom, the first one at 0."""
    return Axis("", len(names) - 0.5, -0.5, [(place, tick_text(name)) for place, name in enumerate(names)])


def tick_text(name: str) -> str:
    """A name for an axis or the end of a line, cut in the middle if it is long."""
    half = MAX_TICK_LETTERS // 2
    return name if len(name) <= MAX_TICK_LETTERS else f"{name[: half - 1]}…{name[-half:]}"


# --- positions ------------------------------------------------------------------------------------------------------


def drawn(chart: Chart) -> dict[str, Any]:
    """Everything that the template draws, in percent of the width and pixels of the height."""
    series = [_series(chart, one) for one in chart.series if one.points]
    longest = max((len(text) for _, text in chart.y.ticks), default=0)
    names = [one for one in chart.series if one.labelled and one.points]
    labels = _labels(chart, names) if chart.direct else []
    ends = [*(label["text"] for label in labels), *chart.row_texts]
    return {
        "height": chart.height,
        "left": round(min(_MOST_ROOM, _LETTER * longest + 14)) if chart.has_names else _NUMBERS,
        "right": round(min(_MOST_ROOM, 20 + _LETTER * max(map(len, ends)))) if ends else 14,
        "row_texts": [(_down(chart, place), text) for place, text in enumerate(chart.row_texts)],
        "x_title": chart.x.title,
        "y_title": chart.y.title,
        "x_ticks": _x_ticks(chart),
        "y_ticks": [(_down(chart, value), text) for value, text in chart.y.ticks],
        "has_names": chart.has_names,
        "rules": [
            {
                "is_flat": r.is_flat,
                "at": _down(chart, r.value) if r.is_flat else _across(chart, r.value),
                "text": r.text,
            }
            for r in chart.rules
        ],
        "series": series,
        "labels": labels,
        "legend": [_legend(one) for one in names] if len(names) > 1 else [],
        "summary": chart.summary,
    }


def _across(chart: Chart, value: float) -> float:
    return round(100 * chart.x.place(value), 2)


def _legend(one: Series) -> dict[str, Any]:
    return {
        "name": one.name,
        "look": one.look,
        "symbol": one.symbol if any(p.size for p in one.points) else "",
        "hollow": all(p.hollow for p in one.points),
    }


def _x_ticks(chart: Chart) -> list[tuple[float, str, bool]]:
    """Place and text of each tick, and whether a narrow page has no room for its text."""
    found: list[tuple[float, str, bool]] = []
    end = -100.0
    for place, text in sorted((_across(chart, value), text) for value, text in chart.x.ticks):
        reach = 100 * (_LETTER * len(text) / 2 + 4) / _NARROW
        found.append((place, text, place - reach < end))
        end = end if found[-1][2] else place + reach
    return found


def _down(chart: Chart, value: float) -> float:
    return round(chart.height * (1 - chart.y.place(value)), 1)


def _series(chart: Chart, one: Series) -> dict[str, Any]:
    points = [
        {"x": _across(chart, p.x), "y": _down(chart, p.y), "text": p.text, "size": p.size, "hollow": p.hollow}
        for p in one.points
    ]
    ends = [(p, p.interval) for p in one.points if p.interval is not None]
    if one.across:
        whiskers = [(_across(chart, a), _down(chart, p.y), _across(chart, b), _down(chart, p.y)) for p, (a, b) in ends]
    else:
        whiskers = [(_across(chart, p.x), _down(chart, a), _across(chart, p.x), _down(chart, b)) for p, (a, b) in ends]
    low, high = [(w[0], w[1]) for w in whiskers], [(w[2], w[3]) for w in whiskers]
    return {
        "name": one.name,
        "look": one.look,
        "symbol": one.symbol,
        "bars": one.bars,
        "dashed": one.dashed,
        "points": points,
        "line": _path((p["x"], p["y"]) for p in points) if one.joined and len(points) > 1 else "",
        "band": _path([*low, *reversed(high)]) if one.band and ends else "",
        "whiskers": [] if one.band else whiskers,
    }


def _path(points: Any) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _labels(chart: Chart, names: Sequence[Series]) -> list[dict[str, Any]]:
    """Names at the right end, moved apart where they would overlap; a leader joins each to its last point."""
    ends = sorted(
        ((one, max(one.points, key=lambda p: chart.x.place(p.x))) for one in names), key=lambda e: _down(chart, e[1].y)
    )
    wanted = [_down(chart, point.y) for _, point in ends]
    places: list[float] = []
    for value in wanted:
        places.append(max(value, places[-1] + _LABEL_HEIGHT) if places else value)
    over = places[-1] - chart.height if places else 0
    if over > 0:  # push up from below
        limit = float(chart.height)
        for number in range(len(places) - 1, -1, -1):
            places[number] = min(places[number], limit)
            limit = places[number] - _LABEL_HEIGHT
    return [
        {
            "name": one.name,
            "text": tick_text(one.name),
            "look": one.look,
            "x": _across(chart, point.x),
            "y": at,
            "place": round(place, 1),
        }
        for (one, point), at, place in zip(ends, wanted, places, strict=True)
    ]
