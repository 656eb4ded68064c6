"""Metrics against scikit-learn, against counting by hand, and at the edges."""

from __future__ import annotations

import json
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from embtrim.errors import DataError
from embtrim.training.metrics import (
    Metrics,
    auc,
    auc_by_frequency_decile,
    auc_error,
    calibration,
    compute_metrics,
    logloss,
)


def random_rows(num_rows: int, num_scores: int, seed: int = 0):
    """Labels, scores with many ties, weights."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(num_rows) < 0.3).astype(np.float32)
    scores = (rng.integers(0, num_scores, num_rows) / num_scores + 0.3 * labels).astype(np.float32)
    return labels, scores, rng.random(num_rows).astype(np.float32)


@pytest.mark.parametrize("num_scores", [1, 2, 7, 10**6])
@pytest.mark.parametrize("weighted", [False, True])
def test_auc_equals_scikit_learn(num_scores, weighted):
    labels, scores, weights = random_rows(5000, num_scores)
    weights = weights if weighted else None
    expected = sklearn.metrics.roc_auc_score(labels, scores, sample_weight=weights)
    assert auc(labels, scores, weights) == pytest.approx(expected, abs=1e-12)


def test_auc_by_hand():
    # Positives score 3, 1; negatives 2, 1, 0. Pairs won: 3 beats three, 1 beats one and ties one.
    labels, scores = [1, 0, 1, 0, 0], [3.0, 2.0, 1.0, 1.0, 0.0]
    assert auc(labels, scores) == float(Fraction(3 + 1, 6) + Fraction(1, 12))
    # The tied negative counts twice: pairs weigh 4 a positive, 3 wins all 4, 1 wins 1 and ties 2.
    assert auc(labels, scores, [1, 1, 1, 2, 1]) == (4 + 1 + 1) / 8
    # Constant and reversed scores, infinities.
    assert auc(labels, np.zeros(5)) == 0.5
    assert auc([0, 1, 1], [2.0, 1.0, -5.0]) == 0.0
    assert auc([0, 1, 0], [-np.inf, np.inf, 0.0]) == 1.0


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3), st.integers(0, 3)), min_size=2, max_size=30).filter(
        lambda rows: len({y for y, _, w in rows if w}) == 2
    )
)
def test_auc_equals_counting_pairs(rows):
    won = sum(
        Fraction(wp * wn * (2 * (sp > sn) + (sp == sn)), 2) for p, sp, wp in rows if p for n, sn, wn in rows if not n
    )
    total = sum(w for p, _, w in rows if p) * sum(w for p, _, w in rows if not p)
    labels, scores, weights = zip(*rows, strict=True)
    assert auc(labels, scores, weights) == pytest.approx(float(won / total), abs=1e-12)


def test_weights_are_repetitions():
    labels, logits, _ = random_rows(300, 5)
    times = np.random.default_rng(1).integers(0, 4, 300)
    once = compute_metrics(labels, logits, times)
    repeated = compute_metrics(np.repeat(labels, times), np.repeat(logits, times))
    assert [once.auc, once.logloss, once.calibration] == pytest.approx(
        [repeated.auc, repeated.logloss, repeated.calibration], rel=1e-12
    )
    assert once.num_rows == 300


def test_logloss_equals_scikit_learn_and_is_stable():
    labels, logits, weights = random_rows(1000, 10**6)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for w in (None, weights):
        expected = sklearn.metrics.log_loss(labels, probabilities, sample_weight=w)
        assert logloss(labels, logits, w) == pytest.approx(expected, rel=1e-12)
    assert logloss([1, 0], [-1e4, 1e4]) == 1e4
    assert logloss([1, 0], [1e4, -1e4]) == 0.0
    assert logloss([1, 0], [np.inf, -np.inf]) == 0.0
    assert logloss([1], [40.0]) == pytest.approx(np.exp(-40.0), rel=1e-9)  # lost if it went through the sigmoid
    assert logloss([1, 1], [0.0, 0.0]) == pytest.approx(np.log(2))


def test_calibration():
    assert calibration([0, 1, 0, 1], np.zeros(4)) == 1.0
    # Predictions 1/2 and 3/4 against one positive in two.
    assert calibration([0, 1], [0.0, np.log(3)]) == pytest.approx((1 / 2 + 3 / 4) / 1)
    assert calibration([0, 1], [0.0, np.log(3)], [1, 3]) == pytest.approx((1 / 2 + 3 * 3 / 4) / 3)
    assert calibration([0, 1], [-1e4, 1e4]) == 1.0


def test_metrics_of_a_split():
    labels, logits, weights = random_rows(500, 50)
    metrics = compute_metrics(labels, logits, weights)
    parts = (auc(labels, logits, weights), logloss(labels, logits, weights), calibration(labels, logits, weights), 500)
    assert metrics == Metrics(*parts)
    assert metrics.to_dict()["auc_by_decile"] is None
    with_deciles = metrics.with_deciles(auc_by_frequency_decile(labels, logits, np.arange(500)))
    assert metrics.auc_by_decile is None
    as_dict = with_deciles.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert len(as_dict["auc_by_decile"]) == 10


def test_deciles_are_equal_masses_from_rare_to_frequent():
    """Scores of the rarest tenth are reversed, all rows of the next tenth are positive, and all other scores are perfect."""
    frequency = np.repeat([5, 7, 100, 1000], [10, 10, 40, 40])
    labels = np.tile([0, 1], 50)
    labels[10:20] = 1
    scores = labels.astype(float)
    scores[:10] = 1 - scores[:10]
    order = np.random.default_rng(0).permutation(100)
    deciles = auc_by_frequency_decile(labels[order], scores[order], frequency[order])
    assert [(d, n, f) for d, n, f, _ in deciles] == [
        (1, 10, 5.0), (2, 10, 7.0), *((d, 10, 100.0) for d in range(3, 7)), *((d, 10, 1000.0) for d in range(7, 11))
    ]  # fmt: skip
    assert [a for *_, a in deciles] == [0.0, None] + [1.0] * 8


def test_deciles_of_few_rows():
    deciles = auc_by_frequency_decile([0, 1, 1], [0.1, 0.2, 0.3], [3, 1, 2])
    assert deciles == [(1, 1, 1.0, None), (2, 1, 2.0, None), (3, 1, 3.0, None)]
    assert sum(n for _, n, *_ in auc_by_frequency_decile(*random_rows(1003, 10)[:2], np.arange(1003))) == 1003


@pytest.mark.parametrize(
    "labels, scores, weights, message",
    [
        ([1, 1, 1], [0.1, 0.2, 0.3], None, "all 3 rows are positive; AUC needs both classes"),
        ([0, 0], [0.1, 0.2], None, "all 2 rows are negative"),
        ([0, 1, 1], [0.1, 0.2, 0.3], [0, 1, 0.1], "all 2 rows are positive"),
        ([0, 1, 1], [0.1, np.nan, np.nan], None, "2 of 3 scores are NaN"),
        ([], [], None, "no rows"),
        ([0, 1], [0.1], None, r"labels \(2,\) and scores \(1,\)"),
        ([[0, 1]], [[0.1, 0.2]], None, "two equal columns"),
        ([0, 2], [0.1, 0.2], None, "labels must be 0 or 1, found 2"),
        ([0, np.nan], [0.1, 0.2], None, "labels must be 0 or 1, found nan"),
        ([0, 1], [0.1, 0.2], [1.0], r"2 labels, but weights of shape \(1,\)"),
        ([0, 1], [0.1, 0.2], [1.0, -1.0], "none negative"),
        ([0, 1], [0.1, 0.2], [0.0, 0.0], "not all zero"),
        ([0, 1], [0.1, 0.2], [1.0, np.nan], "finite"),
    ],
)
def test_bad_input_is_named(labels, scores, weights, message):
    for metric in (auc, compute_metrics, calibration):
        with pytest.raises(DataError, match=message):
            metric(labels, scores, weights)


def test_bad_frequencies_are_named():
    with pytest.raises(DataError, match=r"must be 2 numbers, one per row; given shape \(3,\)"):
        auc_by_frequency_decile([0, 1], [0.1, 0.2], [1, 2, 3])
    with pytest.raises(DataError, match="with NaN"):
        auc_by_frequency_decile([0, 1], [0.1, 0.2], [1, np.nan])
    with pytest.raises(DataError, match="1 of 2 scores are NaN"):
        auc_by_frequency_decile([0, 1], [0.1, np.nan], [1, 2])


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_go_by_chunks(weighted, monkeypatch):
    labels, scores, weights = random_rows(5000, 300)
    weights = weights if weighted else None
    at_once = compute_metrics(labels, scores, weights)
    monkeypatch.setattr("embtrim.training.metrics.CHUNK_ROWS", 999)
    by_chunks = compute_metrics(labels, scores, weights)
    assert (by_chunks.auc, by_chunks.num_rows) == (at_once.auc, at_once.num_rows)
    assert by_chunks.logloss == pytest.approx(at_once.logloss, rel=1e-14)
    assert by_chunks.calibration == pytest.approx(at_once.calibration, rel=1e-14)


def test_float32_scores_take_a_few_bytes_a_row(monkeypatch):
    monkeypatch.setattr("embtrim.training.metrics.CHUNK_ROWS", 1000)
    labels, scores, _ = random_rows(100_000, 10**6)
    tracemalloc.start()
    try:
        compute_metrics(labels, scores)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 100_000  # a byte for the label, four for the sorted score, one in passing


def test_other_numbers_than_float32_are_taken():
    labels, scores = [0, 1, 1, 0], [1, 3, 2, 2]
    expected = compute_metrics(np.array(labels, np.float32), np.array(scores, np.float64))
    assert compute_metrics(np.array(labels, bool), np.array(scores, np.uint8)) == expected
    assert compute_metrics(np.array(labels, object), np.array(scores, object)) == expected
    assert compute_metrics(labels, np.array(scores, np.float16)) == expected


def test_a_million_rows():
    labels, scores, _ = random_rows(1_000_000, 10**6)
    places = rankdata(scores)[labels == 1]  # Mann and Whitney's form of the AUC
    num_ones = len(places)
    expected = (places.sum() - num_ones * (num_ones + 1) / 2) / (num_ones * (len(labels) - num_ones))
    assert compute_metrics(labels, scores).auc == pytest.approx(expected, abs=1e-12)


def placements_by_pairs(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V10 and V01 of DeLong et al., pair by pair."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    wins = np.array([[1.0 if p > n else 0.5 if p == n else 0.0 for n in negatives] for p in positives])
    return wins.mean(1), wins.mean(0)


class TestAucError:
    """The standard error of an AUC."""

    @staticmethod
    def rows_of_a_model(num_rows: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        labels = (rng.random(num_rows) < 0.3).astype(np.float32)
        return labels, np.round(labels + rng.normal(size=num_rows), 1)  # with ties

    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_that_of_all_pairs(self, seed: int):
        labels, scores = self.rows_of_a_model(seed=seed)
        by_positive, by_negative = placements_by_pairs(labels, scores)
        assert by_positive.mean() == pytest.approx(auc(labels, scores))
        variance = by_positive.var(ddof=1) / len(by_positive) + by_negative.var(ddof=1) / len(by_negative)
        assert auc_error(labels, scores) == pytest.approx(variance**0.5)

    def test_it_is_what_samples_drawn_again_spread(self):
        labels, scores = self.rows_of_a_model(num_rows=1500)
        rng = np.random.default_rng(1)
        found = []
        for _ in range(300):
            rows = rng.integers(0, len(labels), len(labels))
            found.append(auc(labels[rows], scores[rows]))
        assert auc_error(labels, scores) == pytest.approx(np.std(found), rel=0.15)

    def test_a_single_row_of_a_class_adds_nothing(self):
        assert auc_error([0, 0, 1], [0.1, 0.4, 0.35]) == pytest.approx((0.5 / 2) ** 0.5)
        assert auc_error([0, 1], [0.1, 0.4]) == 0.0

    def test_it_checks_its_inputs(self):
        with pytest.raises(DataError, match="AUC needs both classes"):
            auc_error([1, 1], [0.1, 0.2])
        with pytest.raises(DataError, match="must be two equal columns"):
            auc_error([0, 1], [0.1])
