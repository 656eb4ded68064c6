"""Exact metrics over a whole split: AUC, logloss, calibration, and AUC by how often a row's values were seen.

Every metric is computed over all rows, in float64, never as an average over batches. Memory: one byte per row for
labels, and for AUC a sorted copy of the scores in their own precision (with sample weights some 50 bytes per row).
Everything else is computed CHUNK_ROWS rows at a time.

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
# Numbers keep their own precision: float32 scores are compared as float32.
Numbers = NDArray[Any]
Bools = NDArray[np.bool_]

NUM_DECILES = 10
# Rows that are converted to float64 at a time.
CHUNK_ROWS = 1 << 20


@dataclass(frozen=True)
class Metrics:
    """Metrics of a model on one split.

    Attributes:
        auc: Probability that a positive row scores above a negative one. Ties count half.
        logloss: Mean binary cross entropy, in nats.
        calibration: Mean predicted probability / mean label; 1 is right on average.
        num_rows: Rows of the split.
        auc_by_decile: (decile, rows, mean frequency, AUC or None) for each group of rows, rarest first; None unless
            requested. See `auc_by_frequency_decile`.
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
        DataError: There are no rows or only one class, a logit is NaN, or lengths differ.

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
    """Exact area under the ROC curve (the Mann-Whitney statistic). Ties count half.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) logits or probabilities; only their order matters.
        weights: (N,) non-negative sample weights, or None.

    Raises:
        DataError: There are no rows or only one class, a score is NaN, or lengths differ.

    Example:
        >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    return _auc(*_check(labels, scores, weights))


def auc_error(labels: ArrayLike, scores: ArrayLike) -> float:
    """Standard error of an AUC over samples of as many rows (DeLong et al., Biometrics 1988).

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) logits or probabilities; only their order matters.

    Raises:
        DataError: See `auc`.

    Example:
        >>> round(auc_error([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
        0.3536
    """
    placements = _placements(*_check(labels, scores, None)[:2])
    return sum(float(np.var(part, ddof=1)) / len(part) for part in placements if len(part) > 1) ** 0.5


def _placements(positive_N: Bools, scores_N: Numbers) -> tuple[Floats, Floats]:
    """For each positive row the share of negatives below it, and for each negative row of positives; ties count half."""
    positives, negatives = scores_N[positive_N], scores_N[~positive_N]

    def below(rows: Numbers, others: Numbers) -> Floats:
        others = np.sort(others)
        return (np.searchsorted(others, rows, "left") + np.searchsorted(others, rows, "right")) / (2 * len(others))

    return below(positives, negatives), below(negatives, positives)


def logloss(labels: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean binary cross entropy in nats, from logits, so that large logits do not saturate a sigmoid.

    Args:
        labels: (N,) 0 or 1.
        logits: (N,) scores before the sigmoid.
        weights: (N,) non-negative sample weights, or None.

    Raises:
        DataError: See `auc`; a single class is allowed here.
    """
    return _logloss(*_check(labels, logits, weights, both_classes=False))


def calibration(labels: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean predicted probability / mean label.

    Args:
        labels: (N,) 0 or 1.
        logits: (N,) scores before the sigmoid.
        weights: (N,) non-negative sample weights, or None.

    Raises:
        DataError: See `auc`.
    """
    return _calibration(*_check(labels, logits, weights))


def auc_by_frequency_decile(
    labels: ArrayLike, scores: ArrayLike, frequency: ArrayLike
) -> list[tuple[int, int, float, float | None]]:
    """AUC within ten groups of rows, from those with the rarest values to those with the most frequent.

    The groups have equal sizes. Rows of one frequency may fall into two groups.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) logits or probabilities.
        frequency: (N,) occurrences of the row's rarest value, or of its value in one field, in the training rows.

    Returns:
        (decile 1..10, rows, mean frequency, AUC or None if the group has one class only) for each group. Empty groups
        are left out; there are some if there are fewer than ten rows.

    Raises:
        DataError: There are no rows, a number is NaN, or lengths differ.
    """
    labels_N, scores_N, _ = _check(labels, scores, None, both_classes=False)
    frequency_N = _numbers(frequency)
    if frequency_N.shape != labels_N.shape or np.isnan(frequency_N).any():
        raise DataError(
            f"metrics: frequencies must be {len(labels_N)} numbers, one per row; given shape {frequency_N.shape}"
            + (" with NaN" if np.isnan(frequency_N).any() else "")
        )
    # A stable sort keeps rows of one frequency in the order of the log, so that every call makes the same groups.
    groups = np.array_split(np.argsort(frequency_N, kind="stable"), NUM_DECILES)
    return [
        (decile, len(rows), float(frequency_N[rows].mean()), _auc_or_none(labels_N[rows], scores_N[rows]))
        for decile, rows in enumerate(groups, start=1)
        if len(rows)
    ]


def _check(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None, both_classes: bool = True
) -> tuple[Bools, Numbers, Numbers | None]:
    """Positive rows (bool), scores and weights of checked inputs; DataError if an input is wrong."""
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
    """The values as an array: real numbers without a copy, anything else in float64."""
    array = np.asarray(values)
    return array if array.dtype.kind in "biuf" else array.astype(np.float64)


def _auc(positive_N: Bools, scores_N: Numbers, weights_N: Numbers | None) -> float:
    if weights_N is not None:
        return _weighted_auc(positive_N, scores_N, weights_N)
    positives, negatives = scores_N[positive_N], scores_N[~positive_N]
    positives.sort()
    negatives.sort()
    # Twice the negatives below each positive: negatives below it plus negatives not above it. Integers do not round.
    beaten = 0
    for start in range(0, len(positives), CHUNK_ROWS):
        part = positives[start : start + CHUNK_ROWS]
        beaten += sum(int(np.searchsorted(negatives, part, side).sum()) for side in ("left", "right"))
    return beaten / (2 * len(positives) * len(negatives))


def _weighted_auc(positive_N: Bools, scores_N: Numbers, weights_N: Numbers) -> float:
    order = np.argsort(scores_N)
    sorted_N = scores_N[order]
    # Last row of each run of equal scores. Running sums are read there only: within a run the order means nothing.
    ends = np.append(np.flatnonzero(sorted_N[1:] != sorted_N[:-1]), len(sorted_N) - 1)
    positive_N, sorted_weights_N = positive_N[order], weights_N[order].astype(np.float64)
    positives = np.cumsum(positive_N * sorted_weights_N)[ends]
    negatives = np.cumsum(~positive_N * sorted_weights_N)[ends]
    # Trapezoids: the positives of a run beat all negatives before the run, and half of the negatives in it.
    gained = np.diff(positives, prepend=0.0)
    below = np.append(0.0, negatives[:-1]) + negatives
    return float(0.5 * (gained @ below) / (positives[-1] * negatives[-1]))


def _auc_or_none(positive_N: Bools, scores_N: Numbers) -> float | None:
    return _auc(positive_N, scores_N, None) if 0 < positive_N.sum() < len(positive_N) else None


def _logloss(positive_N: Bools, logits_N: Numbers, weights_N: Numbers | None) -> float:
    def losses(rows: slice) -> Floats:
        # log(1 + e^z) - y z is log(1 + e^s) with s = -z for positives and z for negatives, which holds for infinite z too.
        logits = logits_N[rows].astype(np.float64)
        return np.logaddexp(0.0, np.where(positive_N[rows], -logits, logits))

    return _average(losses, len(logits_N), weights_N)


def _calibration(positive_N: Bools, logits_N: Numbers, weights_N: Numbers | None) -> float:
    def probabilities(rows: slice) -> Floats:
        # sigmoid(z) = (1 + tanh(z / 2)) / 2 never overflows.
        return 0.5 * (1.0 + np.tanh(0.5 * logits_N[rows].astype(np.float64)))

    predicted = _average(probabilities, len(logits_N), weights_N)
    return predicted / _average(lambda rows: positive_N[rows].astype(np.float64), len(logits_N), weights_N)


def _average(values: Callable[[slice], Floats], num_rows: int, weights_N: Numbers | None) -> float:
    """Weighted mean over all rows; `values` computes the values of a slice of rows."""
    total, total_weight = 0.0, 0.0
    for start in range(0, num_rows, CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, num_rows))
        if weights_N is None:
            total, total_weight = total + float(values(rows).sum()), total_weight + rows.stop - rows.start
        else:
            weights = weights_N[rows].astype(np.float64)
            total, total_weight = total + float((values(rows) * weights).sum()), total_weight + float(weights.sum())
    return total / total_weight
