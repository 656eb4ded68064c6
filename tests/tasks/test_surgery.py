"""Surgery on modules of other people: what is found, gates, and replacements against the masked module."""

from __future__ import annotations

import copy
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from embtrim.compaction.compacting import compact, quantize
from embtrim.compaction.foreign import compact_tables
from embtrim.compaction.verification import MODULE_TOLERANCE, verify
from embtrim.errors import EmbtrimError, PlanError
from embtrim.methods import (
    FrequencyConfig,
    GuidedConfig,
    MagnitudeConfig,
    OptEmbedConfig,
    PMEConfig,
    RandomConfig,
    SSEDSConfig,
    UniformConfig,
    search,
)
from embtrim.methods.pme import fill_sizes, sized_plan
from embtrim.models import FNN
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan, smallest_dtype
from embtrim.tables.packing import codes_of, fit_codes
from embtrim.tables.replacements import CompactEmbedding, CompactEmbeddingBag, CompactFlatEmbedding, pool_entries
from embtrim.tasks.sites import ModuleSite, gate_sites
from embtrim.tasks.survey import fields_of, find_sites, site_plan, survey
from embtrim.tasks.task import Task
from embtrim.testing.checks import CHECKS, check_budget
from embtrim.testing.toys import ForeignModel, PooledModel, foreign_batches, foreign_task, odd_task, pooled_task

ROWS, WIDTH = 12, 4
FIELDS = {"user": 7, "city": 5}


def blocks_of(kind: str, num_rows: int) -> tuple[Block, ...]:
    """Some columns; some rows, or the first ones, or those but a padding row 0; several sizes a row; or nothing."""
    columns = (1, 2)
    if kind == "columns":
        return (Block(num_rows, columns),)
    if kind == "project":
        return (Block(num_rows, columns, "project"),)
    if kind == "nothing":
        return ()
    rows = np.arange(num_rows, dtype=np.int32)
    if kind == "sizes":
        parts = [(4, rows[1:3]), (2, rows[3:5])]
        return tuple(Block(len(part), size, "project", part) for size, part in parts)
    part = {"rows": rows[::2], "first": rows[:3], "without padding": rows[1::2]}[kind]
    return (Block(len(part), columns, "scatter", part),)


def ordered_sizes(table: TablePlan) -> TablePlan:
    """The table with all rows in their order, the first ones wider: ids need no map."""
    rows = np.arange(table.num_rows, dtype=np.int32)
    parts = [(4, rows[:2]), (2, rows[2:])]
    return dataclasses.replace(table, blocks=tuple(Block(len(part), size, "project", part) for size, part in parts))


def plan_for(model: nn.Module, kind: str, fields: dict[str, dict[str, int]] | None = None) -> SizePlan:
    full = site_plan(find_sites(model, fields=fields))
    tables = tuple(dataclasses.replace(t, blocks=blocks_of(kind, t.num_rows)) for t in full.tables)
    return dataclasses.replace(full, tables=tables)


def masked_copy(model: nn.Module, plan: SizePlan) -> nn.Module:
    masked = copy.deepcopy(model)
    with torch.no_grad():
        mask = np.concatenate([t.kept_mask() for t in plan.tables])
        masked[0].weight.mul_(torch.from_numpy(mask))
    return masked


KINDS = ("columns", "project", "rows", "first", "without padding", "nothing")
PAIRS = torch.tensor([[0, 3, 5], [11, 0, 0], [1, 1, 9], [0, 0, 0]])
FLAT_IDS, OFFSETS = PAIRS.flatten(), torch.tensor([0, 2, 2, 7])
BAG_CALLS = {
    "pairs": ((PAIRS,), {}),
    "offsets": ((FLAT_IDS, OFFSETS), {}),
    "keywords": ((), {"input": FLAT_IDS, "offsets": OFFSETS}),
    "int32": ((FLAT_IDS.int(), OFFSETS.int()), {}),
    "empty": ((FLAT_IDS[:0], OFFSETS[:1]), {}),
}


def bag(**settings) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(ROWS, WIDTH, **settings))


def same(small: nn.Module, masked: nn.Module, calls=BAG_CALLS) -> None:
    for args, kwargs in calls.values():
        found, expected = small[0](*args, **kwargs), masked[0](*args, **kwargs)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-6)


