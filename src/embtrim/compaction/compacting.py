"""compact: build the smaller model that a plan describes. verify: prove that it equals the masked full model.

A zoo model is built anew from its hyper-parameters with the plan's tables; whatever reads the removed coordinates
(first deep layers, cross layers, pair inputs) shrinks with them. A foreign module is copied with its nn.Embeddings and
nn.EmbeddingBags replaced by smaller ones of the same output width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from embtrim.data.dataset import EncodedDataset
from embtrim.errors import EmbtrimError, PlanError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan, TablePlan, projects
from embtrim.schema import PAD
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.replacements import CompactEmbedding, CompactEmbeddingBag, CompactFlatEmbedding
from embtrim.tasks.sites import ModuleSite, Task, fields_of, find_sites, site_plan
from embtrim.training.fitting import check_data

Init = Literal["scratch", "initial", "inherit"]
# By the path of an nn.Linear, what its input concatenates; see `compact`.
Reads = Mapping[str, Sequence[str | int]]

# verify: |compact - masked| <= TOLERANCE * (1 + |masked|), in float64; of a foreign module in its own precision.
TOLERANCE = 1e-9
MODULE_TOLERANCE = 1e-5
# Rows that are looked up value by value, where a plan only counts columns.
LOOKUP_ROWS = 1024


def compact(
    model: nn.Module, plan: SizePlan, init: Init = "scratch", seed: int | None = None, reads: Reads | None = None
) -> Any:
    """Build the smaller model that a plan describes; the given model is not changed.

    Args:
        model: full zoo model, or a foreign module.
        plan: made for the model's schema (or for the foreign module's sites).
        init: "scratch" draws new weights; "initial" takes what is kept of the full model's *initial* weights (zoo
            models only: drawn again from their seed); "inherit" takes what is kept of the weights the model has now.
            A projection starts as the selection of the kept columns under "initial" and "inherit". Of a foreign module
            only the tables that the plan names are drawn; dense layers, batch-norm statistics and tables that were left
            alone are kept as given: for a training from scratch pass a fresh module, not the one that was searched.
        seed: of new weights; None takes the model's own.
        reads: of a foreign module, by the path of each nn.Linear that reads nothing but a concatenation: its parts in
            order, paths of embeddings or numbers of other columns, such as `{"head.0": ["user", "item", "item", 13]}`.
            These embeddings then give out the columns that they store, not projected, and the Linears lose the input
            columns of the others. Nothing else may read them: `verify` with the same `reads` says so if it does.

    Returns:
        The compact model, on the device of the full one, in fp32: where the plan says fewer bits, call `quantize` once
        it is trained. A plan that drops or re-sizes rows re-numbers ids: give a compact zoo model `data.recode(plan)`.

    Raises:
        PlanError: the plan was made for something else, or lists counts where `init` needs columns.
        EmbtrimError: `init` is none of these; the model's tables are compact already, or quantised; a weight that the plan
            stores in pieces is also kept where they cannot replace it; or `reads` names no such Linear or embedding, or
            parts that do not add up to its input.
    """
    if init not in get_args(Init):
        raise EmbtrimError(f"init must be 'scratch', 'initial' or 'inherit', given {init!r}")
    if not isinstance(model, CTRModel):
        small = _compact_module(model, plan, init, seed)
        if reads is not None:
            _narrow(small, reads)
        return small
    if reads is not None:
        raise EmbtrimError("reads= is for foreign modules: the models of embtrim.models know what reads their tables")
    model.tables.check_fp32()
    plan.check_schema(model.schema)
    if not model.tables.plan.keeps_all:
        raise EmbtrimError(f"this {model.name} is compact already; compact the full model")
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
    return small


def quantize(model: nn.Module) -> None:
    """Store the tables of a compact model in the bits of its plan, in place: for inference only, once it is trained.

    Args:
        model: what `compact` gave; of a zoo model this is `model.tables.quantize()`.

    Raises:
        EmbtrimError: the tables are quantised already, or the plan of a foreign module says 32 bits of all.
    """
    if isinstance(model, CTRModel):
        model.tables.quantize()
        return
    tables = [module for module in model.modules() if isinstance(module, CompactEmbedding)]
    if any(table.packed is not None for table in tables):
        raise EmbtrimError(f"the tables of this {type(model).__name__} are quantised already")
    if all(table.bits == 32 for table in tables):
        raise EmbtrimError(
            f"this {type(model).__name__} has no compact table of fewer than 32 bits; compact it with plan.with_bits(8)"
        )
    for table in tables:
        table.quantize()


@torch.no_grad()
def inherit_weights(full: CTRModel, small: CTRModel) -> None:
    """Copy into `small` what its plan keeps of `full`: rows and columns of tables, and the axes that read them."""
    plan = small.tables.plan
    full.tables.settle()
    for table in plan.tables:
        _inherit_table(full.tables, small.tables, table)
    kept_S = small.kept_inputs("concat")
    if small.tables.has_projections:
        selection_SD = small.tables.projection.new_zeros(len(kept_S), small.tables.width)
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
        against: "masked" - outputs of the full model with the removed entries set to zero; or "lookup" - a naive lookup
            of each value's embedding, for plans that only count columns.
        max_difference: largest |compact - expected| / (1 + |expected|) over the rows, in float64 for a zoo model.
        num_rows: rows compared; of a foreign module, as its output counts them.
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
    model: nn.Module,
    plan: SizePlan,
    data: EncodedDataset | Task,
    split: str = "valid",
    max_rows: int = 65_536,
    reads: Reads | None = None,
) -> Verification:
    """Compare a compact copy with inherited weights with the masked full model on real batches, in float64.

    Of a foreign module all outputs that the task's loss asks for are compared, and the loss, in its own precision.

    The masked model is the full one with the removed entries set to zero. The compact copy is verify's own: narrow
    tables are aligned by selection, whatever the plan says, before any re-initialisation. A plan that only counts
    columns has no masked model: its compact tables, with random weights, are compared with a naive lookup instead.

    Args:
        model: the full model.
        plan: made for its schema, or for its sites.
        data: the full model's data; for a foreign module, its Task.
        split: which rows, or batches.
        max_rows: how many at most.
        reads: as given to `compact`.

    Raises:
        PlanError: the plan was made for something else.
        EmbtrimError: something reads the embeddings that `reads` narrows besides its Linears, or in another order; or the
            Task has no batches to compare on.
    """
    if not isinstance(model, CTRModel):
        if not isinstance(data, Task):
            raise EmbtrimError(
                f"verify got a {type(model).__name__} and a {type(data).__name__}; a module that is none of "
                "embtrim.models is compared on the batches of its Task"
            )
        return _verify_module(model, plan, data, split, max_rows, reads)
    if not isinstance(data, EncodedDataset):
        raise EmbtrimError(f"verify compares a zoo model on encoded data, given a {type(data).__name__}; give its data")
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
            worst = max(worst, _difference(small(small_batch.ids_BC, dense), expected))
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
        worst = max(worst, _difference(found_BS[row], torch.cat(parts)))
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


def module_sites(model: nn.Module, plan: SizePlan) -> list[ModuleSite]:
    """The sites of a foreign module that a plan is for; PlanError if it was made for others."""
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


def _compact_module(model: nn.Module, plan: SizePlan, init: Init, seed: int | None) -> nn.Module:
    """A copy of a foreign module with smaller embeddings of the same output width."""
    if init == "initial":
        raise EmbtrimError("init = 'initial' needs a zoo model; build a foreign one anew and use 'inherit'")
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    tables = iter(plan.tables)
    memo: dict[int, Any] = {}
    in_pieces: list[tuple[ModuleSite, list[nn.Parameter]]] = []
    for site in module_sites(model, plan):
        found = [_compact_table(site, next(tables), weight, init, generator) for weight in site.weights()]
        replacement: nn.Module = found[0] if len(found) == 1 else CompactFlatEmbedding(found, site.module.padding_idx)
        if isinstance(site.module, nn.EmbeddingBag):
            replacement = CompactEmbeddingBag(replacement, site.module)  # type: ignore[arg-type]
        replacement.path = site.path  # type: ignore[assignment]
        replacement.to(site.module.weight.device).train(site.module.training)
        # Wherever the model keeps the module, or its weight in a list of its own (as for a penalty), it gets ours.
        memo.update((id(module), replacement) for module in site.modules)
        pieces = [weight for table in found for weight in table.weights]
        if len(pieces) == 1:
            memo[id(site.module.weight)] = pieces[0]
        else:
            in_pieces.append((site, pieces))
    small = copy.deepcopy(model, memo)
    for site, pieces in in_pieces:
        stale = memo.get(id(site.module.weight))
        if stale is not None and not _replace_in_lists(small, stale, pieces):
            raise EmbtrimError(
                f"the model keeps the weight of {site.path!r} outside of its modules too, and not just in lists; this plan "
                f"stores it in {len(pieces)} pieces, which cannot take its place; leave it alone with the Task's keep="
            )
    return small


def _replace_in_lists(model: nn.Module, stale: Tensor, pieces: Sequence[Tensor]) -> bool:
    """Put `pieces` in the place of a weight in lists that a model's attributes hold; False if it is elsewhere too."""
    containers: list[Any] = [vars(module) for module in model.modules()]
    seen: set[int] = set()
    found = False
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
def _narrow(small: nn.Module, reads: Reads) -> None:
    """Let the named Linears of a compact foreign module read stored columns alone, and its tables give out no others."""
    narrowed: list[CompactEmbedding | CompactEmbeddingBag] = []
    for path, parts in reads.items():
        linear = _submodule(small, path)
        if type(linear) is not nn.Linear:
            raise EmbtrimError(f"reads= names {path!r}, which is {_kind(linear)}; name an nn.Linear")
        kept, width = [], 0
        for part in parts:
            if isinstance(part, int):
                kept.append(torch.arange(width, width + part))
                width += part
                continue
            module = _submodule(small, part)
            entries = module.entries if isinstance(module, CompactEmbeddingBag) else module
            if not isinstance(entries, CompactEmbedding):
                raise EmbtrimError(
                    f"{path!r} reads {part!r}, which is {_kind(module)}; name embeddings that were found, of one field "
                    "each, or numbers of other columns"
                )
            kept.append(width + entries.columns.cpu())
            width += entries.embedding_dim
            narrowed.append(module)  # type: ignore[arg-type]
        if width != linear.in_features:
            raise EmbtrimError(
                f"what {path!r} reads, {', '.join(map(str, parts))}, has {width:,} columns, but it takes "
                f"{linear.in_features:,}; name every part of the concatenation, in order"
            )
        columns_S = torch.cat(kept)
        # In place: a list of the model, as for a penalty, may hold this weight.
        linear.weight.data = linear.weight.data[:, columns_S.to(linear.weight.device)]
        linear.in_features = len(columns_S)
        # An export says what the full model takes.
        linear.full_in_features = width  # type: ignore[assignment]
    for module in narrowed:
        module.narrow()


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules(remove_duplicate=False)).get(path)


