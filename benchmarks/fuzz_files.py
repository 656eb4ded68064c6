"""Random mutations of valid files of every kind that embtrim reads: each must be opened, or refused with an EmbtrimError.

    python benchmarks/fuzz_files.py --seconds 300                 from seed 0 on
    python benchmarks/fuzz_files.py --seed 1234 --count 1         one mutation again, with its traceback

Prints each fault once, by where it was raised, and the counts of each kind; the exit code is 1 if there was a fault, or a
mutation took more than 500 MB or 5 seconds.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tests.broken_files import KINDS, Kind, clear, make_all, mutated

from embtrim.errors import EmbtrimError

MOST_BYTES, MOST_SECONDS = 500 << 20, 5.0


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def tried(kind: Kind, root: Path, seed: int) -> tuple[str, str, str]:
    """Outcome of one mutation: opened, refused, fault or slow; the mutation in words; the fault."""
    with mutated(kind, root, random.Random(seed)) as (folder, words):
        Path("/proc/self/clear_refs").write_text("5")
        before, started, outcome, fault = resident("VmRSS"), time.process_time(), "opened", ""
        try:
            kind.open(folder)
        except EmbtrimError:
            outcome = "refused"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome, fault = "fault", traceback.format_exc()
        seconds, peak = time.process_time() - started, resident("VmHWM") - before
    if seconds > MOST_SECONDS or peak > MOST_BYTES:
        outcome, fault = "slow", f"{seconds:.1f} s, {peak >> 20} MB\n{fault}"
    clear(root)
    return outcome, words, fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=10**9, help="number of seeds")
    parser.add_argument("--seconds", type=float, default=300.0, help="time after which no seed is started")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    counts: Counter[tuple[str, str]] = Counter()
    seen: Counter[str] = Counter()
    ends = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_all(root)
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            if time.monotonic() > ends:
                break
            kind = KINDS[seed % len(KINDS)]
            outcome, words, fault = tried(kind, root, seed)
            counts[kind.name, outcome] += 1
            place = "".join(fault.splitlines(keepends=True)[-6:])
            if fault and not seen[place]:
                print(f"--seed {seed} {words}\n{fault if arguments.count == 1 else place}", flush=True)
            seen[place] += 1
    for kind in KINDS:
        print(kind.name, {outcome: n for (name, outcome), n in sorted(counts.items()) if name == kind.name})
    sys.exit(int(any(outcome in ("fault", "slow") for _, outcome in counts)))


if __name__ == "__main__":
    main()
