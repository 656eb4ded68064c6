"""embtrim's jobs of the benchmarks, one per process.

`python ours.py '[kind, threads, device, settings]'` runs a job and prints its result.

Axes: B batch, F fields, S output columns of all fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

import embtrim
import measure
import synthetic
from embtrim.config import read_toml
from embtrim.data.dataset import ARRAYS_VERSION, Batch, EncodedDataset, SplitArrays
from embtrim.data.read_options import ReadOptions
from embtrim.experiments.settings import RunConfig
from embtrim.experiments.steps import train_full
from embtrim.methods.uniform import equal_widths
from embtrim.models import DeepFM
from embtrim.serving.bundle import load_bundle
from embtrim.serving.predicting import write_predictions
from embtrim.system.memory import freed_pages_kept
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.kernels import kernels_name
from embtrim.tables.row_optimizers import RowAdagrad, RowAdam
from embtrim.training.devices import fast_matmul
from embtrim.training.evaluation import logloss_of_batch
from embtrim.training.fitting import compiled, fit, make_optimizers

CPU = torch.device("cpu")
RECIPES = Path(__file__).parents[1] / "recipes"
VALID_ROWS = 10_000


def plan_of(schema: embtrim.Schema, layout: str) -> embtrim.SizePlan:
    """The plan of a layout: "full" width; "mixed" widths with projections; "compact", 10% with equal widths."""
    full = embtrim.SizePlan.full(schema, synthetic.FULL_WIDTH, first_order=True)
    if layout == "full":
        return full
    if layout == "mixed":
        widths = zip(schema.tables, synthetic.widths_of("mixed", len(schema.tables)), strict=True)
        return full.with_columns({name: range(width) for name, width in widths}, "project")
    plan = equal_widths(full, full.max_params(embtrim.Budget.parse("10%")), "scatter", seed=0)
    assert plan is not None, "10% of width 16 is at least width 1"
    return plan


def kept_columns(source: int | str, layout: str) -> list[list[int]]:
    """Kept columns of each field, for contenders without plans."""
    plan = plan_of(embtrim.Schema.from_sizes(synthetic.table_sizes(source)), layout)
    return [list(table.columns) for table in plan.tables]


def deepfm(source: int | str, layout: str, bits: int = 32, **hparams: Any) -> DeepFM:
    schema = embtrim.Schema.from_sizes(synthetic.table_sizes(source))
    model = DeepFM(schema, plan=plan_of(schema, layout).with_bits(bits), batch_norm=False, **hparams).to(measure.device)
    if bits < 32:
        model.tables.quantize_()
    return model


def make_batches(source: int | str, batch_size: int, num_batches: int) -> list[Batch]:
    drawn = synthetic.batches(source, batch_size, num_batches)
    return [Batch(torch.from_numpy(ids), torch.from_numpy(labels)).to(measure.device) for ids, labels in drawn]


def make_step(model: DeepFM, autocast: Callable[[], Any], config: embtrim.TrainConfig) -> Callable[[Batch], Any]:
    """The training step of `fit`, with its loss, optimisers and autocast."""
    optimizers = make_optimizers(model, config)
    model.train()
    return lambda batch: measure.train_step(lambda b: logloss_of_batch(model, b), optimizers, batch, autocast)


def use_kernels(name: str) -> str:
    """Use plain torch's kernels or the fused ones from here on, regardless of the environment; return the name.

    Raises:
        ModuleNotFoundError: There are no kernels of this name, or numba is missing.
        RuntimeError: embtrim uses other kernels on this device.
    """
    os.environ.pop("EMBTRIM_KERNELS", None)
    if name == "torch":
        os.environ["EMBTRIM_KERNELS"] = name
    else:
        importlib.import_module(f"embtrim.tables.kernels.{name}")
    taken = kernels_name(torch.empty(0, device=measure.device))
    if taken != name:
        raise RuntimeError(f"on {measure.device} embtrim takes the kernels {taken!r}, not {name!r}")
    return name


def train(
    source: int | str,
    layout: str,
    precision: str,
    batch_size: int,
    warmup: int,
    steps: int,
    kernels: str = "torch",
    compile: bool = False,
) -> dict[str, Any]:
    """Whole training steps of a DeepFM. With `compile`, the first step fills an empty cache and gives `compile_seconds`."""
    result: dict[str, Any] = {"kernels": use_kernels(kernels)}
    config = embtrim.TrainConfig(precision=precision, batch_size=batch_size)  # type: ignore[arg-type]
    model = deepfm(source, layout)
    widths = [len(table.columns) for table in model.tables.plan.tables]
    result["table_bytes"] = synthetic.step_bytes(source, batch_size, widths)
    batches = make_batches(source, batch_size, warmup + steps)
    with (
        fast_matmul(precision, measure.device) as (autocast, result["precision"]),
        freed_pages_kept(),
        ExitStack() as stack,
    ):
        step = make_step(model, autocast, config)
        if compile:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(compiled(model))
            _, times = step(batches[0])
            result["compile_seconds"] = times[-1] - times[0]
        return {**result, **measure.time_steps(step, batches, warmup)}


def page_faults() -> int:
    """Minor page faults of this process so far: pages that the system had to map, or fill with zeros, before their use."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def profile(
    source: int | str, layout: str, batch_size: int, warmup: int, steps: int, kernels: str = "torch"
) -> dict[str, Any]:
    """Time and memory of a training step in auto precision.

    The result has the minor page faults per step, counted before the profiler starts; the ten operators with the most time
    of their own; the five operators that allocate most, less what they free themselves; and the share of the time outside
    torch's own operators, in Python, autograd and the fused kernels.
    """
    result: dict[str, Any] = {"kernels": use_kernels(kernels)}
    batches = make_batches(source, batch_size, warmup + steps)
    with fast_matmul("auto", measure.device) as (autocast, result["precision"]), freed_pages_kept():
        step = make_step(deepfm(source, layout), autocast, embtrim.TrainConfig())
        for batch in batches[:warmup]:
            step(batch)
        faults = page_faults()
        for batch in batches[warmup:]:
            step(batch)
        result["page_faults"] = (page_faults() - faults) / steps

        def profiled(**options: bool) -> tuple[float, list[Any]]:
            """Microseconds of the steps, and the operators."""
            with torch.profiler.profile(**options) as profiler:
                started = measure.now()
                for batch in batches[warmup:]:
                    step(batch)
                seconds = measure.now() - started
            # On a GPU the kernels are listed too; their time is already in their operators'.
            operators = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CPU]
            return 1e6 * seconds, operators

        time_us, by_time = profiled()
        _, by_memory = profiled(profile_memory=True)
    on_cuda = measure.device.type == "cuda"

    def own_us(event: Any) -> float:
        return event.self_device_time_total if on_cuda else event.self_cpu_time_total

    def own_bytes(event: Any) -> float:
        return event.self_device_memory_usage if on_cuda else event.self_cpu_memory_usage

    total_us = sum(map(own_us, by_time))
    result["top"] = [
        {
            "operator": event.key,
            "self_ms": own_us(event) / 1000 / steps,
            "share": own_us(event) / total_us,
            "calls": event.count / steps,
        }
        for event in sorted(by_time, key=own_us, reverse=True)[:10]
    ]
    result["allocations"] = [
        {"operator": event.key, "bytes": own_bytes(event) / steps, "calls": event.count / steps}
        for event in sorted(by_memory, key=own_bytes, reverse=True)[:5]
    ]
    inside_us = sum(own_us(event) for event in by_time if event.key.startswith("aten::"))
    return {**result, "step_ms": time_us / 1000 / steps, "outside": 1 - inside_us / time_us}


