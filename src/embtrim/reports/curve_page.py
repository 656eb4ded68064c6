"""The HTML page of a curve and its figure, filled into templates/curve.html.j2, and the curve's values as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from embtrim.errors import DataError
from embtrim.experiments.records import RunRecord
from embtrim.methods.curves import CurvePoint, SizeCurve
from embtrim.reports.charts import FULL, LOOKS, SYMBOLS, Chart, Point, Rule, Series, bytes_axis, drawn, number_axis
from embtrim.reports.curve_tables import curve_header, curve_headline, curve_rows
from embtrim.reports.numbers import format_bytes
from embtrim.reports.page import fill_page
from embtrim.reports.variants import Variant, valid_losses, variants_of
from embtrim.system.files import read_json, write_then_rename

logger = logging.getLogger(__name__)

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


def read_lines(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Bytes and predicted loss of each point of a curve.json, by kind of plan; nothing, and a warning, if it is damaged."""
    if not path.exists():
        return {}
    try:
        return {
            str(kind): [(float(point["bytes"]), float(point["predicted_loss"])) for point in points]
            for kind, points in read_json(path)["lines"].items()
        }
    except (DataError, AttributeError, LookupError, TypeError, ValueError) as error:
        logger.warning("%s is damaged (%s); the page is written without its curve", path, error)
        return {}


def render_curve(curve: SizeCurve, records: Sequence[RunRecord] = ()) -> str:
    """The page as text; see `write_curve`."""
    variants = variants_of(records) if records else []
    return fill_page(
        "curve.html.j2",
        [record for variant in variants for record in variant.records],
        title="predicted validation AUC against bytes",
        headlines=curve_headline(curve).splitlines(),
        figure_drawn=drawn(curve_figure(curve, variants)),
        header=curve_header(curve),
        rows=curve_rows(curve),
        is_measured=bool(_measured(variants)),
    )


def curve_figure(curve: SizeCurve, variants: Sequence[Variant] = ()) -> Chart:
    """Predicted score over bytes, a line for each kind of plan, with the interval of the last kind and the knee.

    A measured point stands where its measured loss puts it below the score of the full model that was read.
    """
    series = []
    for number, (kind, points) in enumerate(curve.lines.items()):
        is_last = number == len(curve.lines) - 1

        def shown(point: CurvePoint, kind: str = kind, band: bool = is_last and bool(curve.error)) -> Point:
            text = (
                f"{kind}, {point.budget}: {format_bytes(point.num_bytes)}, predicted AUC {curve.predicted(point):.4f}, "
            )
            text += f"loss {point.loss:.5f}, {point.start}"
            ends = curve.interval(point) if band else None
            return Point(point.num_bytes, curve.predicted(point), text, ends, size=7)

        look = LOOKS[number % len(LOOKS)]
        series.append(Series(kind, [shown(p) for p in points], look, SYMBOLS[number], joined=True, band=is_last))
    knee = curve.knee
    text = f"knee, {knee.budget}: {format_bytes(knee.num_bytes)}, loss {knee.loss:.5f}"
    series.append(Series("knee", [Point(knee.num_bytes, curve.predicted(knee), text)], FULL, "star"))
    for number, (label, points) in enumerate(_measured(variants).items()):
        found = [
            Point(size, curve.score - loss, f"{label}: {format_bytes(size)}, measured loss {loss:+.5f}")
            for size, loss in points
        ]
        series.append(Series(f"measured: {label}", found, FULL, SYMBOLS[number % len(SYMBOLS)]))
    points = [p for one in series for p in one.points]
    x = bytes_axis([curve.full_bytes, *(p.x for p in points)])
    y = number_axis("validation AUC", [curve.score, *(v for p in points for v in (p.y, *(p.interval or ())))])
    summary = "; ".join(
        f"{one.name}: {one.points[0].y:.4f} at {format_bytes(one.points[0].x)} to {one.points[-1].y:.4f} at {format_bytes(one.points[-1].x)}"
        for one in series
        if one.points
    )
    return Chart(x, y, series, summary, 420, [Rule(curve.score, "full model")])


def _measured(variants: Sequence[Variant]) -> dict[str, list[tuple[int, float]]]:
    """Table bytes and measured loss of each record with a full model, by variant; full models are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for variant in variants:
        if not variant.is_full:
            losses = zip(variant.records, valid_losses(variant), strict=True)
            if points := [(record.table_bytes, loss) for record, loss in losses if loss is not None]:
                found[variant.label] = points
    return found
