"""What the README and the recipes promise runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import embtrim
from embtrim.config import read_toml
from embtrim.experiments.grid import CompareConfig, resolve
from embtrim.experiments.settings import RunConfig
from embtrim.methods import method_named
from embtrim.models import MODELS
from embtrim.testing.toys import planted_data

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """logs.csv, logs.parquet, and tomorrow's, in the current folder."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 40, 3000), rng.integers(0, 100, 3000)
    click = (rng.random(3000) < 1 / (1 + np.exp(-(user % 7 - 3.0)))).astype(int)
    log = pl.DataFrame({"user": user, "item": item, "click": click}).with_columns(
        pl.format("u{}", "user").alias("user")
    )
    monkeypatch.chdir(tmp_path)
    log.write_csv("logs.csv")
    log.write_parquet("logs.parquet")
    log.drop("click").head(50).write_csv("tomorrow.csv")
    log.head(50).write_parquet("new_logs.parquet")
    return tmp_path


@pytest.mark.slow
def test_the_python_example_runs(logs):
    (code, _) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["scores"]) == 50
    assert names["plan"].num_params <= 0.1 * names["plan"].num_full_params


@pytest.fixture
def flights(monkeypatch):
    """What the examples share, on planted data: the bundled ones take longer."""
    data = planted_data(noise_vocab=50)
    monkeypatch.setattr(embtrim, "load", lambda name: data)
    monkeypatch.setattr(sys, "argv", [__file__])
    spec = importlib.util.spec_from_file_location("flights", ROOT / "examples" / "flights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_train_their_small_model_from_scratch(flights, monkeypatch, capsys):
    monkeypatch.setattr(flights, "SEEDS", (0, 1))
    monkeypatch.setattr(flights, "MOST_EPOCHS", 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(rows, flights.WIDTH) for rows in flights.SIZES.values())
            self.head = nn.Linear(len(flights.SIZES) * flights.WIDTH, 1)

    def make_model(seed: int) -> Model:
        torch.manual_seed(seed)
        return Model()

    def probability(model: Model, ids_BF: torch.Tensor) -> torch.Tensor:
        parts = [table(ids_B) for table, ids_B in zip(model.tables, ids_BF.T, strict=True)]
        return model.head(torch.cat(parts, 1)).squeeze(1).sigmoid()

    heads = []

    def compact(*args, **settings):
        small = embtrim.compaction.compacting.compact(*args, **settings)
        heads.append(small.head.weight.detach().clone())
        return small

    monkeypatch.setattr(embtrim, "compact", compact)
    flights.trim("toy 1.0", make_model, probability)
    for head, seed in zip(heads, (0, 0, 1, 1), strict=True):
        assert torch.equal(head, make_model(seed).head.weight)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| toy 1.0 | Model |")]
    assert [row[4].strip() for row in rows] == ["sseds 10%", "uniform 10%"]
    headings = next(
        line for line in (ROOT / "examples" / "README.md").read_text("utf-8").splitlines() if line.startswith("| ")
    )
    assert {len(row) for row in rows} == {len(headings.split("|"))}


def test_the_examples_stop_early_and_keep_the_best_epoch(flights, monkeypatch):
    model = nn.Linear(1, 1, bias=False)
    weights, scores = [], [0.5, 0.7, 0.6, 0.7, 0.6, 0.9]

    def evaluate(*_):
        weights.append(model.weight.detach().clone())
        return scores[len(weights) - 1]

    monkeypatch.setattr(flights, "evaluate", evaluate)
    flights.train(model, lambda model, batch: (model.weight - 3).square().sum(), lambda *_: None)
    assert len(weights) == 2 + flights.PATIENCE
    assert torch.equal(model.weight, weights[1])
    assert not torch.equal(weights[1], weights[-1])


def test_the_example_of_a_model_of_ones_own_runs():
    (_, code) = blocks("python")
    names: dict[str, object] = {"embtrim": embtrim}
    exec(compile(code, "README.md", "exec"), names)
    stored = sum(p.numel() for site in (names["small"].user, names["small"].item) for p in site.parameters())
    assert stored == names["plan"].num_params <= 0.5 * names["plan"].num_full_params


@pytest.mark.slow
def test_the_compare_example_parses(tmp_path):
    (script,) = [block for block in blocks("sh") if "embtrim compare" in block]
    line = next(line for line in script.splitlines() if line.startswith("embtrim compare"))
    words = [*shlex.split(line)[1:], "--dry-run", "--json", "--set", "hparams.embedding_dim=4"]
    command = [sys.executable, "-m", "embtrim", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"deepfm"' in done.stdout


@pytest.mark.slow
def test_the_csv_example_runs(logs):
    (script,) = [block for block in blocks("sh") if "logs.csv" in block]
    ran = []
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["embtrim"]:
            continue
        command = [sys.executable, "-m", "embtrim", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        ran.append(words[1])
    assert ran == ["encode", "encode", "run", "predict"]
    assert pl.read_parquet("scores.parquet").height == 50
    assert Path("runs/logs/report.html").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_parses(path):
    if path.stem.startswith("compare-"):
        config = resolve(CompareConfig.parse(read_toml(path), where=str(path)))
        assert set(config.models) <= set(MODELS)
        return
    config = RunConfig.parse(read_toml(path), where=str(path))
    method_named(config.method).parse(config.search)
    assert config.model in MODELS


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/.]+(?:\.py|\.toml|/))`", DESIGN))))
def test_every_path_of_the_design_exists(path):
    assert any((folder / path).exists() for folder in (ROOT, ROOT / "src" / "embtrim"))


def test_the_design_lists_the_floors_that_make_check_enforces():
    contracts = read_toml(ROOT / "pyproject.toml")["tool"]["importlinter"]["contracts"]
    (floors,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    names = [name for floor in floors for name in floor.split(" | ") if not name.startswith("_")]
    assert re.findall(r"^\| `(\w+)` \|", DESIGN, flags=re.MULTILINE) == names


def test_the_public_face_is_what_the_package_lists():
    for name in embtrim.__all__:
        assert getattr(embtrim, name) is not None
    assert {*embtrim.__all__, "torchrec"} == set(embtrim._HOMES)  # which `import *` cannot load without its extra
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        embtrim.nothing  # noqa: B018


def test_importing_embtrim_stays_light():
    code = "import sys, embtrim; print(sorted({'torch', 'polars', 'plotly'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
