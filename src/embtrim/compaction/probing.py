"""Whether a foreign model works with other modules in the place of its embeddings, tried on a batch before a search."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embtrim.compaction.foreign import compact_module
from embtrim.errors import ModelError
from embtrim.plan.table import Block, TablePlan
from embtrim.system.modules import copied, evaluating, named_modules, uncompiled
from embtrim.system.torch_private import tree_leaves
from embtrim.tables.replacements import CompactEmbedding, CompactEmbeddingBag, Replacement
from embtrim.tasks.sites import ModuleSite
from embtrim.tasks.task import Task

# Foreign modules are compared in their own precision: |a - b| <= tolerance * (1 + |b|).
MODULE_TOLERANCE = 1e-5

ADVICE = "leave it alone with the Task's exclude="


class Run(NamedTuple):
    """What a model gave for a batch: every tensor that its forward returned during the loss, and the loss."""

    outputs: list[Tensor]
    loss: Tensor


@torch.no_grad()
def check_compactable(task: Task) -> None:
    """Run a batch through copies of a foreign model, before a search that could not be used otherwise.

    One copy has narrow tables. The other has all its tables in other modules, which share the weights: it must give what the
    model gives.

    Raises:
        ModelError: The model or its loss reads more of a searched embedding than calling it gives, such as its weight or its
            type; a copy of the model still calls the embeddings of the model itself; an attribute cannot be copied; or the
            loss is not a scalar tensor.
    """
    full = task.full_plan()
    plan = full.with_columns({table.name: (0,) for table in full.tables})
    narrow = compact_module(task.model, plan, "inherit", None).eval()
    sites = [site for site in task.sites(task.model) if isinstance(site, ModuleSite)]
    with evaluating(task.model), uncompiled(), torch.random.fork_rng([]):  # a loader may draw its order
        for batch in task.probe():
            expected = run(task, task.model, batch)
            if not isinstance(expected.loss, Tensor) or expected.loss.numel() != 1:
                loss = expected.loss
                given = (
                    f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                )
                raise ModelError(
                    f"the Task's loss= must give the mean loss of a batch as a scalar tensor, it gave {given}"
                )
            _compare(task, sites, batch, expected)
            _try(partial(run, task, narrow, batch), [site.path for site in sites])


def run(task: Task, model: nn.Module, batch: Any) -> Run:
    """What a model gives for a batch; the random numbers that it draws are the same at every call."""
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(
        lambda _module, _args, output: outputs.extend(x for x in tree_leaves(output) if isinstance(x, Tensor))
    )
    try:
        with torch.random.fork_rng([]):  # a loss may draw negatives
            loss = task.loss(model, batch)
    finally:
        hook.remove()
    return Run(outputs, loss)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |found - expected| / (1 + |expected|); infinite where only one of them is a number."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    return max((_difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    same = (found == expected) | (found.isnan() & expected.isnan())
    apart = torch.where(same, 0.0, (found - expected).abs() / (1 + expected.abs()))
    return float(apart.nan_to_num(nan=float("inf")).max()) if apart.numel() else 0.0


# ---- a copy whose tables are the model's -------------------------------------------------------------------------------


def _compare(task: Task, sites: Sequence[ModuleSite], batch: Any, expected: Run) -> None:
    """Raise ModelError unless a copy with other modules for its tables gives what the model gives."""

    def fault_of(some: Sequence[ModuleSite]) -> str | None:
        return _fault(task, some, batch, expected)

    if fault_of(sites) is None:
        return
    again = run(task, task.model, batch)
    if difference([*again.outputs, again.loss], [*expected.outputs, expected.loss]) > MODULE_TOLERANCE:
        return  # it never gives the same twice
    culprit, fault = next(
        ((site.path, fault) for site in sites if (fault := fault_of([site])) is not None),
        ("its embeddings", fault_of(sites)),
    )
    raise ModelError(f"{culprit!r} cannot be replaced: {fault}; {ADVICE}")


def _fault(task: Task, sites: Sequence[ModuleSite], batch: Any, expected: Run) -> str | None:
    """What goes wrong where equal tables stand in for the embeddings of some sites; None if nothing does."""
    copy = _with_stand_ins(task.model, sites)
    calls: list[str] = []
    with _noted_calls(sites, calls):
        try:
            found = run(task, copy, batch)
        except ModelError:
            raise
        except Exception as error:  # a model may fail in any way
            return f"{_failure(error)}, such as isinstance(m, nn.Embedding)"
    if calls:
        raise ModelError(
            f"a copy of the model calls {calls[0]!r} of the model itself, because {_functions(task.model)} a function made of the "
            "model; use model.compile() instead of forward = torch.compile(forward), or define the function in the class"
        )
    outputs = difference(found.outputs, expected.outputs)
    if outputs > MODULE_TOLERANCE:
        return (
            f"the output changes by {outputs:.1e} where an equal table takes its place: forward does more than call it"
        )
    loss = difference([found.loss], [expected.loss])
    if loss > MODULE_TOLERANCE:
        return (
            f"the loss changes by {loss:.1e} where an equal table takes its place, though the output stays: loss= looks at the "
            "modules, such as isinstance(m, nn.Embedding) for a penalty. Penalise a list of weights that the model keeps, or"
        )
    return None


def _with_stand_ins(model: nn.Module, sites: Sequence[ModuleSite]) -> nn.Module:
    """A copy of a model that shares its parameters and has compact tables of full size for its embeddings."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    replaced: list[tuple[ModuleSite, Replacement]] = []
    for site in sites:
        module = site.module
        rows, width = module.num_embeddings, module.embedding_dim
        table = TablePlan(site.path, rows, width, (Block(rows, tuple(range(width))),))
        entries = CompactEmbedding(table, module.padding_idx, module.max_norm, module.norm_type, module.sparse)
        entries.weights = nn.ParameterList([module.weight])
        stand_in = CompactEmbeddingBag(entries, module) if isinstance(module, nn.EmbeddingBag) else entries
        stand_in.path = site.path
        replaced.append((site, stand_in))
        memo.update((id(module), stand_in) for module in site.modules)
    copy = copied(model, memo)
    for site, stand_in in replaced:
        stand_in.take_attributes(site.module, memo)
    return copy


@contextmanager
def _noted_calls(sites: Sequence[ModuleSite], calls: list[str]) -> Iterator[None]:
    """Note the paths of embeddings that are called inside a `with` block."""
    hooks = [
        module.register_forward_hook(partial(lambda path, *_: calls.append(path), site.path))
        for site in sites
        for module in site.modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _functions(model: nn.Module) -> str:
    """The attributes that are functions, in words: a copy shares them."""
    found = (
        f"{path}.{name}" if path else name
        for path, module in named_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, (types.FunctionType, partial))
    )
    names = [repr(name) for name in itertools.islice(found, 3)]
    return f"attribute {', '.join(names)} is" if names else "an attribute is"


def _try(work: Callable[[], Any], paths: Sequence[str]) -> None:
    try:
        work()
    except ModelError:
        raise
    except Exception as error:  # a model may fail in any way
        listed = ", ".join(map(repr, paths))
        raise ModelError(f"narrow tables cannot take the place of {listed}: {_failure(error)}; {ADVICE}") from error


def _failure(error: Exception) -> str:
    said = str(error).partition("\n")[0]
    return f"the model then fails ({type(error).__name__}: {said}); it does more with the embedding than call it"
