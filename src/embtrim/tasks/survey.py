"""What of a module of one's own can be searched: its embeddings, found and named, or why they are left alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from embtrim.errors import EmbtrimError
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.replacements import Replacement
from embtrim.tasks.sites import ModuleSite, Site, TableSite


@dataclass(frozen=True)
class Finding:
    """What `survey` says of one module with embeddings.

    Attributes:
        name: path of the module.
        kind: its type.
        num_rows: rows of its tables.
        width: their columns.
        found: whether it is a site, or part of one.
        note: why it was left alone, or its fields, or what it shares.
        num_bytes: of its parameters, but of those that an earlier finding counts.
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


Fields = Mapping[str, Mapping[str, int]]


def survey(model: nn.Module, keep: Callable[[str], bool] | None = None, fields: Fields | None = None) -> list[Finding]:
    """Say of each module with embeddings whether it is found or left alone, and why; for arguments see `find_sites`.

    Example:
        >>> print(*survey(nn.Sequential(nn.Embedding(9, 4), nn.Embedding(9, 1))), sep="; ")
        0: Embedding 9 x 4, found; 1: Embedding 9 x 1, left (width 1, a first-order term)
    """
    return _look(model, keep, fields)[0]


def find_sites(model: nn.Module, keep: Callable[[str], bool] | None = None, fields: Fields | None = None) -> list[Site]:
    """Find where embeddings enter a model.

    Modules that hold one weight are one site. Left alone are first-order terms (width 1), pooling by max, gradients
    scaled by frequency, subclasses with a forward of their own, and weights that other kinds of modules read too.

    Args:
        model: zoo model or foreign module.
        keep: filter on module paths; False leaves a module alone.
        fields: of each flat table, by module path: the fields that its ids run through, in order, and their rows.

    Raises:
        EmbtrimError: nothing was found, with what was seen and why it was left; or `fields` names no module that was
            found, or rows that do not add up to its table.
    """
    findings, sites = _look(model, keep, fields)
    if not sites:
        seen = "; ".join(map(str, findings)) or "it has no nn.Embedding or nn.EmbeddingBag"
        raise EmbtrimError(f"no embedding to shrink was found in {type(model).__name__}: {seen}")
    return sites


def _look(
    model: nn.Module, keep: Callable[[str], bool] | None, fields: Fields | None
) -> tuple[list[Finding], list[Site]]:
    """One pass for `survey` and `find_sites`, so that what is said is what is done."""
    if keep is not None and not callable(keep):
        raise EmbtrimError(
            f"keep= is a function of a module's path, such as lambda path: path != 'user'; given {keep!r}"
        )
    findings: list[Finding] = []
    sites: list[Site] = []
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append((name, module))
    by_weight: dict[int, ModuleSite] = {}
    counted: set[int] = set()

    def num_bytes(module: nn.Module) -> int:
        new = {id(p): p.nbytes for p in module.parameters() if id(p) not in counted}
        counted.update(new)
        return sum(new.values())

    for name, module in model.named_modules():
        if isinstance(module, Replacement):
            note = "compact already; search and compact the full model"
            if not any(name.startswith(f"{f.name}.") for f in findings if f.note == note):  # else a part of one
                rows, width = module.num_embeddings, module.embedding_dim
                findings.append(Finding(name, type(module).__name__, rows, width, False, note, num_bytes(module)))  # type: ignore[arg-type]
        elif isinstance(module, EmbeddingTables):
            sites.append(TableSite(module))
            rows = sum(sites[-1].num_rows)
            findings.append(Finding(name, type(module).__name__, rows, module.width, True, "", num_bytes(module)))
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            sharing = holders.get(id(module._parameters.get("weight")), [])
            reasons = [_why_left(name, module, keep), *(_why_left(*other, keep) for other in sharing)]
            note = next(filter(None, reasons), "")
            others = [other for other, their in sharing if their is not module]
            if not note and any(_settings(their) != _settings(module) for _, their in sharing):
                note = f"shares its weight with {others[0]}, whose settings differ"
            found = not note
            named = (fields or {}).get(name)
            if found and named is not None:
                _check_fields(name, module.num_embeddings, named)
                note = f"fields {', '.join(named)}"
            elif found and others:
                note = f"one table with {', '.join(others)}"
            rows, width = module.num_embeddings, module.embedding_dim
            findings.append(Finding(name, type(module).__name__, rows, width, found, note, num_bytes(module)))
            if not found:
                continue
            if id(module.weight) in by_weight:
                by_weight[id(module.weight)].modules.append(module)
            else:
                by_weight[id(module.weight)] = ModuleSite(name, module, named)
                sites.append(by_weight[id(module.weight)])
    unknown = set(fields or ()) - {site.path for site in by_weight.values()}
    if unknown:
        seen = "; ".join(map(str, findings)) or "it has none"
        raise EmbtrimError(f"fields= names {sorted(unknown)[0]!r}, which is not an embedding that was found: {seen}")
    return findings, sites


def _why_left(name: str, module: nn.Module, keep: Callable[[str], bool] | None) -> str:
    """Why a module that holds an embedding weight is not a site; empty if it is one."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return f"{name or type(module).__name__}, a {type(module).__name__}, reads its weight too"
    if type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
        return f"{type(module).__name__} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a replacement would not call"
    if "weight" not in module._parameters:
        return "its weight is computed from others"
    if module.embedding_dim == 1:
        return "width 1, a first-order term"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "mode 'max': a removed entry is not the same as a zero"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq"
    return "filtered out" if keep is not None and not keep(name) else ""


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What two modules with one weight must have in common to be replaced by one."""
    names = ("padding_idx", "max_norm", "norm_type", "sparse", "mode", "include_last_offset")
    return tuple(getattr(module, name, None) for name in names)


def _check_fields(name: str, num_rows: int, fields: Mapping[str, int]) -> None:
    total = sum(fields.values())
    if total != num_rows or min(fields.values()) < 1:
        listed = " + ".join(f"{rows:,} ({field})" for field, rows in fields.items())
        raise EmbtrimError(
            f"the fields of {name!r} have {listed or 'none'} = {total:,} rows, the table has {num_rows:,}; name "
            "every field of the table with its rows, at least one each, in the order of their offsets"
        )


def fields_of(model: nn.Module, plan: SizePlan) -> dict[str, dict[str, int]]:
    """Fields of each module of `model` that a plan is for, with their rows; none of a table that is not flat."""
    paths = {path for path, _ in model.named_modules()}
    found: dict[str, dict[str, int]] = {}
    for table in plan.tables:
        # Of "path[field]" either part may hold brackets of its own: the longest path that the model has is meant.
        starts = [i for i, character in enumerate(table.name) if character == "["]
        candidates = [table.name, *(table.name[:i] for i in reversed(starts))]
        path = next((c for c in candidates if c in paths), candidates[-1])
        fields = found.setdefault(path, {})
        if path != table.name:
            fields[table.name[len(path) + 1 : -1]] = table.num_rows
    return found


def site_plan(sites: Sequence[Site]) -> SizePlan:
    """The keep-everything plan of a foreign model's sites; its fingerprint covers names, rows and widths."""
    tables = tuple(
        TablePlan(name, rows, width, (Block(rows, tuple(range(width))),))
        for site in sites
        for name, rows, width in zip(site.names, site.num_rows, site.widths, strict=True)
    )
    text = repr([(t.name, t.num_rows, t.width) for t in tables])
    return SizePlan(hashlib.sha256(text.encode()).hexdigest()[:12], len(tables), tables, standalone=True, method="full")
