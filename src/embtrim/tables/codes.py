"""Codes of b bits: values on a grid of 2^b numbers, code * scale + offset, with scale and offset of their column."""

from __future__ import annotations

import torch
from torch import Tensor


def codes_of(values_NW: Tensor, scale_W: Tensor, offset_W: Tensor, bits: int | Tensor) -> Tensor:
    """Codes (N, W), as floats: whole numbers from 0 to 2^bits - 1. Rows may have bits of their own, (N, 1)."""
    steps_NW = (values_NW - offset_W) / torch.where(scale_W > 0, scale_W, 1.0)
    codes_NW = steps_NW.round().clamp(min=0)
    return codes_NW.clamp(max=2**bits - 1) if isinstance(bits, int) else torch.minimum(codes_NW, 2.0**bits - 1)


def as_coded(values_NW: Tensor, scale_W: Tensor, offset_W: Tensor, bits: int | Tensor) -> Tensor:
    """Values (N, W) as their codes read."""
    return codes_of(values_NW, scale_W, offset_W, bits) * scale_W + offset_W
