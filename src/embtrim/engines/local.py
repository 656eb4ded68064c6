"""Worker processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from embtrim.engines.engine import Run
from embtrim.errors import ConfigError, UnreachableError
from embtrim.system.machine import available_cores
from embtrim.system.processes import in_processes

# Deaths of workers, with no task finished in between, after which the work ends.
MAX_DEATHS = 3


@dataclass(frozen=True)
class Local:
    """Worker processes of this machine. A task whose worker is killed is done again by another one.

    Attributes:
        jobs: Number of worker processes; they share the cores. With one, this process does the work.

    Raises:
        ConfigError: `jobs` is not a positive number.
    """

    jobs: int

    def __post_init__(self) -> None:
        if not isinstance(self.jobs, int) or self.jobs < 1:
            raise ConfigError(f"Local: jobs, given {self.jobs!r}: it is the number of worker processes, 1 or more")

    @contextmanager
    def started(self) -> Iterator[Run]:
        """See `embtrim.engines.Engine`."""
        with ExitStack() as whole:
            pool = whole.enter_context(ExitStack())

            def start() -> Callable[[Sequence[Any]], Iterator[Any]]:
                return pool.enter_context(in_processes(self.jobs, _worker, available_cores() // self.jobs or 1))

            call_each = start()

            def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Generator[tuple[int, Any], None, None]:
                nonlocal call_each
                left, deaths = dict(enumerate(items)), 0
                while left:
                    try:
                        for index, result in call_each([(function, index, item) for index, item in left.items()]):
                            del left[index]
                            deaths = 0
                            yield index, result
                    except BrokenProcessPool:
                        deaths += 1
                        if deaths == MAX_DEATHS:
                            raise UnreachableError(
                                f"worker processes died {deaths} times in a row (killed, or out of memory); what was finished is on "
                                "disk: start again to go on, with fewer jobs (--jobs) if memory is short. In a script, call encode "
                                "under `if __name__ == '__main__':`"
                            ) from None
                        pool.close()
                        call_each = start()

            yield run


def _worker(threads: int) -> Callable[[tuple[Callable[[Any], Any], int, Any]], tuple[int, Any]]:
    """What a worker process does with a task; polars is not imported before the first one."""
    os.environ.setdefault("POLARS_MAX_THREADS", str(threads))
    return _call


def _call(task: tuple[Callable[[Any], Any], int, Any]) -> tuple[int, Any]:
    function, index, item = task
    return index, function(item)
