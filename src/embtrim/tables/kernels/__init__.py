"""Row kernels: `torch.py` is the definition; `fused.py`, the [fast] extra, serves in its place where it can.

The two sum in the same order, yet round differently. A training is the same each time with the same kernels, and its
checkpoint names them. The environment variable EMBTRIM_KERNELS=torch turns `fused.py` off.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor, autograd, float32

from embtrim.tables.kernels import torch as plain
from embtrim.tables.kernels.torch import Distinct, Expansion

logger = logging.getLogger(__name__)

FEW = 1 << 15


def kernels_for(weight: Tensor) -> ModuleType:
    """The module of kernels for tables of this weight: `fused` for fp32 on CPUs if numba is installed, else `torch`."""
    return (_fused() or plain) if _may_fuse(weight) else plain


def kernels_to_read(weight: Tensor, number: int) -> ModuleType:
    """The kernels of so many lookups or values outside of training; few ones are over before numba is loaded."""
    return plain if number < FEW else kernels_for(weight)


def kernels_expected(weight: Tensor) -> str:
    """`kernels_name`, without loading numba to see if it works where it is installed."""
    return "fused" if _may_fuse(weight) and find_spec("numba") else plain.NAME


def kernels_name(weight: Tensor) -> str:
    """Name of the kernels for tables of this weight, "torch" or "fused"."""
    return kernels_for(weight).NAME


def _may_fuse(weight: Tensor) -> bool:
    is_served = weight.dtype == float32 and weight.device.type == "cpu"
    return is_served and os.environ.get("EMBTRIM_KERNELS") != "torch"


@functools.cache
def _fused() -> ModuleType | None:
    """The fused kernels, imported at the first training step so that `import embtrim` stays light; None without numba."""
    try:
        from embtrim.tables.kernels import fused
    except ImportError as error:
        logger.info("kernels in plain torch (%s); pip install 'embtrim[fast]' for faster ones", error)
        return None
    return fused


class Expand(autograd.Function):
    """`expand` of a module of kernels, differentiable in the looked-up rows and their first-order weights."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        expansion: Expansion,
        distinct: Distinct,
        lows: Sequence[int],
        pool_N: Tensor | None,
        first_order_U: Tensor | None,
        *sources: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S) outputs, and (B,) first-order sums or None. See `expand` in torch.py."""
        ctx.set_materialize_grads(False)
        ctx.backward_arguments = kernels, expansion, distinct, lows, pool_N, [len(source) for source in sources]
        return kernels.expand(expansion, distinct, lows, pool_N, sources, first_order_U)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        """Gradients of the arguments of `forward`."""
        kernels, *arguments = ctx.backward_arguments
        grads, first_order_grad_U = kernels.expand_backward(*arguments, *grad_outputs)
        return None, None, None, None, None, first_order_grad_U, *grads
