"""The command `compare`: started, continued, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from embtrim.methods import METHODS
from tests.cli.workshop import TINY, call, environment
from tests.experiments.grids import until
from tests.system.test_workers import running

pytestmark = pytest.mark.slow

INTERRUPTIBLE = (
    "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from embtrim.cli.main import main; main()"
)

GRID = ["--models", "deepfm,fm", "--methods", "uniform,random", "--budgets", "50%,20%", "--seeds", "1", *TINY]


def test_command(encoded: Path, tmp_path: Path) -> None:
    out = tmp_path / "cmp"
    settings = tmp_path / "grid.toml"
    settings.write_text('models = ["fm"]\nbudgets = ["10%"]\n[variants.floor]\nmethod = "sseds"\nmin_dim = 3\n')
    arguments = ["compare", encoded, "--config", settings, "--methods", "uniform,random", "--seeds", "2",
                 "--set", "hparams.embedding_dim=8", "--set", "train.epochs=1", "--set", "train.precision=fp32"]  # fmt: skip
    facts = json.loads(call(*arguments, "--out", out, "--dry-run", "--json").out)
    assert (facts["num_cells"], facts["num_cells_on_disk"], facts["labels"]) == (8, 0, ["uniform", "random", "floor"])
    assert facts["config"]["budgets"] == ["10%"]
    assert facts["hparams_fm"]["embedding_dim"] == 8
    assert facts["search_floor"]["min_dim"] == 3
    assert facts["seconds"]["least"] < facts["seconds"]["most"]
    assert not out.exists()

    done = call(*arguments, "--out", out)
    assert done.code == 0, done.err
    for words in ("Results: fm", "uniform", "±", "Ranks", "Search cost", "could not be made", "3 column(s)"):
        assert words in done.out
    assert "6 of 8: fm random 10%, seed 1: test AUC" in done.err
    assert "grid: 1 of 8 cells, 0:00:" in done.err
    assert "fm-full-seed0, full model: epoch 1 of" in done.err
    readme, page = (out / "README.md").read_text(), (out / "report.html").read_bytes()
    assert "| fm | floor | 10% | 0, 1 |" in readme

    (out / "README.md").unlink()
    (out / "report.html").unlink()
    again = call("report", out)
    assert again.code == 0, again.err
    assert (again.out, (out / "README.md").read_text()) == (done.out, readme)
    assert (out / "report.html").read_bytes() == page
    assert len(json.loads(call("report", out, "--json", "--dry-run").out)) == 6

    both = json.loads(call(*arguments, "--out", out, "--json").out)
    assert [r["variant"] for r in both["records"]] == ["full", "full", "uniform", "random", "uniform", "random"]
    assert len(both["skipped"]) == 2
    facts = json.loads(call(*arguments, "--out", out, "--dry-run", "--json").out)
    assert facts["num_cells_on_disk"] == 6

    other = call(*arguments, "--out", out, "--set", "train.epochs=2")
    assert other.code == 1
    assert "fm-full-seed0.json was made with train.epochs = 1, now it is 2; choose another --out" in other.err


def test_recipe_of_a_known_dataset_is_merged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from embtrim.data import catalog

    monkeypatch.setenv("EMBTRIM_CACHE", str(tmp_path / "cache"))
    recipe = catalog.CATALOG["flights"].recipe

    def resolved(*arguments: str) -> dict[str, Any]:
        done = call("compare", "flights", "--dry-run", "--json", "--set", "train.epochs=1", *arguments)
        assert done.code == 0, done.err
        return json.loads(done.out)["config"]

    both = resolved("--models", "fm,deepfm", "--set", "train.patience=4")
    assert both["hparams"] == recipe["model"]
    assert both["train"]["batch_size"] == recipe["train"]["batch_size"]
    assert both["train"]["patience"] == 4
    assert both["methods"] == list(METHODS)
    assert resolved("--models", "fm")["hparams"] == {"embedding_dim": recipe["model"]["embedding_dim"]}


def test_interrupted_command(encoded: Path, tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    command = [sys.executable, "-c", INTERRUPTIBLE, "compare", str(encoded), *GRID, "--set", "train.epochs=100000",
               "--set", "train.patience=0", "--jobs", "2", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until(lambda: (out / "config.toml").exists())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: len(children.read_text().split()) >= 3)  # two workers and the tracker of their resources
        workers = list(map(int, children.read_text().split()))
        time.sleep(2)
        os.killpg(process.pid, signal.SIGINT)
        printed, message = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, message
    assert printed == ""
    assert message.strip().splitlines()[-1].startswith("embtrim: interrupted")
    assert "Traceback" not in message
    assert {path.name for path in out.rglob("*") if path.is_file()} <= {"config.toml", "full.safetensors"}
    until(lambda: not any(map(running, workers)), 30)
