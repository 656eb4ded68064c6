"""evaluate: exact metrics of a model over a split."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from embtrim.data.dataset import WINDOW_ROWS, Batch, EncodedDataset
from embtrim.errors import DataError, EmbtrimError
from embtrim.models.ctr_model import CTRModel
from embtrim.system.memory import freed_pages_kept
from embtrim.training.devices import device_of, fast_matmul
from embtrim.training.metrics import Metrics, auc_by_frequency_decile, compute_metrics
from embtrim.training.settings import TrainConfig

# Inference batches: large enough to keep the matmuls busy, small enough that (B, F, D) stays in cache-sized chunks.
EVAL_BATCH_SIZE = 8_192


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
        EmbtrimError: the model is not one of embtrim.models, or the data are not encoded.
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
