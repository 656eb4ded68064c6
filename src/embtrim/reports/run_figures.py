"""The figures of a run but its widths: AUC against bytes, AUC by decile, calibration."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from embtrim.reports.figures import bytes_axis, make_figure, markers, plotly_text
from embtrim.reports.numbers import format_bytes, format_count
from embtrim.reports.variants import Variant


def auc_against_bytes(variants: Sequence[Variant]) -> dict[str, Any]:
    """Test AUC over table bytes: a small point a seed, a large one for their mean."""
    traces = []
    for variant, marker in _marked(variants):
        scored = [r for r in variant.records if r.test]
        if not scored:
            continue
        seeds = {
            "x": [r.table_bytes for r in scored],
            "y": [r.test["auc"] for r in scored],
            "text": [plotly_text(f"{variant.label}, seed {r.seed}: {format_bytes(r.table_bytes)}") for r in scored],
        }
        mean_bytes = statistics.fmean(seeds["x"])
        mean = {
            "x": [mean_bytes],
            "y": [statistics.fmean(seeds["y"])],
            "text": [plotly_text(f"{variant.label}, mean of {len(scored)}: {format_bytes(mean_bytes)}")],
        }
        shared = {
            "type": "scatter",
            "mode": "markers",
            "name": plotly_text(variant.label),
            "legendgroup": variant.label,
            "hovertemplate": "%{text}<br>AUC %{y:.4f}<extra></extra>",
        }
        if len(scored) > 1:
            traces.append({**shared, **seeds, "marker": {**marker, "size": 7, "opacity": 0.5}, "showlegend": False})
        traces.append({**shared, **mean, "marker": {**marker, "size": 14}})
    x = bytes_axis([r.table_bytes for v in variants for r in v.records])
    return make_figure(traces, x, {"title": {"text": "test AUC"}, "tickformat": ".4f"}, height=400)


def auc_by_decile(variants: Sequence[Variant]) -> dict[str, Any]:
    """Mean test AUC of the rows of each decile, a line a variant."""
    traces = []
    for variant, marker in _marked(variants):
        # Entries are (decile, rows, mean count of the rarest value, AUC or None).
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
                "name": plotly_text(variant.label),
                "x": deciles,
                "y": [statistics.fmean(values) if values else None for values in aucs],
                "text": [
                    plotly_text(
                        f"{variant.label}: rarest value seen {f:,.0f} times, {format_count(by_decile[d][0][1])} rows"
                    )
                    for d, f in zip(deciles, frequencies, strict=True)
                ],
                "hovertemplate": "%{text}<br>AUC %{y:.4f}<extra></extra>",
                "marker": {**marker, "size": 7},
                "line": {"color": marker["color"], "width": 1.5},
            }
        )
    x = {"title": {"text": "decile (1: rarest)"}, "dtick": 1}
    return make_figure(traces, x, {"title": {"text": "test AUC"}, "tickformat": ".3f"}, height=380)


def calibration_figure(variants: Sequence[Variant]) -> dict[str, Any]:
    """Predicted over observed clicks, a line a variant: a small point a seed, a large one for their mean."""
    traces = []
    for place, (variant, marker) in enumerate(_marked(variants)):
        scored = [r for r in variant.records if r.test]
        if not scored:
            continue
        values = [r.test["calibration"] for r in scored]
        shared = {
            "type": "scatter",
            "mode": "markers",
            "name": plotly_text(variant.label),
            "hovertemplate": "%{text}: %{x:.3f}<extra></extra>",
            "showlegend": False,
        }
        if len(values) > 1:
            texts = [plotly_text(f"{variant.label}, seed {r.seed}") for r in scored]
            seeds = {"x": values, "y": [place] * len(values), "text": texts}
            traces.append({**shared, **seeds, "marker": {**marker, "size": 7, "opacity": 0.5}})
        mean = {"x": [statistics.fmean(values)], "y": [place], "text": [plotly_text(f"{variant.label}, mean")]}
        traces.append({**shared, **mean, "marker": {**marker, "size": 14}})
    y = {
        "tickvals": list(range(len(variants))),
        "ticktext": [plotly_text(v.label) for v in variants],
        "range": [len(variants) - 0.4, -0.6],
        "automargin": True,
        "zeroline": False,
    }
    shown = [1.0, *(r.test["calibration"] for v in variants for r in v.records if r.test)]
    room = 0.08 * (max(shown) - min(shown)) or 0.01
    x = {"title": {"text": "predicted / observed"}, "range": [min(shown) - room, max(shown) + room]}
    figure = make_figure(traces, x, y, height=130 + 34 * len(variants))
    line = {"color": "#999999", "dash": "dot", "width": 1}
    figure["layout"]["shapes"] = [{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": line}]
    return figure


def _marked(variants: Sequence[Variant]) -> list[tuple[Variant, dict[str, str]]]:
    return list(zip(variants, markers([v.is_full for v in variants]), strict=True))
