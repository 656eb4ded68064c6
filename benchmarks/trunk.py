"""Full model against SSEDS, uniform and random at several budgets, over seeds; one record a model, then a table.

    python benchmarks/trunk.py frappe --data DATA/frappe --out runs/trunk-frappe --seeds 3

`--data` is an encoded folder, or a catalog name with bundled data. A record that exists is not run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import embtrim
from embtrim.config import read_toml
from embtrim.experiment import RunConfig, RunRecord, shrink, train_full

SIGNED = {"score": "signed", "data": "valid", "batches": 0}
# name -> (method, settings)
VARIANTS = {
    "sseds": ("sseds", {}),
    "sseds signed valid": ("sseds", SIGNED),
    "sseds signed valid 1 epoch": ("sseds", {**SIGNED, "pretrain": "epochs:1"}),
    "sseds signed valid 1 epoch per parameter": ("sseds", {**SIGNED, "pretrain": "epochs:1", "cost_aware": True}),
    "uniform": ("uniform", {}),
    "random": ("random", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="name of a file in recipes/, without .toml")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--budgets", default="20%,10%")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    config = RunConfig.parse(
        read_toml(Path(__file__).parents[1] / "recipes" / f"{args.recipe}.toml"), where=args.recipe
    )
    data = embtrim.load(args.data)
    out = Path(args.out)
    records: list[tuple[str, RunRecord]] = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        full = None
        cells = [("full", "100%")] + [(name, budget) for budget in args.budgets.split(",") for name in VARIANTS]
        for name, budget in cells:
            path = out / f"{name.replace(' ', '-')}-{budget.rstrip('%')}-seed{seed}.json"
            if not path.exists():
                if full is None:
                    full = train_full(data, config, seed)
                if name == "full":
                    record = full.record
                else:
                    method, settings = VARIANTS[name]
                    record = shrink(full, data, config, method, settings, budget, seed).record
                record.save(path)
                print(f"{path.stem}: test AUC {record.test['auc']:.5f}, {record.train_seconds:.0f} s", flush=True)
            records.append((f"{name} {'' if name == 'full' else budget}".strip(), RunRecord.load(path)))
    print_table(records)


def print_table(records: list[tuple[str, RunRecord]]) -> None:
    """A markdown table: mean and spread over seeds."""
    print("| plan | test AUC | logloss | embedding params | table bytes | epochs | search / epoch | max difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in records):
        rows = [record for other, record in records if other == name]
        auc = [r.test["auc"] for r in rows]
        spread = f" ± {statistics.stdev(auc):.4f}" if len(auc) > 1 else ""
        differences = [r.verification["max_difference"] for r in rows if r.verification]
        cells = [
            name,
            f"{statistics.mean(auc):.4f}{spread}",
            f"{statistics.mean(r.test['logloss'] for r in rows):.4f}",
            f"{statistics.mean(r.num_params for r in rows):,.0f}",
            f"{statistics.mean(r.table_bytes for r in rows):,.0f}",
            f"{statistics.mean(r.epochs for r in rows):.1f}",
            f"{statistics.mean(r.search_epochs for r in rows):.2f}",
            f"{max(differences):.1e}" if differences else "",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
