"""Sensitivities against gradients of single samples."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embtrim.data.dataset import EncodedDataset, SplitArrays
from embtrim.errors import ModelError
from embtrim.models import DCNv2, DeepFM
from embtrim.schema import Schema
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.sensitivity import sensitivities
from embtrim.tasks.task import Task
from embtrim.testing.toys import foreign_task
from embtrim.training.settings import TrainConfig

WIDTH = 3


def outer(parts: list[Tensor]) -> Tensor:
    """Mean over the samples of g g^T, each sample's gradients (N, D) summed over the rows that it reads."""
    return sum((part.double().T @ part.double() for part in parts), torch.zeros(WIDTH, WIDTH).double()) / len(parts)


@pytest.mark.parametrize("model_class", [DeepFM, DCNv2])
@pytest.mark.parametrize("train_mode", [True, False])
def test_of_a_zoo_model_it_is_the_mean_outer_product(model_class: Any, train_mode: bool):
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(40)[:12], rng.permutation(30)[:12]], 1).astype(np.int32)  # a row is read once
    labels = rng.integers(0, 2, 12).astype(np.float32)
    split = SplitArrays(ids, labels)
    data = EncodedDataset(Schema.from_sizes([40, 30]), {"train": split, "valid": split})
    model = model_class(data.schema, embedding_dim=WIDTH, hidden_units=(4,), dropout=0.5, init_std=0.5)
    task = CTRTask(model, data, TrainConfig(batch_size=5))  # batches of 5, 5 and 2
    model.train(train_mode)
    before = copy.deepcopy(model.state_dict())
    found = sensitivities(task)
    assert model.training == train_mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (model.tables.slot_gate, model.tables.row_gate) == (None, None)

    model.eval()
    by_field: list[list[Tensor]] = [[], []]
    for row in range(12):
        leaf = torch.zeros(1, 2 * WIDTH, requires_grad=True)
        with model.tables.gated(lambda concat, leaf=leaf: concat + leaf):
            logit = model(torch.from_numpy(ids[row : row + 1]), None)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.from_numpy(labels[row : row + 1]))
        (gradient,) = torch.autograd.grad(loss, leaf)
        for field in (0, 1):
            by_field[field].append(gradient[:, field * WIDTH : (field + 1) * WIDTH])
    for name, parts in zip(found, by_field, strict=True):
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], outer(parts), rtol=1e-4, atol=1e-9)


class Bagged(nn.Module):
    """An nn.Embedding, an nn.EmbeddingBag of two ids, and a flat table of two fields."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(20, WIDTH)
        self.bag = nn.EmbeddingBag(40, WIDTH, mode="mean")
        self.flat = nn.Embedding(20 + 16, WIDTH)
        self.head = nn.Sequential(nn.Linear(4 * WIDTH, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) logits of (item, bag, bag, flat, flat) ids."""
        parts = [self.item(ids_BC[:, 0]), self.bag(ids_BC[:, 1:3]), self.flat(ids_BC[:, 3:]).flatten(1)]
        return self.head(torch.cat(parts, 1)).squeeze(1)


def bagged_task() -> Task:
    generator = torch.Generator().manual_seed(1)

    def ids(start: int, size: int) -> Tensor:
        return start + torch.randperm(size, generator=generator)[:7]

    def batch() -> tuple[Tensor, Tensor]:
        bag = torch.randperm(40, generator=generator)[:14].view(7, 2)  # no row twice in a batch
        columns = torch.cat([ids(0, 20)[:, None], bag, ids(0, 20)[:, None], ids(20, 16)[:, None]], 1)
        return columns, torch.randint(2, (7,), generator=generator).float()

    batches = [batch(), batch()]
    torch.manual_seed(0)
    return Task(
        Bagged(),
        lambda model, batch: nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1]),
        batches,
        batches,
        fields={"flat": {"user": 20, "city": 16}},
    )


def test_of_foreign_modules_it_is_the_mean_outer_product_over_rows():
    task = bagged_task()
    model = task.model
    before = copy.deepcopy(model.state_dict())
    found = sensitivities(task)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert set(found) == {"item", "bag", "flat[user]", "flat[city]"}

    parts: dict[str, list[Tensor]] = {name: [] for name in found}
    model.eval()
    for ids, labels in task.batches("valid"):
        for row in range(len(ids)):
            loss = task.loss(model, (ids[row : row + 1], labels[row : row + 1]))
            item, bag, flat = torch.autograd.grad(loss, [model.item.weight, model.bag.weight, model.flat.weight])
            for name, gradient in (("item", item), ("bag", bag), ("flat[user]", flat[:20]), ("flat[city]", flat[20:])):
                parts[name].append(gradient)
    for name in found:
        assert any(part.any() for part in parts[name])
        torch.testing.assert_close(found[name], outer(parts[name]), rtol=1e-4, atol=1e-9)


def test_batches_of_unequal_size_count_by_their_rows():
    """A loss is a mean over its batch: a batch of one row must not count as much as a batch of seven."""
    task = bagged_task()
    whole = sensitivities(task)
    (ids, labels), second = task.batches("valid")
    split = [(ids[:1], labels[:1]), (ids[1:], labels[1:]), second]
    parts = sensitivities(Task(task.model, task.loss, split, split, fields={"flat": {"user": 20, "city": 16}}))
    for name, whole_DD in whole.items():
        torch.testing.assert_close(parts[name], whole_DD, rtol=1e-4, atol=1e-9)


def test_a_table_that_no_batch_reads_has_none():
    from embtrim.testing.toys import OddModel

    found = sensitivities(foreign_task(OddModel))
    assert not found["unused"].any()
    assert found["tables.item"].any()


def test_without_batches_it_says_so():
    task = foreign_task()
    with pytest.raises(ModelError, match="there are no valid batches to read; give some that can be read again"):
        sensitivities(Task(task.model, task.loss, task.batches("train"), []))
