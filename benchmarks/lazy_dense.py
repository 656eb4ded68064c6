"""Do lazy tables, which update only the rows of a batch, and bf16 matmuls change accuracy? All other settings are equal.

    python benchmarks/lazy_dense.py frappe-64 --data DATA/frappe --seeds 3 --out runs/lazy_dense.json

prints a table with a verdict (see report.NOISE) and writes its numbers as JSON; `bench.py --only accuracy` does the same
for Frappe and MovieLens. A training ends by early stopping, and at the latest after the recipe's epochs or --epochs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ours
import report
import workloads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="Name of a file in recipes/, without .toml.")
    parser.add_argument("--data", required=True, help="Encoded folder, or a known dataset.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds (3).")
    parser.add_argument("--epochs", type=int, help="Epochs at most, instead of the recipe's.")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    args = parser.parse_args()
    settings = {"recipe": args.recipe, "data": args.data, "seeds": args.seeds, "epochs": args.epochs}
    runs = []
    for tables, precision in workloads.CELLS:
        result = ours.accuracy(**settings, tables=tables, precision=precision)
        runs.append({"key": f"accuracy/{args.recipe}/{tables} {precision}", **result})
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1))
    print(report.accuracies(report.summarise(runs)))


if __name__ == "__main__":
    main()
