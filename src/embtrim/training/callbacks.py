"""Callbacks: what `fit`, `Task.fit`, `run` and `compare` tell objects of the user while they work.

A callback is any object with a method `on_epoch`, a method `on_record`, or both. Callbacks are called one after another,
in the order given, in the process that called `fit`, `run` or `compare`. An error that a callback raises goes through to
the caller, and no finished work is lost: records are written before `on_record`, and a training that keeps a checkpoint
writes it before the error goes on, so that the same call continues after the epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from embtrim.errors import ConfigError


@dataclass(frozen=True)
class Epoch:
    """A finished epoch of a training.

    Attributes:
        name: Name of the model in `run` and `compare`, such as "deepfm-guided-seed0": the same for all trainings that lead
            to one record. Empty in `fit` and `Task.fit`.
        stage: What is trained, such as "seed 0, guided, retraining"; empty in `fit` and `Task.fit` of your own.
        epoch: Number of the epoch in this training, from 1.
        most_epochs: Most epochs of this training; early stopping may end it sooner.
        loss: Mean training loss over the batches of the epoch.
        score: Validation score after the epoch, higher is better; minus the logloss if `monitor` is "logloss". None
            without validation.
        monitor: What the score is: "auc", "logloss", or "score" for the score of a Task.
        lr_factor: Product of all reductions of the learning rate in this epoch, 1.0 before the first.
        seconds: Wall time of the epoch's training, without validation.
    """

    name: str
    stage: str
    epoch: int
    most_epochs: int
    loss: float
    score: float | None
    monitor: str
    lr_factor: float
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The numbers by the names that trackers show: train_loss, valid_auc (or _logloss, _score), lr_factor, seconds."""
        found = {"train_loss": self.loss, "lr_factor": self.lr_factor, "epoch_seconds": self.seconds}
        if self.score is not None:
            found[f"valid_{self.monitor}"] = -self.score if self.monitor == "logloss" else self.score
        return found


class OnEpoch(Protocol):
    """A callback that is told of epochs."""

    def on_epoch(self, epoch: Epoch) -> Any:
        """Called after each epoch and its validation."""


class OnRecord(Protocol):
    """A callback that is told of the records of `run` and `compare`."""

    def on_record(self, record: Any, done: int, total: int) -> Any:
        """Called with each new RunRecord once it is written, the number of models that are done, and of all models."""


Callback = OnEpoch | OnRecord

_METHODS = ("on_epoch", "on_record")


def checked(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """The callbacks.

    Raises:
        ConfigError: They are not a list or tuple, or one of them has none of the methods of a callback.
    """
    if not isinstance(callbacks, (list, tuple)):
        raise ConfigError(f"callbacks= takes a list of objects, given a {type(callbacks).__name__}; write [it] for one")
    for callback in callbacks:
        if isinstance(callback, type) or not any(callable(getattr(callback, name, None)) for name in _METHODS):
            given = f"the class {callback.__name__}" if isinstance(callback, type) else f"a {type(callback).__name__}"
            raise ConfigError(
                f"callbacks= takes objects with a method on_epoch(epoch) or on_record(record, done, total), given {given}"
            )
    return tuple(callbacks)


def tell_epoch(callbacks: Sequence[Callback], epoch: Epoch) -> None:
    """Call `on_epoch` of the callbacks that have it."""
    for callback in callbacks:
        if (on_epoch := getattr(callback, "on_epoch", None)) is not None:
            on_epoch(epoch)


def tell_record(callbacks: Sequence[Callback], record: Any, done: int, total: int) -> None:
    """Call `on_record` of the callbacks that have it."""
    for callback in callbacks:
        if (on_record := getattr(callback, "on_record", None)) is not None:
            on_record(record, done, total)


class ForModel:
    """Tells callbacks of the epochs of one model, by its name.

    Attributes:
        epochs: The epochs so far.
        raised: Error that a callback raised.
    """

    def __init__(self, callbacks: Sequence[Callback], name: str) -> None:
        self.callbacks, self.name = callbacks, name
        self.epochs: list[Epoch] = []
        self.raised: BaseException | None = None

    def on_epoch(self, epoch: Epoch) -> None:
        """Tell all callbacks."""
        epoch = dataclasses.replace(epoch, name=self.name)
        self.epochs.append(epoch)
        try:
            tell_epoch(self.callbacks, epoch)
        except BaseException as error:
            self.raised = error
            raise
