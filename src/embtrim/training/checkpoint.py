"""Checkpoints: the state of a training on disk, from which an interrupted training continues to the same end.

A checkpoint is written between two steps. It holds everything that the rest of the training depends on: weights,
optimiser states, random states, the position in the data, and the best weights so far. Writing one changes nothing:
untouched rows keep the decay that they still owe. A training therefore ends with the same weights, bit by bit, however
often it is written or interrupted. After the end of the training its checkpoint holds the result alone, and the caller
removes the file when the result is saved.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from embtrim.config import first_change
from embtrim.errors import DataError, first_line_of
from embtrim.system.arrays import tensor_shapes
from embtrim.system.files import write_then_rename
from embtrim.system.holding import RemovedError
from embtrim.system.interrupts import HeldSignals
from embtrim.system.tensor_file import write_tensors
from embtrim.system.unfinished import OtherTrainingError
from embtrim.training.settings import FitResult
from embtrim.training.state import (
    Position,
    Training,
    TrainingState,
    check_weights,
    checksum,
    optimizer_states,
    own_values,
    random_states,
    set_optimizer_states,
    set_own_values,
    set_weights,
    weights_of,
)
from embtrim.untrusted import parse_json

logger = logging.getLogger(__name__)

VERSION = 1


class Checkpoint:
    """The file of one training.

    Args:
        path: Path of the file; it need not exist.
        interval: Seconds between two writings; 0 writes after every step.
        settings: JSON-able values that the training depends on. A file with other values is refused.
        model: Model before training. The training depends on its weights as well.

    Attributes:
        signals: Signals that wait for the next writing.
    """

    def __init__(self, path: str | Path, interval: float, settings: Mapping[str, Any], model: nn.Module) -> None:
        self.path, self.interval = Path(path), interval
        self.settings = json.loads(json.dumps({**settings, "initial_weights": checksum(model)}))
        self._written = time.monotonic()
        self.signals = HeldSignals()

    def load(self) -> dict[str, Any] | None:
        """The state saved last; None without a file. If the file is damaged, a warning says so and None is returned.

        Raises:
            OtherTrainingError: The file belongs to another training.
        """
        if not self.path.exists():
            return None
        try:
            tensor_shapes(self.path)  # which reads the header alone
            with safe_open(self.path, "pt") as file:
                head = parse_json(file.metadata()["state"], any_number=True)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
            version, settings = head["version"], dict(head["settings"])
            values = _with_tensors(head["values"], tensors)
        except (OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
            logger.warning(
                "%s is damaged (%s); this training starts again from the beginning",
                self.path,
                first_line_of(error),
            )
            return None
        if version != VERSION:
            logger.warning(
                "%s has version %s, this release reads %s; the training starts again from the beginning",
                self.path,
                version,
                VERSION,
            )
            return None
        # A file from before a setting existed says nothing about that setting.
        change = first_change(settings, {name: value for name, value in self.settings.items() if name in settings})
        if change is not None:
            raise OtherTrainingError(
                f"{self.path} belongs to a training with {change}; remove it, or give the settings of that training"
            )
        return values

    @property
    def is_due(self) -> bool:
        """Whether the interval has passed since the last writing, or a signal waits for one."""
        return bool(self.signals) or time.monotonic() - self._written >= self.interval

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state. If it cannot be written, a warning says so, and the previous file stays.

        Raises:
            RemovedError: The folder of the work was removed.
        """
        tensors: dict[str, torch.Tensor] = {}
        head = {"version": VERSION, "settings": self.settings, "values": _without_tensors(state, tensors)}
        try:
            write_then_rename(self.path, lambda file: write_tensors(tensors, file.name, {"state": json.dumps(head)}))
        except RemovedError:
            raise
        except (OSError, SafetensorError) as error:
            logger.warning("checkpoint %s could not be written (%s); training goes on", self.path, error)
        self._written = time.monotonic()


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON. Tensors move to `tensors`, and their names take their place."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        value = value.detach().cpu().contiguous()
        if any(value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in tensors.values()):
            value = value.clone()  # such as a weight tied to a part of another: safetensors refuses shared memory
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _without_tensors(v, tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, tensors) for v in value]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `_without_tensors` was given. Tuples come back as lists."""
    if isinstance(value, list):
        return [_with_tensors(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _with_tensors(v, tensors) for key, v in value["items"]}


class CheckpointFolder:
    """Checkpoints of the trainings and other long work of one search, numbered in the order of their start.

    A search that is started again does the same work in the same order. Finished work gives its result at once.

    Args:
        folder: Path of the folder, made when needed.
        interval: Seconds between two writings, see Checkpoint.

    Attributes:
        spent_seconds: Time that the work found in the folder took before.
    """

    def __init__(self, folder: str | Path, interval: float = 300.0) -> None:
        self.folder, self.interval = Path(folder), interval
        self.spent_seconds = 0.0
        self._count = 0

    def next_path(self) -> Path:
        """Path of the next training or other piece of work."""
        self._count += 1
        return self.folder / f"training-{self._count}.safetensors"


def write_checkpoint(checkpoint: Checkpoint, training: Training, state: TrainingState, ended: bool = False) -> None:
    """Write the state of a training.

    Args:
        checkpoint: The file.
        training: What is trained.
        state: How far it has come; its `result.seconds` is brought up to date.
        ended: Whether the training has ended. The file then holds the result alone.
    """
    hooks, result = training.hooks, state.result
    result.seconds = time.perf_counter() - state.started
    values = {
        "ended": ended,
        "weights": weights_of(training.model),
        "own_values": own_values(training.optimizers, training.model),
        "result": vars(result),
        "position": vars(state.position),
        "best_state": None if ended else state.best_weights,
        "hooks_state": None if hooks.state is None else hooks.state.state_dict(),
    }
    if not ended:
        values["optimizers"] = optimizer_states(training.optimizers)
        values["epoch_random"] = state.epoch_random
        values["random"] = random_states(training.device, hooks.generators)
    checkpoint.save(values)


def restore_checkpoint(checkpoint: Checkpoint, training: Training, state: TrainingState) -> None:
    """Bring a training to where its checkpoint was written; without a checkpoint on disk nothing changes.

    Weights, optimisers and the state of the hooks are restored at once. The random states come back with the batches
    of the epoch, see `batches_of_epoch` in `embtrim.training.loop`.

    Args:
        checkpoint: The file.
        training: What is trained, changed in place.
        state: How far it has come, changed in place.

    Raises:
        OtherTrainingError: The file belongs to another training.
        DataError: The file does not hold the state of a training with these settings.
    """
    saved = checkpoint.load()
    if saved is None:
        return
    try:
        _restore(saved, training, state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{checkpoint.path} is damaged ({type(error).__name__}: {first_line_of(error)}); remove it, and this training starts "
            "again from the beginning"
        ) from None


def _restore(saved: Mapping[str, Any], training: Training, state: TrainingState) -> None:
    """Bring a training to a saved state."""
    state.had_ended = saved["ended"]
    state.result, state.position = FitResult(**saved["result"]), Position(**saved["position"])
    state.result.restored_seconds = state.result.seconds
    state.started -= state.result.seconds
    state.best_weights = saved["best_state"]
    if state.best_weights is not None:
        check_weights(training.model, state.best_weights)
    set_weights(training.model, saved["weights"])
    set_own_values(training.optimizers, training.model, saved["own_values"])
    if training.hooks.state is not None:
        training.hooks.state.load_state_dict(saved["hooks_state"])
    if not saved["ended"]:
        set_optimizer_states(training.optimizers, saved["optimizers"])
        state.epoch_random, state.restored_random = saved["epoch_random"], saved["random"]
        # What the loop sets later.
        for random in (saved["epoch_random"][0], saved["random"][0]):
            torch.Generator().set_state(random)