class TestReplacements:
    """With inherited weights they equal the masked module, however it is called."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("padding_idx", [None, 0, 3])
    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("flat", [False, True])
    def test_bags(self, kind: str, padding_idx: int | None, mode: str, flat: bool):
        model = bag(mode=mode, padding_idx=padding_idx)
        with torch.no_grad():
            model[0].weight.normal_()  # padding rows too: a bag does not count them, whatever they hold
        plan = plan_for(model, kind, {"0": FIELDS} if flat else None)
        small = compact(model, plan, "inherit")
        assert isinstance(small[0], CompactEmbeddingBag)
        assert isinstance(small[0].entries, CompactFlatEmbedding if flat else CompactEmbedding)
        same(small, masked_copy(model, plan))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("padding_idx", [None, 0])
    def test_weighted_bags_and_their_gradients(self, kind: str, padding_idx: int | None):
        model = bag(mode="sum", include_last_offset=True, padding_idx=padding_idx)
        plan = plan_for(model, kind)
        small, masked = compact(model, plan, "inherit"), masked_copy(model, plan)
        grads = []
        for module in (small[0], masked[0]):
            weights = torch.linspace(-1, 1, len(FLAT_IDS)).requires_grad_()
            out = module(FLAT_IDS, torch.cat([OFFSETS, OFFSETS.new_tensor([12])]), weights)
            out.square().sum().backward() if out.requires_grad else None
            grads.append((out.detach(), weights.grad))
        assert torch.allclose(grads[0][0], grads[1][0], atol=1e-6)
        if kind != "nothing":
            assert torch.allclose(grads[0][1], grads[1][1], atol=1e-5)

    def test_weights_of_a_mean_are_refused_as_before(self):
        model = bag(mode="mean")
        for kind in ("columns", "nothing"):
            small = compact(model, plan_for(model, kind), "inherit")
            with pytest.raises(NotImplementedError, match="per_sample_weights"):
                small[0](PAIRS, None, torch.ones(4, 3))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("padding_idx", [None, 0, 8])
    def test_embeddings_of_any_shape(self, kind: str, flat: bool, padding_idx: int | None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx))
        plan = plan_for(model, kind, {"0": FIELDS} if flat else None)
        calls = {
            n: ((ids,), {}) for n, ids in enumerate([PAIRS, FLAT_IDS.int(), PAIRS[None], torch.tensor(4), PAIRS[:0]])
        }
        same(compact(model, plan, "inherit"), masked_copy(model, plan), calls)

    @pytest.mark.parametrize("kind", KINDS)
    def test_max_norm_is_kept(self, kind: str):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH, max_norm=3.0, norm_type=1.0))
        plan = plan_for(model, kind)
        same(compact(model, plan, "inherit"), masked_copy(model, plan), {"pairs": ((PAIRS,), {})})
        small = compact(bag(mode="sum", max_norm=0.5), plan_for(bag(max_norm=0.5), "project"), seed=1)
        single = small[0](torch.arange(ROWS)[:, None])
        assert 0.4 < float(single.detach().norm(dim=1).max()) <= 0.5 + 1e-6

    @pytest.mark.parametrize("flat", [False, True])
    def test_padding_stays_zero_in_training(self, flat: bool):
        for kind in (*KINDS, "sizes"):
            model = nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=0))
            small = compact(model, plan_for(model, kind, {"0": FIELDS} if flat else None), seed=1)
            optimizer = torch.optim.SGD(small.parameters(), lr=1.0)
            for _ in range(2):
                out = small(PAIRS)
                if out.requires_grad:
                    (out - 1).square().sum().backward()
                    optimizer.step()
            assert not small(torch.tensor([0])).any(), kind

    def test_only_the_kept_rows_and_columns_are_stored(self):
        model = bag(mode="sum")
        small = compact(model, plan_for(model, "rows"), "inherit")
        assert [tuple(w.shape) for w in small.parameters()] == [(7, 2)]
        other = compact(model, plan_for(model, "rows"), seed=3)
        other.load_state_dict(small.state_dict())
        assert torch.equal(other[0](PAIRS), small[0](PAIRS))

    def test_sparse_gradients_stay_sparse(self):
        for model in (nn.Sequential(nn.Embedding(ROWS, WIDTH, sparse=True)), bag(mode="sum", sparse=True)):
            small = compact(model, plan_for(model, "rows"), "inherit")
            small[0](PAIRS).sum().backward()
            assert all(p.grad.is_sparse for p in small.parameters())

    def test_a_frozen_table_stays_frozen_and_a_dtype_is_kept(self):
        model = bag(mode="sum").double()
        model[0].weight.requires_grad_(False)
        small = compact(model, plan_for(model, "rows"), "inherit").eval()
        assert all(p.dtype == torch.float64 and not p.requires_grad for p in small.parameters())

    def test_an_id_of_no_row_is_refused(self):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        for kind in ("columns", "rows"):
            small = compact(model, plan_for(model, kind), "inherit")
            for wrong in (-1, ROWS):
                with pytest.raises(IndexError):
                    small(torch.tensor([wrong]))

    @pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Embedding(ROWS, WIDTH)), bag])
    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("kind", ["first", "sizes", "ordered sizes", "nothing"])
    def test_an_id_of_no_row_is_refused_where_no_lookup_would(self, kind: str, flat: bool, make):
        model = make()
        plan = plan_for(model, "nothing" if kind == "ordered sizes" else kind, {"0": FIELDS} if flat else None)
        if kind == "ordered sizes":
            plan = dataclasses.replace(plan, tables=tuple(map(ordered_sizes, plan.tables)))
        small = compact(model, plan)
        small(PAIRS)
        for wrong, local in ((-1, -1), (ROWS, 5 if flat else ROWS)):
            message = None if kind == "sizes" else rf"id {local} is of no row of '0.*'; allowed: 0 to \d+$"
            for ids in ([[0, wrong, 3]], [[wrong]]):
                with pytest.raises(IndexError, match=message):
                    small(torch.tensor(ids))


class TestWhereElseTheModelKeepsThem:
    """A module, or its weight, may sit in several places of a model."""

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(ROWS, WIDTH)
            self.again = self.table
            self.unregistered = [self.table]
            self.penalized = [self.table.weight]

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) + self.again(ids) + self.unregistered[0](ids)

    def test_every_place_gets_the_replacement(self):
        model = self.Owner()
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


class TestSurvey:
    """Every module with embeddings is named, with the reason where it was left alone."""

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
        found = {f.name: f for f in survey(model, keep=lambda name: name != "unwanted")}
        assert [name for name, f in found.items() if f.found] == ["plain", "bag"]
        assert str(found["bag"]) == "bag: EmbeddingBag 9 x 4, found"
        reasons = {
            "own": "Own has a forward of its own",
            "narrow": "width 1, a first-order term",
            "max": "mode 'max'",
            "by_freq": "scale_grad_by_freq",
            "table": "tied, a Linear, reads its weight too",
            "one": "shares its weight with other, whose settings differ",
            "other": "shares its weight with one, whose settings differ",
            "computed": "its weight is computed",
            "unwanted": "filtered out",
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


class TestWeightsReadOutside:
    """A compact table has no weight to read: a search says so before it begins."""

    class Reader(ForeignModel):
        def __init__(self, read: Callable[[nn.Embedding, Tensor], Tensor]) -> None:
            super().__init__()
            self.read = read

        def forward(self, ids_BC: Tensor) -> Tensor:
            return super().forward(ids_BC) + self.read(self.item, ids_BC[:, 1]).sum(1)

    @pytest.mark.parametrize(
        "read",
        [
            lambda item, ids: item.weight[ids],
            lambda item, ids: nn.functional.embedding(ids, item.weight),
            lambda item, ids: item(ids) @ item.weight.T,
        ],
        ids=["indexed", "functional", "tied"],
    )
    def test_are_refused_before_the_search(self, read, monkeypatch):
        task = foreign_task(lambda: self.Reader(read))
        monkeypatch.setattr(Task, "row_counts", lambda self: pytest.fail("the search began"))
        with pytest.raises(EmbtrimError, match=r"reads the weight of 'item' outside of that module.* keep="):
            search(task, FrequencyConfig(), "50%")
        monkeypatch.undo()
        task._keep = lambda name: name != "item"
        assert verify(task.model, search(task, FrequencyConfig(), "50%"), task).passed

    def test_a_loss_that_reads_one_is_refused_too(self):
        task = foreign_task()
        plain = task.loss
        task.loss = lambda model, batch: plain(model, batch) + model.user.weight.norm()
        with pytest.raises(EmbtrimError, match="'user'"):
            search(task, RandomConfig(), "50%")

    @pytest.mark.parametrize("make", [foreign_task, pooled_task])
    def test_there_is_none(self, make):
        task = make()
        small = compact(task.model, search(task, RandomConfig(), "50%"))
        for name in ("user", "item", "flat", "history"):
            assert not hasattr(getattr(small, name, None), "weight")

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


class TestTask:
    """What a Task makes of what it is given."""

    def test_a_search_where_gradients_are_off_turns_them_on(self):
        plan = search(foreign_task(), SSEDSConfig(), "50%")
        with torch.no_grad():
            assert search(foreign_task(), SSEDSConfig(), "50%").details == plan.details
            assert not torch.is_grad_enabled()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_tables_that_are_not_fp32_are_refused_before_the_search(self, dtype: torch.dtype):
        task = foreign_task()
        task.model.item.to(dtype)
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(EmbtrimError, match=rf"'item' is {name}, but plans count 4 bytes a value; .*float\(\)"):
            search(task, RandomConfig(), "50%")

    @pytest.mark.parametrize("name", ["frequency", "random", "sseds"])
    def test_a_search_undoes_what_max_norm_does(self, name: str):
        config = {"frequency": FrequencyConfig(), "random": RandomConfig(), "sseds": SSEDSConfig()}[name]
        task = odd_task()
        CHECKS["only declared parameters move"](task, config)
        assert float(task.model.tables["user[id]"].weight.detach().norm(dim=1).max()) > 2.0

    def test_a_search_that_fails_undoes_it_too(self):
        task = odd_task()
        before = copy.deepcopy(task.model.state_dict())
        plain, calls = task.loss, []

        def loss(model: nn.Module, batch: object) -> Tensor:
            calls.append(plain(model, batch))
            return calls[-1] if len(calls) < 3 else pytest.fail("the third batch")

        task.loss = loss
        with pytest.raises(pytest.fail.Exception):
            search(task, FrequencyConfig(), "50%")
        assert all(torch.equal(v, before[name]) for name, v in task.model.state_dict().items())

    def test_batches_that_are_spent_are_no_counts(self):
        batches = foreign_batches()
        task = Task(ForeignModel(), lambda m, b: m(b[0]).mean(), batches)
        assert task.row_counts()["user"].sum() == 4 * 64
        with pytest.raises(EmbtrimError, match="no train batches to count rows on"):
            search(task, FrequencyConfig(), "50%")

    def test_fresh_with_and_without_a_seed(self):
        def seeded(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return ForeignModel()

        def made(fresh: Callable[..., nn.Module], seed: int) -> Tensor:
            task = Task(ForeignModel(), lambda m, b: m(b[0]).mean(), [], fresh=fresh)
            return task.fresh(seed).user.weight

        for fresh in (
            ForeignModel,
            lambda: ForeignModel(),
            lambda hidden=8: nn.ModuleDict({"user": ForeignModel().user}),
        ):
            assert torch.equal(made(fresh, 3), made(ForeignModel, 3))
            assert not torch.equal(made(fresh, 3), made(fresh, 4))
        expected = made(ForeignModel, 3)
        for fresh in (seeded, lambda s: seeded(s), lambda seed=0: seeded(seed), lambda *args: seeded(*args)):
            assert torch.equal(made(fresh, 3), expected)

    def test_paths_and_fields_may_hold_brackets(self):
        model = nn.ModuleDict({"a[b]": nn.Embedding(ROWS, WIDTH), "c[d]": nn.Embedding(ROWS, WIDTH)})
        fields = {"c[d]": {"x[1]": 7, "y]": 5}}
        plan = site_plan(find_sites(model, fields=fields))
        assert fields_of(model, plan) == {"a[b]": {}, "c[d]": fields["c[d]"]}
        small = compact(model, plan, "inherit")
        assert [t.num_embeddings for t in compact_tables(small, plan)] == [12, 7, 5]
        assert torch.equal(small["c[d]"](PAIRS), model["c[d]"](PAIRS))


class TestGates:
    """Gates equal explicit masks of the weights."""

    @pytest.mark.parametrize("call", BAG_CALLS)
    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("padding_idx", [None, 3])
    def test_row_gates_read_the_gradient_of_the_rows(self, call: str, mode: str, padding_idx: int | None):
        args, kwargs = BAG_CALLS[call]
        model = bag(mode=mode, padding_idx=padding_idx)
        (site,) = find_sites(model)
        leaves = []

        def read(rows_U: Tensor, found_UD: Tensor) -> Tensor:
            leaves.append((rows_U, found_UD.detach().requires_grad_()))
            return leaves[-1][1]

        plain = model[0](*args, **kwargs)
        with site.gated(rows=read):
            gated = model[0](*args, **kwargs)
        assert torch.allclose(gated, plain, atol=1e-6)
        (rows_U, leaf), upstream = leaves[0], torch.randn(plain.shape)
        (plain * upstream).sum().backward()
        (grad_UD,) = torch.autograd.grad((gated * upstream).sum(), leaf)
        assert torch.allclose(grad_UD, model[0].weight.grad[rows_U.long()], atol=1e-5)

    @pytest.mark.parametrize("call", BAG_CALLS)
    def test_slot_gates_of_a_flat_table_act_on_each_field(self, call: str):
        args, kwargs = BAG_CALLS[call]
        model = bag(mode="mean")
        (site,) = find_sites(model, fields={"0": FIELDS})
        gate = torch.rand(2, WIDTH)
        masked = copy.deepcopy(model)
        with torch.no_grad():
            masked[0].weight[:7] *= gate[0]
            masked[0].weight[7:] *= gate[1]
        expected = masked[0](*args, **kwargs)
        for slots in (gate.flatten(), gate.flatten().expand(len(expected), -1), lambda ones: ones * gate.flatten()):
            with site.gated(slots):
                assert torch.allclose(model[0](*args, **kwargs), expected, atol=1e-6)

    def test_slot_gates_may_differ_by_sample(self):
        torch.manual_seed(0)
        gate_BS = torch.rand(3, 2 * WIDTH)
        ids, offsets = torch.tensor([0, 8, 3, 9]), torch.tensor([0, 1, 3])
        sample, field = torch.tensor([0, 1, 1, 2]), (ids >= 7).long()
        pooled, single = bag(mode="sum"), nn.Sequential(nn.Embedding(ROWS, WIDTH))
        expected = pooled[0].weight[ids] * gate_BS.view(3, 2, WIDTH)[sample, field]
        with find_sites(pooled, fields={"0": FIELDS})[0].gated(gate_BS):
            found = pooled[0](ids, offsets)
        assert torch.allclose(found, torch.stack([expected[0], expected[1] + expected[2], expected[3]]))
        sequences = PAIRS[:3]
        (site,) = find_sites(single)
        with site.gated(gate_BS[:, :WIDTH]):
            assert torch.allclose(single(sequences), single[0].weight[sequences] * gate_BS[:, None, :WIDTH])

    @pytest.mark.parametrize(
        "make", [lambda: nn.Sequential(nn.Embedding(ROWS, WIDTH, sparse=True)), lambda: bag(sparse=True)]
    )
    def test_sparse_gradients_stay_sparse_under_a_gate(self, make):
        model = make()
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        before = model[0].weight.detach().clone()
        for fields, gates in (
            (None, {"rows": lambda _, found: found}),
            ({"0": FIELDS}, {"slots": torch.ones(2 * WIDTH)}),
        ):
            (site,) = find_sites(model, fields=fields)
            optimizer.zero_grad()
            with site.gated(**gates):
                model(PAIRS).sum().backward()
            optimizer.step()
        changed = (model[0].weight.detach() != before).any(1)
        assert changed.nonzero().flatten().tolist() == PAIRS.unique().tolist()

    def test_flat_rows_are_counted_by_field(self):
        task = pooled_task()
        counts = task.row_counts()
        assert {name: len(v) for name, v in counts.items()} == {"flat[user]": 40, "flat[city]": 12, "history": 25}
        ids = torch.cat([ids for ids, _ in task.batches("train")])
        assert counts["flat[user]"].tolist() == torch.bincount(ids[:, 0], minlength=40).tolist()
        assert counts["flat[city]"].tolist() == torch.bincount(ids[:, 0] % 12, minlength=12).tolist()
        both = torch.cat([ids[:, 1:].flatten(), ids[:, 2]])
        assert counts["history"].tolist() == torch.bincount(both, minlength=25).tolist()

    def test_reserved_rows_belong_to_their_field(self):
        site = ModuleSite("0", nn.Embedding(ROWS, WIDTH, padding_idx=8), FIELDS)
        assert site.reserved_rows == (None, 1)
        site.drop_rows([torch.ones(7, dtype=torch.bool), torch.tensor([True, True, False, True, True])])
        assert [bool(row.any()) for row in site.weights()[1]] == [True, False, False, True, True]

    def test_nothing_is_left_after_gating(self):
        model = PooledModel()
        sites = find_sites(model)
        with gate_sites(sites, rows=[lambda _, found: found] * len(sites)):
            assert len(model.recent._forward_hooks) == 1
        assert not any(m._forward_hooks for m in model.modules())


def planned_table(num_rows: int, rows: np.ndarray, width: int = 2) -> SizePlan:
    full = site_plan([ModuleSite("0", nn.Embedding(num_rows, width))])
    block = Block(len(rows), tuple(range(width)), "scatter", rows.astype(np.int32))
    return dataclasses.replace(full, tables=(dataclasses.replace(full.tables[0], blocks=(block,)),))


class TestMaps:
    """A map is as narrow as the compact ids allow, is counted, and is none where the kept rows come first."""

    @pytest.mark.parametrize(
        ("kept", "dtype"),
        [(255, torch.uint8), (256, torch.int16), (32_767, torch.int16), (32_768, torch.int32)],
    )
    def test_bytes(self, kept: int, dtype: torch.dtype):
        plan = planned_table(40_001, np.arange(1, kept + 1))  # and DROPPED
        small = compact(nn.Sequential(nn.Embedding(40_001, 2)), plan, "inherit")
        assert small[0].id_map.dtype == dtype
        stored = small[0].weights[0].nbytes + small[0].id_map.nbytes
        assert stored == plan.num_bytes()
        assert 4 * plan.num_params - 3 <= stored <= 4 * plan.num_params

    def test_first_rows_need_none(self):
        plan = planned_table(1000, np.arange(100))
        model = nn.Sequential(nn.Embedding(1000, 2))
        small = compact(model, plan, "inherit")
        assert small[0].id_map is None
        assert plan.num_params == 101 * 2 == sum(p.numel() for p in small.parameters())
        with torch.no_grad():
            small[0].weights[0][100] = 7.0  # DROPPED, once trained
        found = small(torch.tensor([99, 100, 999]))
        assert torch.equal(found[0], model[0].weight[99])
        assert torch.equal(found[1:], torch.full((2, 2), 7.0))

    @pytest.mark.parametrize(
        ("num_rows", "parts", "has_map"),
        [
            (6, ((4, 0, 3), (2, 3, 6)), False),
            (6, ((4, 3, 6), (2, 0, 3)), True),
            (9, ((4, 0, 3),), False),
            (9, ((4, 0, 3), (2, 3, 6)), True),  # DROPPED comes between them, with the widest
        ],
    )
    def test_sizes_need_none_where_they_follow_the_order(self, num_rows: int, parts, has_map: bool):
        blocks = tuple(
            Block(stop - start, size, "project", np.arange(start, stop, dtype=np.int32)) for size, start, stop in parts
        )
        table = TablePlan("0", num_rows, 4, blocks)
        assert (table.map_dtype is not None) == has_map
        module = CompactEmbedding(table)
        rows = module.rows_of(torch.arange(num_rows))
        expected = table.id_map()
        assert rows.tolist() == (list(range(num_rows)) if expected is None else expected.tolist())

    def test_rows_that_are_not_at_hand_count_as_mapped(self):
        table = planned_table(1000, np.arange(100)).tables[0]
        unknown = dataclasses.replace(table, blocks=(dataclasses.replace(table.blocks[0], rows=None),))
        assert (table.map_dtype, unknown.map_dtype) == (None, smallest_dtype(101))

    @pytest.mark.parametrize("first_is_rare", [False, True])
    def test_frequency_on_ordered_ids_makes_none(self, first_is_rare: bool):
        """Even if row 0 is kept for the unknown and hardly occurs: it costs less than a map."""
        ids = torch.from_numpy(np.random.default_rng(0).zipf(1.3, 4000).clip(max=300) - 1) + int(first_is_rare)
        order = torch.argsort(torch.bincount(ids, minlength=301), descending=True, stable=True)
        order = torch.cat([order[order == 0], order[order > 0]]) if first_is_rare else order
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        batches = [(place[ids], (ids % 2).float())]
        model = nn.Sequential(nn.Embedding(301, 8), nn.Linear(8, 1))
        task = Task(model, lambda m, b: binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1]), batches, batches)
        plan = search(task, FrequencyConfig(), "20%")
        (table,) = plan.tables
        assert table.keeps_first_rows
        assert table.num_kept == 301 * 8 // 5 // 8 - 1
        assert compact(model, plan)[0].id_map is None
        assert verify(model, plan, task).passed


class WideModel(nn.Module):
    """A table whose map may need one byte or two, and a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(700, 4)
        self.item = nn.Embedding(25, 2)
        self.head = nn.Linear(8, 1)

    def forward(self, ids_BC: Tensor) -> Tensor:
        users = ids_BC[:, 0] + 40 * (ids_BC[:, 1] % 17)
        return self.head(torch.cat([self.user(users), self.item(ids_BC[:, 1:]).flatten(1)], 1)).squeeze(1)


