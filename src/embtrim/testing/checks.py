"""What every search method promises, as checks that anyone can run on a method of their own.

    from embtrim import testing
    for name, check in testing.CHECKS.items():
        check(testing.zoo_task(), MyConfig())          # AssertionError says what does not hold
    testing.check_planted(MyConfig())                  # no promise: rules that look at no label cannot hold it

`python -m embtrim.testing` runs all methods on a zoo model and on three foreign modules and prints the matrix.
Data are made here, with a planted signal of known shape.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.config import Config
from embtrim.data.dataset import EncodedDataset, SplitArrays
from embtrim.errors import BudgetError
from embtrim.methods import METHODS, MagnitudeConfig, SSEDSConfig, method_of, search
from embtrim.models import FNN, DeepFM
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.budget import Budget
from embtrim.plan.limits import full_limit
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Alignment, BlockShape, TableShape
from embtrim.schema import PAD, FieldSpec, Schema
from embtrim.tasks.survey import Fields
from embtrim.tasks.task import CTRTask, Task
from embtrim.training.fitting import fit
from embtrim.training.settings import TrainConfig

BUDGETS = ("80%", "30%", "12%", "500 params", "2500 bytes")


# ---- toy tasks ---------------------------------------------------------------------------------------------------------


def planted_data(
    num_rows: int = 6000,
    noise_vocab: int = 2000,
    seed: int = 0,
    multi: bool = False,
    dense: bool = False,
    strong_vocab: int = 30,
    weak_vocab: int = 20,
) -> EncodedDataset:
    """Data with a planted signal: fields strong, weak (a third of its effect) and noise (no signal).

    Args:
        num_rows: rows of all splits, 8:1:1.
        noise_vocab: values of the noise field.
        seed: of the data.
        multi: add a multi-valued field with signal, "tags" (12 values).
        dense: add a dense field with signal, "price".
        strong_vocab: values of the strong field.
        weak_vocab: values of the weak field.
    """
    rng = np.random.default_rng(seed)
    fields = [
        FieldSpec(name="strong", vocab_size=strong_vocab),
        FieldSpec(name="weak", vocab_size=weak_vocab),
        FieldSpec(name="noise", vocab_size=noise_vocab),
    ]
    columns = [rng.integers(0, f.vocab_size, num_rows) for f in fields]
    score = 2.0 * rng.normal(size=strong_vocab)[columns[0]] + 0.7 * rng.normal(size=weak_vocab)[columns[1]]
    if multi:
        fields.append(FieldSpec(name="tags", vocab_size=12, type="multi", max_len=3))
        tags = rng.integers(0, 12, (num_rows, 3))
        tags[:, 1:][rng.random((num_rows, 2)) < 0.4] = PAD
        columns += list(tags.T)
        score = score + rng.normal(size=12)[tags[:, 0]]
    dense_values = None
    if dense:
        fields.append(FieldSpec(name="price", type="dense", transform="none"))
        dense_values = rng.normal(size=(num_rows, 1)).astype(np.float32)
        score = score + 0.5 * dense_values[:, 0]
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-score))).astype(np.float32)
    ids = np.stack(columns, 1).astype(np.int32)
    cuts = {
        "train": slice(0, num_rows * 8 // 10),
        "valid": slice(num_rows * 8 // 10, num_rows * 9 // 10),
        "test": slice(num_rows * 9 // 10, None),
    }
    splits = {
        name: SplitArrays(ids[rows], labels[rows], None if dense_values is None else dense_values[rows])
        for name, rows in cuts.items()
    }
    return EncodedDataset(Schema(label="y", fields=tuple(fields)), splits)


def zoo_task(epochs: int = 1) -> CTRTask:
    """A trained DeepFM of width 8 on planted data."""
    data = planted_data(num_rows=2000, noise_vocab=200)
    model = DeepFM(data.schema, embedding_dim=8, hidden_units=(8,))
    config = TrainConfig(epochs=epochs, batch_size=256)
    fit(model, data, config)
    return CTRTask(model, data, config)


class ForeignModel(nn.Module):
    """A stranger's model: an nn.Embedding per field, of unequal widths, one of them used twice, one of width 1."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(40, 6)
        self.item = nn.Embedding(25, 4, padding_idx=0)
        self.bias = nn.Embedding(40, 1)
        self.head = nn.Sequential(nn.Linear(6 + 4 + 4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) logits of (user, item, item) ids."""
        parts = [self.user(ids_BC[:, 0]), self.item(ids_BC[:, 1]), self.item(ids_BC[:, 2])]
        return (self.head(torch.cat(parts, 1)) + self.bias(ids_BC[:, 0])).squeeze(1)


class PooledModel(nn.Module):
    """A stranger's model of other habits: a flat table of users and cities, a bag of items padded with 0, shared."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Embedding(40 + 12, 6)
        self.history = nn.EmbeddingBag(25, 4, mode="mean", padding_idx=0)
        self.recent = nn.EmbeddingBag(25, 4, mode="mean", padding_idx=0)
        self.recent.weight = self.history.weight
        self.head = nn.Sequential(nn.Linear(6 + 6 + 4 + 4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) logits of (user, item, item) ids; the city is the user's number modulo 12."""
        users = torch.stack([ids_BC[:, 0], 40 + ids_BC[:, 0] % 12], 1)
        parts = [self.flat(users).flatten(1), self.history(ids_BC[:, 1:]), self.recent(input=ids_BC[:, 2:])]
        return self.head(torch.cat(parts, 1)).squeeze(1)


class OddModel(nn.Module):
    """A stranger's model of rare habits: a path with brackets, rows held to a norm, a table that no batch reads."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({"item": nn.Embedding(25, 6), "user[id]": nn.Embedding(40, 4, max_norm=2.0)})
        self.unused = nn.Embedding(10, 4)
        self.head = nn.Linear(6 + 4, 1)

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) logits of (user, item, item) ids; the second item is not read."""
        parts = [self.tables["item"](ids_BC[:, 1]), self.tables["user[id]"](ids_BC[:, 0])]
        return self.head(torch.cat(parts, 1)).squeeze(1)


def foreign_batches(num: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (ids, labels) for ForeignModel; the label is told by the user."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        ids = torch.stack([torch.randint(0, n, (64,), generator=generator) for n in (40, 25, 25)], 1)
        yield ids, (ids[:, 0] % 2).float()


def foreign_task(model_class: type[nn.Module] = ForeignModel, fields: Fields | None = None) -> Task:
    """A ForeignModel, or one that is called alike, with everything a search may ask for."""

    def fresh(seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return model_class()

    batches = list(foreign_batches())
    return Task(
        fresh(0),
        lambda model, batch: nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1]),
        train=batches,
        valid=batches,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        fresh=fresh,
        fields=fields,
    )


def pooled_task() -> Task:
    """A PooledModel with everything a search may ask for."""
    return foreign_task(PooledModel, {"flat": {"user": 40, "city": 12}})


def odd_task() -> Task:
    """An OddModel with everything a search may ask for."""
    return foreign_task(OddModel)


TASKS: Mapping[str, Callable[[], Task]] = {
    "zoo": zoo_task,
    "foreign": foreign_task,
    "pooled": pooled_task,
    "odd": odd_task,
}


# ---- checks ------------------------------------------------------------------------------------------------------------


def check_same_seed_same_plan(task: Task, config: Config) -> None:
    """Two searches with one seed find one plan, whatever the state of the global generators."""
    first = search(task, config, "50%", seed=3)
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 (somebody else's code may draw from it)
    second = search(task, config, "50%", seed=3)
    assert first.diff(second) == "", f"same seed, other plan:\n{first.diff(second)}"


def check_budget(task: Task, config: Config) -> None:
    """No budget is exceeded, and no further unit that the method may add still fits."""
    for budget in BUDGETS:
        try:
            plan = search(task, config, budget)
        except BudgetError:
            assert getattr(config, "min_dim", 0), f"{budget} was refused"
            continue
        check_filled(plan, config, Budget.parse(budget))


def check_filled(plan: SizePlan, config: Config, budget: Budget) -> None:
    """A plan does not exceed its budget, and no further unit that the method may add still fits."""
    limit = plan.max_params(budget)
    assert plan.num_params <= limit, f"{plan.num_params:,} parameters, {budget} allows {limit:,}"
    natural = plan.details.get("natural_params")
    if natural is not None and natural <= limit:
        return  # the method wants no more than this
    for unit, larger in one_unit_larger(plan, method_of(config).adds):
        assert larger.num_params > full_limit(larger, budget), f"{budget}: {unit} would still fit"


def one_unit_larger(plan: SizePlan, adds: tuple[str, ...]) -> Iterator[tuple[str, PlanShape]]:
    """Plans that keep one column, one row or one row's size more; rows are only counted."""
    for number, t in enumerate(plan.tables):
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
            yield (
                unit,
                dataclasses.replace(plan.shape(), tables=(*plan.tables[:number], table, *plan.tables[number + 1 :])),
            )


def first_units(plan: PlanShape, number: int, adds: tuple[str, ...]) -> Iterator[tuple[str, PlanShape]]:
    """Plans that keep a column, a row or a row's smallest size of a table that keeps nothing so far.

    A method that adds columns or rows adds rows where the plan has cut some. Where it has not, only the dearer of the two
    is sure not to fit. Columns alone are added to the rows that a method keeps, which may be none where it cuts rows.
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
    """A plan that keeps everything gives the model back, and a method that fills budgets keeps it within the whole one."""
    plan = task.full_plan()
    check_filled(search(task, config, "100%"), config, Budget.parse("100%"))
    small = compact(task.model, plan, init="inherit")
    batch = next(iter(task.batches("train")))
    with torch.no_grad():
        assert torch.equal(task.loss(small.eval(), batch), task.loss(task.model.eval(), batch))


def check_plan_round_trips(task: Task, config: Config) -> None:
    """A plan that was saved and read again is the same."""
    plan = search(task, config, "30%")
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        again = SizePlan.load(Path(folder) / "plan.json")
    assert again.diff(plan) == "", again.diff(plan)
    assert (again.num_params, again.method, again.details) == (plan.num_params, plan.method, plan.details)


def check_compact_equals_masked(task: Task, config: Config) -> None:
    """The compact model equals the masked one; of a plan that only counts columns, a naive lookup of each value."""
    plan = search(task, config, "40%", seed=1)
    assert any(t.output_width for t in plan.tables), "nothing is kept"
    verify(task.model, plan, task.data if isinstance(task, CTRTask) else task).require()


def check_only_declared_parameters_move(task: Task, config: Config) -> None:
    """A search leaves the model as it was, and reads trained weights only if it says so."""
    model = task.model
    before, training = copy.deepcopy(model.state_dict()), model.training
    plan = search(task, config, "30%")
    assert model.training == training, "the model's mode changed"
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert not moved, f"the search moved {moved}"
    assert all(p.grad is None and p.requires_grad for p in model.parameters()), "gradients or flags are left"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks are left"
    if isinstance(model, CTRModel):
        assert (model.tables.slot_gate, model.tables.row_gate) == (None, None), "gates are left"
    if method_of(config).needs != "trained":
        other = copy.copy(task)
        other.model = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(20_240_101)  # no seed that the model's own weights were drawn with
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


# ---- planted signal ----------------------------------------------------------------------------------------------------


def planted_task(seed: int = 1, noise_vocab: int = 400) -> CTRTask:
    """An FNN of width 8 at its best epoch; strong and weak have 400 values each."""
    data = planted_data(num_rows=8000, noise_vocab=noise_vocab, seed=seed, strong_vocab=400, weak_vocab=400)
    config = TrainConfig(
        epochs=2, batch_size=256, learning_rate=3e-3, patience=0, reduce_lr=1.0, precision="fp32", tables="dense"
    )
    model = FNN(data.schema, embedding_dim=8, hidden_units=(32,), init_std=0.01)
    task = CTRTask(model, data, config)
    task.fit(model, epochs=2, seed=0)
    return task


def kept_shares(plan: SizePlan) -> dict[str, float]:
    """Kept share of each table's entries."""
    return {t.name: sum(b.num_rows * b.width for b in t.blocks) / max(1, t.num_rows * t.width) for t in plan.tables}


@functools.cache
def noisy_task() -> CTRTask:
    """A planted task whose noise has 2,000 values: seven tenths of all parameters."""
    return planted_task(noise_vocab=2000)


def check_planted(config: Config) -> None:
    """Noise goes first: at a budget that strong and weak could fill alone nearly none of it is kept, and most of strong."""
    kept = kept_shares(search(copy.deepcopy(noisy_task()), config, "20%"))
    said = ", ".join(f"{share:.1%} of {name}" for name, share in kept.items())
    assert kept["noise"] < 0.05, f"noise is kept: {said}"
    assert kept["strong"] > kept["weak"], f"the weak field is preferred to the strong one: {said}"


# Of the matrix' rows those that keep planted noise: why, and the settings that mend it, if any do.
KEEPS_NOISE: Mapping[str, tuple[str, Config | None]] = {
    "uniform": ("one width for all fields", None),
    "random": ("it looks at nothing", None),
    "mde": ("it knows the size of a field, not its worth", None),
    "magnitude": ("a column of many rows has a large norm", MagnitudeConfig(cost_aware=True)),
    "sseds": ("every table keeps a column, so that no score takes the last one of an id", SSEDSConfig(min_dim=0)),
    "sseds-faithful": ("|g| of training data takes what was learned by heart for useful", SSEDSConfig(min_dim=0)),
    "optembed": ("rows learned by heart have large norms, and a table that keeps rows keeps a column", None),
    "optembed-faithful": (
        "its thresholds hardly move in so few steps, and a table that keeps rows keeps a column",
        None,
    ),
    "pme": ("at initialisation the saliency of a value tells little more than how often it occurs", None),
}


# ---- the matrix --------------------------------------------------------------------------------------------------------


def matrix_configs() -> dict[str, Config]:
    """The rows of the matrix: every method with its defaults, and with the preset "faithful" if it has one."""
    configs = {name: method.config() for name, method in METHODS.items()}
    presets = {name: method for name, method in METHODS.items() if hasattr(method.config, "faithful")}
    return {**configs, **{f"{name}-faithful": method.parse({"preset": "faithful"}) for name, method in presets.items()}}


def conformance_matrix(configs: Mapping[str, Config]) -> str:
    """Run all checks with these configs on the toy tasks: a markdown table, one line a config and task.

    The last column is `check_planted`, which has a task of its own.
    """
    names = [*CHECKS, "planted noise goes first"]
    lines = [f"| method | task | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for task_name, make_task in TASKS.items():
        task = make_task()
        for name, config in configs.items():
            cells = []
            for check in CHECKS.values():
                try:
                    check(task, config)
                    cells.append("holds")
                except AssertionError as error:
                    cells.append(f"FAILS: {error}".replace("\n", " "))
            cells.append(planted_cell(name, config) if task_name == "zoo" else "-")
            lines.append(f"| {name} | {task_name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def planted_cell(name: str, config: Config) -> str:
    """What `check_planted` says of a row of the matrix, in words; where it is known to fail, also of what mends it."""
    try:
        check_planted(config)
        return "holds"
    except AssertionError as error:
        if name not in KEEPS_NOISE:
            return f"FAILS: {error}"
        why, mended = KEEPS_NOISE[name]
        text = f"fails as expected, {error} ({why})"
    if mended is None:
        return text
    check_planted(mended)
    changes = [f"{key} = {value!r}" for key, value in mended if value != getattr(config, key)]
    return f"{text}; holds with {', '.join(changes)}"
