"""verify: prove that a compact model equals the masked full model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import made_compact
from embtrim.compaction.foreign import LinearReads, compact_tables, module_sites, narrow_linears, select_columns
from embtrim.compaction.probing import MODULE_TOLERANCE, Run, difference, run, tensors_of
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import EmbtrimError, ModelError, hint
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import TablePlan, projects
from embtrim.schema import PAD
from embtrim.system.modules import copied, uncompiled, unwrapped
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.packing import CHUNK_ROWS
from embtrim.tables.rows_read import rows_read
from embtrim.tasks.survey import plan_for
from embtrim.tasks.task import Task
from embtrim.training.evaluation import check_finite
from embtrim.training.recoding import data_for

# A zoo model passes if |compact - masked| <= tolerance * (1 + |masked|), in float64; see `MODULE_TOLERANCE` for others.
TOLERANCE = 1e-9

# Rows to look up value by value for a plan that only counts columns.
LOOKUP_ROWS = 1024
# Values of embeddings in float64 that are compared at a time, and fewest rows of a batch, whatever its rows take.
BATCH_VALUES, LEAST_BATCH = 1 << 19, 256


# The name of a method that takes a batch, or a function (model, batch) -> tensors.
Call = str | Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Verification:
    """Result of `verify`: whether a compact model equals the full model under its plan, on real rows.

    Attributes:
        max_difference: Largest |compact - expected| / (1 + |expected|) over the rows; in float64 for a zoo model.
        num_rows: Rows compared. A foreign module's rows are counted by its output.
        tolerance: Largest difference allowed.
        passed: Whether the difference is within the tolerance.
        against: Source of the expected values. "masked": the full model with the removed entries set to zero. "lookup":
            each value's embedding by definition of the plan, for plans that only count columns.
        checked: What was compared, with the largest difference of each: "forward" (what the model returned during the loss),
            "loss", "lookup" of every id, and the names of `calls=`.
    """

    max_difference: float
    num_rows: int
    tolerance: float
    passed: bool
    against: Literal["masked", "lookup"] = "masked"
    checked: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def require(self) -> None:
        """Raise EmbtrimError unless the comparison passed."""
        if not self.passed:
            where = ", ".join(name for name, found in self.checked.items() if not found <= self.tolerance)
            raise EmbtrimError(
                f"compact and {self.against} model differ by {self.max_difference:.2e} (allowed {self.tolerance:.0e}) in "
                f"{where}; please report this as a bug, with the plan"
            )


def _verification(
    checked: Mapping[str, float], num_rows: int, tolerance: float, is_lookup: bool = False
) -> Verification:
    worst = max(checked.values())
    return Verification(
        worst, num_rows, tolerance, worst <= tolerance, "lookup" if is_lookup else "masked", dict(checked)
    )


def verify(
    model: nn.Module,
    plan: SizePlan,
    data: EncodedDataset | Task,
    split: str = "valid",
    max_rows: int = 65_536,
    reads: LinearReads | None = None,
    calls: Sequence[Call] = (),
) -> Verification:
    """Compare a compact copy with the masked full model on real batches.

    The masked model is the full one with the removed entries set to zero. `verify` makes the compact copy itself: it
    inherits the weights of the full model, and narrow tables are aligned by selection under every alignment. A plan that
    only counts columns has no masked model: its compact tables, with random weights, are compared with a lookup value by
    value instead.

    Zoo models are compared in float64. Foreign modules are compared in their own precision: every output that the loss
    of the Task uses, and the loss.

    Args:
        model: Full model.
        plan: Plan made for the model's schema, or for the foreign module's sites.
        data: Data of the full model, as they were encoded; for a foreign module, its Task.
        split: Split to compare on.
        max_rows: Most rows to compare.
        reads: Same as for `compact`.
        calls: What else to compare of a foreign module: names of methods that take a batch as their only argument, such as "predict" and
            "full_sort_predict", or functions (model, batch) -> tensors.

    Raises:
        PlanError: The plan was made for another model.
        DataError: The data do not fit the model.
        ModelError: The embeddings that `reads` narrows are also read outside of its Linears, or in another order; the
            Task has no batches to compare on; `calls` names no method, or one that fails or gives no tensor; or `data` is not of
            the kind that the model needs.
    """
    model = unwrapped(model)
    if not isinstance(model, CTRModel):
        if not isinstance(data, Task):
            raise ModelError(
                f"verify got a {type(model).__name__} and a {type(data).__name__}; a module that is not one of "
                "embtrim.models is compared on the batches of its Task"
            )
        with uncompiled():
            return _verify_module(
                model, plan_for(model, plan), data, split, max_rows, reads, _named_calls(model, calls)
            )
    if calls:
        raise ModelError("calls= is for foreign modules: the models of embtrim.models have no entry point but forward")
    if not isinstance(data, EncodedDataset):
        raise ModelError(f"verify compares a zoo model on encoded data, given a {type(data).__name__}; give its data")
    data = data_for(model, data)
    if any(table.only_counts for table in plan.tables):
        return _verify_lookup(model, plan, data, split, min(max_rows, LOOKUP_ROWS))
    return _verify_masked(model, plan, data, split, max_rows)


@torch.no_grad()
def _verify_masked(model: CTRModel, plan: SizePlan, data: EncodedDataset, split: str, max_rows: int) -> Verification:
    """Compare a compact zoo model with the masked one, on tables in float64 of the rows that each batch reads."""
    full, tables = _in_float64(model), model.tables
    small = made_compact(full, plan, "inherit").eval()
    compacted, masked = small.tables, _MaskedRows(tables, plan)
    recoded = data.recode(plan)
    values_of_row = len(data.schema.id_fields) * max(1, plan.width)
    at_once = max(LEAST_BATCH, BATCH_VALUES // values_of_row)
    batch_size = min(max_rows, 1 << (at_once.bit_length() - 1))  # a power of two, of which the default is a multiple
    batches = zip(data.batches(split, batch_size), recoded.batches(split, batch_size), strict=True)
    worst, rows = 0.0, 0
    for number, (batch, small_batch) in enumerate(batches):
        dense = None if batch.dense_BE is None else batch.dense_BE.double()
        full.tables = rows_read(tables, batch.ids_BC, torch.float64, masked.values, masked.first_order)
        small.tables = rows_read(compacted, small_batch.ids_BC, torch.float64)
        expected = full(batch.ids_BC, dense)
        check_finite(expected, "output", split, number)
        worst = max(worst, difference([small(small_batch.ids_BC, dense)], [expected]))
        rows += len(batch)
        if rows >= max_rows:
            break
    return _verification({"forward": worst}, rows, TOLERANCE)


def _in_float64(model: CTRModel) -> CTRModel:
    """A copy of a zoo model for inference on the CPU in float64, but for the tables, which are those of the model."""
    found = copied(model, {id(model.tables): model.tables})
    for part in found.children():
        if part is not found.tables:
            part.cpu().double().eval()
    found.training = False
    return found


class _MaskedRows:
    """What the masked model reads in the place of each row of full tables: zeros where the plan removes an entry.

    Args:
        tables: Full tables, R storage rows.
        plan: Plan that says which columns.
    """

    def __init__(self, tables: EmbeddingTables, plan: SizePlan) -> None:
        kept, is_block = [], []
        kind_R = np.empty(tables.num_rows, np.int32)
        for table in plan.tables:
            start = tables.layout.segment_starts[table.name][0]
            # Rows in no block, at -1, are of the table's last kind.
            kind_R[start : start + table.num_rows] = table.block_of_row() % (len(table.blocks) + 1) + len(is_block)
            kept.append(table.kept_by_block())
            is_block += [True] * len(table.blocks) + [False]
        self.kind_R, self.kept_KD = torch.from_numpy(kind_R), torch.from_numpy(np.concatenate(kept))
        self.is_block_K = torch.tensor(is_block)

    def values(self, rows_U: Tensor, found_UW: Tensor) -> Tensor:
        """The entries that are kept of storage rows; zeros for the others."""
        return found_UW * self.kept_KD[self.kind_R[rows_U.long()].long(), : found_UW.shape[1]]

    def first_order(self, rows_U: Tensor, found_U1: Tensor) -> Tensor:
        """The first-order weights of rows that are kept; zeros for the others."""
        return found_U1 * self.is_block_K[self.kind_R[rows_U.long()].long(), None]


@torch.no_grad()
def _verify_lookup(model: CTRModel, plan: SizePlan, data: EncodedDataset, split: str, max_rows: int) -> Verification:
    """Compare the compact tables with embeddings looked up value by value, straight from the definition of the plan."""
    full_ids_BC = next(iter(data.batches(split, max_rows))).ids_BC.numpy()
    recoded = data.recode(plan)
    ids_BC = next(iter(recoded.batches(split, max_rows))).ids_BC
    tables = made_compact(model, plan, seed=0).cpu().eval().tables
    generator = torch.Generator().manual_seed(0)
    tables.weight.normal_(generator=generator)
    by_name = {table.name: table for table in plan.tables}
    read: dict[str, set[int]] = {name: set() for name in by_name}
    for field, columns in zip(data.schema.id_fields, data.schema.column_slices, strict=True):
        read[field.table_name].update(np.unique(full_ids_BC[:, columns]).tolist())
    embeddings: dict[str, dict[int, Tensor]] = {}
    for table in plan.tables:
        rows = np.array(sorted(read[table.name] - {PAD}), np.int64)
        id_map = recoded.id_maps.get(table.name)
        embeddings[table.name] = _draw_rows(tables, table, rows, rows if id_map is None else id_map[rows], generator)

    found_BS = rows_read(tables, ids_BC, torch.float64)(ids_BC).concat
    worst = 0.0
    for row, ids_C in enumerate(full_ids_BC):
        parts = []
        for field, columns in zip(data.schema.id_fields, data.schema.column_slices, strict=True):
            table = by_name[field.table_name]
            vectors = [embeddings[table.name][i] for i in ids_C[columns].tolist() if i != PAD]
            pooled = torch.stack(vectors).sum(0) if vectors else torch.zeros(table.output_width).double()
            parts.append(pooled / len(vectors) if field.pooling == "mean" and vectors else pooled)
        worst = max(worst, difference([found_BS[row]], [torch.cat(parts)]))
    return _verification({"lookup": worst}, len(full_ids_BC), TOLERANCE, is_lookup=True)


def _draw_rows(
    tables: EmbeddingTables, table: TablePlan, rows: np.ndarray, compact_ids: np.ndarray, generator: torch.Generator
) -> dict[int, Tensor]:
    """Give some rows of a compact table random values, and return the embedding of each by definition of the plan.

    Args:
        tables: The compact tables.
        table: Plan of the table.
        rows: Rows of the full table, ascending.
        compact_ids: Where the compact table should hold them.
        generator: Source of the values; the last ones are those of the DROPPED row.
    """
    values_ND = torch.randn(len(rows) + 1, table.width, generator=generator)
    block_N = table.block_of_row()[rows]
    kept = block_N >= 0
    tables.set_rows(table.name, compact_ids[kept], values_ND[:-1][torch.from_numpy(kept)])
    if table.dropped_id is not None:
        tables.set_rows(table.name, np.array([table.dropped_id]), values_ND[-1:])
    widest = max((block.width for block in table.blocks), default=0)
    found = {}
    for place, row in enumerate(rows.tolist()):
        width = table.blocks[block_N[place]].width if kept[place] else widest
        vector = values_ND[place if kept[place] else -1, :width].double()
        if table.mixed and width < table.width:
            zero = torch.zeros(table.width).double()
            vector = vector @ tables.shared_projections[str(width)].double() if width else zero
        found[row] = vector
    return found


@torch.no_grad()
def _verify_module(
    model: nn.Module,
    plan: SizePlan,
    task: Task,
    split: str,
    max_rows: int,
    reads: LinearReads | None,
    calls: Mapping[str, Callable[[Any, Any], Any]],
) -> Verification:
    """`verify` for a foreign module."""
    is_lookup = any(table.only_counts for table in plan.tables)
    small, expected_of = _looked_up_pair(model, plan, reads) if is_lookup else _masked_pair(model, plan, reads)
    checked = dict.fromkeys(("forward", "loss", *calls), 0.0)
    rows = 0
    for number, batch in enumerate(task.batches(split)):
        expected = run(task, expected_of, batch)
        num_rows = len(expected.outputs[0]) if expected.outputs and expected.outputs[0].ndim else 1
        if num_rows:
            check_finite(expected.loss, "loss", split, number)
        try:
            found = run(task, small, batch)
        except Exception as error:  # a model may fail in any way on a width that it does not expect
            if reads is None:
                raise
            raise ModelError(f"{_misread(reads)}; it fails: {error}") from error
        outputs, loss = _module_differences(found, expected, reads)
        checked["forward"], checked["loss"] = max(checked["forward"], outputs), max(checked["loss"], loss)
        for name, call in calls.items():
            checked[name] = max(checked[name], _difference_of_call(name, call, small, expected_of, batch))
        rows += num_rows
        if rows >= max_rows:
            break
    if not rows:
        raise ModelError(
            f"verify compared no row: the Task's {split} batches are empty or spent; give some that can be read again"
        )
    if not expected.outputs:
        del checked["forward"]
    worst = max(checked.values())
    if reads is not None and worst > MODULE_TOLERANCE:
        raise ModelError(f"{_misread(reads)}; outputs differ by {worst:.2e}")
    if is_lookup:
        checked["lookup"], rows = _difference_of_lookups(model, plan)
    return _verification(checked, rows, MODULE_TOLERANCE, is_lookup)


def _difference_of_call(
    name: str, call: Callable[[Any, Any], Any], small: nn.Module, expected_of: nn.Module, batch: Any
) -> float:
    """The difference of one of `calls=` for a batch; ModelError if it fails or gives nothing to compare."""
    try:
        expected = tensors_of(call, expected_of, batch)
    except Exception as error:  # a method may fail in any way on arguments that it does not expect
        raise ModelError(
            f"calls= names {name!r}, which fails when it is given a batch ({type(error).__name__}: {error}); give a "
            "function (model, batch) -> tensors that calls it as it expects"
        ) from error
    if not expected:
        raise ModelError(f"calls= names {name!r}, which gives no tensor to compare; leave it out")
    try:
        found = tensors_of(call, small, batch)
    except Exception as error:
        raise ModelError(
            f"calls= names {name!r}, which runs in the full model and fails in the compact one "
            f"({type(error).__name__}: {error}); exclude= the table that it reads"
        ) from error
    return difference(found, expected)


def _named_calls(model: nn.Module, calls: Sequence[Call]) -> dict[str, Callable[[Any, Any], Any]]:
    """The functions of `calls=` by name; ModelError for what is neither a method of the model nor a function."""
    found: dict[str, Callable[[Any, Any], Any]] = {}
    for number, call in enumerate([calls] if isinstance(calls, str) else calls, 1):
        if isinstance(call, str):
            if not callable(getattr(model, call, None)):
                methods = [name for name in dir(type(model)) if not name.startswith("_") and name not in dir(nn.Module)]
                raise ModelError(
                    f"calls= names {call!r}, which is not a method of this {type(model).__name__}; {hint(call, methods)}"
                )
            found[call] = lambda some, batch, name=call: getattr(some, name)(batch)
        elif callable(call):
            found[f"call {number} ({getattr(call, '__name__', type(call).__name__)})"] = call
        else:
            raise ModelError(f"calls= takes names of methods and functions (model, batch) -> tensors, given {call!r}")
    return found


def _masked_pair(model: nn.Module, plan: SizePlan, reads: LinearReads | None) -> tuple[nn.Module, nn.Module]:
    """The compact module, and the full one with the removed entries set to zero."""
    small, masked = made_compact(model, plan, "inherit", reads=reads).eval(), copied(model).eval()
    tables = iter(plan.tables)
    for site in module_sites(masked, plan):
        for weight_VD in site.weights():
            _mask(weight_VD, next(tables))
    return small, masked


def _mask(weight_VD: Tensor, table: TablePlan) -> None:
    """Set the entries of a weight that a plan removes to zero, in place."""
    kept_KD = torch.from_numpy(table.kept_by_block()).to(weight_VD.device)
    block_V = torch.from_numpy(table.block_of_row())
    for part_ND, block_N in zip(weight_VD.split(CHUNK_ROWS), block_V.split(CHUNK_ROWS), strict=True):
        part_ND.mul_(kept_KD[block_N.long().to(weight_VD.device)])  # the last row, at -1, is that of no block


def _looked_up_pair(model: nn.Module, plan: SizePlan, reads: LinearReads | None) -> tuple[nn.Module, nn.Module]:
    """A compact module with random weights, and the full one with the embeddings that the compact one gives every id.

    A plan that only counts columns has no masked model. Under `reads`, tables are aligned by selection.
    """
    small, expected_of = made_compact(model, plan, seed=0).eval(), copied(model).eval()
    compacted = compact_tables(small, plan)
    if reads is not None:
        for table, found in zip(plan.tables, compacted, strict=True):
            if projects(table):
                select_columns(table, found)
    weights = [weight_VD for site in module_sites(expected_of, plan) for weight_VD in site.weights()]
    for weight_VD, found in zip(weights, compacted, strict=True):
        weight_VD.copy_(found.all_rows())
    if reads is not None:
        narrow_linears(small, reads)
    return small, expected_of


def _module_differences(found: Run, expected: Run, reads: LinearReads | None) -> tuple[float, float]:
    """Largest differences of outputs and of losses; ModelError where the losses differ though the outputs do not."""
    outputs = difference(found.outputs, expected.outputs)
    loss = difference([found.loss], [expected.loss])
    if reads is None and expected.outputs and outputs <= MODULE_TOLERANCE < loss:
        raise ModelError(
            f"compact and masked model give the same output, but losses that differ by {loss:.2e}: the Task's loss= looks at "
            "more than the output, such as isinstance(m, nn.Embedding) or the number of parameters for a penalty; compare with "
            "a Task whose loss= has no such penalty"
        )
    return outputs, loss


def _misread(reads: LinearReads) -> str:
    return (
        f"reads= is wrong for {', '.join(reads)}: the Linear reads its parts in another order, or something else reads them "
        "too; correct it, or leave it out"
    )


@torch.no_grad()
def _difference_of_lookups(model: nn.Module, plan: SizePlan) -> tuple[float, int]:
    """Compare compact tables of random weights with the embedding of every id, straight from the definition of the plan.

    Returns:
        The largest difference, and the number of ids.
    """
    small = made_compact(model, plan, seed=0).cpu().eval()  # the generator is on the CPU
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
        worst, rows = max(worst, difference([found_VD], [expected_VD])), rows + table.num_rows
    return worst, rows
