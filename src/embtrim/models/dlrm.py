"""DLRM: a network over the inner products of embeddings and of an MLP of the dense fields (Naumov et al., 2019).

    z = ReLU(MLP_bottom(x)) in R^D, only if there are dense fields
    logit = MLP_top([<v_i, v_j> for i < j, z]),   v = e_1, ..., e_F, z

As in FuxiCTR, z is the last of the vectors. A plan that leaves two fields without a common column makes their product
zero; the compact model drops it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embtrim.errors import DataError
from embtrim.models.blocks import MLP, PairProducts, side_by_side
from embtrim.models.ctr_model import CTRModel, Reads
from embtrim.plan.plan import PlanShape
from embtrim.schema import Schema


class DLRM(CTRModel):
    """Deep learning recommendation model with dot interactions. Its arguments are described in HyperParameters."""

    name = "dlrm"
    needs_aligned = True

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int = 16,
        plan: PlanShape | None = None,
        seed: int = 0,
        init_std: float = 1e-4,
        hidden_units: Sequence[int] = (400, 400, 400),
        bottom_units: Sequence[int] = (64, 64, 64),
        dropout: float = 0.0,
        batch_norm: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            schema, generator, plan, embedding_dim=embedding_dim, seed=seed, init_std=init_std,
            hidden_units=hidden_units, dropout=dropout, batch_norm=batch_norm, bottom_units=bottom_units,
        )  # fmt: skip
        if len(schema.id_fields) + bool(self.num_dense) < 2:
            raise DataError("dlrm reads pairs of vectors; its schema needs two id fields, or one and a dense field")
        self.bottom = None
        if self.num_dense:
            width = self.tables.width
            self.bottom = MLP(self.num_dense, bottom_units, dropout, batch_norm, generator, num_outputs=width)
        self.knows_columns = self.bottom is not None  # a rotation does not pass through the ReLU of the dense vector
        self.pairs = PairProducts(self.tables, num_extra=0 if self.bottom is None else 1)
        num_inputs = len(self.pairs.kept) + len(self.kept_inputs("bottom"))
        self.mlp = MLP(num_inputs, hidden_units, dropout, batch_norm, generator)

    def forward(self, ids_BC: Tensor, dense_BE: Tensor | None = None) -> Tensor:
        """(B,) logits; see CTRModel."""
        views, dense_BE = self.look_up(ids_BC, dense_BE)
        if self.bottom is None:
            return self.mlp(self.pairs(views.aligned)).squeeze(1)
        dense_BD = self.bottom(dense_BE).relu()
        pairs_BP = self.pairs(torch.cat([views.aligned, dense_BD[:, None]], 1))
        return self.mlp(side_by_side(pairs_BP, dense_BD)).squeeze(1)

    def reads(self) -> list[Reads]:
        """See CTRModel."""
        # The index of the pairs is a buffer, of which a compact model inherits the kept pairs.
        return [Reads("pairs.place_P", 0, ("pairs",)), Reads("mlp.0.weight", 1, ("pairs", "bottom"))]

    def kept_inputs(self, part: str) -> Tensor:
        """See CTRModel. The part "pairs" holds the inner products of vectors i < j, row by row; "bottom" is z."""
        if part == "bottom":
            return torch.arange(0 if self.bottom is None else self.tables.width)
        return torch.tensor(self.pairs.kept, dtype=torch.int64) if part == "pairs" else super().kept_inputs(part)
