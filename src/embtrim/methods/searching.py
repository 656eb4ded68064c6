"""search: find what to keep of a task's embedding tables within a budget, by any of the methods.

A method searches in fp32, for the tables alone. This module turns a budget for fewer bits, for a target that pads rows,
or for tables and vocabulary together into budgets that a method can search within.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from embtrim.compaction.probing import check_compactable
from embtrim.config import Config
from embtrim.errors import BudgetError, ConfigError, EmbtrimError, ModelError
from embtrim.methods.precision import MIXED_BITS, mixed_bits
from embtrim.methods.registry import Method, method_of
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.budget_limits import (
    ROUNDED,
    amount_of,
    check_budget,
    counts_vocabulary,
    least_amount,
)
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Bits, Target
from embtrim.system.modules import is_finite, left_as_found
from embtrim.system.ranks import refuse_ranks
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.sites import ModuleSite, Site, weights_kept
from embtrim.tasks.survey import Finding
from embtrim.tasks.task import Task

logger = logging.getLogger(__name__)

# A plan gives new ids to the values that it keeps, which may compress less well: bytes of the vocabulary over its bytes
# before. 15 mixed plans of three data sets needed 1.003 at most. A plan in fp32 on flights needed 1.12: a second search.
VOCABULARY_MARGIN = 1.005
# A search is not repeated for less than this part of the budget, nor more often than this.
VOCABULARY_SPARE, MOST_SEARCHES = 0.02, 5
# A plan for less of the bytes of all embeddings is warned of.
LEAST_COVERAGE = 0.8


@dataclass(frozen=True)
class _Request:
    """What `search` was asked for, apart from the budget: the budget of a method differs from the caller's."""

    task: Task
    method: Method
    config: Config
    seed: int
    bits: Bits
    target: Target | None

    def plan_within(self, budget: Budget) -> SizePlan:
        """Run the method once, in fp32."""
        return self.method.search(self.task, self.config, budget, self.seed)


def search(
    task: Task, config: Config, budget: str | Budget, seed: int = 0, bits: Bits = 32, target: Target | None = None
) -> SizePlan:
    """Find what to keep of a task's embedding tables within a budget; the model is not changed.

    Args:
        task: A CTRTask, or a Task around any module.
        config: Settings of the method to use, such as `SSEDSConfig()`.
        budget: Text such as "10%", "200MB" or "1.5M params", or a Budget.
        seed: Seed of everything random in the search. The same seed and the same batches give the same plan; a loader
            that shuffles on its own does not give the same batches.
        bits: Bits per stored value in the compact tables: 32, 16, 8, 4, 3 or 2; or "mixed" for bits of 16 and fewer that
            are chosen for each table, and by `guided` for bands of its rows. Within a percentage or a number of bytes,
            fewer bits leave room for more parameters. `guided` chooses rows, columns and bits together; other methods
            search in fp32, and bits are chosen for what they find.
        target: Where the tables will be served. Sizes are counted as that backend stores them (`SizePlan.num_bytes`), and
            for a task on encoded data a budget in bytes then includes the vocabulary. The vocabulary's size is known only
            once there is a plan, so the search is repeated, at most five times. With None sizes are counted as for
            "torch", without the vocabulary.

    Returns:
        A plan within the budget.

    Raises:
        BudgetError: The budget cannot be parsed, or the method keeps nothing of any table within it.
        ConfigError: `config` belongs to no method, or mixed bits are asked for within a number of parameters.
        PlanError: The target cannot store the tables of the plan.
        ModelError: The model has nothing to shrink, reads an embedding's weight other than through its module, or is a
            foreign module whose tables are not fp32.
    """
    if not isinstance(task, Task):
        raise EmbtrimError(
            f"search takes a Task, given a {type(task).__name__}; wrap a model of your own as Task(model, loss=.., train=.., "
            "valid=..), one of embtrim.models as CTRTask(model, data)"
        )
    if isinstance(task, CTRTask):
        refuse_ranks("search of a model of embtrim.models")
    budget = Budget.parse(budget)
    full = task.full_plan()
    if not full.num_full_params:
        raise ModelError(f"{type(task.model).__name__} has no embedding tables to shrink, only first-order weights")
    request = _Request(task, method_of(config), config, seed, bits, target)
    sites = task.sites(task.model)
    _check_fp32(sites)
    check_weights(task.model)
    check_budget(full, budget, bits, target)
    is_foreign = all(isinstance(site, ModuleSite) for site in sites)
    untouched = left_as_found(task.model) if is_foreign else nullcontext()
    # A caller's torch.no_grad() is meant for the model's own use.
    with untouched, weights_kept(task.model), torch.enable_grad():
        if is_foreign:
            findings = task.survey()
            _log_survey(task, findings)
            check_compactable(task)
        unread = task.unread_tables()
        if unread:
            plan = _search_read_tables(request, budget, full, unread)
        else:
            plan = _search_within(request, budget)
    if plan.keeps_nothing:
        raise _keeps_nothing(request, full, budget)
    if is_foreign:
        left = [finding for finding in findings if not finding.found]
        plan = dataclasses.replace(plan, left_bytes=sum(finding.num_bytes for finding in left))
        _warn_of_coverage(plan, left)
    if emptied := [t.name for t in plan.tables if not t.output_width and t.name not in unread]:
        logger.log(
            logging.WARNING if is_foreign else logging.INFO,
            "the plan takes the last column of %s, which will read as zeros",
            ", ".join(map(repr, emptied)),
        )
    return task.agreed(plan if target is None else dataclasses.replace(plan, target=target))


