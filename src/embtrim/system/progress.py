"""Progress of work that can take more than two seconds, on stderr: stdout is for data.

A terminal and a notebook get bars. Without one, as under nohup, in CI and in containers, the same progress is written as
lines: one as each stage begins, one for each finished epoch, candidate or cell, and one every LINE_SECONDS within them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
)
from rich.text import Text

ItemT = TypeVar("ItemT")

# Seconds between two lines about one piece of work, where no bar can move.
LINE_SECONDS = 10.0

_stages: ContextVar[tuple[str, ...]] = ContextVar("stages", default=())


def shows_bars() -> bool:
    """Whether stderr can show bars that move: a terminal that is not dumb, or a notebook."""
    console = Console(stderr=True)
    return console.is_jupyter or (sys.stderr.isatty() and not console.is_dumb_terminal)


def say(text: str, show: bool = True) -> None:
    """Write a line about the present stage, where no bar can show it; nothing unless `show`."""
    if show and not shows_bars():
        print(_named(text), file=sys.stderr, flush=True)


@contextmanager
def stage(name: str, show: bool) -> Iterator[None]:
    """Name the work of a `with` block in its bars and lines; a line says that it begins, where no bar can."""
    token = _stages.set((*_stages.get(), name))
    try:
        say("begins", show)
        yield
    finally:
        _stages.reset(token)


def present_stage() -> str:
    """Names of the stages that the present work is in, the outermost first; empty outside of all."""
    return ", ".join(_stages.get())


def _named(text: str) -> str:
    names = present_stage()
    return f"{names}: {text}" if names else text


def seconds_left(elapsed: float, finished: float, remaining: float) -> float | None:
    """Seconds left for the remaining items at the rate so far; None until an item is finished.

    Example:
        >>> seconds_left(60.0, finished=3, remaining=10)
        200.0
    """
    return None if finished <= 0 else elapsed / finished * remaining


def time_left(elapsed: float, finished: float, remaining: float) -> str:
    """`seconds_left` in words, empty where it is not known."""
    left = seconds_left(elapsed, finished, remaining)
    return "" if left is None else f"{timedelta(seconds=round(left))} left"


class _RateColumn(ProgressColumn):
    """Column of a bar: rows per second."""

    def render(self, task: Task) -> Text:
        """The rate of one task, empty until it is known."""
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.0f} rows/s")


class _LeftColumn(ProgressColumn):
    """Column of a bar: time left. Items may take minutes each, and rich's own estimate forgets steps so long ago."""

    def render(self, task: Task) -> Text:
        """The estimate for one task, empty until an item is finished; its field `before` counts those done at the start."""
        finished = task.completed - task.fields["before"]
        return Text(time_left(task.elapsed or 0.0, finished, (task.total or 0.0) - task.completed))


class Counter:
    """How far a piece of work is: a bar that disappears at the end, or lines where no bar can move.

    Args:
        show: Whether to show anything.
        unit: What is counted: "rows", which have a rate; "" for a share of the whole, 0..1; or another word.
        each: Write a line for each finished item, not only every LINE_SECONDS.
        after: Seconds for which nothing is shown: quicker work needs no progress.
    """

    def __init__(self, show: bool, unit: str = "", *, each: bool = False, after: float = 0.0) -> None:
        self.show, self.unit, self.each, self.after = show, unit, each, after
        self.bars = show and shows_bars()
        self.made = time.monotonic()
        self.begin("", None)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, what: str, total: float | None, done: float = 0.0) -> None:
        """Count a new piece of work from `done` on.

        Args:
            what: Name of the work.
            total: Number of items; None where it is not known.
            done: Items that were finished before.
        """
        self.what, self.total, self.done, self.before = what, total, done, done
        self.started = self.spoken = time.monotonic()

    def advance(self, items: float = 1.0) -> None:
        """Count finished items."""
        self.update(self.done + items, self.total)

    def update(self, done: float, total: float | None) -> None:
        """Set the finished items and the number of all, as far as it is known."""
        self.done, self.total = done, total
        now = time.monotonic()
        if not self.show or now - self.made < self.after:
            return
        if self.bars:
            self._move_bar()
        elif self.each or now - self.spoken >= LINE_SECONDS:
            self.spoken = now
            say(self.line(now - self.started))

    def line(self, elapsed: float) -> str:
        """The progress in words.

        Args:
            elapsed: Seconds since `begin`.
        """
        if self.unit:
            words = [f"{self.done:,.0f}" + ("" if self.total is None else f" of {self.total:,.0f}") + f" {self.unit}"]
        else:
            words = [f"{self.done / (self.total or 1.0):.0%}"]
        if self.unit == "rows" and elapsed > 0:
            words.append(f"{(self.done - self.before) / elapsed:,.0f} rows/s")
        words += [f"{timedelta(seconds=round(elapsed))} gone"]
        if self.total is not None:
            words.append(time_left(elapsed, self.done - self.before, self.total - self.done))
        return f"{self.what}: {', '.join(filter(None, words))}"

    def reach(self, what: str, share: float) -> None:
        """Set how far a stage is, 0..1; where no bar can move, a line tells the first news of a stage."""
        if what != self.what:
            self.begin(what, 1.0)
            self.spoken -= LINE_SECONDS
        self.update(share, 1.0)

    def _move_bar(self) -> None:
        if self._progress is None:
            counts = {"": [], "rows": [_RateColumn()]}.get(self.unit, [MofNCompleteColumn()])
            columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn(), _LeftColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("", total=self.total, before=self.before)
            self._progress.start()
        shown = {"description": _named(self.what), "total": self.total, "completed": self.done, "before": self.before}
        if self._progress.tasks[0].completed > self.done:
            self._progress.reset(self._task, **shown)
        self._progress.update(self._task, **shown)


def tracked(
    items: Iterable[ItemT], what: str, total: int | None, show: bool, unit: str = "", *, each: bool = False
) -> Iterator[ItemT]:
    """The items, with their progress.

    Args:
        items: What is iterated.
        what: Name of the work.
        total: Number of items; None where it is not known.
        show: Whether to show anything.
        unit: Name of the items, in the plural.
        each: Write a line for each item, where no bar can move.
    """
    with Counter(show, unit or "steps", each=each) as counter:
        counter.begin(what, total)
        for item in items:
            yield item
            counter.advance()
