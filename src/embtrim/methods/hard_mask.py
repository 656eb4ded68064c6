"""hard_mask: HAM, hard auxiliary masks (Xiao et al., DL4SR at CIKM 2022, arXiv 2208.08004).

    e~_{b,f,j} = m_{f,j} e_{b,f,j},  m_{f,j} = 1[a_{f,j} > 0],  a = 1/2 at the start, clamped to [-1, 1]      (mask)
    dm/da := 1[|a| <= 1],  so dL/da_{f,j} = sum_b (dl_b/de~_{b,f,j}) e_{b,f,j} with the unmasked e              (ste)
    C(a) = sum_f n_f sum_j m_{f,j} / (D sum_f n_f)                                                             (cost)
    R = sum_f || Ehat_f^T Ehat_f - I ||_F^2 / K_f^2,  Ehat_f: columns of length one, K_f = min(D, n_f)         (orth)
    loss = BCE + lambda_o R + lambda_c C                                                                       (loss)
    lambda_c <- max(0, lambda_c + eta (C - C_target)) every T steps; stop at the first C <= C_target           (dual)

Certain: field-level and structural; a pretrained supernet is pruned with a hard 0/1 auxiliary mask, searched by a simple
gradient method directly in the discrete space; orthogonal embedding columns as a regulariser.
Reconstructed: everything else. The mask is a parameter of its own beside the embeddings, so a masked column can come
back. A weights step on a training batch alternates with a mask step on a validation batch, first order, by plain SGD
(Adam would normalise the cost away). R moves weights, not masks, and is read on the batch's distinct rows, over active
columns: updates stay sparse. n_f counts what a slot really costs, its projection included. After the search the kept slots are
trimmed, or the budget refilled, by a. `refill = "per_cost"` starves the fields with most rows where the price did not
reach its target (Frappe at 10%, one seed: validation AUC 0.945, by a alone 0.983).
Reconstructed units: a mask step divides by U, the largest mean |dL/da| so far, and by the number of mask steps;
lambda_c is in units of U over the largest dC/da, and eta is spread over its updates. The settings then mean the same on
data with 50 steps per epoch and on data with 10,000.

`mode = "quantile"` has no cost term: m = 1[a >= tau], tau the lowest threshold whose slots fit the budget, which falls
from everything to the target over the first part of the search (at the start all a are equal). In this mode a is not
clamped and dm/da := 1, since a moving threshold has no fixed window. The masks never exceed the final budget; slots are
lumpy, so what tau leaves unused is refilled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from embtrim.config import Config
from embtrim.errors import EmbtrimError
from embtrim.methods.selection import field_plan, lowest_threshold, rank_slots, slot_costs
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.tables.embedding_tables import RowGate
from embtrim.tasks.sites import gate_sites, num_slots
from embtrim.tasks.task import Task, alignment_of
from embtrim.training.evaluation import check_finite
from embtrim.training.settings import Hooks
from embtrim.training.state import random_states, set_random_states

# A shorter column counts as one of this length, and has no direction.
LEAST_LENGTH = 1e-12


class HardMaskConfig(Config):
    """Settings of HAM; the paper's numbers are not public, so the defaults are ours.

    Attributes:
        mode: How the budget is reached: "penalty" puts a price on slots; "quantile" keeps the best slots within a budget that
            falls to the target.
        start: Model that is searched: "trained" takes a copy of the given, trained model; "initial" takes a fresh one.
        single_level: Read the mask's gradient on training batches instead of validation batches.
        epochs: Passes over the training rows. At 0.4, mask steps included, the search takes less time than one plain epoch.
        min_steps: Least number of mask steps, for data with few batches.
        mask_every: Number of weights steps per mask step.
        mask_lr: How far a slot of average gradient moves over the whole search if its gradient keeps its sign.
        ramp: Part of the search over which the budget falls to the target ("quantile" only).
        eta: Growth of lambda_c over the whole search at C - C_target = 1 ("penalty" only).
        cost_updates: Number of updates of lambda_c in the whole search ("penalty" only).
        orthogonality: Weight of the regulariser, lambda_o.
        orthogonality_every: Number of weights steps per step with the regulariser.
        refill: How slots are trimmed and refilled after the search: by a alone ("plain") or by a per parameter ("per_cost").
        min_dim: Columns that every table keeps.
        align: How narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    mode: Literal["penalty", "quantile"] = "penalty"
    start: Literal["trained", "initial"] = "trained"
    single_level: bool = False
    epochs: float = Field(default=0.4, gt=0)
    min_steps: int = Field(default=10, ge=1)
    mask_every: int = Field(default=1, ge=1)
    mask_lr: float = Field(default=2.0, gt=0)
    ramp: float = Field(default=0.5, ge=0, le=1)
    eta: float = Field(default=2.0, gt=0)
    cost_updates: int = Field(default=20, ge=1)
    orthogonality: float = Field(default=1e-3, ge=0)
    orthogonality_every: int = Field(default=4, ge=1)
    refill: Literal["plain", "per_cost"] = "plain"
    min_dim: int = Field(default=0, ge=0)
    align: Literal["scatter", "project"] = "scatter"