@pytest.mark.parametrize(
    "config",
    [
        FrequencyConfig(),
        MagnitudeConfig(unit="rows"),
        PMEConfig(),
        PMEConfig(score="random"),
        OptEmbedConfig(epochs=1, generations=2),
        GuidedConfig(trial_steps=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_budgets_hold_where_maps_change_their_width(config, monkeypatch):
    task = foreign_task(WideModel)
    monkeypatch.setattr("embtrim.testing.checks.BUDGETS", ("70%", "48%", "47%", "46%", "45%", "44%", "43%", "20%"))
    check_budget(task, config)


def test_sizes_stop_where_the_map_would_need_two_bytes():
    """With 255 rows and DROPPED the map takes a byte a row; one row more would cost 175 parameters for it."""
    first, second = nn.Embedding(700, 4), nn.Embedding(5000, 4)
    full = site_plan([ModuleSite("first", first), ModuleSite("second", second)])
    ranked = [np.zeros((700, 4)), np.zeros((5000, 4))]
    ranked[0][:, 0], ranked[0][-254:, 0] = 1.0, 3.0
    ranked[1][7, 0] = 2.0  # never fits, for its map
    least = 255 + 4 + 175
    sizes = fill_sizes(full, ranked, least + 100)
    assert [int((s > 0).sum()) for s in sizes] == [255, 0]
    assert sized_plan(full, sizes).num_params == least + 1
    assert int((fill_sizes(full, ranked, least + 300)[0] > 0).sum()) == 254 + 300 - 175


class TestVerify:
    """The masked module against the compact one, on batches, of any outputs."""

    class Outputs(nn.Module):
        """Gives a dictionary of a list, and a mask that is minus infinity in places."""

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


@pytest.mark.parametrize("align", ["scatter", "project"])
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


def quantized_rows(compacted: CompactEmbedding) -> Tensor:
    """What its ids read once it is quantised, by nothing but the definition of the codes; at width D."""
    rows = []
    for width in {weight.shape[1] for weight in compacted.weights}:
        together = torch.cat([w for w in compacted.weights if w.shape[1] == width]).detach()
        if compacted.bits == 16:
            rows.append((width, together.half().float()))
            continue
        scale, offset = fit_codes(together, compacted.bits)
        rows.append((width, codes_of(together, scale, offset, compacted.bits) * scale + offset))
    by_width = dict(rows)
    read = dict.fromkeys(by_width, 0)
    parts = []
    for weight in compacted.weights:
        width, start = weight.shape[1], read[weight.shape[1]]
        parts.append(compacted.widen(by_width[width][start : start + len(weight)]))
        read[width] = start + len(weight)
    return torch.cat(parts)[compacted.rows_of(torch.arange(compacted.num_embeddings)).long()]


class TestBits:
    """Tables of a stranger's model in 16, 8 and 4 bits."""

    @pytest.mark.parametrize("bits", [16, 8, 4])
    @pytest.mark.parametrize("kind", [*KINDS, "sizes", "one size twice"])
    @pytest.mark.parametrize("flat", [False, True])
    def test_reads_are_those_of_the_codes_and_bytes_those_of_the_plan(self, bits: int, kind: str, flat: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        fields = {"0": FIELDS} if flat else None
        if kind == "one size twice":
            plan = plan_for(model, "nothing", fields)
            blocks = tuple(
                Block(1, size, "project", np.array([row], np.int32)) for row, size in enumerate((4, 2, 4, 2))
            )
            plan = dataclasses.replace(plan, tables=tuple(dataclasses.replace(t, blocks=blocks) for t in plan.tables))
        else:
            plan = plan_for(model, kind, fields)
        plan = plan.with_bits(bits)
        small = compact(model, plan, seed=0)
        with torch.no_grad():
            for p in small.parameters():
                p.normal_()
            expected = torch.cat([quantized_rows(t) for t in compact_tables(small, plan)])
            quantize(small)
            assert torch.equal(small.eval()(PAIRS), expected[PAIRS])
        assert sum(v.nbytes for v in small.state_dict().values()) == plan.num_bytes()

    @pytest.mark.parametrize("bits", [16, 8, 4])
    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("padding_idx", [None, 0, 3])
    def test_bags_pool_what_their_entries_read(self, bits: int, mode: str, padding_idx: int | None):
        model = bag(mode=mode, padding_idx=padding_idx)
        plan = plan_for(model, "rows").with_bits(bits)
        small = compact(model, plan, seed=0).eval()
        quantize(small)
        stands_for = bag(mode=mode, padding_idx=padding_idx)
        with torch.no_grad():
            stands_for[0].weight.copy_(small[0].entries(torch.arange(ROWS)))
            same(small, stands_for)

    def test_a_padding_row_stays_zero(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=0))  # of both signs: zero is not a code
        for bits in (16, 8, 4):
            small = compact(model, plan_for(model, "columns").with_bits(bits), "inherit").eval()
            quantize(small)
            assert not small(torch.tensor([0])).any()
            assert small(torch.tensor([1])).any()

    def test_state_is_saved_and_loaded(self, tmp_path: Path):
        task = pooled_task()
        plan = search(task, PMEConfig(), "50%", bits=8)
        small = compact(task.model, plan, seed=1).eval()
        quantize(small)
        torch.save(small.state_dict(), tmp_path / "small.pt")
        torch.save(small, tmp_path / "module.pt")
        again = compact(task.model, plan, seed=2).eval()
        again.load_state_dict(torch.load(tmp_path / "small.pt"))
        ids, _ = next(iter(task.batches("valid")))
        assert torch.equal(again(ids), small(ids))
        assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(ids), small(ids))
        tables = [t for name, t in small.state_dict().items() if not name.startswith("head") and "recent" not in name]
        assert sum(t.nbytes for t in tables) == plan.num_bytes()

    @pytest.mark.parametrize("saved_is_zero", [False, True])
    def test_loaded_padding_reads_what_was_saved(self, saved_is_zero: bool):
        """Whatever the padding row of the module that the state is loaded into holds."""
        torch.manual_seed(0)
        zero, other = (nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=3)) for _ in range(2))
        with torch.no_grad():
            other[0].weight.normal_()
        plan = plan_for(zero, "columns").with_bits(8)
        small, into, quantized = (compact(m, plan, "inherit").eval() for m in (zero, other, other))
        if not saved_is_zero:
            small, into, quantized = into, small, compact(zero, plan, "inherit").eval()
        quantize(small)
        quantize(quantized)
        assert bool(small(torch.tensor(3)).any()) != saved_is_zero
        for again in (into, quantized):
            again.load_state_dict(small.state_dict())
            assert torch.equal(again(PAIRS), small(PAIRS))
        assert sum(v.nbytes for v in small.state_dict().values()) == plan.num_bytes()

    def test_is_for_inference_and_once(self):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        small = compact(model, plan_for(model, "rows").with_bits(8), "inherit")
        small(PAIRS).sum().backward()
        quantize(small)
        assert not list(small.parameters())
        with pytest.raises(EmbtrimError, match="'0' is quantised, for inference only"):
            small(PAIRS)
        with torch.no_grad():
            small(PAIRS)
        small.eval()(PAIRS)
        with pytest.raises(EmbtrimError, match="quantised already"):
            quantize(small)
        with pytest.raises(EmbtrimError, match=r"no compact table of fewer than 32 bits; .* plan\.with_bits\(8\)"):
            quantize(compact(model, plan_for(model, "rows")))
        with pytest.raises(EmbtrimError, match="no compact table"):
            quantize(model)

    def test_a_weight_in_a_list_is_emptied(self):
        model = TestWhereElseTheModelKeepsThem.Owner()
        small = compact(model, plan_for(model, "columns").with_bits(8), "inherit")
        quantize(small)
        assert small.penalized[0].numel() == 0

    def test_a_model_of_doubles_stays_one(self):
        model = bag(mode="sum").double()
        small = compact(model, plan_for(model, "sizes").with_bits(8)).eval()
        quantize(small)
        assert small(PAIRS).dtype == torch.float64

    @pytest.mark.parametrize("make", [foreign_task, pooled_task, odd_task])
    @pytest.mark.parametrize("bits", [16, 8, 4, "mixed"])
    def test_a_search_fills_its_budget(self, make: Callable[[], Task], bits):
        task = make()
        for config in (UniformConfig(), PMEConfig(), FrequencyConfig()):
            plan = search(task, config, "230 bytes", bits=bits)
            assert 100 < plan.num_bytes() <= 230
            assert verify(task.model, plan, task).passed
            small = compact(task.model, plan).eval()
            quantize(small)
            stored = [v for t in compact_tables(small, plan) for v in t.state_dict().values()]
            assert sum(v.nbytes for v in stored) == plan.num_bytes()

    def test_a_trained_model_loses_little(self):
        task = foreign_task()
        task.fit(task.model, epochs=40, seed=0)
        losses = []
        for bits in (32, 8, 4):
            small = compact(task.model, task.full_plan().with_bits(bits), "inherit").eval()
            if bits < 32:
                quantize(small)
            losses.append(-task.valid_score(small))
        assert losses[0] == pytest.approx(-task.valid_score(task.model))
        assert losses[0] < losses[1] == pytest.approx(losses[0], rel=0.02)
        assert losses[2] < 0.5 * task_loss_untrained()


