"""Row kernels in plain torch, on any device: the definition that a faster kernel must equal.

Each works in place on 2-D views of flat buffers and touches only the rows it is given. What was measured: index_select
to gather and index_copy_ to write back cost a fraction of `W[index]`, of `index_put_` and of F.embedding's backward.

Axes: R rows of a view, W its width, U distinct rows, N rows with repeats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements that a replay works on at a time: what it needs of them then stays in the processor's cache.
REPLAY_ELEMENTS = 1 << 22


def gather_rows(source_RW: Tensor, rows_U: Tensor) -> Tensor:
    """(U, W) copies of rows."""
    return source_RW.index_select(0, rows_U)


def sum_rows(values_NW: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    """(num_rows, W): the sum of all values with one index."""
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
    """Row-wise Adagrad: one accumulator a row takes the mean of the squared gradients over the row.

    s <- s + mean(g^2),  W <- decay W - lr g / (sqrt(s) + eps),  g = G + l2 W. As FBGEMM's exact_rowwise_adagrad.
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
    """Adam (Kingma & Ba 2015) on the given rows, bias corrections by the number of this step (from 1).

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
    """W <- factor W on the given rows; one factor, or (U, 1)."""
    weight_RW.index_copy_(0, rows_U, weight_RW.index_select(0, rows_U).mul_(factor))


def strides(missed_U: Tensor, max_stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut missed steps into strides of 1, 1, 2, 4, .. max_stride.

    Args:
        missed_U: missed steps of each row, descending.
        max_stride: the longest stride.

    Yields:
        (rows, first, longest): the first `rows` rows have missed more than `first` steps; their next stride is
        `longest` steps, or all that is left.
    """
    total = int(missed_U[0]) if len(missed_U) else 0
    firsts = [0]
    while firsts[-1] < total:
        firsts.append(firsts[-1] + min(max(1, firsts[-1]), max_stride))
    ascending = missed_U.flip(0)
    thresholds = torch.tensor(firsts[:-1], dtype=missed_U.dtype, device=missed_U.device)
    active = (len(missed_U) - torch.searchsorted(ascending, thresholds, right=True)).tolist()
    for rows, (first, following) in zip(active, itertools.pairwise(firsts), strict=True):
        yield rows, first, following - first


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
    """Catch up rows with the steps of dense Adam they missed, where the gradient was l2 W alone.

    A stride of n steps holds the denominator at its value in mid-stride; W and m then follow the linear map

        m' = b1 m + (1 - b1) l2 W,   W' = W - a m',   a = lr / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    whose determinant is b1 and whose n-th power has a closed form: of d = a (1 - b1) l2 and the roots x, y of
    z^2 - (1 + b1 - d) z + b1. Complex roots are a weight that swings through zero, as it does under Adam. Approximate
    are the constant denominator, l2 W at its value at the start in it, and a bound d <= 3, past which the map
    diverges. A stride of 1 is Adam itself.

    Args:
        weight_RW: weights, updated in place.
        mean_RW: first moments, updated in place.
        square_RW: second moments, updated in place.
        rows_U: rows to catch up, each once.
        missed_U: steps that each has missed, at least 1.
        step: steps done, by which all rows are caught up.
        lr_sums: float64; difference i of it, counted from the end, is the learning rate of step `step` - i.
        betas: decay rates of the moments.
        eps: added to the denominator.
        l2: lambda.
        max_stride: longest stride; 1 replays every single step.
    """
    missed_U, order = missed_U.sort(descending=True)
    rows_U = rows_U[order]
    size = max(1, REPLAY_ELEMENTS // weight_RW.shape[1])
    for missed_C, rows_C in zip(missed_U.split(size), rows_U.split(size), strict=True):
        weight_CW, mean_CW, square_CW = (x.index_select(0, rows_C) for x in (weight_RW, mean_RW, square_RW))
        _replay_adam(
            weight_CW, mean_CW, square_CW, missed_C,
            step=step, lr_sums=lr_sums, betas=betas, eps=eps, l2=l2, max_stride=max_stride,
        )  # fmt: skip
        for target, values in ((weight_RW, weight_CW), (mean_RW, mean_CW), (square_RW, square_CW)):
            target.index_copy_(0, rows_C, values)


def _replay_adam(
    weight_UW: Tensor,
    mean_UW: Tensor,
    square_UW: Tensor,
    missed_U: Tensor,
    *,
    step: int,
    lr_sums: Tensor,
    betas: tuple[float, float],
    eps: float,
    l2: float,
    max_stride: int,
) -> None:
    """replay_adam_rows_ on copies of the rows, in place; missed steps descend."""
    b1, b2 = betas
    dtype = weight_UW.dtype
    last = len(lr_sums) - 1
    for rows, first, longest in strides(missed_U, max_stride):
        w, m, v = weight_UW[:rows], mean_UW[:rows], square_UW[:rows]
        left = missed_U[:rows] - first
        n = left.clamp(max=longest)
        begin = last - left
        n64, start = n.double(), (step - left).double()
        lr = (lr_sums[begin + n] - lr_sums[begin]) / n64
        middle = start + (n64 + 1) / 2
        scale = (lr / -torch.expm1(middle * _log(b1)) if b1 else lr).to(dtype)[:, None]
        root = (-torch.expm1(middle * _log(b2))).rsqrt().to(dtype)[:, None] if b2 else 1.0
        decayed_v = torch.exp((n64 + 1) / 2 * _log(b2)).to(dtype)[:, None]
        g = w * l2
        g2 = g * g
        a = scale / (torch.lerp(g2, v, decayed_v).sqrt_() * root + eps)
        kept_v = torch.exp(n64 * _log(b2)).to(dtype)[:, None]
        if longest == 1:
            m.lerp_(g, 1 - b1)
            v.copy_(torch.lerp(g2, v, kept_v))
            w.addcmul_(a, m, value=-1)
            continue
        n_U1 = n.to(dtype)[:, None]
        a.clamp_(max=3 / ((1 - b1) * l2))
        d = a * ((1 - b1) * l2)
        u, half = _power(d, b1, n_U1)
        tilt = u * (0.5 * (1 - b1 - d))
        new_w = w * (half + tilt) - a * m * (b1 * u)
        m.mul_(half - tilt).addcmul_(w, u, value=(1 - b1) * l2)
        g2 = (w * w + w * new_w + new_w * new_w) * (l2 * l2 / 3)
        v.copy_(torch.lerp(g2, v, kept_v))
        w.copy_(new_w)


def _power(d_UW: Tensor, b1: float, n_U1: Tensor) -> tuple[Tensor, Tensor]:
    """(x^n - y^n) / (x - y) and (x^n + y^n) / 2, where x, y are the roots of z^2 - (1 + b1 - d) z + b1."""
    trace = d_UW + (1 - b1)
    square = trace * trace - 4 * d_UW
    rings = square < 0
    root = square.abs_().clamp_(min=1e-10).sqrt_()
    power = torch.exp(n_U1 * _log(b1))
    # x = 1 - e, with e from the form of the quadratic formula that does not cancel.
    slow = torch.log1p(d_UW * -2 / trace.add_(root)).mul_(n_U1).exp_()
    fast = power / slow
    u, half = (slow - fast).div_(root), slow.add_(fast).mul_(0.5)
    if bool(rings.any()):  # complex roots: modulus sqrt(b1), and the real form is meaningless
        modulus = power.sqrt()
        angle = torch.atan2(root, 1 + b1 - d_UW).mul_(n_U1)
        u = torch.where(rings, 2 * modulus * angle.sin() / root, u)
        half = torch.where(rings, modulus * angle.cos(), half)
    return u, half


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
    """Catch up rows with the steps of dense row-wise Adagrad they missed, where the gradient was l2 W alone.

    All weights of a row shrink by one factor, 1 - lr l2 / (sqrt(s) + eps) a step, so that scalars suffice. A stride
    of n steps holds the accumulator s at its value in mid-stride; a stride of 1 is Adagrad itself. A factor that
    would change the sign of the weights in a longer stride is taken as zero.

    Args:
        weight_RW: weights, updated in place.
        square_R: accumulators, updated in place.
        rows_U: rows to catch up, each once.
        missed_U: steps that each has missed, at least 1.
        lr_sums: float64; difference i of it, counted from the end, is the learning rate of the step i before the last.
        eps: added to the denominator.
        l2: lambda.
        max_stride: longest stride; 1 replays every single step.
    """
    missed_U, order = missed_U.sort(descending=True)
    rows_U = rows_U[order]
    weight_UW = weight_RW.index_select(0, rows_U)
    square_U = square_R.index_select(0, rows_U).double()
    norm_U = weight_UW.square().mean(1, dtype=torch.float64) * l2**2  # mean of the squared decay gradient
    factor_U = torch.ones_like(norm_U)
    last = len(lr_sums) - 1
    for rows, first, longest in strides(missed_U, max_stride):
        s, f = square_U[:rows], factor_U[:rows]
        left = missed_U[:rows] - first
        n = left.clamp(max=longest)
        begin = last - left
        lr = (lr_sums[begin + n] - lr_sums[begin]) / n
        g2 = norm_U[:rows] * f * f
        rate = lr * l2 / ((s + g2 * (n + 1) / 2).sqrt_() + eps)
        s.addcmul_(g2, n.double())
        f.mul_(1 - rate if longest == 1 else (1 - rate).clamp_(min=0) ** n)
    square_R.index_copy_(0, rows_U, square_U.to(square_R.dtype))
    weight_RW.index_copy_(0, rows_U, weight_UW.mul_(factor_U.to(weight_UW.dtype)[:, None]))


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
