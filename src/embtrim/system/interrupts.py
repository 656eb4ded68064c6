"""Ctrl-C and SIGTERM: held back while a state is half changed, and told with the place where the work goes on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

# A second Ctrl-C acts at once, but not one that comes together with the first: some shells and wrappers send two.
TOGETHER_SECONDS = 1.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP in a process that ends by all of them in one way.

    Python itself ends by SIGINT, not with an exit code, if a KeyboardInterrupt (but not a subclass) passes some C code.

    Attributes:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


@contextmanager
def signals_raised() -> Iterator[None]:
    """Have signals raise Interrupted inside a `with` block, unless they are ignored; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    taken = {signum: handler for signum, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for signum in taken:
        signal.signal(signum, raise_interrupted)
    try:
        yield
    finally:
        for signum, handler in taken.items():
            signal.signal(signum, handler)


@contextmanager
def interrupts_not_replaced() -> Iterator[None]:
    """Raise Interrupted for any other exception that leaves a `with` block in which a signal has come.

    A signal may raise its interrupt where C code called Python. Some libraries drop the interrupt there and raise an
    error of their own, which looks like a fault of the data.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in SIGNALS}
    watched = {signum: handler for signum, handler in before.items() if callable(handler)}
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        watched[signum](signum, frame)

    for signum in watched:
        signal.signal(signum, note)
    try:
        yield
    except Exception as error:
        if came:
            raise Interrupted(came[-1]) from error
        raise
    finally:
        for signum, handler in watched.items():
            signal.signal(signum, handler)


def raise_interrupted(signum: int, _: FrameType | None = None) -> None:
    """Raise Interrupted."""
    raise Interrupted(signum)


class HeldSignals:
    """Ctrl-C, SIGTERM and SIGHUP that have come inside a `with held_back()` block and have not acted."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._came)

    def act(self) -> None:
        """Act on the signals that have come, at a point where nothing is half changed."""
        if self._came:
            self.release()
            self.hold()

    def hold(self) -> None:
        """Note signals from now on. Ignored ones stay ignored, and those that C code handles stay with it."""
        for signum in SIGNALS:
            if (handler := signal.getsignal(signum)) not in (None, signal.SIG_IGN):
                self._before[signum] = handler
                signal.signal(signum, self._note)

    def release(self) -> None:
        """Set the earlier handlers back, and act on the signals that have come."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        came, self._came = self._came, {}
        for signum in came:
            self._act(signum, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        first = self._came.setdefault(signum, time.monotonic())
        if signum == signal.SIGINT and time.monotonic() - first > TOGETHER_SECONDS:
            self._act(signum, frame)

    def _act(self, signum: int, frame: FrameType | None) -> None:
        handler = self._before[signum]
        if callable(handler):
            handler(signum, frame)
        else:
            signal.raise_signal(signum)


@contextmanager
def held_back(wanted: bool = True) -> Iterator[HeldSignals]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back inside a `with` block, if wanted and in the main thread; they act at its end.

    A second Ctrl-C acts at once.
    """
    held = HeldSignals()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield held
        return
    held.hold()
    try:
        yield held
    finally:
        held.release()


@contextmanager
def going_on_with(place: Path, holds_work: Callable[[], bool]) -> Iterator[None]:
    """Have an interrupt of a `with` block say that the same call goes on with a place, if it holds work then."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if holds_work():
            interrupt.args = (f"interrupted; the same call goes on with {place}",)
        raise
