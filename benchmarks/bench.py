"""The benchmark suite: embtrim beside other libraries, floors of the machine, goals met and missed. See docs/benchmarks.md.

    make bench
    python benchmarks/bench.py --quick --only train encode

Every job runs in a process of its own, alone; repeats are interleaved. Results are written after each job, and the same
command continues an interrupted run. The other libraries, called peers, are installed on first use into a virtual
environment of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import embtrim
import measure
import report
import workloads
from embtrim.system.files import write_then_rename
from embtrim.system.machine import available_cores, processor_name
from embtrim.training.devices import fast_matmul

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "peers-requirements.txt"
PEERS = ("fuxictr", "torchrec", "fbgemm-gpu-cpu", "torch", "polars", "pandas")
# Variables that set the thread counts of the contenders' libraries.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def main() -> None:
    args = parse_arguments()
    scale = workloads.QUICK if args.quick else workloads.Scale()
    fit_rows = args.fit_rows and tuple(sorted(args.fit_rows))
    given = {"log_rows": args.log_rows, "big_log_gb": args.big_log_gb, "fit_rows": fit_rows}
    scale = dataclasses.replace(scale, **{name: value for name, value in given.items() if value})
    settings = {
        "quick": args.quick,
        "repeats": args.repeats,
        "threads": args.threads,
        "device": args.device,
        "scale": json.loads(json.dumps(dataclasses.asdict(scale))),
    }
    load = os.getloadavg()[0]
    peers_python, why_not = peers_environment(args.peers_venv, args.device)
    machine = describe_machine(load, peers_python, torch.device(args.device))
    path = args.out / "bench.json"
    results = started_results(path, machine, settings)
    for text in report.warnings(results):
        say(f"warning: {text}")
    for name in args.only:
        with tempfile.TemporaryDirectory(prefix="embtrim-bench-") as folder:
            listed = workloads.jobs(name, scale, Path(folder), args.data, machine["precisions"])
            check_commits(path, listed, results)
            for repeat in range(args.repeats):
                for job in listed:
                    run_once(job, repeat, results, peers_python, why_not)
                    save(path, results)
    say(f"wrote {path} and {path.with_suffix('.md')}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Tiny sizes, to see whether the suite runs.")
    parser.add_argument("--only", nargs="+", choices=workloads.NAMES, default=workloads.NAMES, metavar="WORKLOAD",
                        help=f"Workloads to run, instead of all: {', '.join(workloads.NAMES)}.")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="Runs of each job; medians over them are reported (5).")
    parser.add_argument(
        "--threads", type=int, default=available_cores(), help="Threads of every contender (all cores)."
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="Device on which models compute (cpu)."
    )
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data",
                        help=f"Folder with the real data: {', '.join(raw for raw, _ in workloads.REAL.values())}.")  # fmt: skip
    parser.add_argument("--out", type=Path, help="Folder for bench.json and bench.md.")
    parser.add_argument(
        "--peers-venv", type=Path, default=HERE / ".peers-venv", help="Virtual environment of the peers."
    )
    parser.add_argument("--log-rows", type=int, help="Rows of the log to encode (5,000,000).")
    parser.add_argument("--big-log-gb", type=float, help="Gigabytes of the log to encode in little memory (10).")
    parser.add_argument("--fit-rows", type=int, nargs="+",
                        help="Rows of the datasets to train on (1, 5, 10 and 20 million).")  # fmt: skip
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1:
        parser.error(f"--repeats and --threads must be 1 or more, given {args.repeats} and {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    if args.out is None:
        args.out = HERE.parent / "runs" / "bench-quick" if args.quick else HERE / "results" / "bench"
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- one job -------------------------------------------------------------------------------------------------------------


def run_once(job: workloads.Job, repeat: int, results: dict[str, Any], peers_python: Path | None, why_not: str) -> None:
    """Run a job and append its result, unless this repeat has a result, the job failed before, or it has enough runs."""
    threads, device = results["settings"]["threads"], results["settings"]["device"]
    earlier = [run for run in results["runs"] if run["key"] == job.key]
    if repeat >= job.max_repeats or any(run["repeat"] == repeat or "error" in run for run in earlier):
        return
    python = Path(sys.executable) if job.python == "own" else peers_python
    if python is None:
        result: dict[str, Any] = {"error": why_not}
    else:
        try:
            if job.prepare is not None:
                job.prepare()
            order = json.dumps([job.kind, threads, device, job.settings])
            env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
            result = measure.run_alone([str(python), str(HERE / job.script), order], env)
        except (embtrim.EmbtrimError, OSError) as error:  # the data are missing, or the disk is full
            result = {"error": str(error)}
    results["runs"].append({"key": job.key, "repeat": repeat, "commit": results["machine"]["commit"], **result})
    figures = [f"{k} {v:,.4g}" for k, v in result.items() if k in ("step_ms", "rows_per_s", "peak_bytes")]
    say(f"{job.key}, run {repeat + 1}: {result.get('error') or ', '.join(figures) or 'done'}")


def save(path: Path, results: dict[str, Any]) -> None:
    write_then_rename(path, lambda file: file.write(json.dumps(results, indent=1).encode()))
    write_then_rename(path.with_suffix(".md"), lambda file: file.write(report.markdown(results).encode()))


def started_results(path: Path, machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Results to continue: those on disk without their errors, or empty ones, with the present load and commit."""
    fresh = {"machine": machine, "settings": settings, "runs": []}
    if not path.exists():
        return fresh
    stored = json.loads(path.read_text("utf-8"))
    passing = ("started", "load", "commit")  # the commit is noted with every run
    same_machine = all(stored["machine"].get(k) == v for k, v in machine.items() if k not in passing)
    if not same_machine or stored["settings"] != settings:
        sys.exit(f"{path} holds results of another machine or settings; move it away or choose another --out")
    stored["runs"] = [run for run in stored["runs"] if "error" not in run]
    say(f"continuing with {len(stored['runs'])} runs of {path}")
    return {**stored, "machine": machine}