def task_loss_untrained() -> float:
    task = foreign_task()
    return -task.valid_score(task.model)


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
        quantize(small)
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
        with pytest.raises(EmbtrimError, match="what reads= says of deep, wide does not hold"):
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
            ({"wide": ["user"]}, "what 'wide' reads, user, has 6 columns, but it takes 10"),
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


EXPORTED = {"plain": (ForeignModel, None), "flat": (PooledModel, {"flat": {"user": 40, "city": 12}})}


class TestExporters:
    """torch's own exporters take compact modules, quantised ones too."""

    @pytest.fixture(params=[*EXPORTED])
    def task(self, request) -> Task:
        return foreign_task(*EXPORTED[request.param])

    def small(self, task: Task, kind: str, bits: int) -> nn.Module:
        config = PMEConfig() if kind == "sizes" else RandomConfig()
        plan = search(task, FrequencyConfig() if kind == "rows" else config, "50%", bits=bits)
        small = compact(task.model, plan, seed=0).eval()
        if bits < 32:
            quantize(small)
        return small

    @pytest.mark.parametrize(
        ("kind", "bits", "strict"),
        [("columns", 32, False), ("rows", 32, True), ("sizes", 32, False), ("sizes", 8, False), ("rows", 4, False)],
    )
    def test_torch_export(self, task: Task, kind: str, bits: int, strict: bool):
        small = self.small(task, kind, bits)
        ids, _ = next(foreign_batches())
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(small, (ids[:8],), dynamic_shapes=shapes, strict=strict).module()
        assert torch.allclose(program(ids), small(ids), atol=1e-6)

    @pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
    @pytest.mark.parametrize("bits", [32, 4])
    def test_onnx(self, bits: int, tmp_path: Path):
        onnxruntime = pytest.importorskip("onnxruntime")
        small = self.small(pooled_task(), "rows", bits)
        ids, _ = next(foreign_batches())
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            small, (ids[:8],), str(tmp_path / "m.onnx"), dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        assert np.abs(found - small(ids).detach().numpy()).max() < 1e-5

    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("padding_idx", [None, 0])
    def test_bags_are_pooled_the_same(self, mode: str, padding_idx: int | None, monkeypatch):
        module, entries = bag(mode=mode, padding_idx=padding_idx)[0], torch.randn(4, 3, WIDTH)
        weights = torch.randn(4, 3) if mode == "sum" else None
        expected = pool_entries(module, entries, PAIRS, None, weights)
        monkeypatch.setattr("embtrim.tables.replacements.is_exporting", lambda: True)
        assert torch.allclose(pool_entries(module, entries, PAIRS, None, weights), expected, atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("padding_idx", [None, 0, 8])
    def test_fixed_shapes_give_the_same(self, kind: str, padding_idx: int | None):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx))
        (flat,) = compact(model, plan_for(model, kind, {"0": FIELDS}), seed=0)
        for ids in (torch.arange(ROWS), FLAT_IDS.int(), PAIRS[None], torch.tensor(4), PAIRS[:0]):
            assert torch.equal(flat._forward_fixed(ids), flat(ids))
        if kind == "columns":
            for wrong in (-1, ROWS):
                with pytest.raises(IndexError):
                    flat._forward_fixed(torch.tensor([wrong]))


