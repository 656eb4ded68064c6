"""Timing of steps and calls, and of processes that run alone while their memory is watched."""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

RESULT = "RESULT "
SAMPLE_SECONDS = 0.1
JOB_SECONDS = 3600
# Timed calls are split into blocks; the warm-up blocks before them do not count.
BLOCKS, WARMUP_BLOCKS = 10, 2

Times = tuple[float, ...]

# The device on which the job of this process computes; set by `worker`.
device = torch.device("cpu")


# ---- in the process that is measured -----------------------------------------------------------------------------------


def now() -> float:
    """Seconds, read when the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_step(
    loss: Callable[[Any], Any], optimizers: Sequence[Any], batch: Any, autocast: Callable[[], Any] = nullcontext
) -> tuple[Any, Times]:
    """One training step, as `embtrim.fit` takes it.

    Returns:
        The loss, and the times before and after forward, backward and update.
    """
    times = [now()]
    for optimizer in optimizers:
        optimizer.zero_grad()
    with autocast():
        value = loss(batch)
    times.append(now())
    value.backward()
    times.append(now())
    for optimizer in optimizers:
        optimizer.step()
    times.append(now())
    return value, tuple(times)


def time_steps(step: Callable[[Any], tuple[Any, Times]], batches: Iterable[Any], warmup: int) -> dict[str, Any]:
    """Median milliseconds of steps over batches, without the first `warmup`.

    `step` returns the loss or None, and the times before and after each of its parts. Steps of three parts are also
    reported by forward, backward and update.
    """
    losses, rows = [], []
    for batch in batches:
        value, times = step(batch)
        rows.append(times)
        if value is not None:
            losses.append(float(value.detach()))
    rows = rows[warmup:]
    result: dict[str, Any] = {"step_ms": _median_ms(rows, 0, -1)}
    if losses:
        result |= {"first_loss": losses[0], "last_loss": losses[-1]}
    if len(rows[0]) == 4:
        for part, name in enumerate(("forward_ms", "backward_ms", "update_ms")):
            result[name] = _median_ms(rows, part, part + 1)
    return result


def _median_ms(rows: Sequence[Times], start: int, stop: int) -> float:
    return 1000 * statistics.median(times[stop] - times[start] for times in rows)


def time_calls(call: Callable[[], Any], seconds: float) -> float:
    """Median milliseconds of a call that is repeated for about `seconds`, after a warm-up of a fifth of `seconds`."""
    return time_in_turn({"": call}, seconds)[""]


def time_in_turn(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median milliseconds of several calls, each repeated for about `seconds`.

    The calls take turns in blocks of a tenth of `seconds`. A disturbance of the machine then falls on all of them, while
    within a block each call finds the caches as it left them itself.
    """
    times_by_name: dict[str, list[float]] = {name: [] for name in calls}
    for block in range(WARMUP_BLOCKS + BLOCKS):
        for name, call in calls.items():
            until, times = time.perf_counter() + seconds / BLOCKS, []
            while not times or time.perf_counter() < until:
                started = now()
                call()
                times.append(now() - started)
            if block >= WARMUP_BLOCKS:
                times_by_name[name] += times
    return {name: 1000 * statistics.median(values) for name, values in times_by_name.items()}


def worker(kinds: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Run the job of the command line, a JSON list [kind, threads, device, settings], and print its result or its error."""
    global device
    kind, threads, name, settings = json.loads(sys.argv[1])
    device = torch.device(name)
    torch.set_num_threads(threads)
    try:
        result = kinds[kind](**settings)
        result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if device.type == "cuda":
            result["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    print(RESULT + json.dumps(result), flush=True)


# ---- in the process that watches ---------------------------------------------------------------------------------------


def run_alone(command: Sequence[str], env: dict[str, str]) -> dict[str, Any]:
    """Run a worker and return its result with the peak memory of the process and its descendants, as sampled.

    `cpu_seconds` are those of the process and all descendants. `peak_bytes` is anonymous memory, without mapped files and shared memory. `peak_file_bytes` is the resident part of
    mapped files, libraries included; a page that several processes share counts once for each. A process that dies or takes
    over JOB_SECONDS gives an "error".
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=errors, start_new_session=True)
        peak, peak_mapped, started = 0, 0, time.monotonic()
        spent: dict[int, float] = {}  # by process, as last seen: daemons are not waited for, and so in no total
        waited_before = waited_cpu_seconds()
        until = started + JOB_SECONDS
        try:
            while process.poll() is None and time.monotonic() < until:
                pids = family(process.pid)
                anonymous, mapped = map(sum, zip(*map(resident_bytes, pids), strict=True))
                spent |= {pid: seconds for pid in pids if (seconds := cpu_seconds(pid)) is not None}
                peak, peak_mapped = max(peak, anonymous), max(peak_mapped, mapped)
                time.sleep(SAMPLE_SECONDS)
        finally:
            late = process.poll() is None
            for pid in family(process.pid) if late else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        wall = time.monotonic() - started
        output.seek(0)
        errors.seek(0)
        lines = [line for line in output.read().splitlines() if line.startswith(RESULT)]
        if lines and not late:
            return {
                **json.loads(lines[-1][len(RESULT) :]),
                "peak_bytes": peak,
                "peak_file_bytes": peak_mapped,
                "wall_seconds": wall,
                "cpu_seconds": max(sum(spent.values()), waited_cpu_seconds() - waited_before),
            }
        why = f"took over {JOB_SECONDS} s" if late else f"ended with {process.returncode}, without a result"
        last = [line for line in errors.read().splitlines() if line.strip()][-1:]
        return {"error": "; ".join([why, *last])}


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    pids = [pid]
    for parent in pids:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:  # the process has ended
            continue
    return pids


def waited_cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_seconds(pid: int) -> float | None:
    """CPU seconds of a process so far; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def forget_peak() -> bool:
    """Reset the peak resident memory that the kernel holds of this process; False if the kernel cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int:
    """Peak resident memory of this process, of all kinds, since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def resident_bytes(pid: int) -> tuple[int, int]:
    """Resident memory of a process, anonymous and of mapped files; zeros if it has ended."""
    bytes_by_name = {"RssAnon": 0, "RssFile": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in bytes_by_name:
                bytes_by_name[name] = 1024 * int(value.split()[0])
    return bytes_by_name["RssAnon"], bytes_by_name["RssFile"]
