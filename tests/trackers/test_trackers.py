"""Trackers: which run of a tool each epoch and record goes into, and the real tools where they are installed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from embtrim import trackers
from embtrim.errors import ConfigError
from embtrim.trackers import MLflow, TensorBoard, WandB, tracker, tracker_beside
from embtrim.trackers.tracker import Tracker
from embtrim.training.callbacks import Epoch
from tests.cli.workshop import TINY, call, write_log
from tests.reports.test_comparison import cell

FULL, SMALL = cell("full", 0, 0.76), cell("sseds", 0, 0.75)


def epoch(name: str, number: int) -> Epoch:
    return Epoch(name, "retraining", number, 5, 0.5 / number, 0.7, "auc", 1.0, 2.0)


class Listed(Tracker):
    """Lists what a tool would be told."""

    tool = "listed"

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def begin(self, name: str) -> str:
        self.told.append(f"begin {name}")
        return name

    def write(self, run: str, metrics: dict[str, float], step: int) -> None:
        self.told.append((run, step, metrics["train_loss"], metrics["valid_auc"]))

    def describe(self, run: str, params: dict[str, Any], metrics: dict[str, float]) -> None:
        self.told.append((run, params["variant"], metrics["test_auc"]))

    def end(self, run: str, finished: bool) -> None:
        self.told.append(f"end {run} {finished}")


def test_each_model_is_one_run() -> None:
    listed = Listed()
    with listed:
        for number in (1, 2):
            listed.on_epoch(epoch("deepfm-sseds-10pct-seed0", number))
        listed.on_epoch(epoch("deepfm-sseds-10pct-seed0", 1))  # a further training of the same model
        listed.on_record(SMALL, 1, 3)
        listed.on_record(FULL, 2, 3)  # no epoch was left
        listed.on_epoch(epoch("a", 3))  # continued, then skipped
        listed.on_epoch(epoch("b", 1))  # interrupted
    name = "deepfm-sseds-10pct-seed0"
    assert listed.told == [
        f"begin {name}", (name, 1, 0.5, 0.7), (name, 2, 0.25, 0.7), (name, 3, 0.5, 0.7), (name, "sseds", 0.75), f"end {name} True",
        "begin deepfm-full-seed0", ("deepfm-full-seed0", "full", 0.76), "end deepfm-full-seed0 True",
        "begin a", ("a", 3, 0.5 / 3, 0.7), "end a False", "begin b", ("b", 1, 0.5, 0.7), "end b False",
    ]  # fmt: skip
    listed.close()
    assert listed.told[-1] == "end b False", "once"


def test_a_tool_that_fails_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Full(Listed):
        def write(self, run: str, metrics: dict[str, float], step: int) -> None:
            raise OSError("no room\nat all")

    full = Full()
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            full.on_epoch(epoch("x", number))
        full.on_record(SMALL, 1, 1)
    full.close()
    assert full.told == ["begin x"]
    assert caplog.messages == ["listed raised OSError (no room); nothing more is tracked, the work goes on"]


def test_names_are_those_of_run_and_compare() -> None:
    of_run = SMALL.replace(method=None)
    names = [tracker.name_of(r) for r in (FULL, SMALL, of_run)]
    assert names == ["deepfm-full-seed0", "deepfm-sseds-10pct-seed0", "deepfm-sseds-seed0"]
    params = tracker.params_of(SMALL)
    assert params["model"] == "deepfm"
    assert (params["train.epochs"], params["hparams.embedding_dim"], params["data"]) == (2, 8, "logs")
    assert all(isinstance(value, (str, int, float)) for value in params.values())
    assert tracker.metrics_of(SMALL)["table_bytes"] == SMALL.table_bytes


@pytest.mark.parametrize(("name", "made"), [("tensorboard", TensorBoard), ("mlflow", MLflow), ("wandb", WandB)])
def test_a_missing_tool_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, made
) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(tracker, "import_module", missing)
    with pytest.raises(ConfigError, match=rf"No module named '{name}'\): pip install 'embtrim\[{name}\]'"):
        tracker_beside(name, tmp_path / "x")
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        tracker_beside("tensorbord", tmp_path / "x")


def test_the_commands_track_and_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path / "log.csv", num_rows=600)
    assert call("encode", tmp_path / "log.csv", "--label", "click", "--out", tmp_path / "data").code == 0
    made: list[Listed] = []

    def listed(name: str, out: Path) -> Listed:
        made.append(Listed())
        made[-1].told.append((name, out.name))
        return made[-1]

    monkeypatch.setattr(trackers, "tracker_beside", listed)
    tiny = [*TINY, "--set", "train.epochs=1", "--quiet", "--track", "wandb", "--out"]
    assert call("train", tmp_path / "data", *tiny, tmp_path / "full").code == 0
    grid = ["--models", "deepfm", "--methods", "uniform", "--budgets", "50%", "--seeds", "1"]
    assert call("compare", tmp_path / "data", *grid, *tiny, tmp_path / "grid").code == 0
    of_train, of_grid = ([word for word in one.told if isinstance(word, str)] for one in made)
    assert [one.told[0] for one in made] == [("wandb", "full"), ("wandb", "grid")]
    assert of_train == ["begin deepfm-full-seed0", "end deepfm-full-seed0 True"]
    name = "deepfm-uniform-50pct-seed0"
    assert of_grid == ["begin deepfm-full-seed0", "end deepfm-full-seed0 True", f"begin {name}", f"end {name} True"]


def tracked(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models written by a real tool, beside the folder of a run."""
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(folder)
    with tracker_beside(name, folder / "cmp") as tool:
        for number in (1, 2):
            tool.on_epoch(epoch("deepfm-full-seed0", number))
        tool.on_record(FULL, 1, 2)
        tool.on_record(SMALL, 2, 2)
        tool.on_epoch(epoch("deepfm-uniform-10pct-seed0", 1))
        assert not tool._failed


