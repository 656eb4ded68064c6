"""Soft labels: what a full model adds to the clicks of the train split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embtrim.compaction.compacting import compact
from embtrim.data.dataset import Batch, EncodedDataset, SplitArrays
from embtrim.errors import DataError
from embtrim.models.deepfm import DeepFM
from embtrim.testing.toys import planted_data
from embtrim.training.evaluation import logloss_of_batch, predict_logits
from embtrim.training.settings import TrainConfig
from embtrim.training.teaching import taught, teaching_settings
from tests.training.test_recoding import model_of, plan_of

CONFIG = TrainConfig()


@pytest.fixture(scope="module")
def data() -> EncodedDataset:
    return planted_data(num_rows=1000, noise_vocab=50, multi=True, dense=True)


@pytest.fixture(scope="module")
def teacher(data: EncodedDataset) -> DeepFM:
    return DeepFM(data.schema, embedding_dim=4, hidden_units=(8,), init_std=0.5, seed=1)


@pytest.mark.parametrize("share", [0.25, 0.5, 1])
def test_a_label_is_the_mean_of_click_and_probability(data: EncodedDataset, teacher: DeepFM, share: float) -> None:
    clicks = data.split("train").labels.copy()
    probabilities = 1 / (1 + np.exp(-predict_logits(teacher, data, "train").astype(np.float64)))
    assert probabilities.std() > 0.05, "the teacher tells rows apart"
    labels = taught(data, teacher, share, CONFIG).split("train").labels
    assert (labels.dtype, labels.shape) == (np.float32, clicks.shape)
    np.testing.assert_allclose(labels, (1 - share) * clicks + share * probabilities, rtol=1e-6)
    assert np.array_equal(data.split("train").labels, clicks), "the data given keep their clicks"
    train = next(iter(taught(data, teacher, share, CONFIG).batches("train", 7)))
    assert torch.equal(train.labels_B, torch.from_numpy(labels[:7]))


def test_share_0_gives_the_data_themselves(data: EncodedDataset, teacher: DeepFM) -> None:
    assert taught(data, teacher, 0.0, CONFIG) is data


def test_all_but_the_labels_of_train_stays(data: EncodedDataset, teacher: DeepFM, tmp_path) -> None:
    stored = EncodedDataset(data.schema, data.splits, tmp_path)
    soft = taught(stored, teacher, 0.5, CONFIG)
    assert soft.folder == tmp_path
    assert list(soft.splits) == list(data.splits)
    for name in ("valid", "test"):
        assert soft.split(name) is data.split(name)
    assert soft.split("train").ids is data.split("train").ids
    assert soft.split("train").dense is data.split("train").dense
    assert not teacher.training


def test_a_compact_teacher_reads_its_own_ids(data: EncodedDataset) -> None:
    full = model_of(data)
    plan = plan_of(full)
    small, recoded = compact(full, plan), data.recode(plan)
    soft = taught(recoded, small, 0.5, CONFIG)
    assert soft.id_maps.keys() == recoded.id_maps.keys()
    assert np.array_equal(soft.split("train").labels, taught(data, small, 0.5, CONFIG).split("train").labels)
    with pytest.raises(DataError, match="are re-coded, but the model reads the stored ones"):
        taught(recoded, full, 0.5, CONFIG)


def test_the_loss_of_a_soft_label_is_the_mean_of_both_losses(data: EncodedDataset, teacher: DeepFM) -> None:
    """Binary cross entropy is linear in the label: sample weights and batches need no rule of their own."""
    student = DeepFM(data.schema, embedding_dim=2, hidden_units=(4,), seed=2)

    def loss(labels: np.ndarray) -> float:
        arrays = data.split("train")
        weights = np.linspace(0, 2, len(arrays), dtype=np.float32)
        whole = SplitArrays(arrays.ids, labels, arrays.dense, weights)
        tensors = (whole.ids, whole.labels, whole.dense, whole.weights)
        return float(logloss_of_batch(student, Batch(*map(torch.from_numpy, tensors))).detach())  # type: ignore[arg-type]

    clicks = data.split("train").labels
    probabilities = taught(data, teacher, 1, CONFIG).split("train").labels
    soft = taught(data, teacher, 0.25, CONFIG).split("train").labels
    assert loss(soft) == pytest.approx(0.75 * loss(clicks) + 0.25 * loss(probabilities), rel=1e-5)


def test_settings_name_the_teacher_by_its_weights(data: EncodedDataset, teacher: DeepFM) -> None:
    other = DeepFM(data.schema, embedding_dim=4, hidden_units=(8,), seed=3)
    assert teaching_settings(teacher, 0.0) == {"teacher": 0.0, "teacher_weights": None}
    assert teaching_settings(teacher, 0.5)["teacher_weights"] == teaching_settings(teacher, 0.1)["teacher_weights"]
    assert teaching_settings(teacher, 0.5)["teacher_weights"] != teaching_settings(other, 0.5)["teacher_weights"]
