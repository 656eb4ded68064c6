"""Budgets in bytes for a named target: the vocabulary that goes along is within them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.budget import Budget
from embtrim.bundle import folder_bytes, load_bundle, save, vocabulary_bytes
from embtrim.comparison import compare
from embtrim.dataset import EncodedDataset
from embtrim.errors import BudgetError, DataError
from embtrim.experiment import RunConfig, allowed_bytes, check_run, run
from embtrim.exporting import export
from embtrim.grid import CompareConfig
from embtrim.methods import REPACKED, FrequencyConfig, GuidedConfig, UniformConfig, search
from embtrim.models import DeepFM
from embtrim.plan import SizePlan
from embtrim.schema import FieldSpec, Schema
from embtrim.sites import CTRTask
from embtrim.testing import foreign_task
from embtrim.train import TrainConfig

TRAIN = TrainConfig(epochs=1, batch_size=512, precision="fp32")


@pytest.fixture(scope="module")
def raw() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 50, 3000), np.minimum(rng.geometric(0.01, 3000), 400)
    label = (rng.random(3000) < 1 / (1 + np.exp(-(user % 5 - 2.0)))).astype(int)
    return pl.DataFrame({"user": [f"u{i}" for i in user], "item": [f"i{i}" for i in item], "click": label})


@pytest.fixture(scope="module")
def encoded(raw: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    return embtrim.encode(raw, label="click", out=tmp_path_factory.mktemp("logs") / "data")


@pytest.fixture(scope="module")
def hashed(raw: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    schema = Schema(label="click", fields=(FieldSpec(name="user"), FieldSpec(name="item", hash_size=5000)))
    return embtrim.encode(raw, schema, out=tmp_path_factory.mktemp("logs") / "data")


def set_aside(data: EncodedDataset) -> int:
    return math.ceil(REPACKED * vocabulary_bytes(data))


def task_of(data: EncodedDataset) -> CTRTask:
    return CTRTask(DeepFM(data.schema, embedding_dim=8, hidden_units=(8,), init_std=0.1), data, TRAIN)


def budget_of(data: EncodedDataset, share: float) -> str:
    """What the vocabulary takes, and a share of the full tables' bytes."""
    full = task_of(data).full_plan().num_bytes()
    return f"{vocabulary_bytes(data) + int(share * full)} bytes"


@pytest.mark.parametrize(
    ("config", "bits", "target", "format"),
    [
        (UniformConfig(), 32, "torch", "pt2"),
        (UniformConfig(), 32, "fbgemm", "torchrec"),
        (FrequencyConfig(), 32, "onnx", "onnx"),
        (FrequencyConfig(), 8, "onnx", "onnx"),
        (GuidedConfig(), "mixed", "onnx", "onnx"),
    ],
)
@pytest.mark.parametrize("name", ["encoded", "hashed"])
def test_tables_and_vocabulary_are_within_the_budget(request, name, config, bits, target, format, tmp_path):
    data: EncodedDataset = request.getfixturevalue(name)
    task, text = task_of(data), budget_of(data, {32: 0.6, 8: 0.15, "mixed": 0.12}[bits])
    plan = search(task, config, text, bits=bits, target=target)
    assert plan.num_params < plan.num_full_params
    small = embtrim.compact(task.model, plan)
    if plan.is_quantized:
        small.tables.quantize()
    save(small, tmp_path / "bundle", data.recode(plan))
    manifest = export(load_bundle(tmp_path / "bundle"), format, tmp_path / "served")
    assert plan.vocabulary_bytes == manifest["vocabulary_bytes"] == folder_bytes(tmp_path / "bundle" / "encoder") > 1000
    assert manifest["table_bytes"] == plan.num_bytes(target)
    room = Budget.parse(text).amount - plan.num_bytes(target) - plan.vocabulary_bytes
    assert room >= 0
    assert name == "hashed" or room < 0.2 * Budget.parse(text).amount  # most hashed rows are never read
    assert f"beside {plan.vocabulary_bytes:,} of the vocabulary" in plan.summary()
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert re.search(
        rf"\| budget \| {int(Budget.parse(text).amount):,} bytes \([\d,]+ of them for the vocabulary\) \|", card
    )
    assert plan.summary().partition("\n")[0] in card


