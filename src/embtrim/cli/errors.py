"""Errors of a command as one line on stderr and an exit code."""

from __future__ import annotations

import errno
import functools
import shlex
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import typer

from embtrim.system.interrupts import Interrupted, interrupts_not_replaced
from embtrim.untrusted import printable

# What to do about an error of the operating system. What is finished stays, and the same command goes on after it.
REPAIRS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space"),
    errno.EROFS: "make the disk writable",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change the permissions"),
    errno.EIO: "look after the disk",
}


class Stopped(Exception):
    """An interrupt of a command; typer would swallow a KeyboardInterrupt with its message."""

    def __init__(self, interrupt: KeyboardInterrupt) -> None:
        super().__init__()
        self.interrupt = interrupt


def stopping(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with interrupts raised as Stopped."""

    @functools.wraps(command)
    def wrapped(*given: Any, **named: Any) -> None:
        try:
            with interrupts_not_replaced():
                command(*given, **named)
        except KeyboardInterrupt as interrupt:
            raise Stopped(interrupt) from None

    return wrapped


def fail_interrupted(interrupt: BaseException, arguments: Sequence[str]) -> int:
    """Print what an interrupt leaves, and the command that goes on; return the exit code."""
    signum = interrupt.signum if isinstance(interrupt, Interrupted) else signal.SIGINT
    by = "" if signum == signal.SIGINT else f" by {signal.Signals(signum).name}"
    kept = str(interrupt.args[0]).removeprefix("interrupted; ") if interrupt.args else ""
    left = kept or "nothing is half-written; there is no checkpoint, and the same call starts from the beginning"
    return fail(f"interrupted{by}; {left}: {shlex.join(['embtrim', *arguments])}", 128 + signum)


def fail(message: str, code: int) -> int:
    """Print an error to stderr and return its exit code."""
    with suppress(OSError):
        typer.echo(printable(f"embtrim: {message}"), err=True)
    return code


def fail_os(error: OSError) -> int:
    """Print an error of the operating system with its file and a remedy; return the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader of stdout has closed it, as in `embtrim report X | head`
        return 1
    where = f"{error.filename}: " if error.filename else ""
    if error.errno not in REPAIRS:
        return fail(f"{where}{error.strerror or error}", 1)
    advice = f"; {REPAIRS[error.errno]}{' and start again to go on,' if where else ''} or choose another --out"
    return fail(f"{where}{error.strerror or error}{advice}", 1)
