"""How memory and time grow: every step from a raw log to an updated bundle, at several sizes, and with many fields.

    python benchmarks/growth.py                               small sizes, minutes
    python benchmarks/growth.py --rows 250000 1000000 4000000 --values 200000 800000 3200000 --fields 250 500 1000
    python benchmarks/growth.py --steps encode fit verify     some steps only, with those whose results they need

Each step has a process of its own, of one thread. Its memory is the peak of anonymous memory (without mapped files) above
what was resident when the step began. The kernel counts the peak of all resident memory, which no sample can miss; samples
from outside say how much of it was mapped files. Where the kernel does not tell, or a step has processes of its own, the
peak is that of the samples. T is the bytes of the full fp32 tables: values and first-order weights. An exponent compares a step with the size before: 1 is growth in proportion. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED, STOPPED = "STARTED", "STOPPED"
SAMPLE_SECONDS = 0.005
NUM_FIELDS, WIDTH = 20, 16
# Rows of each field's table in the growth with fields, columns that the plan keeps there, and rows of a batch.
FIELD_ROWS, FIELD_WIDTH, BATCH_ROWS = 20, 8, 256
BUDGET = "10%"


# ---- the log -----------------------------------------------------------------------------------------------------------


def write_log(path: Path, num_rows: int, num_values: int, seed: int = 0) -> None:
    """A parquet of 20 fields with that many distinct values together, each of which occurs; half of the fields are text."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, NUM_FIELDS + 1)
    sizes = np.clip(shares / shares.sum() * num_values, 2, num_rows).astype(int)
    columns: dict[str, Any] = {}
    logit_N = np.zeros(num_rows)
    for number, size in enumerate(sizes):
        ids_N = np.concatenate([np.arange(size), (rng.random(num_rows - size) ** 3 * size).astype(np.int64)])
        rng.shuffle(ids_N)
        logit_N += (ids_N % 7 - 3.0) * 0.1
        values = pl.Series(ids_N * 7919)
        columns[f"f{number:02}"] = values if number % 2 else pl.Series(["v"]) + values.cast(pl.String)
    click_N = (rng.random(num_rows) < 1 / (1 + np.exp(-logit_N))).astype(np.int8)
    pl.DataFrame({"click": click_N, **columns}).write_parquet(path)


# ---- in the process that is measured -----------------------------------------------------------------------------------


@contextmanager
def measured() -> Iterator[None]:
    """The part of a step that counts: its CPU seconds, window of time and peak go to the process that watches."""
    import measure
    from embtrim.system.memory import release_free_memory

    release_free_memory()
    is_counted, own = measure.forget_peak(), os.getpid()
    spent = sum(os.times()[:4])
    print(STARTED, json.dumps([time.monotonic(), *measure.resident_bytes(own)]), flush=True)
    yield
    spent, stopped = sum(os.times()[:4]) - spent, time.monotonic()
    peak, mapped = measure.peak_resident_bytes() if is_counted else 0, measure.resident_bytes(own)[1]
    print(STOPPED, json.dumps([stopped, spent, peak, mapped]), flush=True)


def import_all(step: str) -> None:
    """Import what a step imports on first use, so that it does not count as the step's."""
    import embtrim

    if step.startswith("export"):
        import onnx  # noqa: F401

    for name in embtrim.__all__:
        getattr(embtrim, name)


def encode(folder: Path) -> None:
    import embtrim

    with measured():
        embtrim.encode(folder / "log.parquet", label="click", out=folder / "data", progress=False)


def fit(folder: Path) -> None:
    import embtrim

    data = embtrim.load(folder / "data")
    model = embtrim.models.DeepFM(data.schema, embedding_dim=WIDTH, hidden_units=(64,))
    with measured():
        embtrim.fit(model, data, embtrim.TrainConfig(epochs=1))
    embtrim.save(model, folder / "full", data)


def save(folder: Path) -> None:
    import embtrim

    model, data = opened(folder)
    with measured():
        embtrim.save(model, folder / "saved", data)


