"""The HTML page of a run: its numbers and figures, filled into templates/run.html.j2.

Every number is computed from the records, which the page carries as packed JSON (`<script id="records">`, gzip in base64).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from embtrim.experiments.records import RunRecord
from embtrim.reports.curve_page import PAGE as CURVE_PAGE
from embtrim.reports.curve_page import VALUES as CURVE_VALUES
from embtrim.reports.curve_page import read_lines
from embtrim.reports.heat_maps import run_heat_map
from embtrim.reports.numbers import format_bytes, format_share, format_values
from embtrim.reports.page import fill_page
from embtrim.reports.provenance import models_and_data, provenance
from embtrim.reports.run_figures import (
    Lines,
    auc_by_decile,
    bytes_by_table,
    calibration_figure,
    difference_intervals,
    loss_against_bytes,
)
from embtrim.reports.run_tables import (
    COST_HEADER,
    VERIFICATION_HEADER,
    cost_rows,
    records_of,
    result_rows,
    verification_rows,
)
from embtrim.reports.variants import Variant, auc_differences, variants_of
from embtrim.system.files import write_then_rename


def write_report(records: Sequence[RunRecord], path: str | Path) -> None:
    """Write one self-contained HTML page, which works offline and carries the records, packed.

    Args:
        records: Records of one run or several; see `read_records`.
        path: File to write. It is written under a temporary name, then renamed. If there are a curve.html and curve.json
            beside it, the page links the curve and draws it.

    Raises:
        DataError: There are no records.
    """
    curve = Path(path).with_name(CURVE_PAGE)
    page = render_page(records, curve.name if curve.exists() else None, read_lines(curve.with_name(CURVE_VALUES)))
    write_then_rename(Path(path), lambda file: file.write(page.encode()))


def render_page(records: Sequence[RunRecord], curve: str | None = None, predicted: Lines | None = None) -> str:
    """The page as text, with a link to the page of a curve and the curve itself; see `write_report`."""
    variants = variants_of(records)
    ordered = records_of(variants)
    differences = [r.verification["max_difference"] for r in ordered if r.verification]
    heat_map = run_heat_map(variants)
    return fill_page(
        "run.html.j2",
        ordered,
        [heat_map],
        has_fields=bool(heat_map.groups),
        title=models_and_data(ordered),
        curve=curve,
        headlines=_headlines(variants),
        labels=[v.label for v in variants],
        result_rows=[[name, *texts] for name, texts in result_rows(variants)],
        losses=loss_against_bytes(variants, predicted),
        differences=difference_intervals(variants),
        bytes_by_table=bytes_by_table(variants),
        deciles=auc_by_decile(variants),
        calibration=calibration_figure(variants),
        verification_header=VERIFICATION_HEADER,
        verification_rows=verification_rows(variants),
        largest_difference=max(differences, default=0.0),
        cost_header=COST_HEADER,
        cost_rows=cost_rows(variants),
        settings=[(v.label, _settings(v)) for v in variants],
        provenance=[list(fact) for fact in provenance(ordered).items()],
    )


def _headlines(variants: Sequence[Variant]) -> list[str]:
    """One sentence for each variant that is not a control."""
    lines = []
    for variant in variants:
        if variant.is_full or variant.is_control:
            continue
        share = format_share(variant.mean(lambda r: r.num_params / max(1, r.num_full_params)))
        tables = format_bytes(variant.mean(lambda r: r.table_bytes))
        line = f"{variant.label} keeps {share} of the embedding parameters"
        fulls = [full for full in variant.full if full is not None]
        if not fulls:
            lines.append(f"{line}: {tables} of tables.")
            continue
        before = format_bytes(statistics.fmean(f.table_bytes for f in fulls))
        difference = format_values(auc_differences(variant), signed=True)
        lines.append(f"{line}: tables of {before} become {tables}; test AUC changes by {difference}.")
    return lines


def _settings(variant: Variant) -> str:
    """Everything that was set for a variant, as indented JSON."""
    first = variant.records[0]
    settings = {
        "model": first.model,
        "hparams": first.hparams,
        "train": first.train,
        "method": first.variant,
        "search": first.search,
        "budget": [r.budget for r in variant.records],
        "init": first.init,
        "teacher": first.teacher,
        "seeds": [r.seed for r in variant.records],
    }
    return json.dumps(settings, indent=2, ensure_ascii=False)
