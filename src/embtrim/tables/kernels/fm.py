"""The FM term of a batch with a gradient by hand, in two passes over (B, F, D) where autograd's own takes several.

With E the embeddings side by side (B, S), P the stacked projections (S, D), G = blockdiag(P_f P_f^T) (S, S):

    Z = E P,   H = E G,   y_b = (|Z_b|^2 - H_b . E_b) / 2          (Rendle 2010: the sum over pairs of fields)
    dE_b = g_b (P Z_b - H_b),   dP = E^T (g Z),   dG = -E^T (g E) / 2

For a field that is D wide, P_f is the unit matrix. G is the unit matrix except for projected outputs. It is given in
diagonal parts, each for the projected outputs of a run of fields, so that a thousand fields need no (P, P).

Axes: B batch, F fields, D full width, S columns of all fields, P projected ones among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable


class FMTerm(autograd.Function):
    """FM term of a batch, differentiable once in the embeddings, the projections and the parts of the Gram matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        concat_BS: Tensor,
        num_fields: int,
        projection_SD: Tensor | None,
        projected_P: Tensor | None,
        *gram_parts: Tensor,
    ) -> Tensor:
        """(B,) FM term.

        Args:
            ctx: Context of autograd.
            concat_BS: Embeddings side by side in field order.
            num_fields: Number of fields, F.
            projection_SD: Stacked projections, or None if every field is D wide.
            projected_P: Columns of `concat_BS` that are projected, or None if all are.
            gram_parts: Diagonal parts (P_i, P_i) of G of the projected columns in order, symmetric; none if no column is
                projected.
        """
        device, dtype = concat_BS.device.type, concat_BS.dtype
        # Autocast would convert the operands of each product; here each is converted once, for both directions. Autocast
        # leaves float64 alone.
        autocast = torch.is_autocast_enabled(device) and dtype != torch.float64
        low = torch.get_autocast_dtype(device) if autocast else dtype
        with torch.autocast(device, enabled=False):
            if projection_SD is None:
                ctx.shape = len(concat_BS), num_fields, concat_BS.shape[1] // num_fields
                sum_BD = concat_BS.view(ctx.shape).sum(1)
                ctx.save_for_backward(concat_BS, sum_BD)
                return 0.5 * (sum_BD.square().sum(1) - torch.linalg.vector_norm(concat_BS, dim=1).square())
            concat_low_BS, projection_SD = concat_BS.to(low), projection_SD.to(low)
            sum_BD = (concat_low_BS @ projection_SD).to(dtype)
            own_BS = projected_low_BP = None
            if gram_parts:
                projected_low_BP = concat_low_BS if projected_P is None else concat_low_BS.index_select(1, projected_P)
                parts = projected_low_BP.split([len(gram) for gram in gram_parts], 1)
                own = [part @ gram.to(low) for part, gram in zip(parts, gram_parts, strict=True)]
                own_BS = (own[0] if len(own) == 1 else torch.cat(own, 1)).to(dtype)
                if projected_P is not None:
                    own_BS = concat_BS.index_copy(1, projected_P.long(), own_BS)  # index_copy takes no int32
            ctx.sizes = [len(gram) for gram in gram_parts]
            ctx.save_for_backward(concat_BS, sum_BD, concat_low_BS, projection_SD, projected_low_BP, own_BS)
            return 0.5 * (
                sum_BD.square().sum(1) - torch.linalg.vecdot(concat_BS if own_BS is None else own_BS, concat_BS)
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `forward`."""
        grad_B1 = grad_B[:, None]
        concat_BS, sum_BD, *saved = ctx.saved_tensors
        weighted_BD = grad_B1 * sum_BD
        if not saved:
            # The result must not be a view: autograd adds the gradients of other readers to a view out of place.
            grad_BS = torch.empty_like(concat_BS)
            parts = weighted_BD[:, None], concat_BS.view(ctx.shape), grad_B1[:, None]
            torch.addcmul(*parts, value=-1, out=grad_BS.view(ctx.shape))
            return grad_BS, None, None, None
        concat_low_BS, projection_SD, projected_low_BP, own_BS = saved
        weighted_BD = weighted_BD.to(projection_SD.dtype)
        grad_BS = (weighted_BD @ projection_SD.T).to(concat_BS.dtype)
        grad_BS.addcmul_(concat_BS if own_BS is None else own_BS, grad_B1, value=-1)
        grad_projection_SD = None
        grad_grams: list[Tensor | None] = [None] * len(ctx.sizes)
        if ctx.needs_input_grad[2]:
            grad_projection_SD = (concat_low_BS.T @ weighted_BD).to(concat_BS.dtype)
        if any(ctx.needs_input_grad[4:]):
            weighted_BP = projected_low_BP * grad_B1.to(projected_low_BP.dtype)
            parts = zip(projected_low_BP.split(ctx.sizes, 1), weighted_BP.split(ctx.sizes, 1), strict=True)
            grad_grams = [(part.T @ weighted).to(concat_BS.dtype).mul_(-0.5) for part, weighted in parts]
        return grad_BS, None, grad_projection_SD, None, *grad_grams
