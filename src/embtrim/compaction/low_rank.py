"""Low-rank starts: narrow tables that begin as the best approximation of the trained ones, not as a part of their columns.

    e  ~  e A_w B_w,    A_w in R^{D x w},  B_w in R^{w x D}

The first w coordinates e A_w of every embedding are stored, and the projection B_w of the table, or the layer that reads
it, takes them back to the full width. A_w and B_w minimise the expected second-order loss

    1/2 tr( G (I - A_w B_w)^T C (I - A_w B_w) ),    C = 1/N sum_r n_r e_r e_r^T

G is the sensitivity of the table (tasks/sensitivity.py), n_r how often row r occurs in the training data, and N the
largest number of occurrences that a table has. With S = G^{1/2} and the eigenvectors U of S C S, in order of their
eigenvalues, A = S U and B = U^T S^{-1}. The loss that w coordinates leave is half the sum of the other eigenvalues. Rows
that a plan drops read the mean embedding of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.compaction.foreign import compact_tables
from embtrim.compaction.inheriting import kept_rows_of
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import TableShape, projects
from embtrim.tables.packing import CHUNK_ROWS
from embtrim.tables.replacements import CompactEmbedding
from embtrim.tasks.sensitivity import sensitivities
from embtrim.tasks.sites import ModuleSite, weights_by_table, weights_kept
from embtrim.tasks.task import Task

# Directions in which the loss feels less than this part of the strongest direction count as this part: S is inverted.
LEAST_SENSITIVITY = 1e-6


@dataclass(frozen=True)
class Basis:
    """Coordinates of one table, most important first.

    Attributes:
        encode_DD: A: embeddings times the first w columns are the stored coordinates.
        decode_DD: B: the first w rows take w coordinates back to the full width.
        lost_D: Second-order loss that the first w coordinates leave, for w = 0..D; float64 (D + 1,).
        mean_D: Mean embedding over the training data.
        sensitivity: Mean sensitivity of a column, tr(G) / D.
    """

    encode_DD: Tensor
    decode_DD: Tensor
    lost_D: np.ndarray
    mean_D: Tensor
    sensitivity: float


def bases(task: Task, weights: Mapping[str, Tensor], counts: Mapping[str, np.ndarray]) -> dict[str, Basis]:
    """The basis of every table by its name: one forward and backward pass over the validation batches, and the tables.

    Args:
        task: Task of the trained full model.
        weights: Weights of each table; see `trained_rows`.
        counts: Occurrences of its rows in the training data.
    """
    num_rows = num_occurrences(counts)
    return {
        name: _basis(sensitivity_DD, weights[name], counts[name], num_rows)
        for name, sensitivity_DD in sensitivities(task).items()
    }


def num_occurrences(counts: Mapping[str, np.ndarray]) -> int:
    """N: the largest number of occurrences that a table has, and 1 at least."""
    return max(1, *(int(count_V.sum()) for count_V in counts.values()))


def trained_rows(task: Task) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Weights of each table (V, D), and how often its rows occur in the training data (V,); padding rows count 0."""
    sites, counts = task.sites(task.model), task.row_counts()
    for site in sites:
        if isinstance(site, ModuleSite):
            for name, row in zip(site.names, site.reserved_rows, strict=True):
                if row is not None:
                    counts[name][row] = 0  # padding reads zeros or is left out of its bag, at any bits
    return weights_by_table(sites), counts


