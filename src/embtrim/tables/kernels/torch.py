"""Row kernels in plain torch, on any device: the definition that a faster kernel must equal.

Updates work in place on 2-D views of flat buffers and touch only the rows that they are given. Rows are gathered by
index_select and written back by index_copy_, which take a fraction of the time of `W[index]`, of `index_put_` and of
F.embedding's backward. Gradients are summed by embedding_bag over sorted lookups, which takes a fraction of the time of
index_add.

Axes: B batch, S output columns, R rows of a view, W its width, U distinct rows, N lookups (rows with repeats).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from embtrim.tables.codes import as_coded

NAME = "torch"  # written into checkpoints and records
# Rows coded at a time, which bounds the memory that coding takes.
CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Distinct:
    """The distinct rows among N lookups.

    Attributes:
        rows_U: int32 storage rows, ascending.
        inverse_N: For each lookup, the place of its row in `rows_U`.
        order_N: The lookups sorted by row; lookups of one row keep their order.
        starts_U: For each row, where its lookups begin in `order_N`.
    """

    rows_U: Tensor
    inverse_N: Tensor
    order_N: Tensor
    starts_U: Tensor


@dataclass(frozen=True)
class Expansion:
    """Where the looked-up rows of a batch go.

    Lookups stand group by group: a group has (B, columns) lookups of rows of one width. Lookups that belong to no group
    may follow the groups, for their first-order weights.

    Attributes:
        batch_size: Number of samples, B.
        num_outputs: Number of output columns, S.
        columns: Id columns of each group, then those of lookups that belong to no group.
        outputs: For each group, the output columns (columns x width,) of its looked-up rows, one row after another.
        is_identity: Whether there is one group, whose `outputs` are 0, 1, .. S - 1.
    """

    batch_size: int
    num_outputs: int
    columns: Sequence[Tensor]
    outputs: Sequence[Tensor]
    is_identity: bool

    @property
    def lookups(self) -> list[slice]:
        """The range of the N lookups that belongs to each of `columns`."""
        ends = itertools.accumulate(self.batch_size * len(columns) for columns in self.columns)
        return [slice(*pair) for pair in itertools.pairwise([0, *ends])]

    def by_group(self, values_BC: Tensor) -> Tensor:
        """(N,) values of all id columns in the order of the lookups."""
        if len(self.columns) == 1:
            return values_BC.reshape(-1)
        return torch.cat([values_BC.index_select(1, columns).view(-1) for columns in self.columns])

    def new_output(self, like: Tensor, pools: bool) -> Tensor:
        """(B, S) memory for the outputs: zeros if rows are added to it or some columns stay unwritten."""
        make = like.new_zeros if pools or sum(map(len, self.outputs)) < self.num_outputs else like.new_empty
        return make(self.batch_size, self.num_outputs)


def distinct_rows(expansion: Expansion, rows_BC: Tensor, num_rows: int) -> Distinct:
    """The distinct rows among the lookups of int32 storage rows below num_rows."""
    sorted_N, order_N = expansion.by_group(rows_BC).sort(stable=True)
    rows_U, places_N, counts_U = torch.unique_consecutive(sorted_N, return_inverse=True, return_counts=True)
    inverse_N = torch.empty_like(order_N).index_copy_(0, order_N, places_N)
    return Distinct(rows_U, inverse_N, order_N, counts_U.cumsum(0) - counts_U)


def expand(
    expansion: Expansion,
    distinct: Distinct,
    lows: Sequence[int],
    pool_N: Tensor | None,
    sources: Sequence[Tensor],
    first_order_U: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Write each lookup's row to its output columns. Rows that share columns are summed.

    Args:
        expansion: Where the rows go.
        distinct: The distinct rows.
        lows: For each group, the place of its first row among the distinct rows.
        pool_N: Factor of each lookup. None means 1, and that no rows share columns.
        sources: For each group, its distinct rows (U_g, W).
        first_order_U: First-order weights of the distinct rows, or None.

    Returns:
        (B, S) outputs; and (B,) sums of the first-order weights, or None.
    """
    num_samples = expansion.batch_size
    if expansion.is_identity:
        output_BS = sources[0].index_select(0, distinct.inverse_N).view(num_samples, expansion.num_outputs)
    else:
        output_BS = expansion.new_output(sources[0], pool_N is not None)
        for lookups, low, outputs, source_UW in zip(expansion.lookups, lows, expansion.outputs, sources, strict=False):
            found_NW = source_UW.index_select(0, distinct.inverse_N[lookups] - low)
            if pool_N is None:
                output_BS.index_copy_(1, outputs, found_NW.view(num_samples, len(outputs)))
            else:
                output_BS.index_add_(1, outputs, (found_NW * pool_N[lookups, None]).view(num_samples, len(outputs)))
    if first_order_U is None:
        return output_BS, None
    first_N = first_order_U.index_select(0, distinct.inverse_N)
    first_N = first_N if pool_N is None else first_N * pool_N
    parts = [
        first_N[lookups].view(num_samples, len(columns)).sum(1)
        for lookups, columns in zip(expansion.lookups, expansion.columns, strict=True)
    ]
    return output_BS, sum(parts[1:], parts[0])


