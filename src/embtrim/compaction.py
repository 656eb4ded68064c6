"""compact: build the smaller model that a plan describes. verify: prove that it equals the masked full model.

A zoo model is built anew from its hyper-parameters with the plan's tables; whatever reads the removed coordinates
(first deep layers, cross layers, pair inputs) shrinks with them. A foreign module is copied with its nn.Embeddings
replaced by smaller ones of the same output width.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.dataset import EncodedDataset
from embtrim.errors import EmbtrimError, PlanError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan import SizePlan, TablePlan, projects
from embtrim.sites import ModuleSite, find_sites, site_plan
from embtrim.tables import EmbeddingTables
from embtrim.train import check_data

Init = Literal["scratch", "initial", "inherit"]

# verify: |compact - masked| <= TOLERANCE * (1 + |masked|), in float64.
TOLERANCE = 1e-9


class CompactEmbedding(nn.Module):
    """Drop-in for an nn.Embedding of which a plan keeps some columns: zeros, or a projection, fill the rest.

    Args:
        table: uniform table plan with all rows kept.
        padding_idx: as in nn.Embedding.
    """

    columns: Tensor

    def __init__(self, table: TablePlan, padding_idx: int | None = None) -> None:
        super().__init__()
        if table.mixed or table.has_dropped:
            raise PlanError(
                f"plan for {table.name!r} drops or re-sizes rows; only column plans can be applied to a foreign module so far"
            )
        self.embedding_dim = table.width
        self.num_embeddings = table.num_rows
        self.padding_idx = padding_idx
        self.weight = nn.Parameter(torch.zeros(table.num_rows, table.output_width))
        self.register_buffer("columns", torch.tensor(table.columns, dtype=torch.int64), persistent=False)
        self.projection = nn.Parameter(torch.zeros(table.output_width, table.width)) if projects(table) else None

    def forward(self, ids: Tensor) -> Tensor:
        """(..., D) embeddings of ids (...)."""
        narrow = nn.functional.embedding(ids, self.weight, padding_idx=self.padding_idx)
        if self.projection is not None:
            return narrow @ self.projection
        return narrow.new_zeros((*ids.shape, self.embedding_dim)).index_copy(-1, self.columns, narrow)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"{self.num_embeddings}, {self.weight.shape[1]} of {self.embedding_dim}"


def compact(model: nn.Module, plan: SizePlan, init: Init = "scratch", seed: int | None = None) -> Any:
    """Build the smaller model that a plan describes; the given model is not changed.

    Args:
        model: full zoo model, or a foreign module.
        plan: made for the model's schema (or for the foreign module's sites).
        init: "scratch" draws new weights; "initial" takes what is kept of the full model's *initial* weights (zoo
            models only: drawn again from their seed); "inherit" takes what is kept of the weights the model has now.
            A projection starts as the selection of the kept columns under "initial" and "inherit".
        seed: of new weights; None takes the model's own.

    Returns:
        The compact model, on the device of the full one. A plan that drops or re-sizes rows re-numbers ids: give the
        compact model `data.recode(plan)`.

    Raises:
        PlanError: the plan was made for something else, or lists counts where `init` needs columns.
    """
    if not isinstance(model, CTRModel):
        return _compact_module(model, plan, init, seed)
    plan.check_schema(model.schema)
    plan.check_tables(SizePlan.full(model.schema, model.tables.width))
    if plan.first_order != model.has_first_order:
        plan = dataclasses.replace(plan, first_order=model.has_first_order)
    hparams = dict(model.hparams) if seed is None else {**model.hparams, "seed": seed}
    like = next(model.parameters())
    small = type(model)(model.schema, plan=plan, **hparams).to(like.device, like.dtype)
    if init == "initial":
        inherit_weights(type(model)(model.schema, **hparams).to(like.device, like.dtype), small)
    elif init == "inherit":
        inherit_weights(model, small)
    elif init != "scratch":
        raise EmbtrimError(f"init must be 'scratch', 'initial' or 'inherit', given {init!r}")
    return small


@torch.no_grad()
def inherit_weights(full: CTRModel, small: CTRModel) -> None:
    """Copy into `small` what its plan keeps of `full`: rows and columns of tables, and the axes that read them."""
    plan = small.tables.plan
    full.tables.settle()
    for table in plan.tables:
        _inherit_table(full.tables, small.tables, table)
    kept_S = small.kept_inputs("concat")
    if small.tables.has_projections:
        selection_SD = torch.zeros(len(kept_S), small.tables.width)
        selection_SD[torch.arange(len(kept_S)), kept_S % small.tables.width] = 1.0
        small.tables.projection.copy_(selection_SD[small.tables.projected_S])

    reads: dict[str, dict[int, Tensor]] = {}
    for read in small.reads():
        sizes = [len(full.kept_inputs(part)) for part in read.parts]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        index = torch.cat([small.kept_inputs(part) + start for part, start in zip(read.parts, starts, strict=True)])
        reads.setdefault(read.parameter, {})[read.axis] = index
    theirs = {**dict(full.named_parameters()), **dict(full.named_buffers())}
    for name, value in [*small.named_parameters(), *small.named_buffers()]:
        if name.startswith("tables."):
            continue
        source = theirs[name]
        for axis, index in reads.get(name, {}).items():
            source = source.index_select(axis, index.to(source.device))
        value.copy_(source)
    small.fold_dropped(full)


def _inherit_table(full: EmbeddingTables, small: EmbeddingTables, table: TablePlan) -> None:
    """Copy the kept rows and columns, and the first-order weights of the kept rows, of one table."""
    id_map = table.id_map()
    kept_rows = np.arange(table.num_rows) if id_map is None else np.flatnonzero(id_map != table.dropped_id)
    compact_ids = kept_rows if id_map is None else id_map[kept_rows]
    if table.width and any(isinstance(b.columns, int) and 0 < b.width < table.width for b in table.blocks):
        raise PlanError(f"plan for table {table.name!r} says how many columns, not which; use init='scratch'")
    if table.mixed and any(0 < b.width < table.width for b in table.blocks):
        raise PlanError(
            f"table {table.name!r} has rows of several widths, whose projections are learned; use init='scratch'"
        )
    if table.output_width:
        values_ND = full.get_rows(table.name, kept_rows)[0][1]
        small.set_rows(table.name, compact_ids, values_ND[:, list(table.columns)])
    if small.first_order is not None and full.first_order is not None:
        source = torch.from_numpy(full.storage_rows(table.name, kept_rows))
        small.first_order[torch.from_numpy(small.storage_rows(table.name, compact_ids))] = full.first_order[source]


@dataclasses.dataclass(frozen=True)
class Verification:
    """Whether the compact model equals the masked full model on real rows.

    Attributes:
        max_difference: largest |compact - masked| / (1 + |masked|) over the rows, in float64.
        num_rows: rows compared.
        tolerance: what is allowed.
        passed: whether it holds.
    """

    max_difference: float
    num_rows: int
    tolerance: float
    passed: bool

    def require(self) -> None:
        """Raise EmbtrimError unless the comparison holds."""
        if not self.passed:
            raise EmbtrimError(
                f"compact and masked model differ by {self.max_difference:.2e} (allowed {self.tolerance:.0e}); "
                "please report this as a bug, with the plan"
            )


def verify(
    model: CTRModel, plan: SizePlan, data: EncodedDataset, split: str = "valid", max_rows: int = 65_536
) -> Verification:
    """Compare a compact copy with inherited weights with the masked full model on real batches, in float64.

    The masked model is the full one with the removed entries set to zero. The compact copy is verify's own: narrow
    tables are aligned by selection, whatever the plan says, before any re-initialisation.

    Args:
        model: the full model.
        plan: made for its schema, with columns (a plan that only counts has nothing to be equal to).
        data: the full model's data.
        split: which rows.
        max_rows: how many at most.

    Raises:
        PlanError: see `compact` with init="inherit".
    """
    if not isinstance(model, CTRModel):
        raise EmbtrimError(
            f"verify compares models of embtrim.models, given {type(model).__name__}; mask it and compare outputs"
        )
    check_data(model, data)
    full = copy.deepcopy(model).cpu().double().eval()
    small = compact(full, plan, init="inherit").eval()
    masked = mask_tables(full, plan)
    recoded = data.recode(plan)
    worst, rows = 0.0, 0
    batch_size = min(8192, max_rows)
    with torch.no_grad():
        for batch, small_batch in zip(data.batches(split, batch_size), recoded.batches(split, batch_size), strict=True):
            dense = None if batch.dense_BE is None else batch.dense_BE.double()
            expected = masked(batch.ids_BC, dense)
            difference = (small(small_batch.ids_BC, dense) - expected).abs() / (1 + expected.abs())
            worst = max(worst, float(difference.max()))
            rows += len(batch)
            if rows >= max_rows:
                break
    return Verification(worst, rows, TOLERANCE, worst <= TOLERANCE)


@torch.no_grad()
def mask_tables(model: CTRModel, plan: SizePlan) -> CTRModel:
    """Set every entry that the plan removes to zero, in place: the masked model that papers evaluate."""
    tables = model.tables
    for table in plan.tables:
        rows = np.arange(table.num_rows)
        kept = table.kept_mask()
        if table.width:
            values = tables.get_rows(table.name, rows)[0][1]
            tables.set_rows(table.name, rows, values * torch.from_numpy(kept).to(values))
        if tables.first_order is not None and table.has_dropped:
            dropped = np.flatnonzero(table.id_map() == table.dropped_id)
            tables.first_order[torch.from_numpy(tables.storage_rows(table.name, dropped))] = 0.0
    return model


def _compact_module(model: nn.Module, plan: SizePlan, init: Init, seed: int | None) -> nn.Module:
    """A copy of a foreign module with smaller embeddings of the same output width."""
    if init == "initial":
        raise EmbtrimError("init = 'initial' needs a zoo model; build a foreign one anew and use 'inherit'")
    names = {t.name for t in plan.tables}
    sites = [s for s in find_sites(model, keep=lambda name: name in names) if isinstance(s, ModuleSite)]
    fingerprint = site_plan(sites).fingerprint
    if fingerprint != plan.fingerprint:
        raise PlanError(f"plan was made for embeddings {plan.fingerprint}, this model has {fingerprint}; search again")
    small = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    for table, site in zip(plan.tables, sites, strict=True):
        module = site.module
        replacement = CompactEmbedding(table, module.padding_idx)
        columns = list(table.columns)
        with torch.no_grad():
            if init == "inherit":
                replacement.weight.copy_(module.weight[:, columns])
                if replacement.projection is not None:
                    replacement.projection.copy_(torch.eye(table.width)[columns])
            else:
                # The spread of the model's own rows; a foreign module does not tell how it was initialised.
                replacement.weight.normal_(0, float(module.weight.std()), generator=generator)
                if replacement.projection is not None:
                    replacement.projection.normal_(0, max(1, len(columns)) ** -0.5, generator=generator)
                if module.padding_idx is not None:
                    replacement.weight[module.padding_idx] = 0.0
        small.set_submodule(table.name, replacement.to(module.weight))
    return small
