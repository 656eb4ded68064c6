"""OptEmbed: rows by learned thresholds, widths by evolution (Lyu et al., CIKM 2022, arXiv 2208.04482).

    r_v = 1[ ||E_v||_1 - t_f > 0 ],  t_f learned, one per table, from 0                                  (row mask)
    dr/dx := 2 - 4|x| for |x| <= 0.4;  0.4 for 0.4 < |x| <= 1;  else 0                                 (surrogate)
    e~_v = r_v * (first d_f coordinates of E_v),  d_f ~ Uniform{1..D} per sample and field             (supernet)
    loss = BCE + lambda * sum_f exp(-t_f);  t by plain SGD                                             (loss)
    fitness(d) = validation AUC of the supernet with masked rows and widths d                          (evolution)

Certain, from the authors' public code: all of the above; dense Adam with L2 inside the gradient for everything but t;
population 20, 30 generations of 10 mutations (p = 0.1 a field) and 10 crossovers; the plan is retrained from the
supernet's initial weights, `compact(init="initial")`. Adam with L2 is what prunes rows: it drives rarely seen rows to
norm ~0, below a slightly positive threshold. Lazy rows with replayed decay are an option.
Faults of the public code, put right here: parents are cloned, scores stay with their candidates, the crossover point ranges over fields, widths are
drawn from 1..D and counted as drawn, no candidate is scored twice, the best 15 live on.

Departures:
- L2 applies to the embeddings, by the task's settings; in the paper it applies to all parameters.
- A table's reserved row (OOV, or a padding row) passes the row gate and stays as long as any other row stays. It is zero
  at the start, so that a mask based on norms could never bring it back. Rows also stay where their table is no smaller without them, because
  of the shared DROPPED row or a foreign model's row map.
- Budget (the paper has none; `natural` keeps its behaviour): widths of candidates over the budget are lowered. If
  width 1 everywhere does not fit, all thresholds are raised by one amount until it does. In the end the rest of the
  budget widens tables, first the ones that gain most; of more than 100 tables, the 100 that would take most parameters
  are compared.
  Fewer rows of larger widths - all thresholds raised further - gain nothing: the supernet's fitness hardly ever prefers
  them, because a table of small norms then loses all its rows at once.
- A dropped row's first-order weight goes with it in the fitness too, as it does in the compact model.
- Fitness is read on a sample of the validation rows and the finalists are scored on all.

Axes: B batch, F fields or 1, D width, U distinct rows, V rows of a table, T tables.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from embtrim.config import Config
from embtrim.errors import BudgetError
from embtrim.methods.evolution import Space, Widths, evolve, fill, fits, kept_rows, raise_thresholds
from embtrim.plan.budget import Budget
from embtrim.plan.plan import SizePlan
from embtrim.system.progress import tracked
from embtrim.tables.embedding_tables import RowGate
from embtrim.tasks.sites import Site, SlotGate, gate_sites
from embtrim.tasks.task import Task, alignment_of
from embtrim.training.checkpoint import Checkpoint
from embtrim.training.settings import Hooks


class OptEmbedConfig(Config):
    """Settings of OptEmbed; population, generations and rates are the paper's, like all values of the preset "faithful".

    Attributes:
        epochs: Epochs of training the supernet.
        optimizer: Optimiser of the tables: "dense" moves all rows; "lazy" moves only the rows of the batch and replays their
            decay (approximate).
        l2: L2 of the embeddings; None takes the task's.
        threshold_lr: Learning rate of the thresholds, lr_t. A step moves them by about lr_t * lambda: on small data, with
            few steps per epoch, the paper's values leave the thresholds at zero, and all rows stay.
        threshold_weight: Weight of exp(-t) in the loss, lambda.
        population: Number of candidates in the first generation.
        generations: Number of generations after the first.
        mutations: Number of mutations per generation.
        mutation_rate: Chance of each field to draw its width again.
        crossovers: Number of crossovers per generation.
        num_elite: Number of candidates that survive a generation and are parents of the next.
        fitness_rows: Validation rows that fitness is read on; 0 takes all.
        finalists: Number of best candidates that are scored on all validation rows.
        natural: Take the best candidate as it is, without repair and filling; a budget that it exceeds is an error.
        align: How narrow fields reach the full width in models that need it: "scatter" or "project".
    """

    faithful: ClassVar[dict[str, Any]] = {"threshold_lr": 1e-4, "threshold_weight": 1e-4, "fitness_rows": 0}

    epochs: int = Field(default=10, ge=1)
    optimizer: Literal["dense", "lazy"] = "dense"
    l2: float | None = Field(default=None, ge=0)
    threshold_lr: float = Field(default=0.1, gt=0)
    threshold_weight: float = Field(default=1e-3, ge=0)
    population: int = Field(default=20, ge=1)
    generations: int = Field(default=30, ge=0)
    mutations: int = Field(default=10, ge=0)
    mutation_rate: float = Field(default=0.1, gt=0, le=1)
    crossovers: int = Field(default=10, ge=0)
    num_elite: int = Field(default=15, ge=1)
    fitness_rows: int = Field(default=8192, ge=0)
    finalists: int = Field(default=5, ge=1)
    natural: bool = False
    align: Literal["scatter", "project"] = "scatter"


def search_optembed(task: Task, config: OptEmbedConfig, budget: Budget, seed: int) -> SizePlan:
    """Train a supernet that drops rows, then evolve the widths of what it kept.

    Details of the plan: "thresholds" by table and the amount "raised"; "full_width_params", the size of the kept rows at
    full width; "num_evaluated" candidates; "fitness" on all validation rows; "natural_params" if natural.
    """
    model, thresholds = train_supernet(task, config, seed)
    sites = task.sites(model)
    full, alignment = task.full_plan(), alignment_of(task, config.align)
    margins = row_margins(task, model, sites, thresholds)
    reserved = [row for site in sites for row in site.reserved_rows]
    widest = [t.width for t in full.tables]
    kept = kept_rows(full, alignment, margins, reserved, widest)
    raised = 0.0
    if not config.natural and not fits(full, alignment, kept, budget):
        kept, raised = raise_thresholds(full, alignment, margins, reserved, budget)
    space = Space(full, alignment, kept, None if config.natural else budget)

    parts = iter(torch.from_numpy(rows) for rows in kept)
    for site in sites:
        site.drop_rows([next(parts) for _ in site.names])
    searched = {"search": config.model_dump(mode="json"), "budget": str(budget), "seed": seed}
    sampled = Fitness(task, model, config.fitness_rows, task.next_checkpoint(searched, model))
    exact = Fitness(task, model, 0, task.next_checkpoint(searched, model)) if config.fitness_rows else sampled
    rng = np.random.default_rng(seed)
    generations = tracked(
        range(config.generations), "evolution", config.generations, task.progress, "generations", each=True
    )
    finalists = evolve(space, sampled, config, rng, generations)[: config.finalists]  # (evolution)
    widths = finalists[int(np.argmax(exact(finalists)))]
    if not config.natural:
        widths = fill(space, widths, sampled)
    details: dict[str, Any] = {
        "config": config.model_dump(),
        "thresholds": [float(t) for site_t in thresholds for t in site_t],
        "raised": raised,
        "full_width_params": space.plan(tuple(space.most_T)).num_params,
        "num_evaluated": len(sampled.scores),
        "fitness": exact([widths])[0],
    }
    if config.natural:
        details["natural_params"] = space.cost(widths)
    plan = space.plan(widths).made_by("optembed", budget, seed, details)
    assert plan.num_params == space.cost(widths), "a candidate's cost is not its plan's"
    if plan.num_params > plan.max_params(budget):
        raise BudgetError(
            f"budget of {budget} allows {plan.max_params(budget):,} embedding parameters, the natural size of this plan "
            f"is {plan.num_params:,}; give at least that, or natural = false"
        )
    return plan


# ---- supernet -----------------------------------------------------------------------------------------------------


class HardStep(torch.autograd.Function):
    """1[x > 0], with the surrogate gradient of the module docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)  # (row mask)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """See the class."""
        (size,) = (x.abs() for x in ctx.saved_tensors)
        outside = torch.where(size <= 1, 0.4, 0.0)  # (surrogate)
        return grad_outputs[0] * torch.where(size <= 0.4, 2 - 4 * size, outside)


