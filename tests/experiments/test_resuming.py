"""`compare` continued: killed and extended grids, unfinished state, lost weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embtrim.data.dataset import EncodedDataset
from embtrim.experiments import comparison, steps
from embtrim.experiments.comparison import Comparison, compare
from embtrim.experiments.grid import CompareConfig, read_skipped
from embtrim.experiments.records import read_records
from embtrim.training.checkpoint import Checkpoint
from tests.cli.workshop import call, environment
from tests.conftest import planted_data
from tests.experiments.grids import CONFIG, FM_ONLY, copy_of, ctrl_c, interrupted, never, outcome, until
from tests.experiments.test_compare_command import GRID

pytestmark = pytest.mark.slow


def test_killed_grid_goes_on(encoded: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "embtrim", "compare", str(encoded), *GRID, "--out", str(out), "--quiet"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    until(lambda: len(list(out.glob("records/*.json"))) >= 3)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("records/*.json")}
    assert 3 <= len(before) < 10, "killed in the middle"

    done = call("compare", encoded, *GRID, "--out", out)
    assert done.code == 0, done.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(re.findall(r"of 10: ", done.err)) == 10 - len(before)
    assert "10 of 10: fm random 20%, seed 0: test AUC" in done.err
    assert call("compare", encoded, *GRID, "--out", whole, "--quiet").code == 0
    assert len(read_records(out)) == 10
    assert outcome(read_records(out)) == outcome(read_records(whole))


WHOLE: list[Any] = []  # records of the test below that no interruption touched, under its settings before and after


@pytest.mark.parametrize("where", ["after the search", "while it retrains", "while the search trains"])
def test_unfinished_state_of_other_settings_is_not_taken(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """A cell that was killed goes on where only the settings are still the same: no record may say others than its plan's."""

    def config(**changes: Any) -> CompareConfig:
        settings = {"epochs": 2, "generations": 1, "threshold_weight": 0.0, **changes}
        variant = {"method": "optembed", **settings}
        train = CONFIG.train.replace(checkpoint_seconds=0)
        return FM_ONLY.replace(methods=(), variants={"x": variant}, budgets=("30%",), train=train)

    save, saved = Checkpoint.save, []

    def interrupting(self: Checkpoint, state: Any) -> None:
        save(self, state)
        saved.append(self.path.stem)
        if saved.count("training-1") == 3 if where == "while the search trains" else saved.count("retraining") == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "after the search":
            patch.setattr(steps, "verify", ctrl_c)
        else:
            patch.setattr(Checkpoint, "save", interrupting)
        interrupted(compare, small, config(), tmp_path / "x")
    changed = config(threshold_weight=0.1)
    if not WHOLE:  # the same for each place
        WHOLE.extend(
            compare(small, some, tmp_path / f"whole-{n}").records for n, some in enumerate((config(), changed))
        )
        old, new = (outcome(records)["fm x 30% 0"] for records in WHOLE)
        assert old != new, "the settings matter"
    expected = WHOLE[1]
    caplog.clear()
    found = compare(small, changed, tmp_path / "x").records
    assert outcome(found) == outcome(expected)
    assert "fm-x-30pct-seed0 was begun with search.threshold_weight = 0.0, now it is 0.1; this work" in caplog.text


def test_unfinished_full_model_of_other_settings_is_not_taken(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = FM_ONLY.replace(methods=("uniform",), variants={}, budgets=("30%",))
    config = config.replace(train=CONFIG.train.replace(epochs=3, checkpoint_seconds=0))
    save = Checkpoint.save

    def interrupting(self: Checkpoint, state: Any) -> None:
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupting)
        interrupted(compare, small, config, tmp_path / "x")
        interrupted(compare, small, config, tmp_path / "y")
    made = compare(small, config.replace(train=config.train.replace(epochs=2)), tmp_path / "x")
    assert [record.variant for record in made.records] == ["full", "uniform"]
    assert "fm-full-seed0/full.safetensors belongs to a training with epochs = 3, now it is 2; " in caplog.text
    made = compare(planted_data(num_rows=500, noise_vocab=20), config, tmp_path / "y")
    assert [record.variant for record in made.records] == ["full", "uniform"]
    assert "fm-full-seed0/full.safetensors belongs to a training with plan = " in caplog.text


def test_unfinished_state_of_the_same_settings_is_taken(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FM_ONLY.replace(methods=("random",), variants={}, budgets=("30%",))
    with monkeypatch.context() as patch:
        patch.setattr(steps, "verify", ctrl_c)
        interrupted(compare, small, config, tmp_path / "x")
    monkeypatch.setattr(steps, "search", never)
    assert [r.variant for r in compare(small, config, tmp_path / "x").records] == ["full", "random"]
    assert not (tmp_path / "x" / "unfinished").exists()


def test_grid_grows_on_the_full_models_it_has(
    first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_of(first, tmp_path / "grown")
    before = {path: path.stat().st_mtime_ns for path in out.glob("records/*.json")}
    monkeypatch.setattr(comparison, "train_full_swept", never)
    seen: list[tuple[str, int, int]] = []
    more = CONFIG.replace(methods=("random", "sseds"), budgets=("30%", "40%"))
    told = SimpleNamespace(on_record=lambda record, done, total: seen.append((record.variant, done, total)))
    grown = compare(small, more, out, callbacks=[told])
    # 2 models x 2 budgets x 3 labels; of each model random and wide-sseds at 30% are there.
    assert len(grown.records) == 2 + 12
    assert len(seen) == 12 - 4
    assert seen[0] == ("sseds", 7, 14)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(out.glob("records/*.json"))) == len(before) + 8
    monkeypatch.undo()
    grown = compare(small, CONFIG.replace(seed=1, budgets=("50%",), variants={}), out)
    assert {r.seed for r in grown.records} == {1}


def test_loaded_full_model_gives_the_same_as_a_trained_one(
    first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path
) -> None:
    out = copy_of(first, tmp_path / "again")
    for path in out.glob("records/*sseds*"):
        path.unlink()
    assert outcome(compare(small, CONFIG, out).records) == outcome(first[1].records)


def test_lost_and_damaged_weights(first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path) -> None:
    out = copy_of(first, tmp_path / "lost")
    weights = out / "full" / "fm-seed0.safetensors"
    kept = weights.read_bytes()
    (out / "records" / "fm-random-30pct-seed0.json").unlink()
    weights.write_bytes(kept[: len(kept) // 2])
    (skipped,) = compare(small, CONFIG, out).skipped
    assert (skipped.model, skipped.label) == ("fm", "random")
    assert "fm-seed0.safetensors is damaged" in skipped.reason
    weights.unlink()
    again = compare(small, CONFIG, out)
    assert outcome(again.records) == outcome(first[1].records)
    assert weights.read_bytes() == kept
    assert read_skipped(out) == []
    weights.unlink()
    compare(small, CONFIG, out)
    assert not weights.exists(), "nothing needs them"