def search_hard_mask(task: Task, config: HardMaskConfig, budget: Budget, seed: int) -> SizePlan:
    """Train a copy of the model under masks, then fill the budget by what the masks learned."""
    full = task.full_plan()
    alignment = alignment_of(task, config.align)
    costs_S = slot_costs(full, alignment)
    limit = full.max_params(budget)
    model = task.copied_model() if config.start == "trained" else task.fresh(seed)
    supernet = MaskedSupernet(task, model, config, costs_S, limit, seed)
    supernet.train()

    margin_S = (supernet.a_S - supernet.threshold).double().cpu().numpy()
    ranking = rank_slots(margin_S, costs_S, supernet.mask_S.cpu().numpy(), config.refill)
    details = {
        "config": config.model_dump(),
        "scores": supernet.a_S.double().tolist(),
        "threshold": supernet.threshold,
        "cost_weight": supernet.cost_weight,
        "cost": supernet.cost,
        "cost_target": limit / int(costs_S.sum()),
        "weight_steps": supernet.weight_steps,
        "mask_steps": supernet.mask_steps,
    }
    return field_plan(full, ranking, limit, alignment, config.min_dim).made_by("hard_mask", budget, seed, details)


class MaskedSupernet:
    """The state of one search: a model under masks, trained in place, the mask parameters a, and their price.

    Attributes:
        a_S: Mask parameters (S,), all sites in order.
        mask_S: Slots in use, bool (S,).
        threshold: Threshold of a: 0, or tau.
        cost: C(a), the part of the parameters in use.
        cost_weight: lambda_c.
        weight_steps: Number of weights steps done.
        mask_steps: Number of mask steps done.
    """

    # The state that steps change and that checkpoints hold.
    CHANGES = (
        "a_S", "mask_S", "threshold", "cost", "cost_weight", "unit", "weight_steps", "mask_steps", "_place", "_order_from"
    )  # fmt: skip

    def __init__(
        self, task: Task, model: nn.Module, config: HardMaskConfig, costs_S: np.ndarray, limit: int, seed: int
    ) -> None:
        self.task, self.model, self.config, self.seed = task, model, config, seed
        self.sites = task.sites(model)
        self.device = next(iter(model.parameters())).device
        self.slots = [num_slots(site) for site in self.sites]
        self.share_S = torch.from_numpy(costs_S / costs_S.sum()).to(self.device)  # float64: C counts exactly
        self.target = limit / int(costs_S.sum())
        self.a_S = torch.full((len(costs_S),), 0.5, device=self.device)
        self.mask_S = torch.ones_like(self.a_S, dtype=torch.bool)
        self.threshold, self.cost, self.cost_weight, self.unit = 0.0, 1.0, 0.0, 0.0
        epoch_steps = task.num_batches("train")
        self.planned = max(config.min_steps, round(config.epochs * epoch_steps / config.mask_every))
        self.epochs = math.ceil(self.planned * config.mask_every / max(1, epoch_steps))
        self.weight_steps = self.mask_steps = 0
        self._gates = ExitStack()
        self._rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.sites]
        self._place, self._order_from = [0, 0], []  # epoch and batches read of the mask's batches; random states
        self._mask_batches = self._endless(0)

    def train(self) -> None:
        """Alternate weights steps and mask steps as often as planned, or until C reaches the target."""
        depends_on = {"search": self.config.model_dump(mode="json"), "cost_target": self.target}
        hooks = Hooks(extra_loss=self._extra_loss, on_step=self._on_step, state=self, settings=depends_on)
        with self._gates:
            self._open_gates()
            self.task.fit(self.model, epochs=self.epochs, seed=self.seed, hooks=hooks)

    def state_dict(self) -> dict[str, Any]:
        """The state of the search, apart from the model."""
        return {name: getattr(self, name) for name in self.CHANGES}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        vars(self).update(state)
        self.a_S, self.mask_S = self.a_S.to(self.device), self.mask_S.to(self.device)
        epoch, num_read = self._place
        if num_read:
            set_random_states(self._order_from, self.device)
            self._mask_batches = self._endless(epoch)
            for _ in range(num_read):
                next(self._mask_batches)
        self._gates.close()
        self._open_gates()

    def _endless(self, first_epoch: int) -> Iterator[Any]:
        split = "train" if self.config.single_level else "valid"
        for epoch in itertools.count(first_epoch):
            self._place, self._order_from = [epoch, 0], random_states(self.device)  # a loader may draw from them
            for batch in self.task.batches(split, self.seed * 100_003 + epoch):
                self._place[1] += 1
                yield batch
            if not self._place[1]:
                raise EmbtrimError(f"there are no {split} batches to learn masks on; give some that can be read again")

    # ---- weights steps ----------------------------------------------------------------------------------------

    def _open_gates(self) -> None:
        """Mask the sites for the next weights step, and record its rows if the regulariser is due."""
        reads = self.config.orthogonality > 0 and self.weight_steps % self.config.orthogonality_every == 0
        rows = [partial(self._read, found) for found in self._rows] if reads else None
        slots = self.mask_S.float().split(self.slots)
        self._gates.enter_context(gate_sites(self.sites, slots, rows))

    @staticmethod
    def _read(found: list[tuple[Tensor, Tensor]], rows_U: Tensor, found_UD: Tensor) -> Tensor:
        found.append((rows_U, found_UD))
        return found_UD

    def _extra_loss(self, _model: nn.Module, _batch: Any) -> Tensor:
        """lambda_o R on the rows that this weights step recorded; zero if there are none."""
        total = torch.zeros((), device=self.device)
        for site, found, mask_s in zip(self.sites, self._rows, self.mask_S.split(self.slots), strict=True):
            if not found:
                continue
            starts = np.cumsum([0, *site.num_rows]).tolist()
            own = []
            for rows, emb in found:
                is_own = self.task.unshared(rows)
                own.append((rows, emb) if bool(is_own.all()) else (rows[is_own], emb[is_own]))
            for number, active_D in enumerate(mask_s.split(site.widths)):
                low, high = starts[number], starts[number + 1]
                # A module that is used several times records the distinct rows of each use.
                parts = [
                    emb[slice(*torch.searchsorted(rows, rows.new_tensor([low, high])).tolist())] for rows, emb in own
                ]
                total = total + column_correlation(torch.cat(parts), active_D, high - low, self.task.summed_parts)
            found.clear()
        return self.config.orthogonality * total

    def _on_step(self, step: int) -> bool:
        """Step the mask after a weights step if it is due; True ends the search."""
        self.weight_steps = step
        self._gates.close()
        done = False
        if step % self.config.mask_every == 0:
            done = self._mask_step() or self.mask_steps == self.planned
        self._open_gates()
        return done

    # ---- mask steps -------------------------------------------------------------------------------------------

    def _mask_step(self) -> bool:
        """One step of SGD on a; True at the first C <= C_target of the penalty mode."""
        config = self.config
        gradient_S = self._mask_gradient(next(self._mask_batches))
        self.unit = max(self.unit, float(gradient_S.abs().mean()))
        size = config.mask_lr / (self.planned * (self.unit or 1.0))
        self.mask_steps += 1
        if config.mode == "quantile":
            self.a_S -= size * gradient_S
            left = max(0.0, 1 - self.mask_steps / max(1.0, config.ramp * self.planned))
            self.threshold = lowest_threshold(self.a_S, self.share_S, self.target + (1 - self.target) * left)
            self.mask_S = self.a_S >= self.threshold
            self.cost = float(self.share_S[self.mask_S].sum())
            return False
        self.a_S -= size * (gradient_S + self.cost_weight * self.share_S.float())  # d(lambda_c C)/da, by (ste)
        self.a_S.clamp_(-1, 1)
        self.mask_S = self.a_S > 0
        self.cost = float(self.share_S[self.mask_S].sum())
        every = max(1, self.planned // config.cost_updates)
        if self.mask_steps % every == 0:
            eta = config.eta * self.unit / float(self.share_S.max()) * every / self.planned
            self.cost_weight = updated_cost_weight(self.cost_weight, eta, self.cost, self.target)
        return self.cost <= self.target

    def _mask_gradient(self, batch: Any) -> Tensor:
        """dBCE/da (S,) on one batch; the weights and their optimiser are not changed.

        With row gates the tables catch up only on the rows of this batch, if the row optimiser owes decay.
        """
        window = 1.0 if self.config.mode == "penalty" else math.inf
        a_S = self.a_S.clone().requires_grad_()
        mask_S = straight_through(a_S, self.mask_S, window)
        detached: RowGate = lambda _, found_UD: found_UD.detach()  # noqa: E731
        rows = [detached if site.shows_rows else None for site in self.sites]
        self.model.eval()
        try:
            with gate_sites(self.sites, mask_S.split(self.slots), rows):
                loss = self.task.loss(self.model, batch)
            gradient_S = torch.autograd.grad(loss, a_S)[0]
        finally:
            self.model.train()
        split, number = "train" if self.config.single_level else "valid", self._place[1] - 1
        check_finite(loss, "loss", split, number)
        check_finite(gradient_S, "gradient by the masks", split, number)
        return self.task.averaged(gradient_S, batch)


def straight_through(a_S: Tensor, mask_S: Tensor, window: float = 1.0) -> Tensor:
    """The 0/1 mask (S,), whose derivative by a is taken as 1[|a| <= window]."""
    return mask_S.to(a_S.dtype) + (a_S.detach().abs() <= window) * (a_S - a_S.detach())


def updated_cost_weight(cost_weight: float, eta: float, cost: float, target: float) -> float:
    """Equation (dual): lambda_c after an update."""
    return max(0.0, cost_weight + eta * (cost - target))


def column_correlation(
    emb_UD: Tensor, active_D: Tensor, num_rows: int, summed: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """Equation (orth) for one table, on some of its rows: how far its active columns are from orthogonal; a scalar.

    Args:
        emb_UD: Embeddings of distinct rows.
        active_D: Columns in use, bool (D,).
        num_rows: Rows of the whole table, n_f.
        summed: Sums products of columns over processes, each of which has other rows.
    """
    columns = emb_UD[:, active_D]
    products = summed(columns.T @ columns)
    lengths = products.diagonal().clamp(min=LEAST_LENGTH**2).sqrt()
    gram = products / (lengths[:, None] * lengths)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (gram - identity).square().sum() / min(emb_UD.shape[1], num_rows) ** 2
