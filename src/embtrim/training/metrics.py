"""Exact metrics over a whole split: AUC, logloss, calibration, and AUC by how often a row's values were seen.

All are of all rows, in float64; none is an average over batches. Memory: a byte a row for labels and, for AUC, a sorted copy
of the scores in the precision they come in (with sample weights some 50 bytes a row); the rest goes by CHUNK_ROWS.

Shapes: N rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embtrim.errors import DataError

Floats = NDArray[np.float64]
# In the precision they come in: float32 scores are compared as such.
Numbers = NDArray[Any]
Bools = NDArray[np.bool_]

NUM_DECILES = 10
# Rows whose values in float64 are at hand at a time.
CHUNK_ROWS = 1 << 20


@dataclass(frozen=True)
class Metrics:
    """How well a model does on one split.

    Attributes:
        auc: probability that a positive row scores above a negative one, ties counting half.
        logloss: mean binary cross entropy, in nats.
        calibration: mean predicted probability / mean label; 1 is right on average.
        num_rows: rows of the split.
        auc_by_decile: (decile, rows, mean frequency, AUC or None) from the rarest to the most frequent, if asked for;
            see `auc_by_frequency_decile`.
    """

    auc: float
    logloss: float
    calibration: float
    num_rows: int
    auc_by_decile: list[tuple[int, int, float, float | None]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The attributes as a JSON-able dict."""
        deciles = None if self.auc_by_decile is None else [list(entry) for entry in self.auc_by_decile]
        return {**dataclasses.asdict(self), "auc_by_decile": deciles}

    def with_deciles(self, auc_by_decile: list[tuple[int, int, float, float | None]]) -> Metrics:
        """A copy with `auc_by_decile`."""
        return dataclasses.replace(self, auc_by_decile=auc_by_decile)


def compute_metrics(labels: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> Metrics:
    """All metrics of a split.

    Args:
        labels: (N,) 0 or 1.
        logits: (N,) scores before the sigmoid.
        weights: (N,) non-negative sample weights, or None.

    Raises:
        DataError: no rows, one class only, NaN among the logits, or lengths that differ.

    Example:
        >>> compute_metrics([0, 1, 1], [-1.0, -2.0, 3.0]).auc
        0.5
    """
    labels_N, logits_N, weights_N = _check(labels, logits, weights)
    return Metrics(
        auc=_auc(labels_N, logits_N, weights_N),
        logloss=_logloss(labels_N, logits_N, weights_N),
        calibration=_calibration(labels_N, logits_N, weights_N),
        num_rows=len(labels_N),
    )


def auc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC curve, exact, ties counting half (the Mann-Whitney statistic).

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) logits or probabilities; only their order matters.
        weights: (N,) non-negative sample weights, or None.

    Raises:
        DataError: no rows, one class only, NaN among the scores, or lengths that differ.

    Example:
        >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    return _auc(*_check(labels, scores, weights))


