"""EmbeddingViews: the embeddings of one batch as models read them - side by side, aligned to the full width, or as FM term.

Axes: B batch, F fields, D full width, S columns of `concat`, P projected ones among them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from embtrim.tables.indices import scatter_matrix
from embtrim.tables.kernels.fm import FMTerm
from embtrim.tables.storage import TableStorage


@dataclass
class EmbeddingViews:
    """The embeddings of one batch, in the form that each part of a model needs.

    Attributes:
        tables: The tables that were looked up.
        concat: (B, S) embeddings side by side in field order, each as wide as its plan says.
        first_order: (B,) sum of the first-order weights, or None if the tables have none.
    """

    tables: TableStorage
    concat: Tensor
    first_order: Tensor | None = None
    _aligned: Tensor | None = field(default=None, repr=False)

    @property
    def aligned(self) -> Tensor:
        """(B, F, D) embeddings brought to the full width, by scatter or projection."""
        if self._aligned is None:
            self._aligned = align(self.tables, self.concat)
        return self._aligned

    def fm(self) -> Tensor:
        """(B,) FM term: sum over pairs of fields of the inner products of aligned embeddings (Rendle 2010).

        Narrow tables never build (B, F, D): with P the stacked projections, the square of the sum is (E P)^2. The sum
        of squares is taken of the outputs themselves where none is projected, and of projected ones as rowsum((E G) * E)
        with G = blockdiag(P_f P_f^T).
        """
        tables, concat = self.tables, self.concat
        layout = tables.layout
        projection_SD = None if layout.is_equal_width else stacked_projections(tables)
        grams = gram_parts(tables) if layout.has_projections else []
        num_projected = sum(map(len, grams))
        if not torch.compiler.is_compiling():  # what is exported or compiled is left to torch, operator by operator
            projected = None if num_projected in (0, concat.shape[1]) else tables.projected_outputs
            return FMTerm.apply(concat, tables.num_fields, projection_SD, projected, *grams)
        if projection_SD is None:
            sum_BD = concat.view(concat.shape[0], tables.num_fields, tables.width).sum(1)
        else:
            sum_BD = concat @ projection_SD
        if not grams:
            return 0.5 * ((sum_BD * sum_BD).sum(1) - (concat * concat).sum(1))
        plain_BS = concat.index_select(1, tables.plain_outputs)
        squares_B = (plain_BS * plain_BS).sum(1)
        projected_BP = concat.index_select(1, tables.projected_outputs)
        for part_BP, gram_PP in zip(projected_BP.split([len(gram) for gram in grams], 1), grams, strict=True):
            squares_B = squares_B + ((part_BP @ gram_PP) * part_BP).sum(1)
        return 0.5 * ((sum_BD * sum_BD).sum(1) - squares_B)


def align(tables: TableStorage, concat_BS: Tensor) -> Tensor:
    """(B, F, D): each field's output at the full width."""
    shape = (concat_BS.shape[0], tables.num_fields, tables.width)
    if tables.layout.is_equal_width:
        return concat_BS.view(shape)
    flat_size = tables.num_fields * tables.width
    if not tables.layout.has_projections:
        return (
            concat_BS.new_zeros(concat_BS.shape[0], flat_size)
            .index_copy(1, tables.place_S.long(), concat_BS)
            .view(shape)
        )
    # One product for each run of fields with the block matrix Q, whose block of field f is P_f.
    projection_SD = stacked_projections(tables).to(concat_BS.dtype)
    field_S = torch.div(tables.place_S, tables.width, rounding_mode="floor").long()
    parts, first_field, first_output = [], 0, 0
    for run in tables.layout.runs:
        outputs = slice(first_output, first_output + run.num_outputs)
        blocks = torch.nn.functional.one_hot(field_S[outputs] - first_field, run.num_fields).to(concat_BS.dtype)
        q = blocks[:, :, None] * projection_SD[outputs, None, :]
        parts.append(concat_BS[:, outputs] @ q.view(run.num_outputs, -1))
        first_field, first_output = first_field + run.num_fields, first_output + run.num_outputs
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(shape)


def stacked_projections(tables: TableStorage) -> Tensor:
    """(S, D) stacked projections P_f: 0/1 where a field is scattered or full, learned where it is projected."""
    fixed_SD = tables.fixed_projection_SD
    if fixed_SD is None:
        fixed_SD = scatter_matrix(tables.place_S, tables.width).to(tables.dtype)
    if not tables.layout.has_projections:
        return fixed_SD
    return fixed_SD.index_copy(0, tables.projected_outputs.long(), _own_projections(tables).to(fixed_SD.dtype))


def gram_parts(tables: TableStorage) -> list[Tensor]:
    """Diagonal parts (P_i, P_i) of blockdiag(P_f P_f^T) over the projected outputs, one for each run of fields with any."""
    field_P = torch.div(tables.place_S, tables.width, rounding_mode="floor").index_select(0, tables.projected_outputs)
    sizes = [run.num_projected for run in tables.layout.runs if run.num_projected]
    own = zip(_own_projections(tables).split(sizes), field_P.split(sizes), strict=True)
    return [(own_PD @ own_PD.T) * (fields[:, None] == fields).to(own_PD.dtype) for own_PD, fields in own]


def _own_projections(tables: TableStorage) -> Tensor:
    """(P, D) learned projections of the projected outputs; fields that share a table share its projection."""
    return tables.projections().index_select(0, tables.projection_rows)
