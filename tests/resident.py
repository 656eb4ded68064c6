"""Peak resident memory of a call, as the kernel of Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embtrim.system.memory import release_free_memory


def peak_resident(call: Callable[[], Any]) -> int:
    """Bytes by which the peak resident memory of a call exceeds what was resident before it."""
    release_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _status_bytes("VmRSS")
    except OSError:
        pytest.skip("this system does not tell the peak memory of a process")
    call()
    return _status_bytes("VmHWM") - before


def stays_within(num_bytes: float, call: Callable[[], Any]) -> bool:
    """Whether `peak_resident` of one of three calls is no more. Other threads, and memory freed late, only add to a peak."""
    return any(peak_resident(call) <= num_bytes for _ in range(3))


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
