"""Budgets in bytes for a named target: the vocabulary that goes along is within them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.config import Config
from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoder import Encoder, vocabulary_bytes
from embtrim.errors import BudgetError, DataError
from embtrim.experiments.comparison import compare
from embtrim.experiments.grid import CompareConfig
from embtrim.experiments.run import run
from embtrim.experiments.settings import RunConfig
from embtrim.methods import FrequencyConfig, GuidedConfig, SSEDSConfig, UniformConfig, search, searching
from embtrim.models import DeepFM
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.schema import FieldSpec, Schema
from embtrim.serving.bundle import load_bundle, save
from embtrim.serving.exporting import export
from embtrim.system.folders import folder_bytes
from embtrim.tasks.ctr_task import CTRTask
from embtrim.testing.toys import foreign_task
from embtrim.training.settings import TrainConfig

pytestmark = pytest.mark.slow

HPARAMS = {"embedding_dim": 8, "hidden_units": (8,)}
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


def task_of(data: EncodedDataset) -> CTRTask:
    return CTRTask(DeepFM(data.schema, embedding_dim=8, hidden_units=(8,), init_std=0.1), data, TRAIN)


def budget_of(data: EncodedDataset, share: float) -> str:
    """What the vocabulary takes, and a share of the full tables' bytes."""
    full = task_of(data).full_plan().num_bytes()
    return f"{vocabulary_bytes(data) + int(share * full)} bytes"


@pytest.mark.parametrize(
    ("name", "config", "bits", "target", "format"),
    [
        ("encoded", UniformConfig(), 32, "torch", "pt2"),
        ("hashed", UniformConfig(), 32, "fbgemm", "torchrec"),
        ("encoded", FrequencyConfig(), 32, "onnx", "onnx"),
        ("encoded", FrequencyConfig(), 8, "onnx", "onnx"),
        ("hashed", FrequencyConfig(), 8, "torch", "pt2"),
        ("encoded", GuidedConfig(), "mixed", "onnx", "onnx"),
    ],
)
def test_tables_and_vocabulary_are_within_the_budget(request, name, config, bits, target, format, tmp_path):
    data: EncodedDataset = request.getfixturevalue(name)
    task, text = task_of(data), budget_of(data, {32: 0.6, 8: 0.15, "mixed": 0.06}[bits])
    plan = search(task, config, text, bits=bits, target=target)
    assert plan.num_params < plan.num_full_params
    small = embtrim.compact(task.model, plan)
    if plan.is_quantized:
        small.tables.quantize_()
    save(small, tmp_path / "bundle", data.recode(plan))
    manifest = export(load_bundle(tmp_path / "bundle"), format, tmp_path / "served")
    assert plan.vocabulary_bytes == manifest["vocabulary_bytes"] == folder_bytes(tmp_path / "bundle" / "encoder") > 1000
    assert manifest["table_bytes"] == plan.num_bytes(target)
    room = Budget.parse(text).amount - plan.num_bytes(target) - plan.vocabulary_bytes
    assert room >= 0
    assert name == "hashed" or room < 0.1 * Budget.parse(text).amount  # most hashed rows are never read
    assert f"beside {plan.vocabulary_bytes:,} of the vocabulary" in plan.summary()
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert f"| budget | {Budget.parse(text)} |" in card
    assert f"| bytes of the vocabulary | {plan.vocabulary_bytes:,} |" in card


def searches_of(config: Config, task: CTRTask, budget: str, **settings: Any) -> tuple[SizePlan, int]:
    """A plan, and how many searches it took."""
    within = searching._search_tables
    with mock.patch.object(searching, "_search_tables", side_effect=within) as searched:
        plan = search(task, config, budget, target="onnx", **settings)
    assert plan.num_bytes() + plan.vocabulary_bytes <= Budget.parse(budget).amount
    return plan, searched.call_count


def test_what_dropped_values_free_is_used(encoded: EncodedDataset):
    # With OOV, which training never saw, the values that are dropped leave the vocabulary.
    task = task_of(encoded)
    for budget in (budget_of(encoded, 0.3), f"{vocabulary_bytes(encoded)} bytes", "3 kB"):
        plan, searches = searches_of(FrequencyConfig(), task, budget)
        assert plan.vocabulary_bytes < vocabulary_bytes(encoded)
        assert plan.num_bytes() + plan.vocabulary_bytes > 0.9 * Budget.parse(budget).amount
        assert searches <= searching.MOST_SEARCHES
    plan, searches = searches_of(SSEDSConfig(), task, budget_of(encoded, 0.9))
    assert searches == 1, "nothing that it dropped changes the vocabulary"


@pytest.mark.parametrize("budget", ["3100 bytes", "3200 bytes", "3500 bytes", "5 kB", "8 kB", "12 kB", "30 kB"])
@pytest.mark.parametrize(("config", "bits"), [(GuidedConfig(), "mixed"), (FrequencyConfig(), 8)])
def test_maps_of_hashed_ids_are_counted(hashed: EncodedDataset, config, bits, budget: str):
    plan, searches = searches_of(config, task_of(hashed), budget, bits=bits)
    assert searches <= searching.MOST_SEARCHES
    assert plan.vocabulary_bytes == vocabulary_bytes(hashed, plan)
    dropped = any(table.has_dropped for table in plan.tables if table.name == "item")
    assert dropped or (budget, bits) == ("30 kB", "mixed"), "with a map; in few bits the largest budget holds every row"


