"""Runs of `guided` with init "auto": which starts are tried, that the better one is kept, and that the record says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embtrim.compaction.compacting import compact
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import BudgetError
from embtrim.experiments import steps
from embtrim.experiments.records import Trained, started_as
from embtrim.experiments.run import run
from embtrim.experiments.settings import RunConfig
from embtrim.experiments.steps import compact_and_retrain, find_plan, shrink, train_full
from embtrim.tasks.ctr_task import CTRTask
from embtrim.training.checkpoint import Checkpoint
from embtrim.training.evaluation import evaluate
from tests.experiments.grids import FM_RUN, interrupted, outcome
from tests.training.interruptions import same_weights

pytestmark = pytest.mark.slow

CONFIG = FM_RUN.replace(method="guided", bits="mixed")


@pytest.fixture(scope="module")
def full(small: EncodedDataset) -> Trained:
    """A full model whose score no start reaches, so that both are tried."""
    trained = train_full(small, CONFIG)
    trained.record = trained.record.replace(valid={**trained.record.valid, "auc": 1.0})
    return trained


def with_start(config: RunConfig, start: str) -> RunConfig:
    return config.replace(init=start, search={"start": start})


def test_the_start_with_the_better_validation_score_is_kept(full: Trained, small: EncodedDataset) -> None:
    trials = {start: shrink(full, small, with_start(CONFIG, start)) for start in ("low_rank", "scratch")}
    found = shrink(full, small, CONFIG)
    scores = {start: trial.record.valid["auc"] for start, trial in trials.items()}
    assert scores["low_rank"] != scores["scratch"]
    best = max(scores, key=scores.__getitem__)
    expected, record = trials[best].record, found.record
    assert (record.init, record.started, record.search) == ("auto", best, {"start": None})
    assert (record.valid, record.test, record.kept_rows) == (expected.valid, expected.test, expected.kept_rows)
    assert same_weights(found.model, trials[best].model)
    assert found.plan is not None
    assert record.predicted_loss == found.plan.details["predicted_loss"] == expected.predicted_loss
    assert found.plan.details["config"] == {"start": best}
    others = {start: trial.record for start, trial in trials.items()}
    assert {(r.init, r.started, r.search["start"]) for r in others.values()} == {(s, s, s) for s in trials}
    assert record.search_seconds > record.train_seconds, "the training of the other start counts as search"


@pytest.mark.parametrize("worse", ["low_rank", "scratch"])
def test_either_start_may_win(
    worse: str, full: Trained, small: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, make = [], steps.make_record

    def made(model: Any, data: Any, config: RunConfig, *given: Any, **more: Any) -> Any:
        record = make(model, data, config, *given, **more)
        tried.append(record.started)
        score = 0.1 if record.started == worse else 0.9
        return record.replace(valid={**record.valid, "auc": score})

    monkeypatch.setattr(steps, "make_record", made)
    found = shrink(full, small, CONFIG)
    assert tried == ["low_rank", "scratch"]
    assert found.record.started != worse


def test_a_model_within_the_tolerance_ends_the_trials(
    full: Trained, small: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, make = [], steps.make_record
    monkeypatch.setattr(
        steps, "make_record", lambda model, data, config, *given, **more: (
            tried.append(config.init), make(model, data, config, *given, **more)
        )[1],
    )  # fmt: skip
    low_rank = shrink(full, small, with_start(CONFIG, "low_rank")).record.valid["auc"]
    for more, starts in ((0.0011, ["low_rank", "scratch"]), (0.0009, ["low_rank"])):
        tried.clear()
        record = full.record.replace(valid={**full.record.valid, "auc": low_rank + more})
        shrink(Trained(full.model, record), small, CONFIG.replace(tolerance=0.001))
        assert tried == starts


def test_a_start_that_does_not_fit_the_budget_is_left_out(
    full: Trained, small: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, refused = steps.search, {"low_rank"}

    def refusing(task: Any, config: Any, *given: Any, **more: Any) -> Any:
        if config.start in refused:
            raise BudgetError(f"no plan for {config.start}")
        return search(task, config, *given, **more)

    monkeypatch.setattr(steps, "search", refusing)
    monkeypatch.setattr(steps, "plan_from", refusing, raising=False)
    given = Trained(full.model, full.record)
    assert shrink(given, small, CONFIG.replace(bits=32)).record.started == "scratch"
    refused.add("scratch")
    with pytest.raises(BudgetError, match="no plan for scratch"):
        shrink(Trained(full.model, full.record), small, CONFIG.replace(bits=32))


def test_one_start_is_tried_where_it_is_named(full: Trained, small: EncodedDataset) -> None:
    """By `init`, or by the settings of the search."""
    records = [
        shrink(full, small, CONFIG.replace(**change)).record
        for change in ({"init": "scratch"}, {"search": {"start": "low_rank"}}, {"method": "uniform"})
    ]
    assert [(r.init, r.started) for r in records] == [("scratch", "scratch"), ("auto", "low_rank"), ("auto", "scratch")]
    assert [r.predicted_loss is None for r in records] == [False, False, True]
    assert (full.record.init, full.record.started, full.record.predicted_loss) == (None, None, None)


def test_a_model_that_starts_low_rank_is_trained_on(full: Trained, small: EncodedDataset) -> None:
    config = with_start(CONFIG.replace(bits=32), "low_rank")
    plan = find_plan(full.model, small, config).plan
    start = compact(full.model, plan, init="low_rank", task=CTRTask(full.model, small, config.train))
    done = compact_and_retrain(full.model, plan, small, config)
    assert evaluate(done.model, done.data, "valid").auc >= evaluate(start, small.recode(plan), "valid").auc
    untrained = compact_and_retrain(full.model, plan, small, config, retrain=False)
    assert untrained.training is None
    assert same_weights(untrained.model, start)


def test_a_low_rank_start_is_kept_where_training_takes_it_back(full: Trained, small: EncodedDataset) -> None:
    config = with_start(
        CONFIG.replace(bits=32, train=CONFIG.train.replace(learning_rate=3.0, monitor="logloss")), "low_rank"
    )
    plan = find_plan(full.model, small, config).plan
    start = compact(full.model, plan, init="low_rank", task=CTRTask(full.model, small, config.train))
    done = compact_and_retrain(full.model, plan, small, config)
    assert done.training is not None
    assert done.training.best_epoch == 0
    assert len(done.training.history) == config.train.epochs
    assert same_weights(done.model, start)


def test_codes_are_trained_from_a_teacher_alone(full: Trained, small: EncodedDataset) -> None:
    """Training from scratch on clicks ends as the papers' does; with a teacher it ends with training through codes."""
    plan = find_plan(full.model, small, with_start(CONFIG.replace(bits=4), "scratch")).plan
    epochs = {}
    for bits, teacher in ((4, 0.0), (4, 0.5), (32, 0.5)):
        config = CONFIG.replace(init="scratch", bits=bits, teacher=teacher)
        training = compact_and_retrain(full.model, plan.with_bits(bits), small, config).training
        assert training is not None
        epochs[bits, teacher] = [entry["epoch"] for entry in training.history]
    assert epochs == {(4, 0.0): [1, 2], (4, 0.5): [1, 2, 1, 2], (32, 0.5): [1, 2]}


def test_hard_mask_has_a_start_of_its_own(full: Trained, small: EncodedDataset) -> None:
    config = CONFIG.replace(method="hard_mask", bits=32)
    plan = find_plan(full.model, small, config).plan
    assert plan.details["config"]["start"] == "trained"
    assert started_as(plan, "auto") == "scratch"
    assert started_as(plan, "inherit") == "inherit"


@pytest.mark.parametrize("stem, count", [("retraining", 3), ("finishing", 3)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str, count: int
) -> None:
    """Interrupted while it trains on from a low-rank start, or as it is read as its codes."""
    expected = run(small, CONFIG, tmp_path / "whole")
    save, saved = Checkpoint.save, []

    def interrupting(self: Checkpoint, state: Any) -> None:
        save(self, state)
        saved.append(self.path.stem)
        if saved.count(stem) == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupting)
        interrupted(run, small, CONFIG, tmp_path / "x")
    assert saved.count(stem) == count
    found = run(small, CONFIG, tmp_path / "x")
    assert outcome(found) == outcome(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.init, one.started, one.search, one.predicted_loss) == (
            other.init, other.started, other.search, other.predicted_loss,
        )  # fmt: skip
    assert not (tmp_path / "x" / "unfinished").exists()
