"""The profile of a log as rows of a table, and what its histograms show."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from embtrim.data.log_profile import SPLIT
from embtrim.data.profile import QUANTILES, Counts, FieldProfile, LogProfile
from embtrim.reports.numbers import NONE, format_count, format_share

_SHOWN_TOP = 3
_MIDDLE = (0.01, 0.5, 0.99)


def profile_rows(found: LogProfile) -> list[dict[str, Any]]:
    """One row a field: what it holds, and beside its missing and unseen shares those of the earlier validation."""
    earlier = {} if found.against is None else {field.name: field for field in found.against.fields}
    rows = []
    for field in found.profile.fields:
        counts, before = field.counts[SPLIT], earlier.get(field.name)
        row = {"field": field.name, "type": field.type, "distinct": format_count(field.distinct)}
        row["missing"] = format_share(counts.share("missing"))
        if before is not None:
            expected = before.expected or Counts()
            row["missing before"] = format_share(expected.share("missing"))
            row["unseen"] = format_share(counts.share("unseen"))
            row["unseen before"] = format_share(expected.share("unseen"))
        rows.append({**row, "holds": in_words(field, counts)})
    return rows


def in_words(field: FieldProfile, counts: Counts) -> str:
    """The most frequent values of a field with their shares, or the middle and the ends of its numbers."""
    if field.quantiles:
        low, middle, high = (field.quantiles[QUANTILES.index(q)] for q in _MIDDLE)
        return f"{middle:g} (1% {low:g}, 99% {high:g})"
    total = max(1, counts.rows)
    return ", ".join(f"{_name(value)} {count / total:.1%}" for value, count in field.top[:_SHOWN_TOP]) or NONE


def bars_of(field: FieldProfile, rows: int) -> list[dict[str, Any]]:
    """The bars of a field's histogram: their place and size in percent of the picture, and a text.

    Values are bars of equal width, as high as their share of the rows. Numbers are bars between quantiles, from 1% to 99%:
    each has the area of the rows in it.
    """
    if field.quantiles:
        kept = [(q, x) for q, x in zip(QUANTILES, field.quantiles, strict=True) if 0.01 <= q <= 0.99]
        width = kept[-1][1] - kept[0][1]
        if not width:
            return [{"x": 0, "width": 100, "height": 100, "text": f"{kept[0][1]:g}"}]
        bars = [
            (100 * (a - kept[0][1]) / width, 100 * (b - a) / width, (q - p) / (b - a), f"{a:g} to {b:g}: {q - p:.0%} of the rows")
            for (p, a), (q, b) in pairwise(kept)
            if b > a
        ]  # fmt: skip
    else:
        step = 100 / max(1, len(field.top))
        bars = [
            (step * k, 0.85 * step, count / max(1, rows), f"{_name(value)}: {count / max(1, rows):.1%} of the rows")
            for k, (value, count) in enumerate(field.top)
        ]
    highest = max((height for _, _, height, _ in bars), default=1.0)
    return [{"x": x, "width": w, "height": 100 * h / highest, "text": text} for x, w, h, text in bars]


def _name(value: str | None) -> str:
    return "(missing)" if value is None else value
