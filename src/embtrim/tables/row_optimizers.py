"""Row-sparse optimisers over EmbeddingTables: a step moves the rows of the batch and no others.

The constructor attaches the optimiser to its tables, which then make no dense gradient. Each forward pass leaves its
distinct rows in `tables.lookups`, and `step` updates these rows in the flat buffers. Several passes before a step add
up, as gradients do. State is flat and laid out as the weights are.

L2 of strength `l2` (lambda) has two forms. Coupled L2 adds lambda W to the gradient (the loss gains lambda/2 ||W||^2);
decoupled L2 shrinks W by the share lr lambda at each step. L2 also has two scopes. "batch" decays the rows of the batch;
"table" decays every row at every step, as dense optimisers do. An untouched row then catches up when it is next read
(the tables call `catch_up`), or when the tables settle:

    SGD, either form        exact: W times the product of 1 - lr lambda
    Adam, Adagrad decoupled exact: the same product; an untouched row keeps its moments
    Adam coupled            approximate: the missed steps of dense Adam are replayed, momentum included
    Adagrad coupled         approximate: the missed steps are replayed

A replay takes strides of 1, 1, 2, 4, .. `max_stride` steps at once (see kernels/torch.py). With max_stride = 1 it is
exact, and costs as much as the missed steps. First-order weights are treated alike, as rows of width 1.

Axes: U distinct rows of the lookups, R rows of a view, W its width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from embtrim.errors import ConfigError, EmbtrimError, ModelError
from embtrim.system.memory import zero_pages
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.kernels import kernels_for
from embtrim.tables.kernels.torch import sum_rows
from embtrim.tables.storage import Lookup

# Settling works in chunks of about this many elements, which bounds its memory.
SETTLE_ELEMENTS = 1 << 20
# Smaller states are written whole.
LARGE_BYTES = 1 << 20

L2Scope = Literal["table", "batch"]


@dataclass(frozen=True)
class Part:
    """A 2-D view of the weights: the rows of one width, or the first-order weights.

    Attributes:
        weight_RW: The view.
        state: Prefix of the names of the part's state.
        rows: Storage rows of the part.
        elements: Elements of the part in flat state as large as the weights.
    """

    weight_RW: Tensor
    state: Literal["embedding", "first_order"]
    rows: slice
    elements: slice


class RowOptimizer:
    """A row-sparse optimiser without its update rule: merges lookups, applies the decay owed, keeps state.

    Args:
        tables: The tables to train. An optimiser that is attached to them is detached, and refuses to step from then on.
        lr: Learning rate. It may be set at any time.
        l2: Strength of the decay, lambda.
        l2_scope: "table" decays every row at every step, "batch" the rows of the batch; see the module docstring.
        decoupled: Shrink the weights directly, not through the gradient.
        max_stride: Missed steps that a replay takes at once, at most.

    Attributes:
        steps: Steps taken so far.
        state: Tensors of the state, by name.

    Raises:
        ConfigError: A setting is out of range.
    """

    # Whether coupled decay of untouched rows is replayed step by step; otherwise it is one factor.
    replays = True

    def __init__(
        self, tables: EmbeddingTables, lr: float, l2: float, l2_scope: L2Scope, decoupled: bool, max_stride: int
    ) -> None:
        name = type(self).__name__
        if not 0 < lr < math.inf:
            raise ConfigError(f"{name}: lr must be a positive number, given {lr}")
        if not 0 <= l2 < math.inf:
            raise ConfigError(f"{name}: l2 must be 0 or more, given {l2}")
        if l2_scope not in ("table", "batch"):
            raise ConfigError(f"{name}: l2_scope must be 'table' or 'batch', given {l2_scope!r}")
        if max_stride < 1:
            raise ConfigError(f"{name}: max_stride must be 1 or more, given {max_stride}")
        self.tables = tables
        self.lr = lr
        self.l2 = l2
        self.l2_scope = l2_scope
        self.decoupled = decoupled
        self.max_stride = max_stride
        self.steps = 0
        tables.attach(None)
        self._kernels = kernels_for(tables.weight)
        self.state: dict[str, Tensor] = self._allocate()
        self._owes = l2 > 0 and l2_scope == "table"
        self._by_factor = decoupled or not self.replays
        self._settled_at = 0
        if self._owes:
            device = tables.weight.device
            # The step up to which each row has its decay; and running sums, over the steps since the tables settled,
            # of log(1 - lr l2), or of lr where steps are replayed.
            self.state["decayed_until"] = torch.zeros(tables.num_rows, dtype=torch.int32, device=device)
            self._sums_T = torch.zeros(1024, dtype=torch.float64, device=device)
            self._last_sum = 0.0
        tables.attach(self)

    # ---- what each optimiser defines --------------------------------------------------------------------------

    def _allocate(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {}

    def _update(self, part: Part, rows_U: Tensor, grad_UW: Tensor) -> None:
        """Take step `self.steps` on rows of a part."""
        raise NotImplementedError

    def _replay(self, part: Part, rows_U: Tensor, missed_U: Tensor) -> None:
        """Replay the missed steps, at least one each, of rows of a part."""
        raise NotImplementedError

    # ---- training ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Update the rows that have gradients, then forget the lookups. Without a gradient nothing happens.

        Raises:
            ModelError: The tables belong to another optimiser by now, or have moved to another device or type.
            ConfigError: lr * l2 is 1 or more, where a step multiplies weights by 1 - lr * l2.
        """
        self._check_attached()
        if not self.tables.lookups:
            return
        if self.l2 and self._by_factor and not 0 <= self.lr * self.l2 < 1:
            raise ConfigError(
                f"{type(self).__name__}: lr * l2 must be below 1, given lr = {self.lr} and l2 = {self.l2}"
            )
        rows_U, bounds, grads, first_order_grad = merge_lookups(self.tables)
        self.steps += 1
        if self._owes:
            self._note_step()
            self.state["decayed_until"].index_fill_(0, rows_U, self.steps)
        for part, (low, high), grad_UW in zip(
            self._parts(), [*bounds, (0, len(rows_U))], [*grads, first_order_grad], strict=False
        ):
            if part.weight_RW.numel() == 0 or low == high:
                continue
            part_rows_U = rows_U[low:high] - part.rows.start if part.rows.start else rows_U[low:high]
            if grad_UW is not None:
                self._update(part, part_rows_U, grad_UW)
            elif self._owes and self._by_factor:
                self._kernels.scale_rows_(part.weight_RW, part_rows_U, self._decay)
            elif self._owes:
                self._update(part, part_rows_U, part.weight_RW.new_zeros(high - low, part.weight_RW.shape[1]))
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the passes since the last step, and their gradients."""
        for lookup in self.tables.lookups:
            # A leaf's hook holds its lookup, which holds the leaf: unless this ring is cut, both live until the garbage
            # collector runs.
            lookup.leaves = []
            lookup.first_order_U = None
        self.tables.lookups.clear()

    def detach(self) -> None:
        """Apply the decay owed and release the tables, which are an ordinary module again."""
        if self.tables.row_owner is self:
            self.tables.attach(None)

    @property
    def _coupled_l2(self) -> float:
        return 0.0 if self.decoupled else self.l2

    @property
    def _decay(self) -> float:
        """The factor by which one step of decoupled decay multiplies weights."""
        return 1 - self.lr * self.l2 if self._by_factor else 1.0

    def _parts(self) -> list[Part]:
        tables = self.tables
        parts = [
            Part(
                tables.group_view(g),
                "embedding",
                slice(g.start, g.stop),
                slice(g.offset, g.offset + g.num_rows * g.width),
            )
            for g in tables.groups
        ]
        if tables.first_order is not None:
            whole = slice(0, tables.num_rows)
            parts.append(Part(tables.first_order[:, None], "first_order", whole, whole))
        return parts

    def _check_attached(self) -> None:
        name = type(self).__name__
        if self.tables.row_owner is not self:
            raise ModelError(f"this {name} was detached from its tables; make a new one to train them further")
        for value in self.state.values():
            if value.device != self.tables.weight.device or (
                value.is_floating_point() and value.dtype != self.tables.weight.dtype
            ):
                raise ModelError(
                    f"the tables are {self.tables.weight.dtype} on {self.tables.weight.device}, but the state of their "
                    f"{name} is {value.dtype} on {value.device}; move the model first, then make the optimiser"
                )

    # ---- decay owed to untouched rows -------------------------------------------------------------------------

    def _note_step(self) -> None:
        """Append to the running sums what a row that misses this step is owed."""
        place = self.steps - self._settled_at
        if place == len(self._sums_T):
            self._sums_T = torch.cat([self._sums_T, torch.zeros_like(self._sums_T)])
        self._last_sum += math.log1p(-self.lr * self.l2) if self._by_factor else self.lr
        self._sums_T[place] = self._last_sum

    @torch.no_grad()
    def catch_up(self, rows_U: Tensor | None) -> None:
        """Give rows the decay of the steps that they missed.

        Args:
            rows_U: Storage rows, ascending and distinct. None means all rows, in chunks of bounded memory.
        """
        if not self._owes or self.steps == self._settled_at:
            return
        if rows_U is not None:
            self._catch_up(rows_U.long())
            return
        for group in self.tables.groups:
            chunk = max(1, SETTLE_ELEMENTS // max(1, group.width))
            for start in range(group.start, group.stop, chunk):
                stop = min(start + chunk, group.stop)
                self._catch_up(torch.arange(start, stop, device=self.tables.weight.device))
        self._settled_at = self.steps
        self._last_sum = 0.0
        self._sums_T[0] = 0.0

    def _catch_up(self, rows_U: Tensor) -> None:
        until_R = self.state["decayed_until"]
        missed_U = self.steps - until_R.index_select(0, rows_U)
        behind = missed_U.nonzero().squeeze(1)
        if len(behind) == 0:
            return
        if len(behind) < len(rows_U):
            rows_U, missed_U = rows_U[behind], missed_U[behind]
        until_R.index_fill_(0, rows_U, self.steps)
        edges = torch.searchsorted(rows_U, self.tables.group_starts.long()).tolist()
        for part, (low, high) in zip(self._parts(), [*itertools.pairwise(edges), (0, len(rows_U))], strict=False):
            if part.weight_RW.numel() == 0 or low == high:
                continue
            part_rows_U = rows_U[low:high] - part.rows.start
            if self._by_factor:
                begin = self.steps - self._settled_at - missed_U[low:high]
                factor_U = torch.exp(self._last_sum - self._sums_T[begin])
                self._kernels.scale_rows_(part.weight_RW, part_rows_U, factor_U.to(part.weight_RW.dtype)[:, None])
            else:
                self._replay(part, part_rows_U, missed_U[low:high])

    # ---- state ------------------------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """Bytes of the state."""
        return sum(value.nbytes for value in self.state.values())

    def state_dict(self) -> dict[str, Any]:
        """Settle the tables, and return the learning rate, the number of steps and the state (not a copy)."""
        self._check_attached()
        self.tables.settle()
        return {"kind": type(self).__name__, "lr": self.lr, "steps": self.steps, "state": dict(self.state)}

    @torch.no_grad()
    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. Load the model's weights as well, since the two belong together.

        Raises:
            EmbtrimError: The state belongs to another optimiser, to other tables, or to other L2 settings.
        """
        self._check_attached()
        name = type(self).__name__
        if values.get("kind") != name:
            raise EmbtrimError(f"this state belongs to a {values.get('kind')}, not to a {name}")
        sizes = {key: tuple(value.shape) for key, value in self.state.items()}
        given = {key: tuple(value.shape) for key, value in values["state"].items()}
        if sizes != given:
            raise EmbtrimError(
                f"this state has tensors {given}, this {name} needs {sizes}; the state belongs to other tables or another l2"
            )
        self.tables.settle()
        for key, value in self.state.items():
            value.copy_(values["state"][key])
        self.lr, self.steps = values["lr"], values["steps"]
        self._settled_at = self.steps

    def owing_state(self) -> dict[str, Any]:
        """The state with the decay owed still owed (not a copy), so that writing a checkpoint changes nothing.

        This state belongs to the weights as they are in memory; `model.state_dict()` would settle them.
        """
        self._check_attached()
        owed = {"settled_at": self._settled_at}
        if self._owes:
            sums_T = self._sums_T[: self.steps - self._settled_at + 1]
            owed |= {"sums": sums_T, "last_sum": self._last_sum}
        return {"lr": self.lr, "steps": self.steps, "state": dict(self.state), **owed}

    @torch.no_grad()
    def load_owing_state(self, values: Mapping[str, Any]) -> None:
        """Load what `owing_state` returned. The caller puts back the weights that belong to it."""
        self._check_attached()
        for key, value in self.state.items():
            value.copy_(values["state"][key])
        self.lr, self.steps, self._settled_at = values["lr"], values["steps"], values["settled_at"]
        if self._owes:
            sums_T = values["sums"].to(self._sums_T)
            room = torch.zeros(max(len(self._sums_T), 2 * len(sums_T)), dtype=sums_T.dtype, device=sums_T.device)
            room[: len(sums_T)] = sums_T
            self._sums_T, self._last_sum = room, values["last_sum"]


