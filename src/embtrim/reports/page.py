"""One self-contained HTML page: text, tables, figures; what the reports have in common.

The page loads nothing from elsewhere. Names of fields and files come from the user's log, so they are untrusted: all
text goes through `html.escape`, JSON inside scripts has its `<` escaped, and a content security policy forbids requests.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

# Longer names are cut in the middle at an axis; hovering shows them whole.
MAX_TICK_LETTERS = 26


def render(title: str, body: Sequence[str], records: Any, figures: dict[str, dict[str, Any]]) -> str:
    """The page as text.

    Args:
        title: of the window.
        body: HTML, part by part.
        records: what the page carries as JSON, `<script id="records">`.
        figures: Plotly's data and layout by the name that `figure_section` was given.
    """
    from plotly.offline import get_plotlyjs  # 5 MB of script: read only when a page is written

    return _PAGE.format(
        title=safe_text(title),
        style=_STYLE,
        plotly=get_plotlyjs(),
        body="\n".join(body),
        records=_script_json(records),
        figures=_script_json(figures),
        script=_SCRIPT,
    )


def make_figure(traces: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], height: int) -> dict[str, Any]:
    """A Plotly figure in the look of the page; `x` and `y` are changes to its axes."""
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


def figure_section(name: str, title: str, note: str) -> str:
    """A section that shows the figure of this name."""
    return (
        f"<section><h2>{safe_text(title)}</h2><p class=note>{safe_text(note)}</p>"
        f'<div class=figure data-figure="{safe_text(name)}"></div></section>'
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table; "numbers" aligns its cells to the right, "facts" to the left."""

    def cells(values: Sequence[str], tag: str) -> str:
        # The first cell heads its row; leading spaces of a name indent it.
        first, *rest = values
        indent = " class=indent" if first.startswith(" ") else ""
        return f"<th{indent}>{safe_text(first.strip())}</th>" + "".join(f"<{tag}>{safe_text(v)}</{tag}>" for v in rest)

    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>" if any(header) else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class=scroll><table class={kind}>{head}<tbody>{body}</tbody></table></div>"


def details(title: str, inside: str) -> str:
    """HTML behind a line that opens it."""
    return f"<details><summary>{safe_text(title)}</summary>{inside}</details>"


def safe_text(text: str) -> str:
    """Text that is safe in HTML, in a quoted attribute, and in the labels of plotly, which reads some tags."""
    return html.escape(text)


def short_text(text: str) -> str:
    """Safe text for the ticks of an axis."""
    half = MAX_TICK_LETTERS // 2
    return safe_text(text if len(text) <= MAX_TICK_LETTERS else f"{text[: half - 1]}…{text[-half:]}")


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.lead { margin: .4rem 0; overflow-wrap: anywhere; }
.note { color: #555; font-size: .9rem; margin: .4rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #eee; text-align: left; vertical-align: top; }
thead th { border-bottom: 1px solid #999; }
tbody th { font-weight: 500; position: sticky; left: 0; background: #fff; max-width: 14rem;
  overflow-wrap: break-word; }
th.indent { padding-left: 1.4rem; color: #555; font-weight: 400; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: #0072b2; }
pre { overflow-x: auto; background: #f6f6f6; padding: .7rem; font-size: .8rem; }
@media (max-width: 40rem) { th, td { padding: .25rem .45rem; } table { font-size: .82rem; } }
@media print { details > * { display: block; } }
"""

_SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const options = { responsive: true, displaylogo: false, displayModeBar: false };
for (const place of document.querySelectorAll("[data-figure]")) {
  const figure = figures[place.dataset.figure];
  if (figure.data.length) { Plotly.newPlot(place, figure.data, figure.layout, options); }
  else { place.textContent = "no data in these records"; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
{body}
<script type="application/json" id="records">{records}</script>
<script type="application/json" id="figures">{figures}</script>
<script>{script}</script>
</body>
</html>
"""