def train_supernet(task: Task, config: OptEmbedConfig, seed: int) -> tuple[nn.Module, list[np.ndarray]]:
    """A trained supernet and its thresholds: for each site, one a table."""
    model = task.fresh(seed)
    sites = task.sites(model)
    device = next(model.parameters()).device
    thresholds = [nn.Parameter(torch.zeros(len(site.names), device=device)) for site in sites]
    generator = torch.Generator().manual_seed(seed)
    hooks = Hooks(
        param_groups=lambda _: [torch.optim.SGD(thresholds, lr=config.threshold_lr)],
        # (loss), its second term
        extra_loss=lambda _model, _batch: config.threshold_weight * torch.exp(-torch.cat(list(thresholds))).sum(),
        generators=(generator,),
        settings={"threshold_lr": config.threshold_lr, "threshold_weight": config.threshold_weight},
    )
    rows = [row_gate(site, t) for site, t in zip(sites, thresholds, strict=True)]
    slots = [width_gate(site, model, generator, task.place_of) for site in sites]
    settings: dict[str, Any] = {} if config.l2 is None else {"embedding_l2": config.l2}
    with gate_sites(sites, slots, rows):
        task.fit(
            model, config.epochs, seed, hooks,
            tables=config.optimizer, optimizer="adam", l2_form="coupled", l2_scope="table", **settings,
        )  # fmt: skip
    return model, [t.detach().cpu().numpy() for t in thresholds]


