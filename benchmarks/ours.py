"""embtrim's side of the benchmarks. One job a process: `python ours.py '[kind, threads, settings]'` prints its result.

Axes: B batch, F fields, S output columns of all fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import embtrim
import measure
import synthetic
from embtrim.dataset import FORMAT_VERSION, Batch, EncodedDataset
from embtrim.methods.uniform import equal_widths
from embtrim.models import DeepFM
from embtrim.optim import RowAdagrad, RowAdam
from embtrim.tables import EmbeddingTables
from embtrim.train import fast_matmul, fit, logloss_of_batch, make_optimizers

CPU = torch.device("cpu")


def plan_of(schema: embtrim.Schema, layout: str) -> embtrim.SizePlan:
    """The layouts that are compared: "full" width, "mixed" widths with projections, "compact": 10%, equal widths."""
    full = embtrim.SizePlan.full(schema, synthetic.FULL_WIDTH, first_order=True)
    if layout == "full":
        return full
    if layout == "mixed":
        widths = zip(schema.tables, synthetic.widths_of("mixed", len(schema.tables)), strict=True)
        return full.with_columns({name: range(width) for name, width in widths}, "project")
    plan = equal_widths(full, full.max_params(embtrim.Budget.parse("10%")), "scatter", seed=0)
    assert plan is not None, "10% of width 16 is at least width 1"
    return plan


def kept_columns(table_rows: int, layout: str) -> list[list[int]]:
    """Kept columns of each field, for contenders that know no plans."""
    plan = plan_of(embtrim.Schema.from_sizes(synthetic.table_sizes(table_rows)), layout)
    return [list(table.columns) for table in plan.tables]


def deepfm(table_rows: int, layout: str, **hparams: Any) -> DeepFM:
    schema = embtrim.Schema.from_sizes(synthetic.table_sizes(table_rows))
    return DeepFM(schema, plan=plan_of(schema, layout), batch_norm=False, **hparams)


def make_batches(table_rows: int, batch_size: int, num_batches: int) -> list[Batch]:
    drawn = synthetic.batches(synthetic.table_sizes(table_rows), batch_size, num_batches)
    return [Batch(torch.from_numpy(ids), torch.from_numpy(labels)) for ids, labels in drawn]


def make_step(model: DeepFM, autocast: Callable[[], Any], config: embtrim.TrainConfig) -> Callable[[Batch], Any]:
    """The step of `fit`: its loss, its optimisers, its autocast."""
    optimizers = make_optimizers(model, config)
    model.train()
    return lambda batch: measure.train_step(lambda b: logloss_of_batch(model, b), optimizers, batch, autocast)


def use_kernels(name: str) -> None:
    """From here on, plain torch's kernels or the fused ones.

    Raises:
        ModuleNotFoundError: there are none of this name, or numba is missing.
    """
    if name == "torch":
        os.environ["EMBTRIM_KERNELS"] = name
    else:
        importlib.import_module(f"embtrim.kernels.{name}")


def train(
    table_rows: int, layout: str, precision: str, batch_size: int, warmup: int, steps: int, kernels: str = "torch"
) -> dict[str, Any]:
    """Whole training steps of a DeepFM."""
    use_kernels(kernels)
    config = embtrim.TrainConfig(precision=precision, batch_size=batch_size)  # type: ignore[arg-type]
    model = deepfm(table_rows, layout)
    with fast_matmul(precision, CPU) as (autocast, words):
        step = make_step(model, autocast, config)
        batches = make_batches(table_rows, batch_size, warmup + steps)
        return {**measure.time_steps(step, batches, warmup), "precision": words}


def profile(table_rows: int, layout: str, batch_size: int, warmup: int, steps: int) -> dict[str, Any]:
    """Where a training step in auto precision spends its time: the ten operators with the most time of their own."""
    use_kernels("torch")
    model = deepfm(table_rows, layout)
    batches = make_batches(table_rows, batch_size, warmup + steps)
    with fast_matmul("auto", CPU) as (autocast, words):
        step = make_step(model, autocast, embtrim.TrainConfig())
        for batch in batches[:warmup]:
            step(batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for batch in batches[warmup:]:
                step(batch)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    top = [
        {
            "operator": event.key,
            "self_ms": event.self_cpu_time_total / 1000 / steps,
            "share": event.self_cpu_time_total / total,
            "calls": event.count / steps,
        }
        for event in events[:10]
    ]
    return {"top": top, "step_ms": total / 1000 / steps, "precision": words}


def embedding(
    table_rows: int, layout: str, optimizer: str, batch_size: int, warmup: int, steps: int, kernels: str = "torch"
) -> dict[str, Any]:
    """The embeddings alone: lookup, backward with a given gradient, update."""
    use_kernels(kernels)
    schema = embtrim.Schema.from_sizes(synthetic.table_sizes(table_rows))
    tables = EmbeddingTables(schema, dataclasses.replace(plan_of(schema, layout), first_order=False))
    row_optimizer = {"adam": RowAdam, "adagrad": RowAdagrad}[optimizer](tables, lr=1e-3)
    grad_BS = torch.randn(batch_size, sum(tables.widths), generator=torch.Generator().manual_seed(0))

    def step(batch: Batch) -> tuple[None, measure.Times]:
        times = [time.perf_counter()]
        row_optimizer.zero_grad()
        concat = tables(batch.ids_BC).concat
        times.append(time.perf_counter())
        concat.backward(grad_BS)
        times.append(time.perf_counter())
        row_optimizer.step()
        times.append(time.perf_counter())
        return None, tuple(times)

    return measure.time_steps(step, make_batches(table_rows, batch_size, warmup + steps), warmup)


def predict(table_rows: int, layout: str, batch_sizes: list[int], seconds: float) -> dict[str, Any]:
    """Latency of the model's forward pass as `predict` runs it."""
    model = deepfm(table_rows, layout).eval()
    latency = {}
    with torch.no_grad(), fast_matmul("fp32", CPU):
        for size in batch_sizes:
            turns = itertools.cycle(make_batches(table_rows, size, 20))
            latency[str(size)] = measure.time_calls(lambda turns=turns: model(next(turns).ids_BC), seconds)
    return {"latency_ms": latency}


