"""Heat maps: values of each field by variant or label, one group at a time; page.js makes a table of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from embtrim.experiments.records import RunRecord
from embtrim.reports.entries import Entry, labels
from embtrim.reports.variants import Variant


class HeatMap(NamedTuple):
    """A heat map.

    Attributes:
        title: Its title.
        rows_name: What the rows are, such as "field".
        rows: Name of each row.
        groups: For each choice its `name`, `columns`, `unit` ("" for plain numbers), the value `top` of the strongest
            colour, and `values` by row and column.
    """

    title: str
    rows_name: str
    rows: Sequence[str]
    groups: Sequence[dict[str, Any]]


def run_heat_map(variants: Sequence[Variant]) -> HeatMap:
    """A run's fields by variant: columns, bits, rows and bytes, as far as the records tell them; means over seeds.

    The fields whose full tables take most bytes come first.
    """
    size: dict[str, float] = {}
    for record in (record for variant in variants for record in variant.records):
        for name, count in (record.bytes_by_table or record.num_rows).items():
            size[name] = max(count, size.get(name, 0))
    fields = sorted(field_names(variants), key=lambda name: -size.get(name, 0))
    tables = sorted(
        dict.fromkeys(n for v in variants for r in v.records for n in r.num_rows), key=lambda n: -size.get(n, 0)
    )
    rows = list(dict.fromkeys([*fields, *tables]))
    choices: list[tuple[str, str, Callable[[RunRecord], Mapping[str, float] | None]]] = [
        ("columns", "", lambda r: r.widths),
        ("bits per value", "", lambda r: r.bits_by_field),
        ("rows of its table", "rows", lambda r: r.kept_rows),
        ("bytes of its table", "bytes", lambda r: r.bytes_by_table),
    ]
    groups = []
    for name, unit, values_of in choices:
        means = [_means(values_of(record) or {} for record in v.records) for v in variants]
        if known := [value for mean in means for value in mean.values()]:
            values = [[mean.get(row) for mean in means] for row in rows]
            groups.append(_group(name, [v.label for v in variants], unit, max(known), values))
    return HeatMap("Columns, bits and rows of each field", "field", rows, groups)


def _means(values: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each key over the mappings that have it."""
    found: dict[str, list[float]] = {}
    for one in values:
        for key, value in one.items():
            found.setdefault(key, []).append(value)
    return {key: statistics.fmean(own) for key, own in found.items()}


def field_names(variants: Sequence[Variant]) -> list[str]:
    """The fields of all records, in the order of the schema."""
    return list(dict.fromkeys(name for v in variants for r in v.records for name in r.widths))


def comparison_heat_map(entries: Sequence[Entry], title: str) -> HeatMap:
    """A comparison's mean width by field and label, for each budget; the budget with most cells first."""
    fields = list(dict.fromkeys(field for e in entries for field in e.record.widths))
    by_budget: dict[Any, list[Entry]] = {}
    for entry in entries:
        if entry.budget is not None:
            by_budget.setdefault(entry.budget, []).append(entry)
    groups = []
    for own in sorted(by_budget.values(), key=lambda own: -len(own)):
        names = labels(own)
        means = [_means(e.record.widths for e in own if e.label == name) for name in names]
        values = [[mean.get(field) for mean in means] for field in fields]
        top = max(e.record.full_width for e in entries)
        groups.append(_group(f"{own[0].record.budget}, {len(own)} models", names, "", top, values))
    return HeatMap(title, "field", fields, groups)


def _group(
    name: str, columns: Sequence[str], unit: str, top: float, values: list[list[float | None]]
) -> dict[str, Any]:
    short = [[value if value is None else round(value, 2) for value in row] for row in values]
    return {"name": name, "columns": list(columns), "unit": unit, "top": top, "values": short}