def row_gate(site: Site, threshold_T: Tensor) -> RowGate:
    """Multiply rows by r_v; the reserved rows of the site pass unchanged."""
    ends_T = np.cumsum(site.num_rows)
    first_T = ends_T - site.num_rows
    open_rows = [int(f) + r for f, r in zip(first_T, site.reserved_rows, strict=True) if r is not None]
    ends = torch.tensor(ends_T, device=threshold_T.device)
    reserved = torch.tensor(open_rows, dtype=torch.int64, device=threshold_T.device)

    def gate(rows_U: Tensor, found_UD: Tensor) -> Tensor:
        table_U = torch.searchsorted(ends, rows_U.to(torch.int64), right=True)
        mask_U = HardStep.apply(found_UD.abs().sum(1) - threshold_T[table_U])
        return found_UD * torch.where(torch.isin(rows_U, reserved), 1.0, mask_U)[:, None]  # type: ignore[arg-type]

    return gate


def width_gate(
    site: Site,
    model: nn.Module,
    generator: torch.Generator,
    place_of: Callable[[int], tuple[int, int]] = lambda num_samples: (0, num_samples),
) -> SlotGate:
    """Keep the first d coordinates while the model trains; d is drawn for each sample and field.

    Processes that share a step draw for all its samples, and each takes its own: see `Task.place_of`.
    """
    width = site.widths[0]
    prefixes_DD = torch.ones(width, width).tril()  # row d - 1 keeps the first d

    def gate(output: Tensor) -> Tensor:
        if not model.training:
            return output
        fields = output.shape[-1] // width  # all tables of a site have one width
        lead = (len(output), *[1] * (output.ndim - 2)) if output.ndim > 1 else ()  # a scalar id is one sample
        samples = math.prod(lead)
        before, total = place_of(samples)
        drawn = torch.randint(width, (total * fields,), generator=generator)  # (supernet): d - 1
        if total != samples:
            drawn = drawn[torch.arange(before * fields, (before + samples) * fields) % len(drawn)]
        mask = prefixes_DD[drawn].view(*lead, -1)
        return output * mask.to(output)

    return gate


class Fitness:
    """Validation scores of a supernet under candidate widths, each computed once.

    Only scoring takes long in an evolution, and everything else follows from the scores and the seed: an evolution that
    starts again with the scores of its last checkpoint is quickly back where it was interrupted.

    Args:
        task: Task of the supernet.
        model: The supernet, its dropped rows zero.
        max_rows: Validation rows to score on; see Task.gated_scores.
        checkpoint: Checkpoint that keeps the scores; None keeps none.

    Attributes:
        scores: Score of each candidate.
        seconds: Time spent on scoring.
    """

    def __init__(self, task: Task, model: nn.Module, max_rows: int, checkpoint: Checkpoint | None = None) -> None:
        self.task, self.model, self.max_rows, self.checkpoint = task, model, max_rows, checkpoint
        saved = None if checkpoint is None else checkpoint.load()
        self.scores: dict[Widths, float] = {tuple(c): score for c, score in saved["scores"]} if saved else {}
        self.seconds: float = saved["seconds"] if saved else 0.0
        if task.checkpoints is not None:
            task.checkpoints.spent_seconds += self.seconds

    def __call__(self, candidates: Sequence[Widths]) -> list[float]:
        """Scores of candidates; candidates without a score are scored together."""
        new = [c for c in dict.fromkeys(candidates) if c not in self.scores]
        if new:
            started = time.perf_counter()
            device = next(iter(self.model.parameters())).device
            gates = [[gate.to(device) for gate in width_masks(self.task.sites(self.model), c)] for c in new]
            try:
                self.scores.update(zip(new, self.task.gated_scores(self.model, gates, self.max_rows), strict=True))
            except KeyboardInterrupt:
                self._save()
                raise
            self.seconds += time.perf_counter() - started
            if self.checkpoint is not None and self.checkpoint.is_due:
                self._save()
        return [self.scores[c] for c in candidates]

    def _save(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.save({"scores": list(self.scores.items()), "seconds": self.seconds})


def width_masks(sites: Sequence[Site], widths: Widths) -> list[Tensor]:
    """The slot gate (S,) of each site: ones for the first columns of each table."""
    width_of_table = iter(widths)
    return [
        torch.cat([(torch.arange(width) < next(width_of_table)).float() for width in site.widths]) for site in sites
    ]


# ---- rows ---------------------------------------------------------------------------------------------------------


def row_margins(
    task: Task, model: nn.Module, sites: Sequence[Site], thresholds: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """||E_v||_1 - t_f of the rows of each table (V,); rows above zero are kept."""
    sizes = task.row_sizes(model)
    return [
        np.subtract(sizes[name], threshold, out=sizes[name])
        for site, threshold_T in zip(sites, thresholds, strict=True)
        for name, threshold in zip(site.names, threshold_T, strict=True)
    ]