def _search_within(request: _Request, budget: Budget) -> SizePlan:
    within = _search_with_vocabulary if counts_vocabulary(budget, request.target) else _search_tables
    return within(request, budget)


@torch.no_grad()
def check_weights(model: nn.Module) -> None:
    """Raise ModelError for a parameter that holds NaN or infinity; the message names it."""
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            rows = "" if weight.ndim < 2 else f", first in row {int((~weight.isfinite().all(1)).nonzero()[0]):,}"
            raise ModelError(
                f"weight {name!r} of this {type(model).__name__} holds nan or infinity{rows}; train it again with a lower "
                "learning rate, or take an earlier checkpoint"
            )


def _warn_of_coverage(plan: SizePlan, left: Sequence[Finding]) -> None:
    """Warn of a plan that covers little of a foreign model's embeddings, whose budget says little then."""
    if plan.coverage >= LEAST_COVERAGE:
        return
    largest = sorted(left, key=lambda finding: -finding.num_bytes)[:3]
    logger.warning(
        "the plan covers %.1f%% of all embedding bytes of the model, and so does its budget; %s bytes are left alone: %s",
        100 * plan.coverage,
        f"{plan.left_bytes:,}",
        "; ".join(map(str, largest)),
    )


def _log_survey(task: Task, findings: Sequence[Finding]) -> None:
    """Log which embeddings of a foreign model a search sees, and which it leaves alone."""
    left = sum(finding.num_bytes for finding in findings if not finding.found)
    lines = [*map(str, findings), f"left alone, beside what plans count: {left:,} bytes"]
    logger.info("embeddings of %s:\n  %s", type(task.model).__name__, "\n  ".join(lines))


def _check_fp32(sites: Sequence[Site]) -> None:
    """Raise ModelError for a table of a foreign model that is not fp32."""
    for site in sites:
        if isinstance(site, ModuleSite) and site.module.weight.dtype != torch.float32:
            kind = str(site.module.weight.dtype).removeprefix("torch.")
            raise ModelError(
                f"the table of {site.path!r} is {kind}, but plans count {BYTES_PER_PARAM} bytes a value; search in "
                "model.float(), or leave it alone with the Task's exclude="
            )


