"""The jobs of every workload, at full and at tiny size.

A job is one process. The jobs of a workload are interleaved (A B C A B C ..), so that a slow spell of the machine affects
all contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ours
from embtrim.data.catalog import encode_known

NAMES = ("floors", "train", "real", "embedding", "encode", "big_log", "read", "predict", "profile", "accuracy")

# Bytes that `write_log` writes per row, rounded down.
BYTES_PER_LOG_ROW = 240
# The real data by their name in the catalog: the folder of the raw data, and the recipe whose accuracy is compared.
REAL = {"frappe": ("frappe_x1", "frappe-64"), "movielens-1m-ctr": ("ml-1m", "movielens-64")}
# Tables and precision of the settings whose accuracy report.NOISE compares.
CELLS = (("dense", "fp32"), ("lazy", "fp32"), ("lazy", "auto"))


@dataclass(frozen=True)
class Scale:
    """Sizes of everything.

    Attributes:
        table_rows: Rows of all tables together: small, middle, large.
        batch_size: Rows per step.
        warmup: Steps before the timed ones.
        steps: Timed steps.
        seconds: Time for which a single call is repeated.
        log_rows: Rows of the raw log to encode.
        big_log_gb: Gigabytes of the log to encode in little memory.
        read_rows: Rows of the encoded dataset to read.
        fit_rows: Rows of the datasets whose training memory is compared, smallest first.
        score_rows: Rows of the raw log to score.
        seeds: Trainings for each mean AUC.
        epochs: Most epochs of these trainings; early stopping ends them sooner.
        max_rows: Most rows of each split in these trainings; None for all.
    """

    table_rows: tuple[int, int, int] = (1_000_000, 5_000_000, 50_000_000)
    batch_size: int = 4096
    warmup: int = 5
    steps: int = 25
    seconds: float = 2.0
    log_rows: int = 5_000_000
    big_log_gb: float = 10.0
    read_rows: int = 5_000_000
    fit_rows: tuple[int, ...] = (1_000_000, 5_000_000, 10_000_000, 20_000_000)
    score_rows: int = 500_000
    seeds: int = 3
    epochs: int = 50
    max_rows: int | None = None


QUICK = Scale(
    table_rows=(10_000, 50_000, 500_000),
    batch_size=256,
    warmup=1,
    steps=4,
    seconds=0.02,
    log_rows=10_000,
    big_log_gb=0.005,
    read_rows=20_000,
    fit_rows=(5_000, 10_000, 20_000),
    score_rows=5_000,
    epochs=1,
    max_rows=5_000,
)


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        key: Name of the job: workload/size or detail/contender.
        script: File in this folder.
        kind: Function of the script.
        settings: Arguments of the function.
        python: Environment of the job: "own", the one with embtrim, or "peers".
        max_repeats: Most runs, for jobs that take minutes or repeat inside.
        prepare: Function that makes the files that the job reads, unless they exist.
    """

    key: str
    script: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    python: Literal["own", "peers"] = "own"
    max_repeats: int = 1000
    prepare: Callable[[], None] | None = None


def jobs(
    workload: str, scale: Scale, folder: Path, data: Path, precisions: Mapping[str, Mapping[str, Any]]
) -> list[Job]:
    """The jobs of a workload.

    Args:
        workload: One of NAMES.
        scale: Sizes.
        folder: Folder for logs and datasets.
        data: Folder with the raw real data, in the subfolders that REAL names.
        precisions: embtrim's "fp32" and "auto" on this machine, for peers with the same dense part: `matmul`, torch's
            float32 matmul precision, and `bf16`, whether autocast is on.
    """
    makers = {
        "floors": _floors,
        "train": lambda scale, _: _train(scale, precisions),
        "real": lambda scale, folder: _real(scale, folder, data, precisions),
        "embedding": _embedding,
        "encode": _encode,
        "big_log": _big_log,
        "read": _read,
        "predict": lambda scale, folder: _predict(scale, folder, precisions["fp32"]["matmul"]),
        "profile": _profile,
        "accuracy": lambda scale, folder: _accuracy(scale, folder, data),
    }
    return makers[workload](scale, folder)


def _stepping(scale: Scale, source: int | str) -> dict[str, Any]:
    return {
        "source": source,
        "batch_size": scale.batch_size,
        "warmup": scale.warmup,
        "steps": scale.steps,
    }


def _floors(scale: Scale, folder: Path) -> list[Job]:
    settings = {"source": scale.table_rows[1], "batch_size": scale.batch_size, "seconds": scale.seconds / 5}
    return [Job("floors", "floors.py", "floors", settings)]


