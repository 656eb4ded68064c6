"""Processes that are killed, without a process: after a chosen change of names on disk nothing is changed any more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from embtrim.system import holding

CHANGES = ("replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir")


class Killed(BaseException):
    """What a dead process does from the moment of its death: nothing."""


@contextmanager
def killed(number: int, call: str = "replace", to: str = "") -> Iterator[None]:
    """Kill what runs inside a `with` block before a call of a function of `os`.

    Args:
        number: Which of the calls, from 1.
        call: The function.
        to: Only calls whose last path ends in this text are counted.
    """
    count = 0

    def at(name: str, function: Any) -> Any:
        def watched(*given: Any, **named: Any) -> Any:
            nonlocal count
            if name == call and count < number and str(given[-1]).endswith(to):
                count += 1
            if count == number:
                raise Killed
            return function(*given, **named)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, at(name, getattr(os, name)))
        patch.setattr(shutil, "rmtree", at("rmtree", shutil.rmtree))
        with pytest.raises(Killed):
            yield
    die()


def die() -> None:
    """Give back what the system takes from a dead process: its locks."""
    for file, *_ in holding._held.values():
        file.close()
    for descriptor in holding._watched.values():
        os.close(descriptor)
    holding._held.clear()
    holding._watched.clear()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
