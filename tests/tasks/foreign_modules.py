"""Small foreign modules, their plans and their masked copies, for tests of tasks and of compaction."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.tasks.survey import find_sites, site_plan

ROWS, WIDTH = 12, 4

FIELDS = {"user": 7, "city": 5}


def blocks_of(kind: str, num_rows: int) -> tuple[Block, ...]:
    """Blocks of one kind: some columns, some rows, the first rows, rows without the padding row 0, several sizes, or nothing."""
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
    """The table with all rows in order and the first rows wider, so that ids need no map."""
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


class Owner(nn.Module):
    """Keeps one embedding in several places, and its weight in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.again = self.table
        self.unregistered = [self.table]
        self.penalized = [self.table.weight]

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.again(ids) + self.unregistered[0](ids)
