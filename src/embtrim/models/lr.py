"""LR: logistic regression over feature values (Richardson, Dominowska & Ragno, WWW 2007).

logit = w_0 + sum_i w_i + sum_e v_e x_e
"""

from __future__ import annotations

import torch
from torch import Tensor

from embtrim.models.blocks import FirstOrder
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import PlanShape
from embtrim.schema import Schema


class LR(CTRModel):
    """Logistic regression: one weight per feature value and no embeddings. Its arguments are described in HyperParameters."""

    name = "lr"
    has_first_order = True

    def __init__(self, schema: Schema, *, plan: PlanShape | None = None, seed: int = 0, init_std: float = 1e-4) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(schema, generator, plan, seed=seed, init_std=init_std)
        self.linear = FirstOrder(self.num_dense, init_std, generator)

    def forward(self, ids_BC: Tensor, dense_BE: Tensor | None = None) -> Tensor:
        """(B,) logits; see CTRModel."""
        views, dense_BE = self.look_up(ids_BC, dense_BE)
        return self.linear(views, dense_BE)
