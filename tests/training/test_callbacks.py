"""Callbacks of `fit` and `Task.fit`: what they are told, and what an error of theirs leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from embtrim.errors import ConfigError
from embtrim.models import build
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.task import Task
from embtrim.testing.toys import ForeignModel, foreign_batches
from embtrim.training.callbacks import Epoch
from embtrim.training.checkpoint import CheckpointFolder
from embtrim.training.fitting import fit
from tests.recorder import Recorder
from tests.training.interruptions import TRAIN, same_weights, told


@pytest.mark.parametrize("monitor", ["auc", "logloss"])
def test_fit_tells_each_epoch_once(data, monitor: str) -> None:
    recorder, only = Recorder(), []
    model = build("fm", data.schema, embedding_dim=4)
    callbacks = [recorder, SimpleNamespace(on_epoch=only.append), SimpleNamespace(on_record=print)]
    result = fit(model, data, TRAIN.replace(monitor=monitor, checkpoint_seconds=300), callbacks=callbacks)
    assert only == recorder.epochs
    assert [(e.epoch, e.loss, e.score, e.lr_factor, e.seconds) for e in only] == [
        (h["epoch"], h["loss"], h["score"], h["lr_factor"], h["seconds"]) for h in result.history
    ]
    assert {(e.name, e.stage, e.most_epochs, e.monitor) for e in only} == {("", "", TRAIN.epochs, monitor)}
    shown = only[0].metrics()
    assert 0 < shown[f"valid_{monitor}"] < 1, "a logloss is shown with its own sign"
    assert set(shown) == {"train_loss", "lr_factor", "epoch_seconds", f"valid_{monitor}"}


@pytest.mark.parametrize("at", [1, 4], ids=["first epoch", "last epoch"])
def test_an_error_comes_through_after_the_checkpoint(data, tmp_path: Path, at: int) -> None:
    """Continued, the training ends as it had without the error, and epochs before it are not told again."""
    train, path = TRAIN.replace(patience=0, checkpoint_seconds=1e6), tmp_path / "state"
    whole = build("deepfm", data.schema, embedding_dim=4, hidden_units=[8], dropout=0.2, seed=0)
    result = fit(whole, data, train)
    assert len(result.history) == 4
    model = build("deepfm", data.schema, embedding_dim=4, hidden_units=[8], dropout=0.2, seed=0)
    again = build("deepfm", data.schema, embedding_dim=4, hidden_units=[8], dropout=0.2, seed=0)
    with pytest.raises(RuntimeError, match="enough"):
        fit(model, data, train, checkpoint=path, callbacks=[Recorder(RuntimeError("enough"), at)])
    recorder = Recorder()
    continued = fit(again, data, train, checkpoint=path, callbacks=[recorder])
    assert [e.epoch for e in recorder.epochs] == list(range(at + 1, 5))
    assert told(continued) == told(result)
    assert same_weights(again, whole)


def test_an_error_after_early_stopping_trains_no_more(data, tmp_path: Path) -> None:
    train = TRAIN.replace(epochs=9, patience=1, min_delta=0.9, checkpoint_seconds=1e6)
    models = [build("fm", data.schema, embedding_dim=4, seed=0) for _ in range(3)]
    result = fit(models[0], data, train)
    assert len(result.history) == 2
    with pytest.raises(KeyboardInterrupt):
        fit(models[1], data, train, checkpoint=tmp_path / "x", callbacks=[Recorder(KeyboardInterrupt(), 2)])
    assert told(fit(models[2], data, train, checkpoint=tmp_path / "x", callbacks=[Recorder()])) == told(result)
    assert same_weights(models[2], models[0])


class Dropping(ForeignModel):
    def forward(self, ids_BC: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(ids_BC), 0.3, self.training)


def dropping_task(folder: Path | None) -> Task:
    """Its loader draws from torch's generator as each epoch begins, and its model in each step."""
    ids, labels = (torch.cat(part) for part in zip(*foreign_batches(), strict=True))
    loader = DataLoader(TensorDataset(ids, labels), batch_size=32, shuffle=True)
    torch.manual_seed(0)
    task = Task(
        Dropping(),
        lambda model, batch: nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1]),
        train=loader,
        valid=loader,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    )
    task.checkpoints = None if folder is None else CheckpointFolder(folder, 1e6)
    return task


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    whole, recorder = dropping_task(None), Recorder()
    result = whole.fit(whole.model, epochs=3, seed=0, patience=3, callbacks=[recorder])
    assert [(e.monitor, e.score) for e in recorder.epochs] == [("score", h["score"]) for h in result.history]
    assert recorder.epochs[0].metrics()["valid_score"] == result.history[0]["score"] < 0
    first, second = dropping_task(tmp_path), dropping_task(tmp_path)
    with pytest.raises(RuntimeError):
        first.fit(first.model, epochs=3, seed=0, patience=3, callbacks=[Recorder(RuntimeError(), 1)])
    assert told(second.fit(second.model, epochs=3, seed=0, patience=3)) == told(result)
    assert same_weights(second.model, whole.model)


def test_a_task_of_the_zoo_tells_too(data) -> None:
    recorder, model = Recorder(), build("fm", data.schema, embedding_dim=4)
    CTRTask(model, data, TRAIN).fit(model, epochs=1, seed=0, callbacks=[recorder])
    (epoch,) = recorder.epochs
    assert epoch == Epoch("", "", 1, 1, epoch.loss, None, "auc", 1.0, epoch.seconds)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (Recorder(), r"callbacks= takes a list of objects, given a Recorder; write \[it\] for one"),
        ([Recorder], "or on_record.record, done, total., given the class Recorder"),
        ([print], "given a builtin_function_or_method"),
        ([SimpleNamespace(on_epochs=print)], "given a SimpleNamespace"),
    ],
)
def test_what_is_no_callback(data, callbacks: Any, message: str) -> None:
    model = build("fm", data.schema, embedding_dim=4)
    with pytest.raises(ConfigError, match=message):
        fit(model, data, TRAIN, callbacks=callbacks)
    with pytest.raises(ConfigError, match=message):
        dropping_task(None).fit(model, epochs=1, seed=0, callbacks=callbacks)
