"""Progress bars for work that can take more than two seconds, on stderr: stdout is for data."""

from __future__ import annotations

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
