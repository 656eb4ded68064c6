"""The figures of a run: losses against bytes, differences with intervals, bytes by field, deciles, calibration."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from embtrim.reports.charts import (
    DIM,
    FULL,
    LOOKS,
    SYMBOLS,
    Axis,
    Chart,
    Point,
    Rule,
    Series,
    bytes_axis,
    drawn,
    names_axis,
    number_axis,
)
from embtrim.reports.numbers import format_bytes, format_count, format_values, interval_95
from embtrim.reports.variants import Variant, auc_differences, valid_losses

# Tables that the figure of bytes shows by name; the smaller ones are one text.
MOST_TABLES = 20
# Pixels of a row of a chart of names.
ROW_HEIGHT = 34

# Points of a predicted curve: bytes and loss of the validation AUC, by kind of plan.
Lines = Mapping[str, Sequence[tuple[float, float]]]


def loss_against_bytes(variants: Sequence[Variant], predicted: Lines | None = None) -> dict[str, Any]:
    """Loss of validation AUC over table bytes: measured and predicted points, and the curve of another command."""
    series = []
    lines = predicted or {}
    if lines:
        name, points = list(lines.items())[-1]
        shown = [
            Point(b, loss, f"curve, {name}: {format_bytes(b)}, predicted loss {loss:+.5f}", size=0)
            for b, loss in points
        ]
        series.append(Series("predicted curve", shown, "s5", joined=True, dashed=True))
    for variant, look, symbol in _looks(variants):
        pairs = zip(variant.records, valid_losses(variant), strict=True)
        measured = [(r, loss) for r, loss in pairs if loss is not None]
        if not measured:
            continue
        if len(measured) > 1:
            seeds = [
                Point(r.table_bytes, loss, f"{variant.label}, seed {r.seed}: measured loss {loss:+.5f}", size=6)
                for r, loss in measured
            ]
            series.append(Series(variant.label, seeds, look, symbol, labelled=False))
        size, losses = statistics.fmean(r.table_bytes for r, _ in measured), [loss for _, loss in measured]
        text = f"{variant.label}: {format_bytes(size)}, measured loss {format_values(losses, digits=5, signed=True)}"
        mean = Point(size, statistics.fmean(losses), text, None if variant.is_full else interval_95(losses))
        series.append(Series(variant.label, [mean], look, symbol, labelled=not variant.is_full))
        guesses = [r.predicted_loss for r in variant.records if r.predicted_loss is not None]
        if guesses:
            guess = statistics.fmean(guesses)
            point = Point(size, guess, f"{variant.label}: predicted loss {guess:+.5f}", hollow=True)
            series.append(Series(f"{variant.label}, predicted", [point], look, symbol))
    if not any(one.labelled for one in series):
        return drawn(Chart(Axis("", 0, 1, []), Axis("", 0, 1, []), [], ""))
    points = [p for one in series for p in one.points]
    y = number_axis("loss of validation AUC", [0.0, *(v for p in points for v in (p.y, *(p.interval or ())))])
    summary = "; ".join(one.points[0].text for one in series if one.labelled and one.look != "s5")
    return drawn(Chart(bytes_axis([p.x for p in points]), y, series, summary, rules=[Rule(0.0, "full model")]))


def difference_intervals(variants: Sequence[Variant]) -> dict[str, Any]:
    """Test AUC minus the full model's: a small point a seed, the mean with its 95% confidence interval."""
    shown = [(v, look, symbol) for v, look, symbol in _looks(variants) if not v.is_full]
    rows = []
    for variant, look, symbol in shown:
        pairs = zip(variant.records, auc_differences(variant), strict=True)
        found = [(r.seed, value) for r, value in pairs if value is not None]
        if found:
            rows.append((variant.label, look, symbol, found))
    series, words = [], []
    for place, (label, look, symbol, found) in enumerate(rows):
        values = [value for _, value in found]
        ends = interval_95(values)
        text = f"{label}: {statistics.fmean(values):+.4f}" + (
            f", 95% interval {ends[0]:+.4f} to {ends[1]:+.4f}" if ends else ", one seed"
        )
        words.append(text)
        if len(found) > 1:
            seeds = [Point(value, place, f"{label}, seed {seed}: {value:+.4f}", size=6) for seed, value in found]
            series.append(Series(label, seeds, look, symbol, labelled=False))
        mean = Point(statistics.fmean(values), place, text, ends)
        series.append(Series(label, [mean], look, symbol, across=True, labelled=False))
    reach = [0.0, *(v for one in series for p in one.points for v in (p.x, *(p.interval or ())))]
    x = number_axis("test AUC minus the full model's", [*reach, -1e-4, 1e-4])
    y = names_axis([label for label, *_ in rows])
    rules = [Rule(0.0, "full model", is_flat=False)]
    height = ROW_HEIGHT * len(rows) + 10
    return drawn(Chart(x, y, series, "; ".join(words), height, rules, direct=False, has_names=True))