def _keeps_nothing(request: _Request, full: SizePlan, budget: Budget) -> BudgetError:
    """The error for a budget in which the method keeps nothing; it names a budget that is enough, if one is known."""
    method, bits, target = request.method, request.bits, request.target
    # A method that adds sizes looks at the best sizes only. Fewer bits and padding are searched in fp32. Both may need more
    # than the least plan.
    enough = max((least_amount(full, budget, bits, target, u) for u in method.adds if u != "sizes"), default=0.0)
    is_exact = bits == 32 and target != "fbgemm" and enough > budget.amount
    advice = f"{budget.words_for(enough)} is enough" if is_exact else "give more"
    if method.plans_bits:
        advice += "; or the model scores no worse on validation data without its tables, as one does that was trained too long"
    return BudgetError(f"method {method.name!r} keeps no row of any table within a budget of {budget}; {advice}")


# ---- tables that nothing reads ---------------------------------------------------------------------------------------


def _search_read_tables(request: _Request, budget: Budget, full: SizePlan, unread: Sequence[str]) -> SizePlan:
    """Search for a plan in which tables that no training batch reads get nothing of the budget.

    An embedding of which nothing is read is left out of the search. A field whose flat table is read otherwise, or whose
    zoo model has one site for all fields, stays in the search and keeps nothing afterwards.
    """
    sizes = {table.name: table.num_rows * table.width for table in full.tables}
    listed = ", ".join(f"{name!r} ({sizes[name]:,} parameters)" for name in unread)
    logger.warning("no training batch reads these tables, which therefore get nothing of the budget: %s", listed)
    if len(unread) == len(full.tables):
        raise ModelError(f"no training batch reads a table of this {type(request.task.model).__name__}: {listed}")
    task, within = request.task.without_tables(unread), budget
    searched = task.full_plan()
    if budget.kind == "percent":
        within = Budget(
            "percent", min(1.0, budget.amount * full.num_full_params / searched.num_full_params), budget.text
        )
    try:
        plan = _search_within(dataclasses.replace(request, task=task), within)
    except BudgetError as error:
        raise BudgetError(f"budget of {budget}, which is {within} of the tables that training reads: {error}") from None
    kept = {table.name: table for table in plan.tables if table.name not in unread}
    tables = tuple(kept.get(table.name, dataclasses.replace(table, blocks=())) for table in full.tables)
    details = {**plan.details, "unread_tables": list(unread)}
    return dataclasses.replace(plan, fingerprint=full.fingerprint, tables=tables, budget=budget, details=details)


# ---- tables and vocabulary ---------------------------------------------------------------------------------------------


def _search_with_vocabulary(request: _Request, budget: Budget) -> SizePlan:
    """Search within the bytes that the vocabulary leaves of a budget for both.

    The vocabulary's size is known only once there is a plan: values that are dropped with OOV leave it, and a hashed table
    that loses rows needs an id map. The search is repeated if the first guess left the tables too much, or far too little.
    """
    task, target, allowed = request.task, request.target, math.floor(budget.amount)
    of_full = VOCABULARY_MARGIN * task.vocabulary_bytes()
    for_tables = allowed - of_full if of_full <= 0.75 * allowed else allowed / 2
    best: SizePlan | None = None
    too_much: float | None = None
    tried: list[str] = []
    for _ in range(MOST_SEARCHES):
        within = Budget("bytes", for_tables)
        try:
            plan = _search_tables(request, within)
        except BudgetError as error:
            if not tried:
                raise BudgetError(
                    f"budget of {budget} for tables and vocabulary, searched within {within} for the tables: {error}"
                ) from None
            plan = None
        if plan is None or plan.keeps_nothing:
            if best is not None or too_much is None:
                break
            for_tables = (for_tables + too_much) / 2  # too little for a plan, and a plan of too_much is too large
            continue
        vocabulary = task.vocabulary_bytes(plan)
        plan = dataclasses.replace(plan, budget=budget, vocabulary_bytes=vocabulary)
        tried.append(f"{plan.num_bytes(target):,} + {vocabulary:,}")
        if plan.num_bytes(target) + vocabulary > allowed:
            too_much = for_tables
            left = allowed - VOCABULARY_MARGIN * vocabulary
            for_tables = left if left > 0 else for_tables / 2
            continue
        if best is None or plan.num_params > best.num_params:
            best = plan
        if for_tables + vocabulary >= (1 - VOCABULARY_SPARE) * allowed:
            break
        for_tables *= allowed / (for_tables + vocabulary)  # both grow with the rows
    if best is None:
        found = f"bytes of tables + vocabulary were {', '.join(tried)}" if tried else "no row of any table was kept"
        raise BudgetError(
            f"method {request.method.name!r} found no plan that is within a budget of {budget} together with its vocabulary: "
            f"{found}; give more, or leave out the target, which counts the vocabulary"
        )
    return best


