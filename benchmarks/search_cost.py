"""The cost of each search: its seconds, as such and in training epochs of the full model, and its peak memory.

    python benchmarks/search_cost.py compare-frappe --data DATA/frappe --budget 10%

The full model is trained once; then every method searches on it, one after another. Run it on a quiet machine. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import embtrim
from embtrim.config import read_toml
from embtrim.experiments.grid import CompareConfig, resolve, run_config, settings_by_label
from embtrim.experiments.steps import train_full
from embtrim.methods import method_named
from embtrim.system.memory import peak_memory
from embtrim.tasks.ctr_task import CTRTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="Name of a grid in recipes/, without .toml.")
    parser.add_argument("--data", required=True, help="Encoded folder, or a known dataset.")
    parser.add_argument("--budget", default="10%", help="Budget of every search (10%%).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the training and the searches (0).")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="File for the training of the full model, so that a second run need not train it.",
    )
    given = parser.parse_args()
    recipe = Path(__file__).parents[1] / "recipes" / f"{given.recipe}.toml"
    config = resolve(CompareConfig.parse(read_toml(recipe), where=str(recipe)))
    data = embtrim.load(given.data)
    run = run_config(config, config.models[0])
    full = train_full(data, run.replace(seed=given.seed), checkpoint=given.checkpoint)
    epoch_seconds = full.record.epoch_seconds
    assert epoch_seconds is not None
    print(f"\n{given.recipe}, {config.models[0]}, {given.budget}, {torch.get_num_threads()} threads; ", end="")
    print(f"an epoch of the full model takes {epoch_seconds:.2f} s, its training {full.record.train_seconds:.0f} s\n")
    print("| method | seconds | epochs | peak memory above the start |\n|---|---|---|---|")
    for label, setup in settings_by_label(config).items():
        settings = method_named(setup.method).parse(setup.search)
        task = CTRTask(full.model, data, run.train.replace(seed=given.seed))
        with peak_memory() as peak:
            started = time.perf_counter()
            embtrim.search(task, settings, given.budget, given.seed, setup.bits)
            seconds = time.perf_counter() - started
        memory = "" if peak.above_start is None else f"{peak.above_start / 1e6:,.0f} MB"
        print(f"| {label} | {seconds:.2f} | {seconds / epoch_seconds:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
