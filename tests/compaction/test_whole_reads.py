"""Weights that a model reads without calling their module: tied outputs, products with all rows, indices, penalties."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embtrim.compaction.compacting import compact, quantize_
from embtrim.compaction.verification import verify
from embtrim.config import Config
from embtrim.errors import ModelError
from embtrim.methods import (
    FrequencyConfig,
    GuidedConfig,
    HardMaskConfig,
    OptEmbedConfig,
    PMEConfig,
    SSEDSConfig,
    search,
)
from embtrim.plan.plan import SizePlan
from embtrim.tables.logits import table_logits
from embtrim.tables.ties import Tied
from embtrim.tasks.sites import ModuleSite
from embtrim.tasks.survey import find_sites, survey
from embtrim.tasks.task import Task
from tests.tasks.foreign_modules import FIELDS, KINDS, ROWS, WIDTH, bag, masked_copy, plan_for

NUM_ITEMS, LENGTH, DIM = 60, 5, 8


class Sequential(nn.Module):
    """A next-item model like SASRec: items are looked up in the history, and all of them scored."""

    def __init__(self, score: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.item, self.place = nn.Embedding(NUM_ITEMS, DIM, padding_idx=0), nn.Embedding(LENGTH, DIM)
        self.norm, self.score = nn.LayerNorm(DIM), score
        self.out = nn.Linear(DIM, NUM_ITEMS)
        if score is None:
            self.out.weight = self.item.weight

    def forward(self, ids_BL: Tensor) -> Tensor:
        """(B, items) logits."""
        state_BD = self.norm(self.item(ids_BL) + self.place(torch.arange(LENGTH))).mean(1)
        return self.out(state_BD) if self.score is None else self.score(self, state_BD)


class Factors(nn.Module):
    """BPR-MF whose tables are only read through their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(40, DIM), nn.Embedding(NUM_ITEMS, DIM)

    def forward(self, ids_BC: Tensor) -> Tensor:
        """(B,) margins of a positive over a negative item."""
        user, positive, negative = self.user.weight[ids_BC[:, 0]], *(self.item.weight[ids_BC[:, n]] for n in (1, 2))
        return (user * (positive - negative)).sum(1)

    def full_sort_predict(self, ids_BC: Tensor) -> Tensor:
        """(B, items) scores."""
        return self.user(ids_BC[:, 0]) @ self.item.weight.t()


def cosines(model: Any, state_BD: Tensor) -> Tensor:
    return F.linear(F.normalize(state_BD), F.normalize(model.matrix))


class Held(Sequential):
    """The model itself holds the weight, under a name of its own."""

    def __init__(self) -> None:
        super().__init__(cosines)
        self.matrix = self.item.weight


SCORES: dict[str, Callable[[], nn.Module]] = {
    "tied": Sequential,
    "product": lambda: Sequential(lambda model, state: state @ model.item.weight.T),
    "linear": lambda: Sequential(lambda model, state: F.linear(state, model.item.weight, model.out.bias)),
    "helper": lambda: Sequential(lambda model, state: table_logits(state, model.item)),
    "slice": lambda: Sequential(
        lambda model, state: torch.cat([state.new_zeros(len(state), 1), state @ model.item.weight[1:].T], 1)
    ),
    "tower": lambda: Sequential(lambda model, state: state @ model.norm(model.item.weight).T),  # both towers in one
    "held": Held,
}


