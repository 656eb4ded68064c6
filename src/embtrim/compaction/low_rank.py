"""Low-rank starts: narrow tables that begin as approximations of the trained ones, and know what each coordinate is worth.

    e  ~  e A_w B_w,    A_w in R^{D x w},  B_w in R^{w x D}

The first w coordinates e A_w of every embedding are stored; what reads them takes them back by B_w. The expected
second-order loss of this is

    1/2 tr( G (I - A_w B_w)^T C (I - A_w B_w) ),    C = 1/N sum_r n_r e_r e_r^T                                   (loss)

G is the sensitivity of the table (tasks/sensitivity.py), n_r how often row r occurs in the training data, and N the
largest number of occurrences that a table has. Which coordinates a table may have depends on the model:

    own         A and B minimise (loss) for each table: with S = G^{1/2} and the eigenvectors U of S C S, in order of
                their eigenvalues, A = S U and B = U^T S^{-1}. The table has a projection, or linear layers read it.
    shared      One rotation R for all tables, A = R and B = R^T, since inner products of fields need the same coordinates:
                the eigenvectors of sum_f tr(G_f) C_f. The layers that read the tables are rotated back; nothing is stored.
    columns     The columns of most loss G_jj C_jj, for models that know single columns.

Rows that a plan drops read their mean embedding and their mean first-order weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.compaction.foreign import compact_tables
from embtrim.compaction.inheriting import kept_rows_of
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import TablePlan, projects
from embtrim.tables.packing import CHUNK_ROWS
from embtrim.tables.replacements import CompactEmbedding
from embtrim.tasks.sensitivity import sensitivities
from embtrim.tasks.sharing import OneProcess
from embtrim.tasks.sites import weights_kept
from embtrim.tasks.table_parts import whole_parts
from embtrim.tasks.task import Task

# Directions in which the loss feels less than this part of the strongest direction count as this part: S is inverted.
LEAST_SENSITIVITY = 1e-6

# Which coordinates tables may have; see the module docstring.
Coordinates = Literal["own", "shared", "columns"]


@dataclass(frozen=True)
class Basis:
    """Coordinates of one table, most important first.

    Attributes:
        encode_DD: A: embeddings times the first w columns are the stored coordinates.
        decode_DD: B: the first w rows take w coordinates back to the full width.
        lost_D: Second-order loss that the first w coordinates leave, for w = 0..D; float64 (D + 1,).
        gain_D: Second-order loss of a mean squared error of 1 in each coordinate, times 2; float64 (D,).
        mean_D: Mean embedding over the training data.
        sensitivity: Mean sensitivity of a column, tr(G) / D.
        columns: The columns that the coordinates are, most important first; None where they are no columns.
    """

    encode_DD: Tensor
    decode_DD: Tensor
    lost_D: np.ndarray
    gain_D: np.ndarray
    mean_D: Tensor
    sensitivity: float
    columns: tuple[int, ...] | None = None


def coordinates_of(model: nn.Module, plan: SizePlan | None = None) -> Coordinates:
    """The coordinates that tables of a model may have; those of a plan with projections are the tables' own."""
    if not isinstance(model, CTRModel) or (plan is not None and any(projects(table) for table in plan.tables)):
        return "own"
    if model.knows_columns:
        return "columns"
    return "shared" if model.needs_aligned else "own"


def bases(
    task: Task, weights: Mapping[str, Tensor], counts: Mapping[str, np.ndarray], coordinates: Coordinates
) -> dict[str, Basis]:
    """The basis of every table by its name: one forward and backward pass over the validation batches, and the tables.

    Args:
        task: Task of the trained full model.
        weights: Weights of each table, or of the rows of it that this process reads; see `trained_rows`.
        counts: Occurrences of these rows in the training data.
        coordinates: Coordinates of the tables; see `coordinates_of`.
    """
    num_rows = num_occurrences(counts, task)
    sensitivity = sensitivities(task)
    moments = {name: _moments(weights[name], counts[name], num_rows, task) for name in sensitivity}
    if coordinates == "own":
        return {name: _own_basis(G, *moments[name], weights[name]) for name, G in sensitivity.items()}
    if coordinates == "shared":
        parts = [G.trace() * moments[name][0] for name, G in sensitivity.items()]
        rotation_DD = torch.linalg.eigh(sum(parts[1:], parts[0]))[1].flip(1)
        return {
            name: _basis(rotation_DD, G, *moments[name], weights[name], columns=None) for name, G in sensitivity.items()
        }
    worth = {name: G.diagonal() * moments[name][0].diagonal() for name, G in sensitivity.items()}
    if task.needs_aligned:  # products of two fields need the same columns of both
        total_D = torch.stack(list(worth.values())).sum(0)
        worth = dict.fromkeys(worth, total_D)
    found = {}
    for name, G in sensitivity.items():
        order = torch.argsort(worth[name], descending=True, stable=True)
        chosen_DD = torch.eye(len(order), dtype=torch.float64)[:, order]
        found[name] = _basis(chosen_DD, G, *moments[name], weights[name], columns=tuple(order.tolist()))
    return found


