"""Records of `compare` -> tables: as text, in markdown, for a terminal; the page is comparison_page.py's.

Means ± sample standard deviation are over seeds; differences are taken seed by seed. Data sets, models, budgets and
labels tell records apart; a label is a method or a variant of one. Every figure is computed from the records.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from embtrim.errors import DataError
from embtrim.experiments.grid import FULL, Skipped
from embtrim.experiments.records import RunRecord
from embtrim.methods import METHODS
from embtrim.plan.budget import Budget
from embtrim.reports.numbers import NONE, format_bytes, format_count, format_seconds, format_values

log = logging.getLogger(__name__)

REFERENCE = "uniform"

Value = Callable[[RunRecord], float | None]


@dataclass(frozen=True)
class Entry:
    """A record with what tells it apart: data set, model, budget (None for the full model), label and seed."""

    data: str
    model: str
    budget: Budget | None
    label: str
    seed: int
    record: RunRecord


@dataclass(frozen=True)
class Sheet:
    """A table as text; a blank first cell repeats the one above."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[list[str]]


def is_comparison(records: Sequence[RunRecord]) -> bool:
    """Whether records are a grid's: they name methods beside labels, or have several models, or budgets for one seed."""
    places = Counter((r.data["fingerprint"], r.model, r.variant, r.seed) for r in records)
    return any(r.method for r in records) or len({r.model for r in records}) > 1 or max(places.values(), default=0) > 1


def entries(records: Sequence[RunRecord]) -> list[Entry]:
    """The records in the order of the tables: full models first, large budgets before small ones, controls last.

    Where a seed has several records of one variant and budget, the settings that differ go into the label.

    Raises:
        DataError: no records, or two of the same.
    """
    if not records:
        raise DataError("there are no records to report")

    def place(record: RunRecord) -> tuple[Any, ...]:
        budget = None if record.budget is None else Budget.parse(record.budget)
        return (record.data["fingerprint"], record.model, budget, record.variant, record.seed)

    repeated = {place[3] for place, count in Counter(map(place, records)).items() if count > 1}
    names = {r.data["fingerprint"]: r.data["folder"] or r.data["fingerprint"] for r in records}
    found: dict[tuple[Any, ...], Entry] = {}
    for record in records:
        data, model, budget, label, seed = place(record)
        if label in repeated:
            others = [r.search for r in records if r.variant == label]
            settings = [f"{k}={v}" for k, v in record.search.items() if any(o.get(k) != v for o in others)]
            label = " ".join([label, *settings])
        key = (data, model, budget, label, seed)
        if key in found:
            raise DataError(
                f"two records of {names[data]}, {model}, {label}, {record.budget or 'full'}, seed {seed}; "
                "give the records of one grid a data set"
            )
        found[key] = Entry(names[data], model, budget, label, seed, record)

    def order(entry: Entry) -> tuple[Any, ...]:
        method = entry.record.method or entry.record.variant
        control = method in METHODS and METHODS[method].needs == "nothing"
        size = (0, "", 0.0) if entry.budget is None else (1, entry.budget.kind, -entry.budget.amount)
        return (entry.data, entry.model, size, control, method, entry.label != method, entry.label, entry.seed)

    return sorted(found.values(), key=order)


def labels(found: Iterable[Entry]) -> list[str]:
    """Labels but the full model's, in the order of the tables."""
    return list(dict.fromkeys(e.label for e in found if e.budget is not None))


# --- what is counted ------------------------------------------------------------------------------------------------


def paired_differences(found: Sequence[Entry], entry_group: Sequence[Entry], against: str, value: Value) -> list[float]:
    """Value of each of a group's records minus that of the reference with the same data, model, seed and budget.

    Args:
        found: all entries.
        entry_group: those of one data set, model, budget and label.
        against: label of the reference; "full" has no budget.
        value: of a record; a pair of which one has none is left out.
    """
    references = {(e.data, e.model, e.budget, e.seed): e.record for e in found if e.label == against}
    differences = []
    for e in entry_group:
        other = references.get((e.data, e.model, None if against == FULL else e.budget, e.seed))
        here, there = value(e.record), None if other is None else value(other)
        if here is not None and there is not None:
            differences.append(here - there)
    return differences