def _train(scale: Scale, precisions: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    listed = []
    for name, table_rows in zip(("small", "middle", "large"), scale.table_rows, strict=True):
        stepping = _stepping(scale, table_rows)

        def ours(
            contender: str,
            layout: str,
            precision: str,
            max_repeats: int = 1000,
            name: str = name,
            stepping: dict = stepping,
            **more: Any,
        ) -> Job:
            settings = {"layout": layout, "precision": precision, **stepping, **more}
            return Job(f"train/{name}/{contender}", "ours.py", "train", settings, "own", max_repeats)

        def peer(
            label: str, contender: str, name: str = name, stepping: dict = stepping, own: bool = False, **more: Any
        ) -> Job:
            settings = {"contender": contender, **stepping, **more}
            return Job(f"train/{name}/{label}", "peers.py", "train", settings, "own" if own else "peers")

        listed += [
            ours("embtrim width 16 fp32", "full", "fp32"),
            ours("embtrim width 16 fp32 [fast]", "full", "fp32", kernels="fused"),
            ours("embtrim width 16 auto", "full", "auto"),
            ours("embtrim width 16 auto [fast]", "full", "auto", kernels="fused"),
            ours("embtrim mixed widths auto", "mixed", "auto"),
            ours("embtrim mixed widths auto [fast]", "mixed", "auto", kernels="fused"),
            peer("FBGEMM width 16 fp32", "fbgemm", layout="full", **precisions["fp32"]),
            peer("FBGEMM width 16 auto", "fbgemm", layout="full", **precisions["auto"]),
            peer("FBGEMM mixed widths auto", "fbgemm", layout="mixed", **precisions["auto"]),
            peer("nn.Embedding sparse, SparseAdam", "one_table", optimizer="sparse", own=True),
        ]
        listed += [
            peer("torchrec width 16 fp32", "torchrec", **precisions["fp32"]),
            peer("torchrec width 16 auto", "torchrec", **precisions["auto"]),
        ]
        if name == "large":  # dense optimisers need 13 GB and more, and seconds per step
            continue
        listed += [
            ours("embtrim mixed widths fp32", "mixed", "fp32"),
            ours("embtrim compact 10% auto", "compact", "auto"),
            peer("FuxiCTR DeepFM as shipped", "fuxictr"),
            peer("nn.Embedding, dense Adam", "one_table", optimizer="dense", own=True),
            peer("nn.Embedding, fused Adam", "one_table", optimizer="fused", own=True),
        ]
        if name == "middle":
            listed.append(ours("embtrim mixed widths auto, compiled", "mixed", "auto", max_repeats=1, compile=True))
    return listed


def _encode_real(name: str, data: Path, out: Path) -> None:
    if not out.exists():
        encode_known(name, data / REAL[name][0], out, progress=False)


def _real(scale: Scale, folder: Path, data: Path, precisions: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    listed = []
    for name in REAL:
        stepping = _stepping(scale, str(folder / name))
        prepare = partial(_encode_real, name, data, folder / name)
        for label, layout in (("width 16", "full"), ("mixed widths", "mixed")):
            for precision in ("fp32", "auto"):
                settings = {"layout": layout, "precision": precision, **stepping}
                key = f"real/{name}/embtrim {label} {precision}"
                listed.append(Job(key, "ours.py", "train", settings, prepare=prepare))
        for label, contender, python, settings in (
            ("FuxiCTR DeepFM as shipped", "fuxictr", "peers", {}),
            ("FBGEMM width 16 fp32", "fbgemm", "peers", {"layout": "full", **precisions["fp32"]}),
            ("FBGEMM width 16 auto", "fbgemm", "peers", {"layout": "full", **precisions["auto"]}),
            ("nn.Embedding, dense Adam", "one_table", "own", {"optimizer": "dense"}),
            ("nn.Embedding, fused Adam", "one_table", "own", {"optimizer": "fused"}),
            ("nn.Embedding sparse, SparseAdam", "one_table", "own", {"optimizer": "sparse"}),
        ):
            settings = {"contender": contender, **settings, **stepping}
            listed.append(Job(f"real/{name}/{label}", "peers.py", "train", settings, python, prepare=prepare))
    return listed


def _embedding(scale: Scale, folder: Path) -> list[Job]:
    stepping, listed = _stepping(scale, scale.table_rows[1]), []
    for label, layout in (("width 16", "full"), ("mixed widths", "mixed")):
        for optimizer in ("adam", "adagrad"):
            settings = {"layout": layout, "optimizer": optimizer, **stepping}
            key = f"embedding/{label}/embtrim {optimizer}"
            listed.append(Job(key, "ours.py", "embedding", settings))
            listed.append(Job(f"{key} [fast]", "ours.py", "embedding", {**settings, "kernels": "fused"}))
        settings = {"layout": layout, **stepping}
        listed.append(Job(f"embedding/{label}/FBGEMM adagrad", "peers.py", "embedding", settings, "peers"))
    return listed


def _write_log(log: Path, num_rows: int) -> None:
    if not log.exists():
        ours.synthetic.write_log(log, num_rows)


def _encode(scale: Scale, folder: Path) -> list[Job]:
    log = folder / "log.tsv"
    prepare = partial(_write_log, log, scale.log_rows)

    def settings(name: str) -> dict[str, str]:
        return {"log": str(log), "out": str(folder / name)}

    return [
        Job("encode/embtrim", "ours.py", "encode", settings("encoded"), prepare=prepare),
        Job(
            "encode/FuxiCTR preprocessing", "peers.py", "encode_fuxictr", settings("fuxictr"), "peers", prepare=prepare
        ),
        Job("encode/pandas script", "peers.py", "encode_pandas", settings("pandas"), "peers", prepare=prepare),
    ]


def _big_log(scale: Scale, folder: Path) -> list[Job]:
    log = folder / "log.tsv"
    prepare = partial(_write_log, log, int(scale.big_log_gb * 1e9 / BYTES_PER_LOG_ROW))
    settings = {"log": str(log), "out": str(folder / "encoded")}
    return [Job("encode/embtrim, big log", "ours.py", "encode", settings, "own", 1, prepare)]


def _read(scale: Scale, folder: Path) -> list[Job]:
    def job(key: str, kind: str, rows: int, max_repeats: int) -> Job:
        data = folder / f"data-{rows}"

        def prepare() -> None:
            if not data.exists():
                ours.write_dataset(data, rows, scale.table_rows[0])

        settings = {"folder": str(data), "batch_size": scale.batch_size}
        return Job(key, "ours.py", kind, settings, "own", max_repeats, prepare)

    names = {scale.fit_rows[0]: "smallest log", scale.fit_rows[-1]: "largest log"}
    epochs = [job(f"read/fit/{names.get(rows, f'{rows:,} rows')}", "train_epoch", rows, 1) for rows in scale.fit_rows]
    return [job("read/shuffled batches", "read", scale.read_rows, 1000), *epochs]


def _predict(scale: Scale, folder: Path, matmul: str) -> list[Job]:
    source, listed = scale.table_rows[1], []
    calls = {"source": source, "batch_sizes": [1, 64, 4096], "seconds": scale.seconds}
    for label, layout in (("full", "full"), ("compact 10%", "compact")):
        listed.append(Job(f"predict/embtrim {label}", "ours.py", "predict", {"layout": layout, **calls}))
        settings = {"columns": ours.kept_columns(source, layout), "matmul": matmul, **calls}
        listed.append(Job(f"predict/nn.Embedding a field {label}", "peers.py", "predict", settings))
    for label, layout, bits in (
        ("full", "full", 32),
        ("mixed widths", "mixed", 32),
        ("compact 10%", "compact", 32),
        ("compact 10%, 8 bits", "compact", 8),
        ("compact 10%, 4 bits", "compact", 4),
    ):
        listed.append(Job(f"export/{label}", "ours.py", "export", {"layout": layout, "bits": bits, **calls}))
    log = folder / "log.tsv"
    for label, layout in (("full", "full"), ("compact 10%", "compact")):
        settings = {"log": str(log), "out": str(folder / layout), "layout": layout}
        prepare = partial(_write_log, log, scale.score_rows)
        listed.append(Job(f"score/{label}", "ours.py", "score", settings, prepare=prepare))
    return listed


def _profile(scale: Scale, folder: Path) -> list[Job]:
    stepping, listed = _stepping(scale, scale.table_rows[1]), []
    for label, layout in (("width 16", "full"), ("mixed widths", "mixed")):
        for suffix, kernels in (("", "torch"), (" [fast]", "fused")):
            settings = {"layout": layout, "kernels": kernels, **stepping}
            listed.append(Job(f"profile/embtrim {label} auto{suffix}", "ours.py", "profile", settings, "own", 1))
    return listed


def _accuracy(scale: Scale, folder: Path, data: Path) -> list[Job]:
    listed = []
    for name, (_, recipe) in REAL.items():
        prepare = partial(_encode_real, name, data, folder / name)
        for tables, precision in CELLS:
            settings = {
                "recipe": recipe,
                "data": str(folder / name),
                "tables": tables,
                "precision": precision,
                "seeds": scale.seeds,
                "epochs": scale.epochs,
                "max_rows": scale.max_rows,
            }
            key = f"accuracy/{recipe}/{tables} {precision}"
            listed.append(Job(key, "ours.py", "accuracy", settings, "own", 1, prepare))
    return listed
