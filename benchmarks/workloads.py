"""What is measured: the jobs of every workload, at full and at tiny size.

A job is one process. The jobs of a workload run interleaved (A B C A B C ..), so that a machine that slows down or
heats up does so for all contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ours

NAMES = ("floors", "train", "embedding", "encode", "read", "predict", "profile")


@dataclass(frozen=True)
class Scale:
    """Sizes of everything.

    Attributes:
        table_rows: rows of all tables together: small, middle, large.
        batch_size: rows a step.
        warmup: steps before those that count.
        steps: steps that count.
        seconds: of repeated calls, where single calls are timed.
        log_rows: rows of the raw log to encode.
        read_rows: rows of the encoded dataset to read.
        fit_rows: rows of the datasets whose training memory is compared.
    """

    table_rows: tuple[int, int, int] = (1_000_000, 5_000_000, 50_000_000)
    batch_size: int = 4096
    warmup: int = 5
    steps: int = 25
    seconds: float = 2.0
    log_rows: int = 5_000_000
    read_rows: int = 5_000_000
    fit_rows: tuple[int, ...] = (1_000_000, 20_000_000)


QUICK = Scale((10_000, 50_000, 500_000), 256, 1, 4, 0.02, 10_000, 20_000, (5_000, 20_000))


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        key: workload/size or detail/contender.
        script: file in this folder.
        kind: function of the script.
        settings: its arguments.
        python: "own", the one with embtrim; or the "peers'" environment.
        max_repeats: runs at most, for jobs that take minutes or repeat inside.
        prepare: makes files that the job reads, if they are not there.
    """

    key: str
    script: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    python: Literal["own", "peers"] = "own"
    max_repeats: int = 1000
    prepare: Callable[[], None] | None = None


