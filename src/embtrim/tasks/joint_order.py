"""Items of several processes in one order, of which each process has some: counted without gathering them.

Items stand in order of a number, the lowest first; of equal numbers, the one with the lowest place comes first. Each process
counts how many of its own items are among the first ones of all, and the counts are summed: a search by parts finds the
border in some twenty exchanges of a few numbers.

Axes: N items of this process.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from embtrim.tasks.sharing import OneProcess

# Parts into which a search cuts what is left at each exchange.
WAYS = 16
_MASK = 0x7FFFFFFF


class OwnOrder:
    """The order of a process that has all items.

    Args:
        total: Number of items of all processes.
    """

    def __init__(self, total: int) -> None:
        self.total = total

    def own(self, number: int) -> int:
        """How many items of this process are among the first `number` of all."""
        return number

    def part(self, chosen_N: np.ndarray) -> OwnOrder:
        """The order of some of the items, bool (N,)."""
        return OwnOrder(int(chosen_N.sum()))


class JointOrder(OwnOrder):
    """The order of items that processes share.

    Args:
        values_N: Numbers that items stand in order of, ascending, float32.
        places_N: Places among all items, int64, ascending where numbers are equal; no two are the same.
        group: The processes.
    """

    def __init__(self, values_N: np.ndarray, places_N: np.ndarray, group: OneProcess) -> None:
        assert values_N.dtype == np.float32, "numbers are told apart by their 32 bits"
        self.values_N, self.places_N, self.group = values_N, places_N, group
        super().__init__(int(self._summed(np.array([len(values_N)]))[0]))
        ends = [-_key_of(values_N[0]), _key_of(values_N[-1])] if len(values_N) else [-_MASK, -_MASK]
        ends.append(int(places_N.max(initial=0)))
        lowest, self.highest, self.last = group.largest(torch.tensor(ends, dtype=torch.int64)).tolist()
        self.lowest = -lowest

    def own(self, number: int) -> int:
        """See OwnOrder; all processes call it."""
        if number in (0, self.total):
            return len(self.values_N) if number else 0
        values_N, places_N = self.values_N, self.places_N
        key = self._reaching(number, self.lowest, self.highest, lambda keys: _places(values_N, _values_of(keys)))
        start, stop = (
            int(np.searchsorted(values_N, _values_of(np.array([key])), side)[0]) for side in ("left", "right")
        )
        before, ties = (int(count) for count in self._summed(np.array([start, stop - start])))
        if before + ties == number:
            return stop
        equal = places_N[start:stop]
        last = self._reaching(number - before, 0, self.last, lambda places: _places(equal, places))
        return start + int(np.searchsorted(equal, last, "right"))

    def part(self, chosen_N: np.ndarray) -> JointOrder:
        """See OwnOrder; all processes call it."""
        return JointOrder(self.values_N[chosen_N], self.places_N[chosen_N], self.group)

    def _reaching(self, number: int, low: int, high: int, own: Callable[[np.ndarray], np.ndarray]) -> int:
        """The lowest of low..high up to which there are that many items of all processes."""
        while low < high:
            tried = low + (high - low) * np.arange(1, WAYS) // WAYS
            reached = self._summed(own(tried)) >= number
            first = int(np.argmax(reached)) if reached.any() else len(tried)
            low, high = (
                int(tried[first - 1]) + 1 if first else low,
                int(tried[first]) if first < len(tried) else high,
            )
        return low

    def _summed(self, counts: np.ndarray) -> np.ndarray:
        return self.group.summed(torch.from_numpy(counts.astype(np.int64))).numpy()


def _places(sorted_N: np.ndarray, limits: np.ndarray) -> np.ndarray:
    return np.searchsorted(sorted_N, limits, "right")


def _key_of(value: np.float32) -> int:
    """An integer in the order of the numbers; zeros of both signs are 0."""
    bits = int((value + np.float32(0.0)).view(np.int32))
    return bits if bits >= 0 else bits ^ _MASK


def _values_of(keys: np.ndarray) -> np.ndarray:
    return np.where(keys >= 0, keys, keys ^ _MASK).astype(np.int32).view(np.float32)
