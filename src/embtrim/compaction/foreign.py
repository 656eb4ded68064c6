"""compact for foreign modules: smaller embeddings of the same output width replace those of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.compaction.inheriting import check_inheritable, kept_rows_of
from embtrim.errors import ModelError, PlanError
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import TablePlan
from embtrim.system.modules import copied, named_modules
from embtrim.tables.replacements import CompactEmbedding, CompactEmbeddingBag, CompactFlatEmbedding, Replacement
from embtrim.tables.ties import tie
from embtrim.tasks.sites import ModuleSite
from embtrim.tasks.survey import fields_of, find_sites, site_plan

Init = Literal["scratch", "initial", "inherit", "low_rank"]

# Parts of the concatenation that each nn.Linear reads, by its path; see `compact`.
LinearReads = Mapping[str, Sequence[str | int]]


def module_sites(model: nn.Module, plan: SizePlan) -> list[ModuleSite]:
    """Sites of a foreign module that a plan names; PlanError if the plan was made for other sites."""
    names = {table.name for table in plan.tables}
    flat = {path: fields for path, fields in fields_of(model, plan).items() if fields}
    sites = [s for s in find_sites(model, fields=flat) if isinstance(s, ModuleSite) and s.names[0] in names]
    found = site_plan(sites)
    if found.fingerprint != plan.fingerprint:
        ours, theirs = ({t.name: f"{t.num_rows:,} x {t.width}" for t in p.tables} for p in (found, plan))
        name = next((name for name in theirs if ours.get(name) != theirs[name]), None)
        what = "" if name is None else f" ({name!r} is {theirs[name]} in the plan, here {ours.get(name, 'missing')})"
        raise PlanError(
            f"plan was made for embeddings {plan.fingerprint}, this model has {found.fingerprint}{what}; search again"
        )
    return sites


def compact_module(model: nn.Module, plan: SizePlan, init: Init, seed: int | None) -> nn.Module:
    """A copy of a foreign module with smaller embeddings of the same output width."""
    if init == "initial":
        raise ModelError("init = 'initial' needs a zoo model; build a fresh foreign module and use 'inherit'")
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    tables = iter(plan.tables)
    memo: dict[int, Any] = {}
    in_pieces: list[tuple[ModuleSite, list[nn.Parameter]]] = []
    replaced: list[tuple[ModuleSite, Replacement]] = []
    for site in module_sites(model, plan):
        found = [_compact_table(site, next(tables), weight, init, generator) for weight in site.weights()]
        replacement: Replacement = found[0] if len(found) == 1 else CompactFlatEmbedding(found, site.module.padding_idx)
        if isinstance(site.module, nn.EmbeddingBag):
            replacement = CompactEmbeddingBag(replacement, site.module)  # type: ignore[arg-type]
        replacement.path = site.path
        replaced.append((site, replacement))
        replacement.to(site.module.weight.device).train(site.module.training)
        # The replacement goes wherever the model keeps the module, or its weight in a list (as for a penalty).
        memo.update((id(module), replacement) for module in site.modules)
        pieces = [weight for table in found for weight in table.weights]
        for weight in pieces:  # what a model notes on a weight, such as that it does not decay
            vars(weight).update(vars(site.module.weight))
        if len(pieces) == 1:
            memo[id(site.module.weight)] = pieces[0]
        else:
            in_pieces.append((site, pieces))
    small = copied(model, memo)
    for site, replacement in replaced:
        replacement.take_attributes(site.module, memo)
        for reader, name in site.readers:
            tie(memo[id(reader)], name, replacement)
    for site, pieces in in_pieces:
        stale = memo.get(id(site.module.weight))
        if stale is not None and not _replace_in_lists(small, stale, pieces, found=bool(site.readers)):
            raise ModelError(
                f"the model keeps the weight of {site.path!r} outside of its modules too, and not just in lists; this plan "
                f"stores it in {len(pieces)} pieces, which cannot take its place; leave it alone with the Task's exclude="
            )
    return small


def _replace_in_lists(model: nn.Module, stale: Tensor, pieces: Sequence[Tensor], found: bool) -> bool:
    """Replace a weight by its pieces in the lists that a model's attributes hold; False if it is kept elsewhere too.

    Args:
        model: Copy of the model.
        stale: The weight's copy.
        pieces: What takes its place.
        found: Whether it is known why the weight was copied; otherwise a list must hold it.
    """
    containers: list[Any] = [vars(module) for module in model.modules()]
    seen: set[int] = set()
    while containers:
        container = containers.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        values = list(container.values() if isinstance(container, dict) else container)
        if any(value is stale for value in values):
            if not isinstance(container, list):
                return False
            container[:] = [new for value in values for new in (pieces if value is stale else [value])]
            found = True
        containers.extend(value for value in values if isinstance(value, (dict, list, tuple)))
    return found


@torch.no_grad()
def narrow_linears(small: nn.Module, reads: LinearReads) -> None:
    """Let the named Linears of a compact foreign module read only the columns that its tables store."""
    narrowed: list[CompactEmbedding | CompactEmbeddingBag] = []
    for path, parts in reads.items():
        linear = _submodule(small, path)
        if type(linear) is not nn.Linear:
            raise ModelError(f"reads= names {path!r}, which is {_kind(linear)}; name an nn.Linear")
        kept, width = [], 0
        for part in parts:
            if isinstance(part, int):
                kept.append(torch.arange(width, width + part))
                width += part
                continue
            module = _submodule(small, part)
            entries = module.entries if isinstance(module, CompactEmbeddingBag) else module
            if not isinstance(entries, CompactEmbedding):
                raise ModelError(
                    f"{path!r} reads {part!r}, which is {_kind(module)}; name embeddings that were found, of one field "
                    "each, or numbers of other columns"
                )
            kept.append(width + entries.columns.cpu())
            width += entries.embedding_dim
            narrowed.append(module)  # type: ignore[arg-type]
        if width != linear.in_features:
            raise ModelError(
                f"the parts that reads= names for {path!r}, {', '.join(map(str, parts))}, have {width:,} columns, but it "
                f"takes {linear.in_features:,}; name every part of the concatenation, in order"
            )
        columns_S = torch.cat(kept)
        # In place: a list of the model, as for a penalty, may hold this weight.
        linear.weight.data = linear.weight.data[:, columns_S.to(linear.weight.device)]
        linear.in_features = len(columns_S)
        # An export states the input width of the full model.
        linear.full_in_features = width  # type: ignore[assignment]
    for module in narrowed:
        module.narrow()


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    return dict(named_modules(model, remove_duplicate=False)).get(path)


def _kind(module: nn.Module | None) -> str:
    return "not a module of this model" if module is None else f"a {type(module).__name__}"


@torch.no_grad()
def _compact_table(
    site: ModuleSite, table: TablePlan, weight_VD: Tensor, init: Init, generator: torch.Generator
) -> CompactEmbedding:
    """The compact table of a foreign module, with its weights."""
    module = site.module
    padding = site.reserved_rows[site.names.index(table.name)]
    compacted = CompactEmbedding(table, padding, module.max_norm, module.norm_type, module.sparse).to(weight_VD.dtype)
    if init == "inherit":
        check_inheritable(table)
        for kept_rows, compact_ids in kept_rows_of(table):
            compacted.set_rows(compact_ids, weight_VD[torch.from_numpy(kept_rows)][:, list(table.columns)])
        select_columns(table, compacted)
    else:
        # New rows get the spread of the present ones: a foreign module does not tell how it was initialised.
        for weight in compacted.weights:
            weight.normal_(0, float(weight_VD.std()), generator=generator)
        for projection in compacted.projections.values():
            projection.normal_(0, len(projection) ** -0.5, generator=generator)
        zeros = [i for i in (compacted.padding_row, table.dropped_id) if i is not None]
        compacted.set_rows(np.array(zeros, np.int64), torch.zeros(len(zeros), table.width))
    for weight in compacted.weights:
        weight.requires_grad_(module.weight.requires_grad)
    return compacted


def select_columns(table: TablePlan, compacted: CompactEmbedding) -> None:
    """Set the projection of a uniform table, if it has one, to the selection of the kept columns."""
    for projection in compacted.projections.values():
        projection.copy_(torch.eye(table.width)[list(table.columns)])


def compact_tables(small: nn.Module, plan: SizePlan) -> list[CompactEmbedding]:
    """Compact tables of a foreign module, in the order of the plan."""
    found: list[CompactEmbedding] = []
    modules = dict(named_modules(small))
    for path in fields_of(small, plan):
        module: Any = modules[path]
        entries = module.entries if isinstance(module, CompactEmbeddingBag) else module
        found.extend(list(entries.tables) if isinstance(entries, CompactFlatEmbedding) else [entries])  # type: ignore[arg-type]
    return found
