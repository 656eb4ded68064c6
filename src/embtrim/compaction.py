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
from embtrim.schema import PAD
from embtrim.sites import ModuleSite, find_sites, site_plan
from embtrim.tables import EmbeddingTables
from embtrim.train import check_data

Init = Literal["scratch", "initial", "inherit"]

# verify: |compact - masked| <= TOLERANCE * (1 + |masked|), in float64.
TOLERANCE = 1e-9
# Rows that are looked up value by value, where a plan only counts columns.
LOOKUP_ROWS = 1024


class CompactEmbedding(nn.Module):
    """Drop-in for an nn.Embedding of which a plan keeps some columns or rows: zeros, or projections, fill the rest.

    Ids stay those of the full table: where rows were dropped or re-sized an int32 map takes them to compact ids.

    Args:
        table: plan of the table, with its rows.
        padding_idx: as in nn.Embedding.
    """

    columns: Tensor
    id_map: Tensor | None

    def __init__(self, table: TablePlan, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding_dim = table.width
        self.num_embeddings = table.num_rows
        id_map = table.id_map() if table.output_width else None
        self.padding_idx = padding_idx if padding_idx is None or id_map is None else int(id_map[padding_idx])
        if padding_idx is not None and self.padding_idx == table.dropped_id:
            self.padding_idx = None  # it shares a row that other values train
        self.register_buffer("id_map", None if id_map is None else torch.from_numpy(id_map))
        self.weights = nn.ParameterList([torch.zeros(rows, width) for rows, width in table.segments])
        widths = [table.output_width] if projects(table) else table.mixed_widths
        self.projections = nn.ParameterDict({str(s): torch.zeros(s, table.width) for s in widths})
        self.register_buffer("columns", torch.tensor(table.columns, dtype=torch.int64), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(..., D) embeddings of ids (...)."""
        if not any(weight.shape[1] for weight in self.weights):
            return self.weights[0].new_zeros(*ids.shape, self.embedding_dim)
        rows = ids if self.id_map is None else self.id_map[ids]
        if len(self.weights) == 1:
            return self._widen(nn.functional.embedding(rows, self.weights[0], padding_idx=self.padding_idx))
        found = self.weights[0].new_zeros(*ids.shape, self.embedding_dim)
        start = 0
        for weight in self.weights:
            local = rows - start
            inside = (local >= 0) & (local < len(weight))
            found = found + self._widen(nn.functional.embedding(local * inside, weight)) * inside[..., None]
            start += len(weight)
        return found

    @torch.no_grad()
    def set_rows(self, compact_ids: np.ndarray, values_ND: Tensor) -> None:
        """Write rows; of each value as many leading columns are taken as the row stores."""
        start = 0
        for weight in self.weights:
            inside = torch.from_numpy((compact_ids >= start) & (compact_ids < start + len(weight)))
            local = torch.from_numpy(compact_ids).long()[inside] - start
            weight[local] = values_ND[inside.to(values_ND.device)][:, : weight.shape[1]].to(weight)
            start += len(weight)

    def _widen(self, narrow: Tensor) -> Tensor:
        """Embeddings of one width at width D."""
        width = narrow.shape[-1]
        if str(width) in self.projections:
            return narrow @ self.projections[str(width)]
        if width in (0, self.embedding_dim):
            return narrow if width else narrow.new_zeros(*narrow.shape[:-1], self.embedding_dim)
        return narrow.new_zeros((*narrow.shape[:-1], self.embedding_dim)).index_copy(-1, self.columns, narrow)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        stored = ", ".join(f"{len(w):,} x {w.shape[1]}" for w in self.weights)
        return f"{stored} of {self.num_embeddings:,} x {self.embedding_dim}"


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
    _check_inheritable(table)
    kept_rows, compact_ids = _kept_rows(table)
    if table.output_width:
        values_ND = full.get_rows(table.name, kept_rows)[0][1]
        small.set_rows(table.name, compact_ids, values_ND[:, list(table.columns)])
    if small.first_order is not None and full.first_order is not None:
        source = torch.from_numpy(full.storage_rows(table.name, kept_rows))
        small.first_order[torch.from_numpy(small.storage_rows(table.name, compact_ids))] = full.first_order[source]


def _check_inheritable(table: TablePlan) -> None:
    if table.only_counts:
        raise PlanError(f"plan for table {table.name!r} says how many columns, not which; use init='scratch'")


@dataclasses.dataclass(frozen=True)
class Verification:
    """Whether the compact model equals what the plan stands for on real rows.

    Attributes:
        against: "masked" - logits of the full model with the removed entries set to zero; or "lookup" - a naive lookup
            of each value's embedding, for plans that only count columns.
        max_difference: largest |compact - expected| / (1 + |expected|) over the rows, in float64.
        num_rows: rows compared.
        tolerance: what is allowed.
        passed: whether it holds.
    """

    max_difference: float
    num_rows: int
    tolerance: float
    passed: bool
    against: Literal["masked", "lookup"] = "masked"

    def require(self) -> None:
        """Raise EmbtrimError unless the comparison holds."""
        if not self.passed:
            raise EmbtrimError(
                f"compact and {self.against} model differ by {self.max_difference:.2e} (allowed {self.tolerance:.0e}); "
                "please report this as a bug, with the plan"
            )


def verify(
    model: CTRModel, plan: SizePlan, data: EncodedDataset, split: str = "valid", max_rows: int = 65_536
) -> Verification:
    """Compare a compact copy with inherited weights with the masked full model on real batches, in float64.

    The masked model is the full one with the removed entries set to zero. The compact copy is verify's own: narrow
    tables are aligned by selection, whatever the plan says, before any re-initialisation. A plan that only counts
    columns has no masked model: its compact tables, with random weights, are compared with a naive lookup instead.

    Args:
        model: the full model.
        plan: made for its schema.
        data: the full model's data.
        split: which rows.
        max_rows: how many at most.

    Raises:
        PlanError: the plan was made for something else.
    """
    if not isinstance(model, CTRModel):
        raise EmbtrimError(
            f"verify compares models of embtrim.models, given {type(model).__name__}; mask it and compare outputs"
        )
    check_data(model, data)
    if any(table.only_counts for table in plan.tables):
        return _verify_lookup(model, plan, data, split, min(max_rows, LOOKUP_ROWS))
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
def _verify_lookup(model: CTRModel, plan: SizePlan, data: EncodedDataset, split: str, max_rows: int) -> Verification:
    """Compare the compact tables with embeddings looked up value by value, by nothing but the plan's definition."""
    full_ids_BC = next(iter(data.batches(split, max_rows))).ids_BC.numpy()
    ids_BC = next(iter(data.recode(plan).batches(split, max_rows))).ids_BC
    tables = compact(copy.deepcopy(model).cpu().double(), plan, seed=0).eval().tables
    generator = torch.Generator().manual_seed(0)
    tables.weight.normal_(generator=generator)
    values_VD = {t.name: torch.randn(t.num_rows + 1, t.width, generator=generator).double() for t in plan.tables}
    block_of_row: dict[str, np.ndarray] = {}
    for table in plan.tables:
        block_of_row[table.name] = np.full(table.num_rows, -1)
        for number, block in enumerate(table.blocks):
            block_of_row[table.name][slice(None) if block.rows is None else block.rows] = number
        kept_rows, compact_ids = _kept_rows(table)
        tables.set_rows(table.name, compact_ids, values_VD[table.name][kept_rows])
        if table.dropped_id is not None:
            tables.set_rows(table.name, np.array([table.dropped_id]), values_VD[table.name][-1:])

    def embedding(table: TablePlan, row: int) -> Tensor:
        block = block_of_row[table.name][row]
        width = table.blocks[block].width if block >= 0 else max((b.width for b in table.blocks), default=0)
        vector = values_VD[table.name][row if block >= 0 else -1, :width]
        if not table.mixed or width == table.width:
            return vector
        return vector @ tables.shared_projections[str(width)] if width else torch.zeros(table.width).double()

    by_name = {table.name: table for table in plan.tables}
    found_BS = tables(ids_BC).concat
    worst = 0.0
    for row, ids_C in enumerate(full_ids_BC):
        parts = []
        for field, columns in zip(data.schema.id_fields, data.schema.column_slices, strict=True):
            table = by_name[field.table_name]
            vectors = [embedding(table, int(i)) for i in ids_C[columns] if i != PAD]
            pooled = torch.stack(vectors).sum(0) if vectors else torch.zeros(table.output_width).double()
            parts.append(pooled / len(vectors) if field.pooling == "mean" and vectors else pooled)
        expected_S = torch.cat(parts)
        difference = (found_BS[row] - expected_S).abs() / (1 + expected_S.abs())
        worst = max(worst, float(difference.max()) if len(difference) else 0.0)
    return Verification(worst, len(full_ids_BC), TOLERANCE, worst <= TOLERANCE, "lookup")


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
        with torch.no_grad():
            if init == "inherit":
                _inherit_module(module, replacement, table)
            else:
                _draw_module(module, replacement, table, generator)
        small.set_submodule(table.name, replacement.to(module.weight))
    return small


def _inherit_module(module: nn.Embedding, replacement: CompactEmbedding, table: TablePlan) -> None:
    """Copy the kept rows and columns of a foreign embedding; a projection starts as the selection of the columns."""
    _check_inheritable(table)
    kept_rows, compact_ids = _kept_rows(table)
    replacement.set_rows(compact_ids, module.weight[torch.from_numpy(kept_rows)][:, list(table.columns)])
    for projection in replacement.projections.values():
        projection.copy_(torch.eye(table.width)[list(table.columns)])


def _draw_module(
    module: nn.Embedding, replacement: CompactEmbedding, table: TablePlan, generator: torch.Generator
) -> None:
    """New weights with the spread of the model's own rows; a foreign module does not tell how it was initialised."""
    for weight in replacement.weights:
        weight.normal_(0, float(module.weight.std()), generator=generator)
    for projection in replacement.projections.values():
        projection.normal_(0, len(projection) ** -0.5, generator=generator)
    zeros = [i for i in (replacement.padding_idx, table.dropped_id) if i is not None]
    replacement.set_rows(np.array(zeros, np.int64), torch.zeros(len(zeros), table.width))


def _kept_rows(table: TablePlan) -> tuple[np.ndarray, np.ndarray]:
    """Kept rows of a table, and their compact ids."""
    id_map = table.id_map()
    if id_map is None:
        return np.arange(table.num_rows), np.arange(table.num_rows)
    kept_rows = np.flatnonzero(id_map != table.dropped_id) if table.has_dropped else np.arange(table.num_rows)
    return kept_rows, id_map[kept_rows]
