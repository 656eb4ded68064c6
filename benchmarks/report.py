"""Tables and goals from the results of the suite, as Markdown.

python benchmarks/report.py benchmarks/results/bench/bench.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GB = 1e9
# Fewer runs than this do not give a median worth quoting.
RUNS = 5
# Each setting's accuracy is compared with another's: first lazy with dense tables, then auto with fp32 precision.
NOISE = {"lazy fp32": "dense fp32", "lazy auto": "lazy fp32"}
# Microseconds of a DeepFM at batch 1 on two cores of an AVX512+BF16 server: the best prototypes took 29 in onnxruntime (of
# 29 to 58) and 70 in eager mode (of 70 to 240). Only the ratio carries over to other machines.
ONNX_OVER_EAGER = 29 / 70


# ---- summary -----------------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of every number over the repeats, by key.

    A key whose runs all failed has an `error`. Timed steps have a `step_ms_range` too, and the accuracies that NOISE
    compares have a `difference_over_spread`.
    """
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_key.setdefault(run["key"], []).append(run)
    summary = {}
    for key, repeats in by_key.items():
        good = [run for run in repeats if "error" not in run]
        summary[key] = median_of(good or repeats[:1])
        steps = [run["step_ms"] for run in good if "step_ms" in run]
        if steps:
            summary[key]["step_ms_range"] = [min(steps), max(steps)]
    for key, entry in summary.items():
        group, _, cell = key.rpartition("/")
        other = summary.get(f"{group}/{NOISE.get(cell)}", {})
        if min(len(entry.get("auc", ())), len(other.get("auc", ()))) > 1:
            entry["difference_over_spread"] = difference_over_spread(entry["auc"], other["auc"])
    return summary


def difference_over_spread(auc: Sequence[float], other: Sequence[float]) -> float:
    """Difference of two means over the pooled standard deviation of their seeds; at most 1 is noise."""
    difference = abs(statistics.mean(auc) - statistics.mean(other))
    spread = statistics.mean(map(statistics.variance, (auc, other))) ** 0.5
    return difference / spread if spread else math.inf


def median_of(values: Sequence[Any]) -> Any:
    """The median of numbers; in a dict, of each entry; for anything else the first value."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: median_of([value[key] for value in values if key in value]) for key in first}
    if isinstance(first, int | float) and not isinstance(first, bool):
        return statistics.median(values)
    return first


# ---- goals -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A number that the suite must show.

    Attributes:
        text: What is compared.
        of: Place of the number in the summary: a key, then names inside its entry.
        over: Place of the number to divide by, or the divisor itself; None does not divide.
        at_least: Smallest value that meets the goal, or None.
        at_most: Largest value that meets the goal, or None.
    """

    text: str
    of: tuple[str, ...]
    over: tuple[str, ...] | float | None = None
    at_least: float | None = None
    at_most: float | None = None


def _step(size: str, contender: str) -> tuple[str, str]:
    return f"train/{size}/{contender}", "step_ms"


def _latency(contender: str, batch_size: int) -> tuple[str, str, str]:
    return f"predict/{contender}", "latency_ms", str(batch_size)


_FUXICTR = "FuxiCTR DeepFM as shipped"
_MIXED = "embtrim mixed widths auto"
_ENCODE, _ENCODE_PEER = "encode/embtrim", "encode/FuxiCTR preprocessing"