def expand_backward(
    expansion: Expansion,
    distinct: Distinct,
    lows: Sequence[int],
    pool_N: Tensor | None,
    sizes: Sequence[int],
    grad_BS: Tensor | None,
    grad_B: Tensor | None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Sum the gradients of a row's lookups, in the order of the lookups.

    Args:
        expansion: Where the rows go.
        distinct: The distinct rows.
        lows: For each group, the place of its first row among the distinct rows.
        pool_N: Factor of each lookup, or None; see `expand`.
        sizes: For each group, the number of its distinct rows, U_g.
        grad_BS: Gradient of the outputs, or None.
        grad_B: Gradient of the first-order sums, or None.

    Returns:
        For each group, the gradients (U_g, W) of its distinct rows, or None without `grad_BS`; and the gradients (U,) of
        the first-order weights, or None without `grad_B`.
    """
    order_N, starts_U = distinct.order_N, distinct.starts_U
    grads: list[Tensor | None] = [None] * len(sizes)
    all_lookups = expansion.lookups
    for number, (low, outputs, size) in enumerate(zip(lows, expansion.outputs, sizes, strict=True)):
        if grad_BS is None or len(outputs) == 0 or size == 0:
            continue
        lookups = all_lookups[number]
        num_lookups = lookups.stop - lookups.start
        grad_NW = (grad_BS if expansion.is_identity else grad_BS.index_select(1, outputs)).reshape(num_lookups, -1)
        if pool_N is not None:
            grad_NW = grad_NW * pool_N[lookups, None]
        begin = int(starts_U[low])
        own_order_N = order_N[begin : begin + num_lookups] - lookups.start
        grads[number] = functional.embedding_bag(own_order_N, grad_NW, starts_U[low : low + size] - begin, mode="sum")
    if grad_B is None:
        return grads, None
    grad_N = torch.cat([grad_B.repeat_interleave(len(columns)) for columns in expansion.columns])
    grad_N = grad_N if pool_N is None else grad_N * pool_N
    return grads, functional.embedding_bag(order_N, grad_N[:, None], starts_U, mode="sum")[:, 0]


def sum_rows(values_NW: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    """(num_rows, W): for each index, the sum of its values."""
    return values_NW.new_zeros(num_rows, values_NW.shape[1]).index_add_(0, index_N, values_NW)


def sgd_rows_(weight_RW: Tensor, rows_U: Tensor, grad_UW: Tensor, *, lr: float, decay: float) -> None:
    """W <- decay W - lr G on the given rows."""
    weight_UW = weight_RW.index_select(0, rows_U)
    if decay != 1:
        weight_UW.mul_(decay)
    weight_UW.sub_(grad_UW, alpha=lr)
    weight_RW.index_copy_(0, rows_U, weight_UW)


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
    """Row-wise Adagrad: one accumulator for each row sums the mean of the squared gradients over the row.

    s <- s + mean(g^2),  W <- decay W - lr g / (sqrt(s) + eps),  g = G + l2 W. This is FBGEMM's exact_rowwise_adagrad.
    """
    weight_UW = weight_RW.index_select(0, rows_U)
    if l2:
        grad_UW = grad_UW.add(weight_UW, alpha=l2)
    square_U = square_R.index_select(0, rows_U).add_(grad_UW.square().mean(1))
    square_R.index_copy_(0, rows_U, square_U)
    if decay != 1:
        weight_UW.mul_(decay)
    weight_UW.addcdiv_(grad_UW, square_U.sqrt().add_(eps)[:, None], value=-lr)
    weight_RW.index_copy_(0, rows_U, weight_UW)


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
    """Adam (Kingma & Ba 2015) on the given rows. Steps count from 1 in the bias corrections.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  W <- decay W - lr mhat / (sqrt(vhat) + eps),  g = G + l2 W.
    """
    weight_UW = weight_RW.index_select(0, rows_U)
    if l2:
        grad_UW = grad_UW.add(weight_UW, alpha=l2)
    mean_UW = mean_RW.index_select(0, rows_U).lerp_(grad_UW, 1 - betas[0])
    square_UW = square_RW.index_select(0, rows_U).mul_(betas[1]).addcmul_(grad_UW, grad_UW, value=1 - betas[1])
    mean_RW.index_copy_(0, rows_U, mean_UW)
    square_RW.index_copy_(0, rows_U, square_UW)
    if decay != 1:
        weight_UW.mul_(decay)
    root_UW = square_UW.sqrt_().mul_((1 - betas[1] ** step) ** -0.5).add_(eps)
    weight_UW.addcdiv_(mean_UW, root_UW, value=-lr / (1 - betas[0] ** step))
    weight_RW.index_copy_(0, rows_U, weight_UW)


def scale_rows_(weight_RW: Tensor, rows_U: Tensor, factor: Tensor | float) -> None:
    """W <- factor W on the given rows, with one factor for all, or factors (U, 1)."""
    weight_RW.index_copy_(0, rows_U, weight_RW.index_select(0, rows_U).mul_(factor))


def code_errors(
    values_NW: Tensor, scale_KW: Tensor, offset_KW: Tensor, bits: int, weights: Tensor | None = None
) -> Tensor:
    """Squared error of each column of a table in each of K codings, summed over the rows, float64 (K, W).

    Args:
        values_NW: Values of the table.
        scale_KW: Scales of the codings.
        offset_KW: Offsets of the codings.
        bits: Bits per code.
        weights: How often each row counts, (N, 1), or each value, (N, W); None counts all once.
    """
    errors_KW = torch.zeros(scale_KW.shape, dtype=torch.float64, device=values_NW.device)
    for start in range(0, len(values_NW), CHUNK_ROWS):
        part_NW = values_NW[start : start + CHUNK_ROWS]
        for error_W, scale_W, offset_W in zip(errors_KW, scale_KW, offset_KW, strict=True):
            squares = (as_coded(part_NW, scale_W, offset_W, bits) - part_NW).square()
            if weights is not None:
                squares = squares * weights[start : start + CHUNK_ROWS]
            error_W += squares.sum(0, dtype=torch.float64)
    return errors_KW


def strides(missed_U: Tensor, max_stride: int) -> Iterator[tuple[int, Tensor | slice]]:
    """Cut the missed steps of each row into strides of 1, 1, 2, 4, .., powers of two up to max_stride.

    k missed steps are 1 + (1 + 2 + .. + 2^(p-1)) + rest. Each power of two in the rest makes a second stride of that
    length beside the first, so that strides grow, and all rows that take a stride go equally far.

    Args:
        missed_U: Missed steps of each row, at least 1, descending.
        max_stride: Longest stride. It is rounded down to a power of two.

    Yields:
        (length, rows that take the stride). Rows are a slice of the first rows, or indices.
    """
    if len(missed_U) == 0:
        return
    cap = max_stride.bit_length() - 1
    longest = int(missed_U[0])
    ascending = missed_U.flip(0)

    def at_least(steps: list[int]) -> list[int]:
        """How many rows have missed that many steps."""
        bounds = torch.tensor(steps, dtype=missed_U.dtype, device=missed_U.device)
        return (len(missed_U) - torch.searchsorted(ascending, bounds)).tolist()

    yield 1, slice(None)
    levels = range(min(cap, longest.bit_length() - 1))
    counts = at_least([1 << (p + 1) for p in levels])
    # A row climbs as many levels as fit: 2^p <= k, p <= cap. The rest is below 2^p unless the cap limits p.
    climbed_U = torch.zeros_like(missed_U)
    for count in counts:
        climbed_U[:count] += 1
    rest_U = missed_U - (1 << climbed_U)
    for level, count in zip(levels, counts, strict=True):
        yield 1 << level, slice(count)
        twice = ((rest_U >> level) & 1).bool() & (climbed_U > level)
        yield 1 << level, twice.nonzero().squeeze(1)
    starts = range(2 << cap, longest + 1, 1 << cap)
    for count in at_least(list(starts)):
        yield 1 << cap, slice(count)


def replay_adam_rows_(
    weight_RW: Tensor,
    mean_RW: Tensor,
    square_RW: Tensor,
    rows_U: Tensor,
    missed_U: Tensor,
    *,
    step: int,
    lr_sums: Tensor,
    betas: tuple[float, float],
    eps: float,
    l2: float,
    max_stride: int,
) -> None:
    """Catch up rows with the steps of dense Adam that they missed, in which the gradient was l2 W alone.

    A stride of n steps holds the denominator at its value in mid-stride. W and m then follow the linear map

        m' = b1 m + (1 - b1) l2 W,   W' = W - a m',   a = lr / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    whose n-th power is taken by squaring, so that a weight that swings through zero under Adam does so here. Three
    things are approximate: the constant denominator, the mean learning rate, and the bound a (1 - b1) l2 <= 3, past
    which the map diverges. A stride of 1 is Adam itself.

    Args:
        weight_RW: Weights, updated in place.
        mean_RW: First moments, updated in place.
        square_RW: Second moments, updated in place.
        rows_U: Rows to catch up, each once.
        missed_U: Steps that each row has missed, at least 1.
        step: Steps done so far; the rows catch up with this step.
        lr_sums: float64 running sums of the learning rates. Their difference i, counted from the end, is the learning
            rate of step `step` - i.
        betas: Decay rates of the moments.
        eps: Term added to the denominator.
        l2: Strength of the decay, lambda.
        max_stride: Longest stride; 1 replays every single step.
    """
    missed_U, order = missed_U.sort(descending=True)
    rows_U = rows_U[order]
    weight_UW, mean_UW, square_UW = (x.index_select(0, rows_U) for x in (weight_RW, mean_RW, square_RW))
    b1, b2 = betas
    dtype = weight_UW.dtype
    left_U = missed_U.clone()
    scratch = weight_UW.new_empty(7, *weight_UW.shape)  # fresh memory for each result would cost more than the sums
    for length, rows in strides(missed_U, max_stride):
        w, m, v, left = weight_UW[rows], mean_UW[rows], square_UW[rows], left_U[rows]
        begin = len(lr_sums) - 1 - left
        lr = (lr_sums[begin + length] - lr_sums[begin]).div_(length).to(dtype)
        middle = (step + (length + 1) / 2 - left).to(dtype)
        a_scale = lr if b1 == 0 else lr.div_(-torch.expm1(middle * math.log(b1)))
        root_scale = torch.ones_like(middle) if b2 == 0 else (-torch.expm1(middle * math.log(b2))).rsqrt_()
        g, a, *free = scratch[:, : len(w)].unbind()
        torch.mul(w, l2, out=g)
        torch.mul(v, b2 ** ((length + 1) / 2), out=a).addcmul_(g, g, value=1 - b2 ** ((length + 1) / 2))
        a.sqrt_().mul_(root_scale[:, None]).add_(eps).reciprocal_().mul_(a_scale[:, None])
        if length == 1:
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            m.lerp_(g, 1 - b1)
            w.addcmul_(a, m, value=-1)
        else:
            a.clamp_(max=3 / ((1 - b1) * l2))
            lost, kept, gained, next_w, _ = free
            _power_(lost, kept, gained, a, b1, l2, free[3:], length)
            torch.mul(a, gained, out=next_w).mul_(m).mul_(-b1).add_(w).addcmul_(lost, w, value=-1)
            m.mul_(kept).addcmul_(gained, g, value=1 - b1)
            # The mean of W^2 over a straight line from W to W'.
            torch.mul(w, w, out=lost).addcmul_(w, next_w).addcmul_(next_w, next_w)
            v.mul_(b2**length).add_(lost, alpha=(1 - b2**length) * l2**2 / 3)
            w.copy_(next_w)
        left -= length
        if not isinstance(rows, slice):  # copies, not views
            for target, values in ((weight_UW, w), (mean_UW, m), (square_UW, v), (left_U, left)):
                target.index_copy_(0, rows, values)
    for target, values in ((weight_RW, weight_UW), (mean_RW, mean_UW), (square_RW, square_UW)):
        target.index_copy_(0, rows_U, values)


def _power_(
    x: Tensor, y: Tensor, u: Tensor, a: Tensor, b1: float, l2: float, scratch: list[Tensor], length: int
) -> None:
    """Write to x, y, u the power 2^p = length of the map of `replay_adam_rows_`, elementwise.

    Every power has the form  W' = (1 - x) W - a b1 u m,  m' = (1 - b1) l2 u W + y m.  Keeping x instead of 1 - x keeps
    slow decay exact in float32. The first square is written out, since y = b1 and u = 1 before it.
    """
    cross, trace = scratch
    torch.mul(a, (1 - b1) * l2, out=x)
    torch.mul(x, b1, out=cross)
    torch.sub(1 + b1, x, out=u)
    torch.sub(b1**2, cross, out=y)
    torch.sub(2, x, out=trace)
    x.mul_(trace).add_(cross)
    for _ in range(length.bit_length() - 2):
        torch.mul(u, u, out=cross).mul_(a).mul_(b1 * (1 - b1) * l2)
        torch.sub(y, x, out=trace).add_(1)
        u.mul_(trace)
        torch.sub(2, x, out=trace)
        x.mul_(trace).add_(cross)
        y.mul_(y).sub_(cross)


def replay_adagrad_rows_(
    weight_RW: Tensor,
    square_R: Tensor,
    rows_U: Tensor,
    missed_U: Tensor,
    *,
    lr_sums: Tensor,
    eps: float,
    l2: float,
    max_stride: int,
) -> None:
    """Catch up rows with the steps of dense row-wise Adagrad that they missed, in which the gradient was l2 W alone.

    At each step all weights of a row shrink by one factor, 1 - lr l2 / (sqrt(s) + eps), so scalars suffice. A stride of
    n steps holds the accumulator s at its value in mid-stride; a stride of 1 is Adagrad itself. In a longer stride, a
    factor that would change the sign of the weights is taken as zero.

    Args:
        weight_RW: Weights, updated in place.
        square_R: Accumulators, updated in place.
        rows_U: Rows to catch up, each once.
        missed_U: Steps that each row has missed, at least 1.
        lr_sums: float64 running sums of the learning rates. Their difference i, counted from the end, is the learning
            rate of the step i before the last.
        eps: Term added to the denominator.
        l2: Strength of the decay, lambda.
        max_stride: Longest stride; 1 replays every single step.
    """
    missed_U, order = missed_U.sort(descending=True)
    rows_U = rows_U[order]
    weight_UW = weight_RW.index_select(0, rows_U)
    square_U = square_R.index_select(0, rows_U).double()
    norm_U = weight_UW.square().mean(1, dtype=torch.float64) * l2**2  # mean of the squared decay gradient
    factor_U = torch.ones_like(norm_U)
    left_U = missed_U.clone()
    for length, rows in strides(missed_U, max_stride):
        s, f, left = square_U[rows], factor_U[rows], left_U[rows]
        begin = len(lr_sums) - 1 - left
        lr = (lr_sums[begin + length] - lr_sums[begin]) / length
        g2 = norm_U[rows] * f * f
        shrink = 1 - lr * l2 / ((s + g2 * ((length + 1) / 2)).sqrt_() + eps)
        square_U[rows] = s + g2 * length
        factor_U[rows] = f * (shrink if length == 1 else shrink.clamp_(min=0) ** length)
        left_U[rows] = left - length
    square_R.index_copy_(0, rows_U, square_U.to(square_R.dtype))
    weight_RW.index_copy_(0, rows_U, weight_UW.mul_(factor_U.to(weight_UW.dtype)[:, None]))
