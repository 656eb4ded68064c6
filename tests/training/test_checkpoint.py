"""Interrupted trainings, searches and runs go on, to the same end bit by bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import embtrim
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError
from embtrim.experiments.comparison import compare
from embtrim.experiments.grid import CompareConfig
from embtrim.experiments.records import RunRecord
from embtrim.experiments.run import run
from embtrim.experiments.settings import RunConfig
from embtrim.methods import HardMaskConfig, OptEmbedConfig, PMEConfig, SSEDSConfig, guided
from embtrim.methods.guided import GuidedConfig
from embtrim.methods.hard_mask import MaskedSupernet
from embtrim.models import build
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import SizePlan
from embtrim.system.unfinished import unfinished
from embtrim.tasks.task import CTRTask, Task
from embtrim.testing.toys import foreign_task, planted_data, planted_task
from embtrim.training import fitting
from embtrim.training.checkpoint import Checkpoint, CheckpointFolder
from embtrim.training.fitting import fit
from embtrim.training.settings import FitResult, Hooks, TrainConfig
from tests.cli.bad_inputs import TINY, call, write_log
from tests.data.test_encoding_resume import Job as EncodeJob

TRAIN = TrainConfig(epochs=4, batch_size=256, learning_rate=0.02, patience=2, checkpoint_seconds=0)
STEPS = 4 * 19  # 4,800 training rows


def model_of(data: EncodedDataset) -> CTRModel:
    return build("deepfm", data.schema, embedding_dim=4, hidden_units=[8], dropout=0.2)


def stop_at(step: int) -> Hooks:
    """Ctrl-C in the given step: the last checkpoint is of the step before."""

    def interrupt(done: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return Hooks(on_step=interrupt)


def told(result: FitResult) -> list[dict[str, float]]:
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in result.history]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    "settings",
    [
        {"embedding_l2": 0.01},
        {"embedding_l2": 0.01, "tables": "dense"},
        {"embedding_l2": 0.01, "optimizer": "adagrad"},
        {"embedding_l2": 0.01, "l2_form": "decoupled"},
        {"embedding_l2": 0.01, "optimizer": "sgd"},
        {"precision": "bf16"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_training_ends_as_if_it_had_not_been_interrupted(data, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = model_of(data)
    expected = fit(whole, data, TRAIN.replace(**settings))
    path = tmp_path / "state.safetensors"
    for step in sorted(random.Random(7).sample(range(2, STEPS), 4)):
        with pytest.raises(KeyboardInterrupt):
            fit(model_of(data), data, TRAIN.replace(**settings), hooks=stop_at(step), checkpoint=path)
    model = model_of(data)
    result = fit(model, data, TRAIN.replace(**settings), checkpoint=path)
    assert told(result) == told(expected)
    assert (result.best_epoch, result.best_score) == (expected.best_epoch, expected.best_score)
    assert result.seconds > result.restored_seconds > 0
    assert same_weights(model, whole)


def test_checkpoints_change_nothing(data, tmp_path: Path) -> None:
    """Writing one settles no decay that is owed: a replay in other strides would end elsewhere."""
    plain, watched = model_of(data), model_of(data)
    config = TRAIN.replace(embedding_l2=0.05)
    fit(plain, data, config)
    fit(watched, data, config, checkpoint=tmp_path / "state.safetensors")
    assert same_weights(plain, watched)


def test_training_that_had_ended_gives_its_result(data, tmp_path: Path, monkeypatch) -> None:
    first, second = model_of(data), model_of(data)
    expected = fit(first, data, TRAIN, checkpoint=tmp_path / "state.safetensors")
    monkeypatch.setattr(fitting, "logloss_of_batch", None)  # would raise in the first step
    result = fit(second, data, TRAIN, checkpoint=tmp_path / "state.safetensors")
    assert result.history == expected.history
    assert result.rows_per_second == expected.rows_per_second
    assert same_weights(first, second)


def test_interrupted_in_validation(data, tmp_path: Path, monkeypatch) -> None:
    whole = model_of(data)
    expected = fit(whole, data, TRAIN)
    calls = []

    def interrupt(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    evaluate = fitting.evaluate
    monkeypatch.setattr(fitting, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(model_of(data), data, TRAIN, checkpoint=tmp_path / "state.safetensors")
    model = model_of(data)
    assert told(fit(model, data, TRAIN, checkpoint=tmp_path / "state.safetensors")) == told(expected)
    assert len(calls) == 1 + len(expected.history), "the first epoch is not evaluated again"
    assert same_weights(model, whole)


def test_damaged_checkpoint_means_a_new_start(data, tmp_path: Path, caplog) -> None:
    path, whole = tmp_path / "state.safetensors", model_of(data)
    fit(whole, data, TRAIN, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-500])
    model = model_of(data)
    fit(model, data, TRAIN, checkpoint=path)
    assert "state.safetensors is damaged" in caplog.text
    assert same_weights(model, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: fit(model_of(data), data, TRAIN.replace(learning_rate=0.01)), "learning_rate = 0.02"),
        (lambda data: fit(build("fm", data.schema, embedding_dim=4), data, TRAIN), 'model = "deepfm"'),
        (lambda data: fit(build("deepfm", data.schema, seed=3), data, TRAIN), "hparams"),
    ],
)
def test_checkpoint_of_another_training_is_refused(data, tmp_path: Path, change, message, monkeypatch) -> None:
    path = tmp_path / "state.safetensors"
    fit(model_of(data), data, TRAIN, checkpoint=path)
    before = path.read_bytes()
    monkeypatch.setitem(globals(), "fit", lambda *args: fitting.fit(*args, checkpoint=path))
    with pytest.raises(DataError, match=message):
        change(data)
    assert path.read_bytes() == before
    other = model_of(data)
    nn.init.ones_(next(other.mlp.parameters()))
    with pytest.raises(DataError, match="initial_weights"):
        fitting.fit(other, data, TRAIN, checkpoint=path)


def test_checkpoint_that_cannot_be_written_does_not_end_the_training(data, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("in the way")
    result = fit(model_of(data), data, TRAIN.replace(epochs=1), checkpoint=tmp_path / "file" / "state.safetensors")
    assert len(result.history) == 1
    assert "could not be written" in caplog.text


def test_unfinished_work_stays_where_it_failed_and_goes_where_it_ended(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def interrupted(state: str | None) -> None:
        with unfinished(target) as work:
            work.mkdir()
            if state is not None:
                (work / state).touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(None)
    assert not list(tmp_path.iterdir()), "there is nothing to go on from"
    with pytest.raises(KeyboardInterrupt):
        interrupted("state")
    assert [path.name for path in tmp_path.iterdir()] == [".model.unfinished"]
    for _ in range(2):  # the second time nothing was written
        with unfinished(target):
            pass
        assert not list(tmp_path.iterdir())


def test_checkpoint_waits_for_its_interval(data, tmp_path: Path, monkeypatch) -> None:
    written: list[bool] = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, state: written.append(state["ended"]))
    fit(model_of(data), data, TRAIN.replace(checkpoint_seconds=3600), checkpoint=tmp_path / "a.safetensors")
    assert written == [True]
    fit(model_of(data), data, TRAIN.replace(epochs=1), checkpoint=tmp_path / "b.safetensors")
    assert written == [True] + [False] * 19 + [True]


# --- searches -------------------------------------------------------------------------------------------------------


SEARCHES = [
    SSEDSConfig(pretrain="epochs:2"),
    HardMaskConfig(),
    OptEmbedConfig(epochs=2, generations=4, population=4, mutations=2, crossovers=2, finalists=2),
    PMEConfig(warmup_epochs=1),
    GuidedConfig(trial_steps=4, trial_epochs=0.01),
    HardMaskConfig(mode="quantile", start="initial", single_level=True, epochs=1.5, mask_every=2),
]


def plan_text(plan: SizePlan, path: Path) -> tuple[str, Any]:
    plan.save(path)
    return path.read_text(), [b.rows.tolist() for t in plan.tables for b in t.blocks if b.rows is not None]


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
    """The function, which notes its last argument; Ctrl-C comes after so many calls."""

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


def test_race_goes_on_with_its_scores(tmp_path: Path, monkeypatch) -> None:
    expected = embtrim.search(planted_task(), SEARCHES[4], "40%", seed=3)
    score, gradients, scored = Task.valid_score, guided.slot_gradients, []
    task, again = planted_task(), planted_task()
    task.checkpoints, again.checkpoints = (CheckpointFolder(tmp_path / "state", interval=0) for _ in range(2))
    monkeypatch.setattr(Task, "valid_score", interrupted_after(5, score, scored))
    monkeypatch.setattr(guided, "slot_gradients", interrupted_after(1, gradients, []))
    for searched in (task, again):
        with suppress(KeyboardInterrupt):
            plan = embtrim.search(searched, SEARCHES[4], "40%", seed=3)
            break
        monkeypatch.setattr(Task, "valid_score", interrupted_after(-1, score, scored))
    assert len(scored) == sum(map(len, expected.details["scores"].values())) > 5, "no trial is scored twice"
    assert plan_text(plan, tmp_path / "a.json") == plan_text(expected, tmp_path / "b.json")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (HardMaskConfig(), {"config": HardMaskConfig(eta=9.0)}, '"eta": 2.0'),
        (HardMaskConfig(), {"budget": "30%"}, "cost_target"),
        (HardMaskConfig(), {"seed": 4}, "seed = 3"),
        (SEARCHES[2], {"config": SEARCHES[2].replace(threshold_lr=0.2)}, "threshold_lr = 0.1"),
        (SEARCHES[2], {"config": SEARCHES[2].replace(generations=5)}, '"generations": 4'),
        (SEARCHES[2], {"budget": "30%"}, 'budget = "40%"'),
        (SEARCHES[4], {"config": SEARCHES[4].replace(trial_steps=5)}, "steps = 4"),
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
    """A DataLoader draws its order from torch's random state at the start of each epoch; one of valid draws, too."""
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