GOALS = (
    *(
        Goal(f"step at {size} tables: FuxiCTR as shipped over {ours}", _step(size, _FUXICTR), _step(size, ours), at_least=n)
        for size, ours, n in (
            ("middle", "embtrim width 16 fp32", 10),
            ("middle", "embtrim width 16 fp32 [fast]", 10),
            ("middle", "embtrim width 16 auto", 17),
            ("middle", _MIXED, 25),
            ("middle", f"{_MIXED} [fast]", 30),
            ("small", "embtrim width 16 fp32", 3),
            ("small", "embtrim width 16 fp32 [fast]", 3),
            ("small", "embtrim width 16 auto", 4.5),
        )
    ),
    *(
        Goal(f"step at {size} tables, {same}: FBGEMM over embtrim",
             _step(size, f"FBGEMM {same}"), _step(size, f"embtrim {same}"), at_least=1)
        for size in ("small", "middle")
        for same in ("width 16 fp32", "width 16 auto", "mixed widths auto")
    ),
    *(
        Goal(f"step at {size} tables, {same}: torchrec over embtrim",
             _step(size, f"torchrec {same}"), _step(size, f"embtrim {same}"), at_least=1)
        for size in ("small", "middle")
        for same in ("width 16 fp32", "width 16 auto")
    ),
    *(
        Goal(f"embeddings alone, {layout}: embtrim (Adam) over FBGEMM (row-wise Adagrad)",
             (f"embedding/{layout}/embtrim adam", "step_ms"), (f"embedding/{layout}/FBGEMM adagrad", "step_ms"), at_most=1.5)
        for layout in ("width 16", "mixed widths")
    ),
    *(
        Goal(f"embeddings alone, {layout}: embtrim (Adam) [fast] over FBGEMM (row-wise Adagrad)",
             (f"embedding/{layout}/embtrim adam [fast]", "step_ms"), (f"embedding/{layout}/FBGEMM adagrad", "step_ms"), at_most=1)
        for layout in ("width 16", "mixed widths")
    ),
    *(
        Goal(f"step, {same}: large over small tables", _step("large", f"embtrim {same}"), _step("small", f"embtrim {same}"),
             at_most=1.2)
        for same in ("width 16 auto", "mixed widths auto", "mixed widths auto [fast]")
    ),
    Goal("bf16 floor over the step at middle tables, mixed widths", ("floors", "floor_ms", "mixed bf16"),
         _step("middle", _MIXED), at_least=0.5),
    Goal("bf16 floor over the step at middle tables, mixed widths [fast]", ("floors", "floor_ms", "mixed bf16"),
         _step("middle", f"{_MIXED} [fast]"), at_least=0.6),
    Goal("step at middle tables: full over compact at 10%", _step("middle", "embtrim width 16 auto"),
         _step("middle", "embtrim compact 10% auto"), at_least=1.3),
    *(
        Goal(f"minor page faults per step at middle tables, {same}", (f"profile/embtrim {same}", "page_faults"), at_most=100)
        for same in ("width 16 auto", "width 16 auto [fast]", "mixed widths auto", "mixed widths auto [fast]")
    ),
    Goal("encoding, rows/s: embtrim over FuxiCTR", (_ENCODE, "rows_per_s"), (_ENCODE_PEER, "rows_per_s"), at_least=8),
    Goal("encoding, rows/s: embtrim over FuxiCTR, with [fast], which encoding does not use", (_ENCODE, "rows_per_s"),
         (_ENCODE_PEER, "rows_per_s"), at_least=10),
    Goal("encoding: peak anonymous memory, GB", (_ENCODE, "peak_bytes"), GB, at_most=2),
    Goal("encoding the big log: peak anonymous memory, GB", (f"{_ENCODE}, big log", "peak_bytes"), GB, at_most=2),
    Goal("training: peak anonymous memory, largest over smallest log", ("read/fit/largest log", "peak_bytes"),
         ("read/fit/smallest log", "peak_bytes"), at_most=1.1),
    Goal("reading shuffled batches: million rows/s", ("read/shuffled batches", "rows_per_s"), 1e6, at_least=5),
    Goal("inference at batch 4096: full over compact", _latency("embtrim full", 4096),
         _latency("embtrim compact 10%", 4096), at_least=1.5),
    Goal("inference at batch 1: full over compact", _latency("embtrim full", 1), _latency("embtrim compact 10%", 1),
         at_least=1),
    *(
        Goal(f"inference at batch 1, {label}: onnxruntime over eager", (f"export/{label}", "latency_ms", "onnxruntime", "1"),
             (f"export/{label}", "latency_ms", "eager", "1"), at_most=2 * ONNX_OVER_EAGER)
        for label in ("full", "mixed widths", "compact 10%")
    ),
    *(
        Goal(f"test AUC, {recipe}: {cell} from {other}, difference of means over spread of seeds",
             (f"accuracy/{recipe}/{cell}", "difference_over_spread"), at_most=1)
        for recipe in ("frappe-64", "movielens-64")
        for cell, other in NOISE.items()
    ),
)  # fmt: skip


