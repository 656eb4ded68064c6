"""Progress bars for work that can take more than two seconds, on stderr: stdout is for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

ItemT = TypeVar("ItemT")


class RateColumn(ProgressColumn):
    """Column of a bar: rows per second."""

    def render(self, task: Task) -> Text:
        """The rate of one task, empty until it is known."""
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.0f} rows/s")


def progress_bar(show: bool) -> Progress:
    """A bar with rate, elapsed time and time left, which disappears at the end; hidden unless `show`."""
    columns = (TextColumn("{task.description}"), BarColumn(), RateColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)


def tracked(items: Iterable[ItemT], what: str, total: int | None, show: bool) -> Iterator[ItemT]:
    """The items, with a bar that counts the finished ones; hidden unless `show`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)


class GridTimeColumn(ProgressColumn):
    """Column of a bar: time left for a grid. Cells take minutes each, and rich's own estimate forgets steps so long ago."""

    def render(self, task: Task) -> Text:
        """The estimate for one task, empty until a cell is finished; its field `before` counts cells done at the start."""
        finished = task.completed - task.fields["before"]
        left = seconds_left(task.elapsed or 0.0, finished, (task.total or 0.0) - task.completed)
        return Text("" if left is None else f"{timedelta(seconds=round(left))} left")


def grid_bar(show: bool) -> Progress:
    """A bar over a grid with finished cells, elapsed time and time left; its tasks need a field `before`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        GridTimeColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)


def seconds_left(elapsed: float, finished: float, remaining: float) -> float | None:
    """Seconds left for the remaining items at the rate so far; None until an item is finished.

    Example:
        >>> seconds_left(60.0, finished=3, remaining=10)
        200.0
    """
    return None if finished <= 0 else elapsed / finished * remaining


class StageBar:
    """A bar over work in several stages, on stderr; it appears only once the work has taken two seconds."""

    def __init__(self, show: bool) -> None:
        self.show = show
        self.started = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> StageBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, stage: str, done: float) -> None:
        """Show how far a stage is, 0..1."""
        if not self.show or time.monotonic() - self.started < 2:
            return
        if self._progress is None:
            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(stage, total=1.0)
            self._progress.start()
        self._progress.update(self._task, description=stage, completed=done)
