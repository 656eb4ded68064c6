"""IPNN: a deep network over embeddings and their inner products (PNN, Qu et al., ICDM 2016).

    logit = MLP([e_1, ..., e_F, <e_1, e_2>, <e_1, e_3>, ..., <e_{F-1}, e_F>, x])

The products enter the network as they are, as in the BARS benchmark; the paper's first layer weighs them the same way.
A plan that leaves two fields without a common column makes their product zero; the compact model drops it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embtrim.models.blocks import MLP, PairProducts, side_by_side
from embtrim.models.ctr_model import CTRModel, Reads
from embtrim.plan.plan import PlanShape
from embtrim.schema import Schema


class IPNN(CTRModel):
    """Product-based network with inner products. Its arguments are described in HyperParameters."""

    name = "ipnn"
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
        dropout: float = 0.0,
        batch_norm: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            schema, generator, plan, embedding_dim=embedding_dim, seed=seed, init_std=init_std,
            hidden_units=hidden_units, dropout=dropout, batch_norm=batch_norm,
        )  # fmt: skip
        self.pairs = PairProducts(self.tables)
        self.mlp = MLP(self.num_inputs + len(self.pairs.kept), hidden_units, dropout, batch_norm, generator)

    def forward(self, ids_BC: Tensor, dense_BE: Tensor | None = None) -> Tensor:
        """(B,) logits; see CTRModel."""
        views, dense_BE = self.look_up(ids_BC, dense_BE)
        pairs_BP = self.pairs(views.aligned)
        return self.mlp(side_by_side(views.concat, pairs_BP, dense_BE)).squeeze(1)

    def reads(self) -> list[Reads]:
        """See CTRModel."""
        # The index of the pairs is a buffer, of which a compact model inherits the kept pairs.
        return [Reads("pairs.place_P", 0, ("pairs",)), Reads("mlp.0.weight", 1, ("concat", "pairs", "dense"))]

    def kept_inputs(self, part: str) -> Tensor:
        """See CTRModel. The part "pairs" holds the inner products of fields i < j, row by row."""
        return torch.tensor(self.pairs.kept, dtype=torch.int64) if part == "pairs" else super().kept_inputs(part)
