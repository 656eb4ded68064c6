"""The progress bar of everything that can take more than two seconds; on stderr, so that stdout stays data."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Rows a second."""

    def render(self, task: Task) -> Text:
        """The rate of one task, empty until it is known."""
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.0f} rows/s")


def progress_bar(show: bool) -> Progress:
    """A bar with rate, elapsed time and ETA that disappears when done; a hidden one if not `show`."""
    columns = (TextColumn("{task.description}"), BarColumn(), RateColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)