def jobs(workload: str, scale: Scale, folder: Path, precisions: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """The jobs of a workload.

    Args:
        workload: one of NAMES.
        scale: sizes.
        folder: for logs and datasets.
        precisions: what embtrim's "fp32" and "auto" are here, for peers with the same dense part: `matmul`, torch's
            float32 matmul precision, and `bf16`, whether autocast is on.
    """
    makers = {
        "floors": _floors,
        "train": lambda scale, _: _train(scale, precisions),
        "embedding": _embedding,
        "encode": _encode,
        "read": _read,
        "predict": lambda scale, _: _predict(scale, precisions["fp32"]["matmul"]),
        "profile": _profile,
    }
    return makers[workload](scale, folder)


def _stepping(scale: Scale, table_rows: int) -> dict[str, Any]:
    return {
        "table_rows": table_rows,
        "batch_size": scale.batch_size,
        "warmup": scale.warmup,
        "steps": scale.steps,
    }


def _floors(scale: Scale, folder: Path) -> list[Job]:
    settings = {"table_rows": scale.table_rows[1], "batch_size": scale.batch_size, "seconds": scale.seconds / 5}
    return [Job("floors", "floors.py", "floors", settings)]


def _train(scale: Scale, precisions: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    found = []
    for name, table_rows in zip(("small", "middle", "large"), scale.table_rows, strict=True):
        stepping = _stepping(scale, table_rows)

        def ours(
            contender: str, layout: str, precision: str, name: str = name, stepping: dict = stepping, **more: Any
        ) -> Job:
            settings = {"layout": layout, "precision": precision, **stepping, **more}
            return Job(f"train/{name}/{contender}", "ours.py", "train", settings)

        def peer(
            label: str, contender: str, name: str = name, stepping: dict = stepping, own: bool = False, **more: Any
        ) -> Job:
            settings = {"contender": contender, **stepping, **more}
            return Job(f"train/{name}/{label}", "peers.py", "train", settings, "own" if own else "peers")

        found += [
            ours("embtrim width 16 fp32", "full", "fp32"),
            ours("embtrim width 16 auto", "full", "auto"),
            ours("embtrim mixed widths auto", "mixed", "auto"),
            peer("FBGEMM width 16 fp32", "fbgemm", layout="full", **precisions["fp32"]),
            peer("FBGEMM width 16 auto", "fbgemm", layout="full", **precisions["auto"]),
            peer("FBGEMM mixed widths auto", "fbgemm", layout="mixed", **precisions["auto"]),
            peer("nn.Embedding sparse, SparseAdam", "one_table", optimizer="sparse", own=True),
        ]
        if name == "large":  # dense optimisers would need 13 GB and more, and seconds a step
            continue
        found += [
            ours("embtrim mixed widths fp32", "mixed", "fp32"),
            ours("embtrim mixed widths auto [fast]", "mixed", "auto", kernels="fused"),
            ours("embtrim compact 10% auto", "compact", "auto"),
            peer("FuxiCTR DeepFM as shipped", "fuxictr"),
            peer("nn.Embedding, dense Adam", "one_table", optimizer="dense", own=True),
            peer("nn.Embedding, fused Adam", "one_table", optimizer="fused", own=True),
            peer("torchrec width 16 auto", "torchrec", **precisions["auto"]),
        ]
    return found


def _embedding(scale: Scale, folder: Path) -> list[Job]:
    stepping, found = _stepping(scale, scale.table_rows[1]), []
    for label, layout in (("width 16", "full"), ("mixed widths", "mixed")):
        for optimizer in ("adam", "adagrad"):
            settings = {"layout": layout, "optimizer": optimizer, **stepping}
            key = f"embedding/{label}/embtrim {optimizer}"
            found.append(Job(key, "ours.py", "embedding", settings))
            found.append(Job(f"{key} [fast]", "ours.py", "embedding", {**settings, "kernels": "fused"}))
        settings = {"layout": layout, **stepping}
        found.append(Job(f"embedding/{label}/FBGEMM adagrad", "peers.py", "embedding", settings, "peers"))
    return found


def _encode(scale: Scale, folder: Path) -> list[Job]:
    log = folder / "log.tsv"

    def settings(name: str) -> dict[str, str]:
        return {"log": str(log), "out": str(folder / name)}

    def prepare() -> None:
        if not log.exists():
            ours.synthetic.write_log(log, scale.log_rows)

    return [
        Job("encode/embtrim", "ours.py", "encode", settings("encoded"), "own", 3, prepare),
        Job("encode/FuxiCTR preprocessing", "peers.py", "encode_fuxictr", settings("fuxictr"), "peers", 3, prepare),
        Job("encode/pandas script", "peers.py", "encode_pandas", settings("pandas"), "peers", 3, prepare),
    ]


def _read(scale: Scale, folder: Path) -> list[Job]:
    def job(key: str, kind: str, rows: int, max_repeats: int) -> Job:
        data = folder / f"data-{rows}"

        def prepare() -> None:
            if not data.exists():
                ours.write_dataset(data, rows, scale.table_rows[0])

        settings = {"folder": str(data), "batch_size": scale.batch_size}
        return Job(key, "ours.py", kind, settings, "own", max_repeats, prepare)

    epochs = [job(f"read/fit/{rows:,} rows", "train_epoch", rows, 1) for rows in scale.fit_rows]
    return [job("read/shuffled batches", "read", scale.read_rows, 1000), *epochs]


def _predict(scale: Scale, matmul: str) -> list[Job]:
    table_rows, found = scale.table_rows[1], []
    calls = {"table_rows": table_rows, "batch_sizes": [1, 64, 4096], "seconds": scale.seconds}
    for label, layout in (("full", "full"), ("compact 10%", "compact")):
        found.append(Job(f"predict/embtrim {label}", "ours.py", "predict", {"layout": layout, **calls}))
        settings = {"columns": ours.kept_columns(table_rows, layout), "matmul": matmul, **calls}
        found.append(Job(f"predict/nn.Embedding a field {label}", "peers.py", "predict", settings))
    return found


def _profile(scale: Scale, folder: Path) -> list[Job]:
    stepping = _stepping(scale, scale.table_rows[1])
    labels = (("width 16", "full"), ("mixed widths", "mixed"))
    return [
        Job(f"profile/embtrim {label} auto", "ours.py", "profile", {"layout": layout, **stepping}, "own", 1)
        for label, layout in labels
    ]
