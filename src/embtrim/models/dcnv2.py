"""DCNv2: cross layers with weight matrices beside a deep network (Wang et al., WWW 2021).

    x_0 = [e_1, ..., e_F, x],   x_{l+1} = x_0 * (W_l x_l + b_l) + x_l
    logit = v . [x_L, h] + c,   h the last hidden layer of MLP(x_0)

A coordinate that a plan removes is zero in every x_l. The compact model drops its rows and columns of W_l, and its entries
of b_l.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embtrim.models.blocks import MLP, CrossMatrices, linear, side_by_side
from embtrim.models.ctr_model import CTRModel, Reads
from embtrim.plan.plan import PlanShape
from embtrim.schema import Schema


class DCNv2(CTRModel):
    """Deep & Cross network, second version. Its arguments are described in HyperParameters."""

    name = "dcnv2"
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
        self.cross = CrossMatrices(self.num_inputs, num_cross_layers, generator)
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
        reads = []
        for layer in range(len(self.cross)):
            reads += [Reads(f"cross.{layer}.weight", axis, inputs) for axis in (0, 1)]
            reads.append(Reads(f"cross.{layer}.bias", 0, inputs))
        reads += [Reads("deep.0.weight", 1, inputs)] if self.num_deep else []
        return [*reads, Reads("out.weight", 1, (*inputs, "deep"))]

    def kept_inputs(self, part: str) -> Tensor:
        """See CTRModel. The part "deep" is the last hidden layer of the deep network, which no plan shrinks."""
        return torch.arange(self.num_deep) if part == "deep" else super().kept_inputs(part)
