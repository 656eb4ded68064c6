"""`embedding_l2` of a full model: chosen where it is not given, and recorded."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embtrim.config import read_toml
from embtrim.data.dataset import EncodedDataset
from embtrim.experiments import steps, sweep
from embtrim.experiments.comparison import compare
from embtrim.experiments.records import RunRecord
from embtrim.experiments.run import run
from embtrim.experiments.steps import train_full
from embtrim.experiments.sweep import L2Trial, chosen_l2
from embtrim.reports.run_page import render_page
from embtrim.training.fitting import fit
from embtrim.training.settings import Hooks
from tests.experiments.grids import CONFIG, FM_RUN

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
OPEN = FM_RUN.replace(train=FM_RUN.train.replace(embedding_l2=None), method="random")


@pytest.mark.parametrize(
    "scores, tried, chosen",
    [
        ({0.1: 0.8, 0.01: 0.7}, [0.1, 0.01], 0.1),
        ({0.1: 0.6, 0.01: 0.7, 0.0: 0.7019}, [0.1, 0.01, 0.0], 0.01),
        ({0.1: 0.5, 0.01: 0.6, 0.0: 0.7}, [0.1, 0.01, 0.0], 0.0),
    ],
)
def test_smaller_values_are_tried_while_they_do_better(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: Any, tried: Any, chosen: float
) -> None:
    def trial(data: Any, sample: Any, config: Any, value: float, *rest: Any) -> tuple[L2Trial, float]:
        return L2Trial(embedding_l2=value, score=scores[value], best_epoch=1, epochs=2), 0.0

    monkeypatch.setattr(sweep, "_trial", trial)
    found = chosen_l2(small, OPEN, tmp_path / "choice.json")
    assert [trial.embedding_l2 for trial in found.trials] == tried
    assert found.embedding_l2 == chosen
    monkeypatch.setattr(sweep, "_trial", None)
    assert chosen_l2(small, OPEN, tmp_path / "choice.json") == found


def test_an_interrupted_sweep_goes_on_where_it_was(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "MARGIN", -1.0)  # all values are tried
    expected = chosen_l2(small, OPEN)
    path = tmp_path / "choice.json"
    trained: list[tuple[float, int]] = []

    def fit_stopped(stop_in: int, *given: Any, **settings: Any) -> Any:
        def step(number: int) -> None:
            steps_made.append(number)
            if len(trained) == stop_in - 1 and number == 5:
                raise KeyboardInterrupt

        steps_made: list[int] = []
        try:
            return fit(*given, **settings, hooks=Hooks(on_step=step))
        finally:
            trained.append((given[2].embedding_l2, len(steps_made)))

    monkeypatch.setattr(sweep, "fit", partial(fit_stopped, 2))
    with pytest.raises(KeyboardInterrupt):
        chosen_l2(small, OPEN, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["choice-0.01.safetensors", "choice-trials.json"]
    (_, all_steps), (_, first_steps) = trained
    trained.clear()
    monkeypatch.setattr(sweep, "fit", partial(fit_stopped, 0))
    found = chosen_l2(small, OPEN, path)
    # The interrupted step is made again.
    assert trained == [(0.01, all_steps - first_steps + 1), (0.0, all_steps)]
    assert found.replace(seconds=0.0) == expected.replace(seconds=0.0)
    assert [file.name for file in tmp_path.iterdir()] == ["choice.json"]


def test_a_sweep_takes_a_sample_of_large_data(small: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = small.num_rows("train")
    monkeypatch.setattr(sweep, "LEAST_ROWS", 50)
    found = chosen_l2(small, OPEN)
    assert found.rows == rows // 4
    sample = small.sampled("train", found.rows, seed=3)
    assert sample.num_rows("valid") == small.num_rows("valid")
    ids, all_ids = np.asarray(sample.split("train").ids), np.asarray(small.split("train").ids)
    assert {row.tobytes() for row in ids} <= {row.tobytes() for row in all_ids}
    assert small.sampled("train", rows) is small


def test_run_trains_all_models_with_the_chosen_value(
    small: EncodedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.INFO, "embtrim"):
        records = run(small, OPEN, tmp_path / "run", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert "seed 0, sweep, embedding_l2 = 0.1: begins" in lines
    assert any(
        re.match(r"seed 0, full model: epoch 1 of at most \d+, loss .*, valid auc 0\.\d+, .* s", x) for x in lines
    )
    assert any(re.match(r"seed 0: 1 of 2 models are made, about 0:0\d:\d\d left", line) for line in lines)
    assert {"seed 0, random, search: begins", "seed 0, random, retraining: begins"} <= set(lines)
    chosen = records[0].l2_sweep
    assert chosen is not None
    assert f"embedding_l2 is not given; {chosen['embedding_l2']:g} is chosen" in caplog.text
    assert chosen["rows"] == small.num_rows("train")
    assert {record.train["embedding_l2"] for record in records} == {chosen["embedding_l2"]}
    assert [record.l2_sweep for record in records[1:]] == [None]
    assert f"embedding_l2 {chosen['embedding_l2']:g} was chosen" in render_page(records)
    given = OPEN.replace(train=OPEN.train.replace(embedding_l2=chosen["embedding_l2"]))
    monkeypatch.setattr(steps, "chosen_l2", None)  # neither for a given value nor for a run that goes on
    again = run(small, given, tmp_path / "given")
    assert [record.test for record in again] == [record.test for record in records]
    assert run(small, OPEN, tmp_path / "run") == records
    (tmp_path / "run" / "records" / "random-seed0.json").unlink()
    assert [r.test for r in run(small, OPEN, tmp_path / "run")] == [record.test for record in records]


def test_compare_chooses_once_for_a_full_model(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = CONFIG.train.replace(embedding_l2=None)
    grid = CONFIG.replace(
        models=("fm",), hparams={"embedding_dim": 4}, train=train, variants={}, methods=("random",), budgets=("30%",)
    )
    made = compare(small, grid, tmp_path / "grid").records
    assert made[0].l2_sweep is not None
    monkeypatch.setattr(steps, "chosen_l2", None)
    grown = compare(small, grid.replace(budgets=("30%", "50%")), tmp_path / "grid").records
    assert len(grown) == 3
    assert {record.train["embedding_l2"] for record in grown} == {made[0].l2_sweep["embedding_l2"]}


def test_a_full_model_that_overfits_at_once_is_said(small: EncodedDataset, caplog: pytest.LogCaptureFixture) -> None:
    train = FM_RUN.train.replace(epochs=4, patience=0, learning_rate=0.3)
    record = train_full(small, FM_RUN.replace(train=train)).record
    assert record.best_epoch == 1
    assert "the full model was at its best after its first epoch" in caplog.text
    before = RunRecord.model_validate(record.model_dump(exclude={"best_epoch", "l2_sweep"}))  # an earlier release's
    assert (before.best_epoch, before.l2_sweep) == (None, None)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_give_their_value(recipe: Path) -> None:
    assert "embedding_l2" in read_toml(recipe)["train"]
