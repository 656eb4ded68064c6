"""Modules as strangers bring them: with NaN, with tables that nothing reads, with their own modes, or refusing a copy."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.config import Config
from embtrim.errors import EmbtrimError, ModelError, PlanError
from embtrim.methods import (
    FrequencyConfig,
    GuidedConfig,
    HardMaskConfig,
    MagnitudeConfig,
    OptEmbedConfig,
    PMEConfig,
    RandomConfig,
    SSEDSConfig,
    search,
)
from embtrim.plan.plan import SizePlan
from embtrim.system.modules import copied, evaluating
from embtrim.tasks.survey import survey
from embtrim.tasks.task import Task
from embtrim.testing.toys import pooled_task, zoo_task
from tests.compaction.clicks import WIDTH, Clicks, InLightning, batches, clicks, loss_of, task_of

TRAINED_METHODS = [SSEDSConfig(), HardMaskConfig(), GuidedConfig()]
ALL_METHODS = [*TRAINED_METHODS, OptEmbedConfig(epochs=1), PMEConfig(), MagnitudeConfig(), FrequencyConfig()]


class TestNaN:
    """What is not a number is refused with the batch or the table."""

    @staticmethod
    def poisoned(split: str, number: int) -> Task:
        task = task_of(clicks())
        bad = list(task.batches(split))[number][1]
        task.loss = lambda model, batch: loss_of(model, batch) * (float("nan") if batch[1] is bad else 1.0)
        return task

    @pytest.mark.parametrize(
        ("config", "split"),
        [
            (SSEDSConfig(), "valid"),
            (SSEDSConfig(data="train"), "train"),
            (HardMaskConfig(), "valid"),
            (OptEmbedConfig(epochs=1, generations=1), "valid"),
            (PMEConfig(search_fraction=1.0), "train"),
            (GuidedConfig(), "valid"),
        ],
        ids=lambda value: value if isinstance(value, str) else type(value).__name__,
    )
    def test_a_loss_of_one_batch(self, config: Config, split: str):
        number = 0 if split == "valid" else 2
        with pytest.raises(ModelError, match=rf"the loss of {split} batch {number} \(counted from 0\) is nan"):
            search(self.poisoned(split, number), config, "40%")

    @pytest.mark.parametrize(
        "config", [HardMaskConfig(epochs=5), OptEmbedConfig(epochs=1)], ids=lambda c: type(c).__name__
    )
    def test_a_loss_of_a_training_inside_a_search(self, config: Config):
        with pytest.raises(EmbtrimError, match=r"training loss is nan in epoch 1, batch 2 \(counted from 0\)"):
            search(self.poisoned("train", 2), config, "40%")

    @pytest.mark.parametrize("config", ALL_METHODS, ids=lambda c: type(c).__name__)
    def test_a_row_of_a_table(self, config: Config):
        model = clicks()
        with torch.no_grad():
            model.item.weight[7, 1] = float("nan")
        with pytest.raises(
            ModelError, match=r"weight 'item.weight' of this Clicks holds nan or infinity, first in row 7"
        ):
            search(task_of(model), config, "40%")

    def test_a_weight_of_a_zoo_model(self):
        task = zoo_task()
        with torch.no_grad():
            task.model.tables.weight[3] = float("inf")
        with pytest.raises(ModelError, match=r"weight 'tables.weight' of this DeepFM"):
            search(task, RandomConfig(), "40%")

    def test_a_gradient_where_the_loss_is_a_number(self):
        task = task_of(clicks(), lambda model, batch: (model(batch[0]) * 0.0).sqrt().mean() + loss_of(model, batch))
        with pytest.raises(ModelError, match=r"the gradient by the slots of valid batch 0 .* is nan"):
            search(task, SSEDSConfig(), "40%")

    def test_a_score(self):
        with pytest.raises(ModelError, match="score= gave nan"):
            search(task_of(clicks(), score=lambda model: float("nan")), GuidedConfig(), "40%")

    def test_verify_names_the_batch(self):
        task = self.poisoned("valid", 0)
        plan = search(task_of(clicks()), RandomConfig(), "40%")
        with pytest.raises(ModelError, match="the loss of valid batch 0"):
            verify(task.model, plan, task)


class TestUnreadTables:
    """A table that no training batch reads gets nothing of the budget, and is named."""

    class WithLegacy(Clicks):
        def __init__(self, reads: bool = False) -> None:
            super().__init__()
            self.legacy, self.reads = nn.Embedding(500, WIDTH, padding_idx=0), reads

        def forward(self, ids_BC: Tensor) -> Tensor:
            legacy = self.legacy(ids_BC[:, 0] * 0).sum(1) if self.reads else 0.0
            return super().forward(ids_BC) + legacy

    @pytest.mark.parametrize("config", [*ALL_METHODS, RandomConfig()], ids=lambda c: type(c).__name__)
    def test_the_others_share_the_budget(self, config: Config, caplog):
        model = clicks(self.WithLegacy)
        full = 3 * 50 * WIDTH + 500 * WIDTH
        plan = search(task_of(model), config, f"{300 / full:.6%}")
        by_name = {table.name: table for table in plan.tables}
        assert by_name["legacy"].blocks == ()
        assert "no training batch reads these tables" in caplog.text
        assert "'legacy' (2,000 parameters)" in caplog.text
        assert plan.details["unread_tables"] == ["legacy"]
        assert 0 < plan.num_params <= 300
        assert verify(model, plan, task_of(model)).passed
        bare = search(task_of(clicks()), config, "50%")  # the same budget of the tables that are read
        assert [t.segments for t in bare.tables] == [by_name[t.name].segments for t in bare.tables]

    def test_a_padding_row_is_no_reading(self):
        model = clicks(partial(self.WithLegacy, reads=True))
        assert task_of(model).unread_tables() == ["legacy"]

    def test_a_table_that_another_batch_reads_is_read(self):
        model = clicks()
        task = task_of(model, lambda m, batch: loss_of(m, batch) + (m.extra(batch[0]).mean() if batch is last else 0.0))
        model.extra = nn.Embedding(50, WIDTH)
        last = list(task.batches("train"))[-1]
        assert task.unread_tables() == []

    def test_a_field_of_a_flat_table(self, caplog):
        task = pooled_task()
        task._fields = {"flat": {"user": 40, "city": 8, "spare": 4}}
        task._train = [(ids.clamp(max=0), labels) for ids, labels in task._train]
        plan = search(task, RandomConfig(), "60%")
        assert {t.name for t in plan.tables if not t.output_width} >= {"flat[spare]"}
        assert "'flat[spare]' (24 parameters)" in caplog.text
        assert verify(task.model, plan, task, split="train").passed

    def test_a_model_of_which_nothing_is_read(self):
        task = task_of(clicks(), lambda model, batch: model.head.weight.sum())
        with pytest.raises(ModelError, match="no training batch reads a table of this Clicks"):
            search(task, RandomConfig(), "40%")


def holding(value: Any) -> nn.Module:
    model = clicks()
    model.head.kept = value
    return model


def with_weight_norm() -> nn.Module:
    model = clicks()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.head)
    model(batches()[0][0])
    return model


class TestCopies:
    """What cannot be copied is named, with the remedy."""

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: holding(threading.Lock()), r"'head.kept', a lock, refuses .*make it when it is first used"),
            (
                lambda: holding(n for n in range(3)),
                r"'head.kept', a generator, refuses .*make it when it is first used",
            ),
            (lambda: holding({"open": threading.Lock()}), r"'head.kept', a dict, refuses"),
        ],
    )
    @pytest.mark.parametrize("config", [RandomConfig(), HardMaskConfig()], ids=lambda c: type(c).__name__)
    def test_an_attribute_that_refuses(self, make, message, config: Config):
        model = make()
        with pytest.raises(ModelError, match=rf"this Clicks cannot be copied: its attribute {message}"):
            search(task_of(model, fresh=None), config, "40%")

    class Keeps(Clicks):
        """Keeps results of its forward pass, as AutoInt of deepctr-torch does with its attention."""

        def __init__(self, reads_first: bool = False) -> None:
            super().__init__()
            self.reads_first, self.kept, self.list = reads_first, self.head.weight * 2, [self.head.bias * 3, 1]

        def forward(self, ids_BC: Tensor) -> Tensor:
            logits = super().forward(ids_BC) + (self.kept.sum() if self.reads_first else 0.0)
            self.kept, self.list, self.extra = logits * 2, [logits, 2], [logits]
            return logits

    @pytest.mark.parametrize(
        "config", [RandomConfig(), HardMaskConfig(), GuidedConfig()], ids=lambda c: type(c).__name__
    )
    def test_results_of_a_forward_pass_are_left_out(self, config: Config):
        model = clicks(self.Keeps)
        task = task_of(model, fresh=lambda: clicks(self.Keeps))
        loss_of(model, batches()[0])
        kept = (model.kept, model.list, model.extra)
        plan = search(task, config, "40%")
        assert (model.kept, model.list, model.extra) == kept
        assert verify(model, plan, task).passed
        small = compact(model, plan)
        assert not hasattr(small, "kept")
        assert (small.list, small.extra) == ([None, 2], [None])
        loss_of(small, batches()[0]).backward()
        assert small.kept.requires_grad

    def test_a_result_that_is_read_before_it_is_made_is_named(self):
        with pytest.raises(
            ModelError, match=r"no attribute 'kept'.* lacks its attribute 'kept', 'list.0.', .* keep value.detach\(\)"
        ):
            search(task_of(clicks(partial(self.Keeps, reads_first=True))), RandomConfig(), "40%")

    def test_weight_norm_of_old_is_computed_again(self):
        model = with_weight_norm()
        assert model.head.weight.grad_fn is not None
        plan = search(task_of(model, fresh=None), RandomConfig(), "40%")
        assert verify(model, plan, task_of(model)).passed

    def test_every_attribute_alone_can(self):
        class Whole(Clicks):
            def __deepcopy__(self, memo: Any) -> Any:
                raise TypeError("not this one")

        with pytest.raises(ModelError, match="not this one; give it a __deepcopy__"):
            copied(clicks(Whole))


class Scaled(nn.Embedding):
    """An embedding with attributes of its own, and torch's forward."""

    halves = 2

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.factor, self.shift = 3.0, nn.Parameter(torch.ones(width))
        self.register_buffer("sign", torch.tensor(-1.0))

    def norm(self) -> Tensor:
        return self.weight.norm()


