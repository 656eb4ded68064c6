"""SSEDS: single-shot embedding dimension search (Qu et al., SIGIR 2022, arXiv 2204.03281).

    e~_{b,f} = alpha_f * e_{b,f},  alpha = 1 (F x D), never trained                                   (gate)
    g_{f,j} = dL / dalpha_{f,j} at alpha = 1                                                           (one backward)
    s_{f,j} = |g_{f,j}| / sum |g|; keep the best slots until the budget is used                        (score)

Certain: field-level and model-agnostic; pretrain at uniform width, one scoring pass over (field, column) slots, prune
by importance to a parameter budget, align the widths and retrain.
Reconstructed: how many batches are scored, and that a slot that does not fit is skipped rather than ending the fill.

Departures: at a training optimum the gradient vanishes in expectation and its absolute value cannot tell a useful slot
from a harmful one. `score = "signed"` ranks by -g, the first-order rise of the loss if the slot went away; `data =
"valid"` reads it where the weights were not fitted. Both are our defaults, as the evidence has it (benchmarks/results/methods.md);
`preset = "faithful"` is the paper's. Further options: `pretrain = "epochs:1"` reads the score before the model overfits,
`cost_aware` ranks by importance per parameter.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from embtrim.config import Config
from embtrim.errors import EmbtrimError, ModelError
from embtrim.methods.selection import columns_cost, field_plan, slot_costs
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.system.modules import evaluating
from embtrim.tasks.sites import gate_sites, num_slots
from embtrim.tasks.task import Task, alignment_of
from embtrim.training.evaluation import check_finite


class SSEDSConfig(Config):
    """Settings of SSEDS; the preset "faithful" has the paper's values.

    Attributes:
        score: How slots are ranked: "abs" by |g|; "signed" by -g, which is large if removing the slot would raise the loss.
        data: Split whose batches the gradient is read on: "train" or "valid".
        batches: Number of batches that the gradient is read on; 0 takes the whole split.
        average: What is added up over batches: "sum" adds signed gradients; "abs" adds absolute values and needs
            score = "abs".
        cost_aware: Rank by score per parameter.
        pretrain: Model that is scored: "early_stop" takes the given, trained model; "epochs:k" trains a fresh model for k
            epochs.
        min_dim: Columns that every table keeps. None keeps one column if the budget has room for it; 0 lets useless tables
            go. By signs alone, scores may take the last column of an id that matters (MovieLens, benchmarks/results/methods.md).
        align: How narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    faithful: ClassVar[dict[str, Any]] = {"score": "abs", "data": "train", "batches": 1, "min_dim": 0}

    score: Literal["abs", "signed"] = "signed"
    data: Literal["train", "valid"] = "valid"
    batches: int = Field(default=0, ge=0)
    average: Literal["sum", "abs"] = "sum"
    cost_aware: bool = False
    pretrain: str = Field(default="early_stop", pattern=r"^(early_stop|epochs:[1-9][0-9]*)$")
    min_dim: int | None = Field(default=None, ge=0)
    align: Literal["scatter", "project"] = "scatter"

    @model_validator(mode="after")
    def _check(self) -> SSEDSConfig:
        if self.average == "abs" and self.score != "abs":
            raise ValueError(
                "average = 'abs' leaves no signs to rank by; give score = 'abs' with it, or average = 'sum'"
            )
        return self


def search_sseds(task: Task, config: SSEDSConfig, budget: Budget, seed: int) -> SizePlan:
    """Score all slots in one pass and fill the budget with the best."""
    model = task.model
    if config.pretrain != "early_stop":
        model = task.fresh(seed)
        task.fit(model, epochs=int(config.pretrain.removeprefix("epochs:")), seed=seed)
    gradient_S = slot_gradients(task, model, config, seed)
    score_S = np.abs(gradient_S) if config.score == "abs" else -gradient_S
    score_S = score_S / max(np.abs(gradient_S).sum(), np.finfo(float).tiny)  # (score)

    full = task.full_plan()
    alignment = alignment_of(task, config.align)
    key_S = score_S / slot_costs(full, alignment) if config.cost_aware else score_S
    ranking = np.argsort(-key_S, kind="stable")
    details = {"config": config.model_dump(), "scores": score_S.tolist()}
    limit, min_dim = full.max_params(budget), config.min_dim
    if min_dim is None:
        min_dim = int(sum(columns_cost(full, table, 1, alignment) for table in full.tables) <= limit)
    return field_plan(full, ranking, limit, alignment, min_dim).made_by("sseds", budget, seed, details)


def slot_gradients(task: Task, model: torch.nn.Module, config: SSEDSConfig, seed: int) -> np.ndarray:
    """Gradient of the mean loss by the gate of each slot, float64 (S,), all sites in order; the model is not changed.

    A batch counts by its rows, so that a small last batch of a split does not count too much.
    """
    sites = task.sites(model)
    total_S = np.zeros(sum(num_slots(site) for site in sites))
    scored = 0.0
    with evaluating(model):  # running statistics and dropout as at inference: scoring must not change the model
        for number, batch in enumerate(task.tracked_batches(config.data, "scoring slots", seed)):
            if config.batches and number == config.batches:
                break
            device = next(iter(model.parameters())).device
            gates = [torch.ones(num_slots(site), device=device, requires_grad=True) for site in sites]  # (gate): alpha
            with gate_sites(sites, gates):
                loss = task.loss(model, batch)
            if not loss.requires_grad:
                raise ModelError(
                    "the Task's loss has no gradient by the embeddings: it detaches them, or this runs in torch.inference_mode()"
                )
            weight = task.weight_of(batch)
            if weight:
                check_finite(loss, "loss", config.data, number)
            # (one backward); a table that the batch does not use has gradient 0, which some releases of torch attach to a graph
            gradients = torch.autograd.grad(loss, gates, allow_unused=True, materialize_grads=True)
            gradient = torch.cat([g.detach().flatten() for g in gradients]).double().cpu().numpy()
            if weight:
                check_finite(gradient, "gradient by the slots", config.data, number)
                total_S += weight * (gradient if config.average == "sum" else np.abs(gradient))
                scored += weight
    *total, scored = task.summed(torch.tensor([*total_S.tolist(), scored], dtype=torch.float64)).tolist()
    if not scored:
        raise EmbtrimError(f"there are no {config.data} batches to score slots on; give some that can be read again")
    return np.array(total) / scored
