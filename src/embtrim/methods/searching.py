"""search: find what to keep of a task's embedding tables within a budget, by any of the methods."""

from __future__ import annotations

import dataclasses
import logging
import math

import torch

from embtrim.compaction.foreign import check_compactable
from embtrim.config import Config
from embtrim.errors import BudgetError, ConfigError, EmbtrimError
from embtrim.methods.precision import MIXED_BITS, mixed_bits
from embtrim.methods.registry import method_of
from embtrim.plan.budget import BYTES_PER_PARAM, Budget
from embtrim.plan.limits import (
    ROUNDED,
    amount_of,
    check_budget,
    counts_vocabulary,
    least_amount,
)
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Bits, Target
from embtrim.tasks.sites import ModuleSite
from embtrim.tasks.task import Task, weights_kept

log = logging.getLogger(__name__)


# Bytes of a vocabulary whose ids a plan gives out anew over those before: 1.003 at most for 15 mixed plans of three data sets,
# 1.12 for one in fp32 on flights, for which a second search would be made.
VOCABULARY_MARGIN = 1.005


# Part of a budget that is not worth another search, and the number of searches.
VOCABULARY_SPARE, MOST_SEARCHES = 0.02, 5


def search(
    task: Task, config: Config, budget: str | Budget, seed: int = 0, bits: Bits = 32, target: Target | None = None
) -> SizePlan:
    """Find what to keep of a task's embedding tables within a budget; the model is not changed.

    Args:
        task: a CTRTask, or a Task around any module.
        config: settings of the method to use, such as `SSEDSConfig()`.
        budget: such as "10%", "200MB" or "1.5M params".
        seed: of everything random in the search; the same seed and the same batches give the same plan (a loader that
            shuffles on its own does not give the same batches).
        bits: precision that the tables are to be stored in: 32, 16, 8 or 4, see plan.py, or "mixed" for 16, 8 or 4
            by table, see precision.py. The search itself works in fp32; within a percentage or a number of bytes fewer bits
            leave room for more parameters. With "mixed" a method that can, such as `guided`, which then has no race, chooses rows,
            columns and bits together; for the other methods bits are chosen for the rows and columns that they find.
        target: what will store the tables, and how many bytes it takes for them; see SizePlan.num_bytes. Where one is named,
            a budget in bytes has to hold the vocabulary too, if the task is of encoded data (see SizePlan.vocabulary_bytes): the
            search is then made up to five times, where the rows that it drops change what the vocabulary takes. None counts the bytes of "torch", without it.

    Raises:
        BudgetError: the budget cannot be parsed, or is so small that the method keeps nothing of any table.
        ConfigError: `config` belongs to no method; or mixed bits for a number of parameters.
        PlanError: the target cannot store what the method found.
        EmbtrimError: the model has nothing to shrink, reads an embedding's weight otherwise than through its module, or is
            a module of one's own whose tables are not fp32.
    """
    if not isinstance(task, Task):
        raise EmbtrimError(
            f"search takes a Task, given a {type(task).__name__}; wrap a model of your own as Task(model, loss=.., train=.., "
            "valid=..), one of embtrim.models as CTRTask(model, data)"
        )
    budget = Budget.parse(budget)
    full = task.full_plan()
    if full.standalone:
        findings = task.survey()
        left = sum(finding.num_bytes for finding in findings if not finding.found)
        lines = [*map(str, findings), f"left alone, beside what plans count: {left:,} bytes"]
        log.info("embeddings of %s:\n  %s", type(task.model).__name__, "\n  ".join(lines))
    if not full.num_full_params:
        raise EmbtrimError(f"{type(task.model).__name__} has no embedding tables to shrink, only first-order weights")
    method = method_of(config)
    sites = task.sites(task.model)
    for site in sites:
        if isinstance(site, ModuleSite) and site.module.weight.dtype != torch.float32:
            kind = str(site.module.weight.dtype).removeprefix("torch.")
            raise EmbtrimError(
                f"the table of {site.path!r} is {kind}, but plans count {BYTES_PER_PARAM} bytes a value; search in "
                "model.float(), or leave it alone with the Task's keep="
            )
    check_budget(full, budget, bits, target)
    with weights_kept(task.model), torch.enable_grad():  # whoever calls from torch.no_grad() means the model's own use
        if all(isinstance(site, ModuleSite) for site in sites):
            check_compactable(task)
        within = _search_with_vocabulary if counts_vocabulary(budget, target) else _search_within
        plan = within(task, config, budget, seed, bits, target)
    if plan.keeps_nothing:
        # What takes sizes looks at the best ones only; fewer bits, and padding, are searched in fp32: these may ask for more.
        enough = max((least_amount(full, budget, bits, target, u) for u in method.adds if u != "sizes"), default=0.0)
        is_exact = bits == 32 and target != "fbgemm" and enough > budget.amount
        advice = f"{budget.words_for(enough)} is enough" if is_exact else "give more"
        raise BudgetError(f"method {method.name!r} keeps no row of any table within a budget of {budget}; {advice}")
    return plan if target is None else dataclasses.replace(plan, target=target)


