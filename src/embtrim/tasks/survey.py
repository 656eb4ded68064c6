"""The survey of a model: which of its embeddings can be searched, and why the others are left alone."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embtrim.errors import ModelError
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.system.modules import named_modules
from embtrim.system.torch_private import has_backward_hooks, has_forward_hooks
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.replacements import Replacement
from embtrim.tasks.bare_tables import bare_tables
from embtrim.tasks.chosen import Chosen, Patterns
from embtrim.tasks.sites import ModuleSite, Site, TableSite

logger = logging.getLogger(__name__)

# Fields of each flat table by module path, with the rows of each field in the order of their offsets.
Fields = Mapping[str, Mapping[str, int]]

COMPACT_NOTE = "compact already; search and compact the full model"


@dataclass(frozen=True)
class Finding:
    """One module with embeddings, or a parameter that is indexed as one, as `survey` reports it.

    Attributes:
        name: Path of the module or parameter.
        kind: Type of the module; "Parameter".
        num_rows: Rows of the module's tables.
        width: Columns of the module's tables.
        found: Whether a search can shrink the module.
        note: Why the module is left alone; or its fields; or the modules that share its weight.
        num_bytes: Bytes of the module's parameters, without those that an earlier finding counts.
    """

    name: str
    kind: str
    num_rows: int
    width: int
    found: bool
    note: str
    num_bytes: int

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}: {self.kind} {self.num_rows:,} x {self.width}, {'found' if self.found else 'left'}{note}"


def survey(
    model: nn.Module,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    fields: Fields | None = None,
) -> list[Finding]:
    """Report every module with embeddings, and every matrix that a module indexes itself: found, or left alone and why.

    Arguments are those of `find_sites`.

    Example:
        >>> print(*survey(nn.Sequential(nn.Embedding(9, 4), nn.Embedding(9, 1))), sep="; ")
        0: Embedding 9 x 4, found; 1: Embedding 9 x 1, left (width 1, a first-order term)
    """
    return _look(model, Chosen.parse(include, exclude), fields)[0]


def find_sites(
    model: nn.Module,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    fields: Fields | None = None,
) -> list[Site]:
    """Find where embeddings enter a model.

    Modules that share one weight are one site, and so is what else reads the weight, such as a tied output layer. These
    are left alone: first-order terms (width 1), pooling by max, gradients scaled by frequency, and subclasses with a
    forward of their own.

    Args:
        model: Zoo model or foreign module.
        include: Paths of the embeddings to search, or patterns such as "towers.*.item"; None searches all.
        exclude: Paths or patterns of embeddings to leave alone, of those included.
        fields: Fields of each flat table by module path, in order, with the rows of each field.

    Raises:
        ModelError: No embedding was found; the message lists every module seen and why it was left. A pattern matches no
            embedding. Or `fields` names a module that was not found, or rows that do not add up to its table.
    """
    findings, sites = _look(model, Chosen.parse(include, exclude), fields)
    if not sites:
        seen = "; ".join(map(str, findings)) or "it has no nn.Embedding or nn.EmbeddingBag"
        raise ModelError(f"no embedding to shrink was found in {type(model).__name__}: {seen}")
    return sites


def _look(model: nn.Module, chosen: Chosen, fields: Fields | None) -> tuple[list[Finding], list[Site]]:
    """One pass over the modules for both `survey` and `find_sites`, so that the report matches the search."""
    findings: list[Finding] = []
    sites: list[Site] = []
    by_weight: dict[int, ModuleSite] = {}
    holders, counted = _weight_holders(model), set()
    for name, module in named_modules(model):
        if isinstance(module, Replacement):
            if any(name.startswith(f"{f.name}.") for f in findings if f.note == COMPACT_NOTE):
                continue  # part of a replacement that is reported already
            found, note, size = False, COMPACT_NOTE, (module.num_embeddings, module.embedding_dim)
        elif isinstance(module, EmbeddingTables):
            sites.append(TableSite(module))
            found, note, size = True, "", (sum(sites[-1].num_rows), module.width)
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            sharing = holders.get(id(module._parameters.get("weight")), [])
            note, named = _why_not_searched(name, module, sharing, chosen), (fields or {}).get(name)
            found, size = not note, (module.num_embeddings, module.embedding_dim)
            if found:
                note = _note_on_site(name, module, sharing, named)
                site = by_weight.get(id(module.weight))
                if site is not None:
                    site.modules.append(module)
                else:
                    by_weight[id(module.weight)] = site = ModuleSite(name, module, named)
                    site.readers.extend((other.module, other.name) for other in sharing if not other.looks_up)
                    sites.append(site)
        elif getattr(module, "original_name", None) in ("Embedding", "EmbeddingBag"):  # of torch.jit
            scripted: Any = module
            found, note, size = False, "scripted by torch.jit; give the module as it was", tuple(scripted.weight.shape)
        elif sizes := _sizes_of_sharded(module):
            note = f"{len(sizes)} tables sharded by torchrec; search them with embtrim.torchrec.Task"
            found, size = False, (sum(rows for rows, _ in sizes), max(width for _, width in sizes))
        else:
            findings += _bare(name, module, holders, counted)
            continue
        findings.append(Finding(name, type(module).__name__, *size, found, note, _new_bytes(module, counted)))  # type: ignore[arg-type]
    chosen.check([finding.name for finding in findings])
    unknown = set(fields or ()) - {site.path for site in by_weight.values()}
    if unknown:
        seen = "; ".join(map(str, findings)) or "it has none"
        raise ModelError(f"fields= names {sorted(unknown)[0]!r}, which is not an embedding that was found: {seen}")
    return findings, sites


def _bare(path: str, module: nn.Module, holders: Mapping[int, Sequence[_Holder]], counted: set[int]) -> list[Finding]:
    """Parameters that a module looks rows up in itself, which no search can replace."""
    found = []
    for name, parameter in bare_tables(module):
        if id(parameter) in counted or any(holder.looks_up for holder in holders.get(id(parameter), ())):
            continue
        counted.add(id(parameter))
        note = f"{type(module).__name__} indexes it itself; hold it in an nn.Embedding, call that, and it is searched"
        rows, width = parameter.shape
        found.append(
            Finding(f"{path}.{name}" if path else name, "Parameter", rows, width, False, note, parameter.nbytes)
        )
    return found


def _sizes_of_sharded(module: nn.Module) -> list[tuple[int, int]]:
    """Rows and widths of the tables of a sharded collection of torchrec; none for any other module."""
    if not any(kind.__name__ == "ShardedModule" for kind in type(module).__mro__):
        return []
    configs = getattr(module, "_embedding_bag_configs", None) or getattr(module, "_embedding_configs", ())
    return [(config.num_embeddings, config.embedding_dim) for config in configs]


class _Holder(NamedTuple):
    """A module that holds a parameter, and its name for it."""

    path: str
    module: nn.Module
    name: str

    @property
    def looks_up(self) -> bool:
        """Whether the parameter is the weight of an embedding, which looks up its rows."""
        return isinstance(self.module, (nn.Embedding, nn.EmbeddingBag)) and self.name == "weight"

    @property
    def multiplies(self) -> bool:
        """Whether the parameter is the weight of an nn.Linear, of which a compact table needs what it stores only."""
        return self.name == "weight" and type(self.module).forward is nn.Linear.forward

    def __str__(self) -> str:
        return f"{self.path or type(self.module).__name__}, a {type(self.module).__name__}"


def _weight_holders(model: nn.Module) -> dict[int, list[_Holder]]:
    """The holders of each parameter, by the id of the parameter."""
    holders: dict[int, list[_Holder]] = {}
    for path, module in named_modules(model):
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append(_Holder(path, module, name))
    return holders


def _new_bytes(module: nn.Module, counted: set[int]) -> int:
    """Bytes of the parameters whose ids are not in `counted` yet; their ids are added."""
    new = {id(p): p.nbytes for p in module.parameters() if id(p) not in counted}
    counted.update(new)
    return sum(new.values())


def _why_not_searched(
    name: str, module: nn.Embedding | nn.EmbeddingBag, sharing: Sequence[_Holder], chosen: Chosen
) -> str:
    """Why an embedding is left alone, because of itself or of the modules that share its weight; empty if it is not."""
    lookups, readers = [other for other in sharing if other.looks_up], [o for o in sharing if not o.looks_up]
    reasons = [_why_left(module), *(_why_left(other.module) for other in lookups), *map(_why_not_tied, readers)]
    note = next(filter(None, reasons), "") or chosen.why_left([name, *(other.path for other in lookups)])
    if not note and any(_settings(other.module) != _settings(module) for other in lookups):
        first = next(other.path for other in lookups if other.module is not module)
        note = f"shares its weight with {first}, whose settings differ"
    if not note and readers and module.max_norm is not None:
        note = f"{readers[0]}, reads its weight too, whose rows max_norm changes as they are looked up"
    return note


def _note_on_site(
    name: str,
    module: nn.Embedding | nn.EmbeddingBag,
    sharing: Sequence[_Holder],
    fields: Mapping[str, int] | None,
) -> str:
    """The fields of a searched embedding, and the modules that share or read its weight; empty if there are none."""
    notes = []
    if fields is not None:
        _check_fields(name, module.num_embeddings, fields)
        notes.append(f"fields {', '.join(fields)}")
    others = [other.path for other in sharing if other.looks_up and other.module is not module]
    if others:
        notes.append(f"one table with {', '.join(others)}")
    for other in sharing:
        if other.multiplies:
            notes.append(f"{other}, multiplies by all of it: a compact table by what it stores")
        elif not other.looks_up:
            notes.append(f"{other}, reads all of it, {cost_of_reading(module)}")
    return "; ".join(notes)


def cost_of_reading(module: nn.Embedding | nn.EmbeddingBag) -> str:
    """What a read of all rows takes in a compact table, in words."""
    rows, width = module.num_embeddings, module.embedding_dim
    num_bytes = rows * width * module.weight.element_size()
    return f"for which a compact table computes {rows:,} x {width} values ({num_bytes:,} bytes) each time"


def _why_not_tied(other: _Holder) -> str:
    """Why a module that reads an embedding's weight as its parameter could not read it from a compact table."""
    if isinstance(other.module, (nn.Embedding, nn.EmbeddingBag)):
        return f"{other}, holds its weight as {other.name!r} too"
    if isinstance(other.module, torch.jit.ScriptModule):
        return f"{other}, reads its weight too"
    return ""