def sequences() -> list[tuple[Tensor, Tensor]]:
    """Histories of items that leave the same remainder by 7, and the next item."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(4):
        remainder_B = torch.randint(7, (32, 1), generator=generator)
        ids_BL = 1 + remainder_B + 7 * torch.randint(8, (32, LENGTH), generator=generator)
        found.append((ids_BL, 1 + remainder_B[:, 0]))
    return found


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def bpr(model: nn.Module, batch: Any) -> Tensor:
    penalty = model.item.weight.square().mean() + model.user.weight.norm()  # type: ignore[operator, union-attr]
    return -F.logsigmoid(model(batch)).mean() + 0.01 * penalty


def task_of(make: Callable[[], nn.Module], **given: Any) -> Task:
    def fresh(seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return make()

    if make is Factors:
        generator = torch.Generator().manual_seed(0)
        batches: list[Any] = [torch.randint(40, (64, 3), generator=generator) for _ in range(4)]
        given = {"loss": bpr, "train": batches, "valid": batches[:1], **given}
    else:
        given = {"loss": entropy, "train": sequences(), "valid": sequences()[:1], **given}
    makes = {"optimizer": lambda model: torch.optim.Adam(model.parameters(), 0.01), "fresh": fresh}
    return Task(fresh(0), **{**makes, **given})  # type: ignore[arg-type]


class TestWeights:
    """The weight of a compact table is that of the masked module, in value and gradient."""

    READS: dict[str, Callable[[Any, Tensor], Tensor]] = {  # noqa: RUF012 (nothing changes it)
        "product": lambda weight, z: z @ weight.T,
        "other product": lambda weight, z: weight @ z.t(),
        "vector": lambda weight, z: weight.matmul(z[0]),
        "linear": lambda weight, z: F.linear(z, weight, torch.arange(ROWS).float()),
        "transposed twice": lambda weight, z: torch.mm(z, weight.transpose(0, 1).t().transpose(-1, -2)),
        "index": lambda weight, z: weight[torch.tensor([[0, 3], [ROWS - 1, -1]])],
        "number": lambda weight, z: weight[3] + weight[[1, 2]],
        "functional": lambda weight, z: F.embedding(torch.tensor([0, 5, 5]), weight),
        "index_select": lambda weight, z: weight.index_select(0, torch.tensor([4, 0])),
        "mask": lambda weight, z: weight[torch.arange(ROWS) % 2 == 0, 1:],
        "whole": lambda weight, z: torch.cat([weight, weight * 2]).norm(dim=1),
        "beside Python": lambda weight, z: (
            torch.func.functional_call(nn.Linear(WIDTH, ROWS), {"weight": weight}, (z,))
            - nn.Linear(WIDTH, ROWS).bias * 0
        ),
        "function of one's own": lambda weight, z: Doubled.apply(weight) @ z.T,
        "detached": lambda weight, z: z @ weight.detach().T + weight.data.sum() + weight[0].sum(),
    }

    @pytest.mark.parametrize("kind", [*KINDS, "sizes"])
    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("padding_idx", [None, 3])
    def test_of_every_kind(self, kind: str, flat: bool, padding_idx: int | None):
        for make in (lambda: nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx)), bag):
            model = make()
            plan = plan_for(model, kind, {"0": FIELDS} if flat else None)
            small = compact(model, plan, "scratch" if kind == "sizes" else "inherit")
            if kind != "sizes":
                assert torch.equal(small[0].weight + 0, masked_copy(model, plan)[0].weight)
            for name, read in self.READS.items():
                self.same(read, small[0], name)

    @staticmethod
    def same(read: Callable[[Any, Tensor], Tensor], table: Any, name: str) -> None:
        params, found = list(table.parameters()), []
        for lazy in (True, False):
            torch.manual_seed(0)
            z = torch.randn(2, WIDTH).requires_grad_()
            out = read(table.weight if lazy else table.all_rows(), z)
            assert type(out) is Tensor
            total = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + 0 * z.sum()
            found.append([out, *torch.autograd.grad(total, [*params, z], allow_unused=True)])
        for one, other in zip(*found, strict=True):
            if one is None or other is None:  # where nothing is stored
                assert not any(x is not None and x.any() for x in (one, other)), name
            else:
                assert torch.allclose(one, other, atol=1e-5), name

    @pytest.mark.parametrize("bits", [16, 8, 4])
    def test_codes_are_decoded(self, bits: int, monkeypatch):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        for kind in ("rows", "project", "sizes"):
            small = compact(model, plan_for(model, kind).with_bits(bits)).eval()
            quantize_(small)
            monkeypatch.setattr("embtrim.tables.replacements.CHUNK_ROWS", 4)
            looked_up = small[0](torch.arange(ROWS))
            assert torch.equal(small[0].weight + 0, looked_up)
            z = torch.randn(3, WIDTH)
            assert torch.allclose(z @ small[0].weight.T, z @ looked_up.T, atol=1e-5)
            assert small[0].weight.dtype == torch.float32
            with pytest.raises(ModelError, match="quantised, for inference only"):
                _ = small.train()[0].weight + 0

    def test_a_gradient_reaches_the_padding_row_as_in_the_module(self):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH, padding_idx=0))
        small = compact(model, plan_for(model, "first"), "inherit")
        (small[0](torch.tensor([0, 1])).sum() + small[0].weight[torch.tensor([0])].sum() * 3).backward()
        assert small[0].weights[0].grad[0].tolist() == [3.0, 3.0]

    @pytest.mark.parametrize(
        "write",
        [
            lambda weight: nn.init.normal_(weight),
            lambda weight: weight.data.zero_(),
            lambda weight: weight.detach().__setitem__(0, 0.0),
            lambda weight: weight.requires_grad_(False),
            lambda weight: weight.__iadd__(1.0),
            lambda weight: torch.add(torch.ones(ROWS, WIDTH), 1, out=weight.data),
            lambda weight: setattr(weight, "data", torch.zeros(ROWS, WIDTH)),
        ],
    )
    def test_writing_to_it_is_refused(self, write):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        small = compact(model, plan_for(model, "rows"))
        with (
            torch.no_grad(),
            pytest.raises(ModelError, match="the weight of '0' is computed as it is read, and writing"),
        ):
            write(small[0].weight)

    def test_what_it_is_costs_nothing(self, monkeypatch):
        model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        small = compact(model, plan_for(model, "rows"))
        monkeypatch.setattr(type(small[0]), "all_rows", lambda self: pytest.fail("all rows were computed"))
        weight = small[0].weight
        assert (weight.shape, weight.dtype, weight.device.type, len(weight)) == (
            (ROWS, WIDTH),
            torch.float32,
            "cpu",
            ROWS,
        )
        assert weight.requires_grad
        assert "the weight of '0', 12 x 4" in repr(weight)
        _ = torch.randn(2, WIDTH) @ weight.T + F.linear(torch.randn(2, WIDTH), weight) + weight[2].sum()
        with pytest.raises(ValueError, match="non-leaf"):
            torch.optim.SGD([weight], 0.1)
        with pytest.raises(IndexError):
            weight[torch.tensor([ROWS])]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


class TestGates:
    """Gates reach every read of a weight."""

    @pytest.mark.parametrize("make", [*SCORES.values(), Factors], ids=[*SCORES, "factors"])
    def test_slot_gates_equal_masks(self, make):
        task = task_of(make)
        batch = next(iter(task.batches("train")))
        for fields in (None, {"item": {"a": 20, "b": NUM_ITEMS - 20}}):
            model = copy.deepcopy(task.model)
            site = next(s for s in find_sites(model, fields=fields) if s.names[0].startswith("item"))
            assert isinstance(site, ModuleSite)
            gate = torch.rand(len(site.names), DIM)
            with site.gated(gate.flatten()):
                found = task.loss(model, batch)
                state = model.state_dict()
            with site.gated(partial(torch.mul, gate.flatten())):
                assert torch.allclose(task.loss(model, batch), found, atol=1e-6)
            assert torch.equal(state["item.weight"], task.model.state_dict()["item.weight"])
            with torch.no_grad():
                model.item.weight.mul_(gate.repeat_interleave(torch.tensor(site.num_rows), 0))
            assert torch.allclose(task.loss(model, batch), found, atol=1e-6)
            assert type(model.item) is nn.Embedding

    @pytest.mark.parametrize("make", [*SCORES.values(), Factors], ids=[*SCORES, "factors"])
    def test_row_gates_read_the_gradient_of_the_weight(self, make):
        task = task_of(make)
        batch, model, leaves = next(iter(task.batches("train"))), task.model, []

        def read(rows_U: Tensor, found_UD: Tensor) -> Tensor:
            assert torch.equal(found_UD, site.weight[rows_U])
            leaves.append((rows_U, found_UD.detach().requires_grad_()))
            return leaves[-1][1]

        site = next(s for s in find_sites(model) if s.names == ("item",))
        assert isinstance(site, ModuleSite)
        with site.gated(rows=read):
            loss = task.loss(model, batch)
        total_VD = torch.zeros(NUM_ITEMS, DIM)
        for (rows_U, _), grad in zip(
            leaves, torch.autograd.grad(loss, [leaf for _, leaf in leaves], allow_unused=True), strict=True
        ):
            total_VD[rows_U] += 0 if grad is None else grad
        (expected,) = torch.autograd.grad(task.loss(model, batch), model.item.weight)  # type: ignore[union-attr]
        expected[0] = total_VD[0]  # a lookup gives the padding row no gradient
        assert torch.allclose(total_VD, expected, atol=1e-6)

    def test_a_function_of_ones_own_that_takes_the_weight_is_refused(self):
        task = task_of(lambda: Sequential(lambda model, state: state @ Doubled.apply(model.item.weight).T))
        with pytest.raises(ModelError, match=r"autograd.Function, .* takes the weight of 'item'.* exclude="):
            search(task, SSEDSConfig(), "50%")
        plan = search(task_of(Sequential), FrequencyConfig(), "50%")
        assert verify(task.model, plan, task).passed

    def test_a_gate_by_sample_is_refused(self):
        task = task_of(SCORES["product"])
        site = find_sites(task.model)[0]
        with (
            site.gated(torch.ones(32, DIM)),
            pytest.raises(ModelError, match="'item' is read whole, which has no samples"),
        ):
            task.loss(task.model, next(iter(task.batches("train"))))


class TestModels:
    """Such models are searched, compacted, verified, trained, quantised and saved like others."""

    @pytest.mark.parametrize("make", [*SCORES.values(), Factors], ids=[*SCORES, "factors"])
    @pytest.mark.parametrize(
        "config", [SSEDSConfig(), GuidedConfig(), FrequencyConfig(), PMEConfig()], ids=lambda c: type(c).__name__
    )
    def test_all_the_way(self, make, config: Config):
        task = task_of(make)
        task.fit(task.model, 8, 0)
        plan = search(task, config, "25%", bits=8)
        assert plan.tables[0].name in ("item", "user")
        assert plan.num_bytes() / task.full_plan().num_bytes() <= 0.25 + 1e-6
        assert verify(task.model, plan, task).passed
        small = compact(task.model, plan, "scratch" if isinstance(config, PMEConfig) else "inherit")
        before = task.valid_score(small)
        task.fit(small, 3, 0)
        assert task.valid_score(small) > before
        quantize_(small.eval())
        again = compact(task.model, plan, seed=5).eval()
        again.load_state_dict(small.state_dict())
        batch = next(iter(task.batches("train")))
        assert torch.equal(task.loss(again, batch), task.loss(small, batch))

    @pytest.mark.parametrize(
        "config", [HardMaskConfig(epochs=1), OptEmbedConfig(epochs=1)], ids=lambda c: type(c).__name__
    )
    def test_methods_that_train(self, config: Config):
        task = task_of(Sequential)
        plan = search(task, config, "40%")
        assert verify(task.model, plan, task).passed

    def test_the_parts_of_a_plan_see_the_output(self):
        """The output alone reads the item table here: its best column is the one whose gate the loss feels."""
        task = task_of(lambda: Sequential(lambda model, state: state.detach() @ model.item.weight.T))
        with torch.no_grad():
            task.model.item.weight.mul_(torch.tensor([3.0] + [0.01] * (DIM - 1)))  # type: ignore[union-attr]
        plan = search(task, SSEDSConfig(score="abs"), "30%")
        assert 0 in plan.tables[0].columns

    def test_one_storage_is_trained(self):
        task = task_of(Sequential)
        small = compact(task.model, search(task, SSEDSConfig(), "40%"), "inherit")
        assert isinstance(small.out, Tied)
        assert isinstance(small.out, nn.Linear)
        names = [name for name, _ in small.named_parameters()]
        assert [n for n in names if "item" in n or "out" in n] == ["item.weights.0", "out.bias"]
        assert sum(p.numel() for p in small.item.parameters()) < 0.5 * NUM_ITEMS * DIM
        stored = small.item.weights[0]
        before = stored.detach().clone()
        optimizer = torch.optim.SGD(small.parameters(), 0.1)
        small(sequences()[0][0]).square().sum().backward()
        optimizer.step()
        assert not torch.equal(stored, before)
        assert torch.equal(small.out.weight + 0, small.item.weight + 0)
        assert "TiedLinear(in_features=8" in repr(small)

    @pytest.mark.parametrize("make", [Sequential, Held], ids=["tied", "held"])
    @pytest.mark.parametrize("rows", [False, True])
    def test_copies_and_files_keep_the_tie(self, make, rows: bool):
        task = task_of(make)
        small = compact(task.model, search(task, FrequencyConfig() if rows else SSEDSConfig(), "40%"), "inherit").eval()
        ids = sequences()[0][0]
        file = io.BytesIO()
        torch.save(small, file)
        file.seek(0)
        for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.load(file, weights_only=False)):
            assert torch.equal(again(ids), small(ids))
            reader = again if make is Held else again.out
            assert list(reader.tied_tables.values()) == [again.item]
            assert reader.tied_tables is not (small if make is Held else small.out).tied_tables
            with torch.no_grad():
                again.item.weights[0].zero_()
            assert not torch.equal(again(ids), small(ids))

    def test_a_tied_model_exports(self):
        task = task_of(Sequential)
        for config, bits in ((SSEDSConfig(), 32), (FrequencyConfig(), 8)):
            small = compact(task.model, search(task, config, "40%", bits=bits), "inherit").eval()
            if bits == 8:
                quantize_(small)
            ids = sequences()[0][0]
            program = torch.export.export(small, (ids,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
            assert torch.allclose(program.module()(ids[:7]), small(ids[:7]), atol=1e-5)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
    @pytest.mark.parametrize("make", [*SCORES.values(), Factors], ids=[*SCORES, "factors"])
    def test_traces_and_compiled_models_give_the_same(self, make):
        task = task_of(make)
        plan = search(task, SSEDSConfig(align="project"), "40%")
        small = compact(task.model, plan, "low_rank", task=task).eval()
        batch = next(iter(task.batches("train")))
        ids = batch if make is Factors else batch[0]
        traced = torch.jit.trace(small, (ids,))
        assert torch.allclose(traced(ids), small(ids), atol=1e-5)
        torch._dynamo.reset()
        compiled = torch.compile(small, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(ids), small(ids), atol=1e-5)
        torch._dynamo.reset()

    def test_rows_that_are_indexed_are_counted(self):
        task = task_of(Factors)
        counts = task.row_counts()
        whole = 4  # the penalty reads all rows once a batch
        assert (counts["user"] - whole).sum() == 4 * 64
        assert (counts["item"] - whole).sum() == 2 * 4 * 64
        assert task.unread_tables() == []
        product = task_of(SCORES["product"]).row_counts()["item"]
        assert product.sum() == 4 * (32 * LENGTH + NUM_ITEMS)

    def test_a_weight_that_two_ways_read_is_one_table(self):
        class Both(Sequential):
            def __init__(self) -> None:
                super().__init__()
                self.target = nn.Embedding(NUM_ITEMS, DIM, padding_idx=0)
                self.target.weight = self.item.weight
                self.penalized = [self.item.weight]

            def forward(self, ids_BL: Tensor) -> Tensor:
                return super().forward(ids_BL) + (self.target(ids_BL[:, 0]) @ self.item.weight.T)

        task = task_of(Both)
        for config in (SSEDSConfig(), PMEConfig()):
            plan = search(task, config, "40%")
            assert [table.name for table in plan.tables] == ["item", "place"]
            assert verify(task.model, plan, task).passed
            small = compact(task.model, plan)
            assert small.item is small.target
            assert small.penalized == list(small.item.weights)


class TestLeft:
    """What cannot be read from a compact table is left alone or refused."""

    def test_max_norm(self):
        class Limited(Sequential):
            def __init__(self, score: Any = None) -> None:
                super().__init__(score)
                self.item.max_norm = 1.0

        (note,) = [f.note for f in survey(Limited()) if f.name == "item"]
        assert note == "out, a Linear, reads its weight too, whose rows max_norm changes as they are looked up"
        task = task_of(lambda: Limited(lambda model, state: state @ model.item.weight.T))
        with pytest.raises(ModelError, match=r"'item' has a max_norm, .* its weight is read otherwise too; .*exclude="):
            search(task, SSEDSConfig(), "50%")
        task = task_of(lambda: Limited(lambda model, state: state @ model.item.weight.T), exclude="item")
        assert [table.name for table in search(task, SSEDSConfig(), "50%").tables] == ["place"]

    def test_an_embedding_that_holds_it_twice(self):
        model = Sequential(lambda model, state: state)
        model.item.same = model.item.weight
        assert survey(model)[0].note == "item, a Embedding, holds its weight as 'same' too"

    def test_a_loss_that_reads_the_weight_of_another_model(self):
        task = task_of(lambda: Sequential(lambda model, state: state))
        full = task.model
        task.loss = lambda model, batch: F.cross_entropy(model(batch[0]) @ full.item.weight.T, batch[1])  # type: ignore[union-attr]
        with pytest.raises(
            ModelError, match=r"copy of the model reads 'item' of the model itself.* loss= read the model"
        ):
            search(task, SSEDSConfig(), "50%")


def test_a_plan_for_other_sizes_of_rows_is_looked_up_and_multiplied() -> None:
    model = Sequential()
    plan = search(task_of(Sequential), PMEConfig(), "30%")
    assert isinstance(plan, SizePlan)
    assert verify(model, plan, task_of(Sequential)).against == "lookup"
