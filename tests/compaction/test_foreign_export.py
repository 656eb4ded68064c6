"""torch's own exporters take compact foreign modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from embtrim.compaction.compacting import compact, quantize_
from embtrim.methods import FrequencyConfig, PMEConfig, RandomConfig, search
from embtrim.tables.pooling import pool_entries
from embtrim.tasks.task import Task
from embtrim.testing.toys import ForeignModel, PooledModel, foreign_batches, foreign_task, pooled_task
from tests.tasks.foreign_modules import FIELDS, FLAT_IDS, KINDS, PAIRS, ROWS, WIDTH, bag, plan_for

EXPORTED = {"plain": (ForeignModel, None), "flat": (PooledModel, {"flat": {"user": 40, "city": 12}})}


class TestExporters:
    """torch's own exporters take compact modules, quantised ones too."""

    @pytest.fixture(params=[*EXPORTED])
    def task(self, request) -> Task:
        return foreign_task(*EXPORTED[request.param])

    def small(self, task: Task, kind: str, bits: int) -> nn.Module:
        config = PMEConfig() if kind == "sizes" else RandomConfig()
        plan = search(task, FrequencyConfig() if kind == "rows" else config, "50%", bits=bits)
        small = compact(task.model, plan, seed=0).eval()
        if bits < 32:
            quantize_(small)
        return small

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "bits", "strict"),
        [("columns", 32, False), ("rows", 32, True), ("sizes", 32, False), ("sizes", 8, False), ("rows", 4, False)],
    )
    def test_torch_export(self, task: Task, kind: str, bits: int, strict: bool):
        small = self.small(task, kind, bits)
        ids, _ = next(foreign_batches())
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(small, (ids[:8],), dynamic_shapes=shapes, strict=strict).module()
        assert torch.allclose(program(ids), small(ids), atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
    @pytest.mark.parametrize("bits", [32, 4])
    def test_onnx(self, bits: int, tmp_path: Path):
        onnxruntime = pytest.importorskip("onnxruntime")
        small = self.small(pooled_task(), "rows", bits)
        ids, _ = next(foreign_batches())
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            small, (ids[:8],), str(tmp_path / "m.onnx"), dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        assert np.abs(found - small(ids).detach().numpy()).max() < 1e-5

    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("padding_idx", [None, 0])
    def test_bags_are_pooled_the_same(self, mode: str, padding_idx: int | None, monkeypatch):
        module, entries = bag(mode=mode, padding_idx=padding_idx)[0], torch.randn(4, 3, WIDTH)
        weights = torch.randn(4, 3) if mode == "sum" else None
        given = [(entries, PAIRS, None, weights)]
        flat = (entries.flatten(0, 1), PAIRS.flatten(), torch.tensor([0, 0, 2, 7]))
        given.append((*flat, None if weights is None else weights.flatten()))
        expected = [pool_entries(module, *call) for call in given]
        monkeypatch.setattr("embtrim.tables.pooling.is_exporting", lambda: True)
        monkeypatch.delattr("torch.nn.functional.embedding_bag")  # it would fix the number of ids
        for call, pooled in zip(given, expected, strict=True):
            assert torch.allclose(pool_entries(module, *call), pooled, atol=1e-6)
        module.include_last_offset = True
        ends = torch.tensor([0, 0, 2, 7, 12])
        assert torch.allclose(pool_entries(module, *flat[:2], ends, given[1][-1]), expected[1], atol=1e-6)

    @pytest.mark.parametrize("kind", ["columns", "rows"])
    def test_quantised_bags_with_offsets_have_dynamic_sizes(self, kind: str):
        model = bag(mode="mean", padding_idx=0)
        small = compact(model, plan_for(model, kind).with_bits(8), "inherit").eval()
        quantize_(small)
        shapes = {"input": {0: torch.export.Dim("ids")}, "offsets": {0: torch.export.Dim("bags")}}
        program = torch.export.export(small[0], (FLAT_IDS, torch.tensor([0, 2, 2, 7])), dynamic_shapes=shapes).module()
        ids, offsets = FLAT_IDS[:5], torch.tensor([0, 1, 1])
        assert torch.allclose(program(ids, offsets), small[0](ids, offsets), atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("padding_idx", [None, 0, 8])
    def test_fixed_shapes_give_the_same(self, kind: str, padding_idx: int | None):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx))
        (flat,) = compact(model, plan_for(model, kind, {"0": FIELDS}), seed=0)
        for ids in (torch.arange(ROWS), FLAT_IDS.int(), PAIRS[None], torch.tensor(4), PAIRS[:0]):
            assert torch.equal(flat._forward_fixed(ids), flat(ids))
        if kind == "columns":
            for wrong in (-1, ROWS):
                with pytest.raises(IndexError):
                    flat._forward_fixed(torch.tensor([wrong]))
