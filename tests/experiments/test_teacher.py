"""Runs and grids whose compact models have a teacher: what trains on soft labels, how often they are made, what resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embtrim.compaction.compacting import compact
from embtrim.config import read_toml
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import ConfigError, DataError
from embtrim.experiments import steps
from embtrim.experiments.comparison import compare
from embtrim.experiments.grid import cell_config, grid, resolve, settings_by_label
from embtrim.experiments.records import RunRecord, Trained
from embtrim.experiments.run import run
from embtrim.experiments.settings import RunConfig
from embtrim.experiments.steps import compact_and_retrain, find_plan, shrink, train_full
from embtrim.plan.plan import SizePlan
from embtrim.system.unfinished import OtherTrainingError
from embtrim.training.checkpoint import Checkpoint
from embtrim.training.fitting import fit
from embtrim.training.settings import TrainConfig
from embtrim.training.teaching import taught
from tests.experiments.grids import FM_ONLY, FM_RUN, interrupted, outcome
from tests.training.interruptions import same_weights

pytestmark = pytest.mark.slow

CONFIG = FM_RUN.replace(method="random", controls=("uniform",), bits=32)


@pytest.fixture
def full(small: EncodedDataset) -> Trained:
    return train_full(small, CONFIG)


@pytest.fixture
def plan(full: Trained, small: EncodedDataset) -> SizePlan:
    return find_plan(full.model, small, CONFIG).plan


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The share of each call of `taught` from here on."""
    given = []

    def noted(data: EncodedDataset, model: Any, share: float, config: TrainConfig) -> EncodedDataset:
        given.append(share)
        return taught(data, model, share, config)

    monkeypatch.setattr(steps, "taught", noted)
    return given


def interrupt_retraining(patch: pytest.MonkeyPatch) -> None:
    """Have the retraining of a compact model be interrupted after its third checkpoint."""
    save, saved = Checkpoint.save, []

    def interrupting(self: Checkpoint, state: Any) -> None:
        save(self, state)
        saved.append(self.path.stem)
        if saved.count("retraining") == 3:
            raise KeyboardInterrupt

    patch.setattr(Checkpoint, "save", interrupting)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_compact_model_trains_on_the_labels_of_its_teacher(
    full: Trained, plan: SizePlan, small: EncodedDataset, share: float
) -> None:
    done = compact_and_retrain(full.model, plan, small, CONFIG.replace(teacher=share))
    expected = compact(full.model, plan, init="scratch", seed=0)
    fit(expected, taught(small, full.model, share, CONFIG.train), CONFIG.train)
    assert same_weights(done.model, expected)
    for name, arrays in small.splits.items():
        assert np.array_equal(done.data.split(name).labels, arrays.labels), "metrics are of clicks"
    other = compact_and_retrain(full.model, plan, small, CONFIG.replace(teacher=0.25))
    assert not same_weights(done.model, other.model)


def test_records_name_the_teacher_of_compact_models(full: Trained, small: EncodedDataset) -> None:
    record = shrink(full, small, CONFIG).record
    assert (full.record.teacher, record.teacher) == (0.0, 0.5)
    assert shrink(full, small, CONFIG.replace(teacher=0)).record.teacher == 0.0
    values = json.loads(record.model_dump_json())
    del values["teacher"]
    assert RunRecord.parse(values).teacher == 0.0, "records from before there was a teacher"


def test_soft_labels_are_made_once_for_a_full_model(small: EncodedDataset, tmp_path: Path, shares: list[float]) -> None:
    run(small, CONFIG.replace(seeds=2, controls=("uniform", "frequency")), tmp_path / "run")
    assert shares == [0.5, 0.5], "two full models, three compact ones each"
    shares.clear()
    variants = {"taught": {"method": "random", "teacher": 0.75}, "untaught": {"method": "random", "teacher": 0}}
    config = FM_ONLY.replace(methods=("random", "uniform"), variants=variants, budgets=("50%", "30%"))
    records = compare(small, config, tmp_path / "grid").records
    assert shares == [0.5, 0.75, 0.0]
    assert {r.variant: r.teacher for r in records} == {
        "full": 0.0, "random": 0.5, "uniform": 0.5, "taught": 0.75, "untaught": 0.0,
    }  # fmt: skip


