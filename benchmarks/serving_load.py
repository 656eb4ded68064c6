"""Load of examples/serve_http.py on the loopback: small and full models, and FuxiCTR's in eager torch, in one run.

    python benchmarks/serving_load.py --peers-python benchmarks/.peers-venv/bin/python
    python benchmarks/serving_load.py --logs flights --seconds 1 --work runs/serving

One client sends one request after the other, of the last rows of the log; each server is a process of its own on one core.
Servers take turns, so that a slow moment of the machine meets all of them. "raw" servers take raw values and look them up,
"ids" servers take ids: FuxiCTR has no encoder for a server, so it is given the ids of the full model. Its DeepFM has the
sizes of the full model. Prints Markdown tables, and writes them with every figure to --out.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import embtrim
import serving_models
from embtrim.system.machine import processor_name

HERE = Path(__file__).parent
BATCHES = (1, 64, 1024)
ROUNDS = 6
# Kind of server, what it opens, and the rows it is sent.
CONTENDERS = {
    "small, raw": ("raw", "small", "raw"),
    "full, raw": ("raw", "full", "raw"),
    "small, ids": ("ids", "small", "small"),
    "full, ids": ("ids", "full", "full"),
    "FuxiCTR full, ids": ("fuxictr", "fuxictr.json", "full"),
}


@dataclass
class Server:
    """A contender's process.

    Attributes:
        port: Port on the loopback.
        before: Resident bytes with all imports, without a model.
        bodies: Requests by batch size, sent in turn.
        latencies: Seconds of each request, by batch size.
    """

    process: subprocess.Popen[str]
    port: int
    before: int
    bodies: dict[int, list[bytes]]
    latencies: dict[int, list[float]] = field(default_factory=dict)

    def load(self, batch: int, seconds: float) -> None:
        """Requests of one client, one after the other; the first three do not count."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        found: list[float] = []
        bodies, end = itertools.cycle(self.bodies[batch]), time.perf_counter() + seconds
        while time.perf_counter() < end or len(found) < 10:
            start = time.perf_counter()
            connection.request("POST", "/score", next(bodies))
            answer = connection.getresponse()
            text = answer.read()
            found.append(time.perf_counter() - start)
            assert answer.status == 200, text
        connection.close()
        self.latencies.setdefault(batch, []).extend(found[3:])

    def figures(self) -> dict[str, Any]:
        """Latencies and rows a second by batch size, and resident bytes."""
        by_batch = {}
        for batch, seconds in self.latencies.items():
            middle, high = np.percentile(np.array(seconds) * 1e3, [50, 99])
            rate = batch / float(np.mean(seconds))
            by_batch[batch] = {"p50_ms": middle, "p99_ms": high, "rows_per_s": rate, "requests": len(seconds)}
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        resident, peak = (
            int(next(line for line in status if line.startswith(name)).split()[1]) * 1024 for name in ("VmRSS", "VmHWM")
        )
        return {
            "batches": by_batch,
            "resident_bytes": resident,
            "peak_bytes": peak,
            "model_bytes": resident - self.before,
        }


@contextmanager
def started(python: str, kind: str, path: Path, rows: dict[str, list[Any]]) -> Iterator[Server]:
    """A server that is ready, on one core."""
    num_rows = len(next(iter(rows.values())))
    bodies = {
        batch: [
            json.dumps({name: column[start : start + batch] for name, column in rows.items()}).encode()
            for start in range(0, min(num_rows, 1000 * batch), batch)
        ]
        for batch in BATCHES
    }
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen(
        [python, str(HERE / "serving_contenders.py"), kind, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        assert process.stdout is not None
        port, before = json.loads(process.stdout.readline())
        yield Server(process, port, before, bodies)
    finally:
        process.kill()
        process.wait()


def measured(log: str, folder: Path, peers_python: str, seconds: float) -> dict[str, Any]:
    """Figures of every contender of a log, which take turns."""
    serving_models.make(log, folder)
    rows = json.loads((folder / "rows.json").read_text())
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                started(
                    peers_python if kind == "fuxictr" else sys.executable,
                    kind,
                    folder / path,
                    rows[sent],
                )
            )
            for name, (kind, path, sent) in CONTENDERS.items()
        }
        for _, batch, server in itertools.product(range(ROUNDS), BATCHES, servers.values()):
            server.load(batch, seconds / ROUNDS)
        return {name: server.figures() for name, server in servers.items()}


def table(log: str, found: dict[str, Any]) -> str:
    """The figures of a log as a Markdown table."""
    cells = " | ".join(f"batch {batch:,}: p50, p99 ms | rows/s" for batch in BATCHES)
    lines = [
        f"### {log}\n",
        f"| server | {cells} | server MB | of it the model |",
        "|---" * (2 * len(BATCHES) + 3) + "|",
    ]
    for name, figures in found.items():
        parts = [
            f"{one['p50_ms']:.2f}, {one['p99_ms']:.2f} | {one['rows_per_s']:,.0f}"
            for one in figures["batches"].values()
        ]
        megabytes = f"{figures['resident_bytes'] / 1e6:,.0f} | {figures['model_bytes'] / 1e6:,.0f}"
        lines.append(f"| {name} | {' | '.join(parts)} | {megabytes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", nargs="+", choices=("flights", "large"), default=("flights", "large"))
    parser.add_argument("--seconds", type=float, default=6.0, help="Seconds for each server and batch size (6).")
    parser.add_argument("--work", type=Path, help="Folder that keeps the models; otherwise they are made again.")
    parser.add_argument("--out", type=Path, help="Folder for the results.")
    parser.add_argument("--peers-python", default=str(HERE / ".peers-venv" / "bin" / "python"),
                        help="Python of the peers' environment, which bench.py makes.")  # fmt: skip
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="embtrim-serving-") as temporary:
        work = given.work or Path(temporary)
        found = {log: measured(log, work / log, given.peers_python, given.seconds) for log in given.logs}
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "load": [load, os.getloadavg()[0]]}
    words = (
        f"{machine['processor']}, load {load:.1f} before and {machine['load'][1]:.1f} after; each "
        f"server on one core; embtrim {embtrim.__version__}."
    )
    page = "\n\n".join(["# Serving over HTTP", words, *(table(log, figures) for log, figures in found.items())])
    print(page)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        record = {"embtrim": embtrim.__version__, "machine": machine, "seconds": given.seconds, "logs": found}
        (given.out / "serving.json").write_text(json.dumps(record, indent=1) + "\n")
        (given.out / "serving.md").write_text(page + "\n")


if __name__ == "__main__":
    main()