def test_a_saved_module_opens_without_search_code(tmp_path: Path):
    task = pooled_task()
    plan = search(task, PMEConfig(), "50%", bits=8)
    tables = nn.ModuleDict({name: compact(task.model, plan).get_submodule(name) for name in ("flat", "history")})
    quantize(tables.eval())
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


# --- modules that are called in unusual ways -------------------------------------------------------------------------


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


class WithGlobalVector(nn.Module):
    """A sequence field, and an embedding that is read by one id alone."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.task = nn.Embedding(40, WIDTH), nn.Embedding(6, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.head(self.item(ids_BL).sum(1) + self.task(torch.tensor(2))).squeeze(1)


@pytest.mark.parametrize(
    "config", [OptEmbedConfig(epochs=1, generations=1), SSEDSConfig(), GuidedConfig(trial_steps=2)]
)
def test_an_id_alone_is_searched(config) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(40, (16, 3), generator=generator) for _ in range(3)]
    task = Task(
        WithGlobalVector(),
        lambda model, ids_BL: binary_cross_entropy_with_logits(model(ids_BL), (ids_BL[:, 0] % 2).float()),
        batches,
        batches,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), 1e-2),
        fresh=lambda _seed: WithGlobalVector(),
    )
    plan = search(task, config, "50%")
    assert 0 < plan.num_params <= plan.num_full_params // 2
    verify(task.model, plan, task).require()


def test_validation_batches_that_can_be_read_once_only_are_an_error() -> None:
    """Candidates that were scored on nothing would win over all that were scored."""
    batches = foreign_batches()
    task = Task(
        ForeignModel(),
        lambda model, batch: binary_cross_entropy_with_logits(model(batch[0]), batch[1]),
        batches,
        iter(batches),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), 1e-2),
        fresh=lambda _seed: ForeignModel(),
    )
    with pytest.raises(EmbtrimError, match="there are no valid batches to score on; give some that can be read again"):
        search(task, OptEmbedConfig(epochs=1, population=4, generations=2), "50%")
