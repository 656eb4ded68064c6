"""Export of compact tables for FBGEMM's inference kernels: values or codes, id maps, and a file that reads them.

Ids stay those of the full tables. A dropped id reads the DROPPED row of its table, which training has moved from zero; FBGEMM's
own -1 would read zeros. Where a table keeps its first rows, its number of rows takes the place of a map.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embtrim.errors import BundleError, ModelError, PlanError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import PlanShape
from embtrim.plan.table import Bits, Block, TablePlan, TableShape, describe_bits, describe_table, padded_width
from embtrim.system.folders import check_replaceable, write_folder
from embtrim.system.modules import named_modules, unwrapped
from embtrim.tables.packing import CODE_BITS, PackedRows
from embtrim.torchrec.compacting import CompactCollection, CompactSequences
from embtrim.torchrec.inheriting import compact_shards
from embtrim.torchrec.ranks import num_ranks
from embtrim.torchrec.sites import is_sharded

# FBGEMM's type for each number of bits; it has none of 3.
TYPES = {32: "FP32", 16: "FP16", 8: "INT8", 4: "INT4", 3: "INT4", 2: "INT2"}


@dataclass(frozen=True)
class Run:
    """Rows of a compact table that are stored alike, from one compact id to another.

    Attributes:
        values: fp32 or fp16 (N, W); codes, uint8, where there is a scale.
        bits: Bits of a value.
        scale: fp32 (W,), or None.
        offset: fp32 (W,), or None.
    """

    values: Tensor
    bits: int
    scale: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class Exported:
    """A compact table as it is exported.

    Attributes:
        name: Its name in plans.
        table: What the plan keeps of it.
        pooling: "SUM" or "MEAN" of each feature that reads it, or "NONE" where each id has an embedding of its own.
        runs: Its rows in order of their compact ids.
    """

    name: str
    table: TableShape
    pooling: Mapping[str, str]
    runs: Sequence[Run]


def export(
    model: nn.Module, plan: PlanShape, folder: str | Path, bits: Bits | None = None, overwrite: bool = False
) -> Path:
    """Write the tables of a compact model for FBGEMM's inference kernels (IntNBitTableBatchedEmbeddingBagsCodegen).

    The folder holds tables.json, tables.safetensors, and lookup.py, which reads both without embtrim. Embeddings are those of
    the model: of its values, or of its codes, whose scales are those of embtrim. First-order weights and the network are not
    in it.

    Args:
        model: Model that `compact` of this package made, not sharded: open its checkpoint in one process. Or a model of
            embtrim.models, quantised or in 32 bits.
        plan: Plan of the model. With rows, ids are those of the full tables; a plan without rows, as a bundle has it, is for
            the ids that the bundle's encoder gives. A plan of fewer bits quantises tables of 32 bits.
        folder: Folder to write.
        bits: Bits of all tables; None takes those of the plan.
        overwrite: Replace an earlier export of this kind.

    Returns:
        The folder.

    Raises:
        ModelError: The model is sharded, is of another kind, or this is one of several ranks.
        PlanError: The plan is of another model, or rows of a table have several widths.
        BundleError: The folder exists, or cannot be written.
    """
    if num_ranks() > 1 or is_sharded(model):
        raise ModelError(
            "export writes one folder from a model in one process; save the sharded model by torch.distributed.checkpoint, and "
            "open the checkpoint in a model of embtrim.torchrec.compact that is not sharded"
        )
    if bits is not None:
        if bits == "mixed":
            raise PlanError(
                "bits = 'mixed' is for search; export takes the bits of its plan, or one number for all tables"
            )
        plan = plan.with_bits(bits)
    model = unwrapped(model)
    tables = list(_zoo_tables(model, plan) if isinstance(model, CTRModel) else _compact_tables(model, plan))
    folder = Path(folder)
    check_replaceable(folder, overwrite, "an export for FBGEMM", _is_export, BundleError)
    with write_folder(folder, "export") as temporary:
        described, stored = [], {}
        for number, table in enumerate(tables):
            described.append(_describe(table, f"t{number}", stored))
        head = {"format": "embtrim fbgemm", "version": 1, "plan": plan.digest, "tables": described}
        (temporary / "tables.json").write_text(json.dumps(head, indent=1), "utf-8")
        save_file(stored, temporary / "tables.safetensors")
        source = find_spec("embtrim.torchrec.lookup")
        assert source is not None
        assert source.origin is not None
        shutil.copyfile(source.origin, temporary / "lookup.py")
    return folder


def _is_export(path: Path) -> bool:
    return (path / "lookup.py").is_file() and (path / "tables.json").is_file()


def _describe(exported: Exported, key: str, stored: dict[str, Tensor]) -> dict[str, Any]:
    """What tables.json says of a table; its tensors are added to those that are stored."""
    table = exported.table
    id_map = first_rows = None
    if isinstance(table, TablePlan) and table.renumbers:
        id_map = None if table.keeps_first_rows else table.id_map()
        first_rows = table.num_kept if table.keeps_first_rows else None
    bands, start = [], 0
    for number, run in enumerate(exported.runs):
        name, stop = f"{key}.{number}", start + len(run.values)
        values = run.values
        if run.scale is not None and run.offset is not None:
            stored |= {f"{name}.scale": run.scale, f"{name}.offset": run.offset}
            if len(exported.runs) > 1:
                values = torch.cat([values, torch.ones_like(values[:, :1])], 1)
            per_byte = 8 // int(TYPES[run.bits][3:])
            values = nn.functional.pad(values, (0, -values.shape[1] % per_byte))
            stored[f"{name}.values"] = _interleaved(values, per_byte)
        else:
            stored[f"{name}.values"] = values.contiguous()
        if id_map is not None or len(exported.runs) > 1:
            ids = np.arange(table.num_compact_rows) if id_map is None else id_map
            inside = (ids >= start) & (ids < stop)
            stored[f"{name}.remap"] = torch.from_numpy(np.where(inside, ids - start, -1).astype(np.int32))
        bands.append({"name": name, "rows": len(values), "width": values.shape[1], "type": TYPES[run.bits]})
        start = stop
    return {
        "name": exported.name,
        "features": list(exported.pooling),
        "pooling": list(exported.pooling.values()),
        "num_rows": table.num_rows if isinstance(table, TablePlan) else table.num_compact_rows,
        "first_rows": first_rows,
        "full_width": table.width,
        "columns": list(table.columns),
        "bands": bands,
    }


def _interleaved(codes_NW: Tensor, per_byte: int) -> Tensor:
    """Codes as FBGEMM packs them: neighbours share a byte, the first one in its lowest bits."""
    bits, found = 8 // per_byte, torch.zeros(len(codes_NW), codes_NW.shape[1] // per_byte, dtype=torch.uint8)
    for place in range(per_byte):
        found |= codes_NW[:, place::per_byte] << (bits * place)
    return found


# ---- compact models of this package ----------------------------------------------------------------------------------


def _compact_tables(model: nn.Module, plan: PlanShape) -> Iterator[Exported]:
    tables = {table.name: table for table in plan.tables}
    for name, (config, shards) in compact_shards(model).items():
        size = (config.num_embeddings, config.embedding_dim)
        table = tables.get(name) or TablePlan(name, *size, (Block(size[0], tuple(range(size[1]))),))
        if table.mixed or (table.num_compact_rows, padded_width(table.output_width)) != size:
            raise PlanError(
                f"the plan's table {name!r} takes {table.num_compact_rows:,} x {table.output_width}, filled up to "
                f"{padded_width(table.output_width)} columns; the model's is {size[0]:,} x {size[1]}: give the plan of this model"
            )
        weight = shards[0].weight_RC[:, : table.output_width].float().cpu()
        yield Exported(name, table, _pooling_of(config), _runs_of(table, weight, _in_32_bits(table).dropped_id))
    for path, module in named_modules(model):
        if not isinstance(module, (CompactCollection, CompactSequences)):
            continue
        if isinstance(module, CompactCollection) and module.collection is not None and module.collection.is_weighted():
            raise ModelError(f"the collection {path!r} weighs its ids, which the lookup of an export does not")
        for config in module.removed:
            kind = "embedding_bags" if isinstance(module, CompactCollection) else "embeddings"
            name = f"{path}.{kind}.{config.name}" if path else f"{kind}.{config.name}"
            yield Exported(name, tables[name], _pooling_of(config), ())


def _pooling_of(config: Any) -> dict[str, str]:
    pooling = getattr(config, "pooling", None)
    return dict.fromkeys(config.feature_names, "NONE" if pooling is None else pooling.value)


def _in_32_bits(table: TableShape) -> TableShape:
    """The table as a compact model of this package holds it."""
    blocks = tuple(dataclasses.replace(block, bits=None) for block in table.blocks)
    return dataclasses.replace(table, blocks=blocks, bits=32)


def _runs_of(table: TableShape, weight_NW: Tensor, dropped: int | None) -> list[Run]:
    """The rows of a compact table, in the bits of its plan.

    Args:
        table: The table with its bits, by which the DROPPED row has its place.
        weight_NW: Rows of the model.
        dropped: Place of the DROPPED row among them; bands move it.
    """
    if table.dropped_id is not None and dropped is not None and table.dropped_id != dropped:
        order = np.delete(np.arange(len(weight_NW)), dropped)
        weight_NW = weight_NW[torch.from_numpy(np.insert(order, table.dropped_id, dropped))]
    found, start = [], 0
    for rows, bits in table.bands:
        part_NW = weight_NW[start : start + rows]
        start += rows
        packed = PackedRows(rows, part_NW.shape[1], bits, 1)
        packed.store(0, torch.arange(rows), part_NW)
        found.append(_run_of(packed, 0, torch.arange(rows)))
    return found


def _run_of(packed: PackedRows, stretch: int, rows_N: Tensor) -> Run:
    values = packed.codes(rows_N).cpu()
    if packed.bits > CODE_BITS:
        return Run(values, packed.bits)
    return Run(values, packed.bits, packed.scale[stretch].float().cpu(), packed.offset[stretch].float().cpu())


# ---- models of embtrim.models ------------------------------------------------------------------------------------------


def _zoo_tables(model: CTRModel, plan: PlanShape) -> Iterator[Exported]:
    storage, given = model.tables, {table.name: table for table in plan.tables}
    for own in storage.plan.tables:
        table = given.get(own.name)
        if table is None or (table.num_compact_rows, table.columns) != (own.num_compact_rows, own.columns):
            raise PlanError(f"the plan is not of this model, whose table is {own.name!r}: {describe_table(own)}")
        if table.mixed:
            raise PlanError(
                f"table {own.name!r} has rows of several widths, which FBGEMM's tables cannot hold; export as pt2 or onnx"
            )
        if storage.packed is not None and table.bands != own.bands:
            raise PlanError(
                f"table {own.name!r} is quantised in {describe_bits(own)} bits, the plan says {describe_bits(table)}; give the "
                "plan of the model, or call model.tables.dequantize_() first"
            )
        pooling = {
            field.name: field.pooling.upper() if field.length > 1 else "SUM"
            for field in model.schema.fields_of_table[own.name]
        }
        if not table.output_width:
            runs = []
        elif storage.packed is not None:
            runs = [_run_of(*piece) for piece in storage.packed_pieces(own.name)]
        else:
            ((_, weight_NW),) = storage.get_rows(own.name, np.arange(own.num_compact_rows))
            runs = _runs_of(table, weight_NW.float().cpu(), own.dropped_id)
        yield Exported(own.name, table, pooling, runs)