# --- kill -9 --------------------------------------------------------------------------------------------------------


RUN = RunConfig(
    hparams={"embedding_dim": 4, "hidden_units": [8]},
    train=TRAIN.replace(epochs=3),
    method="optembed",
    search=SEARCHES[2].model_dump(mode="json", exclude_none=True),
    controls=("sseds", "hard_mask"),
    budget="40%",
)
COMPARE = CompareConfig(
    models=("fm",), hparams={"embedding_dim": 4}, train=TRAIN.replace(epochs=3), methods=("uniform",),
    variants={"short": {"method": "guided", "trial_steps": 2, "trial_epochs": 0.01}}, budgets=("40%", "20%"), seeds=1,
)  # fmt: skip


# What each command is killed in, and how often; Ctrl-C comes once to each beside that.
NUM_KILLS = {"encode": 3, "train": 3, "search": 3, "run": 3, "compare": 3}
SETTINGS = [*TINY, "--set", "train.checkpoint_seconds=0", "--set", "train.batch_size=64"]
SEARCH = ["--method", "optembed", "--budget", "30%"]
for key, value in SEARCHES[2].model_dump(mode="json", exclude_none=True).items():
    SEARCH += ["--set", f"search.{key}={value}"]


def work(what: str, shop: Path, out: Path) -> None:
    """One of the commands that can be interrupted, in small."""
    torch.set_num_threads(1)
    if what == "encode":
        EncodeJob(shop / "raw", num_rows=4_000).run(out=out)
    elif what in ("train", "search"):
        given = ["train", shop / "data"] if what == "train" else ["search", shop / "full", shop / "data", *SEARCH]
        done = call(*given, *SETTINGS, "--out", out)
        if done.code == 130:
            raise KeyboardInterrupt
        assert done.code == 0, done.err
    else:
        data = planted_data(num_rows=2000, noise_vocab=300)
        run(data, RUN, out) if what == "run" else compare(data, COMPARE, out)


