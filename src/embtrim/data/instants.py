"""Texts that name a day or a moment, read as moments in time."""

from __future__ import annotations

import polars as pl

_CLOCK = (
    r"(?:(?:[Tt]|,?\s+|:)(?<hour>\d{1,2}):(?<minute>\d{2})(?::(?<second>\d{2})(?:[.,](?<digits>\d+))?)?"
    r"(?:\s*(?<half>[AaPp])\.?[Mm]\.?)?\s*(?<zone>[Zz]|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?(?:\[[^\]]*\])?)?"
)
_MONTH, _DAY, _YEAR = r"(?<month>[A-Za-z]{3,9})\.?", r"(?<day>\d{1,2})(?:st|[nr]d|th)?", r"(?<year>\d{4})"
_WEEKDAY = r"(?:[A-Za-z]{3,9},?\s+)?"
_TIME = r"(?<hour>\d{1,2}):(?<minute>\d{2}):(?<second>\d{2})"

ISO = rf"^\s*{_YEAR}-(?<month>\d{{1,2}})-(?<day>\d{{1,2}}){_CLOCK}\s*$"
# Forms that can be read in one way only: the year comes first, or the month is a word. 9/5/2024 is not one of them.
FORMS = (
    rf"^\s*{_YEAR}[-/.](?<month>\d{{1,2}})[-/.](?<day>\d{{1,2}}){_CLOCK}\s*$",
    rf"^\s*{_YEAR}(?<month>\d{{2}})(?<day>\d{{2}})[Tt ]+(?<hour>\d{{2}}):?(?<minute>\d{{2}}):?(?<second>\d{{2}})?(?<zone>[Zz])?\s*$",
    rf"^\s*{_WEEKDAY}{_MONTH}\s+{_DAY},?\s+{_YEAR}{_CLOCK}\s*$",
    rf"^\s*{_WEEKDAY}{_DAY}[-/\s]+{_MONTH}[-/,\s]+{_YEAR}{_CLOCK}\s*$",
    rf"^\s*{_WEEKDAY}{_MONTH}\s+{_DAY}\s+{_TIME}\s+(?<zone>UTC|GMT|[+-]\d{{4}})?\s*{_YEAR}\s*$",
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH_NAMES = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october")
_MONTH_NAMES += ("november", "december", "sept", *_MONTHS)
_GROUPS = ("year", "month", "day", "hour", "minute", "second", "digits", "half", "zone")


def read_moments(texts: pl.Series, pattern: str = ISO) -> pl.DataFrame:
    """The moments that texts name, as columns of a frame; all are null where a text does not match the pattern.

    - moment: datetime[us] in whole seconds, in UTC if the text has a zone, otherwise as written.
    - digits: The fraction of the second, such as "25", without trailing zeros.
    - has_time, is_zoned: Whether the text has a time of day, and a zone.

    Args:
        texts: The texts.
        pattern: Regular expression with named groups, see `ISO` and `FORMS`.
    """
    part = {
        name: pl.col("part").struct.field(name) if f"<{name}>" in pattern else pl.lit(None, pl.String)
        for name in _GROUPS
    }
    month = part["month"]
    if "A-Za-z" in pattern.partition("<month>")[2][:10]:
        name = month.str.to_lowercase()
        number = name.str.slice(0, 3).replace_strict(_MONTHS, [str(i) for i in range(1, 13)], default=None)
        month = pl.when(name.is_in(_MONTH_NAMES)).then(number)
    hour = part["hour"].cast(pl.Int32)
    half_day = part["half"].str.to_lowercase()
    hour = pl.when(half_day.is_null()).then(hour).when(hour.is_between(1, 12)).then(hour % 12 + 12 * (half_day == "p"))
    day = pl.concat_str(part["year"], month.str.zfill(2), part["day"].str.zfill(2), separator="-")
    clock = pl.concat_str(
        hour.cast(pl.String).str.zfill(2), part["minute"], part["second"].fill_null("00"), separator=":"
    )
    has_time = part["hour"].is_not_null()
    whole = pl.when(has_time).then(pl.concat_str(day, clock, separator=" ")).otherwise(day + " 00:00:00")
    local = whole.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="us")
    offset = part["zone"].str.replace(":", "", literal=True).str.extract_groups(r"^([+-])(\d{2})(\d{2})?$")
    minutes = offset.struct.field("2").cast(pl.Int32) * 60 + offset.struct.field("3").cast(pl.Int32).fill_null(0)
    minutes = (minutes * pl.when(offset.struct.field("1") == "-").then(-1).otherwise(1)).fill_null(0)
    frame = texts.alias("text").to_frame().select(part=pl.col("text").str.extract_groups(pattern))
    frame = frame.select(
        moment=local - pl.duration(minutes=minutes),
        digits=part["digits"].fill_null("").str.strip_chars_end("0"),
        has_time=has_time,
        is_zoned=part["zone"].is_not_null(),
    )
    return frame.select(pl.when(pl.col("moment").is_not_null()).then(pl.all()))