def check_commits(path: Path, listed: Sequence[workloads.Job], results: Mapping[str, Any]) -> None:
    """Stop if a workload has results of another commit: contenders of two commits must not be compared."""
    keys, now = {job.key for job in listed}, results["machine"]["commit"]
    others = sorted({run["commit"] for run in results["runs"] if run["key"] in keys and run["commit"] != now})
    if others:
        sys.exit(
            f"{path} has results of {listed[0].key.partition('/')[0]!r} of commit {', '.join(others)}, this is {now}; move it "
            "away, or choose another --out or other workloads (--only)"
        )


# ---- the machine and the peers' environment --------------------------------------------------------------------------------


def precision_here(name: str, device: torch.device) -> dict[str, Any]:
    """embtrim's precision "fp32" or "auto" on this machine, in torch's terms; see `workloads.jobs`."""
    with fast_matmul(name, device) as (_, words):
        return {"matmul": torch.get_float32_matmul_precision(), "bf16": "bf16" in words}


def describe_machine(load: float, peers_python: Path | None, device: torch.device) -> dict[str, Any]:
    """Everything about the machine that the figures depend on."""
    variables = (
        "OMP_WAIT_POLICY",
        "OMP_PROC_BIND",
        "KMP_BLOCKTIME",
        "GOMP_SPINCOUNT",
        "LD_PRELOAD",
        "MALLOC_ARENA_MAX",
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_MMAP_THRESHOLD_",
    )
    versions = {"embtrim": embtrim.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "processor": f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "env": {name: os.environ[name] for name in variables if name in os.environ},
        "versions": versions | {f"peers' {k}": v for k, v in peer_versions(peers_python).items()},
        "commit": commit(),
        "precisions": {name: precision_here(name, device) for name in ("fp32", "auto")},
        "load": load,
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def commit() -> str:
    """The commit of the working tree, with a digest of uncommitted changes outside the results of this suite."""
    git = ["git", "-C", str(HERE.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    changes = subprocess.run(
        [*git, "diff", "HEAD", "--", ".", ":(exclude)benchmarks/results"], capture_output=True
    ).stdout
    return head.stdout.strip() + (f" modified {hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def peer_versions(python: Path | None) -> dict[str, str]:
    if python is None:
        return {}
    code = f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {PEERS!r}}}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def peers_environment(folder: Path, device: str) -> tuple[Path | None, str]:
    """Python of the peers' environment, or None with the reason.

    The environment is made if it is missing or has other versions than the requirements. The requirements are for CPUs; for
    another device the user makes the environment.
    """
    python, marker = folder.absolute() / "bin" / "python", folder / "installed"
    if device != "cpu":
        missing = f"{folder} is not an environment with {device} builds of the peers; make one, see --peers-venv"
        return (python, "") if python.exists() else (None, missing)
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if marker.exists() and marker.read_text() == digest:
        return python, ""
    say(f"making the peers' environment in {folder}; this takes minutes")
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(REQUIREMENTS)],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            why = f"the peers' environment could not be made: {errors[0] if errors else command}"
            say(why)
            return None, why
    marker.write_text(digest)
    return python, ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the running job must not outlive the suite
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command to continue")
