"""compact for foreign modules: where else a model keeps an embedding or its weight, from the search to the saved module."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import compact, quantize_
from embtrim.compaction.verification import verify
from embtrim.errors import EmbtrimError
from embtrim.methods import PMEConfig, RandomConfig, SSEDSConfig, search
from embtrim.plan.plan import SizePlan
from embtrim.tables.replacements import CompactEmbedding
from embtrim.tasks.task import Task
from embtrim.testing.toys import ForeignModel, foreign_batches, pooled_task
from tests.tasks.foreign_modules import FIELDS, PAIRS, ROWS, WIDTH, Owner, plan_for


class TestWhereElseTheModelKeepsThem:
    """A module, or its weight, may sit in several places of a model."""

    def test_every_place_gets_the_replacement(self):
        model = Owner()
        plan = plan_for(model, "columns")
        small = compact(model, plan, "inherit")
        assert small.table is small.again is small.unregistered[0]
        assert small.penalized[0] is small.table.weights[0]
        assert isinstance(model.table, nn.Embedding)
        assert sum(p.numel() for p in small.parameters()) == plan.num_params

    class Penalized(nn.Module):
        """Keeps its weight in lists, as deepctr-torch does; `hide` puts it where no list is."""

        def __init__(self, hide: Callable[[nn.Parameter], object] | None = None) -> None:
            super().__init__()
            self.table = nn.Embedding(ROWS, WIDTH)
            self.other = nn.Linear(WIDTH, 1)
            self.penalties = [([self.other.weight, self.table.weight], 0.1)]
            self.hidden = hide and hide(self.table.weight)

        def forward(self, ids: Tensor) -> Tensor:
            return self.other(self.table(ids)).mean() + sum(w.square().sum() for w in self.penalties[0][0])

    @pytest.mark.parametrize(("kind", "flat"), [("columns", True), ("rows", True), ("sizes", False), ("sizes", True)])
    def test_pieces_take_the_place_of_a_weight_in_lists(self, kind: str, flat: bool):
        model = self.Penalized()
        small = compact(model, plan_for(model, kind, {"table": FIELDS} if flat else None))
        first, *pieces = small.penalties[0][0]
        stored = [p for name, p in small.table.named_parameters() if "weights" in name]
        assert first is small.other.weight
        assert len(stored) > 1
        assert all(piece is p for piece, p in zip(pieces, stored, strict=True))
        assert model.penalties[0][0][1] is model.table.weight
        small(PAIRS).backward()
        assert all(p.grad is not None for p in pieces)

    @pytest.mark.parametrize(
        "hide",
        [lambda w: ("table", w), lambda w: {"table": w}, lambda w: [("table", w)]],
        ids=["tuple", "dict", "pairs"],
    )
    def test_pieces_that_cannot_take_its_place_are_refused(self, hide):
        model = self.Penalized(hide)
        assert isinstance(compact(model, plan_for(model, "columns")).table, CompactEmbedding)
        with pytest.raises(EmbtrimError, match=r"'table' outside of its modules too, and not .* 2 pieces"):
            compact(model, plan_for(model, "sizes"))
        model.penalties, model.hidden = [], slice(model.table.weight)
        with pytest.raises(EmbtrimError, match="'table' outside of its modules"):
            compact(model, plan_for(model, "sizes"))

    def test_modules_that_share_a_weight_share_a_replacement(self):
        task = pooled_task()
        plan = search(task, RandomConfig(), "40%")
        assert [t.name for t in plan.tables] == ["flat[user]", "flat[city]", "history"]
        small = compact(task.model, plan, "inherit")
        assert small.history is small.recent
        assert verify(task.model, plan, task).passed


class TestProbe:
    """A batch is run through copies before a search, which changes nothing else."""

    def test_the_search_that_follows_is_as_without_the_probe(self, monkeypatch):
        def plan() -> SizePlan:
            torch.manual_seed(0)
            data = torch.utils.data.DataLoader(list(next(foreign_batches())[0]), batch_size=16, shuffle=True)
            model = ForeignModel()
            loss = lambda m, ids: m(ids).square().mean()  # noqa: E731
            return search(Task(model, loss, data), SSEDSConfig(data="train", batches=1), "50%")

        first = plan()
        monkeypatch.setattr("embtrim.methods.searching.check_compactable", lambda task: None)
        assert first.details["scores"] == plan().details["scores"]

    def test_an_iterator_keeps_its_batches(self):
        task = Task(ForeignModel(), lambda m, b: m(b[0]).mean(), foreign_batches(), foreign_batches(1))
        assert search(task, SSEDSConfig(), "50%").num_params


@pytest.mark.parametrize("align", ["scatter", "project"])
@pytest.mark.slow
def test_searched_compacted_retrained_and_saved(align: str, tmp_path):
    task = pooled_task()
    task.fit(task.model, epochs=3, seed=0)
    plan = search(task, SSEDSConfig(align=align), "50%")
    assert verify(task.model, plan, task).passed
    small = compact(task.model, plan, seed=1)
    before = task.valid_score(small)
    task.fit(small, epochs=30, seed=0)
    assert task.valid_score(small) > before
    torch.save(small.state_dict(), tmp_path / "small.pt")
    again = compact(task.model, plan, seed=2)
    again.load_state_dict(torch.load(tmp_path / "small.pt"))
    ids, _ = next(iter(task.batches("valid")))
    assert torch.equal(again.eval()(ids), small.eval()(ids))
    assert (
        sum(t.nbytes for t in [*small.flat.state_dict().values(), *small.history.state_dict().values()])
        == plan.num_bytes()
    )


@pytest.mark.slow
def test_a_saved_module_opens_without_search_code(tmp_path: Path):
    task = pooled_task()
    plan = search(task, PMEConfig(), "50%", bits=8)
    tables = nn.ModuleDict({name: compact(task.model, plan).get_submodule(name) for name in ("flat", "history")})
    quantize_(tables.eval())
    torch.save(tables, tmp_path / "tables.pt")
    torch.save(tables["flat"](PAIRS), tmp_path / "expected.pt")
    code = """
import sys, torch
for name in ("tasks", "compaction", "methods", "training", "models", "data", "serving", "tables.embedding_tables"):
    sys.modules[f"embtrim.{name}"] = None
tables = torch.load(sys.argv[1] + "/tables.pt", weights_only=False)
ids = torch.tensor([[0, 3, 5], [11, 0, 0], [1, 1, 9], [0, 0, 0]])
assert torch.equal(tables["flat"](ids), torch.load(sys.argv[1] + "/expected.pt"))
tables["history"](ids)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
