"""Checkpoints: the state of a training on disk, from which an interrupted one goes on, to the same end.

A checkpoint is taken between two steps and holds all that the rest depends on: weights, the optimisers' state, random
states, the position in the data, the best weights so far. It changes nothing: decay that untouched rows are owed stays
owed, so that a training gives the same weights, bit by bit, however often it was written down or interrupted. The last
one, of a training that has ended, holds the result alone; who started the training removes it when the result is kept.
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
from safetensors.torch import save_file
from torch import nn

from embtrim.config import first_change
from embtrim.system.files import write_then_rename
from embtrim.system.unfinished import OtherTrainingError
from embtrim.training.settings import FitResult
from embtrim.training.state import (
    Position,
    Training,
    TrainingState,
    checksum,
    optimizer_states,
    own_values,
    random_states,
    set_optimizer_states,
    set_own_values,
    set_weights,
    weights_of,
)

log = logging.getLogger(__name__)

VERSION = 1


class Checkpoint:
    """The file of one training.

    Args:
        path: where; it need not exist.
        interval: seconds between two writings; 0 writes after every step.
        settings: what the training depends on, as JSON-able values; a file of other settings is refused.
        model: as it is before training: its weights are among what the training depends on.
    """

    def __init__(self, path: str | Path, interval: float, settings: Mapping[str, Any], model: nn.Module) -> None:
        self.path, self.interval = Path(path), interval
        self.settings = json.loads(json.dumps({**settings, "initial_weights": checksum(model)}))
        self._written = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None if nothing was, or if the file is damaged (then a warning says so).

        Raises:
            OtherTrainingError: the file is of another training.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                head = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
            version, settings = head["version"], head["settings"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s); this training starts anew", self.path, str(error).partition("\n")[0])
            return None
        if version != VERSION:
            log.warning(
                "%s has version %s, this release reads %s; the training starts anew", self.path, version, VERSION
            )
            return None
        # A setting that came after the file was written is not known of its training.
        change = first_change(settings, {name: value for name, value in self.settings.items() if name in settings})
        if change is not None:
            raise OtherTrainingError(
                f"{self.path} is of a training with {change}; remove it, or give the settings of before"
            )
        return _with_tensors(head["values"], tensors)

    @property
    def is_due(self) -> bool:
        """Whether the interval has passed since the last writing."""
        return time.monotonic() - self._written >= self.interval

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state, or leave the former one where it is: where it cannot be written training goes on, warned."""
        tensors: dict[str, torch.Tensor] = {}
        head = {"version": VERSION, "settings": self.settings, "values": _without_tensors(state, tensors)}
        try:
            write_then_rename(self.path, lambda file: save_file(tensors, file.name, {"state": json.dumps(head)}))
        except (OSError, SafetensorError) as error:
            log.warning("checkpoint %s could not be written (%s); training goes on", self.path, error)
        self._written = time.monotonic()


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON, its tensors put into `tensors` and named in their place."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        value = value.detach().cpu().contiguous()
        if any(value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in tensors.values()):
            value = value.clone()  # such as a weight tied to a part of another: the file has none that share memory
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _without_tensors(v, tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, tensors) for v in value]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `_without_tensors` was given; tuples come back as lists."""
    if isinstance(value, list):
        return [_with_tensors(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _with_tensors(v, tensors) for key, v in value["items"]}


class CheckpointFolder:
    """Checkpoints of the trainings of one search, and of what else it keeps, numbered in the order of their start.

    A search that is started again makes the same trainings in the same order; those that had ended give their result at
    once.

    Args:
        folder: where; made when it is needed.
        interval: see Checkpoint.

    Attributes:
        spent_seconds: what the work that was found here had taken before.
    """

    def __init__(self, folder: str | Path, interval: float = 300.0) -> None:
        self.folder, self.interval = Path(folder), interval
        self.spent_seconds = 0.0
        self._count = 0

    def next_path(self) -> Path:
        """The file of the next training, or other piece of work."""
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
    """
    saved = checkpoint.load()
    if saved is None:
        return
    state.had_ended = saved["ended"]
    state.result, state.position = FitResult(**saved["result"]), Position(**saved["position"])
    state.result.restored_seconds = state.result.seconds
    state.started -= state.result.seconds
    state.best_weights = saved["best_state"]
    set_weights(training.model, saved["weights"])
    set_own_values(training.optimizers, training.model, saved["own_values"])
    if training.hooks.state is not None:
        training.hooks.state.load_state_dict(saved["hooks_state"])
    if not saved["ended"]:
        set_optimizer_states(training.optimizers, saved["optimizers"])
        state.epoch_random, state.restored_random = saved["epoch_random"], saved["random"]