def ranks(found: Sequence[Entry]) -> tuple[dict[str, list[float]], int]:
    """Rank of each label by test AUC (1 is best, ties share their mean) in the cells that have all labels.

    Returns:
        The ranks by label, one a complete cell (data, model, budget, seed), and how many cells there are in all.
    """
    names = labels(found)
    cells: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for e in found:
        auc = auc_of(e.record)
        if e.budget is not None and auc is not None:
            cells[(e.data, e.model, e.budget, e.seed)][e.label] = auc
    complete = [cell for cell in cells.values() if len(cell) == len(names)]
    given: dict[str, list[float]] = {name: [] for name in names}
    for cell in complete:
        for name, auc in cell.items():
            better = sum(other > auc for other in cell.values())
            equal = sum(other == auc for other in cell.values())
            given[name].append(better + (equal + 1) / 2)
    return given, len(cells)


def auc_of(record: RunRecord) -> float | None:
    """Test AUC, None where there is no test split."""
    return record.test.get("auc")


def rarest_auc_of(record: RunRecord) -> float | None:
    """Test AUC of the tenth of the rows whose rarest value is rarest in training; None where it was not taken."""
    return next((auc for decile, _, _, auc in record.test.get("auc_by_decile") or () if decile == 1), None)


def logloss_of(record: RunRecord) -> float | None:
    """Test logloss, None where there is no test split."""
    return record.test.get("logloss")


def mean_of(group: Iterable[Entry], value: Value) -> float | None:
    """Mean of a value over the entries that have it."""
    values = [v for e in group if (v := value(e.record)) is not None]
    return statistics.fmean(values) if values else None


def groups(found: Iterable[Entry]) -> list[list[Entry]]:
    """Entries that differ in nothing but the seed."""
    parts: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for e in found:
        parts[(e.data, e.model, e.budget, e.label)].append(e)
    return list(parts.values())


