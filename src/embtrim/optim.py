"""Row-sparse optimisers over EmbeddingTables: a step moves the rows of the batch and no others.

A constructor attaches the optimiser to its tables, which then make no dense gradient: each forward pass leaves its
distinct rows in `tables.lookups`, and `step` updates these rows in the flat buffers. Several passes before a step add
up, as gradients do. State is flat and laid out as the weights are.

L2 with strength l2 (lambda) comes in two forms: coupled adds lambda W to the gradient (the loss gains
lambda/2 ||W||^2), decoupled shrinks W by lr lambda a step. And in two scopes: "batch" decays the rows of the batch;
"table" decays every row at every step, as dense optimisers do: an untouched row is caught up when it is next read
(the tables call `catch_up`), or when the tables settle. What catching up amounts to:

| | decoupled | coupled |
|---|---|---|
| SGD | exact: W times the product of 1 - lr lambda | the same thing |
| Adam | exact in the decay | missed steps replayed, momentum included, in growing strides: approximate |
| row-wise Adagrad | exact | missed steps replayed in growing strides: approximate |

With max_stride = 1 the replays are exact, and cost as much as the steps that were missed. First-order weights are rows
of width 1 and are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from embtrim.errors import ConfigError, EmbtrimError
from embtrim.kernels import torch as kernels
from embtrim.tables import EmbeddingTables, Lookup

# All rows are caught up in chunks of about this many elements, which bounds the memory that settling needs.
SETTLE_ELEMENTS = 1 << 20
STATE_VERSION = 1


class RowOptimizer:
    """What the row-sparse optimisers share: merging lookups, remembering the decay owed, and state.

    Args:
        tables: whose rows to train. An optimiser attached before is detached, and refuses to step from then on.
        lr: learning rate; may be set at any time.
        l2: strength of the decay, lambda.
        l2_scope: "table" or "batch"; see the module docstring.
        decoupled: shrink the weights directly instead of through the gradient.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self, tables: EmbeddingTables, lr: float, l2: float, l2_scope: Literal["table", "batch"], decoupled: bool
    ) -> None:
        name = type(self).__name__
        if not lr > 0 or not math.isfinite(lr):
            raise ConfigError(f"{name}: lr must be a positive number, given {lr}")
        if not l2 >= 0 or not math.isfinite(l2):
            raise ConfigError(f"{name}: l2 must be 0 or more, given {l2}")
        if l2_scope not in ("table", "batch"):
            raise ConfigError(f"{name}: l2_scope must be 'table' or 'batch', given {l2_scope!r}")
        self.tables = tables
        self.lr = lr
        self.l2 = l2
        self.l2_scope = l2_scope
        self.decoupled = decoupled
        self.steps = 0
        self._state: dict[str, Tensor] = {}
        self._owes = l2 > 0 and l2_scope == "table"
        if self._owes:
            # Step up to which each row has been decayed, and running sums over the steps since all rows were settled:
            # of the learning rate where steps are replayed, else of the logarithm of the factor on the weights.
            self._state["decayed_until"] = torch.zeros(tables.num_rows, dtype=torch.int32, device=tables.weight.device)
            self._sums = torch.zeros(1024, dtype=torch.float64, device=tables.weight.device)
            self._last_sum = 0.0
        self._settled_at = 0
        self._allocate()
        tables.attach(self)

    # ---- what each optimiser defines --------------------------------------------------------------------------

    _replays = False  # whether missed steps are replayed; otherwise missed decay is a factor

    def _allocate(self) -> None:
        """Create the state."""

    def _update(self, weight_RW: Tensor, at: slice, rows: slice, rows_U: Tensor, grad_UW: Tensor) -> None:
        """Take one step on rows of a view: `at` are its elements in the flat state, `rows` its storage rows."""
        raise NotImplementedError

    def _replay(self, weight_RW: Tensor, at: slice, rows: slice, rows_U: Tensor, missed_U: Tensor) -> None:
        """Replay missed steps on rows of a view."""
        raise NotImplementedError

    # ---- the protocol of the tables ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Update the rows that have gradients and forget the lookups; without a gradient nothing happens.

        Raises:
            EmbtrimError: the tables have another optimiser now, or were moved to another device or type.
        """
        self._check_attached()
        lookups = self.tables.lookups
        if not lookups:
            return
        if self.lr < 0 or (self._is_factor and self.lr * self.l2 >= 1):
            raise ConfigError(
                f"{type(self).__name__}: lr * l2 must be in [0, 1), given lr = {self.lr} and l2 = {self.l2}"
            )
        rows_U, bounds, grads, first_grad_U = _merge(self.tables, lookups)
        rows_U = rows_U.long()
        self.steps += 1
        if self._owes:
            self._note_step()
            self._state["decayed_until"].index_fill_(0, rows_U, self.steps)
        for group, (low, high), grad in zip(self.tables.groups, bounds, grads, strict=True):
            if group.width and low < high:
                at = slice(group.offset, group.offset + group.num_rows * group.width)
                inside = slice(group.start, group.start + group.num_rows)
                self._update_or_decay(self.tables.group_view(group), at, inside, rows_U[low:high] - group.start, grad)
        if self.tables.first_order is not None:
            whole = slice(0, self.tables.num_rows)
            self._in_first_order = True
            self._update_or_decay(self.tables.first_order[:, None], whole, whole, rows_U, first_grad_U)
            self._in_first_order = False
        self.zero_grad()

    def _update_or_decay(
        self, weight_RW: Tensor, at: slice, rows: slice, rows_U: Tensor, grad_UW: Tensor | None
    ) -> None:
        """Step on rows; where no gradient arrived (their output was unused) a decay owed to all is still due."""
        if grad_UW is None:
            if not self._owes:
                return
            grad_UW = torch.zeros(len(rows_U), weight_RW.shape[1], dtype=weight_RW.dtype, device=weight_RW.device)
        self._update(weight_RW, at, rows, rows_U, grad_UW)

    def zero_grad(self) -> None:
        """Forget the gradients of all passes since the last step."""
        for lookup in self.tables.lookups:
            # A leaf's hook holds its lookup: without this the pair would live until the garbage collector ran.
            lookup.leaves = []
            lookup.first_order_U = None
        self.tables.lookups.clear()
