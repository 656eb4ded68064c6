"""The time column of a log as numbers that order its rows: moments in time, or numbers as they are.

Dates and texts become microseconds since 1970, in UTC if they have a zone, otherwise as written. Numbers, such as seconds
since 1970, are compared as they are. docs/values.md lists the texts that are read; a schema's `time_format` names others.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Literal

import numpy as np
import polars as pl

from embtrim.config import Config
from embtrim.data.instants import FORMS, read_moments
from embtrim.data.log_file import Chunk
from embtrim.errors import ConfigError, DataError

# Forms that are read at once, quickest first, and whether they have a zone; FORMS are slower.
_QUICK = tuple(
    (f"%Y-%m-%d{mark}%H:%M:%S{end}", end.endswith(("Z", "z")))
    for end in ("", "Z", "%.f", "%.f%#z")
    for mark in (" ", "T")
)
_QUICK += (("%Y-%m-%d", False),)
_UTC = r"(?:[Zz]|UTC|GMT|[+-]00:?(?:00)?)(?:\[[^\]]*\])?\s*(?:\d{4}\s*)?$"
# Numbers since 1970 in these units lie between 1973 and 5138.
_EPOCHS = {"seconds": 1e8, "milliseconds": 1e11, "microseconds": 1e14, "nanoseconds": 1e17}
_PER_MICROSECOND = {"seconds": 1e-6, "milliseconds": 1e-3, "microseconds": 1.0, "nanoseconds": 1e3}
# Numbers such as 20240905 or 2024090508.
_COMPACT = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}

ADVICE = 'name its form in the schema, such as time_format = "%d/%m/%Y %H:%M" (--time-format)'


class Clock(Config):
    """What a time column holds, as its first rows say.

    Attributes:
        holds: "numbers", "moments" as written, or "instants", which have zones.
        zone: Zone in which cuts without a zone are read; None if they need one.
        unit: For numbers, the unit since 1970, or the form of compact dates; None for other numbers.
    """

    holds: Literal["numbers", "moments", "instants"]
    zone: str | None = None
    unit: str | None = None

    def describe(self) -> str:
        """What the column holds, in words."""
        if self.holds == "numbers":
            if self.unit is None:
                return "numbers"
            return f"numbers of the form {self.unit}" if "%" in self.unit else f"{self.unit} since 1970"
        return "times without a zone" if self.holds == "moments" else "times with a zone"


def read_clock(chunk: Chunk, column: str, time_format: str | None, clock: Clock | None) -> tuple[pl.Series, Clock]:
    """The times of a chunk as float64 (N,), and what the column holds.

    Args:
        chunk: Rows of the log.
        column: The time column.
        time_format: Form of texts, as strptime takes it; None for the usual forms.
        clock: What earlier rows hold; None for the first rows.

    Raises:
        DataError: A time is missing or cannot be read, or rows hold times that have no one order.
        ConfigError: `time_format` is not a format.
    """
    raw = chunk.frame[column]
    raw = raw.cast(pl.String) if raw.dtype in (pl.Categorical, pl.Enum) else raw
    times, is_zoned, zone = _read(raw, column, time_format, None if clock is None else clock.holds)
    bad = times.is_null().arg_true()
    if len(bad):
        value = raw[bad[0]]
        if value is None or value != value:
            raise DataError(
                f"{chunk.locate(bad[0])}: time column {column!r} is missing; drop the row or split by ratio"
            )
        if time_format is not None:
            advice = f"which is not of the form {time_format!r} (time_format)"
        else:
            advice = f"which cannot be read as a time in only one way; {ADVICE}, drop the row, or split by ratio"
        raise DataError(f"{chunk.locate(bad[0])}: time column {column!r} holds {value!r}, {advice}")
    if is_zoned is None:
        found = Clock(holds="numbers", unit=_unit(times, raw))
    else:
        mixed = (is_zoned != is_zoned[0]).arg_true() if len(is_zoned) else []
        if len(mixed):
            raise _no_order(chunk, mixed[0], column, "a zone" if is_zoned[mixed[0]] else "no zone")
        has_zone = bool(len(is_zoned)) and bool(is_zoned[0])
        found = Clock(holds="instants", zone=zone) if has_zone else Clock(holds="moments")
    if clock is None or not raw.len():
        return times, clock or found
    if found.holds != clock.holds:
        raise _no_order(chunk, 0, column, found.describe())
    if found.unit != clock.unit and found.unit in _EPOCHS and clock.unit in _EPOCHS:
        raise _no_order(chunk, 0, column, f"{found.describe()}, other rows {clock.describe()}")
    return times, clock


def _no_order(chunk: Chunk, row: int, column: str, what: str) -> DataError:
    value = chunk.frame[column][row]
    return DataError(
        f"{chunk.locate(row)}: time column {column!r} holds {str(value)!r} ({what}), which has no place among the other "
        "times; write all times in one way"
    )


def _read(
    raw: pl.Series, column: str, time_format: str | None, holds: str | None
) -> tuple[pl.Series, pl.Series | None, str | None]:
    """Times as float64, null where they cannot be read; for moments, whether each has a zone, and the zone of cuts."""
    if isinstance(raw.dtype, pl.Datetime) or raw.dtype == pl.Date:
        zone = raw.dtype.time_zone if isinstance(raw.dtype, pl.Datetime) else None
        moments = raw.cast(pl.Datetime("us", zone)).to_physical().cast(pl.Float64)
        return moments, pl.repeat(zone is not None, len(raw), eager=True), zone
    if raw.dtype.is_numeric():
        return raw.cast(pl.Float64).fill_nan(None), None, None
    if raw.dtype != pl.String:
        raise DataError(f"time column {column!r} holds {raw.dtype}; it must hold numbers, times or text")
    if time_format is not None:
        return _with_format(raw, time_format)
    if holds in (None, "numbers"):
        numbers = raw.str.strip_chars().cast(pl.Float64, strict=False).fill_nan(None)
        if holds == "numbers" or numbers.null_count() == raw.null_count():
            return numbers, None, None
    moments, quick_zoned = _quick(raw)
    is_zoned = pl.repeat(quick_zoned, len(raw), eager=True)
    left = (moments.is_null() & raw.is_not_null()).arg_true()
    if len(left):
        found, zoned = _by_forms(raw.gather(left))
        moments, is_zoned = moments.scatter(left, found), is_zoned.scatter(left, zoned)
    is_utc = holds is None and is_zoned.any() and raw.str.contains(_UTC).all()
    return moments.cast(pl.Float64), is_zoned, "UTC" if is_utc else None


def moments_of(texts: pl.Series) -> pl.Series:
    """Microseconds since 1970 of texts, int64; null where a text cannot be read as a time in only one way."""
    moments, _ = _quick(texts)
    left = (moments.is_null() & texts.is_not_null()).arg_true()
    return moments.scatter(left, _by_forms(texts.gather(left))[0]) if len(left) else moments


def _with_format(raw: pl.Series, time_format: str) -> tuple[pl.Series, pl.Series, str | None]:
    try:
        moments = raw.str.strip_chars().str.to_datetime(time_format, strict=False, time_unit="us")
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"time_format {time_format!r} is not a format of strptime: {reason}") from None
    is_zoned = isinstance(moments.dtype, pl.Datetime) and moments.dtype.time_zone is not None
    zones = pl.repeat(is_zoned, len(raw), eager=True)
    return moments.to_physical().cast(pl.Float64), zones, "UTC" if is_zoned else None


def _quick(raw: pl.Series) -> tuple[pl.Series, bool]:
    """Microseconds of texts in the form of most of the first ones, null for others; and whether the form has a zone."""
    head = raw.drop_nulls().head(100)
    form, is_zoned = max(_QUICK, key=lambda quick: _in_form(head, quick[0]).count())
    return _in_form(raw, form), is_zoned


def _in_form(texts: pl.Series, form: str) -> pl.Series:
    return texts.str.to_datetime(form, strict=False, time_unit="us", cache=False).to_physical()


def _by_forms(texts: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Microseconds of texts in one of FORMS, null for others; and whether they have a zone."""
    moments = pl.repeat(None, len(texts), dtype=pl.Int64, eager=True)
    is_zoned = pl.repeat(False, len(texts), eager=True)
    for form in FORMS:
        left = moments.is_null().arg_true()
        if not len(left):
            break
        found = read_moments(texts.gather(left), form)
        fraction = ("0." + found["digits"]).cast(pl.Float64, strict=False).fill_null(0.0)
        moments = moments.scatter(left, found["moment"].to_physical() + (fraction * 1e6).round().cast(pl.Int64))
        is_zoned = is_zoned.scatter(left, found["is_zoned"].fill_null(False))
    return moments, is_zoned


