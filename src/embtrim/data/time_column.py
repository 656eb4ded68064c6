"""Which column of a log is its clock, for a draft of its schema."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import polars as pl

from embtrim.data.clock import ADVICE, moments_of

logger = logging.getLogger(__name__)

_TIME_NAMES = ("timestamp", "time", "datetime", "date", "ts", "time_stamp", "event_time", "created_at")
_BIRTH = re.compile(r"birth|born|(^|_)(dob|bday)($|_)", re.IGNORECASE)
_DAY_OR_MONTH_FIRST = r"^\s*\d{1,2}[/.\-]\d{1,2}[/.\-]\d{2,4}\b"
_RISING = 0.95  # share of the steps from row to row that do not go back in time


def holds_times(column: pl.Series, num_distinct: int) -> bool:
    """Whether a column holds dates or times: by its type, its texts, or the name of a column of numbers."""
    if column.dtype.is_numeric():
        return column.name.lower() in _TIME_NAMES and num_distinct > 50
    if column.dtype != pl.String:
        return isinstance(column.dtype, (pl.Date, pl.Datetime))
    values = column.drop_nulls()
    if values.cast(pl.Float64, strict=False).is_not_null().all():
        return holds_times(values.cast(pl.Float64), num_distinct)
    if values.head(100).str.contains(_DAY_OR_MONTH_FIRST).all():
        logger.info(
            "column %r seems to hold dates such as %r, which can be read in more than one way; if it is the log's clock, "
            "name it (time, --time) and %s",
            column.name, values[0], ADVICE,
        )  # fmt: skip
    return all(moments_of(part).is_not_null().all() for part in (values.head(100), values))


def choose_time(sample: pl.DataFrame, names: Sequence[str]) -> str | None:
    """The clock among the columns with dates or times; None if only birthdays are left.

    Rows are written as things happen, so the first choice is a column that rises from row to row. Then comes a usual name,
    then times before dates, then the column with the latest time.
    """
    clocks = [name for name in names if not _BIRTH.search(name)]
    if not clocks:
        return None
    chosen = max(clocks, key=lambda name: _rank(sample[name]))
    others = [name for name in names if name != chosen]
    if others:
        logger.info(
            "time column: %r; %s dates or times as well, and no part of the draft; time (--time) names another clock",
            chosen, ", ".join(map(repr, others)) + (" holds" if len(others) == 1 else " hold"),
        )  # fmt: skip
    return chosen


def _rank(column: pl.Series) -> tuple[bool, bool, bool, float]:
    """How much a column looks like a clock; of two, the greater is the better one."""
    if column.dtype.is_numeric():
        times = column.cast(pl.Float64)
    elif column.dtype == pl.String:
        times = column.cast(pl.Float64, strict=False)
        times = moments_of(column).cast(pl.Float64) if times.is_null().all() else times
    else:
        times = column.cast(pl.Datetime("us")).to_physical().cast(pl.Float64)
    times = times.drop_nulls()
    if not len(times):
        return (False, False, False, 0.0)
    steps = times.diff().drop_nulls()
    is_rising = times.n_unique() > 1 and float((steps >= 0).mean() or 0.0) >= _RISING
    has_time = column.dtype.is_numeric() or bool((times % 86_400_000_000 != 0).any())
    return (is_rising, column.name.lower() in _TIME_NAMES, has_time, float(times.max()))  # type: ignore[arg-type]
