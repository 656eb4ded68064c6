"""FNN: an MLP over the concatenated embeddings (Zhang, Du & Wang, ECIR 2016).

    logit = MLP([e_1, ..., e_F, x])

Departure: the paper initialises the embeddings from a trained FM. Here embeddings and network are trained together, as
"DNN" is in the BARS benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embtrim.models.blocks import MLP, side_by_side
from embtrim.models.ctr_model import CTRModel, Reads
from embtrim.plan.plan import PlanShape
from embtrim.schema import Schema


class FNN(CTRModel):
    """Deep network over embeddings. Its arguments are described in HyperParameters."""

    name = "fnn"

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
        self.mlp = MLP(self.num_inputs, hidden_units, dropout, batch_norm, generator)

    def forward(self, ids_BC: Tensor, dense_BE: Tensor | None = None) -> Tensor:
        """(B,) logits; see CTRModel."""
        views, dense_BE = self.look_up(ids_BC, dense_BE)
        return self.mlp(side_by_side(views.concat, dense_BE)).squeeze(1)

    def reads(self) -> list[Reads]:
        """See CTRModel."""
        return [Reads("mlp.0.weight", 1, ("concat", "dense"))]
