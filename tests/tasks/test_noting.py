"""Task.survey() says what a batch reads of the tables: fields of flat ones, and reads of all rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embtrim.tasks.task import Task

SIZES = (30, 4, 200)


class Flat(nn.Module):
    """Reads one table by ids of several fields, or of whatever a function of the ids gives."""

    def __init__(self, ids_of: Callable[[Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.table, self.ids_of = nn.Embedding(sum(SIZES), 4), ids_of
        vars(self).update(attributes)

    def forward(self, ids_BC: Tensor) -> Tensor:
        found = self.ids_of(ids_BC)
        parts = [self.table(ids) for ids in found] if isinstance(found, list) else [self.table(found)]
        return sum(part.flatten(1).sum(1) for part in parts)


def note(model: nn.Module, rows: int = 256) -> str:
    generator = torch.Generator().manual_seed(0)
    batch = torch.stack([torch.randint(size, (rows,), generator=generator) for size in SIZES], 1)
    return Task(model, lambda model, ids: model(ids).mean(), [batch]).survey()[0].note


STARTS = torch.tensor([0, 30, 34])
LINE = r'Task\(..., fields={"table": {"field_0": 30, "field_1": 4, "field_2": 200}}\)'


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"offsets": np.array([0, 30, 34])}, LINE),
        ({"starts": [0, 30, 34, 234]}, LINE),
        ({"field_dims": SIZES}, LINE),
        (
            {"other": [0, 1, 2], "name": "x"},
            r'{"table": {"field_0": ROWS, "field_1": ROWS, "field_2": ROWS}}.*0 to 29, 30 to 33',
        ),
    ],
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_fields_of_a_flat_table_are_written_out(attributes, expected: str, one_by_one: bool):
    ids_of = (lambda ids: [*(ids + STARTS).T]) if one_by_one else (lambda ids: ids + STARTS)
    found = note(
        Flat(ids_of, **attributes)
        if not one_by_one
        else Flat(lambda ids: [x[:, None] for x in ids_of(ids)], **attributes)
    )
    assert found.startswith("3 ids of a row go into it: say")
    assert re.search(expected, found)


@pytest.mark.parametrize(
    "ids_of",
    [
        lambda ids: ids,  # a list of one vocabulary
        lambda ids: ids[:, :1],
        lambda ids: torch.arange(3).expand(len(ids), 3),  # places
        lambda ids: (ids + STARTS)[:4],  # too few rows to tell
    ],
)
def test_other_tables_are_not(ids_of):
    assert note(Flat(ids_of)) == ""


def test_fields_that_are_named_are_not_named_again():
    model = Flat(lambda ids: ids + STARTS)
    batch = torch.stack([torch.randint(size, (64,)) for size in SIZES], 1)
    fields = {"table": {"a": 30, "b": 4, "c": 200}}
    assert Task(model, lambda m, ids: m(ids).mean(), [batch], fields=fields).survey()[0].note == "fields a, b, c"


def test_costs_of_reading_all_rows():
    class Reader(Flat):
        def forward(self, ids_BC: Tensor) -> Tensor:
            penalty = self.table.weight.norm() + self.table.weight.mean()
            return super().forward(ids_BC) + (self.table(ids_BC[:, 0]) @ self.table.weight.T).sum(1) + penalty

    assert note(Reader(lambda ids: ids)) == (
        "vectors are multiplied by all of its weight: in a compact table by what it stores; a batch reads all of its weight 2 "
        "times, for which a compact table computes 234 x 4 values (3,744 bytes) each time"
    )


def test_a_task_without_batches_is_surveyed():
    model = Flat(lambda ids: ids)
    for train in ([], iter([torch.zeros(9, 3)]), None):
        assert Task(model, lambda m, ids: 1 / 0, train).survey()[0].found  # type: ignore[arg-type]
