"""Whether a foreign model works with other modules in the place of its embeddings, tried on a batch before a search."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embtrim.compaction.foreign import compact_module
from embtrim.errors import ModelError
from embtrim.plan.table import Block, TablePlan
from embtrim.system.modules import copied, evaluating, graph_tensors, named_modules, uncompiled
from embtrim.system.torch_private import tree_leaves
from embtrim.tables.replacements import CompactEmbedding, CompactEmbeddingBag, Replacement
from embtrim.tasks.sites import ModuleSite
from embtrim.tasks.task import Task
from embtrim.tasks.watching import reads_of_batch, reads_seen

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
    left_out = list(graph_tensors(task.model))  # a forward pass under no_grad makes them anew, without graphs
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
            _check_norms(task, sites, batch)
            _compare(task, sites, batch, expected)
            _try(partial(run, task, narrow, batch), [site.path for site in sites], left_out)


def run(task: Task, model: nn.Module, batch: Any) -> Run:
    """What a model gives for a batch; the random numbers that it draws are the same at every call."""
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda _module, _args, output: outputs.extend(_tensors(output)))
    try:
        with torch.random.fork_rng([]):  # a loss may draw negatives
            loss = task.loss(model, batch)
    finally:
        hook.remove()
    return Run(outputs, loss)


def tensors_of(call: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> list[Tensor]:
    """The tensors that a function of a model and a batch gives; the random numbers drawn are the same at every call."""
    with torch.random.fork_rng([]):
        return _tensors(call(model, batch))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |found - expected| / (1 + |expected|); infinite where only one of them is a number."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    return max((_difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    same = (found == expected) | (found.isnan() & expected.isnan())
    apart = torch.where(same, 0.0, (found - expected).abs() / (1 + expected.abs()))
    return float(apart.nan_to_num(nan=float("inf")).max()) if apart.numel() else 0.0


def _check_norms(task: Task, sites: Sequence[ModuleSite], batch: Any) -> None:
    """Raise ModelError for a table that max_norm changes as it is looked up, and whose weight is read beside that."""
    limited = [site for site in sites if site.module.max_norm is not None]
    for path, reads in reads_of_batch(task.model, limited, task.loss, batch).items():
        if any(reads.counts[how] for how in ("index", "product", "whole")):
            raise ModelError(
                f"{path!r} has a max_norm, which changes its rows as they are looked up, and its weight is read otherwise "
                f"too; {ADVICE}"
            )


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
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(reads_seen(site, lambda _read, path=site.path: calls.append(path)))
        try:
            found = run(task, copy, batch)
        except ModelError:
            raise
        except Exception as error:  # a model may fail in any way
            return f"{_failure(error)}, such as isinstance(m, nn.Embedding)"
    if calls:
        raise ModelError(
            f"a copy of the model reads {calls[0]!r} of the model itself, because {_functions(task.model)} a function made of the "
            "model; use model.compile() instead of forward = torch.compile(forward), define the function in the class, and "
            "let loss= read the model that it is given"
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


def _try(work: Callable[[], Any], paths: Sequence[str], left_out: Sequence[str]) -> None:
    try:
        work()
    except ModelError:
        raise
    except Exception as error:  # a model may fail in any way
        listed = ", ".join(map(repr, paths))
        raise ModelError(
            f"narrow tables cannot take the place of {listed}: {_failure(error)}{_left_out(left_out)}; {ADVICE}"
        ) from error


def _left_out(names: Sequence[str]) -> str:
    """The attributes that a copy of a model lacks until its forward makes them, in words; empty if there are none."""
    listed = ", ".join(map(repr, names[:3]))
    said = "is the result of a computation; keep value.detach(), or compute it in forward before it is read"
    return f". A copy lacks its attribute {listed}, which {said}" if names else ""


def _failure(error: Exception) -> str:
    said = str(error).partition("\n")[0]
    return f"the model then fails ({type(error).__name__}: {said}); it does more with the embedding than call it"
