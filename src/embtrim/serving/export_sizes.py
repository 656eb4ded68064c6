"""Bytes of an export beside those of the full model, whose files are computed and not written."""

from __future__ import annotations

import copy
import dataclasses
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Target
from embtrim.serving.manifest import Format, Sizes, TableSizes
from embtrim.serving.served import Served
from embtrim.system.folders import folder_bytes
from embtrim.tables.replacements import CompactEmbedding, Replacement
from embtrim.tables.ties import Tied

logger = logging.getLogger(__name__)

# Backend that counts the bytes of each format's tables.
TARGETS: dict[Format, Target] = {"pt2": "torch", "onnx": "onnx", "torchrec": "fbgemm"}


def export_sizes(
    model: nn.Module, served: Served, format: Format, write: Callable[[Served, Path], None], folder: Path
) -> Sizes:
    """Bytes of a model, and of the full model that it stands for.

    Args:
        model: The model to export.
        served: The same model as its exporter takes it.
        format: Format of the export.
        write: Writes a model into a folder.
        folder: Folder that holds the files of the model and no others.
    """
    model_bytes = folder_bytes(folder)
    if isinstance(model, CTRModel):
        tables = table_sizes(model, format)
        full_bytes = model_bytes + network_bytes(full_network(model)) - network_bytes(model)
        full_bytes += tables["full_table_bytes"] - tables["table_bytes"]
    else:
        tables = module_sizes(model)
        full_bytes = full_module_bytes(served, write, folder)
    return {**tables, "model_bytes": model_bytes, "full_model_bytes": full_bytes}


def table_sizes(model: CTRModel, format: Format) -> TableSizes:
    """Bytes of a zoo model's tables."""
    plan, target = model.tables.plan, TARGETS[format]
    full = SizePlan.full(model.schema, plan.width, plan.first_order)
    return {"table_bytes": plan.num_bytes(target), "full_table_bytes": full.num_bytes(target)}


def module_sizes(model: nn.Module) -> TableSizes:
    """Bytes of the tables of a module of one's own, compact tables and untouched ones."""
    stored = full = 0
    weights: dict[int, int] = {}  # by identity: tables may share one
    for module in model.modules():
        if isinstance(module, CompactEmbedding):
            stored += sum(value.nbytes for value in module.state_dict().values())
            full += module.num_full_bytes
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            weights[id(module.weight)] = module.weight.nbytes
    return {"table_bytes": stored + sum(weights.values()), "full_table_bytes": full + sum(weights.values())}


def full_module_bytes(served: Served, write: Callable[[Served, Path], None], folder: Path) -> int:
    """Bytes of the full model's files, for a module of one's own.

    A graph of compact tables also says how they are read, so the full model's graph differs from it by more than the
    numbers in the tables. The full model is therefore exported too, with tables of a few rows; the bytes of the missing rows
    are added. If that export fails (torch exports some bags as replacements only), or a tied layer has an output for every
    row, the compact model's graph stands for it.

    Args:
        served: The compact model.
        write: Writes a model into a folder.
        folder: Folder of the compact model's files; a temporary folder inside it is removed again.
    """
    if not any(isinstance(module, Replacement) for module in served.module.modules()):
        return folder_bytes(folder)
    module, missing = full_module(served.module)
    if any(isinstance(part, Tied) for part in module.modules()):  # as many outputs as rows
        return _estimated_bytes(served, module, missing, folder)
    with tempfile.TemporaryDirectory(dir=folder) as full:
        try:
            write(dataclasses.replace(served, module=module), Path(full))
            return folder_bytes(Path(full)) + missing
        except Exception as error:  # exporters raise what they like
            logger.warning("the full %s cannot be exported (%s); its bytes are estimated", type(module).__name__, error)
    return _estimated_bytes(served, module, missing, folder)


def _estimated_bytes(served: Served, module: nn.Module, missing: int, folder: Path) -> int:
    """Bytes of a full model's files, by the graph of the compact one."""
    before, after = (sum(p.nbytes for p in m.state_dict().values()) for m in (served.module, module))
    return folder_bytes(folder) + after - before + missing


def full_module(compact: nn.Module) -> tuple[nn.Module, int]:
    """The full model with tables of a few rows, and the bytes of the rows that these tables lack."""
    memo: dict[int, Any] = {id(value): value for value in (*compact.parameters(), *compact.buffers())}
    inside: set[int] = set()
    missing = 0
    generator = torch.Generator().manual_seed(0)  # random, since equal tables would be stored once
    for module in compact.modules():
        if isinstance(module, Replacement) and id(module) not in inside:
            inside.update(map(id, module.modules()))
            memo[id(module)] = table = module.full_table(generator)
            missing += (table.num_embeddings - len(table.weight)) * table.weight[0].nbytes
    full = copy.deepcopy(compact, memo)
    for linear in full.modules():
        if isinstance(linear, nn.Linear) and getattr(linear, "full_in_features", 0) > linear.in_features:
            linear.in_features = linear.full_in_features  # type: ignore[assignment]
            shape = (linear.out_features, linear.in_features)
            linear.weight = nn.Parameter(torch.rand(shape, generator=generator).to(linear.weight))
    return full.eval().requires_grad_(False), missing


def full_network(model: CTRModel) -> CTRModel:
    """The full model's network, with tables of one row."""
    fields = tuple(f if f.vocab_size is None else f.replace(vocab_size=1) for f in model.schema.fields)
    return type(model)(model.schema.replace(fields=fields), **model.hparams)


def network_bytes(model: CTRModel) -> int:
    """Bytes of all parameters outside the tables."""
    return sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("tables."))
