"""Interrupted searches go on, to the same plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embtrim
from embtrim.errors import DataError
from embtrim.methods import HardMaskConfig
from embtrim.methods.hard_mask import MaskedSupernet
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.task import Task
from embtrim.testing.toys import foreign_task, planted_task
from embtrim.training import fitting
from embtrim.training.checkpoint import Checkpoint, CheckpointFolder
from tests.training.interruptions import SEARCHES, plan_text, same_weights, stop_at, told

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("config", SEARCHES, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("make", [planted_task, foreign_task])
def test_search_ends_as_if_it_had_not_been_interrupted(
    config: Any, make: Callable[[], Task], tmp_path: Path, monkeypatch
) -> None:
    expected = embtrim.search(make(), config, "40%", seed=3)
    save, saved = Checkpoint.save, []

    def interrupt(self: Checkpoint, state: Any) -> None:
        saved.append(self.path)
        if len(saved) in (3, 7, 30):
            raise KeyboardInterrupt
        save(self, state)

    monkeypatch.setattr(Checkpoint, "save", interrupt)
    for _ in range(4):
        task = make()
        task.checkpoints = CheckpointFolder(tmp_path / "state", interval=0)
        try:
            plan = embtrim.search(task, config, "40%", seed=3)
            break
        except KeyboardInterrupt:
            continue
    assert plan_text(plan, tmp_path / "a.json") == plan_text(expected, tmp_path / "b.json")
    assert len(saved) > 3
    assert task.checkpoints.spent_seconds > 0


def interrupted_after(num_calls: int, call: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    """The function, wrapped to note its last argument and to raise Ctrl-C after `num_calls` calls."""

    def watched(*args: Any) -> Any:
        if len(seen) == num_calls:
            raise KeyboardInterrupt
        seen.append(args[-1])
        return call(*args)

    return watched


@pytest.mark.parametrize("mode", ["penalty", "quantile"])
def test_hard_mask_goes_on_with_its_masks(mode: Any, tmp_path: Path, monkeypatch) -> None:
    config = HardMaskConfig(mode=mode, min_steps=16)
    expected = embtrim.search(planted_task(), config, "40%", seed=3)
    steps, step = [], MaskedSupernet._mask_step
    task, again = planted_task(), planted_task()
    task.checkpoints, again.checkpoints = (CheckpointFolder(tmp_path / "state", interval=0) for _ in range(2))
    monkeypatch.setattr(MaskedSupernet, "_mask_step", interrupted_after(9, step, steps))
    with pytest.raises(KeyboardInterrupt):
        embtrim.search(task, config, "40%", seed=3)
    monkeypatch.setattr(MaskedSupernet, "_mask_step", interrupted_after(-1, step, steps))
    plan = embtrim.search(again, config, "40%", seed=3)
    assert len(steps) == expected.details["mask_steps"] > 9, "no step is taken twice"
    assert plan_text(plan, tmp_path / "a.json") == plan_text(expected, tmp_path / "b.json")


@pytest.mark.parametrize("num_calls", [1, 3, 4, 5], ids=["evolution", "later", "finalists", "filling"])
def test_evolution_goes_on_with_its_scores(num_calls: int, tmp_path: Path, monkeypatch) -> None:
    config = SEARCHES[2].replace(fitness_rows=1000)
    expected = embtrim.search(planted_task(), config, "40%", seed=3)
    scored: list[tuple[Any, int]] = []
    score = CTRTask.gated_scores

    def noted(task: CTRTask, model: nn.Module, gates: Any, max_rows: int) -> list[float]:
        scored.extend((tuple(gating[0].tolist()), max_rows) for gating in gates)
        return score(task, model, gates, max_rows)

    task, again = planted_task(), planted_task()
    task.checkpoints, again.checkpoints = (CheckpointFolder(tmp_path / "state", interval=0) for _ in range(2))
    monkeypatch.setattr(CTRTask, "gated_scores", interrupted_after(num_calls, noted, []))
    with pytest.raises(KeyboardInterrupt):
        embtrim.search(task, config, "40%", seed=3)
    monkeypatch.setattr(fitting, "logloss_of_batch", None)  # would raise in the first step: the supernet has ended
    monkeypatch.setattr(CTRTask, "gated_scores", interrupted_after(-1, noted, []))
    before = len(scored)
    plan = embtrim.search(again, config, "40%", seed=3)
    assert len(scored) > before > 0
    assert len(scored) == len(set(scored)), "no candidate is scored twice"
    assert plan_text(plan, tmp_path / "a.json") == plan_text(expected, tmp_path / "b.json")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (HardMaskConfig(), {"config": HardMaskConfig(eta=9.0)}, "search.eta = 2.0, now it is 9.0"),
        (HardMaskConfig(), {"budget": "30%"}, "cost_target"),
        (HardMaskConfig(), {"seed": 4}, "seed = 3"),
        (SEARCHES[2], {"config": SEARCHES[2].replace(threshold_lr=0.2)}, "threshold_lr = 0.1"),
        (SEARCHES[2], {"config": SEARCHES[2].replace(generations=5)}, "search.generations = 4, now it is 5"),
        (SEARCHES[2], {"budget": "30%"}, 'budget = "40%"'),
    ],
)
def test_state_of_another_search_is_refused(config: Any, change: Any, message: str, tmp_path: Path) -> None:
    def search(**settings: Any) -> None:
        task = planted_task()
        task.checkpoints = CheckpointFolder(tmp_path / "state", interval=0)
        embtrim.search(task, **{"config": config, "budget": "40%", "seed": 3, **settings})

    search()
    with pytest.raises(DataError, match=message):
        search(**change)


@pytest.mark.parametrize("patience", [None, 1])
def test_foreign_loader_that_shuffles_goes_on_in_its_order(tmp_path: Path, patience: int | None) -> None:
    """A DataLoader draws its order from torch's random state at the start of each epoch, and so does the valid loader."""
    table = torch.utils.data.TensorDataset(torch.arange(60) % 10, (torch.arange(60) % 10 > 4).float())

    def task() -> Task:
        loader = torch.utils.data.DataLoader(table, batch_size=8, shuffle=True)
        return Task(
            nn.Embedding(10, 2),
            loss,
            train=loader,
            valid=torch.utils.data.DataLoader(table, batch_size=30),
            optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=0.1),
        )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = nn.functional.dropout(model(batch[0]), 0.3, model.training)
        return nn.functional.binary_cross_entropy_with_logits(x.sum(1), batch[1])

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Embedding(10, 2)

    whole = model()
    expected = task().fit(whole, epochs=3, seed=5, patience=patience)
    for step in (3, 11, 12, 19):
        interrupted = task()
        interrupted.checkpoints = CheckpointFolder(tmp_path, interval=0)
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit(model(), epochs=3, seed=5, hooks=stop_at(step), patience=patience)
    resumed, again = model(), task()
    again.checkpoints = CheckpointFolder(tmp_path, interval=0)
    assert told(again.fit(resumed, epochs=3, seed=5, patience=patience)) == told(expected)
    assert same_weights(resumed, whole)
    again.checkpoints = CheckpointFolder(tmp_path, interval=0)
    with pytest.raises(DataError, match="patience"):
        again.fit(model(), epochs=3, seed=5, patience=2)


