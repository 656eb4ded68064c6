"""Errors of a command as one line on stderr and an exit code."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Literal

import typer

INTERRUPTED: Literal[130] = 130


class Resumable(Exception):
    """An interrupt of a command that can be continued; typer would swallow a KeyboardInterrupt with its message."""


def fail(message: str, code: int) -> int:
    """Print an error to stderr and return its exit code."""
    with suppress(OSError):
        typer.echo(f"embtrim: {message}", err=True)
    return code


def fail_os(error: OSError) -> int:
    """Print an error of the operating system with its file and a remedy; return the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader of stdout has closed it, as in `embtrim report X | head`
        return 1
    where = f"{error.filename}: " if error.filename else ""
    advice = "; free space or choose another --out" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
    return fail(f"{where}{error.strerror or error}{advice}", 1)
