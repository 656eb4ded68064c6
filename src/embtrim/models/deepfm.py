"""DeepFM: a factorization machine and a deep network over the same embeddings (Guo et al., IJCAI 2017).

logit = w_0 + sum_i w_i + sum_{i<j} <e_i, e_j> + MLP([e_1, ..., e_F, x])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embtrim.models.blocks import MLP, FirstOrder, side_by_side
from embtrim.models.ctr_model import CTRModel, Reads
from embtrim.plan.plan import PlanShape
from embtrim.schema import Schema


class DeepFM(CTRModel):
    """FM and deep part side by side. Its arguments are described in HyperParameters."""

    name = "deepfm"
    needs_aligned = True
    has_first_order = True

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
        self.linear = FirstOrder(self.num_dense, init_std, generator)
        self.mlp = MLP(self.num_inputs, hidden_units, dropout, batch_norm, generator)

    def forward(self, ids_BC: Tensor, dense_BE: Tensor | None = None) -> Tensor:
        """(B,) logits; see CTRModel."""
        views, dense_BE = self.look_up(ids_BC, dense_BE)
        deep_B = self.mlp(side_by_side(views.concat, dense_BE)).squeeze(1)
        return self.linear(views, dense_BE) + views.fm() + deep_B

    def reads(self) -> list[Reads]:
        """See CTRModel."""
        return [Reads("mlp.0.weight", 1, ("concat", "dense"))]