def bytes_by_table(variants: Sequence[Variant]) -> dict[str, Any]:
    """Bytes of each table of the full model and of the methods: the largest tables by name, the others as one."""
    means: list[tuple[str, str, dict[str, float]]] = []
    for variant, look, _ in _looks(variants):
        known = [r.bytes_by_table for r in variant.records if r.bytes_by_table]
        if known and not variant.is_control:
            mean = {
                name: statistics.fmean(k.get(name, 0) for k in known)
                for name in dict.fromkeys(n for k in known for n in k)
            }
            means.append((variant.label, look, mean))
    sizes: dict[str, float] = {}
    for *_, mean in means:
        for name, size in mean.items():
            sizes[name] = max(size, sizes.get(name, 0))
    ordered = sorted(sizes, key=lambda name: -sizes[name])
    rows, rest = ordered[:MOST_TABLES], ordered[MOST_TABLES:]
    thick, series = min(14.0, 24.0 / max(1, len(means))), []
    for number, (label, look, mean) in enumerate(means):
        points = []
        for place, name in enumerate(rows):
            across = place + (number - (len(means) - 1) / 2) * (thick + 1) / ROW_HEIGHT
            text = f"{name}, {label}: {format_bytes(mean.get(name, 0))}"
            points.append(Point(mean.get(name, 0), across, text, size=thick))
        series.append(Series(label, points, look, "square", bars=True))
    totals = [[name] for name in rows] + ([rest] if rest else [])
    texts = [" → ".join(format_bytes(sum(m.get(t, 0) for t in tables)) for *_, m in means[:2]) for tables in totals]
    largest = 1.02 * max([1.0, *(p.x for one in series for p in one.points)])
    ticks = [(t, format_bytes(t).replace(".0 ", " ")) for t, _ in number_axis("", [0.0, largest]).ticks if t <= largest]
    names = names_axis([*rows, *([f"{len(rest):,} smaller tables"] if rest else [])])
    words = [f"{label}: {format_bytes(sum(mean.values()))} in {len(mean)} tables" for label, *_, mean in means]
    height = ROW_HEIGHT * len(totals)
    axis = Axis("bytes", 0.0, largest, ticks)
    return drawn(Chart(axis, names, series, "; ".join(words), height, direct=False, has_names=True, row_texts=texts))


def auc_by_decile(variants: Sequence[Variant]) -> dict[str, Any]:
    """Mean test AUC of the rows of each decile, a line a variant."""
    series = []
    for variant, look, symbol in _looks(variants):
        # Entries are (decile, rows, mean count of the rarest value, AUC or None).
        by_decile: dict[int, list[list[Any]]] = {}
        for record in variant.records:
            for entry in record.test.get("auc_by_decile") or ():
                by_decile.setdefault(entry[0], []).append(entry)
        points = []
        for decile, entries in sorted(by_decile.items()):
            aucs = [e[3] for e in entries if e[3] is not None]
            if aucs:
                seen, num_rows = statistics.fmean(e[2] for e in entries), format_count(entries[0][1])
                text = f"{variant.label}, group {decile}: AUC {statistics.fmean(aucs):.4f}; rarest value seen {seen:,.0f} times, {num_rows} rows"
                points.append(Point(decile, statistics.fmean(aucs), text))
        series.append(Series(variant.label, points, look, symbol, joined=True))
    scores = [p.y for one in series for p in one.points]
    if not scores:
        return drawn(Chart(Axis("", 0, 1, []), Axis("", 0, 1, []), [], ""))
    x = Axis("group (1: rarest)", 0.6, 10.4, [(d, str(d)) for d in range(1, 11)])
    words = "; ".join(
        f"{one.name}: {one.points[0].y:.3f} in group {one.points[0].x}, {one.points[-1].y:.3f} in group {one.points[-1].x}"
        for one in series
        if one.points
    )
    return drawn(Chart(x, number_axis("test AUC", scores), series, words))


def calibration_figure(variants: Sequence[Variant]) -> dict[str, Any]:
    """Predicted over observed clicks, a row a variant: a small point a seed, a large one for their mean."""
    series, words, shown = [], [], [1.0]
    rows = [(v, look, symbol) for v, look, symbol in _looks(variants) if any(r.test for r in v.records)]
    for place, (variant, look, symbol) in enumerate(rows):
        values = [(r.seed, r.test["calibration"]) for r in variant.records if r.test]
        shown += [value for _, value in values]
        if len(values) > 1:
            seeds = [
                Point(value, place, f"{variant.label}, seed {seed}: {value:.3f}", size=6) for seed, value in values
            ]
            series.append(Series(variant.label, seeds, look, symbol, labelled=False))
        mean = statistics.fmean(value for _, value in values)
        words.append(f"{variant.label}: {mean:.3f}")
        series.append(Series(variant.label, [Point(mean, place, words[-1])], look, symbol, labelled=False))
    chart = Chart(
        number_axis("predicted / observed", shown),
        names_axis([v.label for v, *_ in rows]),
        series,
        "; ".join(words),
        ROW_HEIGHT * len(rows) + 10,
        [Rule(1.0, "calibrated", is_flat=False)],
        direct=False,
        has_names=True,
    )
    return drawn(chart)


def _looks(variants: Sequence[Variant]) -> list[tuple[Variant, str, str]]:
    """Colour and symbol of each variant: full models and controls are grey."""
    chosen, num_colored = [], 0
    for number, variant in enumerate(variants):
        look = FULL if variant.is_full else DIM
        if not variant.is_full and not variant.is_control:
            look, num_colored = LOOKS[num_colored % len(LOOKS)], num_colored + 1
        chosen.append((variant, look, SYMBOLS[number % len(SYMBOLS)]))
    return chosen
