"""Wrapped models: looked through, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.config import Config
from embtrim.errors import ModelError, PlanError
from embtrim.methods import (
    GuidedConfig,
    RandomConfig,
    SSEDSConfig,
    search,
)
from embtrim.system.modules import unwrapped
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.survey import survey
from embtrim.tasks.task import Task
from embtrim.testing.toys import PooledModel, foreign_batches, zoo_task
from embtrim.training.fitting import fit
from tests.compaction.clicks import WIDTH, Clicks, InLightning, batches, clicks, loss_of, task_of


def compiled(model: nn.Module) -> nn.Module:
    """A compiled model that was called before the search: its code is fixed."""
    torch._dynamo.reset()
    made = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            made.eval()(batches()[0][0])
    return made


def compiled_inside(model: nn.Module) -> nn.Module:
    model.head = compiled_module(model.head)
    model.user = compiled_module(model.user)
    with torch.no_grad():
        model.eval()(batches()[0][0])
    return model


def compiled_module(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    model.compile(backend="eager")
    with torch.no_grad():
        model.eval()(batches()[0][0])
    return model


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "compiled inside": compiled_inside,
    "DataParallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "both": lambda model: nn.DataParallel(compiled(model)),
}


class TestWrappers:
    """A wrapper is taken off, and plans do not know it."""

    @pytest.mark.parametrize("config", [SSEDSConfig(min_dim=0), GuidedConfig()], ids=lambda c: type(c).__name__)
    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    def test_plans_are_those_of_the_plain_module_and_apply_to_both(self, wrap, config: Config):
        plain, wrapped = clicks(), wrap(clicks())
        expected, task = search(task_of(plain), config, "40%"), task_of(wrapped)
        plan = search(task, config, "40%")
        assert plan.diff(expected) == ""
        assert plan.fingerprint == expected.fingerprint
        assert sum(map(sum, task.row_counts().values())) == 4 * 64 * 3
        for model in (plain, wrapped):
            assert verify(model, plan, task_of(model)).passed
            with torch.no_grad():
                found, same = (compact(m, plan, "inherit").eval()(batches()[4][0]) for m in (model, plain))
            assert torch.allclose(found, same, atol=1e-6)
        if wrap is compiled:
            torch._dynamo.reset()

    @pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
    def test_distributed_data_parallel_is_taken_off(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(clicks())
            plan = search(task_of(wrapped), SSEDSConfig(min_dim=0), "40%")
            assert verify(wrapped, plan, task_of(wrapped)).passed
            assert type(compact(wrapped, plan)) is Clicks
        finally:
            dist.destroy_process_group()
        expected = search(task_of(clicks()), SSEDSConfig(min_dim=0), "40%")
        assert plan.diff(expected) == ""
        assert plan.fingerprint == expected.fingerprint

    def test_a_loss_that_is_compiled_sees_the_gates(self):
        torch._dynamo.reset()
        loss = torch.compile(loss_of, backend="eager")
        model = clicks().eval()
        with torch.no_grad():
            loss(model, batches()[0])
        plan = search(task_of(model, loss), SSEDSConfig(min_dim=0), "40%")
        assert plan.diff(search(task_of(clicks()), SSEDSConfig(min_dim=0), "40%")) == ""

    def test_a_compiled_forward_is_refused(self):
        """A copy of the model shares the function, which calls the model itself."""
        model = clicks()
        model.forward = torch.compile(model.forward, backend="eager")
        with pytest.raises(
            ModelError, match=r"a copy of the model reads 'user' of the model itself.* 'forward' is a func"
        ):
            search(task_of(model), RandomConfig(), "40%")

    def test_a_zoo_model_is_taken_out_of_its_wrapper(self):
        task = zoo_task()
        wrapped = compiled_module(task.model)
        assert CTRTask(wrapped, task.data).model is task.model
        plan = search(task, RandomConfig(), "40%")
        assert verify(wrapped, plan, task.data).passed
        assert type(compact(wrapped, plan)) is type(task.model)
        with pytest.raises(ModelError, match="this OptimizedModule holds the deepfm; give the model inside it"):
            fit(wrapped, task.data)

    @pytest.mark.parametrize("make", [clicks, lambda: PooledModel()], ids=["tables", "flat"])
    def test_plans_apply_to_a_module_that_holds_the_model_and_the_reverse(self, make, caplog):
        inner = make()
        outer, fields = InLightning(inner), {"flat": {"user": 40, "city": 12}} if make is not clicks else None
        rows = list(foreign_batches()) if fields else batches()
        outer_fields = fields and {"model.flat": fields["flat"]}
        inner_task, outer_task = (
            Task(inner, loss_of, rows, fields=fields),
            Task(outer, loss_of, rows, fields=outer_fields),
        )
        of_inner, of_outer = (search(task, RandomConfig(), "40%") for task in (inner_task, outer_task))
        assert {t.name for t in of_outer.tables} == {f"model.{t.name}" for t in of_inner.tables}
        for model, plan, task in ((outer, of_inner, outer_task), (inner, of_outer, inner_task)):
            assert verify(model, plan, task, split="train").passed
            assert compact(model, plan)(rows[0][0]).shape == (64,)
        with pytest.raises(PlanError, match="search again"):
            compact(
                nn.Sequential(InLightning(Clicks()), InLightning(Clicks())),
                search(task_of(Clicks()), RandomConfig(), "40%"),
            )

    def test_names_of_wrappers_are_left_out_of_paths(self):
        model = InLightning(nn.DataParallel(clicks()))
        assert [finding.name for finding in survey(model)] == ["model.user", "model.item", "model.noise"]
        assert type(unwrapped(nn.DataParallel(clicks()))) is Clicks
        model.module = nn.Embedding(5, WIDTH)  # an ordinary attribute of this name stays
        assert survey(model)[-1].name == "module"

    def test_scripted_embeddings_are_named(self):
        with pytest.warns(DeprecationWarning, match="script"):
            scripted = torch.jit.script(nn.Sequential(nn.Embedding(50, WIDTH)))
        with pytest.raises(ModelError, match=r"0: RecursiveScriptModule 50 x 4, left \(scripted by torch.jit"):
            search(task_of(scripted), RandomConfig(), "40%")
