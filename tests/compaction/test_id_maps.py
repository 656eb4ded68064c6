"""Id maps of compact foreign tables: as narrow as the compact ids allow, counted, and left out where possible."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.methods import FrequencyConfig, GuidedConfig, MagnitudeConfig, OptEmbedConfig, PMEConfig, search
from embtrim.methods.value_sizes import bucket_scores, fill_sizes, sized_plan
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan, smallest_dtype
from embtrim.tables.replacements import CompactEmbedding
from embtrim.tasks.sites import ModuleSite
from embtrim.tasks.survey import site_plan
from embtrim.tasks.task import Task
from embtrim.testing.checks import check_budget
from embtrim.testing.toys import foreign_task


def planned_table(num_rows: int, rows: np.ndarray, width: int = 2) -> SizePlan:
    full = site_plan([ModuleSite("0", nn.Embedding(num_rows, width))])
    block = Block(len(rows), tuple(range(width)), "scatter", rows.astype(np.int32))
    return dataclasses.replace(full, tables=(dataclasses.replace(full.tables[0], blocks=(block,)),))


class TestMaps:
    """A map is as narrow as the compact ids allow and is counted. No map is needed if the kept rows come first."""

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
        assert (table.map_dtype, table.shape().map_dtype) == (None, smallest_dtype(101))

    @pytest.mark.parametrize("first_is_rare", [False, True])
    def test_frequency_on_ordered_ids_makes_none(self, first_is_rare: bool):
        """Even if row 0 hardly occurs and is kept for unknown values: the row costs less than a map."""
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
        GuidedConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.slow
def test_budgets_hold_where_maps_change_their_width(config, monkeypatch):
    task = foreign_task(WideModel)
    monkeypatch.setattr("embtrim.testing.checks.BUDGETS", ("70%", "48%", "47%", "46%", "45%", "44%", "43%", "20%"))
    check_budget(task, config)


def test_sizes_stop_where_the_map_would_need_two_bytes():
    """With 255 rows and DROPPED the map takes one byte per row. One more row would add 175 parameters to the map."""
    first, second = nn.Embedding(700, 4), nn.Embedding(5000, 4)
    full = site_plan([ModuleSite("first", first), ModuleSite("second", second)])
    ranked = [np.zeros((700, 4)), np.zeros((5000, 4))]
    ranked[0][:, 0], ranked[0][-254:, 0] = 1.0, 3.0
    ranked[1][7, 0] = 2.0  # never fits, for its map
    least = 255 + 4 + 175
    sizes = fill_sizes(full, bucket_scores(full, ranked), least + 100)
    assert [int((s > 0).sum()) for s in sizes] == [255, 0]
    assert sized_plan(full, sizes).num_params == least + 1
    assert int((fill_sizes(full, bucket_scores(full, ranked), least + 300)[0] > 0).sum()) == 254 + 300 - 175
