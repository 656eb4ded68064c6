"""The HTML page of a curve and its figure, filled into templates/curve.html.j2, and the curve's values as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embtrim.experiments.records import RunRecord
from embtrim.methods.curves import SizeCurve
from embtrim.reports.curve_tables import curve_header, curve_headline, curve_rows
from embtrim.reports.figures import COLORS, FULL_COLOR, SYMBOLS, bytes_axis, make_figure, plotly_text
from embtrim.reports.numbers import format_bytes
from embtrim.reports.page import fill_page
from embtrim.reports.variants import Variant, valid_losses, variants_of
from embtrim.system.files import write_then_rename

# The files of a curve.
PAGE, VALUES = "curve.html", "curve.json"


def write_curve(curve: SizeCurve, folder: Path, records: Sequence[RunRecord] = ()) -> None:
    """Write curve.json and curve.html.

    Args:
        curve: The curve.
        folder: Folder for the two files; files of the same names are replaced.
        records: Records of a run, whose measured points the page shows beside the lines.
    """
    page = render_curve(curve, records)
    write_then_rename(folder / VALUES, lambda file: file.write(json.dumps(curve.to_dict(), indent=1).encode()))
    write_then_rename(folder / PAGE, lambda file: file.write(page.encode()))


def render_curve(curve: SizeCurve, records: Sequence[RunRecord] = ()) -> str:
    """The page as text; see `write_curve`."""
    variants = variants_of(records) if records else []
    return fill_page(
        "curve.html.j2",
        [record for variant in variants for record in variant.records],
        {"curve": curve_figure(curve, variants)},
        title="predicted validation AUC against bytes",
        headlines=curve_headline(curve).splitlines(),
        header=curve_header(curve),
        rows=curve_rows(curve),
        is_measured=bool(_measured(variants)),
    )


def curve_figure(curve: SizeCurve, variants: Sequence[Variant] = ()) -> dict[str, Any]:
    """Predicted score over bytes, a line for each kind of plan, with the interval of the last kind and the knee.

    A measured point stands where its measured loss puts it below the score of the full model that was read.
    """
    traces: list[dict[str, Any]] = []
    colors = dict(zip(curve.lines, COLORS, strict=False))
    last = list(curve.lines)[-1]
    for kind, points in curve.lines.items():
        x, y = [p.num_bytes for p in points], [curve.predicted(p) for p in points]
        text = [
            plotly_text(f"{kind}, {p.budget}: {format_bytes(p.num_bytes)}, loss {p.loss:.5f}, {p.start}")
            for p in points
        ]
        if kind == last and curve.error:
            low, high = zip(*map(curve.interval, points), strict=True) if points else ((), ())
            traces.append(
                {
                    "type": "scatter",
                    "x": [*x, *reversed(x)],
                    "y": [*low, *reversed(high)],
                    "fill": "toself",
                    "line": {"width": 0},
                    "fillcolor": colors[kind],
                    "opacity": 0.12,
                    "mode": "lines",
                    "hoverinfo": "skip",
                    "name": "1.96 standard errors of the score",
                }
            )
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": kind,
                "x": x,
                "y": y,
                "text": text,
                "hovertemplate": "%{text}<br>predicted AUC %{y:.4f}<extra></extra>",
                "line": {"color": colors[kind], "width": 1.5},
                "marker": {"color": colors[kind], "size": 6},
            }
        )
    shared = {"type": "scatter", "mode": "markers", "hovertemplate": "%{text}<br>AUC %{y:.4f}<extra></extra>"}
    traces.append(
        {
            **shared,
            "name": "knee",
            "x": [curve.knee.num_bytes],
            "y": [curve.predicted(curve.knee)],
            "text": [plotly_text(f"knee, {curve.knee.budget}: loss {curve.knee.loss:.5f}")],
            "marker": {"color": "#222222", "size": 13, "symbol": "star"},
        }
    )
    measured = _measured(variants)
    for number, (label, points) in enumerate(measured.items()):
        traces.append(
            {
                **shared,
                "name": plotly_text(f"measured: {label}"),
                "x": [num_bytes for num_bytes, _ in points],
                "y": [curve.score - loss for _, loss in points],
                "text": [plotly_text(f"{label}: {format_bytes(b)}, measured loss {loss:+.5f}") for b, loss in points],
                "marker": {"color": FULL_COLOR, "size": 10, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            }
        )
    sizes = [curve.full_bytes, *(x for trace in traces for x in trace["x"])]
    figure = make_figure(
        traces, bytes_axis(sizes), {"title": {"text": "validation AUC"}, "tickformat": ".4f"}, height=460
    )
    line = {"color": "#999999", "dash": "dot", "width": 1}
    figure["layout"]["shapes"] = [
        {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": curve.score, "y1": curve.score, "line": line}
    ]
    return figure


def _measured(variants: Sequence[Variant]) -> dict[str, list[tuple[int, float]]]:
    """Table bytes and measured loss of each record with a full model, by variant; full models are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for variant in variants:
        if not variant.is_full:
            losses = zip(variant.records, valid_losses(variant), strict=True)
            if points := [(record.table_bytes, loss) for record, loss in losses if loss is not None]:
                found[variant.label] = points
    return found
