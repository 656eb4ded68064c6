"""Tasks: batches, scores, fresh models and counts that searches ask for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from embtrim.compaction.compacting import compact
from embtrim.compaction.foreign import compact_tables
from embtrim.compaction.verification import verify
from embtrim.errors import ConfigError, EmbtrimError
from embtrim.methods import FrequencyConfig, GuidedConfig, OptEmbedConfig, RandomConfig, SSEDSConfig, search
from embtrim.tasks.survey import fields_of, find_sites, site_plan
from embtrim.tasks.task import Task
from embtrim.testing.checks import CHECKS
from embtrim.testing.toys import ForeignModel, foreign_batches, foreign_task, odd_task, planted_task
from tests.tasks.foreign_modules import PAIRS, ROWS, WIDTH


class TestTask:
    """How a Task uses its model, its batches and its functions."""

    def test_a_search_where_gradients_are_off_turns_them_on(self):
        plan = search(foreign_task(), SSEDSConfig(), "50%")
        with torch.no_grad():
            assert search(foreign_task(), SSEDSConfig(), "50%").details == plan.details
            assert not torch.is_grad_enabled()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_tables_that_are_not_fp32_are_refused_before_the_search(self, dtype: torch.dtype):
        task = foreign_task()
        task.model.item.to(dtype)
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(EmbtrimError, match=rf"'item' is {name}, but plans count 4 bytes a value; .*float\(\)"):
            search(task, RandomConfig(), "50%")

    @pytest.mark.parametrize("name", ["frequency", "random", "sseds"])
    def test_a_search_undoes_what_max_norm_does(self, name: str):
        config = {"frequency": FrequencyConfig(), "random": RandomConfig(), "sseds": SSEDSConfig()}[name]
        task = odd_task()
        CHECKS["only declared parameters move"](task, config)
        assert float(task.model.tables["user[id]"].weight.detach().norm(dim=1).max()) > 2.0

    def test_a_search_that_fails_undoes_it_too(self):
        task = odd_task()
        before = copy.deepcopy(task.model.state_dict())
        plain, calls = task.loss, []

        def loss(model: nn.Module, batch: object) -> Tensor:
            calls.append(plain(model, batch))
            return calls[-1] if len(calls) < 3 else pytest.fail("the third batch")

        task.loss = loss
        with pytest.raises(pytest.fail.Exception):
            search(task, FrequencyConfig(), "50%")
        assert all(torch.equal(v, before[name]) for name, v in task.model.state_dict().items())

    def test_batches_that_are_spent_are_no_counts(self):
        batches = foreign_batches()
        task = Task(ForeignModel(), lambda m, b: m(b[0]).mean(), batches)
        assert task.row_counts()["user"].sum() == 4 * 64
        with pytest.raises(EmbtrimError, match="no train batches to count rows on"):
            search(task, FrequencyConfig(), "50%")

    def test_fresh_with_and_without_a_seed(self):
        def seeded(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return ForeignModel()

        def made(fresh: Callable[..., nn.Module], seed: int) -> Tensor:
            task = Task(ForeignModel(), lambda m, b: m(b[0]).mean(), [], fresh=fresh)
            return task.fresh(seed).user.weight

        for fresh in (
            ForeignModel,
            lambda: ForeignModel(),
            lambda hidden=8: nn.ModuleDict({"user": ForeignModel().user}),
        ):
            assert torch.equal(made(fresh, 3), made(ForeignModel, 3))
            assert not torch.equal(made(fresh, 3), made(fresh, 4))
        expected = made(ForeignModel, 3)
        for fresh in (seeded, lambda s: seeded(s), lambda seed=0: seeded(seed), lambda *args: seeded(*args)):
            assert torch.equal(made(fresh, 3), expected)

    def test_paths_and_fields_may_hold_brackets(self):
        model = nn.ModuleDict({"a[b]": nn.Embedding(ROWS, WIDTH), "c[d]": nn.Embedding(ROWS, WIDTH)})
        fields = {"c[d]": {"x[1]": 7, "y]": 5}}
        plan = site_plan(find_sites(model, fields=fields))
        assert fields_of(model, plan) == {"a[b]": {}, "c[d]": fields["c[d]"]}
        small = compact(model, plan, "inherit")
        assert [t.num_embeddings for t in compact_tables(small, plan)] == [12, 7, 5]
        assert torch.equal(small["c[d]"](PAIRS), model["c[d]"](PAIRS))


class WithGlobalVector(nn.Module):
    """A sequence field, and an embedding that is read by one id alone."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.task = nn.Embedding(40, WIDTH), nn.Embedding(6, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.head(self.item(ids_BL).sum(1) + self.task(torch.tensor(2))).squeeze(1)


@pytest.mark.parametrize("config", [OptEmbedConfig(epochs=1, generations=1), SSEDSConfig(), GuidedConfig()])
def test_an_id_alone_is_searched(config) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(40, (16, 3), generator=generator) for _ in range(3)]
    task = Task(
        WithGlobalVector(),
        lambda model, ids_BL: binary_cross_entropy_with_logits(model(ids_BL), (ids_BL[:, 0] % 2).float()),
        batches,
        batches,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), 1e-2),
        fresh=lambda _seed: WithGlobalVector(),
    )
    plan = search(task, config, "50%")
    assert 0 < plan.num_params <= plan.num_full_params // 2
    verify(task.model, plan, task).require()


def test_validation_batches_that_can_be_read_once_only_are_an_error() -> None:
    """A candidate scored on no rows would win over every candidate with a score."""
    batches = foreign_batches()
    task = Task(
        ForeignModel(),
        lambda model, batch: binary_cross_entropy_with_logits(model(batch[0]), batch[1]),
        batches,
        iter(batches),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), 1e-2),
        fresh=lambda _seed: ForeignModel(),
    )
    with pytest.raises(EmbtrimError, match="there are no valid batches to score on; give some that can be read again"):
        search(task, OptEmbedConfig(epochs=1, population=4, generations=2), "50%")


class TestSettingsOfAMethod:
    """A Task with its own optimiser cannot follow the settings that a method asks for, and says so."""

    CONFIG = OptEmbedConfig(epochs=1, generations=1, population=2, l2=0.01)

    def test_ignored_ones_are_named(self, caplog):
        search(foreign_task(), self.CONFIG, "50%")
        (message,) = [r.getMessage() for r in caplog.records if "optimizer=" in r.getMessage()]
        assert "ignores what the search asks for: tables = 'dense', embedding_l2 = 0.01; build it into" in message

    def test_defaults_and_zoo_models_are_not(self, caplog):
        search(foreign_task(), self.CONFIG.replace(optimizer="lazy", l2=None), "50%")
        search(foreign_task(), SSEDSConfig(pretrain="epochs:1"), "50%")
        search(planted_task(), self.CONFIG, "50%")
        assert "ignores what the search asks for" not in caplog.text

    def test_unknown_ones_are_refused(self):
        task = foreign_task()
        with pytest.raises(ConfigError, match="unknown key 'table'"):
            task.fit(task.model, epochs=1, seed=0, table="dense")
