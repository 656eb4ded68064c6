"""Row kernels in numba, for fp32 tables on CPUs: each does in one pass over memory what `torch.py` defines.

The kernels give the same numbers with any number of threads, because no two threads write to one row or one sample.
Kernels that are missing here come from `torch.py`. Summing the gradients of lookups is one of them, because embedding_bag
takes a fraction of the time of loops in numba.

The first call on a machine compiles: numba keeps its work in `__pycache__`, or in NUMBA_CACHE_DIR. If numba may write to
neither folder, every process compiles.

Axes: B batch, S output columns, R rows of a view, W its width, U distinct rows, N lookups (rows with repeats).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from embtrim.tables.kernels import torch as plain
from embtrim.tables.kernels.torch import (
    Distinct,
    Expansion,
    expand_backward,
    replay_adagrad_rows_,
    replay_adam_rows_,
    scale_rows_,
)

NAME = "fused"  # written into checkpoints and records
logger = logging.getLogger(__name__)

__all__ = [
    "adagrad_rows_",
    "adam_rows_",
    "code_errors",
    "distinct_rows",
    "expand",
    "expand_backward",
    "replay_adagrad_rows_",
    "replay_adam_rows_",
    "scale_rows_",
    "sgd_rows_",
]

# OpenMP comes first: where torch brings libgomp, a process has one OpenMP, and numba runs on torch's threads. Threads of
# another layer wait for torch's, which spin for a while after each operator: an update of Adam takes 1.8 ms instead of 0.8.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]  # pyright: ignore[reportAttributeAccessIssue]
# Where the two share OpenMP, numba sets torch's number of threads when it starts its own, which get_num_threads does.
_threads = torch.get_num_threads()
numba.get_num_threads()
torch.set_num_threads(_threads)


def distinct_rows(expansion: Expansion, rows_BC: Tensor, num_rows: int) -> Distinct:
    """`distinct_rows` of torch.py, by a radix sort, whose time does not grow with the table."""
    columns_C, _, steps_C = _places(expansion)
    found = _run(_distinct_rows, rows_BC, columns_C, steps_C, num_rows)
    return Distinct(*map(torch.from_numpy, found))


def expand(
    expansion: Expansion,
    distinct: Distinct,
    lows: Sequence[int],
    pool_N: Tensor | None,
    sources: Sequence[Tensor],
    first_order_U: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`expand` of torch.py. Rows go straight to their output columns."""
    # One copy of wide rows is faster by index_select.
    if expansion.is_identity:
        return plain.expand(expansion, distinct, lows, pool_N, sources, first_order_U)
    output_BS = expansion.new_output(sources[0], pool_N is not None)
    first_B = torch.empty(expansion.batch_size)
    source_E = sources[0].reshape(-1) if len(sources) == 1 else torch.cat([source.reshape(-1) for source in sources])
    _run(
        _expand,
        source_E,
        *_columns(expansion, lows, sources),
        distinct.inverse_N,
        *_places(expansion)[1:],
        _or_empty(pool_N),
        _or_empty(first_order_U),
        output_BS,
        first_B,
    )
    return output_BS, None if first_order_U is None else first_B


def sgd_rows_(weight_RW: Tensor, rows_U: Tensor, grad_UW: Tensor, *, lr: float, decay: float) -> None:
    """`sgd_rows_` of torch.py."""
    _run(_sgd_rows, weight_RW, rows_U, grad_UW, lr, decay)


def adagrad_rows_(
    weight_RW: Tensor,
    square_R: Tensor,
    rows_U: Tensor,
    grad_UW: Tensor,
    *,
    lr: float,
    eps: float,
    l2: float,
    decay: float,
) -> None:
    """`adagrad_rows_` of torch.py."""
    _run(_adagrad_rows, weight_RW, square_R, rows_U, grad_UW, lr, eps, l2, decay)


def adam_rows_(
    weight_RW: Tensor,
    mean_RW: Tensor,
    square_RW: Tensor,
    rows_U: Tensor,
    grad_UW: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    l2: float,
    decay: float,
) -> None:
    """`adam_rows_` of torch.py."""
    lr_hat, root_scale = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
    gains = 1 - betas[0], 1 - betas[1]
    _run(
        _adam_rows, weight_RW, mean_RW, square_RW, rows_U, grad_UW, *gains, betas[1], lr_hat, root_scale, eps, l2, decay
    )


