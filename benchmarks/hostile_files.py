"""Files made to harm: what embtrim answers, in how many seconds, and with how much memory.

    python benchmarks/hostile_files.py

Each file of `tests/hostile_files.py` is opened in a process of its own, which may have 4 GB more than embtrim itself. Prints
a Markdown table; the exit code is 1 if a file took more than 500 MB above what was resident, or more than 5 seconds.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.broken_files import KINDS, make_all
from tests.hostile_files import HOSTILE, Hostile

from embtrim.errors import EmbtrimError

ROOM = 4 << 30
MOST_BYTES, MOST_SECONDS = 500 << 20, 5.0
HANGS = 60
BY_NAME = {kind.name: kind for kind in KINDS}


def status(name: str) -> int:
    """A figure of this process in bytes, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def open_in_child(hostile: Hostile, folder: Path) -> tuple[str, float, int]:
    """The first line of the answer, CPU seconds, and bytes above what was resident."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        logging.disable(logging.CRITICAL)
        signal.alarm(HANGS)
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ROOM,) * 2)
        Path("/proc/self/clear_refs").write_text("5")
        before, started = status("VmRSS"), time.process_time()
        try:
            BY_NAME[hostile.kind].open(folder)
            answer = "opened"
        except EmbtrimError as error:
            answer = f"{type(error).__name__}: {str(error).replace(f'{folder.parent}/', '')}".partition("\n")[0]
        except BaseException as error:
            answer = f"FAULT {type(error).__name__}: {error}".partition("\n")[0]
        seconds, peak = time.process_time() - started, status("VmHWM") - before
        os.write(writer, f"{seconds}\n{peak}\n{answer[:160]}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        content = told.read()
    _, ended = os.waitpid(child, 0)
    if not content:
        return f"FAULT: ended by signal {ended & 127}", float(HANGS), 0
    seconds, peak, answer = content.split("\n", 2)
    return answer, float(seconds), int(peak)


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
            answer, seconds, peak = open_in_child(hostile, folder)
            bad = "FAULT" in answer or seconds > MOST_SECONDS or peak > MOST_BYTES
            is_bad = is_bad or bad
            cells = (hostile.name, answer.replace("|", "\\|"), f"{seconds:.2f}", f"{peak / 2**20:.0f}")
            print(f"| {' | '.join(ascii(cell)[1:-1] for cell in cells)} |", "<- too much" if bad else "", flush=True)
            shutil.rmtree(work)
    sys.exit(int(is_bad))


if __name__ == "__main__":
    main()
