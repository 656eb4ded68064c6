"""Models of recommender libraries, where these are installed: searched, compacted and verified by their own entry points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.methods import FrequencyConfig, SSEDSConfig, search
from embtrim.tasks.task import Task

pytestmark = pytest.mark.filterwarnings("ignore")

USERS, ITEMS, LENGTH, DIM = 40, 60, 5, 8


class Config(dict):
    """Settings of recbole; what is not set is None."""

    def __missing__(self, key: str) -> None:
        return None


class Sizes:
    """What a model of recbole asks its dataset."""

    def num(self, field: str) -> int:
        return {"user": USERS, "item": ITEMS}[field]


def recbole(module: str, name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        found = pytest.importorskip(f"recbole.model.{module}")
        names = {"USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "NEG_PREFIX": "neg_", "LIST_SUFFIX": "_list"}
        sizes = {"hidden_size": DIM, "embedding_size": DIM, "inner_size": 16, "n_layers": 1, "n_heads": 2}
        rest = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.1, "loss_type": "CE"}
        drops = {"hidden_dropout_prob": 0.1, "attn_dropout_prob": 0.1, "device": torch.device("cpu")}
        lengths = {"ITEM_LIST_LENGTH_FIELD": "length", "MAX_ITEM_LIST_LENGTH": LENGTH}
        return getattr(found, name)(Config(**names, **sizes, **rest, **drops, **lengths), Sizes())

    return make


def autoint() -> nn.Module:
    models = pytest.importorskip("deepctr_torch.models")
    from deepctr_torch.inputs import SparseFeat  # type: ignore[import-not-found]

    columns = [SparseFeat("user", USERS, embedding_dim=DIM), SparseFeat("item", ITEMS, embedding_dim=DIM)]
    return models.AutoInt(columns, columns, att_layer_num=1, dnn_hidden_units=(8,))


def interactions() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, (32, *shape), generator=generator)

    return [
        {
            "user": draw(USERS),
            "item": draw(ITEMS),
            "neg_item": draw(ITEMS),
            "item_list": draw(ITEMS, LENGTH),
            "length": draw(LENGTH),
        }
        for _ in range(3)
    ]


def clicks_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    ids = torch.stack([batch["user"], batch["item"]], 1).float()
    return nn.functional.binary_cross_entropy(model(ids).squeeze(1), (batch["item"] % 2).float())


OWN = lambda model, batch: model.calculate_loss(batch)  # noqa: E731
CASES = {
    "SASRec": (recbole("sequential_recommender.sasrec", "SASRec"), OWN, ["predict", "full_sort_predict"]),
    "BPR": (recbole("general_recommender.bpr", "BPR"), OWN, ["predict", "full_sort_predict"]),
    "AutoInt": (autoint, clicks_of, []),
}


@pytest.mark.parametrize("config", [SSEDSConfig(), FrequencyConfig()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("make", "loss", "calls"), CASES.values(), ids=CASES)
def test_all_the_way(make, loss, calls, config):
    torch.manual_seed(0)
    model, batches = make(), interactions()
    task = Task(model, loss, batches, batches[:1], optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.01))
    task.fit(model, 1, 0)  # AutoInt then keeps its attention, with its graph
    plan = search(task, config, "30%")
    result = verify(model, plan, task, calls=calls)
    assert result.passed
    assert set(calls) <= set(result.checked)
    assert plan.coverage > 0.8
    small = compact(model, plan, "inherit")
    before = task.valid_score(small)
    task.fit(small, 3, 0)
    assert task.valid_score(small) > before
