"""What this machine can do at best, measured on the spot: matmuls of the MLP's shapes, random reads and updates of rows.

The floor of a training step is the time of its matmuls, of reading a row for each lookup, and of reading and writing
weight and two moments of each distinct row, each at the best rate seen here; everything else would be free.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import measure
import synthetic

HIDDEN = (400, 400, 400)


def matmul_ms(num_inputs: int, batch_size: int, precision: str, seconds: float) -> dict[str, float]:
    """Forward and both backward products of every layer of the MLP: milliseconds in all, and GFLOP/s."""
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    total, flops = 0.0, 0
    widths = (num_inputs, *HIDDEN, 1)
    for inputs, outputs in itertools.pairwise(widths):
        x, w = torch.randn(batch_size, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        y = torch.randn(batch_size, outputs, dtype=dtype)
        products = (lambda x=x, w=w: x @ w.T, lambda y=y, w=w: y @ w, lambda y=y, x=x: y.T @ x)
        total += sum(measure.time_calls(product, seconds) for product in products)
        flops += 3 * 2 * batch_size * inputs * outputs
    return {"ms": total, "gflops": flops / total / 1e6}


def row_rates(num_rows: int, width: int, num_reads: int, distinct_U: Tensor, seconds: float) -> dict[str, float]:
    """Rows a second: uniformly random reads by the fastest gather at hand, and updates of three tables in place."""
    table = torch.zeros(num_rows, width)
    index = torch.randint(num_rows, (num_reads,), generator=torch.Generator().manual_seed(0))
    out = np.empty((num_reads, width), np.float32)
    read_ms = min(
        measure.time_calls(lambda: table.index_select(0, index), seconds),
        measure.time_calls(lambda: functional.embedding(index, table), seconds),
        measure.time_calls(lambda: np.take(table.numpy(), index.numpy(), axis=0, out=out, mode="clip"), seconds),
    )
    weight_and_moments = (table, torch.zeros_like(table), torch.zeros_like(table))

    def update() -> None:
        for part in weight_and_moments:
            part.index_copy_(0, distinct_U, part.index_select(0, distinct_U))

    update_ms = measure.time_calls(update, seconds)
    return {"reads": num_reads / read_ms * 1000, "updates": len(distinct_U) / update_ms * 1000}


def floors(table_rows: int, batch_size: int, seconds: float) -> dict[str, Any]:
    """Matmul rates, row rates, and from them the floors of a step by (layout, precision)."""
    sizes = synthetic.table_sizes(table_rows)
    ids, _ = next(synthetic.batches(sizes, batch_size, 1))
    starts = np.cumsum([0, *sizes[:-1]])
    distinct = torch.from_numpy(np.unique(ids + starts))
    inputs = {layout: sum(synthetic.widths_of(layout)) for layout in ("full", "mixed")}
    result: dict[str, Any] = {"matmul": {}, "rows": {}, "floor_ms": {}, "distinct_rows": len(distinct)}
    for layout, width in (("full", 16), ("mixed", 4)):
        rates = row_rates(sum(sizes), width, ids.size, distinct, seconds)
        result["rows"][f"{4 * width}-byte"] = rates
        embedding_ms = 1000 * (ids.size / rates["reads"] + len(distinct) / rates["updates"])
        for precision in ("fp32", "medium", "bf16"):
            matmul = matmul_ms(inputs[layout], batch_size, precision, seconds)
            result["matmul"][f"{layout} {precision}"] = matmul
            result["floor_ms"][f"{layout} {precision}"] = matmul["ms"] + embedding_ms
    return result


if __name__ == "__main__":
    measure.worker({"floors": floors})
