"""compact: build the smaller model that a plan describes. quantize_: store its tables in the bits of the plan.

A zoo model is built from its hyper-parameters with the tables of the plan. Layers that read the removed columns (first
deep layers, cross layers, pair inputs) shrink with them. A foreign module is copied; smaller embeddings of the same
output width replace its nn.Embeddings and nn.EmbeddingBags.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, overload

import numpy as np
from torch import nn

from embtrim.compaction.foreign import Init, LinearReads, compact_module, narrow_linears
from embtrim.compaction.inheriting import inherit_weights
from embtrim.compaction.low_rank import start_low_rank
from embtrim.errors import EmbtrimError, ModelError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.system.modules import unwrapped
from embtrim.tables.packing import counts_of
from embtrim.tables.replacements import CompactEmbedding
from embtrim.tasks.survey import plan_for
from embtrim.tasks.task import Task

logger = logging.getLogger(__name__)

ZooModel = TypeVar("ZooModel", bound=CTRModel)


@overload
def compact(
    model: ZooModel,
    plan: SizePlan,
    init: Init = "scratch",
    seed: int | None = None,
    reads: LinearReads | None = None,
    task: Task | None = None,
) -> ZooModel: ...


@overload
def compact(
    model: nn.Module,
    plan: SizePlan,
    init: Init = "scratch",
    seed: int | None = None,
    reads: LinearReads | None = None,
    task: Task | None = None,
) -> nn.Module: ...


def compact(
    model: nn.Module,
    plan: SizePlan,
    init: Init = "scratch",
    seed: int | None = None,
    reads: LinearReads | None = None,
    task: Task | None = None,
) -> nn.Module:
    """Build the smaller model that a plan describes. The given model is not changed.

    The dense layers, batch-norm statistics and unsearched tables of a foreign module are copied under every `init`. To
    train a foreign module from scratch, pass a fresh module instead of the one that was searched.

    Args:
        model: Full zoo model, or a foreign module. Wrappers such as torch.compile are taken off.
        plan: Plan made for the model's schema, or for the foreign module's sites.
        init: "scratch" draws new weights. "initial" takes the kept part of the full model's *initial* weights, drawn
            again from its seed (zoo models only). "inherit" takes the kept part of the model's present weights. Under
            "initial" and "inherit" a projection starts as the selection of the kept columns. "low_rank" approximates
            the present model: tables store coordinates of the trained ones where what reads them can be turned to fit,
            and dropped rows read the mean of their table (compaction/low_rank.py).
        seed: Seed of new weights; None takes the model's own.
        reads: Inputs of the nn.Linears of a foreign module that read nothing but a concatenation, by path: the paths of
            the embeddings in order, and numbers of other columns, such as `{"head.0": ["user", "item", "item", 13]}`.
            These embeddings then put out only their stored columns, without projection, and the Linears lose the input
            columns of the others. Nothing else may read these embeddings; `verify` with the same `reads` checks it.
        task: Task of the model, whose batches "low_rank" reads; other kinds of `init` do not need it.

    Returns:
        The compact model in fp32, on the device of the full one. If the plan has fewer than 32 bits, a log line says so:
        call `quantize_` after training. A plan that drops or re-sizes rows renumbers ids: `fit`, `evaluate` and `save` re-code the data
        of a compact zoo model by themselves, and a loop of one's own reads `data.recode(plan)`.

    Raises:
        PlanError: The plan was made for another model, or counts columns where `init` needs to know which.
        EmbtrimError: `init` is not one of the four, or is "low_rank" without a task, or together with `reads`.
        ModelError: The model's tables are compact or quantised already; a weight that the plan stores in pieces is also
            kept where they cannot replace it; or `reads` names no such Linear or embedding, or parts that do not add up
            to the Linear's input.
    """
    small = made_compact(model, plan, init, seed, reads, task)
    if plan.is_quantized:
        zoo = isinstance(small, CTRModel)
        owed = "model.tables.quantize_()" if zoo else "embtrim.quantize_(model)"
        logger.log(
            logging.INFO if zoo else logging.WARNING,  # a bundle refuses such a model; a state dict does not
            "the tables of this compact %s are fp32 still, %s bytes; its plan stores %s: call %s once it is trained",
            type(small).__name__,
            f"{plan.with_bits(32).num_bytes():,}",
            f"{plan.num_bytes():,}",
            owed,
        )
    return small


def made_compact(
    model: nn.Module,
    plan: SizePlan,
    init: Init = "scratch",
    seed: int | None = None,
    reads: LinearReads | None = None,
    task: Task | None = None,
) -> Any:
    """What `compact` returns; it says nothing."""
    model = unwrapped(model)
    if not isinstance(model, CTRModel):
        plan = plan_for(model, plan)
    if init not in get_args(Init):
        raise EmbtrimError(f"init must be 'scratch', 'initial', 'inherit' or 'low_rank', given {init!r}")
    if init == "low_rank":
        if task is None or task.model is not model or reads is not None:
            raise EmbtrimError("init = 'low_rank' reads batches: give `task=`, the Task of this model, and no `reads=`")
        small = made_compact(model, plan, "inherit", seed)
        start_low_rank(small, plan, task)
        return small
    if not isinstance(model, CTRModel):
        small = compact_module(model, plan, init, seed)
        if reads is not None:
            narrow_linears(small, reads)
        return small
    if reads is not None:
        raise ModelError("reads= is for foreign modules: the models of embtrim.models know what reads their tables")
    model.tables.check_fp32()
    plan.check_schema(model.schema)
    if not model.tables.plan.keeps_all:
        raise ModelError(f"this {model.name} is compact already; compact the full model")
    plan.check_tables(SizePlan.full(model.schema, model.tables.width))
    if plan.first_order != model.has_first_order:
        plan = dataclasses.replace(plan, first_order=model.has_first_order)
    hparams = dict(model.hparams) if seed is None else {**model.hparams, "seed": seed}
    small = _like(model, type(model)(model.schema, plan=plan, **hparams))
    if init == "initial":
        inherit_weights(_like(model, type(model)(model.schema, **hparams)), small)
    elif init == "inherit":
        inherit_weights(model, small)
    return small


def _like(model: ZooModel, made: ZooModel) -> ZooModel:
    """`made`, whose parts take the devices and number types of the parts of `model`."""
    for name, part in made.named_children():
        like = next(model.get_submodule(name).parameters(), None)
        if like is not None:
            part.to(like.device, like.dtype)
    return made


def quantize_(model: nn.Module, counts: Mapping[str, np.ndarray] | None = None) -> None:
    """Store the tables of a trained compact model in the bits of its plan, in place. Afterwards it only infers.

    Args:
        model: Compact model, from `compact`. For a zoo model this calls `model.tables.quantize_(counts)`.
        counts: How often the rows of each table occur in the training data, by table. The codes are then fitted for the
            least error of what is read; None counts all rows alike. For a zoo model these are the rows that it stores,
            for another module those of the full table (V,), such as `task.row_counts()` gives.

    Raises:
        ModelError: The tables are quantised already, or the plan stores all tables of the module in 32 bits; or the
            counts are not one for each row.
    """
    if isinstance(model, CTRModel):
        model.tables.quantize_(counts)
        return
    tables = [module for module in model.modules() if isinstance(module, CompactEmbedding)]
    if any(table.packed is not None for table in tables):
        raise ModelError(f"the tables of this {type(model).__name__} are quantised already")
    if all(table.bits == 32 for table in tables):
        raise ModelError(
            f"this {type(model).__name__} has no compact table of fewer than 32 bits; compact it with plan.with_bits(8)"
        )
    for table in tables:
        table.quantize_(None if counts is None else counts_of(counts, table.path, table.num_embeddings))