def embedding(
    source: int | str, layout: str, optimizer: str, batch_size: int, warmup: int, steps: int, kernels: str = "torch"
) -> dict[str, Any]:
    """Steps of the embeddings alone: lookup, backward from a given gradient, update."""
    result = {"kernels": use_kernels(kernels)}
    schema = embtrim.Schema.from_sizes(synthetic.table_sizes(source))
    tables = EmbeddingTables(schema, dataclasses.replace(plan_of(schema, layout), first_order=False)).to(measure.device)
    row_optimizer = {"adam": RowAdam, "adagrad": RowAdagrad}[optimizer](tables, lr=1e-3)
    grad_BS = torch.randn(batch_size, sum(tables.widths), generator=torch.Generator().manual_seed(0))
    grad_BS = grad_BS.to(measure.device)
    result["table_bytes"] = synthetic.step_bytes(source, batch_size, tables.widths)

    def step(batch: Batch) -> tuple[None, measure.Times]:
        times = [measure.now()]
        row_optimizer.zero_grad()
        concat = tables(batch.ids_BC).concat
        times.append(measure.now())
        concat.backward(grad_BS)
        times.append(measure.now())
        row_optimizer.step()
        times.append(measure.now())
        return None, tuple(times)

    with freed_pages_kept():
        return {**result, **measure.time_steps(step, make_batches(source, batch_size, warmup + steps), warmup)}


