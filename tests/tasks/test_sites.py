"""Gates on the sites of foreign modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from embtrim.tasks.sites import ModuleSite, gate_sites
from embtrim.tasks.survey import find_sites
from embtrim.testing.toys import PooledModel, pooled_task
from tests.tasks.foreign_modules import BAG_CALLS, FIELDS, PAIRS, ROWS, WIDTH, bag


class TestGates:
    """Gates equal explicit masks of the weights."""

    @pytest.mark.parametrize("call", BAG_CALLS)
    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("padding_idx", [None, 3])
    def test_row_gates_read_the_gradient_of_the_rows(self, call: str, mode: str, padding_idx: int | None):
        args, kwargs = BAG_CALLS[call]
        model = bag(mode=mode, padding_idx=padding_idx)
        (site,) = find_sites(model)
        leaves = []

        def read(rows_U: Tensor, found_UD: Tensor) -> Tensor:
            leaves.append((rows_U, found_UD.detach().requires_grad_()))
            return leaves[-1][1]

        plain = model[0](*args, **kwargs)
        with site.gated(rows=read):
            gated = model[0](*args, **kwargs)
        assert torch.allclose(gated, plain, atol=1e-6)
        (rows_U, leaf), upstream = leaves[0], torch.randn(plain.shape)
        (plain * upstream).sum().backward()
        (grad_UD,) = torch.autograd.grad((gated * upstream).sum(), leaf)
        assert torch.allclose(grad_UD, model[0].weight.grad[rows_U.long()], atol=1e-5)

    @pytest.mark.parametrize("call", BAG_CALLS)
    def test_slot_gates_of_a_flat_table_act_on_each_field(self, call: str):
        args, kwargs = BAG_CALLS[call]
        model = bag(mode="mean")
        (site,) = find_sites(model, fields={"0": FIELDS})
        gate = torch.rand(2, WIDTH)
        masked = copy.deepcopy(model)
        with torch.no_grad():
            masked[0].weight[:7] *= gate[0]
            masked[0].weight[7:] *= gate[1]
        expected = masked[0](*args, **kwargs)
        for slots in (gate.flatten(), gate.flatten().expand(len(expected), -1), lambda ones: ones * gate.flatten()):
            with site.gated(slots):
                assert torch.allclose(model[0](*args, **kwargs), expected, atol=1e-6)

    def test_slot_gates_may_differ_by_sample(self):
        torch.manual_seed(0)
        gate_BS = torch.rand(3, 2 * WIDTH)
        ids, offsets = torch.tensor([0, 8, 3, 9]), torch.tensor([0, 1, 3])
        sample, field = torch.tensor([0, 1, 1, 2]), (ids >= 7).long()
        pooled, single = bag(mode="sum"), nn.Sequential(nn.Embedding(ROWS, WIDTH))
        expected = pooled[0].weight[ids] * gate_BS.view(3, 2, WIDTH)[sample, field]
        with find_sites(pooled, fields={"0": FIELDS})[0].gated(gate_BS):
            found = pooled[0](ids, offsets)
        assert torch.allclose(found, torch.stack([expected[0], expected[1] + expected[2], expected[3]]))
        sequences = PAIRS[:3]
        (site,) = find_sites(single)
        expected = single[0].weight[sequences] * gate_BS[:, None, :WIDTH]
        with site.gated(gate_BS[:, :WIDTH]):
            assert torch.allclose(single(sequences), expected)

    @pytest.mark.parametrize(
        "make", [lambda: nn.Sequential(nn.Embedding(ROWS, WIDTH, sparse=True)), lambda: bag(sparse=True)]
    )
    def test_sparse_gradients_stay_sparse_under_a_gate(self, make):
        model = make()
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        before = model[0].weight.detach().clone()
        for fields, gates in (
            (None, {"rows": lambda _, found: found}),
            ({"0": FIELDS}, {"slots": torch.ones(2 * WIDTH)}),
        ):
            (site,) = find_sites(model, fields=fields)
            optimizer.zero_grad()
            with site.gated(**gates):
                model(PAIRS).sum().backward()
            optimizer.step()
        changed = (model[0].weight.detach() != before).any(1)
        assert changed.nonzero().flatten().tolist() == PAIRS.unique().tolist()

    def test_flat_rows_are_counted_by_field(self):
        task = pooled_task()
        counts = task.row_counts()
        assert {name: len(v) for name, v in counts.items()} == {"flat[user]": 40, "flat[city]": 12, "history": 25}
        ids = torch.cat([ids for ids, _ in task.batches("train")])
        assert counts["flat[user]"].tolist() == torch.bincount(ids[:, 0], minlength=40).tolist()
        assert counts["flat[city]"].tolist() == torch.bincount(ids[:, 0] % 12, minlength=12).tolist()
        both = torch.cat([ids[:, 1:].flatten(), ids[:, 2]])
        assert counts["history"].tolist() == torch.bincount(both, minlength=25).tolist()

    def test_reserved_rows_belong_to_their_field(self):
        site = ModuleSite("0", nn.Embedding(ROWS, WIDTH, padding_idx=8), FIELDS)
        assert site.reserved_rows == (None, 1)
        site.drop_rows([torch.ones(7, dtype=torch.bool), torch.tensor([True, True, False, True, True])])
        assert [bool(row.any()) for row in site.weights()[1]] == [True, False, False, True, True]

    def test_nothing_is_left_after_gating(self):
        model = PooledModel()
        sites = find_sites(model)
        with gate_sites(sites, rows=[lambda _, found: found] * len(sites)):
            assert len(model.recent._forward_hooks) == 1
        assert not any(m._forward_hooks for m in model.modules())