def judge(goal: Goal, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a goal with the measurements.

    Returns:
        `value`; `verdict`, which is "met", "missed" or "not measured"; `margin`, 1 or more if the goal is met (value over
        goal, or goal over value for an upper bound); `why`, the reason if nothing was measured.
    """
    value = _number(goal.of, summary)
    over = _number(goal.over, summary) if isinstance(goal.over, tuple) else goal.over or 1.0
    if value is None or not over:
        keys = [place[0] for place in (goal.of, goal.over) if isinstance(place, tuple)]
        reasons = [f"{key}: {summary.get(key, {}).get('error', 'not run')}" for key in keys]
        missing = [r for key, r in zip(keys, reasons, strict=True) if "error" in summary.get(key, {"error": ""})]
        return {"value": None, "verdict": "not measured", "margin": None, "why": "; ".join(missing)}
    value /= over
    if goal.at_least is not None:
        margin = value / goal.at_least
    else:
        margin = (goal.at_most or 0) / value if value else math.inf
    return {"value": value, "verdict": "met" if margin >= 1 else "missed", "margin": margin, "why": ""}


def _number(place: tuple[str, ...], summary: Mapping[str, Any]) -> float | None:
    entry: Any = summary
    for name in place:
        entry = entry.get(name) if isinstance(entry, Mapping) else None
    return entry


# ---- markdown ----------------------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """All sections, in Markdown."""
    summary, scale = summarise(results["runs"]), results["settings"]["scale"]
    sections = [
        "# Benchmarks\n\nWritten by `make bench`; docs/benchmarks.md says what is measured and how.",
        _machine(results),
        _goals(summary, scale),
        _steps(summary, scale),
        _real(summary, scale),
        _embedding(summary),
        _floors(summary),
        _encoding(summary),
        _reading(summary),
        _inference(summary),
        _exports(summary),
        _scoring(summary),
        _profiles(summary),
        accuracies(summary),
        _missing(summary),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def warnings(results: Mapping[str, Any]) -> list[str]:
    """Reasons to doubt these figures."""
    machine, settings, reasons = results["machine"], results["settings"], []
    if settings["quick"]:
        reasons.append("Tiny sizes (`--quick`): these figures only show that the suite runs.")
    if machine["load"] > 0.5:
        reasons.append(f"The load was {machine['load']:.1f} before the start: the machine was not quiet.")
    if machine["env"].get("OMP_WAIT_POLICY"):
        reasons.append(
            f"OMP_WAIT_POLICY was {machine['env']['OMP_WAIT_POLICY']}, which slows some contenders more than others; unset it."
        )
    if any("modified" in run["commit"] for run in results["runs"]):
        reasons.append("The working tree was modified.")
    repeats = settings["repeats"]
    counts = Counter(run["key"] for run in results["runs"] if "error" not in run)
    few = sorted({f"{key.rpartition('/')[0] or key} ({n})" for key, n in counts.items() if n < RUNS})
    if repeats < RUNS:
        reasons.append(f"{repeats} repeats: quote a median only from {RUNS} or more.")
    elif few:
        reasons.append(f"Fewer than {RUNS} runs, too few to quote a median: {', '.join(few)}.")
    versions = {run["torch"] for run in results["runs"] if "torch" in run}
    if len(versions) > 1:
        reasons.append(f"Contenders ran with different torch versions: {', '.join(sorted(versions))}.")
    return reasons


def _machine(results: Mapping[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    env = ", ".join(f"{k}={v}" for k, v in machine["env"].items()) or "none set"
    rows = [
        ("processor", machine["processor"]),
        ("threads", str(settings["threads"])),
        ("device", machine["device"]),
        ("memory", f"{machine['memory_bytes'] / GB:.0f} GB"),
        ("system", machine["system"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items())),
        ("embtrim commit", _commits(results["runs"])),
        ("thread settings", env),
        *(
            (f"embtrim's {name}", f"{'bf16 autocast' if here['bf16'] else 'fp32'}, float32 matmuls {here['matmul']!r}")
            for name, here in machine["precisions"].items()
        ),
        ("started", machine["started"]),
        ("repeats", str(settings["repeats"])),
    ]
    notes = "".join(f"\n- **{text}**" for text in warnings(results))
    return table(("machine", ""), rows) + (f"\n{notes}" if notes else "")


def _commits(runs: Sequence[Mapping[str, Any]]) -> str:
    """Each commit with the workloads that were measured on it."""
    workloads_by_commit: dict[str, list[str]] = {}
    for run in runs:
        workloads, workload = workloads_by_commit.setdefault(run["commit"], []), run["key"].partition("/")[0]
        workloads.extend([workload] * (workload not in workloads))
    return "; ".join(f"{commit}: {', '.join(workloads)}" for commit, workloads in workloads_by_commit.items())


def _goals(summary: Mapping[str, Any], scale: Mapping[str, Any]) -> str:
    small, middle, large = scale["table_rows"]
    sizes = f"Tables are small ({small:,} rows in all), middle ({middle:,}) or large ({large:,})."
    rows = []
    for goal in GOALS:
        judged = judge(goal, summary)
        bound = f"≥ {goal.at_least:g}" if goal.at_least is not None else f"≤ {goal.at_most:g}"
        verdict = judged["verdict"]
        if judged["value"] is not None:
            verdict += f" by {abs(judged['margin'] - 1):.0%}" if math.isfinite(judged["margin"]) else ""
        rows.append((goal.text, bound, _figure(judged["value"]) or judged["why"], verdict))
    return f"## Goals\n\n{sizes}\n\n{table(('goal', 'asked', 'measured', 'verdict'), rows)}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _ms(entry: Mapping[str, Any], name: str) -> str:
    return f"{entry[name]:.2f}" if name in entry else ""


def _range(entry: Mapping[str, Any]) -> str:
    low, high = entry["step_ms_range"]
    return f"{low:.2f} to {high:.2f}"


def _memory(entry: Mapping[str, Any]) -> str:
    """Peak memory in GB: the device's, or on the CPU the process's anonymous memory."""
    return f"{entry.get('device_peak_bytes', entry['peak_bytes']) / GB:.2f}"


def _mapped(entry: Mapping[str, Any]) -> str:
    return f"{entry['peak_file_bytes'] / GB:.2f}" if "peak_file_bytes" in entry else ""


def _bandwidth(entry: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Share of the memory bandwidth that a step uses for its tables."""
    peak = summary.get("floors", {}).get("copied_bytes_per_s")
    return f"{1000 * entry['table_bytes'] / entry['step_ms'] / peak:.1%}" if peak else ""


def _good(summary: Mapping[str, Any], prefix: str) -> dict[str, Mapping[str, Any]]:
    """Measured entries whose key starts with the prefix, by the rest of the key."""
    return {
        key.removeprefix(prefix): entry
        for key, entry in summary.items()
        if key.startswith(prefix) and "error" not in entry
    }


def _steps(summary: Mapping[str, Any], scale: Mapping[str, Any]) -> str:
    sections = []
    for size, table_rows in zip(("small", "middle", "large"), scale["table_rows"], strict=True):
        title = f"## Training step, {size} tables: {table_rows:,} rows, batch {scale['batch_size']:,}"
        sections.append(_step_table(title, f"train/{size}/", summary, scale))
    return "\n\n".join(filter(None, sections))


def _real(summary: Mapping[str, Any], scale: Mapping[str, Any]) -> str:
    names = dict.fromkeys(key.split("/")[1] for key in summary if key.startswith("real/"))
    titles = {name: f"## Training step, {name}, batch {scale['batch_size']:,}" for name in names}
    sections = [_step_table(title, f"real/{name}/", summary, scale) for name, title in titles.items()]
    return "\n\n".join(filter(None, sections))


def _step_table(title: str, prefix: str, summary: Mapping[str, Any], scale: Mapping[str, Any]) -> str:
    contenders = _good(summary, prefix)
    reference = contenders.get(_FUXICTR, {}).get("step_ms")
    rows = [
        (
            name,
            entry["precision"],
            _ms(entry, "step_ms"),
            _range(entry),
            f"{1000 * scale['batch_size'] / entry['step_ms']:,.0f}",
            _bandwidth(entry, summary),
            *(_ms(entry, part) for part in ("forward_ms", "backward_ms", "update_ms")),
            _memory(entry),
            f"{reference / entry['step_ms']:.1f}" if reference else "",
        )
        for name, entry in sorted(contenders.items(), key=lambda item: item[1]["step_ms"])
    ]
    head = ("contender", "precision", "ms per step", "range", "rows/s", "share of bandwidth", "forward", "backward", "update",
            "peak GB", "speed over FuxiCTR's")  # fmt: skip
    compiled = [
        f"\n\n{n}: {e['compile_seconds']:.0f} s for the first step."
        for n, e in contenders.items()
        if "compile_seconds" in e
    ]
    return f"{title}\n\n{table(head, rows)}{''.join(compiled)}" if rows else ""


def _embedding(summary: Mapping[str, Any]) -> str:
    contenders = _good(summary, "embedding/")
    parts = ("forward_ms", "backward_ms", "update_ms")
    rows = [
        (n.replace("/", ": "), _ms(e, "step_ms"), _range(e), _bandwidth(e, summary), *(_ms(e, p) for p in parts))
        for n, e in contenders.items()
    ]
    head = ("contender", "ms per step", "range", "share of bandwidth", "forward", "backward", "update")
    return f"## Embeddings alone, middle tables: lookup, backward, update\n\n{table(head, rows)}" if rows else ""


def _floors(summary: Mapping[str, Any]) -> str:
    if "floor_ms" not in summary.get("floors", {}):
        return ""
    measured = summary["floors"]
    rates = [
        (f"{name} rows", f"{rate['reads'] / 1e6:.0f}", f"{rate['updates'] / 1e6:.0f}")
        for name, rate in measured["rows"].items()
    ]
    rows = [
        (name, f"{entry['gflops']:.0f}", f"{entry['ms']:.2f}", f"{measured['floor_ms'][name]:.2f}")
        for name, entry in measured["matmul"].items()
    ]
    return "\n\n".join(
        [
            "## Floors of a step",
            table(("MLP's matmuls", "GFLOP/s", "ms", "floor of the step, ms"), rows),
            table(("random access", "million reads/s", "million updates (weight, two moments)/s"), rates),
            f"Memory bandwidth of a copy, counting reads and writes: {measured['copied_bytes_per_s'] / GB:.1f} GB/s.",
        ]
    )


def _encoding(summary: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            f"{e['rows']:,.0f}",
            f"{e['log_bytes'] / GB:.2f}",
            f"{e['rows_per_s']:,.0f}",
            _memory(e),
            _mapped(e),
            f"{e['vocabulary']:,.0f}",
        )
        for name, e in _good(summary, "encode/").items()
    ]
    head = ("contender", "rows", "GB", "rows/s", "peak anonymous GB", "peak GB of files", "vocabulary")
    return f"## Encoding a log\n\n{table(head, rows)}" if rows else ""