def _search_within(
    task: Task, config: Config, budget: Budget, seed: int, bits: Bits, target: Target | None
) -> SizePlan:
    """Search once, within a budget for the tables alone."""
    if bits != 32 or target == "fbgemm":
        return _search_stored(task, config, budget, seed, bits, target)
    plan = method_of(config).search(task, config, budget, seed)
    assert plan.num_params <= plan.max_params(budget), "a search exceeded its budget"
    return plan


def _search_with_vocabulary(
    task: Task, config: Config, budget: Budget, seed: int, bits: Bits, target: Target | None
) -> SizePlan:
    """Search within what the vocabulary leaves of a budget in bytes for both.

    How much it takes shows in a plan only: values that are dropped with OOV leave it, and a hashed table that loses rows
    needs a map. So the search is made again where the first guess was too little, or set much more aside than was needed.
    """
    allowed, of_full = math.floor(budget.amount), VOCABULARY_MARGIN * task.vocabulary_bytes()
    for_tables = allowed - of_full if of_full <= 0.75 * allowed else allowed / 2
    best, found = None, []
    for _ in range(MOST_SEARCHES):
        within = Budget("bytes", for_tables)
        try:
            plan = _search_within(task, config, within, seed, bits, target)
        except BudgetError as error:
            if found:
                break
            raise BudgetError(
                f"budget of {budget} for tables and vocabulary, searched within {within} for the tables: {error}"
            ) from None
        if plan.keeps_nothing:
            break
        vocabulary = task.vocabulary_bytes(plan)
        plan = dataclasses.replace(plan, budget=budget, vocabulary_bytes=vocabulary)
        found.append(f"{plan.num_bytes(target):,} + {vocabulary:,}")
        if plan.num_bytes(target) + vocabulary > allowed:
            left = allowed - VOCABULARY_MARGIN * vocabulary
            for_tables = left if left > 0 else for_tables / 2
            continue
        if best is None or plan.num_params > best.num_params:
            best = plan
        if for_tables + vocabulary >= (1 - VOCABULARY_SPARE) * allowed:
            break
        for_tables *= allowed / (for_tables + vocabulary)  # both grow with the rows
    if best is None:
        tried = f"bytes of tables + vocabulary were {', '.join(found)}" if found else "no row of any table was kept"
        raise BudgetError(
            f"method {method_of(config).name!r} found no plan that is within a budget of {budget} together with its vocabulary: "
            f"{tried}; give more, or leave out the target, which counts the vocabulary"
        )
    return best


def _search_stored(
    task: Task, config: Config, budget: Budget, seed: int, bits: Bits, target: Target | None
) -> SizePlan:
    """Search in fp32 within another budget, such that the plan as it will be stored is within this one."""
    method, full = method_of(config), task.full_plan()
    if budget.kind == "params":
        if bits == "mixed":
            raise ConfigError(f"mixed bits need a budget in percent or bytes, given {budget}")
        plan = method.search(task, config, budget, seed).with_bits(bits)
        plan.num_bytes(target)  # raises where the target cannot store it
        return plan
    if bits == "mixed" and method.search_mixed is not None and target != "fbgemm":
        plan = method.search_mixed(task, config, budget, seed)
        if (least := amount_of(plan, budget, target)) > budget.amount * ROUNDED:
            raise BudgetError(
                f"budget of {budget} is below the smallest plan of method {method.name!r} with mixed bits, "
                f"{budget.words_for(least)}; give at least that"
            )
        return plan
    # What is stored beside the values, scales or padding, shows in a plan only: the first is over by that, the next one
    # fits unless padding grew.
    ratio = 32 / (MIXED_BITS if bits == "mixed" else bits)
    unit = 1 if budget.kind == "bytes" else BYTES_PER_PARAM * full.num_full_params
    amount = budget.amount * ratio
    plan, wanted = full, None
    while plan.num_params:
        amount = amount if budget.kind == "bytes" else min(amount, 1.0)
        within = Budget(budget.kind, amount)
        try:
            plan = method.search(task, config, within, seed)
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
            if wanted and "columns" in method.adds:
                plan = plan.with_padded_columns(budget, wanted)
            return dataclasses.replace(plan, budget=budget)
        amount = max(amount - excess * ratio / unit, amount / 2)
    return plan