def logloss(labels: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean binary cross entropy in nats, from logits: large ones lose nothing to a saturated sigmoid.

    Args:
        labels: (N,) 0 or 1.
        logits: (N,) scores before the sigmoid.
        weights: (N,) non-negative sample weights, or None.

    Raises:
        DataError: see `auc`; one class only is allowed here.
    """
    return _logloss(*_check(labels, logits, weights, both_classes=False))


def calibration(labels: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean predicted probability / mean label.

    Args:
        labels: (N,) 0 or 1.
        logits: (N,) scores before the sigmoid.
        weights: (N,) non-negative sample weights, or None.

    Raises:
        DataError: see `auc`.
    """
    return _calibration(*_check(labels, logits, weights))


def auc_by_frequency_decile(
    labels: ArrayLike, scores: ArrayLike, frequency: ArrayLike
) -> list[tuple[int, int, float, float | None]]:
    """AUC within ten groups of rows, from those with the rarest values to those with the most frequent.

    The groups hold equally many rows; rows of one frequency may fall into two of them.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) logits or probabilities.
        frequency: (N,) how often the row's rarest value - or the value of a field of interest - occurs in the
            training rows.

    Returns:
        (decile 1..10, rows, mean frequency, AUC or None if the group has one class only) a group; groups that are
        empty, for want of rows, are left out.

    Raises:
        DataError: no rows, NaN, or lengths that differ.
    """
    labels_N, scores_N, _ = _check(labels, scores, None, both_classes=False)
    frequency_N = _numbers(frequency)
    if frequency_N.shape != labels_N.shape or np.isnan(frequency_N).any():
        raise DataError(
            f"metrics: frequencies must be {len(labels_N)} numbers, one a row; given shape {frequency_N.shape}"
            + (" with NaN" if np.isnan(frequency_N).any() else "")
        )
    # Stable: rows of one frequency stay in the order of the log, so the groups are the same at every call.
    groups = np.array_split(np.argsort(frequency_N, kind="stable"), NUM_DECILES)
    return [
        (decile, len(rows), float(frequency_N[rows].mean()), _auc_or_none(labels_N[rows], scores_N[rows]))
        for decile, rows in enumerate(groups, start=1)
        if len(rows)
    ]


def _check(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None, both_classes: bool = True
) -> tuple[Bools, Numbers, Numbers | None]:
    """Which labels are 1, the scores and the weights; or DataError."""
    labels_N, scores_N = _numbers(labels), _numbers(scores)
    weights_N = None if weights is None else _numbers(weights)
    if labels_N.ndim != 1 or labels_N.shape != scores_N.shape:
        raise DataError(f"metrics: labels {labels_N.shape} and scores {scores_N.shape} must be two equal columns")
    if len(labels_N) == 0:
        raise DataError("metrics: there are no rows to score")
    num_nan = np.count_nonzero(np.isnan(scores_N))
    if num_nan:
        raise DataError(f"metrics: {num_nan:,} of {len(scores_N):,} scores are NaN; did training diverge?")
    positive_N = labels_N == 1
    if np.count_nonzero(positive_N) + np.count_nonzero(labels_N == 0) < len(labels_N):
        raise DataError(f"metrics: labels must be 0 or 1, found {labels_N[~positive_N & (labels_N != 0)][0]:g}")
    if weights_N is not None:
        if weights_N.shape != labels_N.shape:
            raise DataError(f"metrics: {len(labels_N)} labels, but weights of shape {weights_N.shape}")
        if not (np.isfinite(weights_N).all() and weights_N.min() >= 0 and weights_N.any()):
            raise DataError("metrics: weights must be finite, none negative and not all zero")
    if both_classes:
        counted_N = positive_N if weights_N is None else positive_N[weights_N > 0]
        if counted_N.all() or not counted_N.any():
            only = "positive" if counted_N[0] else "negative"
            raise DataError(
                f"metrics: all {len(counted_N):,} rows are {only}; AUC needs both classes (is the split too small, or "
                "ordered by label?)"
            )
    return positive_N, scores_N, weights_N


def _numbers(values: ArrayLike) -> Numbers:
    """An array of real numbers as it is, without a copy; others in float64."""
    array = np.asarray(values)
    return array if array.dtype.kind in "biuf" else array.astype(np.float64)


def _auc(positive_N: Bools, scores_N: Numbers, weights_N: Numbers | None) -> float:
    if weights_N is not None:
        return _weighted_auc(positive_N, scores_N, weights_N)
    positives, negatives = scores_N[positive_N], scores_N[~positive_N]
    positives.sort()
    negatives.sort()
    # Twice the negatives below each positive: those below it, and those not above it. In whole numbers, without rounding.
    beaten = 0
    for start in range(0, len(positives), CHUNK_ROWS):
        part = positives[start : start + CHUNK_ROWS]
        beaten += sum(int(np.searchsorted(negatives, part, side).sum()) for side in ("left", "right"))
    return beaten / (2 * len(positives) * len(negatives))


def _weighted_auc(positive_N: Bools, scores_N: Numbers, weights_N: Numbers) -> float:
    order = np.argsort(scores_N)
    sorted_N = scores_N[order]
    # Last row of each run of equal scores; running sums there are all that ties leave of the order.
    ends = np.append(np.flatnonzero(sorted_N[1:] != sorted_N[:-1]), len(sorted_N) - 1)
    positive_N, sorted_weights_N = positive_N[order], weights_N[order].astype(np.float64)
    positives = np.cumsum(positive_N * sorted_weights_N)[ends]
    negatives = np.cumsum(~positive_N * sorted_weights_N)[ends]
    # Trapezoids: a run's positives beat all negatives before it, and half of those in it.
    gained = np.diff(positives, prepend=0.0)
    below = np.append(0.0, negatives[:-1]) + negatives
    return float(0.5 * (gained @ below) / (positives[-1] * negatives[-1]))


def _auc_or_none(positive_N: Bools, scores_N: Numbers) -> float | None:
    return _auc(positive_N, scores_N, None) if 0 < positive_N.sum() < len(positive_N) else None


def _logloss(positive_N: Bools, logits_N: Numbers, weights_N: Numbers | None) -> float:
    def losses(rows: slice) -> Floats:
        # log(1 + e^z) - y z, written as log(1 + e^s) with s = -z for positives, z for negatives: exact for infinite z too.
        logits = logits_N[rows].astype(np.float64)
        return np.logaddexp(0.0, np.where(positive_N[rows], -logits, logits))

    return _average(losses, len(logits_N), weights_N)


def _calibration(positive_N: Bools, logits_N: Numbers, weights_N: Numbers | None) -> float:
    def probabilities(rows: slice) -> Floats:
        # sigmoid(z) = (1 + tanh(z / 2)) / 2 overflows nowhere.
        return 0.5 * (1.0 + np.tanh(0.5 * logits_N[rows].astype(np.float64)))

    predicted = _average(probabilities, len(logits_N), weights_N)
    return predicted / _average(lambda rows: positive_N[rows].astype(np.float64), len(logits_N), weights_N)


def _average(values: Callable[[slice], Floats], num_rows: int, weights_N: Numbers | None) -> float:
    """The mean of what `values` gives for some rows, over all rows."""
    total, total_weight = 0.0, 0.0
    for start in range(0, num_rows, CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, num_rows))
        if weights_N is None:
            total, total_weight = total + float(values(rows).sum()), total_weight + rows.stop - rows.start
        else:
            weights = weights_N[rows].astype(np.float64)
            total, total_weight = total + float((values(rows) * weights).sum()), total_weight + float(weights.sum())
    return total / total_weight