class ReadsAttributes(Clicks):
    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__(Scaled)
        self.read = read

    def forward(self, ids_BC: Tensor) -> Tensor:
        return super().forward(ids_BC) + self.read(self.item)


class TestSubclasses:
    """Attributes of a subclass of nn.Embedding move to its compact table; methods, types and weights are named."""

    def test_attributes_move(self):
        read = lambda item: (item.factor * item.sign * item.shift).sum()  # noqa: E731
        model = clicks(lambda: ReadsAttributes(read))
        model.item.weight.no_decay = True
        task = task_of(model)
        plan = search(task, SSEDSConfig(), "40%")
        assert verify(model, plan, task).passed
        small = compact(model, plan)
        assert small.item.shift.tolist() == [1.0] * WIDTH
        assert small.item.shift is not model.item.shift
        assert "item.sign" in small.state_dict()
        assert small.item.weights[0].no_decay

    @pytest.mark.parametrize(
        ("read", "message"),
        [
            (lambda item: item.norm(), r"reads 'norm' of 'item'"),
            (lambda item: item.halves, r"reads 'halves' of 'item'"),
            (
                lambda item: float(isinstance(item, nn.Embedding)),
                r"'item' cannot be replaced: the output changes by .* does more",
            ),
            (
                lambda item: 0 if isinstance(item, nn.Embedding) else 1 / 0,
                r"'item' cannot be replaced: the model then fails \(Zero",
            ),
        ],
    )
    def test_the_path_and_the_reason_are_named(self, read, message):
        with pytest.raises(ModelError, match=message):
            search(task_of(clicks(lambda: ReadsAttributes(read))), RandomConfig(), "40%")

    def test_a_name_that_a_compact_table_has_itself(self):
        model = clicks()
        model.user.columns = 7
        with pytest.raises(ModelError, match="'user' has an attribute 'columns'"):
            search(task_of(model), RandomConfig(), "40%")

    @pytest.mark.parametrize("what", ["forward", "__call__", "backward hook", "gradient hook", "subclass of Tensor"])
    def test_what_a_replacement_would_not_do_is_left_alone(self, what: str):
        model = clicks()
        if what == "forward":
            model.user.forward = lambda ids: nn.functional.embedding(ids, model.user.weight) * 2
        elif what == "__call__":
            model.user = type("Loud", (nn.Embedding,), {"__call__": lambda self, ids: self.forward(ids)})(50, WIDTH)
        elif what == "backward hook":
            model.user.register_full_backward_hook(lambda *_: None)
        elif what == "gradient hook":
            model.user.weight.register_hook(lambda grad: grad * 0)
        else:
            own = type("Own", (Tensor,), {})
            model.user.weight = nn.Parameter(torch.randn(50, WIDTH).as_subclass(own))
        left = {finding.name: finding.note for finding in survey(model) if not finding.found}
        assert list(left) == ["user"]
        assert left["user"]

    def test_a_penalty_by_type_is_refused(self):
        def loss(model: nn.Module, batch: Any) -> Tensor:
            tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
            return loss_of(model, batch) + sum((m.weight.square().mean() for m in tables), torch.zeros(()))

        with pytest.raises(
            ModelError, match=r"'user' cannot be replaced: the loss changes by .*isinstance\(m, nn.Embed"
        ):
            search(task_of(clicks(), loss), RandomConfig(), "40%")
        plan = search(task_of(clicks()), RandomConfig(), "40%")
        with pytest.raises(ModelError, match=r"same output, but losses that differ by .*isinstance"):
            verify(clicks(), plan, task_of(clicks(), loss))

    def test_a_penalty_over_all_parameters_is_no_fault(self):
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return loss_of(model, batch) + sum(p.norm() for p in model.parameters())

        model = clicks()
        assert verify(model, search(task_of(model, loss), SSEDSConfig(), "40%"), task_of(model, loss)).passed

    def test_a_loss_that_differs_at_every_call_is_no_fault(self):
        calls: list[int] = []

        def loss(model: nn.Module, batch: Any) -> Tensor:
            calls.append(0)
            return loss_of(model, batch) * len(calls)

        assert not search(task_of(clicks(), loss), RandomConfig(), "40%").keeps_nothing


