"""Compact foreign tables in 16 bits and fewer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import compact, quantize_
from embtrim.compaction.foreign import compact_tables
from embtrim.compaction.verification import verify
from embtrim.errors import EmbtrimError
from embtrim.methods import FrequencyConfig, PMEConfig, UniformConfig, search
from embtrim.plan.table import Block
from embtrim.tables.codes import codes_of
from embtrim.tables.packing import fit_codes
from embtrim.tables.replacements import CompactEmbedding
from embtrim.tasks.task import Task
from embtrim.testing.toys import foreign_task, odd_task, pooled_task
from tests.tasks.foreign_modules import FIELDS, KINDS, PAIRS, ROWS, WIDTH, Owner, bag, plan_for, same


def quantized_rows(compacted: CompactEmbedding, count_V: np.ndarray | None = None) -> Tensor:
    """Rows that the ids of a quantised table read, at width D, straight from the definition of the codes."""
    used = None
    if count_V is not None:
        used = torch.zeros(sum(map(len, compacted.weights)))
        used.index_add_(0, compacted.rows_of(torch.arange(len(count_V))).long(), torch.from_numpy(count_V).float())
    rows = []
    for width in {weight.shape[1] for weight in compacted.weights}:
        together = torch.cat([w for w in compacted.weights if w.shape[1] == width]).detach()
        counts = None
        if used is not None:
            parts = zip(compacted.weights, used.split([len(w) for w in compacted.weights]), strict=True)
            counts = torch.cat([part for w, part in parts if w.shape[1] == width])
        if compacted.bits == 16:
            rows.append((width, together.half().float()))
            continue
        scale, offset = fit_codes(together, compacted.bits, counts)
        rows.append((width, codes_of(together, scale, offset, compacted.bits) * scale + offset))
    by_width = dict(rows)
    read = dict.fromkeys(by_width, 0)
    parts = []
    for weight in compacted.weights:
        width, start = weight.shape[1], read[weight.shape[1]]
        parts.append(compacted.widen(by_width[width][start : start + len(weight)], width))
        read[width] = start + len(weight)
    return torch.cat(parts)[compacted.rows_of(torch.arange(compacted.num_embeddings)).long()]


class TestBits:
    """Tables of a foreign model in 16 bits and fewer."""

    @pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
    @pytest.mark.parametrize("kind", [*KINDS, "sizes", "one size twice"])
    @pytest.mark.parametrize("flat", [False, True])
    def test_reads_are_those_of_the_codes_and_bytes_those_of_the_plan(self, bits: int, kind: str, flat: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        fields = {"0": FIELDS} if flat else None
        if kind == "one size twice":
            plan = plan_for(model, "nothing", fields)
            blocks = tuple(
                Block(1, size, "project", np.array([row], np.int32)) for row, size in enumerate((4, 2, 4, 2))
            )
            plan = dataclasses.replace(plan, tables=tuple(dataclasses.replace(t, blocks=blocks) for t in plan.tables))
        else:
            plan = plan_for(model, kind, fields)
        plan = plan.with_bits(bits)
        small = compact(model, plan, seed=0)
        with torch.no_grad():
            for name, p in small.named_parameters():
                p.normal_()
                if ".projections." in name:
                    p.copy_(p.half())  # as they are stored
            tables = compact_tables(small, plan)
            uses = {t.path: np.arange(t.num_embeddings) ** 4 for t in tables} if bits == 3 else None
            expected = torch.cat([quantized_rows(t, uses and uses[t.path]) for t in tables])
            quantize_(small, uses)
            assert torch.equal(small.eval()(PAIRS), expected[PAIRS])
        assert sum(v.nbytes for v in small.state_dict().values()) == plan.num_bytes()

    @pytest.mark.parametrize("bits", [16, 8, 4])
    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("padding_idx", [None, 0, 3])
    def test_bags_pool_what_their_entries_read(self, bits: int, mode: str, padding_idx: int | None):
        model = bag(mode=mode, padding_idx=padding_idx)
        plan = plan_for(model, "rows").with_bits(bits)
        small = compact(model, plan, seed=0).eval()
        quantize_(small)
        stands_for = bag(mode=mode, padding_idx=padding_idx)
        with torch.no_grad():
            stands_for[0].weight.copy_(small[0].entries(torch.arange(ROWS)))
            same(small, stands_for)

    def test_a_padding_row_stays_zero(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=0))  # of both signs: zero is not a code
        for bits in (16, 8, 4):
            small = compact(model, plan_for(model, "columns").with_bits(bits), "inherit").eval()
            quantize_(small)
            assert not small(torch.tensor([0])).any()
            assert small(torch.tensor([1])).any()

    def test_state_is_saved_and_loaded(self, tmp_path: Path):
        task = pooled_task()
        plan = search(task, PMEConfig(), "50%", bits=8)
        small = compact(task.model, plan, seed=1).eval()
        quantize_(small)
        torch.save(small.state_dict(), tmp_path / "small.pt")
        torch.save(small, tmp_path / "module.pt")
        again = compact(task.model, plan, seed=2).eval()
        again.load_state_dict(torch.load(tmp_path / "small.pt"))
        ids, _ = next(iter(task.batches("valid")))
        assert torch.equal(again(ids), small(ids))
        assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(ids), small(ids))
        tables = [t for name, t in small.state_dict().items() if not name.startswith("head") and "recent" not in name]
        assert sum(t.nbytes for t in tables) == plan.num_bytes()

    @pytest.mark.parametrize("saved_is_zero", [False, True])
    def test_loaded_padding_reads_what_was_saved(self, saved_is_zero: bool):
        """The padding row of the module that loads the state does not matter."""
        torch.manual_seed(0)
        zero, other = (nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=3)) for _ in range(2))
        with torch.no_grad():
            other[0].weight.normal_()
        plan = plan_for(zero, "columns").with_bits(8)
        small, into, quantized = (compact(m, plan, "inherit").eval() for m in (zero, other, other))
        if not saved_is_zero:
            small, into, quantized = into, small, compact(zero, plan, "inherit").eval()
        quantize_(small)
        quantize_(quantized)
        assert bool(small(torch.tensor(3)).any()) != saved_is_zero
        for again in (into, quantized):
            again.load_state_dict(small.state_dict())
            assert torch.equal(again(PAIRS), small(PAIRS))
        assert sum(v.nbytes for v in small.state_dict().values()) == plan.num_bytes()

    def test_is_for_inference_and_once(self):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        small = compact(model, plan_for(model, "rows").with_bits(8), "inherit")
        small(PAIRS).sum().backward()
        quantize_(small)
        assert not list(small.parameters())
        with pytest.raises(EmbtrimError, match="'0' is quantised, for inference only"):
            small(PAIRS)
        with torch.no_grad():
            small(PAIRS)
        small.eval()(PAIRS)
        with pytest.raises(EmbtrimError, match="quantised already"):
            quantize_(small)
        with pytest.raises(EmbtrimError, match=r"no compact table of fewer than 32 bits; .* plan\.with_bits\(8\)"):
            quantize_(compact(model, plan_for(model, "rows")))
        with pytest.raises(EmbtrimError, match="no compact table"):
            quantize_(model)

    def test_a_weight_in_a_list_is_emptied(self):
        model = Owner()
        small = compact(model, plan_for(model, "columns").with_bits(8), "inherit")
        quantize_(small)
        assert small.penalized[0].numel() == 0

    def test_a_model_of_doubles_stays_one(self):
        model = bag(mode="sum").double()
        small = compact(model, plan_for(model, "sizes").with_bits(8)).eval()
        quantize_(small)
        assert small(PAIRS).dtype == torch.float64

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [foreign_task, pooled_task, odd_task])
    @pytest.mark.parametrize("bits", [16, 8, 4, "mixed"])
    def test_a_search_fills_its_budget(self, make: Callable[[], Task], bits):
        task = make()
        for config in (UniformConfig(), PMEConfig(), FrequencyConfig()):
            plan = search(task, config, "230 bytes", bits=bits)
            assert 100 < plan.num_bytes() <= 230
            assert verify(task.model, plan, task).passed
            small = compact(task.model, plan).eval()
            quantize_(small)
            stored = [v for t in compact_tables(small, plan) for v in t.state_dict().values()]
            assert sum(v.nbytes for v in stored) == plan.num_bytes()

    def test_a_trained_model_loses_little(self):
        task = foreign_task()
        task.fit(task.model, epochs=40, seed=0)
        losses = []
        for bits in (32, 8, 4):
            small = compact(task.model, task.full_plan().with_bits(bits), "inherit").eval()
            if bits < 32:
                quantize_(small)
            losses.append(-task.valid_score(small))
        assert losses[0] == pytest.approx(-task.valid_score(task.model))
        assert losses[0] < losses[1] == pytest.approx(losses[0], rel=0.02)
        assert losses[2] < 0.5 * task_loss_untrained()


def task_loss_untrained() -> float:
    task = foreign_task()
    return -task.valid_score(task.model)