def start(what: str, shop: Path, out: Path) -> None:
    """The work in a process of its own, which Ctrl-C ends with 130."""
    os.environ["EMBTRIM_KERNELS"] = "torch"  # the fused ones would be loaded anew by every process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work(what, shop, out)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        sys.exit(130)


def outcome(what: str, out: Path) -> dict[str, Any]:
    """What was made, but for times and memory."""
    if what == "encode":
        return EncodeJob.files(out)
    if what == "train":  # which holds the digests of all files beside it
        return json.loads((out / "bundle.json").read_text())
    if what == "search":
        return {"plan": out.read_text(), "rows": {k: v.tolist() for k, v in np.load(out.with_suffix(".npz")).items()}}
    records = [RunRecord.load(path) for path in sorted(out.glob("records/*.json"))]
    assert len(records) == (4 if what == "run" else 5)
    volatile = ("seconds", "epochs", "memory", "peak", "rows_per_second")
    return {
        f"{r.variant} {r.budget} {r.seed}": {
            name: value
            for name, value in r.model_dump().items()
            if name == "epochs" or not any(part in name for part in volatile)
        }
        for r in records
    }


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded data and the bundle of a full model."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "raw").mkdir()
    write_log(folder / "log.csv", num_rows=2000)
    for arguments in (
        ["encode", folder / "log.csv", "--label", "click", "--out", folder / "data"],
        ["train", folder / "data", "--out", folder / "full", *SETTINGS],
    ):
        assert call(*arguments).code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", NUM_KILLS)
