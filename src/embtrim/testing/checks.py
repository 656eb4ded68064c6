"""What every search method promises, as checks that anyone can run on a method of their own.

    from embtrim import testing
    testing.check_method(MyConfig())     # AssertionError lists each promise that does not hold, and the task
    testing.check_planted(MyConfig())    # no promise: a rule that looks at no label cannot hold it

`python -m embtrim.testing` runs all methods on all toy tasks (toys.py) and prints the matrix (matrix.py).
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.config import Config
from embtrim.errors import BudgetError
from embtrim.methods import method_of, search
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.budget import Budget
from embtrim.plan.budget_limits import full_limit
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Alignment, BlockShape, TableShape
from embtrim.system.torch_private import has_forward_hooks
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.task import Task
from embtrim.testing.toys import TASKS, noisy_task

BUDGETS = ("80%", "30%", "12%", "500 params", "2500 bytes")


# ---- promises ----------------------------------------------------------------------------------------------------------


def check_same_seed_same_plan(task: Task, config: Config) -> None:
    """Two searches with one seed find the same plan, whatever the state of the global generators."""
    first = search(task, config, "50%", seed=3)
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 (somebody else's code may draw from it)
    second = search(task, config, "50%", seed=3)
    assert first.diff(second) == "", f"same seed, other plan:\n{first.diff(second)}"


def check_budget(task: Task, config: Config) -> None:
    """No budget is exceeded, and no further unit that the method adds would fit."""
    for budget in BUDGETS:
        try:
            plan = search(task, config, budget)
        except BudgetError:
            assert getattr(config, "min_dim", 0), f"{budget} was refused"
            continue
        check_filled(plan, config, Budget.parse(budget))


def check_filled(plan: SizePlan, config: Config, budget: Budget) -> None:
    """A plan does not exceed its budget, and no further unit that the method adds would fit."""
    limit = plan.max_params(budget)
    assert plan.num_params <= limit, f"{plan.num_params:,} parameters, {budget} allows {limit:,}"
    natural = plan.details.get("natural_params")
    if natural is not None and natural <= limit:
        return  # the method wants no more than this
    for unit, larger in one_unit_larger(plan, method_of(config).adds):
        assert larger.num_params > full_limit(larger, budget), f"{budget}: {unit} would still fit"


def one_unit_larger(plan: SizePlan, adds: tuple[str, ...]) -> Iterator[tuple[str, PlanShape]]:
    """Plans that keep one more column, one more row or the next size of a row; rows are only counted.

    Tables that no batch reads are left out: they keep nothing, whatever the budget.
    """
    for number, t in enumerate(plan.tables):
        if t.name in plan.details.get("unread_tables", ()):
            continue
        if not t.output_width:
            yield from first_units(plan, number, adds)
            continue
        counted = [block.shape() for block in t.blocks]
        grown: list[tuple[str, list[BlockShape]]] = []
        narrow = not t.mixed and t.output_width < t.width
        if "columns" in adds and narrow and counted and not (t.has_dropped and "rows" in adds):
            for width in (t.output_width + 1, t.width):
                blocks = [dataclasses.replace(b, columns=tuple(range(width))) for b in counted]
                grown.append((f"column {width} of {t.name}", blocks))
        if "rows" in adds and t.has_dropped and t.blocks:
            more = dataclasses.replace(counted[-1], num_rows=counted[-1].num_rows + 1)
            grown.append((f"a row of {t.name}", [*counted[:-1], more]))
        if "sizes" in adds and counted:
            for place, block in enumerate(counted):
                wider = dataclasses.replace(block, num_rows=block.num_rows + 1)
                if place + 1 < len(counted):
                    smaller = dataclasses.replace(counted[place + 1], num_rows=counted[place + 1].num_rows - 1)
                    grown.append((f"a size of {t.name}", [*counted[:place], wider, smaller, *counted[place + 2 :]]))
                elif t.has_dropped:
                    grown.append((f"a row of {t.name}", [*counted[:place], wider]))
        for unit, blocks in grown:
            table = TableShape(t.name, t.num_rows, t.width, tuple(blocks))
            tables = (*plan.tables[:number], table, *plan.tables[number + 1 :])
            yield unit, dataclasses.replace(plan.shape(), tables=tables)


def first_units(plan: PlanShape, number: int, adds: tuple[str, ...]) -> Iterator[tuple[str, PlanShape]]:
    """Plans that keep a column, a row or a row's smallest size of a table that keeps nothing so far.

    A method that adds columns and rows adds rows if the plan has dropped some. If it has not, only the dearer of the two
    certainly does not fit. A method that adds only columns adds them to the rows that it keeps; if the plan has dropped
    rows, a table may keep none.
    """
    t = plan.tables[number]
    alignments: list[Alignment] = [b.alignment for other in plan.tables for b in other.blocks if b.width]
    alignment = alignments[0] if alignments else "scatter"

    def keeping(block: BlockShape) -> PlanShape:
        table = dataclasses.replace(t.shape(), blocks=(block,))
        return dataclasses.replace(plan.shape(), tables=(*plan.tables[:number], table, *plan.tables[number + 1 :]))

    columns = [keeping(BlockShape(t.num_rows, tuple(range(width)), alignment)) for width in (1, t.width)]
    larger = {
        "columns": min(columns, key=lambda plan: plan.num_params),
        "rows": keeping(BlockShape(1, tuple(range(t.width)), alignment)),
        "sizes": keeping(BlockShape(1, 1, "project")),
    }
    units = set(adds)
    cut = any(other.has_dropped and other.output_width for other in plan.tables)
    if units >= {"columns", "rows"}:
        units.remove("columns" if cut or larger["rows"].num_params > larger["columns"].num_params else "rows")
    elif cut:
        units.discard("columns")
    for unit in sorted(units):
        yield f"the first of the {unit} of {t.name}", larger[unit]


def check_keep_all_is_the_identity(task: Task, config: Config) -> None:
    """A plan that keeps everything gives the model back, and a budget of 100% is filled."""
    plan = task.full_plan()
    check_filled(search(task, config, "100%"), config, Budget.parse("100%"))
    small = compact(task.model, plan, init="inherit")
    batch = next(iter(task.batches("train")))
    with torch.no_grad():
        same = torch.equal(task.loss(small.eval(), batch), task.loss(task.model.eval(), batch))
    assert same, "compacted by a plan that keeps everything, the model has another loss"


def check_plan_round_trips(task: Task, config: Config) -> None:
    """A plan that is saved and read again is the same."""
    plan = search(task, config, "30%")
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        again = SizePlan.load(Path(folder) / "plan.json")
    assert again.diff(plan) == "", again.diff(plan)
    for name in ("num_params", "method", "details"):
        saved, read = getattr(plan, name), getattr(again, name)
        assert read == saved, f"{name} of the plan, {saved!r}, is read as {read!r}"


def check_compact_equals_masked(task: Task, config: Config) -> None:
    """The compact model equals the masked model; for a plan of sizes, it equals a naive lookup of each value."""
    plan = search(task, config, "40%", seed=1)
    assert any(t.output_width for t in plan.tables), "nothing is kept"
    verify(task.model, plan, task.data if isinstance(task, CTRTask) else task).require()


def check_only_declared_parameters_move(task: Task, config: Config) -> None:
    """A search does not change the model, and reads trained weights only if the method declares it."""
    model = task.model
    before, training = copy.deepcopy(model.state_dict()), model.training
    trained = [p.requires_grad for p in model.parameters()]
    plan = search(task, config, "30%")
    assert model.training == training, "the model's mode changed"
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert not moved, f"the search moved {moved}"
    assert all(p.grad is None for p in model.parameters()), "gradients are left"
    assert [p.requires_grad for p in model.parameters()] == trained, "the search changed which weights are trained"
    assert not any(map(has_forward_hooks, model.modules())), "hooks are left"
    if isinstance(model, CTRModel):
        assert (model.tables.slot_gate, model.tables.row_gate) == (None, None), "gates are left"
    if method_of(config).needs != "trained":
        other = copy.copy(task)
        other.model = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(20_240_101)  # a seed other than those of the model's weights
        with torch.no_grad():
            for p in other.model.parameters():
                p.add_(torch.randn(p.shape, generator=generator).to(p))
        assert search(other, config, "30%").diff(plan) == "", (
            "the plan depends on trained weights, which are not declared"
        )


CHECKS: Mapping[str, Callable[[Task, Config], None]] = {
    "same seed, same plan": check_same_seed_same_plan,
    "budget holds and is full": check_budget,
    "keep-all is the identity": check_keep_all_is_the_identity,
    "plan round-trips": check_plan_round_trips,
    "compact equals masked": check_compact_equals_masked,
    "only declared parameters move": check_only_declared_parameters_move,
}


def check_method(config: Config) -> None:
    """Check every promise of a search method on every toy task, which takes seconds for a method without training.

    Args:
        config: Settings of the method; the method is registered (`embtrim.methods.register`).

    Raises:
        AssertionError: Promises are broken; the message has a line for each, with the task and what was found.
        ConfigError: `config` belongs to no method.

    Example:
        >>> from embtrim import methods, testing
        >>> testing.check_method(methods.FrequencyConfig())
    """
    name, broken = method_of(config).name, []
    for task_name, make_task in TASKS.items():
        task = make_task()
        for promise, check in CHECKS.items():
            if fault := broken_promise(check, task, config):
                broken.append(f"{promise!r} on the task {task_name!r}: {fault}")
    count = len(CHECKS) * len(TASKS)
    if broken:
        raise AssertionError("\n  ".join([f"method {name!r} breaks {len(broken)} of {count} promises:", *broken]))


def broken_promise(check: Callable[[Task, Config], None], task: Task, config: Config) -> str:
    """What a check finds wrong with a method, in one line; empty if the promise holds. The check gets a copy of the task."""
    try:
        check(copy.deepcopy(task), config)
    except AssertionError as error:
        return " ".join(str(error).split())
    except Exception as error:  # in the method's code; the other promises are still checked
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


# ---- planted signal ----------------------------------------------------------------------------------------------------


def kept_shares(plan: SizePlan) -> dict[str, float]:
    """The share of each table's entries that a plan keeps."""
    return {t.name: sum(b.num_rows * b.width for b in t.blocks) / max(1, t.num_rows * t.width) for t in plan.tables}


def check_planted(config: Config) -> None:
    """Noise goes first: within a budget that strong and weak could fill alone, nearly no noise is kept, and most of strong."""
    kept = kept_shares(search(copy.deepcopy(noisy_task()), config, "20%"))
    said = ", ".join(f"{share:.1%} of {name}" for name, share in kept.items())
    assert kept["noise"] < 0.05, f"noise is kept: {said}"
    assert kept["strong"] > kept["weak"], f"the weak field is preferred to the strong one: {said}"
