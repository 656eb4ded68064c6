"""What an engine is: it brings functions to items, on workers, and returns the results."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol, TypeAlias, runtime_checkable

from embtrim.errors import EmbtrimError

# Calls a function with each item, on workers and in any order. Yields the index and the result of each item once, as they
# are made. A call whose worker died is made again. An error of a function is raised.
Run: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Generator[tuple[int, Any], None, None]]


@runtime_checkable
class Engine(Protocol):
    """Workers on which `embtrim.encode` reads the files of a log. An engine of your own needs this one method."""

    def started(self) -> AbstractContextManager[Run]:
        """What runs functions on workers, inside a `with` block; functions, items and results can be pickled."""
        ...


def package(name: str, extra: str) -> Any:
    """A module of an optional package; EmbtrimError names the extra of embtrim that brings it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise EmbtrimError(f"this engine needs {name} ({error}): pip install 'embtrim[{extra}]'") from None