def close(a: float, b: float) -> bool:
    return abs(a - b) < 1e-6


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked("tensorboard", tmp_path, monkeypatch)
    folders = sorted(path.name for path in (tmp_path / "tensorboard" / "cmp").iterdir())
    assert folders == ["deepfm-full-seed0", "deepfm-sseds-10pct-seed0", "deepfm-uniform-10pct-seed0"]
    found = EventAccumulator(str(tmp_path / "tensorboard" / "cmp" / folders[0])).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train_loss")] == [(1, 0.5), (2, 0.25)]
    assert close(found.Scalars("final/test_auc")[0].value, 0.76)
    assert "_hparams_/session_start_info" in found.Tags()["tensors"] or found.summary_metadata


@pytest.mark.filterwarnings("default")
def test_mlflow_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    tracked("mlflow", tmp_path, monkeypatch)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("cmp").experiment_id], order_by=["start_time"])
    assert [(run.info.run_name, run.info.status) for run in runs] == [
        ("deepfm-full-seed0", "FINISHED"), ("deepfm-sseds-10pct-seed0", "FINISHED"), ("deepfm-uniform-10pct-seed0", "KILLED"),
    ]  # fmt: skip
    history = client.get_metric_history(runs[0].info.run_id, "train_loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]
    assert runs[1].data.metrics["test_auc"] == 0.75
    assert runs[1].data.params["budget"] == "10%"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]


@pytest.mark.filterwarnings("default")
def test_wandb_keeps_its_files_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    tracked("wandb", tmp_path, monkeypatch)
    files = [path.read_bytes() for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))]
    names = (b"deepfm-full-seed0", b"deepfm-sseds-10pct-seed0", b"deepfm-uniform-10pct-seed0")
    found = {name: next(file for file in files if name in file) for name in names}
    assert len(files) == 3
    assert all(text in found[names[0]] for text in (b"train_loss", b"0.25", b"test_auc", b"0.76", b"cmp"))
    assert b"test_auc" not in found[names[2]]