def num_occurrences(counts: Mapping[str, np.ndarray], group: OneProcess) -> int:
    """N: the largest number of occurrences that a table has, and 1 at least."""
    own = torch.tensor([int(count_V.sum()) for count_V in counts.values()], dtype=torch.int64)
    return max(1, *group.summed(own).tolist())


def trained_rows(task: Task) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Weights of each table (V, D), and how often its rows occur in the training data (V,); padding rows count 0."""
    parts = whole_parts(task.sites(task.model), task.row_counts())
    return {name: part.weight_ND for name, part in parts.items()}, {name: p.count_N for name, p in parts.items()}


def _moments(weight_VD: Tensor, count_V: np.ndarray, num_rows: int, group: OneProcess) -> tuple[Tensor, Tensor]:
    """C and the mean embedding of a table, float64; of a table whose rows a group of processes shares."""
    width = weight_VD.shape[1]
    moment_DD, mean_D = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for part, count in zip(
        weight_VD.split(CHUNK_ROWS), torch.from_numpy(count_V).double().split(CHUNK_ROWS), strict=True
    ):
        values = part.detach().cpu().double()
        moment_DD += (values * count[:, None]).T @ values
        mean_D += count @ values
    total = int(group.summed(torch.tensor(int(count_V.sum()))))
    return group.summed(moment_DD) / num_rows, group.summed(mean_D) / max(1, total)


def _own_basis(sensitivity_DD: Tensor, moment_DD: Tensor, mean_D: Tensor, like: Tensor) -> Basis:
    width = len(mean_D)
    strengths, directions = torch.linalg.eigh(sensitivity_DD)
    root = strengths.clamp(min=max(LEAST_SENSITIVITY * float(strengths.max()), 1e-30)).sqrt()  # fp32 holds its inverse
    forth, back = (directions * root) @ directions.T, (directions / root) @ directions.T
    lost, eigenvectors = torch.linalg.eigh(forth @ moment_DD @ forth)
    vectors = eigenvectors.flip(1)
    tail = np.concatenate([[0.0], np.cumsum(lost.clamp(min=0).numpy())])[::-1] / 2
    return Basis(
        (forth @ vectors).to(like),
        (vectors.T @ back).to(like),
        tail.copy(),
        np.ones(width),
        mean_D.to(like),
        float(sensitivity_DD.trace()) / max(1, width),
    )


def _basis(
    orthogonal_DD: Tensor,
    sensitivity_DD: Tensor,
    moment_DD: Tensor,
    mean_D: Tensor,
    like: Tensor,
    *,
    columns: tuple[int, ...] | None,
) -> Basis:
    """The basis whose coordinates are e times the columns of an orthogonal matrix."""
    gain_DD, inside_DD = (orthogonal_DD.T @ matrix @ orthogonal_DD for matrix in (sensitivity_DD, moment_DD))
    product_DD = (gain_DD * inside_DD).numpy()
    # Without the coordinates from w on, the loss is half the sum over the products' last rows and columns.
    corner = product_DD[::-1, ::-1].cumsum(0).cumsum(1).diagonal()[::-1]
    return Basis(
        orthogonal_DD.to(like),
        orthogonal_DD.T.contiguous().to(like),
        np.append(np.maximum(corner, 0.0), 0.0) / 2,
        gain_DD.diagonal().numpy().copy(),
        mean_D.to(like),
        float(sensitivity_DD.trace()) / max(1, len(mean_D)),
        columns,
    )


def stored_coordinates(model: nn.Module, plan: SizePlan) -> dict[str, list[int]]:
    """The coordinates that tables of a plan store after a low-rank start, by table; tables that store columns are left out.

    Own coordinates are the first ones, in narrow tables. Shared ones are those of the table's columns, in all tables if
    any is narrow.
    """
    narrow = {t.name: t.output_width < t.width for t in plan.tables if t.output_width and not t.mixed}
    tables = {t.name: t for t in plan.tables if t.name in narrow}
    coordinates = coordinates_of(model, plan)
    if coordinates == "shared":
        return {name: list(table.columns) for name, table in tables.items()} if any(narrow.values()) else {}
    read_linearly = isinstance(model, CTRModel) and not model.needs_aligned and not model.knows_columns
    own = {name for name, table in tables.items() if narrow[name] and (projects(table) or read_linearly)}
    return {name: list(range(tables[name].output_width)) for name in own}


@torch.no_grad()
def start_low_rank(small: nn.Module, plan: SizePlan, task: Task) -> None:
    """Turn the inherited tables of a compact model into low-rank approximations of the trained ones, in place.

    Tables that store columns keep what they inherited. The DROPPED row of every table becomes the mean of the rows that it
    stands for.

    Args:
        small: Compact model, from `compact(full, plan, init="inherit")`, in fp32.
        plan: Plan of the compact model.
        task: Task of the trained full model.
    """
    with weights_kept(task.model):
        weights, counts = trained_rows(task)
        found = bases(task, weights, counts, coordinates_of(task.model, plan))
        _start_tables(small, plan, task.model, weights, counts, found)
        _start_first_order(small, plan, task, counts)


def _start_first_order(small: nn.Module, plan: SizePlan, task: Task, counts: Mapping[str, np.ndarray]) -> None:
    """Set the first-order weight of every DROPPED row."""
    first_order = task.first_order_weights()
    if not first_order or not isinstance(small, CTRModel) or small.tables.first_order is None:
        return
    for table in plan.tables:
        if table.dropped_id is not None:
            place = torch.from_numpy(small.tables.storage_rows(table.name, np.array([table.dropped_id])))
            mean = mean_of_dropped(table, first_order[table.name][:, None], counts[table.name])
            small.tables.first_order[place.to(mean.device)] = mean


def mean_of(values_VD: Tensor, count_V: np.ndarray) -> Tensor:
    """Mean row (D,) over the training data; zeros if no row occurs there."""
    total_D = torch.zeros(values_VD.shape[1], dtype=torch.float64)
    for part, count in zip(
        values_VD.split(CHUNK_ROWS), torch.from_numpy(count_V).double().split(CHUNK_ROWS), strict=True
    ):
        total_D += count @ part.detach().cpu().double()
    return (total_D / max(1, int(count_V.sum()))).to(values_VD)


def mean_of_dropped(table: TablePlan, values_VD: Tensor, count_V: np.ndarray) -> Tensor:
    """Mean row (D,) of the rows that a plan drops; of all rows if none of them occurs in the training data."""
    id_map = table.id_map()
    dropped_V = count_V if id_map is None else np.where(id_map == table.dropped_id, count_V, 0)
    return mean_of(values_VD, dropped_V if dropped_V.any() else count_V)


def _start_tables(
    small: nn.Module,
    plan: SizePlan,
    full: nn.Module,
    weights: Mapping[str, Tensor],
    counts: Mapping[str, np.ndarray],
    found: Mapping[str, Basis],
) -> None:
    compacted: dict[str, CompactEmbedding] = {}
    if not isinstance(small, CTRModel):
        compacted = dict(zip([t.name for t in plan.tables], compact_tables(small, plan), strict=True))
    stored = stored_coordinates(full, plan)
    for table in plan.tables:
        if not table.output_width or table.mixed:
            continue
        basis, weight_VD = found[table.name], weights[table.name]
        encode = basis.encode_DD[:, stored[table.name]] if table.name in stored else None
        set_rows = (
            partial(small.tables.set_rows, table.name)
            if isinstance(small, CTRModel)
            else compacted[table.name].set_rows
        )
        if encode is not None:
            for kept_rows, compact_ids in kept_rows_of(table):
                set_rows(compact_ids, weight_VD[torch.from_numpy(kept_rows).to(weight_VD.device)] @ encode)
        if table.dropped_id is not None:
            mean_D = mean_of_dropped(table, weight_VD, counts[table.name])
            mean = mean_D @ encode if encode is not None else mean_D[list(table.columns)]
            set_rows(np.array([table.dropped_id]), mean[None])
        if encode is not None and not isinstance(small, CTRModel):
            compacted[table.name].projections[str(table.output_width)].copy_(basis.decode_DD[: table.output_width])
    if isinstance(small, CTRModel) and isinstance(full, CTRModel):
        _start_readers(small, full, stored, found)


def _start_readers(
    small: CTRModel, full: CTRModel, stored: Mapping[str, list[int]], found: Mapping[str, Basis]
) -> None:
    """Set the projections of a zoo model, and the layers that read its concatenated tables, to the bases."""
    layout = small.tables.layout
    for place, output in enumerate(layout.first_projected_outputs):
        name, column = layout.projection_key(output)
        small.tables.projection[place] = found[name].decode_DD[column]
    ours, theirs = dict(small.named_parameters()), dict(full.named_parameters())
    for read in small.reads():
        if "concat" not in read.parts:
            continue
        before = read.parts[: read.parts.index("concat")]
        start = sum(len(small.kept_inputs(part)) for part in before)
        source = sum(len(full.kept_inputs(part)) for part in before)
        for table in layout.table_of_field:
            width = table.output_width
            if table.name in stored:
                decode_WD = found[table.name].decode_DD[stored[table.name]]
                read_HD = theirs[read.parameter].narrow(read.axis, source, table.width).movedim(read.axis, -1)
                ours[read.parameter].narrow(read.axis, start, width).copy_(
                    (read_HD @ decode_WD.T).movedim(-1, read.axis)
                )
            start, source = start + width, source + table.width
