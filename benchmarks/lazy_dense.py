"""Does it matter for accuracy that only touched rows move? Lazy against dense tables, bf16 against fp32; same settings.

python benchmarks/lazy_dense.py frappe-64 --data DATA/frappe --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import embtrim
from embtrim.config import read_toml
from embtrim.experiment import RunConfig
from embtrim.models import build
from embtrim.train import evaluate, fit

# tables, precision
CELLS = (("dense", "fp32"), ("lazy", "fp32"), ("lazy", "auto"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="name of a file in recipes/, without .toml")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    args = parser.parse_args()
    config = RunConfig.parse(
        read_toml(Path(__file__).parents[1] / "recipes" / f"{args.recipe}.toml"), where=args.recipe
    )
    data = embtrim.load(args.data)
    print("| tables | precision | test AUC by seed | mean | spread | logloss | rows/s |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    for tables, precision in CELLS:
        results = []
        for seed in range(args.seeds):
            model = build(config.model, data.schema, **{**config.hparams, "seed": seed})
            train = config.train.replace(tables=tables, precision=precision, seed=seed)
            fitted = fit(model, data, train.replace(epochs=args.epochs) if args.epochs else train)
            results.append((evaluate(model, data, "test"), fitted))
        auc = [metrics.auc for metrics, _ in results]
        cells = [
            tables,
            results[0][1].precision,
            ", ".join(f"{a:.5f}" for a in auc),
            f"{statistics.mean(auc):.5f}",
            f"{statistics.stdev(auc):.5f}" if len(auc) > 1 else "",
            f"{statistics.mean(metrics.logloss for metrics, _ in results):.4f}",
            f"{statistics.median(fitted.rows_per_second for _, fitted in results):,.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
