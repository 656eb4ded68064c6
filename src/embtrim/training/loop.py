"""The one training loop: an epoch at a time, with early stopping, until the best weights are restored.

No search method writes a loop of its own: a method adds to this one through Hooks. How the state of a training is
written and restored is in `embtrim.training.checkpoint`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from embtrim.data.dataset import Batch
from embtrim.errors import DataError, EmbtrimError
from embtrim.system.interrupts import held_back
from embtrim.system.memory import freed_pages_kept
from embtrim.system.progress import Counter, present_stage, say, time_left
from embtrim.tables.row_optimizers import RowOptimizer
from embtrim.training.callbacks import Epoch, tell_epoch
from embtrim.training.checkpoint import Checkpoint, restore_checkpoint, write_checkpoint
from embtrim.training.devices import fast_matmul
from embtrim.training.settings import FitResult, Optimizer
from embtrim.training.state import Position, Training, TrainingState, random_states, set_random_states

logger = logging.getLogger(__name__)

# Steps between two looks at the losses: each look waits for the device.
STEPS_PER_CHECK = 256
# Early stopping before so many steps is worth a warning: Adam has moved no weight by more than a hundred learning rates.
FEW_STEPS = 100

Autocast = Callable[[], AbstractContextManager[Any]]


def train_loop(training: Training, *, progress: bool = False, checkpoint: Checkpoint | None = None) -> FitResult:
    """Train a model in place: the loop of zoo models (`fit`) and of any Task.

    Args:
        training: model, loss, batches, optimisers and settings. Optimisers over tables are detached at the end.
        progress: Show a progress bar.
        checkpoint: File that holds the state of the training. A training that finds its state there goes on from it. Ctrl-C
            and SIGTERM act after the step or the validation at hand, once the state is written.

    Raises:
        DataError: There are no training rows, or the checkpoint belongs to another training.
        EmbtrimError: The loss became infinite or NaN.
    """
    with held_back(checkpoint is not None) as signals:
        if checkpoint is not None:
            checkpoint.signals = signals
        return _train(training, progress, checkpoint)


def _train(training: Training, progress: bool, checkpoint: Checkpoint | None) -> FitResult:
    model, hooks, config = training.model, training.hooks, training.config
    if hooks.param_groups is not None:
        training = dataclasses.replace(training, optimizers=[*training.optimizers, *hooks.param_groups(model)])
    state, device = TrainingState(compiles=config.compile), training.device
    with (
        fast_matmul(config.precision, device) as (autocast, state.result.precision),
        freed_pages_kept(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        released(training.optimizers, model),
    ):
        torch.manual_seed(config.seed)
        if checkpoint is not None:
            restore_checkpoint(checkpoint, training, state)
        if not state.had_ended:
            run_epochs(training, state, autocast, progress, checkpoint)
    if state.best_weights is not None:
        model.load_state_dict(state.best_weights)
    model.eval()
    result, position = state.result, state.position
    if state.had_ended:
        return result
    result.seconds = time.perf_counter() - state.started
    result.rows_per_second = position.train_rows / max(position.train_seconds, 1e-9)
    if checkpoint is not None:
        write_checkpoint(checkpoint, training, state, ended=True)
    # A search runs many trainings without a score: they are logged as details.
    level = logging.DEBUG if training.score is None else logging.INFO
    logger.log(level, "trained %d epochs in %.1f s (%s)", len(result.history), result.seconds, result.precision)
    return result


def run_epochs(
    training: Training,
    state: TrainingState,
    autocast: Autocast,
    progress: bool,
    checkpoint: Checkpoint | None,
) -> None:
    """Run epochs until the last one, or until early stopping or a hook ends the training."""
    result, position = state.result, state.position
    if training.hooks.keeps_start and training.score is not None and result.best_score is None:
        keep_best(training, state, 0, training.score())
        position.score_to_beat = result.best_score if training.hooks.start_to_beat else None
    news, started, first = "", time.perf_counter(), position.epoch
    with Counter(progress, "rows") as bar:
        while not position.stopped and position.epoch <= training.config.epochs:
            bar.begin(f"epoch {position.epoch}{news}", training.num_rows, position.rows)
            record = run_epoch(training, state, autocast, bar.advance, checkpoint)
            epoch = position.epoch
            position.start_next_epoch()
            if training.score is None:
                result.best_epoch = epoch
            else:
                record["score"] = training.score()
                news = f" (valid {training.monitor} {abs(record['score']):.4f})"
            ended = training.score is not None and after_epoch(training, state, epoch, record["score"])
            say(epoch_line(training, record, time.perf_counter() - started, epoch - first + 1, ended), progress)
            try:
                tell_callbacks(training, record)
            except BaseException:
                if checkpoint is not None:
                    position.stopped = position.stopped or ended
                    write_checkpoint(checkpoint, training, state)
                raise
            if ended:
                if position.step < FEW_STEPS and not training.hooks.keeps_start:
                    logger.warning(
                        "early stopping ended the training at step %d, in epoch %d of %d steps each; so few steps are uneven, "
                        "and more of them may score higher: lower batch_size, or raise patience",
                        *(position.step, epoch, position.step // epoch),
                    )
                break


def tell_callbacks(training: Training, record: Mapping[str, float]) -> None:
    """Tell the callbacks of a finished epoch, by its entry in the history of the result."""
    epoch = Epoch(
        name="",
        stage=present_stage(),
        epoch=int(record["epoch"]),
        most_epochs=training.config.epochs,
        loss=record["loss"],
        score=record.get("score"),
        monitor=training.monitor,
        lr_factor=record["lr_factor"],
        seconds=record["seconds"],
    )
    tell_epoch(training.callbacks, epoch)


def epoch_line(training: Training, record: Mapping[str, float], elapsed: float, epochs_done: int, ended: bool) -> str:
    """A finished epoch in words, with the longest time that is left; early stopping may end the training sooner.

    Args:
        training: The training.
        record: The epoch's entry in the history of the result.
        elapsed: Seconds since the training began or was continued, with validation.
        epochs_done: Epochs made in this time.
        ended: Whether early stopping ends the training.
    """
    most = training.config.epochs
    words = [f"epoch {record['epoch']:.0f} of at most {most}", f"loss {record['loss']:.4f}"]
    if "score" in record:
        words.append(f"valid {training.monitor} {abs(record['score']):.4f}")
    words.append(f"{record['seconds']:.1f} s")
    if ended:
        words.append("stopped early")
    elif record["epoch"] < most:
        words.append(f"at most {time_left(elapsed, epochs_done, most - record['epoch'])}")
    return ", ".join(words)


def run_epoch(
    training: Training,
    state: TrainingState,
    autocast: Autocast,
    advance: Callable[[int], None],
    checkpoint: Checkpoint | None,
) -> dict[str, float]:
    """Train on the batches that an epoch still has, and write a checkpoint whenever one is due.

    Args:
        training: The training; see `train_loop`.
        state: moved on in place.
        autocast: makes the context of a forward pass.
        advance: called with the rows of each batch.
        checkpoint: Where the state is kept; see `train_loop`.

    Returns:
        The epoch's entry in the history of the result.
    """
    model, hooks, position = training.model, training.hooks, state.position
    model.train()
    started = time.perf_counter() - position.epoch_seconds
    total_loss = torch.full((), position.total_loss, device=training.device)
    unchecked: list[Tensor] = []
    for batch in batches_of_epoch(training, state):
        step_started = time.perf_counter()
        batch_loss = run_step(training, batch, autocast)
        if state.compiles:  # The first step compiles; its time and its rows stay out of the speed.
            state.compiles, step_seconds = False, time.perf_counter() - step_started
            state.result.compile_seconds += step_seconds
            started += step_seconds
            position.train_rows -= len(batch)
        position.step += 1
        unchecked.append(batch_loss.detach())
        total_loss += unchecked[-1]
        position.batches += 1
        if len(unchecked) == STEPS_PER_CHECK:
            check_losses(unchecked, position)
            unchecked.clear()
        position.rows += len(batch) if isinstance(batch, Batch) else 0
        advance(len(batch) if hasattr(batch, "__len__") else 1)
        try:
            position.stopped = hooks.on_step is not None and bool(hooks.on_step(position.step))
        except EmbtrimError:
            check_losses(unchecked, position)  # weights that became NaN are the cause of what the hook finds
            raise
        if position.stopped:
            break
        if checkpoint is not None and checkpoint.is_due:
            position.total_loss, position.epoch_seconds = float(total_loss), time.perf_counter() - started
            write_checkpoint(checkpoint, training, state)
            checkpoint.signals.act()
    if position.batches == 0:
        raise DataError("there are no training rows")
    check_losses(unchecked, position)
    seconds = time.perf_counter() - started
    position.train_seconds, position.train_rows = position.train_seconds + seconds, position.train_rows + position.rows
    mean_loss = float(total_loss) / position.batches
    record = {"epoch": position.epoch, "loss": mean_loss, "lr_factor": position.factor, "seconds": seconds}
    state.result.history.append(record)
    return record


def check_losses(losses: Sequence[Tensor], position: Position) -> None:
    """Raise EmbtrimError if the loss of one of the last batches is infinite or NaN; the message names the first batch."""
    finite = torch.stack([loss.view(()) for loss in losses]).isfinite() if losses else torch.ones(1, dtype=torch.bool)
    if not bool(finite.all()):
        first = int(finite.logical_not().nonzero()[0])
        raise EmbtrimError(
            f"training loss is {float(losses[first])} in epoch {position.epoch}, batch "
            f"{position.batches - len(losses) + first:,} (counted from 0); lower learning_rate, or look for missing values "
            "in that batch"
        )


def batches_of_epoch(training: Training, state: TrainingState) -> Iterator[Any]:
    """The batches that the epoch still has, in the same order whether or not the training was interrupted in it.

    A loader may draw the order of its batches from the random states of the epoch's start. They are read here, not at
    the end of the last epoch, because a loader of the validation rows may draw as well.
    """
    device = training.device
    if state.restored_random is not None and not state.position.batches:  # written between two epochs
        set_random_states(state.restored_random, device, training.hooks.generators)
        state.restored_random = None
    if state.restored_random is None:
        state.epoch_random = random_states(device)
    else:
        set_random_states(state.epoch_random, device)
    batches = iter(training.batches(state.position.epoch, state.position.batches))
    if state.restored_random is not None:
        set_random_states(state.restored_random, device, training.hooks.generators)
        state.restored_random = None
    return batches


def run_step(training: Training, batch: Any, autocast: Autocast) -> Tensor:
    """Move every optimiser by one batch; the loss of the batch, a scalar."""
    for optimizer in training.optimizers:
        optimizer.zero_grad()
    with autocast():
        loss = training.loss(training.model, batch)
    if training.hooks.extra_loss is not None:
        loss = loss + training.hooks.extra_loss(training.model, batch)
    loss.backward()
    if training.after_backward is not None:
        training.after_backward(training.optimizers)
    for optimizer in training.optimizers:
        optimizer.step()
    return loss


def after_epoch(training: Training, state: TrainingState, epoch: int, score: float) -> bool:
    """Keep the weights of the best epoch, and reduce the learning rate after one without improvement.

    Returns:
        Whether early stopping ends the training.
    """
    result, position, config = state.result, state.position, training.config
    if result.best_score is None or score > result.best_score:
        keep_best(training, state, epoch, score)
    if position.score_to_beat is None or score > position.score_to_beat + config.min_delta:
        position.score_to_beat, position.bad_epochs = score, 0
        return False
    position.bad_epochs += 1
    if config.patience and position.bad_epochs >= config.patience:
        return True
    position.factor *= config.reduce_lr
    scale_learning_rates(training.optimizers, config.reduce_lr)
    return False


def keep_best(training: Training, state: TrainingState, epoch: int, score: float) -> None:
    """Keep the present weights as the best ones. After the last epoch the model itself holds them, without a copy."""
    state.result.best_score, state.result.best_epoch = score, epoch
    if state.position.stopped or state.position.epoch > training.config.epochs:
        state.best_weights = None
        return
    now = {name: value.detach() for name, value in training.model.state_dict().items()}
    if state.best_weights is None:
        state.best_weights = {name: value.clone() for name, value in now.items()}
        return
    for name, value in state.best_weights.items():  # in place: two copies would take as much as the optimiser
        value.copy_(now[name])


@contextmanager
def released(optimizers: Sequence[Optimizer], model: nn.Module) -> Iterator[None]:
    """Free the model for other work after a `with` block, even an interrupted one: tables detached, gradients dropped."""
    try:
        yield
    finally:
        for optimizer in optimizers:
            if isinstance(optimizer, RowOptimizer):
                optimizer.detach()
        for parameter in model.parameters():
            parameter.grad = None


def scale_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply every learning rate by `factor`."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            for group in optimizer.param_groups:
                group["lr"] *= factor
        else:
            optimizer.lr *= factor  # type: ignore[attr-defined]
