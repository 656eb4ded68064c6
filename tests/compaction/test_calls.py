"""verify(calls=) compares other entry points of a module than its loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from embtrim.compaction.verification import Verification, verify
from embtrim.errors import EmbtrimError, ModelError
from embtrim.methods import FrequencyConfig, PMEConfig, SSEDSConfig, search
from embtrim.testing.toys import zoo_task
from tests.compaction.test_whole_reads import Factors, Sequential, task_of


class Scored(Factors):
    """BPR-MF with entry points beside its loss, which does not call forward."""

    def predict(self, ids_BC: Tensor) -> Tensor:
        return (self.user(ids_BC[:, 0]) * self.item(ids_BC[:, 1])).sum(1)

    def nothing(self, ids_BC: Tensor) -> int:
        return len(ids_BC)

    def noisy(self, ids_BC: Tensor) -> dict[str, Tensor]:
        return {"scores": self.predict(ids_BC) + torch.rand(len(ids_BC))}


def top(model: Any, ids_BC: Tensor) -> Tensor:
    return model.full_sort_predict(ids_BC).topk(3).values


@pytest.mark.parametrize("config", [SSEDSConfig(), FrequencyConfig(), PMEConfig()], ids=lambda c: type(c).__name__)
def test_what_was_checked_is_in_the_result(config):
    task = task_of(Factors)
    task.model = model = Scored()
    plan = search(task, config, "40%")
    result = verify(model, plan, task, calls=["predict", "full_sort_predict", "noisy", top])
    assert result.passed
    names = {"forward", "loss", "predict", "full_sort_predict", "noisy", "call 4 (top)"}
    assert set(result.checked) == names | ({"lookup"} if result.against == "lookup" else set())
    assert max(result.checked.values()) == result.max_difference
    task.loss = lambda model, batch: model.predict(batch).mean()
    assert set(verify(model, plan, task).checked) - {"lookup"} == {"loss"}
    assert set(verify(model, plan, task, calls="predict").checked) - {"lookup"} == {"loss", "predict"}


def test_a_call_that_differs_fails_and_is_named():
    class Peeks(Scored):
        def predict(self, ids_BC: Tensor) -> Tensor:
            return super().predict(ids_BC) + sum(p.numel() for p in self.parameters())

    task = task_of(Factors)
    task.model = model = Peeks()
    result = verify(model, search(task, SSEDSConfig(), "40%"), task, calls=["predict", "full_sort_predict"])
    assert not result.passed
    assert result.checked["full_sort_predict"] < 1e-5 < result.checked["predict"]
    with pytest.raises(EmbtrimError, match=r"differ by .* in predict; please report"):
        result.require()


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (["predikt"], r"'predikt', which is not a method of this Scored; did you mean 'predict'\?"),
        (["user.weight"], "'user.weight', which is not a method"),
        ([3], r"calls= takes names of methods and functions \(model, batch\) -> tensors, given 3"),
        (["nothing"], "calls= names 'nothing', which gives no tensor to compare"),
    ],
)
def test_what_cannot_be_called_is_refused(calls, message: str):
    task = task_of(Factors)
    task.model = model = Scored()
    with pytest.raises(ModelError, match=message):
        verify(model, search(task, SSEDSConfig(), "40%"), task, calls=calls)


def test_a_call_that_fails_says_what_it_was_given():
    class Fails(Scored):
        def recommend(self, users_B: Tensor, count: int) -> Tensor:
            return self.user(users_B)[:, :count]

        def stored(self, ids_BC: Tensor) -> Tensor:
            return self.get_parameter("item.weight")[ids_BC[:, 1]]

    task = task_of(Factors)
    task.model = model = Fails()
    plan = search(task, SSEDSConfig(), "40%")
    with pytest.raises(
        ModelError, match=r"'recommend', which fails when it is given a batch \(TypeError: .*'count'\); give a"
    ):
        verify(model, plan, task, calls=["recommend"])
    assert verify(model, plan, task, calls=[lambda model, batch: model.recommend(batch[:, 0], 2)]).passed
    with pytest.raises(
        ModelError, match=r"'stored', which runs in the full model and fails in the compact one \(AttributeError"
    ):
        verify(model, plan, task, calls=["stored"])


def test_zoo_models_have_no_other_calls():
    task = zoo_task()
    plan = task.full_plan()
    assert verify(task.model, plan, task.data).checked.keys() == {"forward"}
    with pytest.raises(ModelError, match="calls= is for foreign modules"):
        verify(task.model, plan, task.data, calls=["predict"])


def test_sizes_are_verified_through_the_whole_model():
    """A table that gives other embeddings through its weight than through a lookup would fail."""
    task = task_of(Sequential)
    plan = search(task, PMEConfig(), "30%")
    result = verify(task.model, plan, task)
    assert (result.against, set(result.checked)) == ("lookup", {"forward", "loss", "lookup"})
    assert isinstance(result, Verification)
    assert dataclasses.replace(result, passed=False).checked == result.checked