def scopes(found: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """(name, entries) of each data set and model."""
    several = len({e.data for e in found}) > 1
    parts: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for e in found:
        parts[(e.data, e.model)].append(e)
    return [(f"{model} on {data}" if several else model, part) for (data, model), part in parts.items()]


# --- the tables -----------------------------------------------------------------------------------------------------


def sheets(records: Sequence[RunRecord], skipped: Sequence[Skipped] = ()) -> list[Sheet]:
    """The tables as text: results, differences, ranks, cost, and the cells that could not be made.

    Raises:
        DataError: no records, or two of the same.
    """
    found = entries(records)
    tables = [_results(name, part) for name, part in scopes(found)]
    if labels(found):
        tables += [_differences(name, part) for name, part in scopes(found)]
        tables += [_ranks(found), _cost(found)]
    return tables + ([_skipped(skipped)] if skipped else [])


def _results(name: str, found: Sequence[Entry]) -> Sheet:
    header = (
        "budget", "label", "test AUC", "rarest tenth", "logloss", "embedding params", "table bytes", "search, epochs", "seeds",
    )  # fmt: skip
    rows = []
    for group in groups(found):
        record = group[0].record
        rows.append(
            [
                record.budget or "",
                record.variant if record.variant == FULL else group[0].label,
                format_values([auc_of(e.record) for e in group]),
                format_values([rarest_auc_of(e.record) for e in group]),
                format_values([logloss_of(e.record) for e in group]),
                format_count(mean_of(group, lambda r: r.num_params)),
                format_bytes(mean_of(group, lambda r: r.table_bytes)),
                NONE if group[0].budget is None else f"{mean_of(group, lambda r: r.search_epochs):.2f}",
                str(len(group)),
            ]
        )
    note = (
        "Mean ± sample standard deviation over seeds; the rarest tenth is the AUC of those test rows whose rarest value is "
        "rarest in training; search in training epochs of the full model."
    )
    return Sheet(f"Results: {name}", note, header, rows)


def _differences(name: str, found: Sequence[Entry]) -> Sheet:
    header, rows = ["budget", "label"], []
    for against in (FULL, REFERENCE):
        header += [f"AUC - {against}", f"logloss - {against}", "pairs"]
    for group in groups(e for e in found if e.budget is not None):
        row = [group[0].record.budget or "", group[0].label]
        for against in (FULL, REFERENCE):
            pairs = [paired_differences(found, group, against, value) for value in (auc_of, logloss_of)]
            if group[0].label == against:
                row += [NONE] * 3
            else:
                row += [*(format_values(pair, signed=True) for pair in pairs), str(len(pairs[0]))]
        rows.append(row)
    note = (
        f"Seed by seed against the full model and against {REFERENCE}: mean ± sample standard deviation of the pairs."
    )
    return Sheet(f"Differences: {name}", note, tuple(header), rows)


def _ranks(found: Sequence[Entry]) -> Sheet:
    given, num_cells = ranks(found)
    complete = len(next(iter(given.values())))
    rows = [
        [name, f"{statistics.fmean(values):.2f}", str(sum(value == 1 for value in values))]
        for name, values in sorted(given.items(), key=lambda item: statistics.fmean(item[1] or [0]))
        if values
    ]
    note = (
        f"By test AUC, 1 is best, over the {complete} of {num_cells} cells (model, budget, seed) in which all labels are "
        "present."
    )
    return Sheet("Ranks", note, ("label", "mean rank", "times first"), rows)


def _cost(found: Sequence[Entry]) -> Sheet:
    rows = []
    for name in labels(found):
        group = [e for e in found if e.label == name and e.budget is not None]
        memory = [e.record.search_peak_bytes for e in group if e.record.search_peak_bytes is not None]
        rows.append(
            [
                name,
                format_seconds(mean_of(group, lambda r: r.search_seconds)),
                format_seconds(max(e.record.search_seconds for e in group)),
                f"{mean_of(group, lambda r: r.search_epochs):.2f}",
                f"{max(e.record.search_epochs for e in group):.2f}",
                format_bytes(statistics.fmean(memory) if memory else None),
                format_bytes(max(memory, default=None)),
                str(len(group)),
            ]
        )
    header = ("label", "time", "longest", "epochs", "most", "peak memory", "highest", "searches")
    note = (
        "Means over all searches of a label, their own pretraining included. Epochs are training epochs of the full "
        "model, validation not counted; memory is what the search needed above what was resident at its start."
    )
    return Sheet("Search cost", note, header, rows)


def _skipped(skipped: Sequence[Skipped]) -> Sheet:
    seeds: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for s in skipped:
        seeds[(s.model, s.label, s.budget or "", s.reason)].append(s.seed)
    rows = [
        [model, label, budget, ", ".join(map(str, sorted(found))), why]
        for (model, label, budget, why), found in seeds.items()
    ]
    note = "They are tried again when the comparison is started again."
    return Sheet("Cells that could not be made", note, ("model", "label", "budget", "seeds", "reason"), rows)


def comparison_tables(records: Sequence[RunRecord], skipped: Sequence[Skipped] = ()) -> str:
    """The tables in markdown; records may be those of several data sets' folders.

    Raises:
        DataError: no records, or two of the same.
    """
    parts = []
    for sheet in sheets(records, skipped):
        aligned = ["---" if name in ("budget", "label", "model", "reason") else "---:" for name in sheet.header]
        lines = [list(sheet.header), *sheet.rows]
        table = [f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines]
        table.insert(1, f"|{'|'.join(aligned)}|")
        parts.append("\n".join([f"## {_markdown_cell(sheet.title)}", "", sheet.note, "", *table, ""]))
    return "\n".join(parts)


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def comparison_terminal(records: Sequence[RunRecord], skipped: Sequence[Skipped] = ()) -> list[Table]:
    """The tables for a terminal.

    Raises:
        DataError: no records, or two of the same.
    """
    tables = []
    for sheet in sheets(records, skipped):
        table = Table(title=Text(sheet.title), title_justify="left", box=box.SIMPLE_HEAD)
        for name in sheet.header:
            table.add_column(name, justify="left" if name in ("budget", "label", "model", "reason") else "right")
        for row in sheet.rows:
            table.add_row(*map(Text, row))
        tables.append(table)
    return tables