def code_errors(
    values_NW: Tensor, scale_KW: Tensor, offset_KW: Tensor, bits: int, weights: Tensor | None = None
) -> Tensor:
    """`code_errors` of torch.py."""
    step_KW = torch.where(scale_KW > 0, scale_KW, 1.0)
    weights = torch.ones(1, 1).expand(len(values_NW), 1) if weights is None else weights
    return torch.from_numpy(_run(_code_errors, values_NW, scale_KW, step_KW, offset_KW, float(2**bits - 1), weights))


def _places(expansion: Expansion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each lookup of a sample: its id column, its place among the lookups, and the distance to the next sample's."""
    steps = np.array([len(columns) for columns in expansion.columns])
    steps_C = np.repeat(steps, steps)
    within_C = np.concatenate([np.arange(n) for n in steps])
    starts_C = np.repeat((np.cumsum(steps) - steps) * expansion.batch_size, steps) + within_C
    return torch.cat(list(expansion.columns)).numpy(), starts_C, steps_C


def _columns(expansion: Expansion, lows: Sequence[int], sources: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
    """For each lookup of a sample: width of its row, first output column, and the offset to add to place x width.

    The sum is the first element of the row in the source. Lookups that belong to no group have width 0.
    """
    widths_C, outputs_C, offsets_C = np.zeros((3, sum(map(len, expansion.columns))), np.int64)
    begin = element = 0
    for columns, outputs, low, source_UW in zip(expansion.columns, expansion.outputs, lows, sources, strict=False):
        own, width = slice(begin, begin + len(columns)), source_UW.shape[1]
        if width:
            widths_C[own], outputs_C[own], offsets_C[own] = width, outputs.numpy()[::width], element - low * width
        begin, element = own.stop, element + source_UW.numel()
    return widths_C, outputs_C, offsets_C


def _run(kernel: Callable[..., Any], *arguments: Tensor | np.ndarray | float) -> Any:
    """Call a compiled kernel on as many threads as torch uses."""
    most, before = numba.config.NUMBA_NUM_THREADS, numba.get_num_threads()  # pyright: ignore[reportAttributeAccessIssue]
    numba.set_num_threads(min(torch.get_num_threads(), most))
    try:
        return kernel(*(_native(value) for value in arguments))
    finally:
        numba.set_num_threads(before)


def _native(value: Any) -> Any:
    """A tensor as an array that shares its memory; a float as float32, because a float64 would turn all sums to float64."""
    if isinstance(value, Tensor):
        return value.contiguous().detach().numpy()
    return np.float32(value) if isinstance(value, float) else value


def _or_empty(value: Tensor | None) -> Tensor:
    return torch.empty(0) if value is None else value


# ---- compiled ----------------------------------------------------------------------------------------------------------


def _can_cache() -> bool:
    """Whether numba finds a folder for its compiled kernels; a user without a home may have none."""
    try:
        njit(cache=True)(_can_cache)  # compiles at the first call, which never comes
    except RuntimeError as error:
        logger.warning(
            "%s; every process compiles its kernels again; set NUMBA_CACHE_DIR to a folder to write to", error
        )
        return False
    return True


_CACHE = _can_cache()

# Bits that one pass of the radix sort sorts by: the counters of 13 bits take 32 KB, all of the cache next to a core.
_DIGIT_BITS = 13
_DIGIT = np.uint64((1 << _DIGIT_BITS) - 1)


@njit(cache=_CACHE)
def _distinct_rows(rows_BC, columns_C, steps_C, num_rows):
    # Rows and places are unsigned: see `_expand`. The upper half of a word is a row, the lower half its lookup.
    half, lower = np.uint64(32), np.uint64(0xFFFFFFFF)
    words_N = np.empty(rows_BC.size, np.uint64)
    places = _places_by_digit(rows_BC.reshape(-1), np.uint64(0))
    lookup, begin = np.uint64(0), 0
    while begin < len(columns_C):  # one group after another
        end = begin + steps_C[begin]
        for b in range(len(rows_BC)):
            for c in range(begin, end):
                row = np.uint64(rows_BC[b, columns_C[c]])
                place = places[row & _DIGIT]
                words_N[place] = row << half | lookup
                places[row & _DIGIT] = place + np.uint32(1)
                lookup += np.uint64(1)
        begin = end
    source_N = np.empty_like(words_N)
    shift = _DIGIT_BITS
    while (num_rows - 1) >> shift:
        source_N, words_N = words_N, source_N
        bit = half + np.uint64(shift)
        places = _places_by_digit(source_N, bit)
        for word in source_N:
            digit = (word >> bit) & _DIGIT
            place = places[digit]
            words_N[place] = word
            places[digit] = place + np.uint32(1)
        shift += _DIGIT_BITS
    inverse_N = np.empty(len(words_N), np.int32)
    rows_U, starts_U = np.empty(len(words_N), np.int32), np.empty(len(words_N), np.int64)
    count, last = 0, lower
    for i in range(len(words_N)):
        row, lookup = words_N[i] >> half, words_N[i] & lower
        if row != last:
            rows_U[count], starts_U[count], last = row, i, row
            count += 1
        words_N[i], inverse_N[lookup] = lookup, count - 1
    return rows_U[:count], inverse_N, words_N.view(np.int64), starts_U[:count]


@njit(cache=_CACHE)
def _places_by_digit(values_N, bit):
    """Where the first value of each digit goes; a digit is the _DIGIT_BITS bits from `bit` on."""
    places = np.zeros(1 << _DIGIT_BITS, np.uint32)
    for value in values_N:
        places[(np.uint64(value) >> bit) & _DIGIT] += np.uint32(1)
    begin = np.uint32(0)
    for digit in range(len(places)):
        places[digit], begin = begin, begin + places[digit]
    return places


@njit(parallel=True, cache=_CACHE)
def _expand(
    source_E, widths_C, outputs_C, offsets_C, inverse_N, starts_C, steps_C, pool_N, first_order_U, output_BS, first_B
):
    for b in prange(len(output_BS)):
        first = np.float32(0)
        for c in range(len(widths_C)):
            i = starts_C[c] + b * steps_C[c]
            place = inverse_N[i]
            # Unsigned, because numba checks whether a signed index counts from the end, which takes a third of the time.
            width = np.uint64(widths_C[c])
            output = np.uint64(outputs_C[c])
            begin = np.uint64(offsets_C[c] + place * widths_C[c])
            factor = pool_N[i] if len(pool_N) else np.float32(1)
            if len(first_order_U):
                first += factor * first_order_U[place]
            if len(pool_N):
                for w in range(width):
                    output_BS[b, output + w] += factor * source_E[begin + w]
            else:
                for w in range(width):
                    output_BS[b, output + w] = source_E[begin + w]
        first_B[b] = first


@njit(parallel=True, cache=_CACHE)
def _sgd_rows(weight_RW, rows_U, grad_UW, lr, decay):
    for u in prange(len(rows_U)):
        for w in range(grad_UW.shape[1]):
            weight_RW[rows_U[u], w] = weight_RW[rows_U[u], w] * decay - lr * grad_UW[u, w]


@njit(parallel=True, cache=_CACHE)
def _adagrad_rows(weight_RW, square_R, rows_U, grad_UW, lr, eps, l2, decay):
    width = grad_UW.shape[1]
    for u in prange(len(rows_U)):
        row = rows_U[u]
        total = np.float32(0)
        for w in range(width):
            grad = grad_UW[u, w] + l2 * weight_RW[row, w]
            total += grad * grad
        square_R[row] += total / np.float32(width)
        rate = lr / (np.sqrt(square_R[row]) + eps)
        for w in range(width):
            grad = grad_UW[u, w] + l2 * weight_RW[row, w]
            weight_RW[row, w] = weight_RW[row, w] * decay - rate * grad


@njit(parallel=True, cache=_CACHE)
def _adam_rows(
    weight_RW, mean_RW, square_RW, rows_U, grad_UW, mean_gain, square_gain, square_keep, lr, root_scale, eps, l2, decay
):
    for u in prange(len(rows_U)):
        row = rows_U[u]
        for w in range(grad_UW.shape[1]):
            weight = weight_RW[row, w]
            grad = grad_UW[u, w] + l2 * weight
            mean = mean_RW[row, w] + mean_gain * (grad - mean_RW[row, w])
            square = square_keep * square_RW[row, w] + square_gain * grad * grad
            mean_RW[row, w] = mean
            square_RW[row, w] = square
            weight_RW[row, w] = weight * decay - lr * mean / (np.sqrt(square) * root_scale + eps)


@njit(parallel=True, cache=_CACHE)
def _code_errors(values_NW, scale_KW, step_KW, offset_KW, most, weights):
    errors_KW = np.zeros(scale_KW.shape, np.float64)
    by_row = weights.shape[1] == 1
    for k in prange(len(scale_KW)):
        for n in range(len(values_NW)):
            weight = weights[n, 0]
            for w in range(values_NW.shape[1]):
                value = values_NW[n, w]
                code = np.rint((value - offset_KW[k, w]) / step_KW[k, w])
                code = code if code > 0 else np.float32(0)
                code = code if code < most else most
                error = code * scale_KW[k, w] + offset_KW[k, w] - value
                errors_KW[k, w] += error * error * (weight if by_row else weights[n, w])
    return errors_KW
