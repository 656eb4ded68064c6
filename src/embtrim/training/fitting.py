"""fit: train a zoo model on encoded data.

The loop follows the recipe of the BARS benchmark: Adam, early stopping on a validation metric, the learning rate
reduced where it stops improving, best weights restored. Embedding L2 is lambda W in the gradient of the whole table at
every step (lambda / 2 ||W||^2 added to the mean loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embtrim.data.dataset import Batch, EncodedDataset
from embtrim.errors import ConfigError, EmbtrimError
from embtrim.models.ctr_model import CTRModel
from embtrim.system.ranks import refuse_ranks
from embtrim.system.torch_private import compile_error
from embtrim.tables.kernels import kernels_name
from embtrim.tables.row_optimizers import RowAdagrad, RowAdam, RowSGD
from embtrim.training.callbacks import Callback, checked
from embtrim.training.checkpoint import Checkpoint
from embtrim.training.devices import computes_in, device_of, kernels_used
from embtrim.training.evaluation import evaluate, logloss_of_batch
from embtrim.training.loop import train_loop
from embtrim.training.recoding import data_for
from embtrim.training.settings import FitResult, Hooks, Optimizer, TrainConfig
from embtrim.training.state import Training


def fit(
    model: CTRModel,
    data: EncodedDataset,
    config: TrainConfig | None = None,
    *,
    hooks: Hooks | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> FitResult:
    """Train a model in place on the "train" split; with a "valid" split stop early and restore the best weights.

    Args:
        model: Full or compact zoo model.
        data: Data of the model's schema, as they were encoded. Data re-coded by the model's plan are taken as well; the
            model of a bundle needs them.
        config: Settings of the training, see TrainConfig.
        hooks: Additions of a search method.
        progress: Show a progress bar with rows/s and ETA on stderr.
        checkpoint: File for the state of the training, written every `checkpoint_seconds` and at the end. A training
            that finds the file continues to the weights of an uninterrupted one. Remove it when the result is saved.
        callbacks: Objects that are told of each epoch, see `embtrim.training.callbacks`. If one raises an error, the
            checkpoint is written, and the error goes through.
        settings: Fields of TrainConfig by name, in place of those of `config`.

    Raises:
        ConfigError: A callback has no `on_epoch` or `on_record`.
        DataError: The data do not fit the model, see `data_for` in `embtrim.training.recoding`; a split is empty or has
            one class only; or the checkpoint belongs to another training.
        ModelError: The model is not one of embtrim.models, or the data are not encoded.
        EmbtrimError: The loss became infinite or NaN; or torch cannot compile here.

    Example:
        >>> embtrim.fit(model, data, epochs=3, embedding_l2=0.05)  # doctest: +SKIP
    """
    refuse_ranks("fit")
    callbacks = checked(callbacks)
    config = (config or TrainConfig()).replace(**settings) if settings else config or TrainConfig()
    data = data_for(model, data)
    valid = "valid" in data.splits and data.num_rows("valid") > 0
    device = device_of(config)
    model.to(device)

    def score() -> float:
        metrics = evaluate(model, data, "valid", config)
        return metrics.auc if config.monitor == "auc" else -metrics.logloss

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return logloss_of_batch(model, batch.to(device))

    state, hooks = None, hooks or Hooks()
    if checkpoint is not None:
        depends_on = {**training_settings(model, data, config), **hooks.settings}
        state = Checkpoint(checkpoint, config.checkpoint_seconds, depends_on, model)
    with compiled(model) if config.compile else nullcontext():
        training = Training(
            model,
            loss=loss,
            batches=lambda epoch, skip: data.batches("train", config.batch_size, config.seed * 100_003 + epoch, skip),
            optimizers=make_optimizers(model, config),
            config=config,
            hooks=hooks,
            score=score if valid else None,
            monitor=config.monitor,
            num_rows=data.num_rows("train"),
            callbacks=callbacks,
        )
        return train_loop(training, progress=progress, checkpoint=state)


@contextmanager
def compiled(model: CTRModel) -> Iterator[None]:
    """Compile the training forward of a model inside a `with` block, from the looked-up embeddings on.

    Reading the model's state, copying it and evaluating it work as without compilation.

    Raises:
        EmbtrimError: torch cannot compile here.
    """
    eager, faster = model.forward, torch.compile(model.forward, dynamic=True)  # the last batch of an epoch is smaller

    def forward(*inputs: Any) -> Tensor:
        if not model.training:
            return eager(*inputs)
        try:
            return faster(*inputs)
        except compile_error() as error:
            reason = str(error).partition("\n")[0]
            raise EmbtrimError(
                f"[train] compile = true, but torch cannot compile here ({reason}); install a C++ compiler such as g++, or "
                "name one in the environment variable CXX, or set compile = false"
            ) from error

    # Attributes of the model itself hide the methods of its class.
    vars(model).update(forward=forward, look_up=torch.compiler.disable(model.look_up))
    try:
        yield
    finally:
        del vars(model)["forward"], vars(model)["look_up"]
        torch.compiler.reset()  # torch limits how many models it compiles one forward for


def training_settings(
    model: CTRModel,
    data: EncodedDataset,
    config: TrainConfig,
    name_of: Callable[[torch.Tensor], str] = kernels_name,
) -> dict[str, Any]:
    """Everything that a training depends on beside the initial weights; a checkpoint is recognised by it.

    `name_of` names the kernels, see `kernels_used`.
    """
    tables = model.tables
    return {
        **config.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "embedding_l2": config.embedding_l2 or 0.0,
        "model": model.name,
        "hparams": model.hparams,
        "plan": tables.plan.digest,
        "schema": data.schema.fingerprint,
        "num_rows": {name: data.num_rows(name) for name in data.splits},
        # Kernels and precisions round differently, and another machine may choose others.
        "kernels": kernels_used(tables, config, name_of),
        "computes_in": computes_in(config.precision, device_of(config)),
    }


def make_optimizers(model: CTRModel, config: TrainConfig) -> list[Optimizer]:
    """Optimisers of a zoo model: one over everything but the tables, and one over the rows of the tables."""
    tables = model.tables
    tables.check_fp32()
    in_tables = {id(p) for p in (tables.weight, tables.first_order) if p is not None}
    dense = [p for p in model.parameters() if id(p) not in in_tables and p.requires_grad]
    lr, l2, coupled = config.learning_rate, config.embedding_l2 or 0.0, config.l2_form == "coupled"
    optimizers: list[Optimizer] = []
    if dense:
        optimizers.append(_dense_optimizer(dense, config, l2=0.0))
    if config.tables == "dense":
        if config.l2_scope == "batch" and l2:
            raise ConfigError("l2_scope = 'batch' needs tables = 'lazy'; the dense mode decays the whole table")
        whole = [p for p in (tables.weight, tables.first_order) if p is not None and p.numel()]
        if whole:
            optimizers.append(_dense_optimizer(whole, config, l2=l2))
        return optimizers
    if config.optimizer == "adam":
        rows = RowAdam(tables, lr=lr, l2=l2, l2_scope=config.l2_scope, decoupled=not coupled)
    elif config.optimizer == "adagrad":
        rows = RowAdagrad(tables, lr=lr, l2=l2, l2_scope=config.l2_scope, decoupled=not coupled)
    else:
        rows = RowSGD(tables, lr=lr, l2=l2, l2_scope=config.l2_scope, decoupled=not coupled)
    return [*optimizers, rows]


def _dense_optimizer(parameters: list[nn.Parameter], config: TrainConfig, l2: float) -> torch.optim.Optimizer:
    if config.l2_form == "decoupled" and l2 and config.optimizer != "adam":
        raise ConfigError(
            f"l2_form = 'decoupled' in the dense mode needs optimizer = 'adam', given {config.optimizer!r}"
        )
    if config.optimizer == "adam":
        kind = torch.optim.AdamW if config.l2_form == "decoupled" and l2 else torch.optim.Adam
        return kind(parameters, lr=config.learning_rate, weight_decay=l2, fused=True)
    if config.optimizer == "adagrad":
        return torch.optim.Adagrad(parameters, lr=config.learning_rate, weight_decay=l2)
    return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=l2)
