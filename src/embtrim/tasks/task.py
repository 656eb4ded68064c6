"""Task: all that a search sees of a model, its loss and its batches."""

from __future__ import annotations

import copy
import dataclasses
import glob
import inspect
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.errors import ModelError
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment
from embtrim.system.modules import copied, unwrapped
from embtrim.system.progress import tracked
from embtrim.tasks.chosen import Chosen, Patterns
from embtrim.tasks.entries import Entries, draw_weights, summed_gradients, whole_tables
from embtrim.tasks.noting import with_reads
from embtrim.tasks.row_counts import count_rows, unread
from embtrim.tasks.row_gradients import RowGradients, row_gradients
from embtrim.tasks.row_scores import RowScores
from embtrim.tasks.sharing import OneProcess
from embtrim.tasks.sites import ModuleSite, Site, SlotGate, gate_sites, weights_by_table
from embtrim.tasks.survey import Fields, Finding, find_sites, site_plan, survey
from embtrim.tasks.table_parts import FIRST_ORDER, Change, FirstOrder, TablePart, changed_weights, whole_parts
from embtrim.tasks.watching import reads_of_batch
from embtrim.training.callbacks import Callback, checked
from embtrim.training.checkpoint import Checkpoint, CheckpointFolder
from embtrim.training.evaluation import check_finite, loss_weight
from embtrim.training.loop import scale_learning_rates, train_loop
from embtrim.training.settings import FitResult, Hooks, TrainConfig
from embtrim.training.state import Training

logger = logging.getLogger(__name__)