def test_only_bytes_of_a_named_target_count_it(encoded: EncodedDataset, data: EncodedDataset):
    task = task_of(encoded)
    for budget, target in ((budget_of(encoded, 0.6), None), ("60%", "torch"), ("2000 params", "onnx")):
        plan = search(task, UniformConfig(), budget, target=target)
        assert plan.vocabulary_bytes is None
        assert "vocabulary" not in plan.summary()
    small = search(task, UniformConfig(), budget_of(encoded, 0.6), target="torch")
    assert small.num_params < search(task, UniformConfig(), budget_of(encoded, 0.6)).num_params
    assert search(foreign_task(), UniformConfig(), "20 kB", target="torch").vocabulary_bytes == 0
    assert search(task_of(data), UniformConfig(), "20 kB", target="torch").vocabulary_bytes == 0  # of data in memory


def test_a_budget_that_is_too_small_for_both(encoded: EncodedDataset):
    task, vocabulary = task_of(encoded), vocabulary_bytes(encoded)
    with pytest.raises(BudgetError) as raised:
        search(task, SSEDSConfig(), f"{vocabulary} bytes", target="onnx")
    assert f"no plan that is within a budget of {vocabulary:,} bytes together with its vocabulary" in str(raised.value)
    assert f" + {vocabulary:,}" in str(raised.value)
    assert "leave out the target" in str(raised.value)
    with pytest.raises(BudgetError, match="below the smallest plan of any method"):
        search(task, UniformConfig(), "9 bytes", target="onnx")
    with pytest.raises(BudgetError, match=r"for tables and vocabulary, searched within [\d,]+ bytes for the tables"):
        search(task, SSEDSConfig(), "2 kB", target="onnx")


def test_no_room_to_count_in(encoded: EncodedDataset, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Encoder, "save", full)
    with pytest.raises(
        DataError, match=r"could not be written to .+ \(.+No space left.+\); make room there, or .+TMPDIR"
    ):
        vocabulary_bytes(encoded)


COUNT = """
import sys, polars as pl
from embtrim.data.encoder import Encoder
from embtrim.schema import Schema
size = 300_000
schema = Schema.from_sizes([size + 1] * 2)
frame = pl.DataFrame({"value": [f"v{i * 7919 % 1000003}" for i in range(size)], "id": range(1, size + 1), "count": range(size, 0, -1)})
frame = frame.cast({"id": pl.Int32})
Encoder(schema, {"f0": frame, "f1": frame.with_columns(pl.col("value") + "x")}).save(sys.argv[1])
"""


def test_a_vocabulary_takes_the_same_bytes_for_any_number_of_threads(tmp_path: Path):
    sizes = set()
    for threads in (1, 7):
        env = {**os.environ, "POLARS_MAX_THREADS": str(threads)}
        subprocess.run([sys.executable, "-c", COUNT, tmp_path / str(threads)], env=env, check=True)
        sizes.add((tmp_path / str(threads) / "vocab.parquet").stat().st_size)
    assert len(sizes) == 1


def test_runs_know_it(encoded: EncodedDataset, tmp_path: Path):
    text, out = budget_of(encoded, 0.6), tmp_path / "run"
    config = RunConfig(hparams=HPARAMS, train=TRAIN, method="uniform", controls=(), budget=text, target="torch")
    full, small = run(encoded, config, out)
    assert full.counted_vocabulary_bytes is None
    assert small.counted_vocabulary_bytes == small.vocabulary_bytes
    assert small.table_bytes + small.vocabulary_bytes <= Budget.parse(text).amount
    assert run(encoded, config, out) == [full, small]
    with pytest.raises(DataError, match="vocabulary in the budget = true, now it is false"):
        run(encoded, config.replace(target=None), out)
    # What an earlier release left: "torch" where no target was named, and no vocabulary counted.
    small.replace(counted_vocabulary_bytes=None).save(out / "records" / "uniform-seed0.json")
    with pytest.raises(DataError, match="made with the vocabulary beside its budget"):
        run(encoded, config, out)
    percent = RunConfig(hparams=HPARAMS, train=TRAIN, method="uniform", controls=(), budget="50%", target="torch")
    records = run(encoded, percent, tmp_path / "old")
    assert run(encoded, percent.replace(target=None), tmp_path / "old") == records


def test_grids_know_it(encoded: EncodedDataset, data: EncodedDataset, tmp_path: Path):
    text = budget_of(encoded, 0.6)
    cells = CompareConfig(
        hparams=HPARAMS, train=TRAIN, methods=("uniform",), budgets=(text, "50%"), seeds=1, target="torch"
    )
    made = compare(encoded, cells, tmp_path / "grid")
    assert [r.counted_vocabulary_bytes is None for r in made.records] == [True, False, True]
    assert compare(encoded, cells, tmp_path / "grid").records == made.records
    with pytest.raises(DataError, match="made with vocabulary in the budget = true, now it is false"):
        compare(encoded, cells.replace(target=None), tmp_path / "grid")
    percent = cells.replace(target=None, budgets=("50%",))
    assert compare(encoded, percent, tmp_path / "grid").records == [made.records[0], made.records[2]]
    made = compare(data, cells, tmp_path / "memory")
    assert compare(data, cells, tmp_path / "memory").records == made.records