def _unit(times: pl.Series, raw: pl.Series) -> str | None:
    """The unit of numbers since 1970, or the form of compact dates, that fits all numbers; None if there is none."""
    if not len(times) or not (times == times.floor()).all():
        return _epoch(times.to_numpy())
    low, high = float(times.min()), float(times.max())  # type: ignore[arg-type]
    form = _COMPACT.get(len(str(int(abs(low)))))
    years = [int(str(int(time))[:4]) for time in (low, high)]
    if form is not None and len(str(int(high))) == len(str(int(low))) and 1970 <= years[0] <= years[1] <= 2100:
        texts = times.cast(pl.Int64).cast(pl.String).unique()
        if texts.str.slice(0, 8).str.to_date("%Y%m%d", strict=False).is_not_null().all():
            return form
    return _epoch(times.to_numpy())


def _epoch(time_N: np.ndarray) -> str | None:
    """The unit since 1970 in which all numbers lie between 1973 and 5138, if there is one."""
    if not len(time_N):
        return None
    for unit, least in _EPOCHS.items():
        if least <= time_N.min() and time_N.max() < 1000 * least:
            return unit
    return None


def cut_at(cut: str, clock: Clock, time_format: str | None, column: str) -> float:
    """A cut as a number to compare with the times of `read_clock`.

    Raises:
        DataError: The cut is not a time as the column holds them.
    """
    text = pl.Series([cut])
    number = text.str.strip_chars().cast(pl.Float64, strict=False)[0]
    if clock.holds == "numbers" and number is not None:
        return float(number)
    moments, is_zoned = _by_forms(text)
    if moments[0] is None and time_format is not None:
        moments, zones, _ = _with_format(text, time_format)
        is_zoned = zones
    if moments[0] is None or (clock.holds == "numbers" and clock.unit is None):
        form = "a number" if clock.holds == "numbers" and clock.unit is None else "2024-01-31T10:00:00"
        raise DataError(f"time column {column!r} holds {clock.describe()}, the cut is {cut!r}; write it as {form}")
    moment = int(moments[0])
    if clock.holds == "moments" and is_zoned[0]:
        raise DataError(
            f"the cut {cut!r} has a zone, time column {column!r} holds {clock.describe()}; leave the zone out"
        )
    if clock.holds == "instants" and not is_zoned[0]:
        moment = _in_zone(moment, clock.zone, cut, column)
    if clock.holds != "numbers":
        return float(moment)
    assert clock.unit is not None
    if clock.unit in _EPOCHS:
        return moment * _PER_MICROSECOND[clock.unit]
    return float(datetime.fromtimestamp(moment / 1e6, timezone.utc).strftime(clock.unit))


def _in_zone(moment: int, zone: str | None, cut: str, column: str) -> int:
    """A moment as written in a zone, in microseconds of UTC."""
    if zone is None:
        raise DataError(
            f"the cut {cut!r} has no zone, and time column {column!r} holds times of several; add one, such as {cut}Z"
        )
    local = pl.Series([moment]).cast(pl.Datetime("us"))
    try:
        return int(local.dt.replace_time_zone(zone, ambiguous="earliest").to_physical()[0])
    except pl.exceptions.PolarsError:
        raise DataError(
            f"the cut {cut!r} does not exist in {zone}, where clocks are set then; add a zone to it"
        ) from None


def cut_text(cut: float, clock: Clock) -> str | float:
    """A cut for people: ISO text for moments, the number for numbers."""
    if clock.holds == "numbers":
        return cut
    text = pl.Series([int(cut)]).cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S%.f")[0]
    return text + ("Z" if clock.holds == "instants" else "")
