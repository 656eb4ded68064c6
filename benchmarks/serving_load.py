"""Load of examples/serve_http.py on the loopback, for several exports in one run.

    python benchmarks/serving_load.py EXPORT... [--seconds 3]

For each export and batch size: median and 99th percentile of the latency of one client, rows a second, and the memory of the
server's process. Rows are the golden rows of the export, repeated. Exports take turns, so that a slow moment meets all of them.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

BATCHES = (1, 64, 1024)
ROUNDS = 3
SERVER = Path(__file__).parent.parent / "examples" / "serve_http.py"


def columns(export: Path, num_rows: int) -> bytes:
    """The body of a request of some golden rows."""
    golden = json.loads((export / "golden.json").read_text("utf-8"))["rows"]
    rows = list(itertools.islice(itertools.cycle(golden), num_rows))
    return json.dumps({name: [row[name] for row in rows] for name in golden[0]}).encode()


def latencies(port: int, body: bytes, seconds: float) -> list[float]:
    """Seconds of each request of one client, one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 10:
        start = time.perf_counter()
        connection.request("POST", "/score", body)
        answer = connection.getresponse()
        text = answer.read()
        found.append(time.perf_counter() - start)
        assert answer.status == 200, text
    connection.close()
    return found[3:]


def resident_bytes(process: subprocess.Popen[str]) -> int:
    """Resident memory of a process."""
    line = next(
        part for part in Path(f"/proc/{process.pid}/status").read_text().splitlines() if part.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print a table of latencies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    servers: list[tuple[Path, subprocess.Popen[str], int]] = []
    try:
        for export in given.exports:
            command = [sys.executable, str(SERVER), str(export), "--port", "0"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            servers.append((export, process, int(process.stdout.readline().rsplit(":", 1)[1].partition("/")[0])))
        found: dict[tuple[Path, int], list[float]] = {}
        for _, batch, (export, _, port) in itertools.product(range(ROUNDS), BATCHES, servers):
            found.setdefault((export, batch), []).extend(
                latencies(port, columns(export, batch), given.seconds / ROUNDS)
            )
        print("| export | batch | p50 ms | p99 ms | rows/s | server MB |\n|---|---|---|---|---|---|")
        for export, process, _ in servers:
            megabytes = resident_bytes(process) / 1e6
            for batch in BATCHES:
                times = np.array(found[export, batch])
                middle, high = np.percentile(times, [50, 99]) * 1e3
                rate = batch / times.mean()
                print(f"| {export.name} | {batch} | {middle:.2f} | {high:.2f} | {rate:,.0f} | {megabytes:.0f} |")
    finally:
        for _, process, _ in servers:
            process.kill()


if __name__ == "__main__":
    main()
