"""Soft labels: a full model teaches the compact models that are made from it (Hinton et al. 2015, arXiv 1503.02531).

    label = (1 - share) * click + share * probability                                                       (teaching)

The probability is the one that the trained full model predicts for the row. The paper softens the probabilities of many
classes by a temperature; here the temperature is 1, and the mean of the two losses is the loss of the mean label.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from embtrim.data.dataset import EncodedDataset
from embtrim.models.ctr_model import CTRModel
from embtrim.training.evaluation import predict_logits
from embtrim.training.settings import TrainConfig
from embtrim.training.state import checksum


def taught(data: EncodedDataset, model: CTRModel, share: float, config: TrainConfig) -> EncodedDataset:
    """The data with soft labels in the train split: float32 (N,), in memory. All else stays as it is.

    Args:
        data: Data of the model's schema, in the ids that the model reads.
        model: The trained full model.
        share: Share of the model's probability in a label, from 0 to 1; 0 gives the data as they are.
        config: Gives the device.

    Raises:
        DataError: The data do not fit the model, see `data_for` in `embtrim.training.recoding`, or have no train split.
    """
    if not share:
        return data
    logits = predict_logits(model, data, "train", config)
    labels = torch.from_numpy(logits).sigmoid_().mul_(share).numpy()  # in the memory of the logits
    clicks = data.split("train")
    labels += np.float32(1 - share) * np.asarray(clicks.labels)  # (teaching)
    splits = {**data.splits, "train": dataclasses.replace(clicks, labels=labels)}
    return EncodedDataset(data.schema, splits, data.folder, data.id_maps)


def teaching_settings(model: CTRModel, share: float) -> dict[str, Any]:
    """What a training with soft labels depends on beside the clicks; a checkpoint is recognised by it."""
    return {"teacher": share, "teacher_weights": checksum(model) if share else None}