def test_a_resumed_run_with_a_teacher_ends_as_an_uninterrupted_one(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(small, CONFIG, tmp_path / "whole")
    untaught = run(small, CONFIG.replace(teacher=0), tmp_path / "untaught")
    assert outcome(expected) != outcome(untaught)
    with monkeypatch.context() as patch:
        interrupt_retraining(patch)
        interrupted(run, small, CONFIG, tmp_path / "x")
    assert (tmp_path / "x" / "unfinished" / "seed0" / "random" / "retraining.safetensors").exists()
    assert outcome(run(small, CONFIG, tmp_path / "x")) == outcome(expected)


def test_unfinished_state_of_another_teacher_is_not_taken(
    full: Trained, small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    untaught = CONFIG.replace(teacher=0)
    expected = {c.teacher: shrink(full, small, c).record for c in (CONFIG, untaught)}
    for then, now in ((CONFIG, untaught), (untaught, CONFIG)):
        work = tmp_path / str(then.teacher)
        with monkeypatch.context() as patch:
            interrupt_retraining(patch)
            with pytest.raises(KeyboardInterrupt):
                shrink(full, small, then, unfinished=work)
        caplog.clear()
        record = shrink(full, small, now, unfinished=work).record
        assert "was begun with teacher = " in caplog.text
        assert outcome([record]) == outcome([expected[now.teacher]])


def test_a_checkpoint_of_another_teacher_is_refused(
    full: Trained, plan: SizePlan, small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "retraining.safetensors"
    expected = compact_and_retrain(full.model, plan, small, CONFIG)
    with monkeypatch.context() as patch:
        interrupt_retraining(patch)
        with pytest.raises(KeyboardInterrupt):
            compact_and_retrain(full.model, plan, small, CONFIG, checkpoint=path)
    with pytest.raises(OtherTrainingError, match=r"with teacher = 0.5, now it is 0.0"):
        compact_and_retrain(full.model, plan, small, CONFIG.replace(teacher=0), checkpoint=path)
    other = train_full(small, CONFIG.replace(train=CONFIG.train.replace(epochs=1))).model
    with pytest.raises(OtherTrainingError, match=r"with teacher_weights = \d+, now it is \d+"):
        compact_and_retrain(other, plan, small, CONFIG, checkpoint=path)
    again = compact_and_retrain(full.model, plan, small, CONFIG, checkpoint=path)
    assert same_weights(again.model, expected.model)


def test_a_run_from_before_there_was_a_teacher_had_none(small: EncodedDataset, tmp_path: Path) -> None:
    untaught = CONFIG.replace(teacher=0, controls=())
    records = run(small, untaught, tmp_path)
    settings = tmp_path / "config.toml"
    assert read_toml(settings)["teacher"] == 0.0
    settings.write_text(settings.read_text().replace("teacher = 0.0\n", ""))
    assert run(small, untaught, tmp_path) == records
    settings.write_text(settings.read_text().replace("teacher = 0.0\n", ""))
    with pytest.raises(DataError, match=r"belongs to a run with teacher = 0.0, now it is 0.5"):
        run(small, CONFIG.replace(controls=()), tmp_path)


def test_a_grid_from_before_there_was_a_teacher_had_none(small: EncodedDataset, tmp_path: Path) -> None:
    config = FM_ONLY.replace(methods=("random",), variants={}, budgets=("50%",), teacher=0)
    records = compare(small, config, tmp_path).records
    for path in tmp_path.glob("records/*.json"):
        values = json.loads(path.read_text())
        del values["teacher"]
        path.write_text(json.dumps(values))
    assert compare(small, config, tmp_path).records == records
    with pytest.raises(DataError, match=r"random-50pct-seed0.json was made with teacher = 0.0, now it is 0.5; choose"):
        compare(small, config.replace(teacher=0.5), tmp_path)


def test_a_variant_has_a_teacher_of_its_own() -> None:
    variants = {"own": {"method": "random", "teacher": 1}, "same": {"method": "random"}}
    config = resolve(FM_ONLY.replace(variants=variants, teacher=0.25))
    found = settings_by_label(config)
    assert {label: found[label].teacher for label in ("uniform", "own", "same")} == {
        "uniform": 0.25, "own": 1.0, "same": 0.25,
    }  # fmt: skip
    assert {cell_config(config, cell).teacher for cell in grid(config) if cell.label == "own"} == {1.0}


@pytest.mark.parametrize("given", [1.5, -0.1, "half", True])
def test_a_share_lies_between_0_and_1(given: Any) -> None:
    config = FM_ONLY.replace(variants={"x": {"method": "random", "teacher": given}})
    with pytest.raises(ConfigError, match=r"\[variants.x\] teacher must be a number from 0 to 1; given"):
        settings_by_label(config)
    if given is not True:
        with pytest.raises(ConfigError, match="RunConfig: teacher, given"):
            RunConfig(teacher=given)
