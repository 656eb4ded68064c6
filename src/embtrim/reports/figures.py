"""What all figures share: their look, their colours, and texts that Plotly cannot take for HTML.

A figure is a dict with Plotly's `data` and `layout`; the page draws it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from embtrim.reports.numbers import byte_ticks, format_bytes

# Okabe and Ito's palette, whose colours colour-blind readers can tell apart; grey is the full model's.
FULL_COLOR = "#555555"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")

# A longer name is cut in the middle at an axis; hovering shows it whole.
MAX_TICK_LETTERS = 26


def make_figure(traces: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], height: int) -> dict[str, Any]:
    """A Plotly figure in the look of the page.

    Args:
        traces: Plotly's traces.
        x: Changes to the horizontal axis.
        y: Changes to the vertical axis.
        height: Pixels.
    """
    look = {"gridcolor": "#e6e6e6", "linecolor": "#bbbbbb", "zerolinecolor": "#cccccc"}
    layout = {
        "height": height,
        "margin": {"l": 60, "r": 12, "t": 40, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"align": "left"},
        "xaxis": {**look, "automargin": True, "fixedrange": True, **x},
        "yaxis": {**look, "automargin": True, "fixedrange": True, **y},
    }
    return {"data": traces, "layout": layout}


def bytes_axis(sizes: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis in bytes: the sizes of full and compact tables lie factors apart."""
    ticks = byte_ticks(int(min(sizes)), int(max(sizes)))
    return {
        "title": {"text": "table bytes"},
        "type": "log",
        "tickvals": ticks,
        "ticktext": [format_bytes(t) for t in ticks],
    }


def markers(are_full: Sequence[bool]) -> list[dict[str, str]]:
    """Colour and symbol of each variant; the full model is grey."""
    chosen, num_colored = [], 0
    for number, is_full in enumerate(are_full):
        color = FULL_COLOR if is_full else COLORS[num_colored % len(COLORS)]
        num_colored += not is_full
        chosen.append({"color": color, "symbol": SYMBOLS[number % len(SYMBOLS)]})
    return chosen


def plotly_text(text: str) -> str:
    """Text that Plotly shows letter by letter; unescaped, Plotly would read some HTML tags in labels."""
    return html.escape(text)


def tick_text(name: str) -> str:
    """A name for the ticks of an axis, shortened and escaped."""
    half = MAX_TICK_LETTERS // 2
    return plotly_text(name if len(name) <= MAX_TICK_LETTERS else f"{name[: half - 1]}…{name[-half:]}")
