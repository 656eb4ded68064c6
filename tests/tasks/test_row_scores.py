"""The best rows of tables whose scores several processes share are those of a stable sort of all scores."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from embtrim.tasks.row_scores import RowScores, nth_keys
from embtrim.tasks.sharing import OneProcess

SCORES = {
    "floats": np.random.default_rng(0).normal(0, 1, 90),
    "ties": np.random.default_rng(1).integers(-2, 3, 90).astype(np.float64),
    "counts": np.random.default_rng(2).geometric(0.3, 90) - 1,
    "zeros": np.zeros(90),
    "minus zero": np.where(np.arange(90) % 2, -0.0, 0.0),
    "wide": np.array([0.0, 1e-300, 1e300, -2.0, 5e-324, 1.0] * 15),
}


class Threads(OneProcess):
    """Threads that exchange what processes would."""

    def __init__(self, number: int) -> None:
        self.barrier, self.given, self.own = threading.Barrier(number), [None] * number, threading.local()

    def _all(self, values: torch.Tensor) -> list[Any]:
        self.given[self.own.rank] = values
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(values)).sum(0)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(values)).amax(0)

    def gathered(self, values_N: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(values_N))


def on_threads(ends: list[int], work: Callable[[OneProcess, slice], Any]) -> Any:
    """What the work gives for parts of rows on as many threads, the same on all."""
    group = Threads(len(ends) - 1)

    def run(rank: int) -> Any:
        group.own.rank = rank
        return work(group, slice(ends[rank], ends[rank + 1]))

    with ThreadPoolExecutor(len(ends) - 1) as pool:
        first, *others = pool.map(run, range(len(ends) - 1))
    assert all(repr(other) == repr(first) for other in others)
    return first


@pytest.mark.parametrize("ends", [[0, 90], [0, 40, 40, 90]], ids=["one", "three, one of them without rows"])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_the_best_rows_are_those_of_a_stable_sort(scores: np.ndarray, ends: list[int]):
    order = np.argsort(-scores, kind="stable")
    numbers = np.array([0, 1, 7, 44, 90])

    def work(group: OneProcess, rows: slice) -> Any:
        found = RowScores(scores[rows], rows.start, 90, group)
        return [best.tolist() for best in found.best([7, 0, 30, 53])], found.sums(numbers).tolist()

    best, sums = on_threads(ends, work)
    assert best == [sorted(order[a:b].tolist()) for a, b in ((0, 7), (7, 7), (7, 37), (37, 90))]
    expected = [float(np.sort(scores.astype(float))[::-1][:number].sum()) for number in numbers]
    assert sums == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_the_highest_values_of_two_tables_together():
    tables = [SCORES["floats"], SCORES["ties"]]
    ranked = np.sort(np.concatenate(tables))[::-1]

    def work(group: OneProcess, rows: slice) -> list[float]:
        both = [RowScores(scores[rows], rows.start, 90, group) for scores in tables]
        return [both[0].value_of(key) for key in nth_keys(both, np.array([0, 3, 90, 179]))]

    assert on_threads([0, 30, 90], work) == ranked[[0, 3, 90, 179]].tolist()
