"""The README.md and the HTML page of a comparison; the page is filled into templates/comparison.html.j2."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embtrim.experiments.grid import Skipped
from embtrim.experiments.records import RunRecord
from embtrim.reports.comparison_figures import cost_bars, metric_against_bytes
from embtrim.reports.comparison_tables import comparison_tables, sheets
from embtrim.reports.entries import Entry, auc_of, entries_of, labels, logloss_of, scopes
from embtrim.reports.page import fill_page
from embtrim.reports.provenance import models_and_data, provenance
from embtrim.reports.widths import widths_heat_map
from embtrim.system.files import write_then_rename

logger = logging.getLogger(__name__)

# The first line of a README.md that embtrim may overwrite.
MARK = "<!-- written by embtrim from the records; changes are lost -->"


def write_comparison(
    records: Sequence[RunRecord], folder: str | Path, skipped: Sequence[Skipped] = (), page: Path | None = None
) -> None:
    """Write README.md into the folder, and the page.

    A README.md that embtrim did not write is left as it is.

    Args:
        records: Records of a grid.
        folder: Folder of the grid.
        skipped: Cells that could not be made.
        page: File of the page; folder/report.html if not given.

    Raises:
        DataError: There are no records, or two of the same.
    """
    readme = Path(folder) / "README.md"
    text = f"{MARK}\n\n# {_title(records)}\n\n{_facts(records)}\n\n{comparison_tables(records, skipped)}"
    if readme.exists() and not readme.read_text("utf-8", errors="replace").startswith(MARK):
        logger.warning("%s was not written by embtrim and is left as it is", readme)
    else:
        write_then_rename(readme, lambda file: file.write(text.encode()))
    html = render_comparison(records, skipped)
    write_then_rename(page or Path(folder) / "report.html", lambda file: file.write(html.encode()))


def render_comparison(records: Sequence[RunRecord], skipped: Sequence[Skipped] = ()) -> str:
    """The page as text, which works offline and carries the records as JSON.

    Raises:
        DataError: There are no records, or two of the same.
    """
    entries = entries_of(records)
    shown = [{"name": f"figure{number}", **figure} for number, figure in enumerate(_figures(entries))]
    return fill_page(
        "comparison.html.j2",
        [e.record for e in entries],
        {figure["name"]: figure["figure"] for figure in shown},
        title=_title(records),
        facts=_facts(records),
        shown_figures=shown,
        sheets=sheets(records, skipped),
    )


def _figures(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The figures in their order, each with a title and a note."""
    names = labels(entries)
    band = "Means over seeds with a band of one sample standard deviation. The full model is grey."
    figures = []

    def show(figure: dict[str, Any], title: str, note: str) -> None:
        figures.append({"figure": figure, "title": title, "note": note})

    for name, part in scopes(entries):
        show(metric_against_bytes(part, names, "test AUC", auc_of), f"AUC against bytes: {name}", band)
        show(metric_against_bytes(part, names, "test logloss", logloss_of), f"Logloss against bytes: {name}", band)
    for name, part in scopes(entries):
        show(
            widths_heat_map(part),
            f"Width of each field: {name}",
            "Embedding columns of each field by label, mean over seeds.",
        )
    epochs = cost_bars(entries, "search in epochs of the full model", lambda r: r.search_epochs, log_axis=True)
    show(epochs, "Search time", "Mean over budgets and seeds, on a logarithmic axis.")
    memory = cost_bars(entries, "MB", lambda r: None if r.search_peak_bytes is None else r.search_peak_bytes / 1e6)
    show(
        memory,
        "Search memory",
        "Peak above the memory that was resident when the search started, mean over budgets and seeds.",
    )
    return figures


def _title(records: Sequence[RunRecord]) -> str:
    return f"Comparison of {models_and_data(records)}"


def _facts(records: Sequence[RunRecord]) -> str:
    facts = provenance(records)
    full = f" Full models: {facts['full models']}." if "full models" in facts else ""
    return f"{len(records)} records. Rows: {facts['rows']}.{full} {facts['versions']}. {facts['hardware']}."