@pytest.mark.parametrize("num_steps", [1, 2, 8, 9, 13])
def test_masks_go_on_in_the_order_of_a_loader_that_shuffles(num_steps: int, tmp_path: Path, monkeypatch) -> None:
    """Weights and masks read one loader, each in an order of its own; an epoch has 8 batches."""
    torch.manual_seed(1)
    users, items = torch.randint(40, (60, 1)), torch.randint(25, (60, 2))
    table = torch.utils.data.TensorDataset(torch.cat([users, items], 1), (users[:, 0] % 2).float())

    def task() -> Task:
        made = foreign_task()
        loader = torch.utils.data.DataLoader(table, batch_size=8, shuffle=True)
        return Task(made.model, made.loss, train=loader, optimizer=made._optimizer, fresh=made._fresh)

    config = HardMaskConfig(mode="quantile", single_level=True, min_steps=20)
    expected = embtrim.search(task(), config, "40%", seed=3)
    steps, step = [], MaskedSupernet._mask_step
    for stop in (num_steps, -1):
        monkeypatch.setattr(MaskedSupernet, "_mask_step", interrupted_after(stop, step, steps))
        again = task()
        again.checkpoints = CheckpointFolder(tmp_path / "state", interval=0)
        with suppress(KeyboardInterrupt):
            plan = embtrim.search(again, config, "40%", seed=3)
    assert len(steps) == 20
    assert plan_text(plan, tmp_path / "a.json") == plan_text(expected, tmp_path / "b.json")