def load(folder: Path) -> None:
    import embtrim

    with measured():
        embtrim.load_bundle(folder / "full")


def pme(folder: Path) -> None:
    search(folder, "pme")


def guided(folder: Path) -> None:
    search(folder, "guided")


def search(folder: Path, method: str) -> None:
    import embtrim
    from embtrim.methods import method_named

    model, data = opened(folder)
    task = embtrim.CTRTask(model, data)
    with measured():
        plan = embtrim.search(task, method_named(method).parse({}), BUDGET)
    plan.save(folder / f"{method}.json")


def load_plan(folder: Path) -> None:
    import embtrim

    with measured():
        embtrim.SizePlan.load(folder / "pme.json")


def compact(folder: Path) -> None:
    import embtrim

    model, _ = opened(folder)
    plan = embtrim.SizePlan.load(folder / "guided.json")
    with measured():
        embtrim.compact(model, plan, init="inherit")


def verify(folder: Path, method: str = "guided") -> None:
    import embtrim

    model, data = opened(folder)
    plan = embtrim.SizePlan.load(folder / f"{method}.json")
    with measured():
        embtrim.verify(model, plan, data).require()


def verify_pme(folder: Path) -> None:
    verify(folder, "pme")


def quantize(folder: Path) -> None:
    import embtrim

    model, _ = opened(folder)
    small = embtrim.compact(model, plan_of_eight_bits(model), init="inherit")
    del model
    with measured():
        embtrim.quantize_(small)


def export_onnx(folder: Path) -> None:
    export(folder, "onnx")


def export_pt2(folder: Path) -> None:
    export(folder, "pt2")


def export(folder: Path, form: str) -> None:
    import embtrim

    bundle = embtrim.load_bundle(folder / "full")
    with measured():
        embtrim.export(bundle, form, folder / f"served_{form}")  # type: ignore[arg-type]


def update(folder: Path) -> None:
    import embtrim

    with measured():
        embtrim.update(folder / "full", folder / "later.parquet", out=folder / "updated", train={"epochs": 1})


def opened(folder: Path) -> tuple[Any, Any]:
    """The full model and its data."""
    import embtrim

    return embtrim.load_bundle(folder / "full").model, embtrim.load(folder / "data")


def plan_of_eight_bits(model: Any) -> Any:
    """The plan that keeps everything, in 8 bits."""
    import embtrim

    return embtrim.SizePlan.full(model.schema, model.tables.width, model.has_first_order).with_bits(8)


# ---- many fields -------------------------------------------------------------------------------------------------------


def fields_build(folder: Path) -> None:
    import embtrim

    schema = field_schema(folder)
    with measured():
        embtrim.models.DeepFM(schema, embedding_dim=WIDTH, hidden_units=(64,))


def fields_compact(folder: Path) -> None:
    import embtrim

    model = field_model(folder)
    plan = projected(model)
    with measured():
        embtrim.compact(model, plan, init="inherit")


def fields_verify(folder: Path) -> None:
    import embtrim

    model = field_model(folder)
    plan, data = projected(model), embtrim.load(folder / "data")
    with measured():
        embtrim.verify(model, plan, data, max_rows=BATCH_ROWS).require()


def fields_load(folder: Path) -> None:
    import embtrim

    model = embtrim.compact(field_model(folder), projected(field_model(folder)), init="inherit")
    embtrim.save(model, folder / "compact", embtrim.load(folder / "data"))
    with measured():
        embtrim.load_bundle(folder / "compact")


def fields_check_budget(folder: Path) -> None:
    import embtrim
    from embtrim.plan.budget_limits import check_budget

    full = embtrim.SizePlan.full(field_schema(folder), WIDTH, first_order=True)
    with measured():
        check_budget(full, embtrim.Budget.parse(BUDGET))


def fields_step(folder: Path) -> None:
    """Forward and backward of one batch through projected tables."""
    import embtrim
    from embtrim.training.evaluation import logloss_of_batch

    model = embtrim.compact(field_model(folder), projected(field_model(folder)), init="inherit")
    batch = next(iter(embtrim.load(folder / "data").batches("train", BATCH_ROWS)))
    with measured():
        logloss_of_batch(model, batch).backward()


