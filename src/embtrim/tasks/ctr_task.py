"""CTRTask: the Task of a zoo model on encoded data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoder import vocabulary_bytes
from embtrim.errors import ModelError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.system.modules import unwrapped
from embtrim.tasks.sites import SlotGate, gate_sites
from embtrim.tasks.table_parts import FirstOrder
from embtrim.tasks.task import Task
from embtrim.training.callbacks import Callback
from embtrim.training.devices import device_of, fast_matmul
from embtrim.training.evaluation import logits_of_split, logloss_of_batch, metrics_of_logits
from embtrim.training.fitting import fit
from embtrim.training.metrics import auc_error
from embtrim.training.recoding import data_for
from embtrim.training.settings import FitResult, Hooks, TrainConfig

# Rows per batch when many gatings are scored: the activations of larger batches fall out of the cache.
GATED_BATCH_SIZE = 2_048


class CTRTask(Task):
    """The task of a zoo model on encoded data.

    Args:
        model: Zoo model. Some searches need a trained one.
        data: Encoded data with a "train" split and, for most searches, a "valid" split. A compact model gets its
            batches re-coded, see `data_for` in `embtrim.training.recoding`.
        config: Settings of the trainings inside a search: batch size, L2 and so on.

    Raises:
        DataError: The data do not fit the model.
        ModelError: The model is not one of embtrim.models.
    """

    def __init__(self, model: CTRModel, data: EncodedDataset, config: TrainConfig | None = None) -> None:
        model = unwrapped(model)  # type: ignore[assignment]
        if not isinstance(model, CTRModel):
            raise ModelError(
                f"a CTRTask takes a model of embtrim.models, given a {type(model).__name__}; give that model to a "
                "Task(model, loss=.., train=.., valid=..)"
            )
        self.data = data_for(model, data)
        self.config = config or TrainConfig()
        model.to(device_of(self.config))  # in place, as in `fit`: batches go to the same device
        super().__init__(model, logloss_of_batch, train=(), score=self._score)
        self.model: CTRModel = model
        self.score_precision = "fp32"
        self.needs_aligned = model.needs_aligned

    def _score(self, model: nn.Module) -> float:
        assert isinstance(model, CTRModel)
        logits = logits_of_split(model, data_for(model, self.data), "valid", self.config, self.score_precision)
        return metrics_of_logits(self.data, "valid", logits).auc

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

    def sampled(self, max_rows: int) -> CTRTask:
        """See Task. `valid_score` has the precision of training there, whose rounding is less than the sample's error."""
        if max_rows >= self.data.num_rows("valid"):
            return self
        task = copy.copy(self)
        task.data = self.data.sampled("valid", max_rows)
        task.score, task.score_precision = task._score, task.config.precision
        return task

    def score_error(self, model: nn.Module) -> float:
        """See Task. The score is an AUC, and its error DeLong's."""
        assert isinstance(model, CTRModel)
        arrays = self.data.split("valid")
        return auc_error(arrays.labels, logits_of_split(model, self.data, "valid", self.config))

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
        callbacks: Sequence[Callback] = (),
        **settings: Any,
    ) -> FitResult:
        """See Task. The score is the AUC."""
        assert isinstance(model, CTRModel)
        splits = {"train": self.data.split("train")}
        if patience is not None:
            splits["valid"] = self.data.split("valid")
            settings |= {"patience": patience, "monitor": "auc"}
        data = EncodedDataset(self.data.schema, splits, id_maps=self.data.id_maps)
        config = self.config.replace(epochs=epochs, seed=seed, compile=False, **settings)  # short and many
        config = config.replace(learning_rate=config.learning_rate * lr_factor)
        checkpoint = None
        if self.checkpoints is not None:
            config = config.replace(checkpoint_seconds=self.checkpoints.interval)
            checkpoint = self.checkpoints.next_path()
        shown: dict[str, Any] = {"progress": self.progress, "callbacks": callbacks}
        return self._noted(fit(model, data, config, hooks=hooks, checkpoint=checkpoint, **shown))

    @torch.no_grad()
    def gated_scores(self, model: nn.Module, gates: Sequence[Sequence[SlotGate]], max_rows: int = 0) -> list[float]:
        """See Task. The score is the AUC on a sample of rows that is the same at every call."""
        sample = (self.sampled(max_rows) if max_rows else self).data
        sites, device = self.sites(model), device_of(self.config)
        model.to(device).eval()
        logits = np.empty((len(gates), sample.num_rows("valid")), np.float32)
        start = 0
        with fast_matmul("fp32", device):
            for batch in sample.batches("valid", GATED_BATCH_SIZE):
                batch = batch.to(device)
                for number, gating in enumerate(gates):
                    with gate_sites(sites, gating):
                        logits_B = model(batch.ids_BC, batch.dense_BE).float().cpu().numpy()
                    logits[number, start : start + len(batch)] = logits_B
                start += len(batch)
        return [metrics_of_logits(sample, "valid", found).auc for found in logits]

    def row_counts(self) -> dict[str, np.ndarray]:
        """See Task."""
        return self.data.value_counts("train")

    def first_order(self) -> FirstOrder | None:
        """See Task. A weight is added to the logit z, so that its sensitivity is the mean of (dl/dz)^2."""
        if not (weights := self.first_order_weights()):
            return None
        logits = torch.from_numpy(logits_of_split(self.model, self.data, "valid", self.config, self.score_precision))
        residuals = logits.double().sigmoid().numpy() - self.data.split("valid").labels
        return FirstOrder(weights, float(np.square(residuals).mean()))

    def first_order_weights(self) -> dict[str, Tensor]:
        """See Task."""
        tables = self.model.tables
        if tables.first_order is None:
            return {}
        starts, whole = tables.layout.segment_starts, tables.first_order.detach()
        return {table.name: whole.narrow(0, starts[table.name][0], table.num_rows) for table in tables.plan.tables}

    def unread_tables(self) -> list[str]:
        """See Task. A field of one value reads a row in every sample; a list may always be empty."""
        if all(field.type != "multi" for field in self.data.schema.id_fields):
            return []
        return [name for name, count_V in self.row_counts().items() if not count_V.any()]
