"""The survey: every embedding is found, or left alone with a reason."""

from __future__ import annotations

import logging

import pytest
from torch import Tensor, nn

from embtrim.compaction.compacting import compact
from embtrim.errors import EmbtrimError, PlanError
from embtrim.methods import RandomConfig, search
from embtrim.tasks.survey import find_sites, survey
from embtrim.testing.toys import ForeignModel, PooledModel, foreign_task, pooled_task
from tests.tasks.foreign_modules import FIELDS, ROWS, WIDTH, plan_for


class TestSurvey:
    """Every module with embeddings is named, with a reason if it is left alone."""

    class Own(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Plain(nn.Embedding):
        pass

    def test_found_and_left(self):
        tied = nn.Linear(4, 9, bias=False)
        table = nn.Embedding(9, 4)
        tied.weight = table.weight
        one, other = nn.EmbeddingBag(6, 4, mode="sum"), nn.EmbeddingBag(6, 4, mode="mean")
        other.weight = one.weight
        computed = nn.utils.parametrizations.weight_norm(nn.Embedding(9, 4))
        model = nn.ModuleDict(
            {
                "plain": self.Plain(9, 4),
                "bag": nn.EmbeddingBag(9, 4),
                "own": self.Own(9, 4),
                "narrow": nn.EmbeddingBag(9, 1),
                "max": nn.EmbeddingBag(9, 4, mode="max"),
                "by_freq": nn.Embedding(9, 4, scale_grad_by_freq=True),
                "table": table,
                "tied": tied,
                "one": one,
                "other": other,
                "computed": computed,
                "unwanted": nn.Embedding(9, 4),
            }
        )
        found = {f.name: f for f in survey(model, exclude="unwant*")}
        assert [name for name, f in found.items() if f.found] == ["plain", "bag", "table"]
        assert found["table"].note == "tied, a Linear, multiplies by all of it: a compact table by what it stores"
        assert str(found["bag"]) == "bag: EmbeddingBag 9 x 4, found"
        reasons = {
            "own": "Own has a forward of its own",
            "narrow": "width 1, a first-order term",
            "max": "mode 'max'",
            "by_freq": "scale_grad_by_freq",
            "one": "shares its weight with other, whose settings differ",
            "other": "shares its weight with one, whose settings differ",
            "computed": "its weight is computed",
            "unwanted": "excluded",
        }
        assert set(reasons) == {name for name, f in found.items() if not f.found}
        for name, reason in reasons.items():
            assert reason in str(found[name])
        with pytest.raises(EmbtrimError, match=r"no embedding to shrink .* max: EmbeddingBag 9 x 4, left \(mode 'max'"):
            find_sites(nn.ModuleDict({"max": model["max"]}))

    def test_compact_tables_are_named_once(self):
        task = pooled_task()
        small = compact(task.model, search(task, RandomConfig(), "50%"))
        assert [(f.name, f.num_rows, f.width, f.found) for f in survey(small)] == [
            ("flat", 52, 6, False),
            ("history", 25, 4, False),
        ]
        assert sum(f.num_bytes for f in survey(small)) == sum(
            p.nbytes for module in (small.flat, small.history) for p in module.parameters()
        )

    def test_bytes_are_counted_once(self):
        sizes = {f.name: f.num_bytes for f in survey(PooledModel())}
        assert sizes == {"flat": 4 * 52 * 6, "history": 4 * 25 * 4, "recent": 0}
        assert {f.name: f.num_bytes for f in survey(ForeignModel()) if not f.found} == {"bias": 4 * 40}

    def test_a_search_says_what_is_left_beside_its_plan(self, caplog):
        with caplog.at_level(logging.INFO, logger="embtrim"):
            search(foreign_task(), RandomConfig(), "50%")
        assert "left alone, beside what plans count: 160 bytes" in caplog.text

    def test_a_search_logs_it_once(self, caplog):
        with caplog.at_level(logging.INFO, logger="embtrim"):
            search(pooled_task(), RandomConfig(), "50%")
        (message,) = [r.getMessage() for r in caplog.records if "embeddings of" in r.getMessage()]
        assert "flat: Embedding 52 x 6, found (fields user, city)" in message
        assert "history: EmbeddingBag 25 x 4, found (one table with recent)" in message

    def test_fields_must_add_up_and_exist(self):
        model = PooledModel()
        with pytest.raises(EmbtrimError, match=r"'flat' have 40 \(user\) \+ 10 \(city\) = 50 rows, the table has 52"):
            find_sites(model, fields={"flat": {"user": 40, "city": 10}})
        with pytest.raises(EmbtrimError, match=r"at least one each"):
            find_sites(model, fields={"flat": {"user": 52, "city": 0}})
        with pytest.raises(EmbtrimError, match=r"have none = 0 rows, the table has 52"):
            find_sites(model, fields={"flat": {}})
        with pytest.raises(EmbtrimError, match=r"'flatt', which is not an embedding that was found: flat: Embedding"):
            find_sites(model, fields={"flatt": {"user": 52}})

    def test_a_plan_for_other_fields_is_refused(self):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        plan = plan_for(model, "columns", {"0": FIELDS})
        with pytest.raises(PlanError, match="search again"):
            compact(nn.Sequential(nn.Embedding(ROWS, WIDTH + 1)), plan)
        with pytest.raises(EmbtrimError, match="the table has 13"):
            compact(nn.Sequential(nn.Embedding(ROWS + 1, WIDTH)), plan)


@pytest.mark.parametrize("where", ["register_forward_hook", "register_forward_pre_hook"])
def test_an_embedding_with_hooks_is_left_alone(where: str) -> None:
    """A replacement would compute something else: hooks are bound to the module."""
    model = ForeignModel()
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    hook = getattr(module, where)(lambda *_: None)
    finding = next(f for f in survey(model) if f.name == name)
    assert (finding.found, finding.note) == (False, "it has forward hooks, which a replacement would not call")
    hook.remove()
    assert next(f for f in survey(model) if f.name == name).found