def test_each_module_returns_to_its_own_mode():
    model = clicks().train()
    model.head.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.head.training
    search(task_of(model), SSEDSConfig(), "40%")
    assert not model.head.training


class Noisy(Clicks):
    """A model that leaves traces of every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3 * WIDTH), nn.Dropout(0.1)
        self.register_buffer("steps", torch.zeros(()))
        self.last = None

    def forward(self, ids_BC: Tensor) -> Tensor:
        self.steps += 1
        self.last = super().forward(ids_BC)
        self.__dict__[f"seen{int(self.steps)}"] = torch.rand(3) + float(np.random.rand()) + random.random()  # noqa: NPY002
        fields = (self.user, self.item, self.noise)
        wide = torch.cat([field(ids_BC[:, n]) for n, field in enumerate(fields)], 1)
        return self.last + self.drop(self.norm(wide)).sum(1) + 0 * self.item.weight.sum()


def traces_of(model: nn.Module) -> list[Any]:
    found: list[Any] = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    for module in model.modules():
        hooks = [len(value) for name, value in vars(module).items() if "hooks" in name]
        kept = {name: id(value) for name, value in vars(module).items() if not isinstance(value, bool)}
        found.append((type(module), module.training, hooks, kept))
    found.extend((p.tolist(), p.grad is None or p.grad.tolist()) for p in model.parameters())
    return [*found, *(b.tolist() for b in model.buffers())]


@pytest.mark.parametrize("config", [*ALL_METHODS, RandomConfig()], ids=lambda c: type(c).__name__)
def test_a_search_leaves_nothing_behind(config: Config):
    model = clicks(Noisy).train()
    model.drop.eval()
    loss_of(model, batches()[0]).backward()
    task = task_of(model, loss_of, fresh=lambda: clicks(Noisy))
    before = traces_of(model)
    plan = search(task, config, "40%")
    assert traces_of(model) == before
    assert verify(model, plan, task).passed
    assert task.survey()[0].found
    compact(model, plan)
    task.row_counts()
    assert traces_of(model)[3:] == before[3:]


def test_a_plan_of_other_sizes_is_still_refused():
    plan = search(task_of(clicks()), RandomConfig(), "40%")
    other = Clicks(lambda rows, width: nn.Embedding(rows + 1, width))
    with pytest.raises(PlanError, match="search again"):
        compact(InLightning(other), plan)
    assert isinstance(plan, SizePlan)
