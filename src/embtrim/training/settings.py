"""How a model is trained, what a search may add to the loop, and what training did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from embtrim.config import Config


class TrainConfig(Config):
    """How `fit` trains.

    Attributes:
        epochs: most passes over the training rows; early stopping usually ends sooner.
        batch_size: rows a step.
        optimizer: "adam", "adagrad" (row-wise over the tables: one accumulator a row) or "sgd".
        learning_rate: of all parameters.
        tables: "lazy" moves only the rows of the batch; "dense" updates the whole tables at every step by a fused
            dense optimiser, as the field's code does: faithful, and slow on large tables.
        embedding_l2: lambda of the embeddings' L2, first-order weights included.
        l2_scope: "table" decays every row at every step (an untouched row is caught up when it is next read);
            "batch" decays the rows of the batch. The dense mode knows "table" only.
        l2_form: "coupled" puts lambda W into the gradient; "decoupled" shrinks the weights directly (AdamW).
        monitor: validation metric that early stopping and the learning rate watch.
        patience: epochs without improvement after which training stops; 0 never stops early.
        reduce_lr: factor on the learning rate after an epoch without improvement; 1 keeps it.
        precision: "fp32", "bf16" (autocast), or "auto": oneDNN matmuls, and bf16 where the processor has it.
        compile: let torch compile all but the tables, with a C++ compiler: steps then take a little less time, the first
            one up to a minute more, unless torch finds what it compiled before (in TORCHINDUCTOR_CACHE_DIR). Trainings
            inside a search never compile.
        device: "cpu", "cuda" or "cuda:1".
        seed: of shuffling and dropout.
        checkpoint_seconds: time between two checkpoints, where checkpoints are written; 0 means after every step.
    """

    epochs: int = Field(default=50, ge=1)
    batch_size: int = Field(default=4096, ge=1)
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    tables: Literal["lazy", "dense"] = "lazy"
    embedding_l2: float = Field(default=0.0, ge=0)
    l2_scope: Literal["table", "batch"] = "table"
    l2_form: Literal["coupled", "decoupled"] = "coupled"
    monitor: Literal["auc", "logloss"] = "auc"
    patience: int = Field(default=2, ge=0)
    reduce_lr: float = Field(default=0.1, gt=0, le=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    device: str = "cpu"
    seed: int = 0
    checkpoint_seconds: float = Field(default=300.0, ge=0)


class Stateful(Protocol):
    """What changes while a model trains, and can be put back."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...  # noqa: D102


@dataclass
class Hooks:
    """What a search may add to the loop.

    Attributes:
        param_groups: extra (optimiser, parameters) a method trains beside the model: called once with the model.
        extra_loss: added to the loss of each batch.
        on_step: called after each optimiser step with the number of steps done; True ends the training there.
        generators: random sources of the method's own; checkpoints hold their states.
        state: what the hooks change beside what they train and `generators`; checkpoints hold its `state_dict()`, of
            tensors and JSON-able values, and give it back before the first step.
        settings: what the hooks depend on, as JSON-able values; a checkpoint of other ones is refused.
    """

    param_groups: Callable[[nn.Module], Sequence[torch.optim.Optimizer]] | None = None
    extra_loss: Callable[[nn.Module, Any], Tensor] | None = None
    on_step: Callable[[int], bool | None] | None = None
    generators: Sequence[torch.Generator] = ()
    state: Stateful | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Optimizer(Protocol):
    """What the loop needs of an optimiser."""

    def step(self) -> Any: ...  # noqa: D102
    def zero_grad(self) -> Any: ...  # noqa: D102


@dataclass
class FitResult:
    """What training did.

    Attributes:
        history: one entry an epoch: mean loss, validation score, learning rate factor, seconds.
        best_epoch: epoch (from 1) whose weights the model has now.
        best_score: its validation score, or None without a validation split.
        seconds: wall time of training, validation included.
        rows_per_second: training rows over the seconds of training alone, `compile_seconds` aside.
        compile_seconds: of the first step, with its compilation; 0 where nothing is compiled.
        precision: what the forward pass ran in, in words.
        restored_seconds: the part of `seconds` that had passed when the training was interrupted last.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float | None = None
    seconds: float = 0.0
    rows_per_second: float = 0.0
    compile_seconds: float = 0.0
    precision: str = "fp32"
    restored_seconds: float = 0.0
