"""Memory of this process: the peak inside a block, and freed pages kept for the next training step."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

# Parameters of glibc's mallopt (malloc.h), and the largest threshold that it takes for blocks with pages of their own.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 32 << 20
_WITHOUT_END = 2**31 - 1
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_lock, _num_keeping = threading.Lock(), 0


@contextmanager
def freed_pages_kept() -> Iterator[None]:
    """Have the C library keep freed memory for the next allocation inside a `with` block, if the library is glibc.

    Each training step allocates and frees the same tens of megabytes. glibc gives most of them back to the system, and the
    next step pays for fresh pages: 3,500 to 6,600 page faults in a step of a DeepFM (MLP 3x400, batch 4096), a tenth to a
    third of its time. Blocks may be nested and may run in several threads. After the last block the thresholds are those that
    glibc reaches by itself in a process that has freed blocks of 32 MB, and free memory is given back. A threshold that the
    user set in the environment (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) is kept.
    """
    global _num_keeping
    if any(name in os.environ for name in _OWN_SETTINGS):
        yield
        return
    with _lock:
        _num_keeping += 1
        _c_library("mallopt", _TRIM_THRESHOLD, _WITHOUT_END)
        _c_library("mallopt", _MMAP_THRESHOLD, _LARGEST_BLOCK)
    try:
        yield
    finally:
        with _lock:
            _num_keeping -= 1
            if not _num_keeping:
                _c_library("mallopt", _TRIM_THRESHOLD, 2 * _LARGEST_BLOCK)
                _c_library("malloc_trim", 0)


def _c_library(function: str, *arguments: int) -> None:
    """Call a function of the C library, if the library is glibc."""
    with suppress(OSError, AttributeError, TypeError):
        getattr(_loaded(), function)(*arguments)


@cache
def _loaded() -> ctypes.CDLL:
    """The C library; looking for it takes longer than a call."""
    return ctypes.CDLL(None)


def zero_pages(num_bytes: int) -> mmap.mmap:
    """Zeros, at least one byte, of which the system holds the pages that were written to: small ones, unlike NumPy's."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # pragma: no cover - Windows
        return mmap.mmap(-1, num_bytes)
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class _Peak:
    """Anonymous memory in bytes, at the start and at the peak; None where the system does not tell."""

    def __init__(self) -> None:
        self.start = self.bytes = anonymous_memory()

    @property
    def above_start(self) -> int | None:
        return None if self.bytes is None or self.start is None else self.bytes - self.start

    def look(self) -> None:
        now = anonymous_memory()
        if now is not None:
            self.bytes = max(self.bytes or 0, now)


@contextmanager
def peak_memory(interval: float = 0.02) -> Iterator[_Peak]:
    """Peak anonymous memory of this process inside a `with` block, sampled; memory-mapped data do not count."""
    release_free_memory()
    peak, done = _Peak(), threading.Event()

    def sample() -> None:
        while not done.wait(interval):
            peak.look()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.look()


def anonymous_memory() -> int | None:
    """Anonymous resident memory of this process in bytes, or None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def release_free_memory() -> None:
    """Give free memory back to the system, where the C library can, so that a measurement starts without leftovers."""
    gc.collect()
    _c_library("malloc_trim", 0)