def field_schema(folder: Path) -> Any:
    import embtrim

    return embtrim.load(folder / "data").schema


def field_model(folder: Path) -> Any:
    import embtrim

    return embtrim.models.DeepFM(field_schema(folder), embedding_dim=WIDTH, hidden_units=(64,), batch_norm=False)


def projected(model: Any) -> Any:
    """The plan that keeps the first columns of every table and projects them."""
    import embtrim

    full = embtrim.SizePlan.full(model.schema, WIDTH, first_order=True)
    return full.with_columns({table.name: range(FIELD_WIDTH) for table in full.tables}, "project")


def write_field_data(folder: Path, num_fields: int) -> None:
    """Encoded data of many fields."""
    import numpy as np
    import polars as pl

    import embtrim

    rng = np.random.default_rng(0)
    num_rows = 10 * BATCH_ROWS
    columns = {f"f{i:04}": rng.integers(FIELD_ROWS, size=num_rows) for i in range(num_fields)}
    log = pl.DataFrame({"click": rng.integers(2, size=num_rows), **columns})
    embtrim.encode(log, label="click", out=folder / "data", progress=False)


# ---- in the process that watches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One line of a table.

    Attributes:
        run: What the process does.
        needs: Steps whose results it reads.
    """

    run: Callable[[Path], None]
    needs: tuple[str, ...] = ()


STEPS = {
    "encode": Step(encode),
    "fit": Step(fit, ("encode",)),
    "save": Step(save, ("encode", "fit")),
    "load": Step(load, ("encode", "fit")),
    "search pme": Step(pme, ("encode", "fit")),
    "load the plan of pme": Step(load_plan, ("encode", "fit", "search pme")),
    "verify pme": Step(verify_pme, ("encode", "fit", "search pme")),
    "search guided": Step(guided, ("encode", "fit")),
    "compact": Step(compact, ("encode", "fit", "search guided")),
    "verify": Step(verify, ("encode", "fit", "search guided")),
    "quantize": Step(quantize, ("encode", "fit")),
    "export onnx": Step(export_onnx, ("encode", "fit")),
    "export pt2": Step(export_pt2, ("encode", "fit")),
    "update": Step(update, ("encode", "fit")),
}
FIELD_STEPS = {
    "build": Step(fields_build),
    "compact": Step(fields_compact),
    "verify": Step(fields_verify),
    "load": Step(fields_load),
    "check_budget": Step(fields_check_budget),
    "training step": Step(fields_step),
}


@dataclass(frozen=True)
class Result:
    """What a step took: CPU seconds, and peak bytes above what was resident."""

    seconds: float
    peak: int


def watched(steps: str, name: str, folder: Path) -> Result:
    """Run a step in a process of its own and sample the memory of that process."""
    import measure

    command = [sys.executable, __file__, "--worker", steps, name, str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    samples: list[tuple[float, int, int]] = []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=env, stdout=output)
        while process.poll() is None:
            of_processes = [measure.resident_bytes(pid) for pid in measure.family(process.pid)]
            samples.append((time.monotonic(), sum(anonymous for anonymous, _ in of_processes), of_processes[0][1]))
            time.sleep(SAMPLE_SECONDS)
        output.seek(0)
        said = dict(line.split(" ", 1) for line in output.read().splitlines() if line.startswith((STARTED, STOPPED)))
    if process.returncode or len(said) < 2:
        sys.exit(f"step {name!r} ended with {process.returncode}; its message is above")
    start, resident, mapped_before = json.loads(said[STARTED])
    stop, seconds, peak, mapped_after = json.loads(said[STOPPED])
    within = [(anonymous, mapped) for t, anonymous, mapped in samples if start <= t <= stop]
    sampled = max((anonymous for anonymous, _ in within), default=resident)
    most_mapped = max(mapped_before, mapped_after, *(mapped for _, mapped in within))
    return Result(seconds, max(sampled, peak - most_mapped) - resident)


def full_bytes(folder: Path) -> tuple[int, int]:
    """T, and the rows of all tables."""
    fields = json.loads((folder / "data" / "schema.json").read_text())["fields"]
    rows = sum(field["vocab_size"] for field in fields)
    return 4 * rows * (WIDTH + 1), rows


def exponent(now: float, before: float | None, ratio: float) -> str:
    """The power of the size by which something grew."""
    if before is None or min(now, before) <= 0 or ratio <= 1:
        return ""
    return f"{math.log(now / before) / math.log(ratio):.2f}"


def with_needs(names: list[str]) -> list[str]:
    """The steps to run: those asked for and those whose results they read, in order."""
    wanted = {*names, *(need for name in names for need in STEPS[name].needs)}
    return [name for name in STEPS if name in wanted]


def measure_sizes(given: argparse.Namespace) -> None:
    """Print the table of the growth with the log."""
    names = with_needs(given.steps or list(STEPS))
    print(
        "| step | rows | table rows | peak, MB | peak / T | CPU s | exponent of memory | of time |\n" + "|---" * 8 + "|"
    )
    before: dict[str, tuple[int, Result]] = {}
    for num_rows, num_values in zip(given.rows, given.values, strict=True):
        with tempfile.TemporaryDirectory(prefix="embtrim-growth-") as place:
            folder = Path(place)
            write_log(folder / "log.parquet", num_rows, num_values)
            if "update" in names:
                write_log(folder / "later.parquet", num_rows, num_values * 11 // 10, seed=1)  # a tenth is new
            for name in names:
                found = watched("size", name, folder)
                table_bytes, table_rows = full_bytes(folder)
                rows_before, last = before.get(name, (num_rows, None))
                ratio = num_rows / rows_before
                print(
                    f"| {name} | {num_rows:,} | {table_rows:,} | {found.peak / 1e6:,.0f} | {found.peak / table_bytes:.1f} | "
                    f"{found.seconds:.2f} | {exponent(found.peak, last and last.peak, ratio)} | "
                    f"{exponent(found.seconds, last and last.seconds, ratio)} |",
                    flush=True,
                )
                before[name] = (num_rows, found)


def measure_fields(given: argparse.Namespace) -> None:
    """Print the table of the growth with the number of fields."""
    print("\n| step | fields | peak, MB | CPU s | exponent of memory | of time |\n" + "|---" * 6 + "|")
    before: dict[str, tuple[int, Result]] = {}
    for num_fields in given.fields:
        with tempfile.TemporaryDirectory(prefix="embtrim-growth-") as place:
            folder = Path(place)
            write_field_data(folder, num_fields)
            for name in FIELD_STEPS:
                found = watched("fields", name, folder)
                fields_before, last = before.get(name, (num_fields, None))
                ratio = num_fields / fields_before
                print(
                    f"| {name} | {num_fields:,} | {found.peak / 1e6:,.0f} | {found.seconds:.2f} | "
                    f"{exponent(found.peak, last and last.peak, ratio)} | "
                    f"{exponent(found.seconds, last and last.seconds, ratio)} |",
                    flush=True,
                )
                before[name] = (num_fields, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[25_000, 100_000], help="Rows of the logs.")
    parser.add_argument("--values", type=int, nargs="*", default=[20_000, 80_000], help="Distinct values of each log.")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), help="Steps to measure, instead of all.")
    parser.add_argument("--fields", type=int, nargs="*", default=[125, 250], help="Numbers of fields; none skips them.")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        kind, name, folder = given.worker
        import_all(name)
        (STEPS if kind == "size" else FIELD_STEPS)[name].run(Path(folder))
        return
    if len(given.rows) != len(given.values):
        parser.error(f"--rows has {len(given.rows)} sizes and --values {len(given.values)}; give as many of each")
    if given.rows:
        measure_sizes(given)
    if given.fields:
        measure_fields(given)


if __name__ == "__main__":
    main()
