"""A callback that records what it is told, for tests."""

from __future__ import annotations

import os

from embtrim.experiments.records import RunRecord
from embtrim.training.callbacks import Epoch


class Recorder:
    """Keeps epochs and records; raises an error at the calls of the given numbers, counted from 1."""

    def __init__(self, raises: BaseException | None = None, at: int = 0) -> None:
        self.epochs: list[Epoch] = []
        self.records: list[tuple[RunRecord, int, int]] = []
        self.pids: set[int] = set()
        self.raises, self.at = raises, at

    def on_epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        self.pids.add(os.getpid())
        if self.raises is not None and len(self.epochs) == self.at:
            raise self.raises

    def on_record(self, record: RunRecord, done: int, total: int) -> None:
        self.records.append((record, done, total))
        self.pids.add(os.getpid())