def predict(source: int | str, layout: str, batch_sizes: list[int], seconds: float) -> dict[str, Any]:
    """Latency of the forward pass, as `predict` runs it."""
    model = deepfm(source, layout).eval()
    latency = {}
    with torch.no_grad(), fast_matmul("fp32", measure.device), freed_pages_kept():
        for size in batch_sizes:
            turns = itertools.cycle(make_batches(source, size, 20))
            latency[str(size)] = measure.time_calls(lambda turns=turns: model(next(turns).ids_BC), seconds)
    return {"latency_ms": latency}


@torch.no_grad()
def export(source: int | str, layout: str, batch_sizes: list[int], seconds: float, bits: int = 32) -> dict[str, Any]:
    """Latency of the forward pass on the CPU by runtime, and the bytes of the exported files.

    The runtimes are eager, torch.export's program, and ONNX in onnxruntime; they are timed in turn.
    """
    import onnxruntime

    model, latency = deepfm(source, layout, bits).to(CPU).eval(), {}
    with tempfile.TemporaryDirectory() as folder, fast_matmul("fp32", CPU):
        file_bytes = {
            name: embtrim.export(model, format, f"{folder}/{format}")["model_bytes"]
            for name, format in (("torch.export", "pt2"), ("onnxruntime", "onnx"))
        }
        exported = torch.export.load(f"{folder}/pt2/model.pt2").module()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(f"{folder}/onnx/model_ids.onnx", options)
        for size in batch_sizes:
            turns = itertools.cycle([batch.ids_BC.cpu() for batch in make_batches(source, size, 20)])
            calls = {
                "eager": lambda turns=turns: model(next(turns)),
                "torch.export": lambda turns=turns: exported(ids=next(turns)),
                "onnxruntime": lambda turns=turns: session.run(["logits"], {"ids": next(turns).numpy()}),
            }
            for name, milliseconds in measure.time_in_turn(calls, seconds).items():
                latency.setdefault(name, {})[str(size)] = milliseconds
    return {"latency_ms": latency, "file_bytes": file_bytes}


def score(log: str, out: str, layout: str) -> dict[str, Any]:
    """The command `predict`: read, encode and score a raw log, and write the scores."""
    folder = Path(out)
    encode(log, f"{folder}-data")
    data = EncodedDataset.load(f"{folder}-data")
    model = DeepFM(data.schema, plan=plan_of(data.schema, layout), batch_norm=False)
    embtrim.save(model, folder, data, overwrite=True)
    bundle, options = load_bundle(folder), ReadOptions(format="csv", separator="\t")
    for _ in range(2):  # the first pass warms up
        started = time.perf_counter()
        rows = write_predictions(bundle, log, folder.with_suffix(".parquet"), options=options, overwrite=True).num_rows
        seconds = time.perf_counter() - started
    return {"rows": rows, "rows_per_s": rows / seconds}


def encode(log: str, out: str) -> dict[str, Any]:
    """Encode the log with log2 buckets, min_count 10 and a split of 8:1:1."""
    numeric = (embtrim.FieldSpec(name=n, type="numeric", transform="log2", min_count=10) for n in synthetic.NUMERIC)
    words = (embtrim.FieldSpec(name=n, min_count=10) for n in synthetic.CATEGORICAL)
    schema = embtrim.Schema(label=synthetic.LABEL, fields=(*numeric, *words))
    started = time.perf_counter()
    options = ReadOptions(format="csv", separator="\t")
    data = embtrim.encode(log, schema, out=out, options=options, overwrite=True, progress=False)
    seconds = time.perf_counter() - started
    rows = sum(data.num_rows(split) for split in data.splits)
    return {
        "rows": rows,
        "rows_per_s": rows / seconds,
        "vocabulary": sum(data.schema.tables.values()),
        "log_bytes": Path(log).stat().st_size,
    }


def read(folder: str, batch_size: int) -> dict[str, Any]:
    """Read shuffled batches from the page cache, which a first pass fills."""
    data = EncodedDataset.load(folder)
    for epoch in range(2):
        started = time.perf_counter()
        rows = sum(len(batch) for batch in data.batches("train", batch_size, shuffle_seed=epoch))
        seconds = time.perf_counter() - started
    return {"rows": rows, "rows_per_s": rows / seconds}


