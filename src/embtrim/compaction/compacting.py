"""compact: build the smaller model that a plan describes. verify: prove that it equals the masked full model.

A zoo model is built anew from its hyper-parameters with the plan's tables; whatever reads the removed coordinates
(first deep layers, cross layers, pair inputs) shrinks with them. A foreign module is copied with its nn.Embeddings and
nn.EmbeddingBags replaced by smaller ones of the same output width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from torch import nn

from embtrim.compaction.foreign import Init, Reads, compact_module, narrow_linears
from embtrim.compaction.inheriting import inherit_weights
from embtrim.errors import EmbtrimError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.tables.replacements import CompactEmbedding


def compact(
    model: nn.Module, plan: SizePlan, init: Init = "scratch", seed: int | None = None, reads: Reads | None = None
) -> Any:
    """Build the smaller model that a plan describes; the given model is not changed.

    Args:
        model: full zoo model, or a foreign module.
        plan: made for the model's schema (or for the foreign module's sites).
        init: "scratch" draws new weights; "initial" takes what is kept of the full model's *initial* weights (zoo
            models only: drawn again from their seed); "inherit" takes what is kept of the weights the model has now.
            A projection starts as the selection of the kept columns under "initial" and "inherit". Of a foreign module
            only the tables that the plan names are drawn; dense layers, batch-norm statistics and tables that were left
            alone are kept as given: for a training from scratch pass a fresh module, not the one that was searched.
        seed: of new weights; None takes the model's own.
        reads: of a foreign module, by the path of each nn.Linear that reads nothing but a concatenation: its parts in
            order, paths of embeddings or numbers of other columns, such as `{"head.0": ["user", "item", "item", 13]}`.
            These embeddings then give out the columns that they store, not projected, and the Linears lose the input
            columns of the others. Nothing else may read them: `verify` with the same `reads` says so if it does.

    Returns:
        The compact model, on the device of the full one, in fp32: where the plan says fewer bits, call `quantize` once
        it is trained. A plan that drops or re-sizes rows re-numbers ids: give a compact zoo model `data.recode(plan)`.

    Raises:
        PlanError: the plan was made for something else, or lists counts where `init` needs columns.
        EmbtrimError: `init` is not one of these; the model's tables are compact already, or quantised; a weight that the plan
            stores in pieces is also kept where they cannot replace it; or `reads` names no such Linear or embedding, or
            parts that do not add up to its input.
    """
    if init not in get_args(Init):
        raise EmbtrimError(f"init must be 'scratch', 'initial' or 'inherit', given {init!r}")
    if not isinstance(model, CTRModel):
        small = compact_module(model, plan, init, seed)
        if reads is not None:
            narrow_linears(small, reads)
        return small
    if reads is not None:
        raise EmbtrimError("reads= is for foreign modules: the models of embtrim.models know what reads their tables")
    model.tables.check_fp32()
    plan.check_schema(model.schema)
    if not model.tables.plan.keeps_all:
        raise EmbtrimError(f"this {model.name} is compact already; compact the full model")
    plan.check_tables(SizePlan.full(model.schema, model.tables.width))
    if plan.first_order != model.has_first_order:
        plan = dataclasses.replace(plan, first_order=model.has_first_order)
    hparams = dict(model.hparams) if seed is None else {**model.hparams, "seed": seed}
    like = next(model.parameters())
    small = type(model)(model.schema, plan=plan, **hparams).to(like.device, like.dtype)
    if init == "initial":
        inherit_weights(type(model)(model.schema, **hparams).to(like.device, like.dtype), small)
    elif init == "inherit":
        inherit_weights(model, small)
    return small


def quantize(model: nn.Module) -> None:
    """Store the tables of a compact model in the bits of its plan, in place: for inference only, once it is trained.

    Args:
        model: what `compact` gave; of a zoo model this is `model.tables.quantize()`.

    Raises:
        EmbtrimError: the tables are quantised already, or the plan of a foreign module says 32 bits of all.
    """
    if isinstance(model, CTRModel):
        model.tables.quantize()
        return
    tables = [module for module in model.modules() if isinstance(module, CompactEmbedding)]
    if any(table.packed is not None for table in tables):
        raise EmbtrimError(f"the tables of this {type(model).__name__} are quantised already")
    if all(table.bits == 32 for table in tables):
        raise EmbtrimError(
            f"this {type(model).__name__} has no compact table of fewer than 32 bits; compact it with plan.with_bits(8)"
        )
    for table in tables:
        table.quantize()