def _reading(summary: Mapping[str, Any]) -> str:
    rows = [
        (
            name.replace("fit/", "an epoch of fit, "),
            f"{e['rows']:,.0f}",
            e.get("kernels", ""),
            f"{e['rows_per_s']:,.0f}",
            f"{e['peak_bytes'] / GB:.3f}",
            _mapped(e),
        )
        for name, e in _good(summary, "read/").items()
    ]
    head = ("job", "rows", "kernels", "rows/s", "peak anonymous GB", "peak GB of files")
    return f"## Reading and training from disk\n\n{table(head, rows)}" if rows else ""


def _inference(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in _good(summary, "predict/").items():
        latency = entry["latency_ms"]
        largest = max(latency, key=int)
        rows.append((name, *(f"{ms:.3f}" for ms in latency.values()), f"{1000 * int(largest) / latency[largest]:,.0f}"))
    if not rows:
        return ""
    sizes = next(iter(_good(summary, "predict/").values()))["latency_ms"]
    head = ("model", *(f"ms at batch {size}" for size in sizes), f"rows/s at {max(sizes, key=int)}")
    return f"## Inference, middle tables\n\n{table(head, rows)}"


def _exports(summary: Mapping[str, Any]) -> str:
    entries, rows = _good(summary, "export/"), []
    full = entries.get("full", {}).get("file_bytes", {})
    for name, entry in entries.items():
        files = entry.get("file_bytes", {})
        for runtime, latency in entry["latency_ms"].items():
            size, full_size = files.get(runtime), full.get(runtime)
            rows.append(
                (
                    name,
                    runtime,
                    *(f"{ms:.3f}" for ms in latency.values()),
                    f"{size / 1e6:.2f}" if size else "",
                    f"{size / full_size:.1%}" if size and full_size else "",
                )
            )
    if not rows:
        return ""
    sizes = next(iter(next(iter(entries.values()))["latency_ms"].values()))
    head = (
        "model",
        "runtime",
        *(f"ms at batch {size}" for size in sizes),
        "MB of files",
        "share of the full model's files",
    )
    return f"## Exported models on the CPU, middle tables\n\n{table(head, rows)}"


def _scoring(summary: Mapping[str, Any]) -> str:
    entries = _good(summary, "score/").items()
    rows = [(name, f"{e['rows']:,.0f}", f"{e['rows_per_s']:,.0f}") for name, e in entries]
    head = ("model", "rows", "rows/s")
    return f"## From a raw log to scores: the verb `predict`\n\n{table(head, rows)}" if rows else ""


def _profiles(summary: Mapping[str, Any]) -> str:
    sections = []
    for name, entry in _good(summary, "profile/").items():
        rows = [
            (f"`{e['operator']}`", f"{e['self_ms']:.2f}", f"{e['share']:.0%}", f"{e['calls']:.0f}")
            for e in entry["top"]
        ]
        head = ("operator", "own ms per step", "share", "calls per step")
        allocations = [
            (f"`{e['operator']}`", f"{e['bytes'] / 1e6:.2f}", f"{e['calls']:.0f}") for e in entry["allocations"]
        ]
        sections += [
            f"## Profile of a step: {name}, {entry['precision']}",
            table(head, rows),
            f"Time outside torch's own operators, in Python, autograd and the fused kernels: {entry['outside']:.0%} of {entry['step_ms']:.2f} ms."
            + (f" Minor page faults per step: {entry['page_faults']:,.0f}." if "page_faults" in entry else ""),
            table(("largest allocations", "own MB per step", "calls per step"), allocations),
        ]
    return "\n\n".join(sections)


def accuracies(summary: Mapping[str, Any]) -> str:
    """Test AUC by tables and precision, each with a verdict on its difference from the setting that NOISE names."""
    rows = []
    for name, entry in _good(summary, "accuracy/").items():
        ratio = entry.get("difference_over_spread")
        verdict = "" if ratio is None else f"{ratio:.2f}: {'within' if ratio <= 1 else 'beyond'} seed noise"
        early = all(epochs < entry["max_epochs"] for epochs in entry["epochs"])
        rows.append(
            (
                name.replace("/", ": "),
                entry["precision"],
                ", ".join(f"{auc:.5f}" for auc in entry["auc"]),
                f"{statistics.mean(entry['auc']):.5f}",
                f"{statistics.stdev(entry['auc']):.5f}" if len(entry["auc"]) > 1 else "",
                f"{statistics.mean(entry['logloss']):.4f}",
                ", ".join(map(str, entry["epochs"])) + ("" if early else " (not all stopped early)"),
                f"{entry['rows_per_s']:,.0f}",
                verdict,
            )
        )
    head = ("tables, precision", "computed in", "test AUC by seed", "mean", "spread", "logloss", "epochs", "rows/s",
            "difference of means over spread")  # fmt: skip
    against = ", ".join(f"{cell} with {other}" for cell, other in NOISE.items())
    return f"## Accuracy\n\nCompared: {against}.\n\n{table(head, rows)}" if rows else ""


def _missing(summary: Mapping[str, Any]) -> str:
    rows = [(key, entry["error"].replace("|", "/")) for key, entry in summary.items() if "error" in entry]
    return f"## Not measured\n\n{table(('job', 'why'), rows)}" if rows else ""


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