def _why_left(module: nn.Module) -> str:
    """Why one embedding of a weight cannot be searched; empty if it can."""
    assert isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    if _has_own_forward(module):
        return f"{type(module).__name__} has a forward of its own"
    if has_forward_hooks(module):
        return "it has forward hooks, which a replacement would not call"
    if has_backward_hooks(module):
        return "it has backward hooks, which a replacement would not call"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from others"
    if not isinstance(weight.data, Tensor) or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, which is more than a tensor"
    if weight._backward_hooks:
        return "its weight has gradient hooks, which a replacement would not call"
    if module.embedding_dim == 1:
        return "width 1, a first-order term"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "mode 'max': a removed entry is not the same as a zero"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq"
    return ""


def _has_own_forward(module: nn.Module) -> bool:
    """Whether calling an embedding does something else than torch's embeddings do."""
    kind = nn.EmbeddingBag if isinstance(module, nn.EmbeddingBag) else nn.Embedding
    own = type(module)
    return own.forward is not kind.forward or own.__call__ is not kind.__call__ or "forward" in vars(module)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Settings that must agree in two modules with one weight, so that one replacement serves both."""
    names = ("padding_idx", "max_norm", "norm_type", "sparse", "mode", "include_last_offset")
    return tuple(getattr(module, name, None) for name in names)


def _check_fields(name: str, num_rows: int, fields: Mapping[str, int]) -> None:
    """Raise ModelError unless the fields of a flat table add up to its rows."""
    total = sum(fields.values())
    if total != num_rows or min(fields.values()) < 1:
        listed = " + ".join(f"{rows:,} ({field})" for field, rows in fields.items())
        raise ModelError(
            f"the fields of {name!r} have {listed or 'none'} = {total:,} rows, the table has {num_rows:,}; name "
            "every field of the table with its rows, at least one each, in the order of their offsets"
        )


def fields_of(model: nn.Module, plan: SizePlan) -> dict[str, dict[str, int]]:
    """Fields and their rows of each module that a plan names, by module path; empty for a table that is not flat."""
    paths = {path for path, _ in named_modules(model)}
    found: dict[str, dict[str, int]] = {}
    for table in plan.tables:
        path = _path_of(table.name, paths)
        fields = found.setdefault(path, {})
        if path != table.name:
            fields[table.name[len(path) + 1 : -1]] = table.num_rows
    return found


def _path_of(name: str, paths: Container[str]) -> str:
    """The path of a module in the name of its table, which is "path" or "path[field]".

    Either part may hold brackets itself: the longest path that exists in the model counts.
    """
    starts = [i for i, character in enumerate(name) if character == "["]
    candidates = [name, *(name[:i] for i in reversed(starts))]
    return next((c for c in candidates if c in paths), candidates[-1])


def site_plan(sites: Sequence[Site]) -> SizePlan:
    """The plan that keeps everything in a foreign model. Its fingerprint covers names, rows and widths of the sites."""
    tables = tuple(
        TablePlan(name, rows, width, (Block(rows, tuple(range(width))),))
        for site in sites
        for name, rows, width in zip(site.names, site.num_rows, site.widths, strict=True)
    )
    return SizePlan(_fingerprint(tables), len(tables), tables, standalone=True, method="full")


def _fingerprint(tables: Sequence[TablePlan]) -> str:
    text = repr([(t.name, t.num_rows, t.width) for t in tables])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plan_for(model: nn.Module, plan: SizePlan) -> SizePlan:
    """A plan with the names that its tables have in a foreign model.

    A plan that was made for a model is also for a module inside the model, and for a model that holds the module: all its
    names then lack, or have, the same first parts, such as "model." in a module of Lightning.
    """
    paths = dict(named_modules(model))
    names = [table.name for table in plan.tables]
    if not names or all(_path_of(name, paths) in paths for name in names):
        return plan
    first = _path_of(names[0], paths)
    shorter = [names[0][: i + 1] for i, character in enumerate(first) if character == "."]
    longer = [path[: -len(first)] for path in paths if path.endswith(f".{first}")]
    changes = [(gone, "") for gone in shorter] + [("", added) for added in longer]
    found = []
    for gone, added in changes:
        renamed = [added + name.removeprefix(gone) for name in names]
        if all(name.startswith(gone) for name in names) and all(_path_of(name, paths) in paths for name in renamed):
            found.append(renamed)
    if len(found) != 1:
        return plan
    tables = tuple(dataclasses.replace(t, name=name) for t, name in zip(plan.tables, found[0], strict=True))
    logger.info("the plan's table %r is %r in this model, and so are the others", names[0], found[0][0])
    return dataclasses.replace(plan, tables=tables, fingerprint=_fingerprint(tables))
