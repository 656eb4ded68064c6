"""A compact model knows its plan until it is saved: fit, evaluate, predict_logits and save recode data by themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import embtrim
from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError
from embtrim.models.ctr_model import CTRModel
from embtrim.models.deepfm import DeepFM
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block
from embtrim.serving.bundle import load_bundle, save
from embtrim.tasks.ctr_task import CTRTask
from embtrim.training.evaluation import evaluate, predict_logits
from embtrim.training.fitting import fit
from embtrim.training.settings import TrainConfig

QUICK = TrainConfig(epochs=3, batch_size=256, learning_rate=3e-3, precision="fp32")


def model_of(data: EncodedDataset) -> DeepFM:
    return DeepFM(data.schema, embedding_dim=4, hidden_units=(16,))


def plan_of(model: CTRModel, seed: int = 0) -> SizePlan:
    """Half of the rows of each table, drawn by the seed."""
    rng, full = np.random.default_rng(seed), model.tables.plan
    tables = []
    for t in full.tables:
        rows = np.sort(rng.choice(t.num_rows, t.num_rows // 2, replace=False)).astype(np.int32)
        tables.append(dataclasses.replace(t, blocks=(Block(len(rows), t.columns, "scatter", rows),)))
    return dataclasses.replace(full, tables=tuple(tables))


@pytest.fixture
def compacted(wide_data: EncodedDataset) -> tuple[CTRModel, SizePlan]:
    full = model_of(wide_data)
    return compact(full, plan_of(full)), plan_of(full)


@pytest.fixture
def recoded_times(monkeypatch: pytest.MonkeyPatch) -> list[SizePlan]:
    """The plans of all calls of `recode` from here on."""
    plans, recode = [], EncodedDataset.recode

    def noted(data: EncodedDataset, plan: SizePlan) -> EncodedDataset:
        plans.append(plan)
        return recode(data, plan)

    monkeypatch.setattr(EncodedDataset, "recode", noted)
    return plans


def test_fit_recodes_once(wide_data: EncodedDataset, compacted, recoded_times: list[SizePlan]) -> None:
    small, plan = compacted
    other = compact(model_of(wide_data), plan)
    result = fit(small, wide_data, QUICK)
    assert len(result.history) == 3
    assert len(recoded_times) == 1
    fit(other, wide_data.recode(plan), QUICK)
    assert all(map(torch.equal, small.state_dict().values(), other.state_dict().values()))


def test_evaluate_and_predict_logits_recode(wide_data: EncodedDataset, compacted) -> None:
    small, plan = compacted
    recoded = wide_data.recode(plan)
    assert evaluate(small, wide_data, "test", deciles=True) == evaluate(small, recoded, "test", deciles=True)
    np.testing.assert_array_equal(predict_logits(small, wide_data), predict_logits(small, recoded))


def test_evaluate_recodes_once(wide_data: EncodedDataset, compacted, recoded_times: list[SizePlan]) -> None:
    evaluate(compacted[0], wide_data, "test", deciles=True)
    assert len(recoded_times) == 1


def test_save_recodes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 50, 3000), rng.integers(0, 40, 3000)
    raw = pl.DataFrame({"user": user, "item": item, "click": (rng.random(3000) < 0.2 + user / 100).astype(int)})
    data = embtrim.encode(raw, label="click", out=tmp_path / "data")
    small = compact(model_of(data), plan_of(model_of(data)))
    save(small, tmp_path / "bundle", data)
    save(small, tmp_path / "recoded", data.recode(small.tables.plan))
    assert (tmp_path / "bundle" / "bundle.json").read_text() == (tmp_path / "recoded" / "bundle.json").read_text()
    opened = load_bundle(tmp_path / "bundle").model
    for call in (evaluate, predict_logits, lambda model, data: fit(model, data, QUICK)):
        with pytest.raises(DataError, match=r"plan does not list the rows that it keeps; give data\.recode"):
            call(opened, data)
    assert evaluate(opened, data.recode(small.tables.plan)) == evaluate(small, data)
    with pytest.raises(DataError, match="plan does not list the rows"):
        save(opened, tmp_path / "again", data)
    save(opened, tmp_path / "again", data, plan=small.tables.plan)
    assert (tmp_path / "again" / "bundle.json").read_text() == (tmp_path / "bundle" / "bundle.json").read_text()


def test_verify_takes_data_as_they_were_encoded(wide_data: EncodedDataset) -> None:
    model = model_of(wide_data)
    assert verify(model, plan_of(model), wide_data).passed
    with pytest.raises(DataError, match="re-coded, but the model reads the stored ones"):
        verify(model, plan_of(model), wide_data.recode(plan_of(model)))


def test_a_task_of_a_compact_model_gives_its_batches(wide_data: EncodedDataset, compacted) -> None:
    small, plan = compacted
    task = CTRTask(small, wide_data, QUICK)
    for batch, expected in zip(task.batches("train", 3), wide_data.recode(plan).batches("train", 256, 3), strict=True):
        assert torch.equal(batch.ids_BC, expected.ids_BC)
    assert task.valid_score(small) == evaluate(small, wide_data, "valid").auc


def test_a_task_of_the_full_model_trains_compact_ones(wide_data: EncodedDataset, compacted) -> None:
    small, plan = compacted
    full = model_of(wide_data)
    other = compact(full, plan)
    task = CTRTask(full, wide_data, QUICK)
    task.fit(small, epochs=1, seed=0)
    task.recoded(plan).fit(other, epochs=1, seed=0)
    assert all(map(torch.equal, small.state_dict().values(), other.state_dict().values()))
    assert task.valid_score(small) == task.recoded(plan).valid_score(other)


def test_data_recoded_by_another_plan_are_refused(wide_data: EncodedDataset, compacted) -> None:
    """Their ids would read other rows, without any error where both plans have the same sizes."""
    small, plan = compacted
    evaluate(small, wide_data.recode(plan), "test")
    for call in (
        lambda data: evaluate(small, data, "test"),
        lambda data: predict_logits(small, data),
        lambda data: fit(small, data, QUICK),
    ):
        with pytest.raises(DataError, match="are re-coded by another plan than the model's"):
            call(wide_data.recode(plan_of(model_of(wide_data), seed=1)))
    with pytest.raises(DataError, match="re-coded, but the model reads the stored ones"):
        evaluate(model_of(wide_data), wide_data.recode(plan), "test")


def test_data_of_another_schema_are_refused(data: EncodedDataset, compacted) -> None:
    for call in (evaluate, predict_logits, lambda model, data: fit(model, data, QUICK), CTRTask):
        with pytest.raises(DataError, match="model was made for schema"):
            call(compacted[0], data)
