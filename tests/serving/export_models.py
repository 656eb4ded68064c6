"""Models that the tests export, batches for them, and readers of what was exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block, TablePlan
from embtrim.schema import PAD, FieldSpec, Schema

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

BATCHES = (1, 7, 64)
TOLERANCE = 1e-5


def schema_of(multi: bool = True, dense: bool = True) -> Schema:
    """Three plain fields, two fields that share a table (one of them with several values), and a dense field."""
    fields = [FieldSpec(name=f"f{i}", vocab_size=20 + i) for i in range(3)]
    if multi:
        fields.append(FieldSpec(name="tags", type="multi", max_len=3, vocab_size=12))
        fields.append(FieldSpec(name="last", type="multi", max_len=1, vocab_size=12, table="tags"))
    if dense:
        fields.append(FieldSpec(name="price", type="dense", transform="none"))
    return Schema(label="y", fields=tuple(fields))


def uniform_blocks(number: int, rows: int) -> tuple[Block, ...]:
    """f0 keeps all columns, f1 two projected columns and some rows, f2 nothing, the tags one scattered column."""
    some = np.arange(1, 10, dtype=np.int32)
    return (
        (Block(rows, (0, 1, 2, 3)),),
        (Block(9, (0, 2), "project", some),),
        (),
        (Block(rows, (1,), "scatter"),),
    )[number]


def mixed_blocks(number: int, rows: int) -> tuple[Block, ...]:
    """f0 and the tags keep rows of several widths and drop the rest; f1 and f2 are as in `uniform_blocks`."""
    ids = np.arange(rows, dtype=np.int32)
    if number in (1, 2):
        return uniform_blocks(number, rows)
    return (Block(3, 4, "project", ids[:3]), Block(4, 2, "project", ids[3:7]), Block(3, 0, "project", ids[8:11]))


def model_of(
    name: str, schema: Schema, blocks: Callable[[int, int], tuple[Block, ...]] | None = None, seed: int = 0
) -> CTRModel:
    """A model in eval mode with random weights and running statistics; full without `blocks`."""
    plan = None
    if blocks is not None:
        width = 0 if name == "lr" else 4
        tables = [
            TablePlan(t, rows, width, blocks(number, rows) if width else (Block(rows, ()),))
            for number, (t, rows) in enumerate(schema.tables.items())
        ]
        plan = SizePlan(schema.fingerprint, len(schema.id_fields), tuple(tables))
    hparams = {} if name == "lr" else {"embedding_dim": 4}
    if name not in ("lr", "fm"):
        hparams["hidden_units"] = (8,)
    model = build(name, schema, plan=plan, **hparams).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "running_var" in name:
                value.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(value, nn.Parameter) or "running_mean" in name:
                value.uniform_(-0.5, 0.5, generator=generator)
    return model


def batch_of(model: CTRModel, num_rows: int, seed: int = 0) -> dict[str, Tensor]:
    """ids, with PAD where a field has several values, and dense values if the schema has any."""
    generator = torch.Generator().manual_seed(seed)
    rows = {table.name: table.num_compact_rows for table in model.tables.plan.tables}
    columns = [
        torch.randint(PAD if f.type == "multi" else 0, rows[f.table_name], (num_rows,), generator=generator)
        for f in model.schema.id_fields
        for _ in range(f.length)
    ]
    batch = {"ids": torch.stack(columns, 1).int()}
    if model.num_dense:
        batch["dense"] = torch.randn(num_rows, model.num_dense, generator=generator)
    return batch


def onnx_model(folder: Path) -> Callable[..., Tensor]:
    session = onnxruntime.InferenceSession(str(folder / "model_ids.onnx"))
    assert [output.name for output in session.get_outputs()] == ["logits"]
    return lambda **batch: torch.from_numpy(session.run(["logits"], {n: x.numpy() for n, x in batch.items()})[0])


def pt2_model(folder: Path) -> Callable[..., Tensor]:
    return torch.export.load(str(folder / "model.pt2")).module()


READERS = {"onnx": onnx_model, "pt2": pt2_model}


@torch.no_grad()
def check_agreement(model: CTRModel, folder: Path, format: str) -> None:
    served = READERS[format](folder)
    for num_rows in BATCHES:
        batch = batch_of(model, num_rows, seed=num_rows)
        expected = model(*batch.values())
        difference = (served(**batch) - expected).abs() / (1 + expected.abs())
        assert difference.max() < TOLERANCE, f"batch of {num_rows}"
    assert expected.std() > 1e-3