def _kind(module: nn.Module | None) -> str:
    return "no module of this model" if module is None else f"a {type(module).__name__}"


@torch.no_grad()
def check_compactable(task: Task) -> None:
    """Run a batch through a copy of a foreign model with compact tables: a search for one that fails would be in vain.

    Raises:
        EmbtrimError: the model, or its loss, reads the weight of an embedding that was found by other means than its module;
            or the loss is no scalar tensor.
    """
    full = task.full_plan()
    plan = full.with_columns({table.name: (0,) for table in full.tables})
    small = compact(task.model, plan, init="inherit").eval()
    with torch.random.fork_rng([]):  # a loader may draw its order from the global generator
        for batch in task.probe():
            loss = task.loss(small, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                given = (
                    f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                )
                raise EmbtrimError(
                    f"the Task's loss= must give the mean loss of a batch as a scalar tensor, it gave {given}"
                )


@torch.no_grad()
def _compact_table(
    site: ModuleSite, table: TablePlan, weight_VD: Tensor, init: Init, generator: torch.Generator
) -> CompactEmbedding:
    """One table of a foreign module, with weights."""
    module = site.module
    padding = site.reserved_rows[site.names.index(table.name)]
    compacted = CompactEmbedding(table, padding, module.max_norm, module.norm_type, module.sparse).to(weight_VD.dtype)
    if init == "inherit":
        _check_inheritable(table)
        kept_rows, compact_ids = _kept_rows(table)
        compacted.set_rows(compact_ids, weight_VD[torch.from_numpy(kept_rows)][:, list(table.columns)])
        _select(table, compacted)
    else:
        # With the spread of the model's own rows: a foreign module does not tell how it was initialised.
        for weight in compacted.weights:
            weight.normal_(0, float(weight_VD.std()), generator=generator)
        for projection in compacted.projections.values():
            projection.normal_(0, len(projection) ** -0.5, generator=generator)
        zeros = [i for i in (compacted.padding_row, table.dropped_id) if i is not None]
        compacted.set_rows(np.array(zeros, np.int64), torch.zeros(len(zeros), table.width))
    for weight in compacted.weights:
        weight.requires_grad_(module.weight.requires_grad)
    return compacted


def _select(table: TablePlan, compacted: CompactEmbedding) -> None:
    """Let the projection of a uniform table, if it has one, select the kept columns."""
    for projection in compacted.projections.values():
        projection.copy_(torch.eye(table.width)[list(table.columns)])


@torch.no_grad()
def _verify_module(
    model: nn.Module, plan: SizePlan, task: Task, split: str, max_rows: int, reads: Reads | None
) -> Verification:
    """See `verify`."""
    counts_only = any(table.only_counts for table in plan.tables)
    if counts_only:
        by_lookup = _verify_module_lookup(model, plan)
        if reads is None:
            return by_lookup
        # There is no masked model: the compact one of full output width stands for it, narrow tables aligned by selection.
        expected_of = compact(model, plan, seed=0).eval()
        for table, compacted in zip(plan.tables, compact_tables(expected_of, plan), strict=True):
            if projects(table):
                _select(table, compacted)
        small = copy.deepcopy(expected_of)
        _narrow(small, reads)
    else:
        small, expected_of = compact(model, plan, init="inherit", reads=reads).eval(), copy.deepcopy(model).eval()
        tables = iter(plan.tables)
        for site in module_sites(expected_of, plan):
            for weight_VD in site.weights():
                weight_VD.mul_(torch.from_numpy(next(tables).kept_mask()).to(weight_VD.device))
    worst, rows = 0.0, 0
    for batch in task.batches(split):
        expected = _outputs(task, expected_of, batch)
        try:
            found = _outputs(task, small, batch)
            worst = max(worst, *(_difference(a, b) for a, b in zip(found, expected, strict=True)))
        except Exception as error:  # a model may do anything with a width that it does not expect
            if reads is None:
                raise
            raise EmbtrimError(f"{_misread(reads)}; it fails: {error}") from error
        rows += len(expected[0]) if expected[0].ndim else 1
        if rows >= max_rows:
            break
    if not rows:
        raise EmbtrimError(
            f"verify compared no row: the Task's {split} batches are empty or spent; give some that can be read again"
        )
    if reads is not None and worst > MODULE_TOLERANCE:
        raise EmbtrimError(f"{_misread(reads)}; outputs differ by {worst:.2e}")
    if counts_only:
        return dataclasses.replace(by_lookup, max_difference=max(worst, by_lookup.max_difference))
    return Verification(worst, rows, MODULE_TOLERANCE, worst <= MODULE_TOLERANCE)


def _misread(reads: Reads) -> str:
    return (
        f"what reads= says of {', '.join(reads)} does not hold: the Linear reads its parts in another order, or something "
        "else reads them too; correct it, or leave it out"
    )


def _outputs(task: Task, model: nn.Module, batch: Any) -> list[Tensor]:
    """Every tensor that a model puts out while the task's loss is computed, and the loss."""
    found: list[Tensor] = []
    hook = model.register_forward_hook(
        lambda _module, _args, output: found.extend(x for x in tree_leaves(output) if isinstance(x, Tensor))
    )
    try:
        with torch.random.fork_rng([]):  # a loss may draw negatives: the next model gets the same
            loss = task.loss(model, batch)
    finally:
        hook.remove()
    return [*found, loss]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest |found - expected| / (1 + |expected|); infinite where only one of them is a number."""
    difference = torch.where(found == expected, 0.0, (found - expected).abs() / (1 + expected.abs()))
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


@torch.no_grad()
def _verify_module_lookup(model: nn.Module, plan: SizePlan) -> Verification:
    """Compare compact tables of random weights with the embedding of every id by nothing but the plan's definition."""
    small = compact(model, plan, seed=0).cpu().eval()  # where the generator is
    generator = torch.Generator().manual_seed(0)
    worst, rows = 0.0, 0
    for table, compacted in zip(plan.tables, compact_tables(small, plan), strict=True):
        stored = []
        for weight in compacted.parameters():
            weight.normal_(generator=generator)
        for weight in compacted.weights:
            wide = weight.new_zeros(len(weight), table.width)
            if str(weight.shape[1]) in compacted.projections:
                wide = weight @ compacted.projections[str(weight.shape[1])]
            elif weight.shape[1]:
                wide[:, list(table.columns)] = weight
            stored.append(wide)
        id_map = table.id_map()
        rows_V = np.arange(table.num_rows) if id_map is None else id_map
        expected_VD = torch.cat(stored)[torch.from_numpy(rows_V).long()]
        if compacted.max_norm is not None:
            expected_VD = torch.renorm(expected_VD, compacted.norm_type, 0, compacted.max_norm)
        if compacted.zeroes_padding:
            expected_VD[compacted.padding_idx] = 0.0
        found_VD = compacted(torch.arange(table.num_rows, device=expected_VD.device))
        worst, rows = max(worst, _difference(found_VD, expected_VD)), rows + table.num_rows
    return Verification(worst, rows, MODULE_TOLERANCE, worst <= MODULE_TOLERANCE, "lookup")


def compact_tables(small: nn.Module, plan: SizePlan) -> list[CompactEmbedding]:
    """The tables of a compact foreign module, in the plan's order."""
    found: list[CompactEmbedding] = []
    for path in fields_of(small, plan):
        module: Any = small.get_submodule(path)
        entries = module.entries if isinstance(module, CompactEmbeddingBag) else module
        found.extend(list(entries.tables) if isinstance(entries, CompactFlatEmbedding) else [entries])  # type: ignore[arg-type]
    return found


def _kept_rows(table: TablePlan) -> tuple[np.ndarray, np.ndarray]:
    """Kept rows of a table, and their compact ids."""
    id_map = table.id_map()
    if id_map is None:
        return np.arange(table.num_rows), np.arange(table.num_rows)
    kept_rows = np.flatnonzero(id_map != table.dropped_id) if table.has_dropped else np.arange(table.num_rows)
    return kept_rows, id_map[kept_rows]
