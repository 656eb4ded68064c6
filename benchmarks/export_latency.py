"""Seconds a batch of a bundle's model takes: eager, exported by torch.export, and as ONNX in onnxruntime.

    python benchmarks/export_latency.py BUNDLE

Ids are drawn uniformly from each table's rows. Repeats of the three run in turn, so that what else the machine does
falls on all of them; the median is shown. Both runtimes get as many threads as torch has (OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

import embtrim
from embtrim.bundle import Bundle
from embtrim.models.ctr_model import CTRModel


def random_batch(model: CTRModel, num_rows: int) -> dict[str, Tensor]:
    rows = {table.name: table.num_compact_rows for table in model.tables.plan.tables}
    columns = [torch.randint(rows[f.table_name], (num_rows,)) for f in model.schema.id_fields for _ in range(f.length)]
    batch = {"ids": torch.stack(columns, 1).int()}
    if model.num_dense:
        batch["dense"] = torch.randn(num_rows, model.num_dense)
    return batch


def runners(bundle: Bundle, folder: Path) -> dict[str, Callable[[dict[str, Tensor]], object]]:
    embtrim.export(bundle, "pt2", folder / "pt2")
    embtrim.export(bundle, "onnx", folder / "onnx")
    loaded = torch.export.load(str(folder / "pt2" / "model.pt2")).module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"), options)
    return {
        "eager": lambda batch: bundle.model(*batch.values()),
        "pt2": lambda batch: loaded(**batch),
        "onnxruntime": lambda batch: session.run(["logits"], {name: value.numpy() for name, value in batch.items()}),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 4096])
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    bundle = embtrim.load_bundle(args.bundle)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run = runners(bundle, Path(folder))
        print(f"| batch | {' | '.join(f'{name}, us' for name in run)} |")
        print("|---|" + "---|" * len(run))
        for num_rows in args.batches:
            batch = random_batch(bundle.model, num_rows)
            seconds: dict[str, list[float]] = {name: [] for name in run}
            for call in run.values():
                call(batch)
            for _ in range(args.repeats):
                for name, call in run.items():
                    start = time.perf_counter()
                    call(batch)
                    seconds[name].append(time.perf_counter() - start)
            cells = " | ".join(f"{statistics.median(seconds[name]) * 1e6:,.0f}" for name in run)
            print(f"| {num_rows:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
