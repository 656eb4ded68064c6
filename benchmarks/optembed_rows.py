"""Does OptEmbed keep the same rows with lazy tables as with dense ones? Agreement by decile of training frequency.

python benchmarks/optembed_rows.py frappe-64 --data DATA/frappe --epochs 10 --threshold-lr 1 --threshold-weight 1e-3
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import embtrim
from embtrim.config import read_toml
from embtrim.experiments.settings import RunConfig
from embtrim.methods import OptEmbedConfig
from embtrim.methods.optembed import row_margins, train_supernet
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.tasks.ctr_task import CTRTask
from embtrim.training.evaluation import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="Name of a file in recipes/, without .toml.")
    parser.add_argument("--data", required=True, help="Encoded folder, or a known dataset.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--l2", type=float, help="L2 of the embeddings, instead of the recipe's.")
    parser.add_argument("--threshold-lr", type=float, default=1e-4)
    parser.add_argument("--threshold-weight", type=float, default=1e-4)
    args = parser.parse_args()
    config = RunConfig.parse(
        read_toml(Path(__file__).parents[1] / "recipes" / f"{args.recipe}.toml"), where=args.recipe
    )
    data = embtrim.load(args.data)
    task = CTRTask(build(config.model, data.schema, **config.hparams), data, config.train)
    settings = OptEmbedConfig(
        epochs=args.epochs, l2=args.l2, threshold_lr=args.threshold_lr, threshold_weight=args.threshold_weight
    )
    kept: dict[str, np.ndarray] = {}
    for optimizer, seed in (("dense", args.seed), ("lazy", args.seed), ("dense again", args.seed + 1)):
        started = time.perf_counter()
        model, thresholds = train_supernet(task, settings.replace(optimizer=optimizer.split()[0]), seed)
        seconds = time.perf_counter() - started
        assert isinstance(model, CTRModel)
        kept[optimizer] = np.concatenate(row_margins(task, model, task.sites(model), thresholds)) > 0
        print(f"{optimizer}: validation AUC {evaluate(model, data, 'valid').auc:.5f}, {seconds:.1f} s, "
              f"{kept[optimizer].mean():.1%} of the rows kept", flush=True)  # fmt: skip
    counts = np.concatenate(list(task.row_counts().values()))
    print("\n`dense again` is dense with another seed: two seeds agree this much by chance.\n")
    print(
        "| decile | rows | mean count | kept, dense | kept, lazy | Jaccard dense, lazy | Jaccard dense, dense again |"
    )
    print("|---|---|---|---|---|---|---|")
    for decile, rows in enumerate(np.array_split(np.argsort(counts, kind="stable"), 10), start=1):
        dense, lazy, again = (kept[name][rows] for name in ("dense", "lazy", "dense again"))
        cells = [str(decile), f"{len(rows):,}", f"{counts[rows].mean():.1f}", f"{dense.mean():.1%}", f"{lazy.mean():.1%}",
                 jaccard(dense, lazy), jaccard(dense, again)]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def jaccard(left: np.ndarray, right: np.ndarray) -> str:
    """Number of rows that both keep, divided by the number that at least one keeps."""
    either = (left | right).sum()
    return f"{(left & right).sum() / either:.3f}" if either else ""


if __name__ == "__main__":
    main()