def test_killed_at_random_moments_it_ends_the_same(what: str, shop: Path, tmp_path: Path) -> None:
    """Only kills count that came after the first change on disk and before the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_checkpoint", "torch._dynamo"])
    name = "out.json" if what == "search" else "out"
    whole, killed = tmp_path / "whole" / name, tmp_path / "killed" / name
    for out in (whole, killed):
        out.parent.mkdir()

    def process(out: Path) -> Any:
        """Started, and past its first change on disk."""
        before, started = last_change(out.parent), context.Process(target=start, args=(what, shop, out))
        started.start()
        until(lambda: last_change(out.parent) != before or not started.is_alive())
        return started

    def finish(out: Path) -> float:
        """Seconds from the first change on."""
        last, began = process(out), time.monotonic()
        last.join()
        assert last.exitcode == 0
        return time.monotonic() - began

    seconds = finish(whole)
    expected = outcome(what, whole)

    chance, signals = random.Random(what), [signal.SIGKILL] * NUM_KILLS[what] + [signal.SIGINT]
    chance.shuffle(signals)
    ended = []
    for tried in range(50):
        if len(ended) == len(signals):
            break
        victim = process(killed)
        time.sleep(chance.uniform(0, seconds / (len(signals) + tried)))
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signals[len(ended)])
        victim.join()
        if victim.exitcode == 0:  # it was done before: again, from the start
            shutil.rmtree(killed.parent)
            killed.parent.mkdir()
            continue
        assert victim.exitcode == (130 if signals[len(ended)] == signal.SIGINT else -signal.SIGKILL)
        ended.append(victim.exitcode)
    assert (ended.count(-signal.SIGKILL), ended.count(130)) == (NUM_KILLS[what], 1)
    finish(killed)
    assert outcome(what, killed) == expected
    assert {path.name for path in killed.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}
    assert not (killed / "unfinished").exists(), "what is finished leaves no state behind"


def test_there_are_ten_kills() -> None:
    assert sum(NUM_KILLS.values()) >= 10


def last_change(folder: Path) -> int:
    """Of anything below a folder, in nanoseconds."""
    times = [0]
    for path in [folder, *folder.rglob("*")]:
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime_ns)
    return max(times)


def until(condition: Callable[..., bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def test_weights_that_share_memory_are_kept(tmp_path: Path) -> None:
    """As where a head was made of a part of the embedding's weight."""
    base = torch.arange(12.0).view(4, 3)
    model = nn.Linear(2, 1)
    checkpoint = Checkpoint(tmp_path / "state.safetensors", 0, {}, model)
    checkpoint.save({"weights": {"whole": base, "part": base[:2], "again": base}})
    restored = checkpoint.load()
    assert restored is not None
    assert torch.equal(restored["weights"]["whole"], base)
    assert torch.equal(restored["weights"]["part"], base[:2])
    assert torch.equal(restored["weights"]["again"], base)


def test_an_interrupted_training_leaves_the_model_to_others(data) -> None:
    model = model_of(data)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, TRAIN, hooks=stop_at(3))
    assert all(parameter.grad is None for parameter in model.parameters())
    before = model.tables.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model(next(data.batches("train", 64)).ids_BC).sum().backward()
    optimizer.step()
    assert not torch.equal(model.tables.weight, before), "the tables belong to no row optimiser any more"
