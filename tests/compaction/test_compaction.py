"""Compact equals masked, for every model and every kind of plan; foreign modules too."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from embtrim.compaction.compacting import CompactEmbedding, compact
from embtrim.compaction.inheriting import inherit_weights
from embtrim.compaction.verification import verify
from embtrim.errors import EmbtrimError, PlanError
from embtrim.methods import RandomConfig, UniformConfig, search
from embtrim.models import FNN, MODELS, DeepFM, build
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.survey import find_sites, site_plan
from embtrim.tasks.task import Task
from embtrim.testing.toys import ForeignModel, foreign_batches, foreign_task

TABLE_MODELS = [name for name in MODELS if name != "lr"]


def noisy(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and batch-norm statistics, so that no equality holds by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
            elif name.endswith("running_mean"):
                buffer.normal_(0, 1, generator=generator)
    return model


def small_model(name: str, schema, width: int = 6):
    hparams = {"embedding_dim": width, "hidden_units": (16, 8)}
    if name in ("lr", "fm"):
        hparams.pop("hidden_units")
    if name == "lr":
        hparams.pop("embedding_dim")
    return noisy(build(name, schema, **hparams))


def row_plan(model, seed: int = 0) -> SizePlan:
    """Half of the rows of each table, random columns; the last table keeps nothing."""
    rng = np.random.default_rng(seed)
    tables = []
    full = model.tables.plan
    for number, t in enumerate(full.tables):
        rows = np.sort(rng.choice(np.arange(1, t.num_rows), t.num_rows // 2, replace=False))
        rows = np.concatenate([[0], rows]).astype(np.int32)
        columns = tuple(sorted(rng.choice(t.width, 3, replace=False).tolist()))
        blocks = (Block(len(rows), columns, "scatter", rows),) if number < len(full.tables) - 1 else ()
        tables.append(TablePlan(t.name, t.num_rows, t.width, blocks))
    return dataclasses.replace(full, tables=tuple(tables), method="test")


@pytest.mark.parametrize("name", TABLE_MODELS)
@pytest.mark.parametrize("budget", ["60%", "15%"])
def test_verify_holds_for_every_model(name, budget, wide_data):
    model = small_model(name, wide_data.schema)
    plan = search(CTRTask(model, wide_data), RandomConfig(), budget, seed=3)
    result = verify(model, plan, wide_data)
    assert result.passed, result
    assert result.num_rows == wide_data.num_rows("valid")


@pytest.mark.parametrize("name", TABLE_MODELS)
def test_verify_holds_when_rows_go(name, wide_data):
    model = small_model(name, wide_data.schema)
    assert verify(model, row_plan(model), wide_data).passed


def test_tables_are_inherited_in_parts_of_which_some_keep_nothing(wide_data, monkeypatch):
    model = small_model("deepfm", wide_data.schema)
    full = model.tables.plan
    rows = np.array([0, 1, 4, full.tables[0].num_rows - 1], np.int32)
    first = dataclasses.replace(full.tables[0], blocks=(Block(4, (0, 2), "scatter", rows),))
    plan = dataclasses.replace(full, tables=(first, *full.tables[1:]))
    expected = compact(model, plan, init="inherit").state_dict()
    monkeypatch.setattr("embtrim.compaction.inheriting.CHUNK_ROWS", 2)
    for name, value in compact(model, plan, init="inherit").state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_verify_sees_a_wrong_compact_model(wide_data, monkeypatch):
    model = small_model("deepfm", wide_data.schema)
    plan = search(CTRTask(model, wide_data), RandomConfig(), "40%")

    def forget_one(full, small):
        inherit_weights(full, small)
        with torch.no_grad():
            small.tables.weight[-1] += 1e-3

    verify(model, plan, wide_data).require()
    monkeypatch.setattr("embtrim.compaction.compacting.inherit_weights", forget_one)
    wrong = verify(model, plan, wide_data)
    assert not wrong.passed
    with pytest.raises(EmbtrimError, match="report this as a bug"):
        wrong.require()


def test_projected_plan_verifies_by_selection(wide_data):
    model = small_model("deepfm", wide_data.schema)
    plan = search(CTRTask(model, wide_data), RandomConfig(align="project"), "40%")
    assert plan.num_projection_params > 0
    assert verify(model, plan, wide_data).passed


def test_compact_is_smaller_by_what_the_plan_says(data):
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(16,))
    plan = search(CTRTask(model, data), RandomConfig(), "25%")
    small = compact(model, plan)
    assert small.tables.weight.numel() == plan.num_params
    assert small.tables.first_order.numel() == plan.num_first_order_params == sum(data.schema.tables.values())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters()) / 2
    first = next(p for n, p in small.named_parameters() if n.startswith("mlp") and p.ndim == 2)
    assert first.shape[1] == sum(small.tables.widths)


def test_inits_differ_as_named(data):
    model = noisy(DeepFM(data.schema, embedding_dim=8, hidden_units=(16,), seed=5))
    plan = search(CTRTask(model, data), RandomConfig(), "25%")
    table = next(t for t in plan.tables if t.output_width)
    rows = np.arange(table.num_rows)

    def kept(m):
        return m.tables.get_rows(table.name, rows)[0][1]

    columns = list(table.columns)
    assert torch.equal(kept(compact(model, plan, "inherit")), kept(model)[:, columns])
    fresh = DeepFM(data.schema, embedding_dim=8, hidden_units=(16,), seed=5)
    assert torch.equal(kept(compact(model, plan, "initial")), kept(fresh)[:, columns])
    assert torch.equal(kept(compact(model, plan, "scratch", seed=1)), kept(compact(model, plan, "scratch", seed=1)))
    assert not torch.equal(kept(compact(model, plan, "scratch", seed=1)), kept(compact(model, plan, "scratch", seed=2)))
    with pytest.raises(EmbtrimError, match="'scratch', 'initial', 'inherit' or 'low_rank', given 'warm'"):
        compact(model, plan, "warm")
    with pytest.raises(EmbtrimError, match="'scratch', 'initial', 'inherit' or 'low_rank', given 'inherited'"):
        compact(ForeignModel(), site_plan(find_sites(ForeignModel())), "inherited")


def test_keep_all_plan_is_the_identity(data):
    model = noisy(DeepFM(data.schema, embedding_dim=4, hidden_units=(8,))).eval()
    small = compact(model, SizePlan.full(data.schema, 4, True), "inherit").eval()
    batch = next(iter(data.batches("valid", 64)))
    assert torch.equal(small(batch.ids_BC), model(batch.ids_BC))


def test_a_plan_for_another_schema_is_refused(data, wide_data):
    model = DeepFM(data.schema, embedding_dim=4, hidden_units=(8,))
    with pytest.raises(PlanError, match="made for schema"):
        compact(model, SizePlan.full(wide_data.schema, 4, True))


def test_count_only_plan_cannot_inherit(data):
    model = FNN(data.schema, embedding_dim=4, hidden_units=(8,))
    full = SizePlan.full(data.schema, 4)
    tables = tuple(TablePlan(t.name, t.num_rows, t.width, (Block(t.num_rows, 2),)) for t in full.tables)
    plan = dataclasses.replace(full, tables=tables)
    assert compact(model, plan).tables.widths == (2, 2, 2)
    with pytest.raises(PlanError, match="how many columns, not which"):
        compact(model, plan, "inherit")


@pytest.mark.parametrize("align", ["scatter", "project"])
def test_foreign_module_compact_equals_masked(align):
    torch.manual_seed(0)
    model = ForeignModel()
    before = copy.deepcopy(model.state_dict())
    task = Task(
        model, lambda m, b: nn.functional.binary_cross_entropy_with_logits(m(b[0]), b[1]), list(foreign_batches())
    )
    plan = search(task, RandomConfig(align=align), "60%", seed=1)
    small = compact(model, plan, "inherit")
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for table in plan.tables:
            weight = masked.get_submodule(table.name).weight
            weight *= torch.from_numpy(table.kept_mask()).to(weight)
    for ids, _ in foreign_batches():
        assert torch.allclose(small(ids), masked(ids), atol=1e-6)
    assert isinstance(small.user, CompactEmbedding)
    assert isinstance(small.bias, nn.Embedding)
    stored = sum(p.numel() for site in (small.user, small.item) for p in site.parameters())
    assert stored == plan.num_params <= Budget.parse("60%").max_params(40 * 6 + 25 * 4)
    small.load_state_dict(copy.deepcopy(small).state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def foreign_row_plan(model: nn.Module, mixed: bool) -> SizePlan:
    """User: some rows dropped, or sizes 1, 2 and 6; item: nothing kept."""
    full = site_plan(find_sites(model))
    rows = np.arange(0, 40, 2, dtype=np.int32)
    if mixed:
        sizes = [(6, rows[:3]), (2, rows[3:9]), (1, rows[9:])]
        blocks = tuple(Block(len(r), width, "project", r) for width, r in sizes)
    else:
        blocks = (Block(len(rows), (1, 4), "scatter", rows),)
    tables = (TablePlan("user", 40, 6, blocks), TablePlan("item", 25, 4, ()))
    return dataclasses.replace(full, tables=tables)


def test_foreign_rows_go_and_pay_for_their_map():
    model = noisy(ForeignModel())
    plan = foreign_row_plan(model, mixed=False)
    assert plan.num_params == 21 * 2 + 40 // 4  # 20 rows and DROPPED, and a byte a row; the empty table needs no map
    small = compact(model, plan, "inherit")
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for table in plan.tables:
            masked.get_submodule(table.name).weight.mul_(torch.from_numpy(table.kept_mask()))
    for ids, _ in foreign_batches():
        assert torch.allclose(small(ids), masked(ids), atol=1e-6)
    assert small.user.id_map.dtype == torch.uint8
    assert 4 * sum(p.numel() for p in small.user.parameters()) + small.user.id_map.nbytes == plan.num_bytes()
    again = compact(model, plan)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(ids), small(ids))


def test_foreign_rows_of_several_sizes_equal_a_naive_lookup():
    model = noisy(ForeignModel())
    plan = foreign_row_plan(model, mixed=True)
    small = compact(model, plan, seed=1)
    assert plan.num_params == 4 * 6 + 6 * 2 + 11 + (1 + 2) * 6 + 40 // 4
    assert plan.num_params == sum(p.numel() for p in small.user.parameters()) + 40 // 4
    big, two, one = small.user.weights
    projection = small.user.projections
    expected = {0: big[0], 4: big[2], 6: two[0] @ projection["2"], 38: one[10] @ projection["1"], 1: big[3], 39: big[3]}
    found = small.user(torch.tensor(list(expected)))
    assert torch.allclose(found, torch.stack(list(expected.values())), atol=1e-6)
    assert not big[3].any()
    assert big[:3].all()
    with pytest.raises(PlanError, match="how many columns, not which"):
        compact(model, plan, "inherit")


def test_verify_asks_for_data_or_a_task_as_the_model_needs(data):
    model = ForeignModel()
    with pytest.raises(EmbtrimError, match="got a ForeignModel and a EncodedDataset"):
        verify(model, site_plan(find_sites(model)), data)
    zoo = FNN(data.schema, embedding_dim=4, hidden_units=(8,))
    with pytest.raises(EmbtrimError, match="given a Task; give its data"):
        verify(zoo, zoo.tables.plan, foreign_task())


@pytest.mark.parametrize("name", ["deepfm", "fnn"])
def test_sizes_per_value_are_verified_by_a_naive_lookup(name, wide_data, monkeypatch):
    model = small_model(name, wide_data.schema)
    full = model.tables.plan
    rng = np.random.default_rng(0)
    tables = []
    for t in full.tables:
        order = rng.permutation(t.num_rows)
        pieces = zip((t.width, 2, 1), np.array_split(order[: t.num_rows * 3 // 4], 3), strict=True)
        blocks = tuple(Block(len(r), width, "project", np.sort(r).astype(np.int32)) for width, r in pieces)
        tables.append(TablePlan(t.name, t.num_rows, t.width, blocks))
    plan = dataclasses.replace(full, tables=tuple(tables))
    result = verify(model, plan, wide_data)
    assert (result.passed, result.against, result.num_rows) == (True, "lookup", wide_data.num_rows("valid"))
    right = EmbeddingTables.storage_ids
    monkeypatch.setattr(EmbeddingTables, "storage_ids", lambda self, ids: (right(self, ids) - 1).clamp(min=0))
    assert not verify(model, plan, wide_data).passed


def test_uniform_and_compact_agree_on_bytes(data):
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(8,))
    plan = search(CTRTask(model, data), UniformConfig(), "20 kB")
    small = compact(model, plan)
    stored = 4 * (small.tables.weight.numel() + small.tables.first_order.numel())
    assert stored == plan.num_bytes() <= 20_000


def test_a_compact_model_is_not_compacted_again(data):
    model = small_model("fnn", data.schema)
    for plan in (row_plan(model), search(CTRTask(model, data), UniformConfig(), "50%")):
        with pytest.raises(EmbtrimError, match="this fnn is compact already; compact the full model"):
            compact(compact(model, plan), plan, init="inherit")
