"""The tables of a curve: predicted scores and losses by budget and kind of plan, as text and for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from embtrim.methods.curves import CurvePoint, SizeCurve
from embtrim.plan.budget import Budget
from embtrim.reports.numbers import NONE, format_bytes

KNEE = "knee"
_COLUMNS = ("bytes", "share", "AUC", "loss")
# For each kind of plan, how its columns are headed.
_SHORT = {"widths": "widths", "rows and widths": "rows, widths", "rows, widths and bits": "all"}


def curve_header(curve: SizeCurve) -> list[str]:
    """The names of the columns: the budget, and some columns for each kind of plan."""
    return ["budget", *(f"{_SHORT[kind]}: {name}" for kind in curve.lines for name in _COLUMNS)]


def curve_rows(curve: SizeCurve) -> list[list[str]]:
    """A row for each budget that some kind meets, large ones first, and one for the knee; by `curve_header`."""
    by_budget: dict[str, dict[str, CurvePoint]] = {}
    for kind, points in curve.lines.items():
        for point in points:
            by_budget.setdefault(point.budget, {})[kind] = point
    rows = [
        (Budget.parse(budget), [budget, *(text for kind in curve.lines for text in _cells(curve, points.get(kind)))])
        for budget, points in by_budget.items()
    ]
    last = list(curve.lines)[-1]
    knee = [f"{curve.knee.budget} ({KNEE})"]
    for kind in curve.lines:
        knee += _cells(curve, curve.knee if kind == last else None)
    rows.append((Budget.parse(curve.knee.budget), knee))
    return [row for _, row in sorted(rows, key=lambda pair: (pair[0].kind, -pair[0].amount))]


def curve_headline(curve: SizeCurve) -> str:
    """The knee in words, and the error of the score."""
    knee = curve.knee
    line = (
        f"knee: {knee.budget}, {format_bytes(knee.num_bytes)} of {format_bytes(curve.full_bytes)}, with a predicted loss of "
        f"{knee.loss:.5f}, at most {curve.tolerance:g} (start: {knee.start})"
    )
    error = f"{curve.error:.4f}" if curve.error else "not known"
    return (
        f"{line}\nfull model: validation AUC {curve.score:.4f} on the rows read; its standard error is {error}. This is "
        "the error of the score, not of the predictions."
    )


def curve_terminal(curve: SizeCurve) -> Table:
    """The table for a terminal."""
    table = Table(title=Text("predicted validation AUC"), title_justify="left", box=box.SIMPLE_HEAD)
    for name in curve_header(curve):
        table.add_column(Text(name.replace(": ", "\n")), justify="right", no_wrap=True)
    for row in curve_rows(curve):
        table.add_row(*map(Text, row))
    return table


def _cells(curve: SizeCurve, point: CurvePoint | None) -> list[str]:
    if point is None:
        return [NONE] * len(_COLUMNS)
    return [format_bytes(point.num_bytes), f"{point.share:.2%}", f"{curve.predicted(point):.4f}", f"{point.loss:.5f}"]
