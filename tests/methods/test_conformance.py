"""What every search promises, on a zoo model and on foreign ones, and that the checks can fail."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch

import embtrim.testing.checks
from embtrim.config import Config
from embtrim.errors import BudgetError, ConfigError, EmbtrimError
from embtrim.methods import (
    METHODS,
    GuidedConfig,
    MagnitudeConfig,
    MDEConfig,
    OptEmbedConfig,
    PMEConfig,
    RandomConfig,
    SSEDSConfig,
    UniformConfig,
    search,
)
from embtrim.methods.registry import register
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block
from embtrim.tasks.task import Task
from embtrim.testing.checks import CHECKS, check_filled, check_method
from embtrim.testing.matrix import conformance_matrix
from embtrim.testing.toys import TASKS

CONFIGS = {
    **{name: method.config() for name, method in METHODS.items()},
    # Shorter than by default; `python -m embtrim.testing` runs the defaults.
    "optembed": OptEmbedConfig(epochs=2, generations=3),
    "sseds-signed": SSEDSConfig(score="signed", data="valid", batches=0, cost_aware=True),
    "sseds-pretrain": SSEDSConfig(pretrain="epochs:1", align="project", score="abs", average="abs", batches=2),
    "uniform-project": UniformConfig(align="project"),
    "guided-low-rank": GuidedConfig(start="low_rank"),
    "random-project": RandomConfig(align="project"),
    "magnitude-rows": MagnitudeConfig(unit="rows"),
    "magnitude-project": MagnitudeConfig(align="project", cost_aware=True),
    "mde-occurrences": MDEConfig(popularity="occurrences", align="scatter"),
    "pme-frequency": PMEConfig(score="frequency", search_fraction=0.3),
    "pme-random": PMEConfig(score="random"),
    "pme-warm": PMEConfig(score="magnitude", warmup_epochs=1),
}


@pytest.fixture(scope="module", params=TASKS)
def task(request) -> Task:
    return TASKS[request.param]()


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("name", CONFIGS)
def test_conformance(name: str, check: str, task: Task):
    """One class of promises, all methods, on a zoo model and on foreign ones."""
    CHECKS[check](task, CONFIGS[name])


class TestTheChecksCanFail:
    """A method that breaks a promise is found out."""

    @pytest.fixture
    def broken(self):
        class BrokenConfig(Config):
            fault: str

        @register("broken", BrokenConfig, needs="nothing")  # it adds columns
        def search_broken(task: Task, config: BrokenConfig, budget: Budget, seed: int) -> SizePlan:
            full = task.full_plan()
            first = full.tables[0].name
            if config.fault == "global generator":
                return full.with_columns({first: torch.randperm(4)[:2].tolist()})
            if config.fault == "moves":
                next(task.model.parameters()).data.add_(1.0)
            if config.fault == "reads":
                weight = task.sites(task.model)[0].weights()[0]
                return full.with_columns({first: weight.sum(0).argsort()[:2].tolist()})
            if config.fault == "not JSON":
                return full.with_columns({first: [0]}).made_by("broken", budget, seed, {"set": (1, 2)})
            if config.fault == "over budget":
                return full
            return full.with_columns({first: [0]})

        yield BrokenConfig
        del METHODS["broken"]

    @pytest.mark.parametrize(
        ("fault", "check"),
        [
            ("global generator", "same seed, same plan"),
            ("over budget", "budget holds and is full"),
            ("one column only", "budget holds and is full"),
            ("one column only", "keep-all is the identity"),
            ("not JSON", "plan round-trips"),
            ("moves", "only declared parameters move"),
            ("reads", "only declared parameters move"),
        ],
    )
    def test_fault(self, fault: str, check: str, task: Task, broken):
        before = copy.deepcopy(task.model.state_dict())
        torch.manual_seed(5)
        with pytest.raises(AssertionError):
            CHECKS[check](task, broken(fault=fault))
        task.model.load_state_dict(before)

    def test_wrong_compaction(self, task: Task, monkeypatch):
        right = embtrim.testing.checks.compact

        def off_by_one(*args, **settings):
            small = right(*args, **settings)
            with torch.no_grad():
                for name, p in small.named_parameters():
                    if "user" in name or "tables" in name:
                        p.add_(0.1)
            return small

        monkeypatch.setattr("embtrim.testing.checks.compact", off_by_one)
        monkeypatch.setattr("embtrim.compaction.verification.made_compact", off_by_one)
        with pytest.raises((AssertionError, EmbtrimError)):
            CHECKS["compact equals masked"](task, RandomConfig())
        with pytest.raises(AssertionError):
            CHECKS["keep-all is the identity"](task, RandomConfig())

    @pytest.mark.slow
    def test_all_broken_promises_are_said_at_once(self, broken):
        with pytest.raises(AssertionError) as caught:
            check_method(broken(fault="not JSON"))
        first, *lines = str(caught.value).splitlines()
        assert first == f"method 'broken' breaks {len(lines)} of 24 promises:"
        for name in TASKS:
            (line,) = [line for line in lines if f"'plan round-trips' on the task '{name}': " in line]
            assert re.search(r"details of the plan, .*\(1, 2\).* is read as .*\[1, 2\]", line)
        assert sum("budget holds and is full" in line for line in lines) == len(TASKS), "one column fills no budget"
        assert not any("same seed" in line for line in lines)

    def test_an_error_of_the_method_is_a_broken_promise(self):
        class CrashesConfig(Config):
            pass

        @register("crashes", CrashesConfig, needs="nothing")
        def search_crashes(*_) -> SizePlan:
            raise KeyError("price")

        try:
            with pytest.raises(AssertionError, match=r"breaks 24 of 24 promises:\n.*'zoo': KeyError: 'price'"):
                check_method(CrashesConfig())
        finally:
            del METHODS["crashes"]
        with pytest.raises(ConfigError, match="not the config of a search method"):
            check_method(CrashesConfig())

    @pytest.mark.slow
    def test_the_matrix_names_what_fails(self, broken, monkeypatch):
        monkeypatch.setattr("embtrim.testing.matrix.CHECKS", {"budget": CHECKS["budget holds and is full"]})
        lines = conformance_matrix({"random": RandomConfig(), "broken": broken(fault="over budget")}).splitlines()
        assert re.match(r"\| random \| zoo \| holds \| fails as expected, noise is kept: .*nothing", lines[2])
        assert "| FAILS: a search exceeded its budget | FAILS: " in lines[3]
        assert lines[4] == "| random | foreign | holds | - |"

    @pytest.mark.parametrize("adds", [("columns",), ("rows",), ("columns", "rows"), ("sizes",)])
    @pytest.mark.parametrize("blocks", [(), (Block(0, ()),)])
    def test_a_plan_that_keeps_nothing_is_not_full(self, adds, blocks, task: Task):
        class EmptyConfig(Config):
            pass

        @register("empty", EmptyConfig, needs="nothing", adds=adds)
        def search_empty(task: Task, config: EmptyConfig, budget: Budget, seed: int) -> SizePlan:
            full = task.full_plan()
            return dataclasses.replace(full, tables=tuple(dataclasses.replace(t, blocks=blocks) for t in full.tables))

        try:
            plan = search_empty(task, EmptyConfig(), Budget.parse("80%"), 0)
            with pytest.raises(
                AssertionError, match=f"80%: the first of the {adds[0] if len(adds) == 1 else ''}.* fit"
            ):
                check_filled(plan, EmptyConfig(), Budget.parse("80%"))
            with pytest.raises(
                BudgetError, match=r"^method 'empty' keeps no row of any table within a budget of 80%; "
            ):
                search(task, EmptyConfig(), "80%")
        finally:
            del METHODS["empty"]
