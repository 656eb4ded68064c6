"""Processes that share a search, as threads of this one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from embtrim.tasks.sharing import OneProcess


class Threads(OneProcess):
    """The exchange of one of several threads; all of them call the same methods in the same order."""

    def __init__(self, number: int, given: list[Any], barrier: threading.Barrier) -> None:
        self.number, self.given, self.barrier = number, given, barrier

    @staticmethod
    def run(number: int, work: Callable[[int, Threads], Any]) -> list[Any]:
        """What each thread returns."""
        given, barrier = [None] * number, threading.Barrier(number, timeout=30)

        def one(place: int) -> Any:
            try:
                return work(place, Threads(place, given, barrier))
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(number) as pool:
            return list(pool.map(one, range(number)))

    def _all(self, value: Tensor) -> list[Tensor]:
        self.given[self.number] = value
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def summed(self, values: Tensor) -> Tensor:
        """See OneProcess."""
        return torch.stack(self._all(values)).sum(0)

    def largest(self, values: Tensor) -> Tensor:
        """See OneProcess."""
        return torch.stack(self._all(values)).amax(0)

    def gathered(self, values_N: Tensor) -> Tensor:
        """See OneProcess."""
        return torch.cat(self._all(values_N))
