"""Gates of both kinds of site, and what else a search reads of a task."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from embtrim.data.dataset import Batch
from embtrim.errors import EmbtrimError
from embtrim.tasks.sites import gate_sites, num_slots
from embtrim.tasks.survey import find_sites
from embtrim.tasks.task import Task
from embtrim.testing.toys import (
    TASKS,
    ForeignModel,
)
from embtrim.training.evaluation import loss_weight


@pytest.fixture(scope="module", params=TASKS)
def task(request) -> Task:
    return TASKS[request.param]()


@pytest.mark.parametrize(("batch", "rows"), [
    (torch.zeros(7, 2), 7), ((torch.zeros(5), torch.zeros(9)), 5), ({"x": [torch.zeros(3, 1)]}, 3),
    (Batch(torch.zeros(4, 1, dtype=torch.int32), torch.zeros(4)), 4),
    (Batch(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2), weights_B=torch.tensor([0.5, 2.0])), 2.5),
    (torch.tensor(1.0), 1), (("a", "bc"), 1), ((), 1),
])  # fmt: skip
def test_weight_of_a_batch_among_others(batch, rows):
    assert loss_weight(batch) == rows


def test_find_sites_says_what_it_left():
    assert [s.names for s in find_sites(ForeignModel())] == [("user",), ("item",)]
    with pytest.raises(EmbtrimError, match="first-order"):
        find_sites(nn.Sequential(nn.Embedding(5, 1)))
    with pytest.raises(EmbtrimError, match=r"no nn\.Embedding"):
        find_sites(nn.Linear(2, 2))


class TestGates:
    """Gates of both kinds of site, and what they let a search read."""

    def test_row_gate_sees_each_row_once_and_its_gradient(self, task: Task):
        model, batch = task.model, next(iter(task.batches("train", 0)))
        sites = task.sites(model)
        leaves: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {n: [] for n in range(len(sites))}

        def read(number: int):
            def gate(rows_U: torch.Tensor, found_UD: torch.Tensor) -> torch.Tensor:
                assert len(rows_U.unique()) == len(rows_U)
                stored_VD = torch.cat(sites[number].weights())
                assert torch.equal(found_UD.detach(), stored_VD[rows_U])
                leaves[number].append((rows_U, found_UD.detach().requires_grad_()))
                return leaves[number][-1][1]

            return gate

        model.eval()
        plain = task.loss(model, batch)
        with gate_sites(sites, rows=[read(n) for n in range(len(sites))]):
            gated = task.loss(model, batch)
        assert float(gated.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
        gated.backward()
        assert all(
            leaf.grad is not None and leaf.grad.abs().sum() > 0 for found in leaves.values() for _, leaf in found
        )
        model.zero_grad()

    def test_slot_and_row_gates_at_once(self, task: Task):
        model, batch = task.model, next(iter(task.batches("train", 0)))
        sites = task.sites(model)
        model.eval()

        def loss(**gates) -> float:
            with torch.no_grad(), gate_sites(sites, **gates):
                return float(task.loss(model, batch))

        zeros = [torch.zeros(num_slots(site)) for site in sites]
        without_slots = loss(slots=zeros)
        assert loss(rows=[lambda rows, found: found * 0.0 for _ in sites]) == pytest.approx(without_slots)
        assert loss(slots=zeros, rows=[lambda rows, found: found + 7.0 for _ in sites]) == pytest.approx(without_slots)
        assert loss() != pytest.approx(without_slots)
