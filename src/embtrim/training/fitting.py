"""fit and evaluate: one plain loop with three hooks. No search method writes its own.

The loop follows the recipe of the BARS benchmark: Adam, early stopping on a validation metric, the learning rate
reduced where it stops improving, best weights restored. Embedding L2 is lambda W in the gradient of the whole table at
every step (lambda / 2 ||W||^2 added to the mean loss).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from embtrim.config import Config
from embtrim.data.dataset import WINDOW_ROWS, Batch, EncodedDataset
from embtrim.errors import ConfigError, DataError, EmbtrimError
from embtrim.models.ctr_model import CTRModel
from embtrim.system.memory import freed_pages_kept
from embtrim.system.progress import progress_bar
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.kernels import kernels_name
from embtrim.tables.row_optimizers import RowAdagrad, RowAdam, RowOptimizer, RowSGD
from embtrim.training.checkpoint import (
    Checkpoint,
    optimizer_states,
    own_values,
    random_states,
    set_optimizer_states,
    set_own_values,
    set_random_states,
    set_weights,
    weights_of,
)
from embtrim.training.metrics import Metrics, auc_by_frequency_decile, compute_metrics

log = logging.getLogger(__name__)

# Inference batches: large enough to keep the matmuls busy, small enough that (B, F, D) stays in cache-sized chunks.
EVAL_BATCH_SIZE = 8_192


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


def fit(
    model: CTRModel,
    data: EncodedDataset,
    config: TrainConfig | None = None,
    *,
    hooks: Hooks | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> FitResult:
    """Train a model in place on the "train" split; with a "valid" split stop early and restore the best weights.

    Args:
        model: any zoo model, full or compact (give a compact one `data.recode(plan)`).
        data: encoded data of the model's schema.
        config: see TrainConfig; `settings` are its fields by name, for short calls.
        hooks: additions of a search method.
        progress: show a progress bar with rows/s and ETA on stderr.
        checkpoint: file for the state of the training, written every `checkpoint_seconds` and at the end. A training
            that finds it goes on from there, to the weights of an uninterrupted one. Remove it when the result is kept.

    Raises:
        DataError: the data are of another schema, or a split is empty or has one class only; or the checkpoint is of
            another training.
        EmbtrimError: the loss became infinite or NaN; or torch cannot compile here.

    Example:
        >>> embtrim.fit(model, data, epochs=3, embedding_l2=0.05)  # doctest: +SKIP
    """
    config = (config or TrainConfig()).replace(**settings) if settings else config or TrainConfig()
    check_data(model, data)
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
        return train_loop(
            model,
            loss=loss,
            batches=lambda epoch, skip: data.batches("train", config.batch_size, config.seed * 100_003 + epoch, skip),
            num_rows=data.num_rows("train"),
            optimizers=make_optimizers(model, config),
            score=score if valid else None,
            config=config,
            hooks=hooks,
            monitor=config.monitor,
            progress=progress,
            checkpoint=state,
        )


@contextmanager
def compiled(model: CTRModel) -> Iterator[None]:
    """Inside a `with` block the model's forward in training mode is compiled, from the looked-up embeddings on.

    The model is as before otherwise: what reads its state, copies it or evaluates it sees no difference.

    Raises:
        EmbtrimError: torch cannot compile here.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    eager, faster = model.forward, torch.compile(model.forward, dynamic=True)  # the last batch of an epoch is smaller

    def forward(*inputs: Any) -> Tensor:
        if not model.training:
            return eager(*inputs)
        try:
            return faster(*inputs)
        except TorchDynamoException as error:
            reason = str(error).partition("\n")[0]
            raise EmbtrimError(
                f"[train] compile = true, but torch cannot compile here ({reason}); install a C++ compiler such as g++, or "
                "name one in the environment variable CXX, or set compile = false"
            ) from error

    # On the model itself, where they hide the methods of its class.
    vars(model).update(forward=forward, look_up=torch.compiler.disable(model.look_up))
    try:
        yield
    finally:
        del vars(model)["forward"], vars(model)["look_up"]
        torch.compiler.reset()  # torch compiles one forward for so many models, and no more


