"""Settings of a training, hooks that a search adds to it, and its result."""

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
        epochs: Most passes over the training rows. Early stopping usually ends sooner.
        batch_size: Rows per step.
        optimizer: "adam", "adagrad" (over the tables row-wise, with one accumulator per row) or "sgd".
        learning_rate: Learning rate of all parameters.
        tables: "lazy" moves only the rows of the batch. "dense" updates the whole tables at every step with a fused
            dense optimiser, like most published code, and is slow on large tables.
        embedding_l2: Lambda of the L2 regularisation of embeddings and first-order weights. None is 0, but `run` and
            `compare` then choose a value on validation data.
        l2_scope: "table" decays every row at every step; a row outside the batch catches up when it is next read.
            "batch" decays only the rows of the batch. The dense mode allows "table" only.
        l2_form: "coupled" adds lambda W to the gradient. "decoupled" shrinks the weights directly (AdamW).
        monitor: Validation metric for early stopping and for reducing the learning rate.
        patience: Epochs without improvement after which training stops; 0 never stops early.
        min_delta: Gain of the metric that counts as an improvement. The weights of the best epoch are kept whatever it
            gained; small gains that add up to this one count as well.
        reduce_lr: Factor on the learning rate after an epoch without improvement; 1 keeps it.
        precision: "fp32", "bf16" (autocast), or "auto": oneDNN matmuls, and bf16 if the processor has it.
        compile: Let torch compile everything but the tables, with a C++ compiler. Steps take a little less time, and the
            first step up to a minute more, unless torch finds an earlier result in TORCHINDUCTOR_CACHE_DIR. Trainings
            inside a search never compile.
        device: "cpu", "cuda" or "cuda:1".
        seed: Seed of shuffling and dropout.
        checkpoint_seconds: Seconds between two checkpoints, if checkpoints are written; 0 writes one after every step.
    """

    epochs: int = Field(default=50, ge=1)
    batch_size: int = Field(default=4096, ge=1)
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    tables: Literal["lazy", "dense"] = "lazy"
    embedding_l2: float | None = Field(default=None, ge=0)
    l2_scope: Literal["table", "batch"] = "table"
    l2_form: Literal["coupled", "decoupled"] = "coupled"
    monitor: Literal["auc", "logloss"] = "auc"
    patience: int = Field(default=2, ge=0)
    min_delta: float = Field(default=1e-4, ge=0)
    reduce_lr: float = Field(default=0.1, gt=0, le=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    device: str = "cpu"
    seed: int = Field(default=0, ge=0, lt=2**63)
    checkpoint_seconds: float = Field(default=300.0, ge=0)


class Stateful(Protocol):
    """An object whose state changes while a model trains, and can be restored."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...  # noqa: D102


@dataclass
class Hooks:
    """Additions of a search method to the training loop.

    Attributes:
        param_groups: Called once with the model; gives the optimisers of parameters that train beside the model.
        extra_loss: (model, batch) -> term added to the loss of each batch.
        on_step: Called after each step with the number of steps done. Returning True ends the training.
        generators: Random generators of the method. Checkpoints hold their states.
        state: Further state that the hooks change. Checkpoints hold its `state_dict()`, made of tensors and JSON-able
            values, and restore it before the first step.
        settings: JSON-able values that the hooks depend on. A checkpoint with other values is refused.
        keeps_start: Whether the weights before the first step are kept if no epoch scores better.
        start_to_beat: Whether their score is the one that the first epoch must improve on, or else count as a bad one.
    """

    param_groups: Callable[[nn.Module], Sequence[torch.optim.Optimizer]] | None = None
    extra_loss: Callable[[nn.Module, Any], Tensor] | None = None
    on_step: Callable[[int], bool | None] | None = None
    generators: Sequence[torch.Generator] = ()
    state: Stateful | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    keeps_start: bool = False
    start_to_beat: bool = False


class Optimizer(Protocol):
    """The methods of an optimiser that the loop calls."""

    def step(self) -> Any: ...  # noqa: D102
    def zero_grad(self) -> Any: ...  # noqa: D102


@dataclass
class FitResult:
    """Result of a training.

    Attributes:
        history: One entry per epoch: mean loss, validation score, learning rate factor, seconds.
        best_epoch: Epoch (from 1) whose weights the model has; 0 for the weights before the first step.
        best_score: Validation score of the best epoch; None without a validation split.
        seconds: Wall time of the training, with validation.
        rows_per_second: Training rows per second, without validation and `compile_seconds`.
        compile_seconds: Time of the first step with its compilation; 0 if nothing is compiled.
        precision: Precision of the forward pass, in words.
        restored_seconds: Part of `seconds` that passed before the last interruption.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float | None = None
    seconds: float = 0.0
    rows_per_second: float = 0.0
    compile_seconds: float = 0.0
    precision: str = "fp32"
    restored_seconds: float = 0.0
