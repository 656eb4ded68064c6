"""The least amount of a budget: equal to that of whole plans, and counted once for each table."""

from __future__ import annotations

import dataclasses

import pytest

from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import amount_of, check_budget, least_amount, least_tables
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Block
from embtrim.schema import Schema


def full_plan(*, first_order: bool, standalone: bool) -> SizePlan:
    full = SizePlan.full(Schema.from_sizes([300, 9, 2]), 8, first_order)
    return dataclasses.replace(full, standalone=standalone)


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("unit", [None, "columns", "rows"])
@pytest.mark.parametrize(
    ("budget", "bits", "target"),
    [("1%", 32, None), ("9 params", 32, None), ("99 bytes", 8, "onnx"), ("3%", 4, None), ("3%", 32, "fbgemm")],
)
def test_the_least_amount_is_that_of_the_least_whole_plan(budget, bits, target, unit, first_order, standalone):
    full, parsed = full_plan(first_order=first_order, standalone=standalone), Budget.parse(budget)
    amounts = []
    for number, table in enumerate(full.tables):
        for least in least_tables(table, unit):
            gone = [(Block(t.num_rows, ()),) if unit == "columns" else () for t in full.tables]
            tables = [
                dataclasses.replace(t, blocks=blocks) for t, blocks in zip(full.shape().tables, gone, strict=True)
            ]
            tables[number] = least
            plan = dataclasses.replace(full.shape(), tables=tuple(tables)).with_bits(bits)
            amounts.append(amount_of(plan, parsed, target))
            allowed = plan.max_bytes(Budget(parsed.kind, amounts[-1]), target)
            assert plan.num_bytes(target) == pytest.approx(allowed)
    assert least_amount(full, parsed, bits, target, unit) == pytest.approx(min(amounts), rel=1e-12)


@pytest.mark.parametrize("bits", [32, "mixed"])
def test_a_table_is_counted_a_few_times_however_many_there_are(bits, monkeypatch: pytest.MonkeyPatch):
    counted = PlanShape.table_bytes
    calls = []
    monkeypatch.setattr(PlanShape, "table_bytes", lambda *args, **kwargs: calls.append(0) or counted(*args, **kwargs))

    def calls_for(sizes: list[int]) -> int:
        calls.clear()
        check_budget(SizePlan.full(Schema.from_sizes(sizes), 4), Budget.parse("50%"), bits)
        return len(calls)

    assert 0 < calls_for([*range(5, 45)]) == 10 * calls_for([*range(5, 9)])
    assert calls_for([5] * 40) == calls_for([5])
