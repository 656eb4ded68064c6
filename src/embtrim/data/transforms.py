"""Transforms of numbers: buckets of numeric fields, and the values of dense fields.

log2: v > 2 -> floor(ln(v)^2), else floor(v), so negative numbers keep one bucket per unit; all below -2^31 + 1 share
the last bucket. v is rounded to float32, so that a float64 number and its float32 are in one bucket; data encoded by earlier
versions lack the note `rounded` and take v as it is. quantile:k: bucket i holds edge[i-1] <= v < edge[i]; edges lie between values, see `quantile_edges`.
log1p: sign(v) ln(1 + |v|). standard: (v - mean) / std over the training rows that have a value; std is 1 if all are
equal.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from embtrim.schema import FieldSpec, Schema

MISSING_BUCKET = -(2**31)


def bucket_texts(buckets: pl.Series) -> pl.Series:
    """Buckets as values of a vocabulary; MISSING_BUCKET becomes null."""
    return buckets.set(buckets == MISSING_BUCKET, None).cast(pl.String)


def bucket_numbers(value_N: np.ndarray, field: FieldSpec, transforms: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
    """The bucket of each float64 value of a numeric field: int32 (N,), MISSING_BUCKET for NaN."""
    if field.transform == "log2":
        if "rounded" in transforms.get(field.name, {}):
            value_N = _rounded(value_N)
        bucket_N = np.log(np.maximum(value_N, 2.0))
        bucket_N *= bucket_N
        np.copyto(bucket_N, np.maximum(value_N, MISSING_BUCKET + 1), where=value_N <= 2)
        np.floor(bucket_N, out=bucket_N)
    else:
        edges = np.array(transforms[field.name]["edges"], float)
        bucket_N = np.searchsorted(edges, value_N, side="right").astype(float)
    bucket_N[np.isnan(value_N)] = MISSING_BUCKET
    return bucket_N.astype(np.int32)


def noted_rounding(schema: Schema) -> dict[str, dict[str, Any]]:
    """The note of new data that numbers are rounded to float32, by field whose transform takes them so."""
    return {field.name: {"rounded": "float32"} for field in schema.fields if field.transform == "log2"}


def _rounded(value_N: np.ndarray) -> np.ndarray:
    """Numbers rounded to float32, as float64; numbers beyond float32 stay."""
    with np.errstate(over="ignore"):
        single_N = value_N.astype(np.float32).astype(float)
    is_beyond_N = np.isinf(single_N)
    return np.where(is_beyond_N, value_N, single_N) if is_beyond_N.any() else single_N


def transformed(value_N: np.ndarray, field: FieldSpec, transforms: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
    """The float64 values of a dense field, transformed; NaN stays NaN."""
    if field.transform == "log1p":
        return np.sign(value_N) * np.log1p(np.abs(value_N))
    if field.transform == "standard":
        fitted = transforms[field.name]
        return (value_N - fitted["mean"]) / fitted["std"]
    return value_N


def is_learned(transform: str | None) -> bool:
    """Whether a transform depends on the training rows: quantile edges, or mean and std."""
    return transform is not None and (transform == "standard" or transform.startswith("quantile:"))


def quantile_edges(values: np.ndarray, num_buckets: int) -> list[float]:
    """Rising edges that divide values into buckets of equal size, as far as ties allow; at most num_buckets - 1.

    An edge lies midway between two neighbouring values, and values that are one float32 are ties. A float64 number and
    its float32 are in one bucket, whether or not training saw the number: an edge is the least float64 that rounds to
    its own float32, so `number >= edge` exactly if float32(number) >= float32(edge).

    Args:
        values: The numbers of the training rows: float (N,).
        num_buckets: Number of buckets.

    Example:
        >>> edges = quantile_edges(np.array([1.0, 2, 3, 4, 5, 6]), 3)
        >>> np.array(edges, np.float32).tolist()
        [2.5, 4.5]
    """
    with np.errstate(over="ignore"):  # a number beyond float32 is its infinity
        ordered = np.sort(np.asarray(values).astype(np.float32))
        if not len(ordered):
            return []
        upper = np.unique(ordered[len(ordered) * np.arange(1, num_buckets) // num_buckets])
        upper = upper[upper > ordered[0]]
        lower = ordered[np.searchsorted(ordered, upper) - 1]
        middle = ((_finite(lower) + _finite(upper)) / 2).astype(np.float32)
        edges = np.maximum(middle, np.nextafter(lower, np.float32(np.inf)))
        # The least float64 that rounds to an edge is halfway to the float32 below, or just above halfway.
        halfway = (_finite(np.nextafter(edges, np.float32(-np.inf))) + _finite(edges)) / 2
        least = np.where(halfway.astype(np.float32) == edges, halfway, np.nextafter(halfway, np.inf))
    return least.tolist()


def _finite(numbers: np.ndarray) -> np.ndarray:
    """Float32 numbers as float64; infinite ones as the powers of two that follow the largest float32."""
    return np.clip(numbers.astype(float), -(2.0**128), 2.0**128)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations, merged chunk by chunk (Chan et al., 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """The moments of the values of a chunk."""
        if not len(values):
            return cls()
        mean = float(values.mean())
        return cls(len(values), mean, float(((values - mean) ** 2).sum()))

    def merge(self, later: Moments) -> None:
        """Add the moments of the chunk that follows; another order may change the last bit."""
        if not later.count:
            return
        count, delta = self.count + later.count, later.mean - self.mean
        self.squares += later.squares + delta * delta * self.count * later.count / count
        self.mean += delta * later.count / count
        self.count = count

    def result(self) -> dict[str, float]:
        """Mean and standard deviation; a deviation of 0 becomes 1."""
        std = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return {"mean": self.mean, "std": std if std > 0 else 1.0}
