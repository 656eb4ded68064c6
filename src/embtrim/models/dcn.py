"""DCN: cross layers with weight vectors beside a deep network (Wang et al., ADKDD 2017).

    x_0 = [e_1, ..., e_F, x],   x_{l+1} = x_0 (w_l . x_l) + b_l + x_l
    logit = v . [x_L, h] + c,   h the last hidden layer of MLP(x_0)

A coordinate that a plan removes has x_0 = 0, yet in x_l it holds the constant b_0 + .. + b_{l-1}. The compact model adds
these constants' share of w_l . x_l and of the logit, so it equals the masked model exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embtrim.models.blocks import MLP, CrossVectors, linear, side_by_side
from embtrim.models.ctr_model import CTRModel, Reads
from embtrim.plan.plan import PlanShape
from embtrim.schema import Schema


class DCN(CTRModel):
    """Deep & Cross network. Its arguments are described in HyperParameters."""

    name = "dcn"
    knows_columns = True

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int = 16,
        plan: PlanShape | None = None,
        seed: int = 0,
        init_std: float = 1e-4,
        hidden_units: Sequence[int] = (400, 400, 400),
        num_cross_layers: int = 3,
        dropout: float = 0.0,
        batch_norm: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            schema, generator, plan, embedding_dim=embedding_dim, seed=seed, init_std=init_std,
            hidden_units=hidden_units, dropout=dropout, batch_norm=batch_norm, num_cross_layers=num_cross_layers,
        )  # fmt: skip
        self.cross = CrossVectors(self.num_inputs, num_cross_layers, generator)
        self.deep = MLP(self.num_inputs, hidden_units, dropout, batch_norm, generator, num_outputs=None)
        self.num_deep = hidden_units[-1] if hidden_units else 0
        self.out = linear(self.num_inputs + self.num_deep, 1, generator)

    def forward(self, ids_BC: Tensor, dense_BE: Tensor | None = None) -> Tensor:
        """(B,) logits; see CTRModel."""
        views, dense_BE = self.look_up(ids_BC, dense_BE)
        x0_BN = side_by_side(views.concat, dense_BE)
        parts = [self.cross(x0_BN), self.deep(x0_BN)] if self.num_deep else [self.cross(x0_BN)]
        return self.out(torch.cat(parts, 1)).squeeze(1)

    def reads(self) -> list[Reads]:
        """See CTRModel."""
        inputs = ("concat", "dense")
        reads = [Reads("cross.weight_LN", 1, inputs), Reads("cross.bias_LN", 1, inputs)]
        reads += [Reads("deep.0.weight", 1, inputs)] if self.num_deep else []
        return [*reads, Reads("out.weight", 1, (*inputs, "deep"))]

    def kept_inputs(self, part: str) -> Tensor:
        """See CTRModel. The part "deep" is the last hidden layer of the deep network, which no plan shrinks."""
        return torch.arange(self.num_deep) if part == "deep" else super().kept_inputs(part)

    @torch.no_grad()
    def fold_dropped(self, full: CTRModel) -> None:
        """Take over the constants that the removed coordinates of `full` add to each w_l . x_l and to the logit."""
        assert isinstance(full, DCN)
        removed_N = torch.ones(full.num_inputs, dtype=torch.bool)
        removed_N[self.kept_inputs("concat")] = False
        removed_N[full.num_inputs - full.num_dense :] = False
        removed_N = removed_N.to(full.cross.bias_LN.device)
        bias_LR = full.cross.bias_LN[:, removed_N]
        # Removed coordinates of x_l hold b_0 + .. + b_{l-1}; removed coordinates of x_L hold the sum of all biases.
        constant_LR = bias_LR.cumsum(0) - bias_LR
        self.cross.carried_L.copy_((full.cross.weight_LN[:, removed_N] * constant_LR).sum(1))
        weight_R = full.out.weight[0, : full.num_inputs][removed_N]
        self.out.bias.copy_(full.out.bias + weight_R @ bias_LR.sum(0))
