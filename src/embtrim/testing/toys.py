"""Toy tasks for the checks of a method: data with a planted signal, a base model, and foreign modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.data.dataset import EncodedDataset, SplitArrays
from embtrim.models import FNN, DeepFM
from embtrim.schema import PAD, FieldSpec, Schema
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.survey import Fields
from embtrim.tasks.task import Task
from embtrim.training.fitting import fit
from embtrim.training.settings import TrainConfig


def planted_data(
    num_rows: int = 6000,
    noise_vocab: int = 2000,
    seed: int = 0,
    multi: bool = False,
    dense: bool = False,
    strong_vocab: int = 30,
    weak_vocab: int = 20,
) -> EncodedDataset:
    """Data with a planted signal: the fields strong, weak (a third of the effect of strong) and noise (no signal).

    Args:
        num_rows: Rows of all splits together, which are 8:1:1.
        noise_vocab: Number of values of the noise field.
        seed: Seed of the data.
        multi: Add a multi-valued field with signal, "tags" (12 values).
        dense: Add a dense field with signal, "price".
        strong_vocab: Number of values of the strong field.
        weak_vocab: Number of values of the weak field.
    """
    rng = np.random.default_rng(seed)
    fields = [
        FieldSpec(name="strong", vocab_size=strong_vocab),
        FieldSpec(name="weak", vocab_size=weak_vocab),
        FieldSpec(name="noise", vocab_size=noise_vocab),
    ]
    columns = [rng.integers(0, f.vocab_size, num_rows) for f in fields]
    score = 2.0 * rng.normal(size=strong_vocab)[columns[0]] + 0.7 * rng.normal(size=weak_vocab)[columns[1]]
    if multi:
        fields.append(FieldSpec(name="tags", vocab_size=12, type="multi", max_len=3))
        tags = rng.integers(0, 12, (num_rows, 3))
        tags[:, 1:][rng.random((num_rows, 2)) < 0.4] = PAD
        columns += list(tags.T)
        score = score + rng.normal(size=12)[tags[:, 0]]
    dense_values = None
    if dense:
        fields.append(FieldSpec(name="price", type="dense", transform="none"))
        dense_values = rng.normal(size=(num_rows, 1)).astype(np.float32)
        score = score + 0.5 * dense_values[:, 0]
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-score))).astype(np.float32)
    ids = np.stack(columns, 1).astype(np.int32)
    cuts = {
        "train": slice(0, num_rows * 8 // 10),
        "valid": slice(num_rows * 8 // 10, num_rows * 9 // 10),
        "test": slice(num_rows * 9 // 10, None),
    }
    splits = {
        name: SplitArrays(ids[rows], labels[rows], None if dense_values is None else dense_values[rows])
        for name, rows in cuts.items()
    }
    return EncodedDataset(Schema(label="y", fields=tuple(fields)), splits)


def zoo_task(epochs: int = 1) -> CTRTask:
    """A trained DeepFM of width 8 on planted data."""
    data = planted_data(num_rows=2000, noise_vocab=200)
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(8,))
    config = TrainConfig(epochs=epochs, batch_size=256)
    fit(model, data, config)
    return CTRTask(model, data, config)


class ForeignModel(nn.Module):
    """A foreign model: an nn.Embedding per field, of unequal widths, one of them used twice, one of width 1."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(40, 6)
        self.item = nn.Embedding(25, 4, padding_idx=0)
        self.bias = nn.Embedding(40, 1)
        self.head = nn.Sequential(nn.Linear(6 + 4 + 4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) logits of (user, item, item) ids."""
        parts = [self.user(ids_BC[:, 0]), self.item(ids_BC[:, 1]), self.item(ids_BC[:, 2])]
        return (self.head(torch.cat(parts, 1)) + self.bias(ids_BC[:, 0])).squeeze(1)


class PooledModel(nn.Module):
    """A foreign model with a flat table of users and cities, and two bags of items padded with 0 that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Embedding(40 + 12, 6)
        self.history = nn.EmbeddingBag(25, 4, mode="mean", padding_idx=0)
        self.recent = nn.EmbeddingBag(25, 4, mode="mean", padding_idx=0)
        self.recent.weight = self.history.weight
        self.head = nn.Sequential(nn.Linear(6 + 6 + 4 + 4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) logits of (user, item, item) ids; the city is the user's number modulo 12."""
        users = torch.stack([ids_BC[:, 0], 40 + ids_BC[:, 0] % 12], 1)
        parts = [self.flat(users).flatten(1), self.history(ids_BC[:, 1:]), self.recent(input=ids_BC[:, 2:])]
        return self.head(torch.cat(parts, 1)).squeeze(1)


class OddModel(nn.Module):
    """A foreign model of rare habits: a path with brackets, rows held to a norm, a table that no batch reads."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({"item": nn.Embedding(25, 6), "user[id]": nn.Embedding(40, 4, max_norm=2.0)})
        self.unused = nn.Embedding(10, 4)
        self.head = nn.Linear(6 + 4, 1)

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) logits of (user, item, item) ids; the second item is not read."""
        parts = [self.tables["item"](ids_BC[:, 1]), self.tables["user[id]"](ids_BC[:, 0])]
        return self.head(torch.cat(parts, 1)).squeeze(1)


def foreign_batches(num: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (ids, labels) for ForeignModel; the user decides the label."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        ids = torch.stack([torch.randint(0, n, (64,), generator=generator) for n in (40, 25, 25)], 1)
        yield ids, (ids[:, 0] % 2).float()


def foreign_task(model_class: type[nn.Module] = ForeignModel, fields: Fields | None = None) -> Task:
    """A Task with everything a search may ask for, around a ForeignModel or a model that is called alike."""

    def fresh(seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return model_class()

    batches = list(foreign_batches())
    return Task(
        fresh(0),
        lambda model, batch: nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1]),
        train=batches,
        valid=batches,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        fresh=fresh,
        fields=fields,
    )


def pooled_task() -> Task:
    """A Task with everything a search may ask for, around a PooledModel."""
    return foreign_task(PooledModel, {"flat": {"user": 40, "city": 12}})


def odd_task() -> Task:
    """A Task with everything a search may ask for, around an OddModel."""
    return foreign_task(OddModel)


TASKS: Mapping[str, Callable[[], Task]] = {
    "zoo": zoo_task,
    "foreign": foreign_task,
    "pooled": pooled_task,
    "odd": odd_task,
}


def planted_task(seed: int = 1, noise_vocab: int = 400) -> CTRTask:
    """An FNN of width 8 at its best epoch; strong and weak have 400 values each."""
    data = planted_data(num_rows=8000, noise_vocab=noise_vocab, seed=seed, strong_vocab=400, weak_vocab=400)
    config = TrainConfig(
        epochs=2, batch_size=256, learning_rate=3e-3, patience=0, reduce_lr=1.0, precision="fp32", tables="dense"
    )
    model = FNN(data.schema, embedding_dim=8, hidden_units=(32,), init_std=0.01)
    task = CTRTask(model, data, config)
    task.fit(model, epochs=2, seed=0)
    return task


@functools.cache
def noisy_task() -> CTRTask:
    """A planted task whose noise field has 2,000 values: seven tenths of all parameters."""
    return planted_task(noise_vocab=2000)