def test_a_map_of_hashed_ids_is_counted(hashed: EncodedDataset):
    task, text = task_of(hashed), budget_of(hashed, 0.6)
    plan = search(task, FrequencyConfig(), text, target="torch")
    assert any(table.has_dropped for table in plan.tables if table.name == "item")
    assert plan.vocabulary_bytes > set_aside(hashed) + 100
    assert plan.num_bytes() + plan.vocabulary_bytes <= Budget.parse(text).amount


def test_only_bytes_of_a_named_target_count_it(encoded: EncodedDataset):
    task = task_of(encoded)
    for budget, target in ((budget_of(encoded, 0.6), None), ("60%", "torch"), ("2000 params", "onnx")):
        plan = search(task, UniformConfig(), budget, target=target)
        assert plan.vocabulary_bytes == 0
        assert "vocabulary" not in plan.summary() + plan.details["budget"]
    small = search(task, UniformConfig(), budget_of(encoded, 0.6), target="torch")
    assert small.num_params < search(task, UniformConfig(), budget_of(encoded, 0.6)).num_params
    assert search(foreign_task(), UniformConfig(), "20 kB", target="torch").vocabulary_bytes == 0


def test_a_budget_that_the_vocabulary_leaves_too_little_of(encoded: EncodedDataset):
    task, vocabulary = task_of(encoded), set_aside(encoded)
    with pytest.raises(
        BudgetError, match=rf"set aside for the vocabulary alone \({vocabulary:,} bytes\).+leave out the target"
    ):
        search(task, UniformConfig(), f"{vocabulary} bytes", target="onnx")
    config = RunConfig(budget=f"{vocabulary + 9} bytes", target="onnx", hparams={"embedding_dim": 8})
    with pytest.raises(BudgetError, match="below the smallest plan") as raised:
        check_run(encoded, config)
    with pytest.raises(BudgetError, match="below the smallest plan"):
        search(task, UniformConfig(), config.budget, target="onnx")
    assert f"budget of {vocabulary + 9:,} bytes ({vocabulary:,} of them for the vocabulary)" in str(raised.value)
    least = re.search(r"smallest plan of .+, ([\d,]+) bytes", str(raised.value))
    assert least is not None
    least = least[1].replace(",", "")
    check_run(encoded, config.replace(budget=f"{least} bytes"))


def test_budget():
    whole = Budget.parse("1000 bytes")
    part = whole.with_vocabulary(300)
    assert (part.kind, part.amount, part.vocabulary_bytes) == ("bytes", 700, 300)
    assert part.with_vocabulary(400) == whole.with_vocabulary(400)
    assert (str(part), str(whole)) == ("1,000 bytes (300 of them for the vocabulary)", "1,000 bytes")
    assert part.words_for(50.2) == "351 bytes (300 of them for the vocabulary)"
    assert Budget.parse("10%").with_vocabulary(300) == Budget.parse("10%")
    with pytest.raises(BudgetError, match="for the vocabulary alone"):
        part.with_vocabulary(1000)


def test_runs_and_grids_know_it(encoded: EncodedDataset, tmp_path: Path):
    text = budget_of(encoded, 0.6)
    hparams = {"embedding_dim": 8, "hidden_units": (8,)}
    config = RunConfig(hparams=hparams, train=TRAIN, method="uniform", controls=(), budget=text, target="onnx")
    full = SizePlan.full(encoded.schema, 8, first_order=True)
    allowed = allowed_bytes(full, encoded, config, text)
    assert allowed == Budget.parse(text).amount - set_aside(encoded)
    assert allowed_bytes(full, encoded, config.replace(target=None), text) == min(
        full.num_bytes(), Budget.parse(text).amount
    )
    run(encoded, config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "records" / "uniform-seed0.json").read_text())
    assert record["counted_vocabulary_bytes"] == record["vocabulary_bytes"] == vocabulary_bytes(encoded)
    assert record["table_bytes"] + record["vocabulary_bytes"] <= Budget.parse(text).amount

    cells = CompareConfig(
        hparams=hparams, train=TRAIN, methods=("uniform",), budgets=(text, "50%"), seeds=1, target="torch"
    )
    made = compare(encoded, cells, tmp_path / "grid")
    assert [r.counted_vocabulary_bytes > 0 for r in made.records] == [False, True, False]
    assert compare(encoded, cells, tmp_path / "grid").records == made.records
    with pytest.raises(DataError, match="made with vocabulary in the budget = true, now it is false"):
        compare(encoded, cells.replace(target=None), tmp_path / "grid")
    percent = cells.replace(target=None, budgets=("50%",))
    assert compare(encoded, percent, tmp_path / "grid").records == [made.records[0], made.records[2]]
