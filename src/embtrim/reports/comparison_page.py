"""The README.md and the HTML page of a comparison; the page is filled into templates/comparison.html.j2."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embtrim.experiments.grid import Skipped
from embtrim.experiments.records import RunRecord
from embtrim.reports.comparison_figures import LEAST_LOSS, cost_bars, looks_of, loss_against_bytes, loss_rows, losses_of
from embtrim.reports.comparison_tables import comparison_tables, sheets
from embtrim.reports.entries import Entry, auc_of, entries_of, labels, logloss_of, scopes
from embtrim.reports.heat_maps import comparison_heat_map
from embtrim.reports.page import fill_page
from embtrim.reports.provenance import models_and_data, provenance
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
    """The page as text, which works offline and carries the records, packed.

    Raises:
        DataError: There are no records, or two of the same.
    """
    entries = entries_of(records)
    parts, looks = scopes(entries), looks_of(entries)
    searched = [(f"Width of each field: {name}", part) for name, part in parts if labels(part)]
    return fill_page(
        "comparison.html.j2",
        [e.record for e in entries],
        [comparison_heat_map(part, title) for title, part in searched],
        broad=True,
        title=_title(records),
        facts=_facts(records),
        losses=[section for name, part in parts for section in _losses(name, part, looks)],
        heat_titles=[title for title, _ in searched],
        costs=_costs(entries) if searched else [],
        sheets=sheets(records, skipped),
    )


def _losses(name: str, entries: Sequence[Entry], looks: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """The losses of one data set and model, each with a figure and a table."""
    sections = []
    for metric, value, sign in (("AUC", auc_of, -1.0), ("logloss", logloss_of, 1.0)):
        what = f"loss of test {metric}" if sign < 0 else f"increase of test {metric}"
        found = losses_of(entries, value, sign)
        shown = loss_against_bytes(entries, found, looks, f"{what} against the full model, logarithmic")
        sections.append(
            {
                "title": f"{what[0].upper()}{what[1:]} against bytes: {name}",
                "note": "Means over seeds, seed by seed against the full model. Smaller models are to the right, better ones "
                f"below. Outlined points on the bottom line lose less than {LEAST_LOSS:g}, or gain. The broad line joins the "
                "best model at each size (★ in the table); grey dashed lines are methods that ignore the data, and "
                "those beyond the best six.",
                "drawn": shown.drawn,
                "outside": shown.outside,
                "header": ["label", "budget", "loss" if sign < 0 else "increase", "table bytes"],
                "rows": loss_rows(found),
            }
        )
    return sections


def _costs(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The figures of the cost of searches."""
    epochs = cost_bars(entries, "search in epochs of the full model, logarithmic", lambda r: r.search_epochs, log=True)
    memory = cost_bars(entries, "MB", lambda r: None if r.search_peak_bytes is None else r.search_peak_bytes / 1e6)
    note = "Peak above the memory that was resident when the search started, mean over budgets and seeds."
    return [
        {"drawn": epochs, "title": "Search time", "note": "Mean over budgets and seeds, on a logarithmic axis."},
        {"drawn": memory, "title": "Search memory", "note": note},
    ]


def _title(records: Sequence[RunRecord]) -> str:
    return f"Comparison of {models_and_data(records)}"


def _facts(records: Sequence[RunRecord]) -> str:
    facts = provenance(records)
    full = f" Full models: {facts['full models']}." if "full models" in facts else ""
    return f"{len(records)} records. Rows: {facts['rows']}.{full} {facts['versions']}. {facts['hardware']}."
