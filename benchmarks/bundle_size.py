"""Size of a bundle and peak anonymous memory of a process that loads it, full against compact, with 5M table rows.

    python benchmarks/bundle_size.py

The 39 tables are hashed, so there is no vocabulary; their sizes are like Criteo's, and their weights are untrained. Each
bundle is loaded by a process of its own. A process that only imports what loading needs is measured for comparison.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

import embtrim
from embtrim.system.folders import folder_bytes
from embtrim.tasks.ctr_task import CTRTask

LOAD = """
import sys
from embtrim.serving.bundle import load_bundle
from embtrim.system.memory import peak_memory
with peak_memory(0.002) as peak:
    bundle = load_bundle(sys.argv[1]) if len(sys.argv) > 1 else None
print(peak.bytes)
"""


def peak_of_loading(*folder: str) -> int:
    return int(subprocess.run([sys.executable, "-c", LOAD, *folder], capture_output=True, text=True, check=True).stdout)


def main(num_rows: int = 5_000_000, num_fields: int = 39, width: int = 16) -> None:
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, num_fields + 1) ** 1.5
    sizes = np.maximum(20, shares / shares.sum() * num_rows).astype(int)
    fields = tuple(embtrim.FieldSpec(name=f"f{i}", hash_size=int(n)) for i, n in enumerate(sizes))
    values = {f"f{i}": rng.integers(0, n, 1000) for i, n in enumerate(sizes)}
    log = pl.DataFrame({**values, "click": rng.integers(0, 2, 1000)})
    with tempfile.TemporaryDirectory() as folder:
        schema = embtrim.Schema(label="click", fields=fields)
        data = embtrim.encode(log, schema, out=Path(folder) / "data")
        model = embtrim.models.DeepFM(data.schema, embedding_dim=width)
        plan = embtrim.search(CTRTask(model, data), embtrim.methods.RandomConfig(), "10%")
        embtrim.save(model, Path(folder) / "full", data)
        embtrim.save(embtrim.compact(model, plan), Path(folder) / "compact", data)
        floor = peak_of_loading()
        print("| | table bytes (plan) | bundle bytes | peak anonymous memory | above the bare process |")
        print("|---|---|---|---|---|")
        for name, size_plan in (("full", model.tables.plan), ("compact", plan)):
            peak = peak_of_loading(str(Path(folder) / name))
            size = folder_bytes(Path(folder) / name)
            print(f"| {name} | {size_plan.num_bytes():,} | {size:,} | {peak:,} | {peak - floor:,} |")


if __name__ == "__main__":
    main()