def train_epoch(folder: str, batch_size: int, kernels: str = "torch") -> dict[str, Any]:
    """One epoch of `fit` from disk; the parent process watches the memory."""
    used, data = use_kernels(kernels), EncodedDataset.load(folder)
    model = DeepFM(data.schema, batch_norm=False)
    result = fit(model, data, epochs=1, batch_size=batch_size, device=measure.device.type)
    return {
        "rows": data.num_rows("train"),
        "rows_per_s": result.rows_per_second,
        "precision": result.precision,
        "kernels": used,
    }


def accuracy(
    recipe: str, data: str, tables: str, precision: str, seeds: int, epochs: int | None, max_rows: int | None = None
) -> dict[str, Any]:
    """Test AUC and logloss of a recipe by seed, trained to early stopping.

    Args:
        recipe: Name of a file in recipes/, without .toml.
        data: Encoded folder.
        tables: "lazy" or "dense".
        precision: Precision, as in TrainConfig.
        seeds: Number of seeds.
        epochs: Most epochs; None for the recipe's.
        max_rows: Most rows of each split, for a quick check; None for all.
    """
    used = use_kernels("torch")
    config = RunConfig.parse(read_toml(RECIPES / f"{recipe}.toml"), where=recipe)
    train = config.train.replace(tables=tables, precision=precision, device=measure.device.type)
    train = train.replace(epochs=epochs or train.epochs)
    stored = embtrim.load(data)
    if max_rows is not None:
        splits = {n: SplitArrays(s.ids[:max_rows], s.labels[:max_rows]) for n, s in stored.splits.items()}
        stored = EncodedDataset(stored.schema, splits)
    records = [train_full(stored, config.replace(train=train, seed=seed)).record for seed in range(seeds)]
    return {
        "auc": [record.test["auc"] for record in records],
        "logloss": [record.test["logloss"] for record in records],
        "epochs": [record.epochs for record in records],
        "max_epochs": train.epochs,
        "rows_per_s": statistics.median(record.rows_per_second for record in records),
        "precision": records[0].precision,
        "kernels": used,
    }


def write_dataset(folder: Path, num_rows: int, table_rows: int) -> None:
    """Write an encoded dataset with VALID_ROWS rows for validation, drawn and written chunk by chunk."""
    sizes, rng, chunk = synthetic.table_sizes(table_rows), np.random.default_rng(0), 200_000
    splits = {"train": num_rows, "valid": VALID_ROWS}
    folder.mkdir(parents=True)
    schema = embtrim.Schema.from_sizes(sizes)
    (folder / "schema.json").write_text(json.dumps(schema.model_dump(mode="json")), "utf-8")
    (folder / "meta.json").write_text(json.dumps({"format_version": ARRAYS_VERSION, "num_rows": splits}), "utf-8")
    for split, rows in splits.items():
        (folder / split).mkdir()
        shape = (rows, synthetic.NUM_FIELDS)
        ids = np.lib.format.open_memmap(folder / split / "ids.npy", "w+", np.int32, shape)
        labels = np.lib.format.open_memmap(folder / split / "labels.npy", "w+", np.float32, (rows,))
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            ids[start:stop] = synthetic.zipf_ids(sizes, stop - start, rng)
            labels[start:stop] = synthetic.labels_of(ids[start:stop], rng)


def whole_way(out: str, commands: list[list[str]]) -> dict[str, Any]:
    """embtrim's commands one after the other, and what the last one, `run`, recorded."""
    for command in commands:
        subprocess.run([sys.executable, "-m", "embtrim", *command], check=True, stdout=subprocess.DEVNULL)
    records = {
        record["variant"]: record
        for record in (json.loads(path.read_text("utf-8")) for path in Path(out, "run", "records").glob("*.json"))
    }
    full = records.pop("full")
    (small,) = records.values()
    return {
        "auc": small["test"]["auc"],
        "full_auc": full["test"]["auc"],
        "epochs": full["epochs"],
        "small_epochs": small["epochs"],
        "table_bytes": small["table_bytes"],
        "seconds": {"full": full["train_seconds"], "search": small["search_seconds"], "small": small["train_seconds"]},
    }


KINDS = {
    f.__name__: f
    for f in (train, profile, embedding, predict, export, score, encode, read, train_epoch, accuracy, whole_way)
}

if __name__ == "__main__":
    measure.worker(KINDS)