def encode(log: str, out: str) -> dict[str, Any]:
    """Encode the log: log2 buckets, min_count 10, split 8:1:1."""
    numeric = (embtrim.FieldSpec(name=n, type="numeric", transform="log2", min_count=10) for n in synthetic.NUMERIC)
    words = (embtrim.FieldSpec(name=n, min_count=10) for n in synthetic.CATEGORICAL)
    schema = embtrim.Schema(label=synthetic.LABEL, fields=(*numeric, *words))
    started = time.perf_counter()
    data = embtrim.encode(log, schema, out=out, format="csv", separator="\t", overwrite=True, progress=False)
    seconds = time.perf_counter() - started
    rows = sum(data.num_rows(split) for split in data.splits)
    return {"rows": rows, "rows_per_s": rows / seconds, "vocabulary": sum(data.schema.tables.values())}


def read(folder: str, batch_size: int) -> dict[str, Any]:
    """Shuffled batches from the page cache: a first pass fills it."""
    data = EncodedDataset.load(folder)
    for epoch in range(2):
        started = time.perf_counter()
        rows = sum(len(batch) for batch in data.batches("train", batch_size, shuffle_seed=epoch))
        seconds = time.perf_counter() - started
    return {"rows": rows, "rows_per_s": rows / seconds}


def train_epoch(folder: str, batch_size: int) -> dict[str, Any]:
    """An epoch of `fit` from disk; the watcher notes the memory."""
    data = EncodedDataset.load(folder)
    result = fit(DeepFM(data.schema, batch_norm=False), data, epochs=1, batch_size=batch_size)
    return {"rows": data.num_rows("train"), "rows_per_s": result.rows_per_second, "precision": result.precision}


def write_dataset(folder: Path, num_rows: int, table_rows: int) -> None:
    """An encoded dataset of one split; ids and labels are drawn and written chunk by chunk."""
    sizes, rng, chunk = synthetic.table_sizes(table_rows), np.random.default_rng(0), 200_000
    (folder / "train").mkdir(parents=True)
    schema = embtrim.Schema.from_sizes(sizes)
    (folder / "schema.json").write_text(json.dumps(schema.model_dump(mode="json")), "utf-8")
    meta = {"format_version": FORMAT_VERSION, "num_rows": {"train": num_rows}}
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    shape = (num_rows, synthetic.NUM_FIELDS)
    ids = np.lib.format.open_memmap(folder / "train" / "ids.npy", "w+", np.int32, shape)
    labels = np.lib.format.open_memmap(folder / "train" / "labels.npy", "w+", np.float32, (num_rows,))
    for start in range(0, num_rows, chunk):
        stop = min(start + chunk, num_rows)
        ids[start:stop] = synthetic.zipf_ids(sizes, stop - start, rng)
        labels[start:stop] = synthetic.labels_of(ids[start:stop], rng)


KINDS = {f.__name__: f for f in (train, profile, embedding, predict, encode, read, train_epoch)}

if __name__ == "__main__":
    measure.worker(KINDS)
