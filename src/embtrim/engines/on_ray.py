"""Tasks of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from embtrim.engines.engine import Run, package
from embtrim.errors import UnreachableError, first_line_of

# Tasks that are handed to Ray at a time.
IN_FLIGHT = 1000


@dataclass(frozen=True)
class Ray:
    """Tasks of the Ray cluster that this process is connected to; without one, Ray is started on this machine.

    Ray does a task again whose worker or machine died. Needs ray: pip install 'embtrim[ray]'.

    Attributes:
        options: Options of each task, such as {"num_cpus": 2, "memory": 4e9, "max_retries": 5}; see `ray.remote`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def started(self) -> Iterator[Run]:
        """See `embtrim.engines.Engine`."""
        ray = package("ray", "ray")
        starts = not ray.is_initialized()
        if starts:
            ray.init()
        remote = ray.remote(_call).options(**self.options)

        def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Generator[tuple[int, Any], None, None]:
            shared, coming = ray.put(function), iter(enumerate(items))
            waiting: list[Any] = []
            try:
                while True:
                    for (index, item), _ in zip(coming, range(IN_FLIGHT - len(waiting)), strict=False):
                        waiting.append(remote.remote(shared, index, item))
                    if not waiting:
                        return
                    done, waiting = ray.wait(waiting)
                    yield from ray.get(done)
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                raise UnreachableError(
                    f"Ray gave a task up ({type(error).__name__}: {first_line_of(error)}); what was finished is on disk: start again "
                    "to go on"
                ) from error
            finally:
                for task in waiting:
                    ray.cancel(task)

        try:
            yield run
        finally:
            if starts:
                ray.shutdown()


def _call(function: Callable[[Any], Any], index: int, item: Any) -> tuple[int, Any]:
    return index, function(item)