def training_settings(model: CTRModel, data: EncodedDataset, config: TrainConfig) -> dict[str, Any]:
    """What a training of a zoo model depends on, beside its initial weights: of a checkpoint, to tell it by."""
    tables = model.tables
    return {
        **config.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "model": model.name,
        "hparams": model.hparams,
        "plan": tables.plan.digest,
        "schema": data.schema.fingerprint,
        "num_rows": {name: data.num_rows(name) for name in data.splits},
        # These round differently, and another machine may choose others.
        "kernels": kernels_used(tables, config),
        "computes_in": computes_in(config.precision, device_of(config)),
    }


def kernels_used(tables: EmbeddingTables, config: TrainConfig) -> str | None:
    """ "torch" or "fused": the kernels that a training goes through; None where torch's own dense gradients serve."""
    if config.tables == "dense" and not tables.mixed_fields:
        return None
    return kernels_name(torch.empty(0, device=device_of(config)))


@dataclass
class _Position:
    """Where a training is, between two steps."""

    epoch: int = 1
    batches: int = 0
    rows: int = 0
    total_loss: float = 0.0
    epoch_seconds: float = 0.0
    step: int = 0
    stopped: bool = False
    bad_epochs: int = 0
    factor: float = 1.0
    train_seconds: float = 0.0
    train_rows: int = 0

    def next_epoch(self) -> None:
        self.epoch, self.batches, self.rows, self.total_loss, self.epoch_seconds = self.epoch + 1, 0, 0, 0.0, 0.0


