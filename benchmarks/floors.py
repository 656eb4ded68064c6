"""The best that this machine can do, as measured: matmuls of the MLP's shapes, random reads and updates of rows.

The floor of a training step is the time of its matmuls, of one row read for each lookup, and of reading and writing the
weight and two moments of each distinct row, each at the best rate measured here. Everything else counts as free.
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
    """Forward and both backward products of all layers of the MLP: milliseconds in total, and GFLOP/s."""
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    total, flops = 0.0, 0
    widths = (num_inputs, *HIDDEN, 1)
    for inputs, outputs in itertools.pairwise(widths):
        shapes = ((batch_size, inputs), (outputs, inputs), (batch_size, outputs))
        x, w, y = (torch.randn(*shape, dtype=dtype, device=measure.device) for shape in shapes)
        products = (lambda x=x, w=w: x @ w.T, lambda y=y, w=w: y @ w, lambda y=y, x=x: y.T @ x)
        total += sum(measure.time_calls(product, seconds) for product in products)
        flops += 3 * 2 * batch_size * inputs * outputs
    return {"ms": total, "gflops": flops / total / 1e6}


def row_rates(num_rows: int, width: int, num_reads: int, distinct_U: Tensor, seconds: float) -> dict[str, float]:
    """Rows per second: uniformly random reads by the fastest of several gathers, and in-place updates of three tables."""
    table = torch.zeros(num_rows, width, device=measure.device)
    index = torch.randint(num_rows, (num_reads,), generator=torch.Generator().manual_seed(0)).to(measure.device)
    out = np.empty((num_reads, width), np.float32)
    gathers = [lambda: table.index_select(0, index), lambda: functional.embedding(index, table)]
    if measure.device.type == "cpu":
        gathers.append(lambda: np.take(table.numpy(), index.numpy(), axis=0, out=out, mode="clip"))
    read_ms = min(measure.time_calls(gather, seconds) for gather in gathers)
    weight_and_moments = (table, torch.zeros_like(table), torch.zeros_like(table))

    def update() -> None:
        for part in weight_and_moments:
            part.index_copy_(0, distinct_U, part.index_select(0, distinct_U))

    update_ms = measure.time_calls(update, seconds)
    return {"reads": num_reads / read_ms * 1000, "updates": len(distinct_U) / update_ms * 1000}


def copied_bytes_per_s(seconds: float) -> float:
    """Memory bandwidth: bytes that a copy too large for any cache reads and writes per second."""
    source = torch.zeros(64 << 20, device=measure.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure.time_calls(lambda: target.copy_(source), seconds) * 1000


def floors(source: int | str, batch_size: int, seconds: float) -> dict[str, Any]:
    """Memory bandwidth, matmul rates and row rates, and the floors of a step that follow, by layout and precision."""
    sizes = synthetic.table_sizes(source)
    ids, _ = next(synthetic.batches(source, batch_size, 1))
    starts = np.cumsum([0, *sizes[:-1]])
    distinct = torch.from_numpy(np.unique(ids + starts)).to(measure.device)
    inputs = {layout: sum(synthetic.widths_of(layout)) for layout in ("full", "mixed")}
    result: dict[str, Any] = {"matmul": {}, "rows": {}, "floor_ms": {}, "distinct_rows": len(distinct)}
    result["copied_bytes_per_s"] = copied_bytes_per_s(seconds)
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