class RowAdam(RowOptimizer):
    """Lazy Adam: the moments and weights of the batch's rows move; bias corrections count all steps.

    It is torch.optim.SparseAdam with decay. With coupled decay of the whole table, untouched rows follow dense Adam by
    approximate replay; see the module docstring.

    Args:
        tables: The tables to train. An optimiser that is attached to them is detached.
        lr: Learning rate. It may be set at any time.
        betas: Decay rates of the first and second moment.
        eps: Term added to the denominator.
        l2: Strength of the decay, lambda.
        l2_scope: "table" decays every row at every step, "batch" the rows of the batch.
        decoupled: Use AdamW's decay, not coupled L2.
        max_stride: Missed steps that the replay takes at once, at most.

    Example:
        >>> from embtrim.schema import Schema
        >>> from embtrim.tables.embedding_tables import full_tables
        >>> tables = full_tables(Schema.from_sizes([100, 10]), width=4)
        >>> optimizer = RowAdam(tables, lr=0.01)
        >>> tables(torch.tensor([[3, 1], [7, 1]])).concat.sum().backward()
        >>> optimizer.step()
        >>> optimizer.state_bytes == 2 * tables.weight.nbytes
        True
    """

    def __init__(
        self,
        tables: EmbeddingTables,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        l2: float = 0.0,
        l2_scope: L2Scope = "table",
        decoupled: bool = False,
        max_stride: int = 64,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ConfigError(f"RowAdam: betas must be in [0, 1), given {betas}")
        self.betas = betas
        self.eps = eps
        super().__init__(tables, lr, l2, l2_scope, decoupled, max_stride)

    def _allocate(self) -> dict[str, Tensor]:
        weights = {"embedding": self.tables.weight, "first_order": self.tables.first_order}
        return {
            f"{name}_{moment}": zeros_like(weight)
            for name, weight in weights.items()
            if weight is not None
            for moment in ("mean", "square")
        }

    def _moments(self, part: Part) -> tuple[Tensor, Tensor]:
        mean, square = (self.state[f"{part.state}_{moment}"][part.elements] for moment in ("mean", "square"))
        return mean.view(part.weight_RW.shape), square.view(part.weight_RW.shape)

    def _update(self, part: Part, rows_U: Tensor, grad_UW: Tensor) -> None:
        self._kernels.adam_rows_(
            part.weight_RW,
            *self._moments(part),
            rows_U,
            grad_UW,
            step=self.steps,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            l2=self._coupled_l2,
            decay=self._decay,
        )

    def _replay(self, part: Part, rows_U: Tensor, missed_U: Tensor) -> None:
        self._kernels.replay_adam_rows_(
            part.weight_RW,
            *self._moments(part),
            rows_U,
            missed_U,
            step=self.steps,
            lr_sums=self._sums_T[: self.steps - self._settled_at + 1],
            betas=self.betas,
            eps=self.eps,
            l2=self.l2,
            max_stride=self.max_stride,
        )


class RowAdagrad(RowOptimizer):
    """Row-wise Adagrad: one accumulator for each row, which sums the mean of the squared gradients over the row.

    It is FBGEMM's exact_rowwise_adagrad, whose state is 1 / width of the weights. Coupled decay enters the accumulator,
    as it does in a dense optimiser. For untouched rows the decay is replayed with one scalar for each row.

    Args:
        tables: The tables to train. An optimiser that is attached to them is detached.
        lr: Learning rate. It may be set at any time.
        eps: Term added to the denominator.
        l2: Strength of the decay, lambda.
        l2_scope: "table" decays every row at every step, "batch" the rows of the batch.
        decoupled: Shrink the weights directly, not through the gradient.
        max_stride: Missed steps that the replay takes at once, at most.
    """

    def __init__(
        self,
        tables: EmbeddingTables,
        lr: float = 1e-2,
        eps: float = 1e-8,
        l2: float = 0.0,
        l2_scope: L2Scope = "table",
        decoupled: bool = False,
        max_stride: int = 64,
    ) -> None:
        self.eps = eps
        super().__init__(tables, lr, l2, l2_scope, decoupled, max_stride)

    def _allocate(self) -> dict[str, Tensor]:
        names = ["embedding"] if self.tables.first_order is None else ["embedding", "first_order"]
        return {f"{name}_square": self.tables.weight.detach().new_zeros(self.tables.num_rows) for name in names}

    def _update(self, part: Part, rows_U: Tensor, grad_UW: Tensor) -> None:
        self._kernels.adagrad_rows_(
            part.weight_RW,
            self.state[f"{part.state}_square"][part.rows],
            rows_U,
            grad_UW,
            lr=self.lr,
            eps=self.eps,
            l2=self._coupled_l2,
            decay=self._decay,
        )

    def _replay(self, part: Part, rows_U: Tensor, missed_U: Tensor) -> None:
        self._kernels.replay_adagrad_rows_(
            part.weight_RW,
            self.state[f"{part.state}_square"][part.rows],
            rows_U,
            missed_U,
            lr_sums=self._sums_T[: self.steps - self._settled_at + 1],
            eps=self.eps,
            l2=self.l2,
            max_stride=self.max_stride,
        )


class RowSGD(RowOptimizer):
    """Plain SGD on the rows of the batch; decay is exact in every form.

    Args:
        tables: The tables to train. An optimiser that is attached to them is detached.
        lr: Learning rate. It may be set at any time.
        l2: Strength of the decay, lambda.
        l2_scope: "table" decays every row at every step, "batch" the rows of the batch.
        decoupled: No effect; SGD without momentum decays alike in either form.
    """

    replays = False

    def __init__(
        self,
        tables: EmbeddingTables,
        lr: float = 1e-1,
        l2: float = 0.0,
        l2_scope: L2Scope = "table",
        decoupled: bool = False,
    ) -> None:
        super().__init__(tables, lr, l2, l2_scope, decoupled, max_stride=1)

    def _update(self, part: Part, rows_U: Tensor, grad_UW: Tensor) -> None:
        self._kernels.sgd_rows_(part.weight_RW, rows_U, grad_UW, lr=self.lr, decay=self._decay)


def zeros_like(weight: Tensor) -> Tensor:
    """Zeros for each value of a weight; pages of large ones on the CPU take memory once they are written to."""
    if weight.device.type != "cpu" or weight.nbytes < LARGE_BYTES:
        return torch.zeros_like(weight, requires_grad=False)
    return torch.frombuffer(zero_pages(weight.nbytes), dtype=weight.dtype).view(weight.shape)


def merge_lookups(
    tables: EmbeddingTables,
) -> tuple[Tensor, list[tuple[int, int]], list[Tensor | None], Tensor | None]:
    """The rows and gradients of all passes since the last step. Gradients of one row are summed.

    Returns:
        int64 storage rows (U,), ascending and distinct; for each group, the range of storage rows that lies in it; for
        each group, the gradients of its rows (U_g, W), or None if they have no gradient; the first-order gradients
        (U, 1), or None.
    """
    first, *more = tables.lookups
    if not more:
        grads = [leaf.grad for leaf in first.leaves]
        return first.rows_U.long(), first.bounds, grads, _first_order_grad(first)
    rows_U, inverse = torch.unique(torch.cat([lookup.rows_U for lookup in tables.lookups]), return_inverse=True)
    bounds = list(itertools.pairwise(torch.searchsorted(rows_U, tables.group_starts).tolist()))
    places = inverse.split([len(lookup.rows_U) for lookup in tables.lookups])
    grads: list[Tensor | None] = []
    for number, (low, high) in enumerate(bounds):
        found = [
            (lookup.leaves[number].grad, place[slice(*lookup.bounds[number])] - low)
            for lookup, place in zip(tables.lookups, places, strict=True)
        ]
        grads.append(_sum_grads(found, high - low))
    first_order = [(_first_order_grad(k), place) for k, place in zip(tables.lookups, places, strict=True)]
    return rows_U.long(), bounds, grads, _sum_grads(first_order, len(rows_U))


def _first_order_grad(lookup: Lookup) -> Tensor | None:
    values = lookup.first_order_U
    return None if values is None or values.grad is None else values.grad[:, None]


def _sum_grads(found: list[tuple[Tensor | None, Tensor]], num_rows: int) -> Tensor | None:
    pairs = [(grad, index) for grad, index in found if grad is not None]
    if not pairs:
        return None
    grads, indices = zip(*pairs, strict=True)
    return sum_rows(torch.cat(grads), torch.cat(indices), num_rows)
