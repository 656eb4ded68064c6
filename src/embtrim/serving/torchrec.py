"""Exports in TorchRec's terms: configs and weights of the tables, and weights of the network.

Axes: N rows of a table, W columns of a row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embtrim.errors import ModelError, PlanError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.table import padded_width
from embtrim.serving.served import Served, ServedModel

# TorchRec's names of the types that its tables have.
DATA_TYPES = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}


def write_torchrec(served: Served, folder: Path) -> None:
    """Write tables.json, the weights that it names, and the weights of the network.

    tables.safetensors and first_order.safetensors hold the weights of the tables, network.safetensors all others. FBGEMM,
    which runs TorchRec's tables on a server, takes rows of a multiple of four columns. Narrower rows therefore end in zeros,
    as `SizePlan.num_bytes("fbgemm")` counts them.

    Raises:
        PlanError: TorchRec's configs cannot describe the tables; see `torchrec_configs`.
        ModelError: TorchRec has no tables of the weights' type.
    """
    assert isinstance(served.module, ServedModel)
    model = served.module.model
    configs = torchrec_configs(model)
    plans = model.tables.plan.tables
    kept = {torchrec_name(table.name): list(table.columns) for table in plans if table.output_width}
    removed = [table.name for table in plans if not table.output_width]
    layout = {"full_width": model.tables.width, "kept_columns": kept, "removed_tables": removed}
    (folder / "tables.json").write_text(json.dumps({**configs, **layout}, indent=1), "utf-8")
    for name, weights in torchrec_weights(model).items():
        save_file(weights, folder / f"{name}.safetensors")
    network = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith("tables.weight_by_width.") and name != "tables.first_order"
    }
    save_file(network, folder / "network.safetensors")


def torchrec_configs(model: CTRModel) -> dict[str, list[dict[str, Any]]]:
    """Arguments of TorchRec's configs.

    Returns:
        "tables": arguments of each table's EmbeddingBagConfig. "first_order": the same for its first-order weights, which
        fill the first column. "unpooled": arguments of EmbeddingConfig, for the tables that only fields of one value read.

    Raises:
        PlanError: A table stores rows of several widths or is quantised, or its fields pool it differently.
        ModelError: TorchRec has no tables of the weights' type.
    """
    tables, schema = model.tables, model.schema
    if tables.packed is not None:
        raise PlanError(
            "these tables are quantised by column, which TorchRec's configs cannot say; export as pt2 or onnx, or retrain "
            "with plan.with_bits(32)"
        )
    weight = tables.group_view(tables.groups[0])
    if weight.dtype not in DATA_TYPES:
        raise ModelError(f"TorchRec has no tables of {weight.dtype}; call model.float() before export")
    configs: dict[str, list[dict[str, Any]]] = {"tables": [], "first_order": [], "unpooled": []}
    for table in tables.plan.tables:
        if table.mixed:
            raise PlanError(
                f"table {table.name!r} stores rows of several widths, a TorchRec table has one embedding_dim; "
                "export as pt2 or onnx"
            )
        fields = schema.fields_of_table[table.name]
        pooled = {field.pooling: field.name for field in fields if field.length > 1}
        if len(pooled) > 1:
            raise PlanError(
                f"fields {pooled['sum']!r} and {pooled['mean']!r} share table {table.name!r} and pool it by sum and by "
                "mean, a TorchRec table has one pooling; export as pt2 or onnx"
            )
        config = {
            "name": torchrec_name(table.name),
            "embedding_dim": padded_width(table.output_width),
            "num_embeddings": table.num_compact_rows,
            "feature_names": [field.name for field in fields],
            "data_type": DATA_TYPES[weight.dtype],
        }
        bag = {**config, "pooling": next(iter(pooled), "sum").upper()}
        if table.output_width:
            configs["tables"].append(bag)
        if table.output_width and not any(field.type == "multi" for field in fields):
            configs["unpooled"].append(config)
        if tables.first_order is not None:
            configs["first_order"].append({**bag, "embedding_dim": padded_width(1)})
    return configs


def torchrec_name(table: str) -> str:
    """Name of a table in its config; TorchRec makes it an attribute, which cannot hold a dot or be `type` or `items`."""
    return "table_" + table.replace("%", "%25").replace(".", "%2E")


def torchrec_weights(model: CTRModel) -> dict[str, dict[str, Tensor]]:
    """(N, padded W) weights by file, then by their name in the configs."""
    tables = model.tables
    weights: dict[str, dict[str, Tensor]] = {"tables": {}, "first_order": {}}
    for table in tables.plan.tables:
        name, start = torchrec_name(table.name), tables.layout.segment_starts[table.name][0]
        stop = start + table.num_compact_rows
        group = next(g for g in tables.groups if g.width == table.output_width)
        if group.width:
            own = tables.group_view(group)[start - group.start : stop - group.start]
            weights["tables"][name] = fill_up(own)
        if tables.first_order is not None:
            weights["first_order"][name] = fill_up(tables.first_order[start:stop, None])
    return weights


def fill_up(rows_NW: Tensor) -> Tensor:
    """A copy of rows that ends in zeros up to the padded width."""
    width = rows_NW.shape[1]
    return nn.functional.pad(rows_NW.detach(), (0, padded_width(width) - width))
