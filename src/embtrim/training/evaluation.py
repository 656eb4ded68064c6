"""evaluate and predict_logits: exact metrics and logits of a zoo model over a whole split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from embtrim.data.dataset import WINDOW_ROWS, Batch, EncodedDataset
from embtrim.errors import ModelError
from embtrim.models.ctr_model import CTRModel
from embtrim.system.memory import freed_pages_kept
from embtrim.training.devices import device_of, fast_matmul
from embtrim.training.metrics import Metrics, auc_by_frequency_decile, compute_metrics
from embtrim.training.recoding import data_for
from embtrim.training.settings import TrainConfig


def rows_per_batch(device: torch.device) -> int:
    """Rows scored at a time. On a CPU their embeddings stay in its caches; other devices take larger batches."""
    return 2_048 if device.type == "cpu" else 8_192


def logloss_of_batch(model: nn.Module, batch: Batch) -> Tensor:
    """Mean binary cross entropy of a batch, weighted by sample weights if the data have them; a scalar."""
    logits_B = model(batch.ids_BC, batch.dense_BE).float()
    if batch.weights_B is None:
        return functional.binary_cross_entropy_with_logits(logits_B, batch.labels_B)
    losses_B = functional.binary_cross_entropy_with_logits(logits_B, batch.labels_B, reduction="none")
    return (losses_B * batch.weights_B).sum() / batch.weights_B.sum().clamp(min=1e-12)


def predict_logits(
    model: CTRModel, data: EncodedDataset, split: str = "test", config: TrainConfig | None = None
) -> np.ndarray:
    """Logits of a whole split; always in fp32.

    Args:
        model: Full or compact zoo model.
        data: Data of the model's schema; see `evaluate`.
        split: "train", "valid" or "test".
        config: Gives the device.

    Returns:
        float32 (N,), in the stored order of the rows.

    Raises:
        DataError: See `data_for` in `embtrim.training.recoding`; or the split is missing.
    """
    return logits_of_split(model, data_for(model, data), split, config)


@torch.no_grad()
def logits_of_split(
    model: CTRModel, data: EncodedDataset, split: str, config: TrainConfig | None = None, precision: str = "fp32"
) -> np.ndarray:
    """`predict_logits` for data that already carry the ids of the model; they are not checked.

    `precision` is that of the forward pass, see `TrainConfig`.
    """
    config = config or TrainConfig()
    device = device_of(config)
    model.to(device).eval()
    logits = np.empty(data.num_rows(split), np.float32)
    start = 0
    with fast_matmul(precision, device) as (autocast, _), freed_pages_kept(), autocast():
        for batch in data.batches(split, rows_per_batch(device)):
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
        model: Full or compact zoo model.
        data: Data of the model's schema, as they were encoded. Data re-coded by the model's plan are taken as well; the
            model of a bundle needs them.
        split: "train", "valid" or "test".
        config: Gives the device.
        deciles: Also compute AUC by how often a row's rarest value occurs in the training rows.

    Raises:
        DataError: The data do not fit the model, see `data_for` in `embtrim.training.recoding`; or the split is missing
            or has one class only.
        ModelError: The model is not one of embtrim.models, or the data are not encoded.
    """
    data = data_for(model, data)
    logits = logits_of_split(model, data, split, config)
    metrics = metrics_of_logits(data, split, logits)
    if deciles:
        labels = np.asarray(data.split(split).labels)
        by_decile = auc_by_frequency_decile(labels, logits, rarest_value_counts(data, split))
        metrics = metrics.with_deciles(by_decile)
    return metrics


def metrics_of_logits(data: EncodedDataset, split: str, logits: np.ndarray) -> Metrics:
    """Metrics of a split's logits (N,), with the sample weights that its rows have."""
    arrays = data.split(split)
    weights = None if arrays.weights is None else np.asarray(arrays.weights)
    return compute_metrics(np.asarray(arrays.labels), logits, weights)


def rarest_value_counts(data: EncodedDataset, split: str) -> np.ndarray:
    """How often the rarest feature value of each row occurs in the training rows; int64 (N,)."""
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


def loss_weight(batch: Any) -> float:
    """Weight of a batch's mean loss in an average over batches: its rows, or the sum of their sample weights.

    The rows of any other batch are the length of its first tensor, looked for in the first part of a mapping, list or
    tuple. Without a tensor there, or if the tensor is a scalar, the weight is 1.
    """
    if isinstance(batch, Batch):
        return float(len(batch) if batch.weights_B is None else batch.weights_B.sum())
    if isinstance(batch, Tensor):
        return float(len(batch)) if batch.ndim else 1.0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((loss_weight(part) for part in parts), 1.0)


def check_finite(value: Tensor | np.ndarray | float, what: str, split: str, number: int) -> None:
    """Raise ModelError unless what was computed on a batch is finite.

    Args:
        value: A loss, or gradients.
        what: What the value is, for the message.
        split: Split of the batch.
        number: Number of the batch in its split, from 0.
    """
    found = torch.as_tensor(value).detach()
    if not bool(found.isfinite().all()):
        bad = float(found[~found.isfinite()][0])
        raise ModelError(
            f"the {what} of {split} batch {number:,} (counted from 0) is {bad}; look for missing values in that batch, or for "
            "a division by zero or a logarithm of zero in the model or the loss"
        )
