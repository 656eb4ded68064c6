"""Texts that name a day or a moment, read as moments in time."""

from __future__ import annotations

import polars as pl

_CLOCK = (
    r"(?:(?:[Tt]|\s+|:)(?<hour>\d{1,2}):(?<minute>\d{2})(?::(?<second>\d{2})(?:[.,](?<digits>\d+))?)?(?:\s*(?<half>[AaPp])\.?[Mm]\.?)?"
    r"\s*(?<zone>[Zz]|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?)?"
)
ISO = rf"^\s*(?<year>\d{{4}})-(?<month>\d{{1,2}})-(?<day>\d{{1,2}}){_CLOCK}\s*$"


def read_moments(texts: pl.Series, pattern: str = ISO) -> pl.DataFrame:
    """The moments that texts name, as columns of a frame; all are null where a text does not match the pattern.

    - moment: datetime[us] in whole seconds, in UTC if the text has a zone, otherwise as written.
    - digits: The fraction of the second, such as "25", without trailing zeros.
    - has_time, is_zoned: Whether the text has a time of day, and a zone.

    Args:
        texts: The texts.
        pattern: Regular expression with the named groups of `ISO`.
    """
    part = {name: pl.col("part").struct.field(name) for name in _GROUPS}
    hour = part["hour"].cast(pl.Int32)
    half_day = part["half"].str.to_lowercase()
    hour = pl.when(half_day.is_null()).then(hour).when(hour.is_between(1, 12)).then(hour % 12 + 12 * (half_day == "p"))
    day = pl.concat_str(part["year"], part["month"].str.zfill(2), part["day"].str.zfill(2), separator="-")
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


_GROUPS = ("year", "month", "day", "hour", "minute", "second", "digits", "half", "zone")
