"""Folders of unfinished work: what left them, and whether it may go on."""

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

log = logging.getLogger(__name__)

# The file of a folder of unfinished work that says what the work is.
SETTINGS = "settings.json"


class OtherTrainingError(DataError):
    """A checkpoint is of a training with other settings."""


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder the place for the state of work with these settings; what it holds of other work is removed.

    Args:
        folder: need not exist.
        settings: what the work depends on, as JSON-able values.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if folder.exists():
        try:
            change = first_change(json.loads(path.read_text("utf-8")), settings)
        except (OSError, ValueError):
            change = "settings that cannot be read"
        if change is None:
            return
        log.warning("%s was begun with %s; this work starts anew", folder, change)
        shutil.rmtree(folder)
    write_then_rename(path, lambda file: file.write(json.dumps(settings).encode()))


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """The folder beside `target` where work towards it keeps its state, inside a `with` block.

    It stays where the block raises, so that the work can go on, unless it holds nothing but the settings of `claim`, and
    goes where the target is written.
    """
    folder = target.with_name(f".{target.name}.unfinished")
    try:
        yield folder
    except BaseException:
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {SETTINGS}:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
