"""Trainings, searches, runs and encodings that are killed (kill -9) end the same once they are started again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embtrim.experiments.comparison import compare
from embtrim.experiments.grid import CompareConfig
from embtrim.experiments.records import RunRecord
from embtrim.experiments.run import run
from embtrim.experiments.settings import RunConfig
from embtrim.testing.toys import planted_data
from tests.cli.workshop import TINY, call, write_log
from tests.data.test_encoding_resume import Job as EncodeJob
from tests.training.interruptions import SEARCHES, TRAIN

RUN = RunConfig(
    hparams={"embedding_dim": 4, "hidden_units": [8]},
    train=TRAIN.replace(epochs=3, embedding_l2=0.0),
    method="optembed",
    search=SEARCHES[2].model_dump(mode="json", exclude_none=True),
    controls=("sseds", "hard_mask"),
    budget="40%",
)

COMPARE = CompareConfig(
    models=("fm",), hparams={"embedding_dim": 4}, train=TRAIN.replace(epochs=3, embedding_l2=0.0), methods=("uniform",),
    variants={"mixed": {"method": "guided", "bits": "mixed"}}, budgets=("40%", "20%"), seeds=1,
)  # fmt: skip

# What each command is killed in, and how often; Ctrl-C comes once to each beside that.
NUM_KILLS = {"encode": 2, "train": 2, "search": 2, "run": 2, "compare": 2}

SETTINGS = [*TINY, "--set", "train.checkpoint_seconds=0", "--set", "train.batch_size=64"]

SEARCH = ["--method", "optembed", "--budget", "30%"]
for key, value in SEARCHES[2].model_dump(mode="json", exclude_none=True).items():
    SEARCH += ["--set", f"search.{key}={value}"]


def work(what: str, shop: Path, out: Path) -> None:
    """One of the commands that can be interrupted, in small."""
    torch.set_num_threads(1)
    if what == "encode":
        EncodeJob(shop / "raw", num_rows=4_000).run(out=out)
    elif what in ("train", "search"):
        given = ["train", shop / "data"] if what == "train" else ["search", shop / "full", shop / "data", *SEARCH]
        done = call(*given, *SETTINGS, "--out", out)
        if done.code == 130:
            raise KeyboardInterrupt
        assert done.code == 0, done.err
    else:
        data = planted_data(num_rows=2000, noise_vocab=300)
        run(data, RUN, out) if what == "run" else compare(data, COMPARE, out)


def start(what: str, shop: Path, out: Path) -> None:
    """Do the work in a separate process, which exits with 130 on Ctrl-C."""
    os.environ["EMBTRIM_KERNELS"] = "torch"  # every process would load the fused ones again
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work(what, shop, out)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        sys.exit(130)


def outcome(what: str, out: Path) -> dict[str, Any]:
    """Everything that the work made, without times and memory."""
    if what == "encode":
        return EncodeJob.files(out)
    if what == "train":  # which holds the digests of all files beside it
        return json.loads((out / "bundle.json").read_text())
    if what == "search":
        return {"plan": out.read_text(), "rows": {k: v.tolist() for k, v in np.load(out.with_suffix(".npz")).items()}}
    records = [RunRecord.load(path) for path in sorted(out.glob("records/*.json"))]
    assert len(records) == (4 if what == "run" else 5)
    volatile = ("seconds", "epochs", "memory", "peak", "rows_per_second")
    return {
        f"{r.variant} {r.budget} {r.seed}": {
            name: value
            for name, value in r.model_dump().items()
            if name == "epochs" or not any(part in name for part in volatile)
        }
        for r in records
    }


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded data and the bundle of a full model."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "raw").mkdir()
    write_log(folder / "log.csv", num_rows=2000)
    for arguments in (
        ["encode", folder / "log.csv", "--label", "click", "--out", folder / "data"],
        ["train", folder / "data", "--out", folder / "full", *SETTINGS],
    ):
        assert call(*arguments).code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", NUM_KILLS)
def test_killed_at_random_moments_it_ends_the_same(what: str, shop: Path, tmp_path: Path) -> None:
    """A kill counts only after the first change on disk and before the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_killed_work", "torch._dynamo"])
    name = "out.json" if what == "search" else "out"
    whole, killed = tmp_path / "whole" / name, tmp_path / "killed" / name
    for out in (whole, killed):
        out.parent.mkdir()

    def process(out: Path) -> Any:
        """Started, and past its first change on disk."""
        before, started = last_change(out.parent), context.Process(target=start, args=(what, shop, out))
        started.start()
        until(lambda: last_change(out.parent) != before or not started.is_alive())
        return started

    def finish(out: Path) -> float:
        """Seconds since the first change."""
        last, began = process(out), time.monotonic()
        last.join()
        assert last.exitcode == 0
        return time.monotonic() - began

    seconds = finish(whole)
    expected = outcome(what, whole)

    chance, signals = random.Random(what), [signal.SIGKILL] * NUM_KILLS[what] + [signal.SIGINT]
    chance.shuffle(signals)
    ended = []
    for tried in range(50):
        if len(ended) == len(signals):
            break
        victim = process(killed)
        time.sleep(chance.uniform(0, seconds / (len(signals) + tried)))
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signals[len(ended)])
        victim.join()
        if victim.exitcode == 0:  # it was done before: again, from the start
            shutil.rmtree(killed.parent)
            killed.parent.mkdir()
            continue
        assert victim.exitcode == (130 if signals[len(ended)] == signal.SIGINT else -signal.SIGKILL)
        ended.append(victim.exitcode)
    assert (ended.count(-signal.SIGKILL), ended.count(130)) == (NUM_KILLS[what], 1)
    finish(killed)
    assert outcome(what, killed) == expected
    assert {path.name for path in killed.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}
    assert not (killed / "unfinished").exists(), "what is finished leaves no state behind"


def test_there_are_ten_kills() -> None:
    assert sum(NUM_KILLS.values()) >= 10


def last_change(folder: Path) -> int:
    """Time of the last change below a folder, in nanoseconds."""
    times = [0]
    for path in [folder, *folder.rglob("*")]:
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime_ns)
    return max(times)


def until(condition: Callable[..., bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)
