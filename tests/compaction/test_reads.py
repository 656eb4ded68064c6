"""reads=: Linears of a compact foreign module lose the input columns that their embeddings lose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import compact, quantize_
from embtrim.compaction.verification import verify
from embtrim.errors import EmbtrimError
from embtrim.models import FNN
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block
from embtrim.tasks.task import Task
from embtrim.testing.toys import foreign_batches, foreign_task, pooled_task
from tests.tasks.foreign_modules import blocks_of


class TestReads:
    """Input columns of named Linears go with the columns of the embeddings that they read."""

    class Two(nn.Module):
        """Two Linears over user, items and a dense column; `extra` may read the item too."""

        def __init__(self, extra: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
            super().__init__()
            self.user = nn.Embedding(40, 6)
            self.item = nn.EmbeddingBag(25, 4, mode="sum")
            self.deep = nn.Linear(6 + 4 + 1 + 4, 8)
            self.wide = nn.Linear(4 + 6, 8)
            self.extra = extra

        def forward(self, ids_BC: Tensor) -> Tensor:
            user, first, second = self.user(ids_BC[:, 0]), self.item(ids_BC[:, 1:2]), self.item(ids_BC[:, 2:])
            deep = self.deep(torch.cat([user, first, ids_BC[:, :1] / 40, second], 1))
            out = (deep * self.wide(torch.cat([first, user], 1))).sum(1)
            return out if self.extra is None else out + self.extra(user, first)

    READS = {"deep": ["user", "item", 1, "item"], "wide": ["item", "user"]}  # noqa: RUF012 (nothing changes it)

    def plan(self, task: Task, align: str = "scatter") -> SizePlan:
        columns = {"user": (1, 4, 5), "item": (0, 3)}
        return task.full_plan().with_columns(columns, align)  # type: ignore[arg-type]

    @pytest.mark.parametrize("align", ["scatter", "project"])
    def test_columns_go(self, align):
        task = foreign_task(self.Two)
        plan = self.plan(task, align)
        small = compact(task.model, plan, "inherit", reads=self.READS)
        assert tuple(small.deep.weight.shape) == (8, 3 + 2 + 1 + 2)
        assert (small.deep.in_features, small.wide.in_features) == (8, 5)
        assert torch.equal(small.wide.weight, task.model.wide.weight[:, [0, 3, 5, 8, 9]])
        assert small.user(torch.tensor([1])).shape == (1, 3)
        assert (small.user.embedding_dim, small.item.embedding_dim) == (3, 2)
        assert sum(p.numel() for p in [*small.user.parameters(), *small.item.parameters()]) == 40 * 3 + 25 * 2
        assert task.model.deep.weight.shape == (8, 15)
        result = verify(task.model, plan, task, reads=self.READS)
        assert (result.passed, result.num_rows, result.against) == (True, 256, "masked")

    @pytest.mark.parametrize("kind", ["rows", "nothing", "sizes"])
    def test_rows_and_sizes_and_nothing(self, kind: str):
        task = foreign_task(self.Two)
        plan = task.full_plan()
        plan = dataclasses.replace(
            plan, tables=tuple(dataclasses.replace(t, blocks=blocks_of(kind, t.num_rows)) for t in plan.tables)
        )
        if kind == "sizes":
            plan = plan.with_columns({"user": (1, 2), "item": ()}, "project")
            sizes = dataclasses.replace(plan.tables[1], blocks=blocks_of("sizes", 25))
            plan = dataclasses.replace(plan, tables=(plan.tables[0], sizes))
        small = compact(task.model, plan, reads=self.READS)
        widths = {"rows": (2, 2), "nothing": (0, 0), "sizes": (2, 4)}[kind]
        assert small.deep.in_features == widths[0] + 2 * widths[1] + 1
        result = verify(task.model, plan, task, reads=self.READS)
        assert (result.passed, result.against) == (True, "lookup" if kind == "sizes" else "masked")

    def test_trained_quantised_saved(self, tmp_path: Path):
        task = foreign_task(self.Two)
        plan = self.plan(task).with_bits(8)
        small = compact(task.model, plan, reads=self.READS)
        before = task.valid_score(small)
        task.fit(small, epochs=10, seed=0)
        assert task.valid_score(small) > before
        quantize_(small)
        again = compact(task.model, plan, seed=2, reads=self.READS).eval()
        again.load_state_dict(small.state_dict())
        ids, _ = next(foreign_batches())
        assert torch.equal(again(ids), small.eval()(ids))

    @pytest.mark.parametrize(
        "extra",
        [
            lambda user, item: (user[:, :4] * item).sum(1),
            lambda user, item: user.mean(1) + item.mean(1),
            lambda user, item: nn.functional.linear(user, torch.ones(1, 6))[:, 0],
        ],
        ids=["product", "mean", "another layer"],
    )
    @pytest.mark.parametrize("kind", ["columns", "sizes"])
    def test_another_reader_is_found(self, extra, kind: str):
        task = foreign_task(lambda: self.Two(extra))
        plan = self.plan(task)
        if kind == "sizes":
            counted = dataclasses.replace(plan.tables[1], blocks=(Block(25, 2),))
            plan = dataclasses.replace(plan, tables=(plan.tables[0], counted))
        assert verify(task.model, plan, task).passed
        with pytest.raises(EmbtrimError, match="reads= is wrong for deep, wide"):
            verify(task.model, plan, task, reads=self.READS)

    def test_another_order_is_found(self):
        task = foreign_task(self.Two)
        reads = {"deep": ["item", "user", 1, "item"], "wide": ["item", "user"]}
        with pytest.raises(EmbtrimError, match="another order"):
            verify(task.model, self.plan(task), task, reads=reads)
        reads = {"deep": self.READS["deep"]}
        with pytest.raises(EmbtrimError, match="something else reads them too"):
            verify(task.model, self.plan(task), task, reads=reads)

    @pytest.mark.parametrize(
        ("reads", "message"),
        [
            ({"head": ["user"]}, "names 'head', which is not a module of this model; name an nn.Linear"),
            ({"user": ["user"]}, "names 'user', which is a CompactEmbedding; name an nn.Linear"),
            ({"wide": ["user", "itm"]}, "'wide' reads 'itm', which is not a module of this model"),
            ({"wide": ["user", "deep"]}, "'wide' reads 'deep', which is a Linear; name embeddings"),
            ({"wide": ["user"]}, "the parts that reads= names for 'wide', user, have 6 columns, but it takes 10"),
        ],
    )
    def test_what_does_not_add_up(self, reads, message: str):
        task = foreign_task(self.Two)
        with pytest.raises(EmbtrimError, match=message):
            compact(task.model, self.plan(task), reads=reads)

    def test_flat_tables_and_zoo_models_are_refused(self, data):
        task = pooled_task()
        with pytest.raises(EmbtrimError, match=r"'head\.0' reads 'flat', which is a CompactFlatEmbedding"):
            compact(task.model, task.full_plan(), reads={"head.0": ["flat", "flat", "history", "recent"]})
        zoo = FNN(data.schema, embedding_dim=4, hidden_units=(8,))
        with pytest.raises(EmbtrimError, match="reads= is for foreign modules"):
            compact(zoo, zoo.tables.plan, reads={})
