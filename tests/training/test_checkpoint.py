"""Interrupted trainings go on, to the same weights bit by bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.system.unfinished import unfinished
from embtrim.training import fitting
from embtrim.training.checkpoint import Checkpoint
from embtrim.training.fitting import fit
from tests.training.interruptions import TRAIN, same_weights, stop_at, told

pytestmark = pytest.mark.slow

STEPS = 4 * 19  # 4,800 training rows


def model_of(data: EncodedDataset) -> CTRModel:
    return build("deepfm", data.schema, embedding_dim=4, hidden_units=[8], dropout=0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {"embedding_l2": 0.01},
        {"embedding_l2": 0.01, "tables": "dense"},
        {"embedding_l2": 0.01, "optimizer": "adagrad"},
        {"embedding_l2": 0.01, "l2_form": "decoupled"},
        {"embedding_l2": 0.01, "optimizer": "sgd"},
        {"precision": "bf16"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_training_ends_as_if_it_had_not_been_interrupted(data, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = model_of(data)
    expected = fit(whole, data, TRAIN.replace(**settings))
    path = tmp_path / "state.safetensors"
    for step in sorted(random.Random(7).sample(range(2, STEPS), 4)):
        with pytest.raises(KeyboardInterrupt):
            fit(model_of(data), data, TRAIN.replace(**settings), hooks=stop_at(step), checkpoint=path)
    model = model_of(data)
    result = fit(model, data, TRAIN.replace(**settings), checkpoint=path)
    assert told(result) == told(expected)
    assert (result.best_epoch, result.best_score) == (expected.best_epoch, expected.best_score)
    assert result.seconds > result.restored_seconds > 0
    assert same_weights(model, whole)


def test_checkpoints_change_nothing(data, tmp_path: Path) -> None:
    """Writing a checkpoint settles no owed decay: replaying the decay in other strides would end elsewhere."""
    plain, watched = model_of(data), model_of(data)
    config = TRAIN.replace(embedding_l2=0.05)
    fit(plain, data, config)
    fit(watched, data, config, checkpoint=tmp_path / "state.safetensors")
    assert same_weights(plain, watched)


def test_training_that_had_ended_gives_its_result(data, tmp_path: Path, monkeypatch) -> None:
    first, second = model_of(data), model_of(data)
    expected = fit(first, data, TRAIN, checkpoint=tmp_path / "state.safetensors")
    monkeypatch.setattr(fitting, "logloss_of_batch", None)  # would raise in the first step
    result = fit(second, data, TRAIN, checkpoint=tmp_path / "state.safetensors")
    assert result.history == expected.history
    assert result.rows_per_second == expected.rows_per_second
    assert same_weights(first, second)


def test_interrupted_in_validation(data, tmp_path: Path, monkeypatch) -> None:
    whole = model_of(data)
    expected = fit(whole, data, TRAIN)
    calls = []

    def interrupt(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    evaluate = fitting.evaluate
    monkeypatch.setattr(fitting, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(model_of(data), data, TRAIN, checkpoint=tmp_path / "state.safetensors")
    model = model_of(data)
    assert told(fit(model, data, TRAIN, checkpoint=tmp_path / "state.safetensors")) == told(expected)
    assert len(calls) == 1 + len(expected.history), "the first epoch is not evaluated again"
    assert same_weights(model, whole)


def test_damaged_checkpoint_means_a_new_start(data, tmp_path: Path, caplog) -> None:
    path, whole = tmp_path / "state.safetensors", model_of(data)
    fit(whole, data, TRAIN, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-500])
    model = model_of(data)
    fit(model, data, TRAIN, checkpoint=path)
    assert "state.safetensors is damaged" in caplog.text
    assert same_weights(model, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: fit(model_of(data), data, TRAIN.replace(learning_rate=0.01)), "learning_rate = 0.02"),
        (lambda data: fit(build("fm", data.schema, embedding_dim=4), data, TRAIN), 'model = "deepfm"'),
        (lambda data: fit(build("deepfm", data.schema, seed=3), data, TRAIN), "hparams"),
    ],
)
def test_checkpoint_of_another_training_is_refused(data, tmp_path: Path, change, message, monkeypatch) -> None:
    path = tmp_path / "state.safetensors"
    fit(model_of(data), data, TRAIN, checkpoint=path)
    before = path.read_bytes()
    monkeypatch.setitem(globals(), "fit", lambda *args: fitting.fit(*args, checkpoint=path))
    with pytest.raises(DataError, match=message):
        change(data)
    assert path.read_bytes() == before
    other = model_of(data)
    nn.init.ones_(next(other.mlp.parameters()))
    with pytest.raises(DataError, match="initial_weights"):
        fitting.fit(other, data, TRAIN, checkpoint=path)


def test_checkpoint_that_cannot_be_written_does_not_end_the_training(data, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    result = fit(model_of(data), data, TRAIN.replace(epochs=1), checkpoint=tmp_path / "file" / "state.safetensors")
    assert len(result.history) == 1
    assert "could not be written" in caplog.text


def test_unfinished_work_stays_where_it_failed_and_goes_where_it_ended(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def interrupted(state: str | None) -> None:
        with unfinished(target) as work:
            work.mkdir()
            if state is not None:
                (work / state).touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(None)
    assert not list(tmp_path.iterdir()), "there is nothing to go on from"
    with pytest.raises(KeyboardInterrupt):
        interrupted("state")
    assert [path.name for path in tmp_path.iterdir()] == [".model.unfinished"]
    for _ in range(2):  # the second time nothing was written
        with unfinished(target):
            pass
        assert not list(tmp_path.iterdir())


def test_checkpoint_waits_for_its_interval(data, tmp_path: Path, monkeypatch) -> None:
    written: list[bool] = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, state: written.append(state["ended"]))
    fit(model_of(data), data, TRAIN.replace(checkpoint_seconds=3600), checkpoint=tmp_path / "a.safetensors")
    assert written == [True]
    fit(model_of(data), data, TRAIN.replace(epochs=1), checkpoint=tmp_path / "b.safetensors")
    assert written == [True] + [False] * 19 + [True]


def test_weights_that_share_memory_are_kept(tmp_path: Path) -> None:
    """Such as a head made from a part of an embedding's weight."""
    base = torch.arange(12.0).view(4, 3)
    model = nn.Linear(2, 1)
    checkpoint = Checkpoint(tmp_path / "state.safetensors", 0, {}, model)
    checkpoint.save({"weights": {"whole": base, "part": base[:2], "again": base}})
    restored = checkpoint.load()
    assert restored is not None
    assert torch.equal(restored["weights"]["whole"], base)
    assert torch.equal(restored["weights"]["part"], base[:2])
    assert torch.equal(restored["weights"]["again"], base)


def test_an_interrupted_training_leaves_the_model_to_others(data) -> None:
    model = model_of(data)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, TRAIN, hooks=stop_at(3))
    assert all(parameter.grad is None for parameter in model.parameters())
    before = model.tables.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model(next(data.batches("train", 64)).ids_BC).sum().backward()
    optimizer.step()
    assert not torch.equal(model.tables.weight, before), "the tables belong to no row optimiser any more"
