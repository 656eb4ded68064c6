"""Lazy weights: tensors (V, D) that stand for the embeddings of all ids, and compute what is read of them.

Looked-up rows and products with all rows come from what a table stores. Any other operation gets all rows, computed for
it. Gradients reach the parameters of the table either way. Nothing can be written to a lazy weight: it would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embtrim.errors import ModelError
from embtrim.system.torch_private import tree_map

_TRANSPOSES = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
_SWAPS = (Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
_DETACHES = (Tensor.data.__get__, Tensor.detach, torch.detach)  # type: ignore[attr-defined]
_METADATA = (
    "shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "ndim", "itemsize", "nbytes", "is_cuda", "is_cpu",
    "is_sparse", "is_quantized", "is_meta", "names", "grad", "grad_fn", "_version", "retains_grad",
)  # fmt: skip
_METADATA_READS = {getattr(Tensor, name).__get__ for name in _METADATA if hasattr(Tensor, name)} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.element_size, Tensor.__len__,
    Tensor.is_floating_point, torch.is_floating_point, torch.numel, Tensor.is_contiguous, Tensor.get_device,
}  # fmt: skip
# In-place operators, as opposed to __invert__, __int__, __index__ and __iter__.
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul")}  # fmt: skip


class WeightSource:
    """Computes what is read of a lazy weight.

    Attributes:
        what: What the weight is, for errors.
        dtype: Type of the weight.
        device: Device of the weight.
        shape: Rows and columns of the weight, V and D.
        parameters: What gradients of the weight reach.
    """

    what: str
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, int]
    parameters: Sequence[Tensor]

    def all_rows(self) -> Tensor:
        """(V, D) embeddings of all ids."""
        raise NotImplementedError

    def rows_at(self, ids: Tensor) -> Tensor:
        """(..., D) embeddings of ids (...)."""
        raise NotImplementedError

    def products(self, input: Tensor) -> Tensor:
        """(..., V) inner products of vectors (..., D) with the embeddings of all ids."""
        raise NotImplementedError

    def gradients(self, grad_VD: Tensor) -> Sequence[Tensor | None]:
        """Gradients by `parameters`, from that by the weight; for what torch does behind the back of Python."""
        with torch.enable_grad():
            rows = self.all_rows()
            if not rows.requires_grad:
                return [None] * len(self.parameters)
            return torch.autograd.grad(rows, self.parameters, grad_VD, allow_unused=True)


class _Detached(WeightSource):
    """Another source, without gradients."""

    parameters = ()

    def __init__(self, source: WeightSource) -> None:
        self.source = source
        self.what, self.dtype, self.device, self.shape = source.what, source.dtype, source.device, source.shape

    @torch.no_grad()
    def all_rows(self) -> Tensor:
        """See WeightSource."""
        return self.source.all_rows()

    @torch.no_grad()
    def rows_at(self, ids: Tensor) -> Tensor:
        """See WeightSource."""
        return self.source.rows_at(ids)

    def products(self, input: Tensor) -> Tensor:
        """See WeightSource. Gradients of the vectors are kept."""
        return (
            nn.functional.linear(input, self.all_rows())
            if input.requires_grad
            else self.source.products(input).detach()
        )


def lazy_weight(source: WeightSource) -> Tensor:
    """The lazy weight of a source; all its rows where torch records a graph to compile or to export."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return source.all_rows()
    return _offered(source, False)


def _offered(source: WeightSource, is_transposed: bool) -> Tensor:
    return _Offer.apply(source, is_transposed, *source.parameters)  # type: ignore[return-value]


class _LazyWeight(Tensor):
    """A weight, or its transpose, without storage."""

    source: WeightSource
    is_transposed: bool

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute what an operation reads of the weight."""
        kwargs = kwargs or {}
        if func in _METADATA_READS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _refuse_writes(func, args, kwargs)
        found = _computed(func, args, kwargs)
        return func(*tree_map(_whole, list(args)), **tree_map(_whole, dict(kwargs))) if found is None else found

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Give all rows to an operation that torch does behind the back of Python; `_Offer` takes its gradient."""
        with torch.no_grad():
            return func(*tree_map(_whole, list(args)), **tree_map(_whole, dict(kwargs or {})))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.source.what}, {' x '.join(map(str, self.source.shape))}, computed as it is read"


class _Offer(torch.autograd.Function):
    """A lazy weight in torch's graph."""

    @staticmethod
    def forward(ctx: Any, source: WeightSource, is_transposed: bool, *_parameters: Tensor) -> Tensor:
        """See the class."""
        ctx.source, ctx.is_transposed = source, is_transposed
        shape = source.shape[::-1] if is_transposed else source.shape
        made: Any = Tensor._make_wrapper_subclass(_LazyWeight, shape, dtype=source.dtype, device=source.device)
        made.source, made.is_transposed = source, is_transposed
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """See the class."""
        grad = grad_outputs[0]
        return None, None, *ctx.source.gradients(grad.T if ctx.is_transposed else grad)


def _whole(value: Any) -> Any:
    """All rows of a lazy weight; anything else as given."""
    if not isinstance(value, _LazyWeight):
        return value
    rows = value.source.all_rows()
    return rows.T if value.is_transposed else rows


def _computed(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation reads of a lazy weight without all of its rows; None if it needs them."""
    first, second = args[0] if args else None, args[1] if len(args) > 1 else None
    if isinstance(first, _LazyWeight):
        source, is_plain = first.source, not first.is_transposed
        if func in _TRANSPOSES or (func in _SWAPS and set(args[1:]) in ({0, 1}, {-1, -2}, {0, -1}, {1, -2})):
            return _offered(source, is_plain)
        if func in _DETACHES:
            return _offered(_Detached(source), first.is_transposed)
        if func is Tensor.__getitem__ and is_plain and (ids := _as_ids(second, source)) is not None:
            return source.rows_at(ids)
        if func in (torch.index_select, Tensor.index_select) and is_plain and second in (0, -2) and len(args) == 3:
            return source.rows_at(args[2])
        if func in _PRODUCTS and is_plain and isinstance(second, Tensor) and second.ndim in (1, 2):
            return source.products(second.T).T if second.ndim == 2 else source.products(second)  # W u, W U
    if isinstance(second, _LazyWeight) and isinstance(first, Tensor) and not isinstance(first, _LazyWeight):
        if func in _PRODUCTS and second.is_transposed:
            return second.source.products(first)
        if func is nn.functional.linear and not second.is_transposed:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            found = second.source.products(first)
            return found if bias is None else found + bias
        if func is nn.functional.embedding and not second.is_transposed and not (args[2:] or kwargs):
            return second.source.rows_at(first)
    return None


def _as_ids(index: Any, source: WeightSource) -> Tensor | None:
    """Ids of an index by integers, which may count from the end; None for any other index."""
    if isinstance(index, (int, list)) and not isinstance(index, bool):
        index = torch.as_tensor(index, device=source.device)
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype in (torch.bool, torch.uint8):
        return None
    return torch.where(index < 0, index + source.shape[0], index)


def _refuse_writes(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ModelError for an operation that would write to a lazy weight."""
    name = getattr(func, "__name__", "")
    is_in_place = name.endswith("_") and not name.endswith("__")
    written = kwargs.get("out")
    if is_in_place or name in {"__setitem__", "__set__", "__delete__"} | _IN_PLACE:
        written = next(iter((*args, *kwargs.values())))
    if isinstance(written, _LazyWeight):
        raise ModelError(
            f"{written.source.what} is computed as it is read, and writing to it would have no effect; write to the parameters "
            "of the table, or to the full model before compact, or leave the table alone with the Task's exclude="
        )