# ---- tables as they are stored -----------------------------------------------------------------------------------------


def _search_tables(request: _Request, budget: Budget) -> SizePlan:
    """Search within a budget for the tables alone, as they will be stored."""
    method, bits, target = request.method, request.bits, request.target
    if method.plans_bits:
        return _search_bits(request, budget)
    if bits == 32 and target != "fbgemm":
        plan = request.plan_within(budget)
        assert plan.num_params <= plan.max_params(budget), "a search exceeded its budget"
        return plan
    if budget.kind == "params":
        if bits == "mixed":
            raise ConfigError(f"mixed bits need a budget in percent or bytes, given {budget}")
        plan = request.plan_within(budget).with_bits(bits)
        plan.num_bytes(target)  # raises where the target cannot store the tables
        return plan
    return _search_stored(request, budget)


def _search_bits(request: _Request, budget: Budget) -> SizePlan:
    """Search with a method that plans for tables as they will be stored."""
    method, bits, target = request.method, request.bits, request.target
    if budget.kind == "params" and bits == "mixed":
        raise ConfigError(f"mixed bits need a budget in percent or bytes, given {budget}")
    plan = method.search(request.task, request.config, budget, request.seed, bits, target)
    plan.num_bytes(target)  # raises where the target cannot store the tables
    if (least := amount_of(plan, budget, target)) > budget.amount * ROUNDED:
        raise BudgetError(
            f"budget of {budget} is below the smallest plan of method {method.name!r} with {bits} bits, "
            f"{budget.words_for(least)}; give {'more than' if plan.keeps_nothing else 'at least'} that"
        )
    return plan


def _search_stored(request: _Request, budget: Budget) -> SizePlan:
    """Search in fp32 within a larger budget, such that the plan as it will be stored is within the given one.

    The bytes beside the values, such as scales and padding, are known only once there is a plan. The first plan exceeds
    the budget by them, and the next one fits unless its padding grew.
    """
    task, bits, target, full = request.task, request.bits, request.target, request.task.full_plan()
    ratio = 32 / (MIXED_BITS if bits == "mixed" else bits)
    unit = 1 if budget.kind == "bytes" else BYTES_PER_PARAM * full.num_full_params
    amount = budget.amount * ratio
    plan, wanted = full, None
    while plan.num_params:
        amount = amount if budget.kind == "bytes" else min(amount, 1.0)
        within = Budget(budget.kind, amount)
        try:
            plan = request.plan_within(within)
        except BudgetError as error:
            raise BudgetError(
                f"budget of {budget} for tables of {bits} bits for {target or 'torch'}, searched in fp32 within {within}: {error}"
            ) from None
        plan = mixed_bits(task, plan, budget) if bits == "mixed" else plan.with_bits(bits)
        if target == "fbgemm":
            wanted = wanted or {t.name: t.output_width for t in plan.tables}
            plan = plan.with_free_columns()
        excess = plan.num_bytes(target) - plan.max_bytes(budget, target)
        if excess <= 1e-6:  # of a byte: the percentage was rounded
            if wanted and "columns" in request.method.adds:
                plan = plan.with_padded_columns(budget, wanted)
            return dataclasses.replace(plan, budget=budget)
        amount = max(amount - excess * ratio / unit, amount / 2)
    return plan