def _basis(sensitivity_DD: Tensor, weight_VD: Tensor, count_V: np.ndarray, num_rows: int) -> Basis:
    width = weight_VD.shape[1]
    moment_DD, mean_D = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for part, count in zip(
        weight_VD.split(CHUNK_ROWS), torch.from_numpy(count_V).double().split(CHUNK_ROWS), strict=True
    ):
        values = part.detach().cpu().double()
        moment_DD += (values * count[:, None]).T @ values
        mean_D += count @ values
    strengths, directions = torch.linalg.eigh(sensitivity_DD)
    root = strengths.clamp(min=max(LEAST_SENSITIVITY * float(strengths.max()), 1e-30)).sqrt()  # fp32 holds its inverse
    forth, back = (directions * root) @ directions.T, (directions / root) @ directions.T
    lost, eigenvectors = torch.linalg.eigh(forth @ moment_DD @ forth / num_rows)
    vectors = eigenvectors.flip(1)
    tail = np.concatenate([[0.0], np.cumsum(lost.clamp(min=0).numpy())])[::-1] / 2
    return Basis(
        (forth @ vectors).to(weight_VD),
        (vectors.T @ back).to(weight_VD),
        tail.copy(),
        (mean_D / max(1, int(count_V.sum()))).to(weight_VD),
        float(sensitivity_DD.trace()) / max(1, width),
    )


def has_coordinates(model: nn.Module, table: TableShape) -> bool:
    """Whether a narrow table of a plan may store coordinates of its own: what reads it is linear, or projects it back."""
    if not 0 < table.output_width < table.width or table.mixed:
        return False
    return projects(table) or (isinstance(model, CTRModel) and not model.needs_aligned and model.reads_linearly)


@torch.no_grad()
def start_low_rank(small: nn.Module, plan: SizePlan, task: Task) -> None:
    """Turn the inherited tables of a compact model into low-rank approximations of the trained ones, in place.

    Tables that keep all their columns, and narrow ones whose reader knows single columns, keep what they inherited. The
    DROPPED row of every table becomes the mean embedding.

    Args:
        small: Compact model, from `compact(full, plan, init="inherit")`, in fp32.
        plan: Plan of the compact model.
        task: Task of the trained full model.
    """
    with weights_kept(task.model):
        weights, counts = trained_rows(task)
        _start_tables(small, plan, task.model, weights, bases(task, weights, counts))


def _start_tables(
    small: nn.Module, plan: SizePlan, full: nn.Module, weights: Mapping[str, Tensor], found: Mapping[str, Basis]
) -> None:
    compacted: dict[str, CompactEmbedding] = {}
    if not isinstance(small, CTRModel):
        compacted = dict(zip([t.name for t in plan.tables], compact_tables(small, plan), strict=True))
    for table in plan.tables:
        if not table.output_width or table.mixed:
            continue
        basis, weight_VD = found[table.name], weights[table.name]
        encode = basis.encode_DD[:, : table.output_width] if has_coordinates(full, table) else None
        tables: list[tuple[np.ndarray, Tensor]] = []
        if encode is not None:
            kept_rows, compact_ids = kept_rows_of(table)
            tables.append((compact_ids, weight_VD[torch.from_numpy(kept_rows).to(weight_VD.device)] @ encode))
        if table.dropped_id is not None:
            mean = basis.mean_D @ encode if encode is not None else basis.mean_D[list(table.columns)]
            tables.append((np.array([table.dropped_id]), mean[None]))
        for ids, values in tables:
            if isinstance(small, CTRModel):
                small.tables.set_rows(table.name, ids, values)
            else:
                compacted[table.name].set_rows(ids, values)
        if encode is not None and not isinstance(small, CTRModel):
            compacted[table.name].projections[str(table.output_width)].copy_(basis.decode_DD[: table.output_width])
    if isinstance(small, CTRModel) and isinstance(full, CTRModel):
        _start_readers(small, full, found)


def _start_readers(small: CTRModel, full: CTRModel, found: Mapping[str, Basis]) -> None:
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
            if has_coordinates(full, table):
                read_HD = theirs[read.parameter].narrow(read.axis, source, table.width).movedim(read.axis, -1)
                ours[read.parameter].narrow(read.axis, start, width).copy_(
                    (read_HD @ found[table.name].decode_DD[:width].T).movedim(-1, read.axis)
                )
            start, source = start + width, source + table.width
