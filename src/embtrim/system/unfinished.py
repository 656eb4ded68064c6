"""Folders of unfinished work: which settings the work has, and whether it may go on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embtrim.config import first_change
from embtrim.errors import DataError
from embtrim.system.files import write_then_rename
from embtrim.system.holding import LOCK, hold
from embtrim.system.interrupts import going_on_with
from embtrim.untrusted import read_json

logger = logging.getLogger(__name__)

# The file in a folder of unfinished work that holds the settings of the work.
SETTINGS = "settings.json"


class OtherTrainingError(DataError):
    """A checkpoint belongs to a training with other settings."""


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder the place for the state of some work; state of work with other settings is removed.

    Args:
        folder: The folder, which need not exist.
        settings: All that the work depends on, as JSON-able values.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if folder.exists():
        try:
            change = first_change(dict(read_json(path, any_number=True)), settings)
        except (OSError, TypeError, ValueError):
            change = "settings that cannot be read"
        if change is None:
            return
        logger.warning("%s was begun with %s; this work starts from the beginning", folder, change)
        shutil.rmtree(folder)
    write_then_rename(path, lambda file: file.write(json.dumps(settings).encode()))


def holds_work(folder: Path) -> bool:
    """Whether a folder holds more than settings of work and locks."""
    return any(path.is_file() and path.name not in (SETTINGS, "config.toml", LOCK) for path in folder.rglob("*"))


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """Yield the folder beside `target` where work towards the target keeps its state; the target is held, see `hold`.

    The folder is removed when the `with` block ends. If the block raises, the folder stays, so that the work can go on,
    unless it holds nothing but the settings of `claim`. An interrupt then says where the work goes on.

    Raises:
        DataError: The target is held elsewhere.
        OSError: Nothing can be written beside it.
    """
    folder = target.with_name(f".{target.name}.unfinished")
    with hold(target), going_on_with(folder, folder.exists):
        try:
            yield folder
        except BaseException:
            if folder.is_dir() and not holds_work(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
