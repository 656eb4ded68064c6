"""Numbers as reports print them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

NONE = "-"


def format_bytes(count: float | None) -> str:
    """Bytes in decimal units.

    Example:
        >>> format_bytes(1_234_567)
        '1.2 MB'
    """
    if not count:
        return NONE if count is None else "0 B"
    # 999,950 bytes would round to 1000.0 KB, so the printed number chooses the unit.
    for power, unit in enumerate(("B", "KB", "MB", "GB", "TB")):
        scaled = count / 1000**power
        if scaled < 999.95 or unit == "TB":
            return f"{scaled:.0f} B" if power == 0 else f"{scaled:.1f} {unit}"
    raise AssertionError("unreachable")


def format_count(count: float | None) -> str:
    """A count with thousands separators."""
    return NONE if count is None else f"{round(count):,}"


def format_seconds(seconds: float | None) -> str:
    """Wall time.

    Example:
        >>> format_seconds(75.2)
        '1 min 15 s'
    """
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 0.095 else f"{seconds * 1000:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_share(share: float | None) -> str:
    """A share in percent."""
    return NONE if share is None else f"{share:.1%}"


def format_values(values: Sequence[float | None], *, digits: int = 4, signed: bool = False) -> str:
    """Mean ± sample standard deviation over seeds; None and NaN are left out.

    Example:
        >>> format_values([0.75, 0.76])
        '0.7550 ± 0.0071'
    """
    known = [v for v in values if v is not None and not math.isnan(v)]
    if not known:
        return NONE
    mean = statistics.fmean(known)
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    return f"{text} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else text


# Quantiles of Student's t for 95% intervals, by degrees of freedom from 1.
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def interval_95(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% confidence interval of the mean of values over seeds, by Student's t; None for fewer than two values.

    Example:
        >>> [round(end, 3) for end in interval_95([1.0, 2.0])]
        [-4.853, 7.853]
    """
    if len(values) < 2:
        return None
    mean, degrees = statistics.fmean(values), len(values) - 1
    quantile = _T_95[degrees - 1] if degrees <= len(_T_95) else 2.0
    reach = quantile * statistics.stdev(values) / len(values) ** 0.5
    return mean - reach, mean + reach


def byte_ticks(low: int, high: int) -> list[float]:
    """Round numbers of bytes from below `low` to above `high`, few enough to read."""
    first, last = math.floor(math.log10(max(1, low))), math.ceil(math.log10(max(2, high)))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    return [step * 10.0**power for power in range(first, last + 1) for step in steps]
