"""Files made to harm: what embtrim answers, in how many seconds, and with how much memory.

    python benchmarks/hostile_files.py

Each file of `tests/hostile_files.py` is opened in a process of its own, which may have 4 GB more than embtrim itself. Prints
a Markdown table; the exit code is 1 if a file took more than 500 MB above what was resident, or more than 5 seconds.
"""

from __future__ import annotations

import logging
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.broken_files import KINDS, make_all
from tests.hostile_files import HOSTILE

from embtrim.errors import EmbtrimError

ROOM = 4 << 30
MOST_BYTES, MOST_SECONDS = 500 << 20, 5.0
HANGS = 60
BY_NAME = {kind.name: kind for kind in KINDS}


def status(name: str) -> int:
    """A figure of this process in bytes, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def open_here(kind: str, folder: Path, told: Connection) -> None:
    """Open a folder in this process, and tell the first line of the answer, CPU seconds, and bytes above what was resident."""
    logging.disable(logging.CRITICAL)
    signal.alarm(HANGS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ROOM,) * 2)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status("VmRSS"), time.process_time()
    try:
        BY_NAME[kind].open(folder)
        answer = "opened"
    except EmbtrimError as error:
        answer = f"{type(error).__name__}: {str(error).replace(f'{folder.parent}/', '')}".partition("\n")[0]
    except BaseException as error:
        answer = f"FAULT {type(error).__name__}: {error}".partition("\n")[0]
    told.send((answer[:160], time.process_time() - started, status("VmHWM") - before))


def open_in_child(kind: str, folder: Path) -> tuple[str, float, int]:
    """`open_here` in a process of its own; a server forks it that has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.hostile_files"])
    heard, told = context.Pipe(duplex=False)
    child = context.Process(target=open_here, args=(kind, folder, told))
    child.start()
    told.close()
    try:
        return heard.recv()
    except EOFError:
        child.join()
        return f"FAULT: ended by signal {-(child.exitcode or 0)}", float(HANGS), 0


def main() -> None:
    is_bad = False
    print("| file | answer | CPU s | MB above resident |\n|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "valid"
        make_all(root)
        for hostile in HOSTILE:
            work = Path(name) / "work"
            shutil.copytree(root, work)
            folder = work / hostile.kind
            hostile.harm(folder)
            if hostile.sealed:
                BY_NAME[hostile.kind].seal(folder)
            answer, seconds, peak = open_in_child(hostile.kind, folder)
            bad = "FAULT" in answer or seconds > MOST_SECONDS or peak > MOST_BYTES
            is_bad = is_bad or bad
            cells = (hostile.name, answer.replace("|", "\\|"), f"{seconds:.2f}", f"{peak / 2**20:.0f}")
            print(f"| {' | '.join(ascii(cell)[1:-1] for cell in cells)} |", "<- too much" if bad else "", flush=True)
            shutil.rmtree(work)
    sys.exit(int(is_bad))


if __name__ == "__main__":
    main()
