"""The tables of a comparison: as text, in Markdown, for a terminal.

Means ± sample standard deviation are over seeds; differences are taken seed by seed. Every number is computed from the
records.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from embtrim.experiments.grid import FULL, Skipped
from embtrim.experiments.records import RunRecord
from embtrim.reports.entries import (
    Entry,
    auc_of,
    entries_of,
    groups,
    labels,
    logloss_of,
    mean_of,
    paired_differences,
    ranks,
    rarest_auc_of,
    scopes,
)
from embtrim.reports.numbers import NONE, format_bytes, format_count, format_seconds, format_values
from embtrim.system.templates import cell

REFERENCE = "uniform"

# Columns of text; the others hold numbers.
TEXT_COLUMNS = ("budget", "label", "model", "reason")


@dataclass(frozen=True)
class Sheet:
    """A table as text.

    Attributes:
        title: Title of the table.
        note: Sentence that explains the table.
        header: Names of the columns.
        rows: Texts of each row.
        kind: "numbers", or "facts" for a table of words.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[list[str]]
    kind: str = "numbers"


def sheets(records: Sequence[RunRecord], skipped: Sequence[Skipped] = ()) -> list[Sheet]:
    """The tables as text: results, differences, ranks, cost, and the cells that could not be made.

    Raises:
        DataError: There are no records, or two of the same.
    """
    entries = entries_of(records)
    tables = [_results(name, part) for name, part in scopes(entries)]
    if labels(entries):
        tables += [_differences(name, part) for name, part in scopes(entries)]
        tables += [_ranks(entries), _cost(entries)]
    return tables + ([_skipped(skipped)] if skipped else [])


def _results(name: str, entries: Sequence[Entry]) -> Sheet:
    header = (
        "budget", "label", "test AUC", "rarest tenth", "logloss", "embedding params", "table bytes", "search, epochs", "seeds",
    )  # fmt: skip
    rows = []
    for group in groups(entries):
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
        "Mean ± sample standard deviation over seeds. The rarest tenth is the AUC of the tenth of the test rows whose rarest "
        "value is rarest in training. The search is counted in training epochs of the full model."
    )
    return Sheet(f"Results: {name}", note, header, rows)


def _differences(name: str, entries: Sequence[Entry]) -> Sheet:
    header, rows = ["budget", "label"], []
    for against in (FULL, REFERENCE):
        header += [f"AUC - {against}", f"logloss - {against}", "pairs"]
    for group in groups(e for e in entries if e.budget is not None):
        row = [group[0].record.budget or "", group[0].label]
        for against in (FULL, REFERENCE):
            pairs = [paired_differences(entries, group, against, value) for value in (auc_of, logloss_of)]
            if group[0].label == against:
                row += [NONE] * 3
            else:
                row += [*(format_values(pair, signed=True) for pair in pairs), str(len(pairs[0]))]
        rows.append(row)
    note = (
        f"Each seed is compared with the full model and with {REFERENCE} of the same seed: mean ± sample standard deviation "
        "of the differences."
    )
    return Sheet(f"Differences: {name}", note, tuple(header), rows)


def _ranks(entries: Sequence[Entry]) -> Sheet:
    ranks_by_label, num_cells = ranks(entries)
    complete = len(next(iter(ranks_by_label.values())))
    rows = [
        [name, f"{statistics.fmean(values):.2f}", str(sum(value == 1 for value in values))]
        for name, values in sorted(ranks_by_label.items(), key=lambda item: statistics.fmean(item[1] or [0]))
        if values
    ]
    note = (
        f"Ranks by test AUC, where 1 is best, over the {complete} of {num_cells} cells (model, budget, seed) that have every "
        "label."
    )
    return Sheet("Ranks", note, ("label", "mean rank", "times first"), rows)


def _cost(entries: Sequence[Entry]) -> Sheet:
    rows = []
    for name in labels(entries):
        group = [e for e in entries if e.label == name and e.budget is not None]
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
    header = (
        "label", "mean time", "longest time", "mean epochs", "most epochs", "mean peak memory", "highest peak memory", "searches",
    )  # fmt: skip
    note = (
        "All searches of a label, with their own pretraining. Epochs are training epochs of the full model, without "
        "validation. Peak memory is counted above what was resident when the search started."
    )
    return Sheet("Search cost", note, header, rows)


def _skipped(skipped: Sequence[Skipped]) -> Sheet:
    seeds: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for s in skipped:
        seeds[(s.model, s.label, s.budget or "", s.reason)].append(s.seed)
    rows = [
        [model, label, budget, ", ".join(map(str, sorted(own))), why]
        for (model, label, budget, why), own in seeds.items()
    ]
    note = "These cells are tried again when the comparison is started again."
    return Sheet(
        "Cells that could not be made", note, ("model", "label", "budget", "seeds", "reason"), rows, kind="facts"
    )


def comparison_tables(records: Sequence[RunRecord], skipped: Sequence[Skipped] = ()) -> str:
    """The tables in Markdown; the records of several data sets may be given together.

    Raises:
        DataError: There are no records, or two of the same.
    """
    parts = []
    for sheet in sheets(records, skipped):
        aligned = ["---" if name in TEXT_COLUMNS else "---:" for name in sheet.header]
        lines = [list(sheet.header), *sheet.rows]
        table = [f"| {' | '.join(map(cell, line))} |" for line in lines]
        table.insert(1, f"|{'|'.join(aligned)}|")
        parts.append("\n".join([f"## {cell(sheet.title)}", "", sheet.note, "", *table, ""]))
    return "\n".join(parts)


def comparison_terminal(records: Sequence[RunRecord], skipped: Sequence[Skipped] = ()) -> list[Table]:
    """The tables for a terminal.

    Raises:
        DataError: There are no records, or two of the same.
    """
    tables = []
    for sheet in sheets(records, skipped):
        table = Table(title=Text(sheet.title), title_justify="left", box=box.SIMPLE_HEAD)
        for name in sheet.header:
            table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right")
        for row in sheet.rows:
            table.add_row(*map(Text, row))
        tables.append(table)
    return tables