def train_loop(
    model: nn.Module,
    *,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Callable[[int, int], Iterable[Any]],
    num_rows: int | None,
    optimizers: Sequence[Optimizer],
    score: Callable[[], float] | None,
    config: TrainConfig,
    hooks: Hooks,
    monitor: str = "score",
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """The one training loop: of zoo models (`fit`) and of any Task.

    Args:
        model: trained in place.
        loss: mean loss of a batch, a scalar tensor.
        batches: (epoch from 1, number of batches to skip) -> the batches of an epoch.
        num_rows: rows an epoch, if known; for the progress bar.
        optimizers: stepped together; those over tables are detached at the end.
        score: validation score, higher is better; None trains all epochs.
        config: epochs, patience, reduce_lr, precision and seed are read here; and whether the first step compiles.
        hooks: see Hooks.
        monitor: what the score is, for the progress bar.
        progress: show a progress bar.
        checkpoint: where the state is kept, if anywhere.
    """
    optimizers = [*optimizers, *(hooks.param_groups(model) if hooks.param_groups else ())]
    result, at = FitResult(), _Position()
    best_state: dict[str, Tensor] | None = None
    started, compiles = time.perf_counter(), config.compile
    device = next(iter(model.parameters())).device
    forked = [device] if device.type == "cuda" else []
    saved = None if checkpoint is None else checkpoint.load()
    with (
        fast_matmul(config.precision, device) as (autocast, result.precision),
        freed_pages_kept(),
        torch.random.fork_rng(forked),
        released(optimizers, model),
    ):
        torch.manual_seed(config.seed)
        epoch_random = random_states(device)  # a loader may draw the order of its batches from these
        if saved is not None:
            result, at, best_state = FitResult(**saved["result"]), _Position(**saved["position"]), saved["best_state"]
            result.restored_seconds = result.seconds
            started -= result.seconds
            set_weights(model, saved["weights"])
            set_own_values(optimizers, model, saved["own_values"])
            if hooks.state is not None:
                hooks.state.load_state_dict(saved["hooks_state"])
            if not saved["ended"]:
                set_optimizer_states(optimizers, saved["optimizers"])
                epoch_random = saved["epoch_random"]

        def write(ended: bool = False) -> None:
            assert checkpoint is not None
            result.seconds = time.perf_counter() - started
            state = {
                "ended": ended,
                "weights": weights_of(model),
                "own_values": own_values(optimizers, model),
                "result": vars(result),
                "position": vars(at),
                "best_state": None if ended else best_state,
                "hooks_state": None if hooks.state is None else hooks.state.state_dict(),
            }
            if not ended:
                state["optimizers"] = optimizer_states(optimizers)
                state["epoch_random"] = epoch_random
                state["random"] = random_states(device, hooks.generators)
            checkpoint.save(state)

        with progress_bar(progress) as bar:
            task = bar.add_task(f"epoch {at.epoch}", total=num_rows)
            while saved is None or not saved["ended"]:
                if at.stopped or at.epoch > config.epochs:
                    break
                model.train()
                bar.reset(task, total=num_rows, completed=at.rows)
                epoch_started = time.perf_counter() - at.epoch_seconds
                total_loss = torch.full((), at.total_loss, device=device)
                # Here, not where the last epoch ended: a loader of the validation rows may draw, too.
                if saved is not None:
                    set_random_states(epoch_random, device)
                else:
                    epoch_random = random_states(device)
                found = iter(batches(at.epoch, at.batches))
                if saved is not None:
                    set_random_states(saved["random"], device, hooks.generators)
                    saved = None
                for batch in found:
                    step_started = time.perf_counter()
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    with autocast():
                        batch_loss = loss(model, batch)
                    if hooks.extra_loss is not None:
                        batch_loss = batch_loss + hooks.extra_loss(model, batch)
                    batch_loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
                    if compiles:
                        compiles, step_seconds = False, time.perf_counter() - step_started
                        result.compile_seconds += step_seconds
                        epoch_started += step_seconds
                        at.train_rows -= len(batch)
                    at.step += 1
                    total_loss += batch_loss.detach()
                    at.batches += 1
                    at.rows += len(batch) if isinstance(batch, Batch) else 0
                    bar.advance(task, len(batch) if hasattr(batch, "__len__") else 1)
                    at.stopped = hooks.on_step is not None and bool(hooks.on_step(at.step))
                    if at.stopped:
                        break
                    if checkpoint is not None and checkpoint.is_due:
                        at.total_loss, at.epoch_seconds = float(total_loss), time.perf_counter() - epoch_started
                        write()
                if at.batches == 0:
                    raise DataError("there are no training rows")
                seconds = time.perf_counter() - epoch_started
                at.train_seconds, at.train_rows = at.train_seconds + seconds, at.train_rows + at.rows
                mean_loss = float(total_loss) / at.batches
                if not np.isfinite(mean_loss):
                    raise EmbtrimError(f"training loss is {mean_loss} in epoch {at.epoch}; lower learning_rate")
                record = {"epoch": at.epoch, "loss": mean_loss, "lr_factor": at.factor, "seconds": seconds}
                result.history.append(record)
                epoch = at.epoch
                at.next_epoch()
                if score is None:
                    result.best_epoch = epoch
                    continue
                record["score"] = score()
                bar.update(task, description=f"epoch {epoch + 1} (valid {monitor} {abs(record['score']):.4f})")
                if result.best_score is None or record["score"] > result.best_score:
                    result.best_score, result.best_epoch, at.bad_epochs = record["score"], epoch, 0
                    best_state = {name: value.detach().clone() for name, value in model.state_dict().items()}
                    continue
                at.bad_epochs += 1
                if config.patience and at.bad_epochs >= config.patience:
                    break
                at.factor *= config.reduce_lr
                scale_learning_rates(optimizers, config.reduce_lr)
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    if saved is not None:  # it had ended before
        return result
    result.seconds = time.perf_counter() - started
    result.rows_per_second = at.train_rows / max(at.train_seconds, 1e-9)
    if checkpoint is not None:
        write(ended=True)
    # Trainings inside a search, which stop at no score, are many.
    level = logging.DEBUG if score is None else logging.INFO
    log.log(level, "trained %d epochs in %.1f s (%s)", len(result.history), result.seconds, result.precision)
    return result


@contextmanager
def released(optimizers: Sequence[Optimizer], model: nn.Module) -> Iterator[None]:
    """Leave the model to others after a `with` block, also where it was interrupted: no table is owned, no gradient kept."""
    try:
        yield
    finally:
        for optimizer in optimizers:
            if isinstance(optimizer, RowOptimizer):
                optimizer.detach()
        for parameter in model.parameters():
            parameter.grad = None


def device_of(config: TrainConfig) -> torch.device:
    """The device asked for; never another in its place.

    Raises:
        ConfigError: no such device, or torch does not see it.
    """
    try:
        device = torch.device(config.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"[train] unknown device {config.device!r}; allowed: 'cpu', 'cuda', 'cuda:1'")
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        raise ConfigError(
            f"[train] device {config.device!r} is not there, torch {torch.__version__} sees {found}; use 'cpu'"
        )
    return device


def make_optimizers(model: CTRModel, config: TrainConfig) -> list[Optimizer]:
    """The optimisers of a zoo model: one over the rows of its tables, one over everything else."""
    tables = model.tables
    tables.check_fp32()
    in_tables = {id(p) for p in (tables.weight, tables.first_order) if p is not None}
    dense = [p for p in model.parameters() if id(p) not in in_tables and p.requires_grad]
    lr, l2, coupled = config.learning_rate, config.embedding_l2, config.l2_form == "coupled"
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


def scale_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply every learning rate by `factor`."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            for group in optimizer.param_groups:
                group["lr"] *= factor
        else:
            optimizer.lr *= factor  # type: ignore[attr-defined]


def logloss_of_batch(model: nn.Module, batch: Batch) -> Tensor:
    """Mean binary cross entropy of a batch, weighted where the data have sample weights; a scalar."""
    logits_B = model(batch.ids_BC, batch.dense_BE).float()
    if batch.weights_B is None:
        return functional.binary_cross_entropy_with_logits(logits_B, batch.labels_B)
    losses_B = functional.binary_cross_entropy_with_logits(logits_B, batch.labels_B, reduction="none")
    return (losses_B * batch.weights_B).sum() / batch.weights_B.sum().clamp(min=1e-12)


@torch.no_grad()
def predict_logits(
    model: CTRModel, data: EncodedDataset, split: str = "test", config: TrainConfig | None = None
) -> np.ndarray:
    """float32 logits (N,) of a split, in stored order."""
    config = config or TrainConfig()
    device = device_of(config)
    model.to(device).eval()
    logits = np.empty(data.num_rows(split), np.float32)
    start = 0
    with fast_matmul("fp32", device), freed_pages_kept():
        for batch in data.batches(split, EVAL_BATCH_SIZE):
            batch = batch.to(device)
            logits[start : start + len(batch)] = model(batch.ids_BC, batch.dense_BE).float().cpu().numpy()
            start += len(batch)
    return logits


def evaluate(
    model: CTRModel,
    data: EncodedDataset,
    split: str = "test",
    config: TrainConfig | None = None,
    *,
    deciles: bool = False,
) -> Metrics:
    """Exact metrics over a whole split; always in fp32.

    Args:
        model: full or compact (give a compact one `data.recode(plan)`).
        data: encoded data of the model's schema.
        split: "train", "valid" or "test".
        config: for the device.
        deciles: also AUC by how often the row's rarest value occurs in the training rows.

    Raises:
        DataError: the split is missing or has one class only.
    """
    check_data(model, data)
    arrays = data.split(split)
    logits = predict_logits(model, data, split, config)
    labels = np.asarray(arrays.labels)
    weights = None if arrays.weights is None else np.asarray(arrays.weights)
    metrics = compute_metrics(labels, logits, weights)
    if deciles:
        by_decile = auc_by_frequency_decile(labels, logits, rarest_value_counts(data, split))
        metrics = metrics.with_deciles(by_decile)
    return metrics


def rarest_value_counts(data: EncodedDataset, split: str) -> np.ndarray:
    """int64 (N,): for each row, how often its rarest feature value occurs in the training rows."""
    stored = EncodedDataset(data.schema, data.splits)
    counts = stored.value_counts("train")
    rarest = np.full(data.num_rows(split), np.iinfo(np.int64).max)
    for start in range(0, len(rarest), WINDOW_ROWS):
        rows = slice(start, start + WINDOW_ROWS)
        ids, rarest_here = np.asarray(data.split(split).ids[rows]), rarest[rows]
        for spec, columns in zip(data.schema.id_fields, data.schema.column_slices, strict=True):
            for column in range(columns.start, columns.stop):
                found = counts[spec.table_name][np.maximum(ids[:, column], 0)]
                np.minimum(rarest_here, found, out=rarest_here, where=ids[:, column] >= 0)
    return rarest


def check_data(model: CTRModel, data: EncodedDataset) -> None:
    """Raise DataError unless the data carry the ids that the model reads.

    Raises:
        EmbtrimError: the model is none of embtrim.models, or the data are not encoded.
    """
    if not isinstance(model, CTRModel):
        raise EmbtrimError(
            f"this is for the models of embtrim.models, given a {type(model).__name__}; train, evaluate and save it as "
            "before, by its own means, and search it through a Task"
        )
    if not isinstance(data, EncodedDataset):
        raise EmbtrimError(
            f"a {model.name} is trained, evaluated and saved on encoded data, given a {type(data).__name__}; make them "
            "with embtrim.encode"
        )
    if data.schema.fingerprint != model.schema.fingerprint:
        raise DataError(
            f"model was made for schema {model.schema.describe()}, this dataset is {data.schema.describe()}"
        )
    for table in model.tables.plan.tables:
        mapped = table.name in data.id_maps
        if mapped != table.renumbers:
            raise DataError(
                f"ids of table {table.name!r} are {'re-coded, but the model reads the stored ones' if mapped else 'as stored, but the model is compact'};"
                " give a compact model data.recode(plan), a full one the data as they are"
            )
        if mapped and not table.reads(data.id_maps[table.name]):
            raise DataError(
                f"ids of table {table.name!r} are re-coded by another plan than the model's; give data.recode(plan) of its own"
            )


@contextmanager
def fast_matmul(precision: str, device: torch.device) -> Iterator[tuple[Callable[[], Any], str]]:
    """Choose matmul precision inside a `with` block and restore the global flag after it.

    "medium" routes fp32 matmuls to oneDNN on CPUs. Without AMX tiles these stay exact fp32; with them oneDNN may use
    bf16, so "fp32" then keeps torch's default.

    Yields:
        A factory of autocast contexts for the forward pass, and what was chosen, in words.
    """
    before = torch.get_float32_matmul_precision()
    onednn, bf16 = _matmul_choice(precision, device)
    try:
        torch.set_float32_matmul_precision("medium" if onednn else "highest")
        yield (
            (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else nullcontext,
            computes_in(precision, device),
        )
    finally:
        torch.set_float32_matmul_precision(before)


def computes_in(precision: str, device: torch.device) -> str:
    """What a forward pass runs in, in words."""
    onednn, bf16 = _matmul_choice(precision, device)
    return ("bf16 autocast" if bf16 else "fp32") + (", oneDNN matmul" if onednn else "")


def _matmul_choice(precision: str, device: torch.device) -> tuple[bool, bool]:
    """Whether fp32 matmuls go to oneDNN, and whether autocast to bf16 is on."""
    has_amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    onednn = device.type == "cpu" and (precision != "fp32" or not has_amx)
    if device.type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or has_amx
    else:
        has_bf16 = torch.cuda.is_bf16_supported()
    return onednn, precision == "bf16" or (precision == "auto" and has_bf16)
