"""Task: a model, its loss and its batches, which is all that a search sees."""

from __future__ import annotations

import copy
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.data.dataset import EncodedDataset, SplitArrays
from embtrim.data.encoder import vocabulary_bytes
from embtrim.errors import EmbtrimError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Alignment
from embtrim.system.progress import tracked
from embtrim.tasks.sites import ModuleSite, Site, SlotGate, gate_sites, read_call
from embtrim.tasks.survey import Fields, Finding, find_sites, site_plan, survey
from embtrim.training.checkpoint import Checkpoint, CheckpointFolder
from embtrim.training.devices import device_of, fast_matmul
from embtrim.training.evaluation import evaluate, logloss_of_batch, loss_weight
from embtrim.training.fitting import fit
from embtrim.training.loop import scale_learning_rates, train_loop
from embtrim.training.metrics import compute_metrics
from embtrim.training.recoding import data_for
from embtrim.training.settings import FitResult, Hooks, TrainConfig
from embtrim.training.state import Training


class Task:
    """A model with everything a search may ask of it.

    Args:
        model: the model to shrink; searches never change it.
        loss: (model, batch) -> mean loss, a scalar tensor.
        train: training batches: an iterable that starts anew at each `iter`, such as a DataLoader.
        valid: validation batches, likewise; needed by searches that score on validation data.
        score: model -> validation score, higher is better, by which searches compare models; without one it is minus the
            mean validation loss.
        optimizer: model -> optimiser; needed by searches that train.
        fresh: seed -> a model with initial weights; needed by searches that start from them. It may also take no
            argument: torch's generator is then seeded around the call.
        keep: filter on module paths, see `find_sites`.
        fields: of each flat table, by module path: the fields that its ids run through, and their rows; such as
            `{"embedding": {"user": 1000, "item": 500}}`.

    Attributes:
        progress: whether searches show progress bars on stderr.
        checkpoints: where a search keeps the state of its trainings, and of other work that takes long, if anywhere: an
            interrupted search that is started again with the same folder goes on where it was.
    """

    needs_aligned = True  # a foreign module's forward expects the full width
    progress = False
    checkpoints: CheckpointFolder | None = None

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        train: Iterable[Any],
        valid: Iterable[Any] | None = None,
        score: Callable[[nn.Module], float] | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        fresh: Callable[..., nn.Module] | None = None,
        keep: Callable[[str], bool] | None = None,
        fields: Fields | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self._train, self._valid = train, valid
        self.score = score
        self._optimizer, self._fresh, self._keep, self._fields = optimizer, fresh, keep, fields

    def sites(self, model: nn.Module) -> list[Site]:
        """The sites of a model of this task."""
        return find_sites(model, self._keep, self._fields)

    def survey(self) -> list[Finding]:
        """What was found of the model's embeddings, what was left alone, and why."""
        return survey(self.model, self._keep, self._fields)

    def full_plan(self) -> SizePlan:
        """The plan that keeps everything."""
        return site_plan(self.sites(self.model))

    def batches(self, split: str, seed: int | None = None) -> Iterable[Any]:
        """Batches of "train" or "valid"; `seed` shuffles where the task can."""
        batches = self._train if split == "train" else self._valid
        if batches is None:
            raise EmbtrimError(f"this search reads {split} batches; give the Task `{split}=`")
        return batches

    def probe(self) -> list[Any]:
        """One batch, of "valid" if there are any; none of an iterator, which gives each batch once, or of no batches."""
        batches = self._train if self._valid is None else self._valid
        return [] if batches is None or isinstance(batches, Iterator) else list(itertools.islice(batches, 1))

    def tracked_batches(self, split: str, what: str, seed: int | None = None) -> Iterable[Any]:
        """`batches`, with a progress bar where the task shows them."""
        total = self.num_batches(split) if self.progress else None
        return tracked(self.batches(split, seed), what, total, self.progress)

    def num_batches(self, split: str) -> int:
        """Batches a pass over "train" or "valid"; a loader without a length is read once."""
        batches = self.batches(split)
        return len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)

    def fresh(self, seed: int) -> nn.Module:
        """A model with initial weights."""
        if self._fresh is None:
            raise EmbtrimError("this search starts from initial weights; give the Task `fresh=` (seed -> model)")
        if takes_seed(self._fresh):
            return self._fresh(seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self._fresh()

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        seed: int,
        hooks: Hooks | None = None,
        patience: int | None = None,
        lr_factor: float = 1.0,
        **settings: Any,
    ) -> FitResult:
        """Train a model of this task, full or compact; with `patience` stop early and restore the best weights.

        Args:
            model: trained in place.
            epochs: passes over the training batches, at most.
            seed: of shuffling and dropout.
            hooks: additions of a search method.
            patience: epochs without a better validation score (`valid_score`) after which training stops; 0 never stops
                early, but restores the best weights. None looks at no score.
            lr_factor: on the learning rates of the task.
            settings: fields of TrainConfig that a method asks for, such as `tables="dense"`; they have no effect on a
                task with an `optimizer=` of its own.

        Raises:
            EmbtrimError: the task has no `optimizer=`, or for `patience` neither `valid=` nor `score=`.

        Example:
            >>> task.fit(small, epochs=40, seed=0, patience=3)  # doctest: +SKIP
        """
        if self._optimizer is None:
            raise EmbtrimError("this trains; give the Task `optimizer=` (model -> optimiser)")
        if patience is not None and self.score is None and self._valid is None:
            raise EmbtrimError("patience watches a validation score; give the Task `valid=` or `score=`")
        hooks = hooks or Hooks()
        sizes = [tuple(p.shape) for p in model.parameters()]
        depends_on = {
            "epochs": epochs, "seed": seed, "patience": patience, "lr_factor": lr_factor, "sizes": sizes, **hooks.settings
        }  # fmt: skip
        optimizer = self._optimizer(model)
        if lr_factor != 1:
            scale_learning_rates([optimizer], lr_factor)
        config = TrainConfig(epochs=epochs, seed=seed, precision="fp32", patience=patience or 0, reduce_lr=1.0)

        def batches(epoch: int, skip: int) -> Iterator[Any]:
            found = iter(self.batches("train", seed * 100_003 + epoch))
            for _ in range(skip):  # now: a loader draws its order when the first batch is asked for
                next(found)
            return found

        checkpoint = self.next_checkpoint(depends_on, model)
        score = None if patience is None else lambda: self.valid_score(model)
        training = Training(model, self.loss, batches, [optimizer], config, hooks, score)
        return self._noted(train_loop(training, progress=self.progress, checkpoint=checkpoint))

    def next_checkpoint(self, settings: Mapping[str, Any], model: nn.Module) -> Checkpoint | None:
        """Where the next piece of work of a search keeps its state, if anywhere; see Checkpoint for the arguments."""
        if self.checkpoints is None:
            return None
        return Checkpoint(self.checkpoints.next_path(), self.checkpoints.interval, settings, model)

    def kept(self, what: str, model: nn.Module, make: Callable[[], Any]) -> Any:
        """What `make` gives, or in a search that goes on what it gave before.

        Args:
            what: name of the work and of its settings; the result of other work is refused.
            model: what it is done on.
            make: work that changes nothing, with a tensor or a JSON-able value as its result.
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
        """The result of a training; what it took before it was interrupted is added up."""
        if self.checkpoints is not None:
            self.checkpoints.spent_seconds += result.restored_seconds
        return result

    def vocabulary_bytes(self, plan: SizePlan | None = None) -> int:
        """Bytes of the vocabulary that goes along with a model of a plan, or with the full one; 0 where none is known of."""
        return 0

    def recoded(self, plan: SizePlan) -> Task:
        """This task for a compact model: its batches carry the ids of the plan, where the task can re-number them.

        It shows no progress: whoever trains many candidates counts them.
        """
        task = copy.copy(self)
        task.progress = False
        return task

    @torch.no_grad()
    def valid_score(self, model: nn.Module) -> float:
        """`score=` of a model, or without one minus its mean validation loss; higher is better."""
        model.eval()
        if self.score is not None:
            return float(self.score(model))
        total = rows = 0.0
        for batch in self.batches("valid"):
            weight = loss_weight(batch)
            total, rows = total + weight * float(self.loss(model, batch)), rows + weight
        return -total / self._scored(rows)

    @torch.no_grad()
    def gated_scores(self, model: nn.Module, gates: Sequence[Sequence[SlotGate]], max_rows: int = 0) -> list[float]:
        """Validation score of a model under each of several slot gatings, higher is better.

        Without a `score=` it is minus the mean validation loss.

        Args:
            model: put into evaluation mode.
            gates: for each gating, the slot gate of each site.
            max_rows: validation rows to score on, where the task can draw a sample; 0 means all.
        """
        sites = self.sites(model)
        model.eval()
        if self.score is not None:
            scores = []
            for gating in gates:
                with gate_sites(sites, gating):
                    scores.append(float(self.score(model)))
            return scores
        totals, rows = [0.0] * len(gates), 0.0
        for batch in self.batches("valid"):
            weight = loss_weight(batch)
            rows += weight
            for number, gating in enumerate(gates):
                with gate_sites(sites, gating):
                    totals[number] -= weight * float(self.loss(model, batch))
        return [total / self._scored(rows) for total in totals]

    @staticmethod
    def _scored(rows: float) -> float:
        """Validation rows that were scored; without any no score means anything."""
        if not rows:
            raise EmbtrimError("there are no valid batches to score on; give some that can be read again")
        return rows

    def row_counts(self) -> dict[str, np.ndarray]:
        """Occurrences of each row in the training data, int64 (V,) by table; one forward pass over the batches."""
        sites = [site for site in self.sites(self.model) if isinstance(site, ModuleSite)]
        totals = [np.zeros(sum(site.num_rows), np.int64) for site in sites]

        def count(total_V: np.ndarray, _module: nn.Module, args: Any, kwargs: Any, _output: Tensor) -> None:
            ids, *_ = read_call(args, kwargs)
            total_V += torch.bincount(ids.flatten(), minlength=len(total_V)).cpu().numpy()

        hooks = [
            module.register_forward_hook(partial(count, total_V), with_kwargs=True)
            for site, total_V in zip(sites, totals, strict=True)
            for module in site.modules
        ]
        was_training = self.model.training
        self.model.eval()
        num_batches = 0
        try:
            with torch.no_grad():
                for batch in self.batches("train"):
                    self.loss(self.model, batch)
                    num_batches += 1
        finally:
            self.model.train(was_training)
            for hook in hooks:
                hook.remove()
        if not num_batches:
            raise EmbtrimError("there are no train batches to count rows on; give some that can be read again")
        return {
            name: part
            for site, total_V in zip(sites, totals, strict=True)
            for name, part in zip(site.names, np.split(total_V, np.cumsum(site.num_rows)[:-1]), strict=True)
        }


def takes_seed(fresh: Callable[..., nn.Module]) -> bool:
    """Whether `fresh=` of a Task wants a seed: an argument that it cannot do without, or its first one is `seed`."""
    positional = [p for p in inspect.signature(fresh).parameters.values() if p.kind <= p.VAR_POSITIONAL]
    return any(p.default is p.empty for p in positional) or any(p.name == "seed" for p in positional[:1])


class CTRTask(Task):
    """The task of a zoo model on encoded data.

    Args:
        model: zoo model; trained already, for searches that need one.
        data: encoded data with a "train" and, for most searches, a "valid" split.
        config: how `fit` trains; batch size, L2 and so on of the search's own training.

    Raises:
        EmbtrimError: the model is not one of embtrim.models.
    """

    def __init__(self, model: CTRModel, data: EncodedDataset, config: TrainConfig | None = None) -> None:
        if not isinstance(model, CTRModel):
            raise EmbtrimError(
                f"a CTRTask is of a model of embtrim.models, given a {type(model).__name__}; give that one to a "
                "Task(model, loss=.., train=.., valid=..)"
            )
        self.data = data_for(model, data)
        self.config = config or TrainConfig()
        model.to(device_of(self.config))  # in place, as `fit` does: batches go there too
        super().__init__(model, logloss_of_batch, train=(), score=self._score)
        self.model: CTRModel = model
        self.needs_aligned = model.needs_aligned

    def _score(self, model: nn.Module) -> float:
        assert isinstance(model, CTRModel)
        return evaluate(model, self.data, "valid", self.config).auc

    def full_plan(self) -> SizePlan:
        """See Task."""
        return SizePlan.full(self.data.schema, self.model.tables.width, self.model.has_first_order)

    def batches(self, split: str, seed: int | None = None) -> Iterable[Any]:
        """See Task."""
        return (b.to(self.config.device) for b in self.data.batches(split, self.config.batch_size, seed))

    def vocabulary_bytes(self, plan: SizePlan | None = None) -> int:
        """See Task."""
        return vocabulary_bytes(self.data, plan)

    def recoded(self, plan: SizePlan) -> CTRTask:
        """See Task."""
        task = copy.copy(self)
        task.data, task.score, task.progress = self.data.recode(plan), task._score, False
        return task

    def num_batches(self, split: str) -> int:
        """See Task."""
        return -(-self.data.num_rows(split) // self.config.batch_size)

    def fresh(self, seed: int) -> nn.Module:
        """See Task."""
        model = type(self.model)(self.model.schema, **{**self.model.hparams, "seed": seed})
        return model.to(self.config.device)

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        seed: int,
        hooks: Hooks | None = None,
        patience: int | None = None,
        lr_factor: float = 1.0,
        **settings: Any,
    ) -> FitResult:
        """See Task; the score is the AUC."""
        assert isinstance(model, CTRModel)
        splits = {"train": self.data.split("train")}
        if patience is not None:
            splits["valid"] = self.data.split("valid")
            settings |= {"patience": patience, "monitor": "auc"}
        data = EncodedDataset(self.data.schema, splits, id_maps=self.data.id_maps)
        config = self.config.replace(epochs=epochs, seed=seed, compile=False, **settings)  # they are short, and many
        config = config.replace(learning_rate=config.learning_rate * lr_factor)
        checkpoint = None
        if self.checkpoints is not None:
            config = config.replace(checkpoint_seconds=self.checkpoints.interval)
            checkpoint = self.checkpoints.next_path()
        return self._noted(fit(model, data, config, hooks=hooks, progress=self.progress, checkpoint=checkpoint))

    @torch.no_grad()
    def gated_scores(self, model: nn.Module, gates: Sequence[Sequence[SlotGate]], max_rows: int = 0) -> list[float]:
        """See Task; the score is the AUC, of the same sample of rows at every call."""
        arrays = self.data.split("valid")
        if 0 < max_rows < len(arrays):
            rows = np.sort(np.random.default_rng(0).choice(len(arrays), max_rows, replace=False))
            columns = (arrays.ids, arrays.labels, arrays.dense, arrays.weights)
            arrays = SplitArrays(*(None if column is None else column[rows] for column in columns))  # type: ignore[arg-type]
        sample = EncodedDataset(self.data.schema, {"valid": arrays}, id_maps=self.data.id_maps)
        sites, device = self.sites(model), device_of(self.config)
        model.to(device).eval()
        logits = np.empty((len(gates), len(arrays)), np.float32)
        start = 0
        with fast_matmul("fp32", device):
            for batch in sample.batches("valid", GATED_BATCH_SIZE):
                batch = batch.to(device)
                for number, gating in enumerate(gates):
                    with gate_sites(sites, gating):
                        logits_B = model(batch.ids_BC, batch.dense_BE).float().cpu().numpy()
                    logits[number, start : start + len(batch)] = logits_B
                start += len(batch)
        return [compute_metrics(arrays.labels, found, arrays.weights).auc for found in logits]

    def row_counts(self) -> dict[str, np.ndarray]:
        """See Task."""
        return self.data.value_counts("train")


def alignment_of(task: Task, wanted: Alignment) -> Alignment:
    """The alignment a plan for this task needs: none for a model that only concatenates."""
    return wanted if task.needs_aligned else "concat"


# Rows a batch where many gatings are scored: activations of larger ones fall out of the cache.
GATED_BATCH_SIZE = 2_048
