"""Scores of the rows of a table, of which each process may hold some: the best rows, found without gathering scores.

The rows of a table are in order of their scores, the highest first; of equal scores, the lowest row comes first. A *cut* is
a place in this order. Each process counts its own rows before a cut, and the counts are summed: bisection finds a cut in
less than a hundred sums of a few numbers.

Axes: V rows of a table, N rows of it that this process holds, K numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from embtrim.tasks.sharing import ALONE, OneProcess


class Cut(NamedTuple):
    """Rows of a table before a place in the order of scores: those above a key, and of this key those up to a row."""

    key: int
    row: int = -1


_MASK = np.iinfo(np.int64).max
_LEAST = np.iinfo(np.int64).min
# Parts into which a search cuts what is left at each exchange.
WAYS = 16
# The cut before the first row.
NOTHING = Cut(_MASK)


class RowScores:
    """A score for each row of a table; see the module docstring.

    Args:
        scores: Scores (N,) of the rows that this process holds, which follow each other. Integers, or float64.
        first: First row that this process holds.
        num_rows: Rows of the table, V; None for N.
        group: The processes that share the table.
    """

    def __init__(
        self, scores: np.ndarray, first: int = 0, num_rows: int | None = None, group: OneProcess = ALONE
    ) -> None:
        self.scores, self.first, self.group = scores, first, group
        self.num_rows = len(scores) if num_rows is None else num_rows
        keys = _keys_of(scores)
        order = np.argsort(~keys, kind="stable")  # ~ reverses the order of all integers
        self._falling, self._rows = ~keys[order], order + first
        self._is_float = scores.dtype.kind == "f"
        self._known_sums: dict[tuple[int, ...], np.ndarray] = {}

    @cached_property
    def _last(self) -> np.ndarray:
        return np.maximum.accumulate(self._rows)

    @cached_property
    def _sums(self) -> np.ndarray:
        ordered = self.scores[self._rows - self.first]
        return np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])

    @property
    def sum(self) -> float:
        """Sum of the scores of all rows of the table."""
        return float(self.group.summed(torch.tensor(float(self.scores.sum()), dtype=torch.float64)))

    def times(self, factor: float) -> RowScores:
        """The scores times a number."""
        return RowScores(self.scores * factor, self.first, self.num_rows, self.group)

    def value_of(self, key: int) -> float:
        """The score that has a key."""
        if not self._is_float:
            return float(key)
        return float(np.array([key if key >= 0 else key ^ _MASK], np.int64).view(np.float64)[0])

    def before(self, cut: Cut) -> tuple[int, int]:
        """How many of this process's rows lie before a cut, and the last one of them; -1 without one."""
        start, stop = (int(np.searchsorted(self._falling, ~cut.key, side)) for side in ("left", "right"))
        number = start + int(np.searchsorted(self._rows[start:stop], cut.row, "right"))
        return number, int(self._last[number - 1]) if number else -1

    def cuts(self, numbers: np.ndarray) -> list[Cut]:
        """The cuts behind so many rows (K,), from 0 to V."""
        return [self._cut(key, number) for key, number in zip(nth_keys([self], numbers - 1), numbers, strict=True)]

    def _cut(self, key: int, number: int) -> Cut:
        if not number:
            return Cut(key)
        if self.total([Cut(key, self.num_rows)])[0] == number:
            return Cut(key, self.num_rows)
        has_all = lambda row: self.total([Cut(key, row)])[0] >= number  # noqa: E731
        return Cut(key, lowest(0, self.num_rows - 1, has_all))

    def cut_at(self, value: float) -> Cut:
        """The cut behind all rows whose score is above a value."""
        return Cut(int(_keys_of(np.array([value]))[0]) if value > -np.inf else _LEAST)

    def own_rows(self, after: Cut, cut: Cut) -> np.ndarray:
        """Places, among the rows that this process holds, of those before a cut and not before another; best first."""
        return self._rows[self.before(after)[0] : self.before(cut)[0]] - self.first

    def total(self, cuts: Sequence[Cut]) -> np.ndarray:
        """Number of rows of the table before each of some cuts, int64 (K,)."""
        own = torch.tensor([self.before(cut)[0] for cut in cuts], dtype=torch.int64)
        return self.group.summed(own).numpy()

    def sums(self, numbers: np.ndarray) -> np.ndarray:
        """Sum of the so many highest scores (K,), float64; kept for the next time."""
        known = tuple(numbers.tolist())
        if known not in self._known_sums:
            self._known_sums[known] = self._sums_of(numbers)
        return self._known_sums[known]

    def _sums_of(self, numbers: np.ndarray) -> np.ndarray:
        keys = nth_keys([self], numbers - 1)
        above = np.array([self.before(Cut(key))[0] for key in keys])
        both = torch.tensor(np.stack([self._sums[above], above.astype(np.float64)]))
        sums, counts = self.group.summed(both).numpy()
        values = np.array([self.value_of(key) if number else 0.0 for key, number in zip(keys, numbers, strict=True)])
        return sums + np.maximum(numbers - counts, 0.0) * values

    def rows_between(self, after: Cut, cut: Cut) -> np.ndarray:
        """Rows of the whole table before a cut and not before another, ascending, int64."""
        own = torch.from_numpy(self.own_rows(after, cut) + self.first)
        return np.sort(self.group.gathered(own).numpy())

    def best(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """The best rows, as many as each size in turn; each part ascending, int64."""
        found, after = [], NOTHING
        for cut in self.cuts(np.cumsum(sizes)):
            found.append(self.rows_between(after, cut))
            after = cut
        return found


def _keys_of(scores: np.ndarray) -> np.ndarray:
    """int64 numbers in the order of the scores."""
    if scores.dtype.kind != "f":
        return scores.astype(np.int64)
    bits = (scores.astype(np.float64) + 0.0).view(np.int64)  # -0.0 becomes 0.0
    return np.where(bits >= 0, bits, bits ^ _MASK)


def key_bounds(tables: Sequence[RowScores]) -> tuple[int, int]:
    """The lowest and the highest key of all rows of some tables."""
    own = [_LEAST, _LEAST]
    for table in tables:
        if len(table._falling):
            own = [max(own[0], int(table._falling[-1])), max(own[1], ~int(table._falling[0]))]
    low, high = tables[0].group.largest(torch.tensor(own, dtype=torch.int64)).tolist()
    return ~low, high


def before(tables: Sequence[RowScores], cuts: Sequence[Cut]) -> tuple[list[int], list[int]]:
    """How many rows of each table lie before its cut, and the last one of them; -1 without one."""
    own = torch.tensor([table.before(cut) for table, cut in zip(tables, cuts, strict=True)], dtype=torch.int64)
    group = tables[0].group
    return group.summed(own[:, 0].contiguous()).tolist(), group.largest(own[:, 1].contiguous()).tolist()


def lowest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The lowest number in low..high that fits; `high` is assumed to fit, and so is every number above one that fits."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def nth_keys(tables: Sequence[RowScores], numbers: np.ndarray) -> list[int]:
    """The n-th highest key over all rows of some tables, for each number n (K,) from 0; -1 gives the highest too."""
    group, numbers = tables[0].group, np.maximum(numbers, 0)
    low, high = ([bound] * len(numbers) for bound in key_bounds(tables))
    while any(a < b for a, b in zip(low, high, strict=True)):
        # WAYS - 1 keys between low and high for each number: fewer exchanges than by halves.
        tried = [[a + (b - a) * way // WAYS + 1 for way in range(WAYS - 1)] for a, b in zip(low, high, strict=True)]
        own = sum(np.searchsorted(table._falling, ~np.array(tried, np.int64), "right") for table in tables)
        counts = group.summed(torch.from_numpy(np.asarray(own, np.int64))).numpy()
        for k, number in enumerate(numbers.tolist()):
            reached = int((counts[k] > number).sum())  # counts fall as keys rise
            low[k], high[k] = (
                tried[k][reached - 1] if reached else low[k],
                min(high[k], tried[k][reached] - 1) if reached < WAYS - 1 else high[k],
            )
    return low
