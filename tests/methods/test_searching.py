"""The search itself: budgets that allow little or nothing, tasks that lack something, progress."""

from __future__ import annotations

import dataclasses
import re

import pytest
from rich.progress import Progress

from embtrim.config import Config
from embtrim.errors import BudgetError, EmbtrimError
from embtrim.methods import (
    METHODS,
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
from embtrim.methods.registry import Implementation
from embtrim.models import LR
from embtrim.plan.budget import Budget
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.task import Task
from embtrim.testing.toys import (
    ForeignModel,
    foreign_batches,
    foreign_task,
    planted_data,
    zoo_task,
)


@pytest.mark.parametrize("config", [FrequencyConfig(), MagnitudeConfig(unit="rows"), PMEConfig(), UniformConfig()])
def test_bytes_of_first_order_weights_that_go_buy_rows(config: Config):
    """A budget below what the first-order weights of all rows take: 253 of them, 1,012 bytes."""
    task = zoo_task()
    full, budget = task.full_plan(), Budget.parse("900 bytes")
    assert 4 * full.num_first_order_params > 900
    plan = search(task, config, budget)
    assert 0.9 * 900 < plan.num_bytes() <= 900
    # The least is an entry and its DROPPED row, and a first-order weight of each of these and of the other tables' two.
    with pytest.raises(BudgetError, match=r"^budget of 8 bytes is below the smallest plan of any method, 24 bytes; "):
        search(task, config, "8 bytes")


@pytest.mark.slow
def test_guided_finds_rows_within_few_bytes():
    """Where some tables keep no row: importance for the rows of the others would count all their first-order weights."""
    for budget in ("60 bytes", "300 bytes"):
        plan = search(zoo_task(), GuidedConfig(), budget)
        assert any(not t.blocks for t in plan.tables)
        assert 0 < plan.num_bytes() <= Budget.parse(budget).amount


TINY = ("8 bytes", "1 params", "0.01%")


@pytest.mark.parametrize("bits", [32, 8, "mixed"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_a_budget_that_allows_nothing_is_refused_before_the_search(name, bits, monkeypatch):
    """Whatever the method: what it would train for nothing is not trained."""
    method = METHODS[name]
    untouched = Implementation(method.config, None, None)
    monkeypatch.setitem(METHODS, name, dataclasses.replace(method, implementation=lambda: untouched))
    for task in (zoo_task(), foreign_task()):
        for budget in TINY:
            if task.full_plan().standalone and budget == "8 bytes":
                continue  # two entries, or more at fewer bits
            with pytest.raises(
                BudgetError, match=r"below the smallest plan of any method, [\d.]+( bytes| params|%); give"
            ):
                search(task, METHODS[name].config(), budget, bits=bits)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["bytes", "params", "%"])
@pytest.mark.parametrize("config", [
    UniformConfig(), FrequencyConfig(), RandomConfig(), MagnitudeConfig(), PMEConfig(), SSEDSConfig(), OptEmbedConfig()
])  # fmt: skip
def test_no_plan_is_empty_and_a_budget_that_is_named_is_enough(config, kind, bits):
    """Budgets are doubled from far too little: a method refuses them until it keeps something, and names one that does."""
    task = foreign_task() if kind == "params" else zoo_task()
    named, refused = [], 0
    for amount in (2**k * 0.02 for k in range(20)):
        try:
            plan = search(task, config, f"{amount:.6f} {kind}", bits=bits)
        except BudgetError as error:
            found = re.search(r"keeps no row .*; ([\d.,]+) ?(bytes|params|%) is enough", str(error))
            named += [" ".join(found.groups())] if found else []
            refused += 1
            continue
        assert not plan.keeps_nothing
        break
    assert refused > 1
    for budget in set(named):
        assert not search(task, config, budget, bits=bits).keeps_nothing


def test_a_task_says_what_it_lacks():
    task = Task(ForeignModel(), lambda m, b: m(b[0]).mean(), train=list(foreign_batches()))
    with pytest.raises(EmbtrimError, match="valid="):
        search(task, SSEDSConfig(data="valid"), "50%")
    with pytest.raises(EmbtrimError, match="no train batches"):
        search(Task(ForeignModel(), lambda m, b: m(b[0]).mean(), train=[]), SSEDSConfig(data="train"), "50%")
    data = planted_data(num_rows=500)
    with pytest.raises(EmbtrimError, match="no embedding tables to shrink"):
        search(CTRTask(LR(data.schema), data), SSEDSConfig(), "50%")
    with pytest.raises(EmbtrimError, match="fresh="):
        search(task, SSEDSConfig(pretrain="epochs:1", data="train"), "50%")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [SSEDSConfig(), PMEConfig(), GuidedConfig(), OptEmbedConfig(epochs=1, generations=2)]
)
def test_searches_show_progress_where_the_task_asks(config: Config, monkeypatch):
    shown: list[bool] = []

    class Recorder(Progress):
        def __init__(self, *columns, disable: bool = False, **settings) -> None:
            shown.append(not disable)
            super().__init__(*columns, disable=True, **settings)

    monkeypatch.setattr("embtrim.system.progress.Progress", Recorder)
    monkeypatch.setattr("embtrim.system.progress.shows_bars", lambda: True)
    task = zoo_task()
    search(task, config, "30%")
    assert not any(shown)
    task.progress = True
    search(task, config, "30%")
    assert any(shown)
