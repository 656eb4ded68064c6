"""Exported tables in FBGEMM's inference kernels give what the model reads, in every number of bits."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchrec")
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, PoolingType

from embtrim import torchrec as on_ranks
from embtrim.errors import BundleError, ModelError, PlanError
from embtrim.plan.plan import SizePlan
from embtrim.plan.table import Block
from embtrim.tables.codes import as_coded
from embtrim.tables.packing import fit_codes
from embtrim.torchrec.lookup import Lookup
from tests.serving.export_models import batch_of, mixed_blocks, model_of, schema_of, uniform_blocks
from tests.torchrec.models import SIZES, WIDTH, Pooled, Sequences, batches, make_model
from tests.torchrec.searching import pairs

pytestmark = pytest.mark.filterwarnings("ignore")


def cut_plan(path: str = "ebc.embedding_bags", bands: bool = False) -> SizePlan:
    """First rows of one table, scattered rows of another, all rows of a third, nothing of a fourth; some columns."""
    full = on_ranks.Task(make_model(Pooled), lambda *_: None, []).full_plan()
    scattered = np.random.default_rng(0).permutation(300)[:120].astype(np.int32)
    halves = ((np.sort(scattered[:40]), 8), (np.sort(scattered[40:]), 4))
    blocks = {
        "user": [Block(200, (0, 2, 5), rows=np.arange(200, dtype=np.int32))],
        "item": [Block(120, (1, 2, 3, 4, 6), rows=np.sort(scattered))],
        "ad": [Block(40, tuple(range(8)))],
        "hour": [],
    }
    if bands:
        blocks["item"] = [Block(len(r), (1, 2, 3, 4, 6), rows=r, bits=bits) for r, bits in halves]
    tables = []
    for table in full.tables:
        name = table.name.rpartition("t_")[2]
        bits = 8 if bands and name == "item" else 32
        tables.append(dataclasses.replace(table, name=f"{path}.t_{name}", blocks=tuple(blocks[name]), bits=bits))
    return dataclasses.replace(full, tables=tuple(tables))


def compact_of(plan: SizePlan, kind: Any = Pooled, pooling: str = "SUM") -> torch.nn.Module:
    model = make_model(kind)
    if pooling != "SUM":
        configs = model.ebc.embedding_bag_configs()
        for config in configs:
            config.pooling = PoolingType(pooling)
        model.ebc = EmbeddingBagCollection(tables=configs)
    small = on_ranks.compact(lambda: model, plan.with_bits(32))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # as after training: DROPPED rows are not zero
        for parameter in small.parameters():
            parameter.normal_(0, 1, generator=generator)
    return small


def quantised(small: torch.nn.Module, plan: SizePlan) -> None:
    """Let the tables of a compact model hold what their codes stand for."""
    with torch.no_grad():
        for table in plan.tables:
            if not table.output_width:
                continue
            weight = small.get_parameter(table.name.replace("ebc.", "ebc.collection.") + ".weight")
            rows, groups = torch.arange(len(weight)), [(torch.arange(len(weight)), table.bits)]
            if len(table.bands) > 1:  # 40 rows of 8 bits and the DROPPED row, which is the last one; 80 rows of 4
                groups = [(torch.cat([rows[:40], rows[-1:]]), 8), (rows[40:-1], 4)]
            for own, bits in groups:
                part = weight[own, : table.output_width]
                coded = part.half().float() if bits == 16 else part
                if bits < 16:
                    coded = as_coded(part, *fit_codes(part, bits), bits)
                weight[own, : table.output_width] = coded


def given(features: KeyedJaggedTensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (part.values(), part.lengths()) for name, part in features.to_dict().items()}


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 3, 2, "bands"])
def test_the_kernels_give_what_the_compact_collection_reads(bits: Any, tmp_path: Path):
    plan = cut_plan(bands=True) if bits == "bands" else cut_plan().with_bits(bits)
    small = compact_of(plan)
    on_ranks.export(small, plan, tmp_path / "out")
    quantised(small, plan)
    lookup = Lookup(tmp_path / "out")
    features = batches(0, 512)[0][1]
    with torch.no_grad():
        expected = small.ebc(features)
    found = lookup(given(features))
    assert sorted(found) == sorted(SIZES)
    for name in SIZES:
        assert torch.equal(lookup.wide(name, found[name]), expected[name]), name
    kept = torch.isin(
        features["item"].values(), torch.from_numpy(np.concatenate([b.rows for b in plan.tables[1].blocks]))
    )
    assert kept.any()
    assert expected["item"][~kept].abs().sum() > 0, "the DROPPED row is read, and is not zero"


@pytest.mark.parametrize("pooling", ["SUM", "MEAN"])
def test_bags_of_several_ids_are_pooled(pooling: str, tmp_path: Path):
    plan = cut_plan(bands=True)
    small = compact_of(plan, pooling=pooling)
    on_ranks.export(small, plan, tmp_path / "out")
    quantised(small, plan)
    features = pairs(batches(0, 256)[0][1])
    with torch.no_grad():
        expected = small.ebc(features)
    lookup = Lookup(tmp_path / "out")
    for name, narrow in lookup(given(features)).items():
        torch.testing.assert_close(lookup.wide(name, narrow), expected[name])


def test_sequences_have_a_row_for_each_id(tmp_path: Path):
    plan = cut_plan("ec.embeddings")
    small = compact_of(plan, Sequences)
    on_ranks.export(small, plan, tmp_path / "out")
    features = pairs(batches(0, 256)[0][1])  # twice as many users as of others
    with torch.no_grad():
        expected = small.ec(features)
    lookup = runpy.run_path(str(tmp_path / "out" / "lookup.py"))["Lookup"](tmp_path / "out")
    assert "import embtrim" not in (tmp_path / "out" / "lookup.py").read_text()
    ids = {name: part.values() for name, part in features.to_dict().items()}
    for name, narrow in lookup({name: (own, torch.ones_like(own)) for name, own in ids.items()}).items():
        assert torch.equal(lookup.wide(name, narrow), expected[name].values()), name
    with pytest.raises(ValueError, match="feature 'user' is not pooled: give each id a bag of its own"):
        lookup(given(features))


@pytest.mark.parametrize("levels", [(32, 32, 32), (8, 8, 8), (16, 4, 3), (2, 8, 32), (8, "bands", 4)])
def test_quantised_models_of_embtrim_run_in_the_kernels(levels: tuple[Any, ...], tmp_path: Path):
    model = model_of("deepfm", schema_of(), uniform_blocks)
    bits = {name: level for name, level in zip(("f0", "f1", "tags"), levels, strict=True) if level != "bands"}
    plan = model.tables.plan.with_bits(bits)
    if "bands" in levels:
        tables, rows = list(plan.tables), np.arange(1, 10, dtype=np.int32)
        parts = ((rows[::2], 8), (rows[1::2], 2))
        blocks = tuple(Block(len(own), (0, 2), "project", own, bits=level) for own, level in parts)
        tables[1] = dataclasses.replace(tables[1], blocks=blocks, bits=8)
        plan = dataclasses.replace(plan, tables=tuple(tables))
    quantised = type(model)(model.schema, plan=plan, **model.hparams).eval()
    quantised.load_state_dict(model.state_dict(), strict=False)
    quantised.tables.quantize_()
    on_ranks.export(
        quantised, plan.shape(), tmp_path / "out"
    )  # ids of the compact tables, as a bundle's encoder gives them
    ids = batch_of(quantised, 50)["ids"]
    slices = dict(zip([f.name for f in model.schema.id_fields], model.schema.column_slices, strict=True))
    parts = {name: ids[:, columns] for name, columns in slices.items()}
    lookup = Lookup(tmp_path / "out")
    found = lookup({name: (part[part >= 0], (part >= 0).sum(1)) for name, part in parts.items()})
    with torch.no_grad():
        expected = quantised.tables(ids).concat.split(list(quantised.tables.widths), 1)
    for field, part in zip(model.schema.id_fields, expected, strict=True):
        torch.testing.assert_close(found[field.name], part, rtol=1e-6, atol=1e-6)
        if field.length == 1 and field.type != "multi":
            assert torch.equal(found[field.name], part), field.name


def test_ids_of_the_full_tables_are_mapped_to_the_rows_of_a_model(tmp_path: Path):
    model = model_of("deepfm", schema_of(multi=False), uniform_blocks)
    on_ranks.export(model, model.tables.plan, tmp_path / "out", bits=8)
    lookup = Lookup(tmp_path / "out")
    full = torch.arange(21)
    found = lookup({name: (full % rows, torch.ones(21).long()) for name, rows in model.schema.tables.items()})
    table = model.tables.plan.tables[1]
    rows = model.tables.get_rows("f1", np.arange(10))[0][1]
    assert torch.equal(
        found["f1"], as_coded(rows, *fit_codes(rows, 8), 8)[torch.from_numpy(table.id_map())[full].long()]
    )


def test_what_cannot_be_exported_is_refused(tmp_path: Path):
    plan, out = cut_plan(), tmp_path / "out"
    small = compact_of(plan)
    with pytest.raises(PlanError, match="export takes the bits of its plan"):
        on_ranks.export(small, plan, out, bits="mixed")
    other = dataclasses.replace(plan, tables=(dataclasses.replace(plan.tables[0], blocks=()), *plan.tables[1:]))
    with pytest.raises(PlanError, match="takes 1 x 0, filled up to 0 columns; the model's is 201 x 4"):
        on_ranks.export(small, other, out)
    with pytest.raises(ModelError, match="has no compact collection"):
        on_ranks.export(make_model(Pooled), plan, out)
    mixed = model_of("deepfm", schema_of(), mixed_blocks)
    with pytest.raises(PlanError, match="'f0' has rows of several widths"):
        on_ranks.export(mixed, mixed.tables.plan, out)
    with pytest.raises(PlanError, match="the plan is not of this model, whose table is 'f0'"):
        on_ranks.export(mixed, plan, out)
    assert not out.exists()
    on_ranks.export(small, plan, out)
    with pytest.raises(BundleError, match="exists; choose another name"):
        on_ranks.export(small, plan, out)
    on_ranks.export(small, plan, out, overwrite=True)
    lookup, one = Lookup(out), torch.ones(1).long()
    features = dict.fromkeys(SIZES, (one, one))
    with pytest.raises(ValueError, match="feature 'ad' is missing"):
        lookup({name: pair for name, pair in features.items() if name != "ad"})
    with pytest.raises(ValueError, match="'ad' has 1 ids, and lengths that add up to 2"):
        lookup({**features, "ad": (one, 2 * one)})
    with pytest.raises(ValueError, match=r"'item' has ids 300..300; 0..299"):
        lookup({**features, "item": (300 * one, one)})


def test_a_collection_that_the_plan_leaves_alone_is_inherited_and_exported(tmp_path: Path):
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = make_model(Pooled).ebc, make_model(Pooled, 1).ebc

    full = Two()
    plan = cut_plan("first.embedding_bags")
    small: Any = on_ranks.compact(Two, plan)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    on_ranks.inherit(full, small, plan)
    for name, value in full.second.state_dict().items():
        assert torch.equal(value, small.second.state_dict()[name])
    on_ranks.export(small, plan, tmp_path / "out")
    assert [
        table["columns"] for table in Lookup(tmp_path / "out").tables if table["name"] == "second.embedding_bags.t_user"
    ] == [list(range(WIDTH))]
