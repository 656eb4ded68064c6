"""verify for foreign modules: equal to the masked module, or to a lookup value by value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import compact
from embtrim.compaction.foreign import compact_tables
from embtrim.compaction.verification import MODULE_TOLERANCE, verify
from embtrim.errors import EmbtrimError
from embtrim.tables.replacements import CompactEmbedding, CompactEmbeddingBag
from embtrim.tasks.task import Task
from embtrim.testing.toys import pooled_task
from tests.tasks.foreign_modules import PAIRS, ROWS, WIDTH, plan_for


class TestVerify:
    """The masked module against the compact one, on batches, of any outputs."""

    class Outputs(nn.Module):
        """Puts out a dictionary with a list: pooled embeddings, and a mask of minus infinity."""

        def __init__(self) -> None:
            super().__init__()
            self.items = nn.EmbeddingBag(ROWS, WIDTH, mode="sum")

        def forward(self, ids: Tensor) -> dict[str, list[Tensor]]:
            pooled = self.items(ids)
            return {"out": [pooled, torch.full_like(pooled, -torch.inf)]}

    def task(self) -> Task:
        model = self.Outputs()
        return Task(model, lambda m, ids: m(ids)["out"][0].square().mean() + torch.rand(()), [PAIRS], [PAIRS, PAIRS])

    def test_holds(self):
        task = self.task()
        state = torch.get_rng_state()
        result = verify(task.model, plan_for(task.model, "rows"), task)
        assert (result.passed, result.num_rows, result.against) == (True, 8, "masked")
        assert result.max_difference <= MODULE_TOLERANCE
        assert verify(task.model, plan_for(task.model, "rows"), task, split="train").num_rows == 4
        assert verify(task.model, plan_for(task.model, "rows"), task, max_rows=3).num_rows == 4
        assert torch.equal(torch.get_rng_state(), state)

    def test_nothing_compared_is_no_pass(self):
        task = self.task()
        plan = plan_for(task.model, "rows")
        for batches in (iter(()), [], [PAIRS[:0]]):
            nothing = Task(task.model, lambda m, ids: m(ids)["out"][0].square().mean(), batches)
            with pytest.raises(
                EmbtrimError, match="verify compared no row: the Task's train batches are empty or spent"
            ):
                verify(task.model, plan, nothing, split="train")

    @pytest.mark.parametrize("wrong", [1e-3, float("nan")])
    def test_sees_a_wrong_compact_model(self, wrong: float, monkeypatch):
        task = self.task()
        right = CompactEmbeddingBag.forward
        monkeypatch.setattr(CompactEmbeddingBag, "forward", lambda self, *args: right(self, *args) + wrong)
        result = verify(task.model, plan_for(task.model, "columns"), task)
        assert not result.passed
        with pytest.raises(EmbtrimError, match="report this as a bug"):
            result.require()

    def test_sizes_are_looked_up_one_by_one(self, monkeypatch):
        task = pooled_task()
        plan = plan_for(task.model, "sizes", {"flat": {"user": 40, "city": 12}})
        small = compact(task.model, plan)
        assert [t.num_embeddings for t in compact_tables(small, plan)] == [40, 12, 25]
        result = verify(task.model, plan, task)
        assert (result.passed, result.against, result.num_rows) == (True, "lookup", 77)
        right = CompactEmbedding.rows_of
        monkeypatch.setattr(CompactEmbedding, "rows_of", lambda self, ids: (right(self, ids) - 1).clamp(min=0))
        assert not verify(task.model, plan, task).passed