class Task(OneProcess):
    """A model with everything that a search may need.

    Args:
        model: Model to shrink. Searches never change it. Wrappers such as torch.compile, DataParallel and
            DistributedDataParallel are taken off.
        loss: (model, batch) -> mean loss of the batch, a scalar tensor.
        train: Training batches: an iterable that can be read again, such as a DataLoader.
        valid: Validation batches, likewise. Searches that score on validation data need them.
        score: model -> validation score, higher is better. Without it a model's score is minus its mean validation loss.
        optimizer: model -> optimiser. Searches that train need it.
        fresh: seed -> model with initial weights. Searches that start from initial weights need it. If it takes no
            argument, torch's generator is seeded around the call.
        include: Paths of the embeddings to search, or patterns such as "towers.*.item"; None searches all.
        exclude: Paths or patterns of embeddings to leave alone, of those included.
        fields: Rows of each field of a flat table, by module path, such as
            `{"embedding": {"user": 1000, "item": 500}}`. A flat table holds several fields, told apart by offsets.

    Attributes:
        progress: Whether searches show progress bars on stderr.
        checkpoints: Folder for the state of trainings and other long work, or None. A search started again with the
            same folder continues where it was interrupted.
        readings: Readings of the model that were made before, see methods/readings.py. Without them the guided search
            reads the model.
    """

    needs_aligned = True  # a foreign module's forward expects the full width
    progress = False
    checkpoints: CheckpointFolder | None = None
    readings: Any = None

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        train: Iterable[Any],
        valid: Iterable[Any] | None = None,
        score: Callable[[nn.Module], float] | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        fresh: Callable[..., nn.Module] | None = None,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        fields: Fields | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self.loss = loss
        self._train, self._valid = train, valid
        self.score = score
        self._optimizer, self._fresh, self._fields = optimizer, fresh, fields
        self._chosen = Chosen.parse(include, exclude)

    def sites(self, model: nn.Module) -> list[Site]:
        """Sites of a model of this task."""
        return find_sites(model, self._chosen.include, self._chosen.exclude, self._fields)

    def survey(self) -> list[Finding]:
        """Every module of the model with embeddings: found, or left alone and why.

        One batch is run to see what the model reads, where the task has batches that can be read again: notes say what
        reading all of a table takes, and how to name the fields of a flat table.
        """
        findings = survey(self.model, self._chosen.include, self._chosen.exclude, self._fields)
        with torch.random.fork_rng([]):  # a loader may draw its order
            batches = self.probe()
        if not batches or not any(finding.found for finding in findings):
            return findings
        sites = self._module_sites()
        return with_reads(findings, self.model, sites, reads_of_batch(self.model, sites, self.loss, batches[0]))

    def full_plan(self) -> SizePlan:
        """The plan that keeps everything."""
        return site_plan(self.sites(self.model))

    def batches(self, split: str, seed: int | None = None) -> Iterable[Any]:
        """Batches of "train" or "valid". A seed shuffles them if the task can.

        Raises:
            ModelError: The Task has no such batches.
        """
        batches = self._train if split == "train" else self._valid
        if batches is None:
            raise ModelError(f"this search reads {split} batches; give the Task `{split}=`")
        return batches

    def probe(self) -> list[Any]:
        """One batch, from "valid" if the task has it; none from an iterator, which gives each batch only once."""
        batches = self._train if self._valid is None else self._valid
        return [] if batches is None or isinstance(batches, Iterator) else list(itertools.islice(batches, 1))

    def tracked_batches(self, split: str, what: str, seed: int | None = None) -> Iterable[Any]:
        """`batches`, with a progress bar if the task shows progress."""
        total = self.num_batches(split) if self.progress else None
        return tracked(self.batches(split, seed), what, total, self.progress, "batches")

    def weight_of(self, batch: Any) -> float:
        """Weight of a batch's mean loss in an average over batches, see `loss_weight`."""
        return loss_weight(batch)

    def step_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of a batch in a training step, such that the mean over all processes is the loss of all their rows."""
        return self.loss(model, batch)

    def copied_model(self) -> nn.Module:
        """A copy of the model, to be trained.

        Raises:
            ModelError: The model cannot be copied.
        """
        return copied(self.model)

    def column_norms(self) -> dict[str, np.ndarray]:
        """Euclidean norms of the columns of every table, float64 (D,) by name."""
        weights = weights_by_table(self.sites(self.model))
        return {name: weight_VD.double().norm(dim=0).cpu().numpy() for name, weight_VD in weights.items()}

    def row_norms(self) -> dict[str, RowScores]:
        """Euclidean norms of the rows of every table by its name, of the rows that this process holds."""
        weights = weights_by_table(self.sites(self.model))
        return {name: RowScores(weight_VD.double().norm(dim=1).cpu().numpy()) for name, weight_VD in weights.items()}

    def count_scores(self) -> dict[str, RowScores]:
        """`row_counts` of the rows that this process holds, by table name."""
        return {name: RowScores(count_V) for name, count_V in self.row_counts().items()}

    def row_sizes(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Sums of the absolute values of the rows of every table of a model of this task, float32 (V,) by name."""
        weights = weights_by_table(self.sites(model))
        return {name: weight_VD.abs().sum(1).cpu().numpy() for name, weight_VD in weights.items()}

    def draw_weights(self, model: nn.Module, std: float, seed: int) -> None:
        """Draw the embeddings of a model of this task anew; rows that start at zero stay zero."""
        draw_weights(self.sites(model), std, seed)

    def entries(self, model: nn.Module) -> list[Entries]:
        """The weights of the rows that this process holds of every table of a model of this task, in the plan's order."""
        return whole_tables(self.sites(model))

    def entry_gradients(self, model: nn.Module, batches: Iterable[tuple[int, Any, float]]) -> list[Tensor]:
        """Sums of the gradients of the loss by the `entries` of a model, from places, batches and their factors."""
        return summed_gradients(self.sites(model), batches, lambda batch: self.loss(model, batch))

    def table_parts(self) -> dict[str, TablePart]:
        """The rows of every table that this process reads alone, by the table's name; a pass over the train batches."""
        return whole_parts(self.sites(self.model), self.row_counts())

    def changed(self, changes: Mapping[str, Change]) -> AbstractContextManager[None]:
        """Change tables of the model inside a `with` block: functions of the rows of `table_parts`, by table.

        First-order weights (V, 1) are changed by FIRST_ORDER and the name of the table.
        """
        live, first_order = weights_by_table(self.sites(self.model)), self.first_order_weights()
        live |= {FIRST_ORDER + name: weight_V[:, None] for name, weight_V in first_order.items()}
        return changed_weights(live, changes)

    def row_gradients(self, batch: Any, place: int) -> list[RowGradients]:
        """Gradients of the sum of the losses of a batch by the rows that it reads; see `row_gradients`.

        A row that several processes read in one step has one gradient, which one of them gives.
        """
        return row_gradients(
            self.sites(self.model), lambda: self.weight_of(batch) * self.loss(self.model, batch), place
        )

    def num_batches(self, split: str) -> int:
        """Number of batches of "train" or "valid". A loader without a length is read once to count them."""
        batches = self.batches(split)
        return len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)

    def fresh(self, seed: int) -> nn.Module:
        """A model with initial weights.

        Raises:
            ModelError: The Task has no `fresh=`.
        """
        if self._fresh is None:
            raise ModelError("this search starts from initial weights; give the Task `fresh=` (seed -> model)")
        if takes_seed(self._fresh):
            return unwrapped(self._fresh(seed))
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return unwrapped(self._fresh())

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        seed: int,
        hooks: Hooks | None = None,
        patience: int | None = None,
        lr_factor: float = 1.0,
        callbacks: Sequence[Callback] = (),
        **settings: Any,
    ) -> FitResult:
        """Train a full or compact model of this task; with `patience` stop early and restore the best weights.

        Args:
            model: Model, trained in place.
            epochs: Most passes over the training batches.
            seed: Seed of shuffling and dropout.
            hooks: Additions of a search method.
            patience: Epochs without a better validation score (`valid_score`) after which training stops; 0 never stops
                early, but restores the best weights; None computes no score.
            lr_factor: Factor on the learning rates of the task.
            callbacks: Objects that are told of each epoch, see `embtrim.training.callbacks`.
            settings: Fields of TrainConfig that a method asks for, such as `tables="dense"`. The `optimizer=` of a Task
                ignores them, and a warning says so.

        Raises:
            ConfigError: A callback has no `on_epoch` or `on_record`.
            ModelError: The Task has no `optimizer=`; or `patience` is given, but neither `valid=` nor `score=`.

        Example:
            >>> task.fit(small, epochs=40, seed=0, patience=3)  # doctest: +SKIP
        """
        if self._optimizer is None:
            raise ModelError("this trains; give the Task `optimizer=` (model -> optimiser)")
        if patience is not None and self.score is None and self._valid is None:
            raise ModelError("patience watches a validation score; give the Task `valid=` or `score=`")
        _warn_of_ignored(settings)
        callbacks, hooks = checked(callbacks), hooks or Hooks()
        sizes = [tuple(p.shape) for p in model.parameters()]
        depends_on = {
            "epochs": epochs, "seed": seed, "patience": patience, "lr_factor": lr_factor, "sizes": sizes, **hooks.settings
        }  # fmt: skip
        optimizer = self._optimizer(model)
        if lr_factor != 1:
            scale_learning_rates([optimizer], lr_factor)
        config = TrainConfig(
            epochs=epochs, seed=seed, precision="fp32", patience=patience or 0, min_delta=0.0, reduce_lr=1.0
        )
        batches = partial(self._train_batches, seed)
        checkpoint = self.next_checkpoint(depends_on, model)
        score = None if patience is None else lambda: self.valid_score(model)
        training = Training(
            model, self.step_loss, batches, [optimizer], config, hooks, score,
            callbacks=callbacks, after_backward=self.average_gradients,
        )  # fmt: skip
        return self._noted(train_loop(training, progress=self.progress, checkpoint=checkpoint))

    def _train_batches(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        """Training batches of an epoch, without the first `skip`."""
        found = iter(self.batches("train", seed * 100_003 + epoch))
        for _ in range(skip):  # At once, not on first use: a loader draws its order when the first batch is read.
            next(found)
        return found

    def next_checkpoint(self, settings: Mapping[str, Any], model: nn.Module) -> Checkpoint | None:
        """Checkpoint of the next piece of work, or None without a folder; see Checkpoint for the arguments."""
        if self.checkpoints is None:
            return None
        return Checkpoint(self.checkpoints.next_path(), self.checkpoints.interval, settings, model)

    def kept(self, what: str, model: nn.Module, make: Callable[[], Any]) -> Any:
        """Result of `make`, read from the checkpoint if a resumed search computed it before.

        Args:
            what: Name of the work with its settings. The result of other work is refused.
            model: Model that the work is done on.
            make: Work that changes nothing. Its result is a tensor or a JSON-able value.
        """
        checkpoint = self.next_checkpoint({"work": what}, model)
        if checkpoint is None or self.checkpoints is None:
            return make()
        saved = checkpoint.load()
        if saved is not None:
            self.checkpoints.spent_seconds += saved["seconds"]
            return saved["value"]
        started = time.perf_counter()
        value = make()
        checkpoint.save({"value": value, "seconds": time.perf_counter() - started})
        return value

    def _noted(self, result: FitResult) -> FitResult:
        """The result of a training, as given; its time before an interruption is added to the folder's total."""
        if self.checkpoints is not None:
            self.checkpoints.spent_seconds += result.restored_seconds
        return result

    def vocabulary_bytes(self, plan: SizePlan | None = None) -> int:
        """Bytes of the vocabulary that is served with a model of a plan, or with the full model; 0 where unknown."""
        return 0

    def recoded(self, plan: SizePlan) -> Task:
        """This task for a compact model: its batches carry the ids of the plan, if the task can re-number them.

        The returned task shows no progress bars: a search that trains many candidates shows one of its own.
        """
        task = copy.copy(self)
        task.progress = False
        return task

    def sampled(self, max_rows: int) -> Task:
        """This task with at most that many validation rows, the same at every call; a task that cannot draw keeps all."""
        return self

    def score_error(self, model: nn.Module) -> float:
        """Standard error of `valid_score`, from the spread of the mean losses of batches; 0 where a `score=` hides it."""
        if self.score is not None:
            return 0.0
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)  # batches, their losses, and the squares of these
        with torch.no_grad():
            for batch in self.batches("valid"):
                loss = self.loss(model, batch).double().cpu()
                if self.weight_of(batch):
                    sums += torch.stack([torch.ones_like(loss), loss, loss**2])
        number, total, squares = self.summed(sums).tolist()
        if number < 2:
            return 0.0
        return (max(0.0, squares - total**2 / number) / (number - 1) / number) ** 0.5

    @torch.no_grad()
    def valid_score(self, model: nn.Module) -> float:
        """Validation score of a model, higher is better: its `score=`, or else minus its mean validation loss."""
        model.eval()
        if self.score is not None:
            return self._own_score(model)
        total = rows = 0.0
        for number, batch in enumerate(self.batches("valid")):
            weight, loss = self.weight_of(batch), float(self.loss(model, batch))
            if weight:
                check_finite(loss, "loss", "valid", number)
                total, rows = total + weight * loss, rows + weight
        total, rows = self.summed(torch.tensor([total, rows], dtype=torch.float64)).tolist()
        return -total / self._scored(rows)

    def _own_score(self, model: nn.Module) -> float:
        """What the task's `score=` gives; ModelError if it is NaN, which compares with nothing."""
        assert self.score is not None
        score = float(self.score(model))
        if math.isnan(score):
            raise ModelError(
                "the Task's score= gave nan; look for missing values in its data, or for a division by zero"
            )
        return score

    @torch.no_grad()
    def gated_scores(self, model: nn.Module, gates: Sequence[Sequence[SlotGate]], max_rows: int = 0) -> list[float]:
        """Validation score of a model under each of several slot gatings; see `valid_score`.

        Args:
            model: Model, put into evaluation mode.
            gates: Slot gates of all sites, for each gating.
            max_rows: Most validation rows to score on, if the task can draw a sample; 0 means all.
        """
        sites = self.sites(model)
        model.eval()
        if self.score is not None:
            scores = []
            for gating in gates:
                with gate_sites(sites, gating):
                    scores.append(self._own_score(model))
            return scores
        totals, rows = [0.0] * len(gates), 0.0
        for place, batch in enumerate(self.batches("valid")):
            weight = self.weight_of(batch)
            rows += weight
            for number, gating in enumerate(gates):
                with gate_sites(sites, gating):
                    loss = float(self.loss(model, batch))
                if weight:
                    check_finite(loss, "loss", "valid", place)
                    totals[number] -= weight * loss
        *totals, rows = self.summed(torch.tensor([*totals, rows], dtype=torch.float64)).tolist()
        return [total / self._scored(rows) for total in totals]

    @staticmethod
    def _scored(rows: float) -> float:
        """The number of rows scored, as given; ModelError if it is zero."""
        if not rows:
            raise ModelError("there are no valid batches to score on; give some that can be read again")
        return rows

    def row_counts(self) -> dict[str, np.ndarray]:
        """Occurrences of each row in the training batches, int64 (V,) by table name. Takes a pass over the batches."""
        counts, num_batches = count_rows(self.model, self._module_sites(), self.loss, self.batches("train"))
        if not num_batches:
            raise ModelError("there are no train batches to count rows on; give some that can be read again")
        return counts

    def first_order(self) -> FirstOrder | None:
        """First-order weights of the model, one a row; None if it has none. They are no table of their own."""
        return None

    def first_order_weights(self) -> dict[str, Tensor]:
        """First-order weights of each table (V,), by its name, if there are any; views that change the model."""
        return {}

    def unread_tables(self) -> list[str]:
        """Names of the tables of which no training batch reads a row, apart from a padding row.

        One batch tells if it reads all tables. Otherwise this takes a pass over the batches.
        """
        if isinstance(self._train, Iterator):  # each batch comes only once
            return []
        sites = self._module_sites()
        with torch.random.fork_rng([]):  # a loader may draw its order from the global generator
            counts, num_batches = count_rows(self.model, sites, self.loss, itertools.islice(self.batches("train"), 1))
            return unread(sites, self.row_counts()) if num_batches and unread(sites, counts) else []

    def without_tables(self, names: Collection[str]) -> Task:
        """This task without the embeddings of a foreign model whose tables are all among the names; others stay."""
        left = {site.path for site in self._module_sites() if all(name in names for name in site.names)}
        task = copy.copy(self)
        excluded = (*self._chosen.exclude, *map(glob.escape, left))
        task._chosen = dataclasses.replace(self._chosen, exclude=excluded)
        task._fields = {path: fields for path, fields in (self._fields or {}).items() if path not in left}
        return task

    def _module_sites(self) -> list[ModuleSite]:
        return [site for site in self.sites(self.model) if isinstance(site, ModuleSite)]


def _warn_of_ignored(settings: Mapping[str, Any]) -> None:
    """Warn of settings that a method asks for and that a Task with its own `optimizer=` cannot follow."""
    default = TrainConfig()
    asked = default.replace(**settings)
    ignored = [
        f"{name} = {getattr(asked, name)!r}" for name in settings if getattr(asked, name) != getattr(default, name)
    ]
    if ignored:
        logger.warning(
            "this Task trains with its own optimizer=, which ignores what the search asks for: %s; build it into that "
            "optimizer, such as embedding_l2 as weight decay",
            ", ".join(ignored),
        )


def takes_seed(fresh: Callable[..., nn.Module]) -> bool:
    """Whether `fresh=` of a Task takes a seed: it requires an argument, or its first one is called `seed`."""
    positional = [p for p in inspect.signature(fresh).parameters.values() if p.kind <= p.VAR_POSITIONAL]
    return any(p.default is p.empty for p in positional) or any(p.name == "seed" for p in positional[:1])


def alignment_of(task: Task, wanted: Alignment) -> Alignment:
    """Alignment that a plan for this task needs: "concat" if the model only concatenates embeddings."""
    return wanted if task.needs_aligned else "concat"
