"""The examples, the recipes, the design page and the public face are what they promise."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

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
DESIGN = (ROOT / "docs" / "design.md").read_text("utf-8")


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
    code = "import sys, embtrim; print(sorted({'torch', 'polars'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
