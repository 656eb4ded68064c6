"""Worker processes: they crash, end with their parent, and report their progress."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from embtrim.errors import EmbtrimError
from embtrim.system.processes import in_processes
from tests.cli.workshop import environment
from tests.experiments.grids import until

pytestmark = pytest.mark.slow


def start_killer(_: str) -> Callable[[int], int]:
    return _kill_at_three


def _kill_at_three(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_crash_of_a_worker_is_an_error_and_does_not_hang() -> None:
    def work() -> None:
        with in_processes(2, start_killer, "x") as make:
            list(make(range(40)))

    with pytest.raises(EmbtrimError, match="a worker process died"):
        work()


def start_sleeper(folder: str) -> Callable[[int], None]:
    (Path(folder) / f"{os.getpid()}.started").touch()
    return time.sleep


SLEEPERS = """
import signal
import sys
from embtrim.system.processes import in_processes
from tests.system.test_workers import start_sleeper
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a parent in the background may have left ignored
    with in_processes(2, start_sleeper, sys.argv[1]) as make:
        print(list(make([1000, 1000])))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    paths = {**environment(), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=paths, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(list(tmp_path.glob("*.started"))) == 2)
        workers = [int(path.stem) for path in tmp_path.glob("*.started")]
        assert all(map(running, workers))
        process.send_signal(how)
        process.wait(30)
        until(lambda: not any(map(running, workers)), 30)
    finally:
        process.kill()
        process.wait()


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return " Z " not in re.sub(r"\(.*\)", "", Path(f"/proc/{pid}/stat").read_text())
    except OSError:
        return False
