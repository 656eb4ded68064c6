"""Replacements of embeddings give the outputs of the masked modules."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from embtrim.compaction.compacting import compact
from embtrim.tables.replacements import CompactEmbedding, CompactEmbeddingBag, CompactFlatEmbedding
from tests.tasks.foreign_modules import (
    FIELDS,
    FLAT_IDS,
    KINDS,
    OFFSETS,
    PAIRS,
    ROWS,
    WIDTH,
    bag,
    masked_copy,
    ordered_sizes,
    plan_for,
    same,
)


class TestReplacements:
    """With inherited weights they equal the masked module, however it is called."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("padding_idx", [None, 0, 3])
    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("flat", [False, True])
    def test_bags(self, kind: str, padding_idx: int | None, mode: str, flat: bool):
        model = bag(mode=mode, padding_idx=padding_idx)
        with torch.no_grad():
            model[0].weight.normal_()  # padding rows too: a bag does not count them, whatever they hold
        plan = plan_for(model, kind, {"0": FIELDS} if flat else None)
        small = compact(model, plan, "inherit")
        assert isinstance(small[0], CompactEmbeddingBag)
        assert isinstance(small[0].entries, CompactFlatEmbedding if flat else CompactEmbedding)
        same(small, masked_copy(model, plan))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("padding_idx", [None, 0])
    def test_weighted_bags_and_their_gradients(self, kind: str, padding_idx: int | None):
        model = bag(mode="sum", include_last_offset=True, padding_idx=padding_idx)
        plan = plan_for(model, kind)
        small, masked = compact(model, plan, "inherit"), masked_copy(model, plan)
        grads = []
        for module in (small[0], masked[0]):
            weights = torch.linspace(-1, 1, len(FLAT_IDS)).requires_grad_()
            out = module(FLAT_IDS, torch.cat([OFFSETS, OFFSETS.new_tensor([12])]), weights)
            out.square().sum().backward() if out.requires_grad else None
            grads.append((out.detach(), weights.grad))
        assert torch.allclose(grads[0][0], grads[1][0], atol=1e-6)
        if kind != "nothing":
            assert torch.allclose(grads[0][1], grads[1][1], atol=1e-5)

    def test_weights_of_a_mean_are_refused_as_before(self):
        model = bag(mode="mean")
        for kind in ("columns", "nothing"):
            small = compact(model, plan_for(model, kind), "inherit")
            with pytest.raises(NotImplementedError, match="per_sample_weights"):
                small[0](PAIRS, None, torch.ones(4, 3))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("padding_idx", [None, 0, 8])
    def test_embeddings_of_any_shape(self, kind: str, flat: bool, padding_idx: int | None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx))
        plan = plan_for(model, kind, {"0": FIELDS} if flat else None)
        calls = {
            n: ((ids,), {}) for n, ids in enumerate([PAIRS, FLAT_IDS.int(), PAIRS[None], torch.tensor(4), PAIRS[:0]])
        }
        same(compact(model, plan, "inherit"), masked_copy(model, plan), calls)

    @pytest.mark.parametrize("kind", KINDS)
    def test_max_norm_is_kept(self, kind: str):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH, max_norm=3.0, norm_type=1.0))
        plan = plan_for(model, kind)
        same(compact(model, plan, "inherit"), masked_copy(model, plan), {"pairs": ((PAIRS,), {})})
        small = compact(bag(mode="sum", max_norm=0.5), plan_for(bag(max_norm=0.5), "project"), seed=1)
        single = small[0](torch.arange(ROWS)[:, None])
        assert 0.4 < float(single.detach().norm(dim=1).max()) <= 0.5 + 1e-6

    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.slow
    def test_padding_stays_zero_in_training(self, flat: bool):
        for kind in (*KINDS, "sizes"):
            model = nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=0))
            small = compact(model, plan_for(model, kind, {"0": FIELDS} if flat else None), seed=1)
            optimizer = torch.optim.SGD(small.parameters(), lr=1.0)
            for _ in range(2):
                out = small(PAIRS)
                if out.requires_grad:
                    (out - 1).square().sum().backward()
                    optimizer.step()
            assert not small(torch.tensor([0])).any(), kind

    def test_only_the_kept_rows_and_columns_are_stored(self):
        model = bag(mode="sum")
        small = compact(model, plan_for(model, "rows"), "inherit")
        assert [tuple(w.shape) for w in small.parameters()] == [(7, 2)]
        other = compact(model, plan_for(model, "rows"), seed=3)
        other.load_state_dict(small.state_dict())
        assert torch.equal(other[0](PAIRS), small[0](PAIRS))

    def test_sparse_gradients_stay_sparse(self):
        for model in (nn.Sequential(nn.Embedding(ROWS, WIDTH, sparse=True)), bag(mode="sum", sparse=True)):
            small = compact(model, plan_for(model, "rows"), "inherit")
            small[0](PAIRS).sum().backward()
            assert all(p.grad.is_sparse for p in small.parameters())

    def test_a_frozen_table_stays_frozen_and_a_dtype_is_kept(self):
        model = bag(mode="sum").double()
        model[0].weight.requires_grad_(False)
        small = compact(model, plan_for(model, "rows"), "inherit").eval()
        assert all(p.dtype == torch.float64 and not p.requires_grad for p in small.parameters())

    def test_an_id_of_no_row_is_refused(self):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        for kind in ("columns", "rows"):
            small = compact(model, plan_for(model, kind), "inherit")
            for wrong in (-1, ROWS):
                with pytest.raises(IndexError):
                    small(torch.tensor([wrong]))

    @pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Embedding(ROWS, WIDTH)), bag])
    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("kind", ["first", "sizes", "ordered sizes", "nothing"])
    def test_an_id_of_no_row_is_refused_where_no_lookup_would(self, kind: str, flat: bool, make):
        model = make()
        plan = plan_for(model, "nothing" if kind == "ordered sizes" else kind, {"0": FIELDS} if flat else None)
        if kind == "ordered sizes":
            plan = dataclasses.replace(plan, tables=tuple(map(ordered_sizes, plan.tables)))
        small = compact(model, plan)
        small(PAIRS)
        for wrong, local in ((-1, -1), (ROWS, 5 if flat else ROWS)):
            message = None if kind == "sizes" else rf"id {local} is of no row of '0.*'; allowed: 0 to \d+$"
            for ids in ([[0, wrong, 3]], [[wrong]]):
                with pytest.raises(IndexError, match=message):
                    small(torch.tensor(ids))
