"""What logs of many fields cost: CPU seconds of encoding and of `run`, stage by stage, for several numbers of fields.

    python benchmarks/fields.py                         150, 300, 600 and 1,200 fields, 1,500 rows
    python benchmarks/fields.py --fields 150 --rows 6000 --method guided

Each number of fields has a process of its own. A stage counts what its functions take without the stages inside them;
"other" is the rest of the process. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.process_time()
# The functions of each stage, by the module that calls them.
STAGES = {
    "data": ("embtrim.data.encoding.encode",),
    "training": (
        "embtrim.experiments.steps.fit",
        "embtrim.experiments.sweep.fit",
        "embtrim.experiments.records.evaluate",
        "embtrim.experiments.steps.taught",
    ),
    "check": ("embtrim.experiments.run.check_run",),
    "search": ("embtrim.experiments.steps.search",),
    "verify": ("embtrim.experiments.steps.verify",),
    "compact": ("embtrim.experiments.steps.made_compact",),
    "quantise": ("embtrim.tables.storage.TableStorage.quantize_",),
    "save": ("embtrim.experiments.run.save",),
    "free": ("embtrim.system.memory.release_free_memory",),
}


def write_log(path: Path, num_fields: int, num_rows: int) -> None:
    """A csv whose first twenty fields say something about the click."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(0)
    value_NF = (rng.pareto(1.2, (num_rows, num_fields)) * 5).astype(int) % 40
    logit_N = (value_NF[:, :20] % 7 - 3.0).sum(1) * 0.15
    click_N = (rng.random(num_rows) < 1 / (1 + np.exp(-logit_N))).astype(int)
    columns = {f"f{i:04}": value_NF[:, i] for i in range(num_fields)}
    pl.DataFrame({"click": click_N, **columns}).write_csv(path)


def measured(num_fields: int, num_rows: int, method: str) -> dict[str, float]:
    """CPU seconds by stage of this process, which encodes a log and runs a method on it."""
    spent: Counter[str] = Counter()
    running = ["other"]
    since = STARTED

    def switch(stage: str | None) -> None:
        nonlocal since
        spent[running[-1]] += time.process_time() - since
        since = time.process_time()
        running.append(stage) if stage is not None else running.pop()

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            switch(stage)
            try:
                return function(*args, **kwargs)
            finally:
                switch(None)

        return call

    switch("import")

    import embtrim

    homes = {name.rpartition(".")[0]: None for names in STAGES.values() for name in names}
    for home in homes:
        _found(home)
    switch(None)
    for stage, names in STAGES.items():
        for name in names:
            home, _, function = name.rpartition(".")
            setattr(_found(home), function, timed(stage, getattr(_found(home), function)))
    with tempfile.TemporaryDirectory(prefix="embtrim-fields-") as folder:
        log, out = Path(folder) / "log.csv", Path(folder) / "run"
        write_log(log, num_fields, num_rows)
        data = embtrim.encode(log, label="click", out=Path(folder) / "data", progress=False)
        embtrim.run(data, embtrim.RunConfig(method=method), out)
    switch(None)
    return dict(spent)


def _found(name: str) -> Any:
    """A module, or a class in a module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, owner = name.rpartition(".")
        return getattr(importlib.import_module(module), owner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, nargs="+", default=[150, 300, 600, 1200], help="Numbers of fields.")
    parser.add_argument("--rows", type=int, default=1500, help="Rows of the log (1500).")
    parser.add_argument("--method", default="sseds", help="Search method (sseds).")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measured(given.fields[0], given.rows, given.method)))
        return
    stages = ["import", *STAGES, "other"]
    print(f"{given.method}, {given.rows:,} rows, CPU seconds\n")
    print("| fields | " + " | ".join([*stages, "total", "outside training and data"]) + " |")
    print("|---" * (len(stages) + 3) + "|")
    for num_fields in given.fields:
        command = [sys.executable, __file__, "--worker", "--method", given.method, "--rows", str(given.rows)]
        done = subprocess.run([*command, "--fields", str(num_fields)], stdout=subprocess.PIPE, check=True, text=True)
        spent = json.loads(done.stdout.splitlines()[-1])
        total = sum(spent.values())
        outside = total - spent.get("training", 0.0) - spent.get("data", 0.0)
        cells = [f"{spent.get(stage, 0.0):.1f}" for stage in stages]
        print(f"| {num_fields:,} | {' | '.join(cells)} | {total:.1f} | {outside / total:.0%} |", flush=True)


if __name__ == "__main__":
    main()
