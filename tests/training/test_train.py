"""The loop: it learns, stops, restores, repeats itself, and leaves global state alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embtrim.compaction.compacting import compact
from embtrim.compaction.verification import verify
from embtrim.data.dataset import WINDOW_ROWS, EncodedDataset, SplitArrays
from embtrim.errors import ConfigError, DataError, EmbtrimError
from embtrim.methods import METHODS, PMEConfig, SSEDSConfig, search
from embtrim.models import LR, MODELS, DeepFM, arguments, build
from embtrim.schema import Schema
from embtrim.tasks.ctr_task import CTRTask
from embtrim.tasks.task import Task
from embtrim.testing.checks import CHECKS
from embtrim.testing.toys import foreign_task, zoo_task
from embtrim.training import fitting, loop
from embtrim.training.evaluation import evaluate, predict_logits, rarest_value_counts
from embtrim.training.fitting import fit
from embtrim.training.settings import Hooks, TrainConfig

QUICK = TrainConfig(epochs=3, batch_size=256, learning_rate=3e-3, precision="fp32")


def model_of(data, **hparams):
    return DeepFM(data.schema, **{"embedding_dim": 4, "hidden_units": (16,), **hparams})


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("tables", ["lazy", "dense"])
@pytest.mark.slow
def test_it_learns(optimizer, tables, data):
    rate = {"adam": 3e-3, "adagrad": 0.05, "sgd": 0.5}[optimizer]
    model = model_of(data, init_std=0.05)
    fit(model, data, QUICK, optimizer=optimizer, tables=tables, learning_rate=rate, epochs=8)
    assert evaluate(model, data, "test").auc > 0.75


def test_same_seed_same_model_and_global_state_untouched(data):
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        before, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
        model = model_of(data, dropout=0.3)
        fit(model, data, QUICK)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.get_float32_matmul_precision() == precision
        results.append(predict_logits(model, data, "test"))
    assert np.array_equal(*results)
    other = model_of(data, dropout=0.3)
    fit(other, data, QUICK, seed=1)
    assert not np.array_equal(results[0], predict_logits(other, data, "test"))


def test_best_weights_come_back(data):
    model = model_of(data)
    result = fit(model, data, QUICK, epochs=30, learning_rate=0.02, patience=2, reduce_lr=1.0)
    scores = [record["score"] for record in result.history]
    assert len(scores) < 30, "it overfits, so it must stop early"
    assert result.best_score == max(scores)
    assert result.best_epoch == 1 + int(np.argmax(scores))
    assert evaluate(model, data, "valid").auc == pytest.approx(max(scores), abs=1e-12)


def test_learning_rate_falls_on_a_plateau(data):
    result = fit(model_of(data), data, QUICK, epochs=20, learning_rate=0.02, patience=3, reduce_lr=0.1)
    factors = [record["lr_factor"] for record in result.history]
    assert factors[0] == 1.0
    assert factors[-1] < 0.11


@pytest.mark.parametrize(
    ("patience", "min_delta", "epochs", "factors"),
    [(2, 1e-4, 3, [1, 1, 0.1]), (3, 1e-4, 7, [1, 1, 0.1, 0.01, 0.01, 1e-3, 1e-4]), (2, 0, 8, [1] * 7 + [0.1])],
)
def test_gains_below_min_delta_keep_the_weights_and_count_together(
    data, monkeypatch, patience, min_delta, epochs, factors
):
    scores = iter([0.5, 0.50004, 0.50008, 0.50012, 0.50016, 0.50020, 0.5, 0.5])
    monkeypatch.setattr(fitting, "evaluate", lambda *_: SimpleNamespace(auc=next(scores)))
    result = fit(model_of(data), data, QUICK, epochs=8, patience=patience, reduce_lr=0.1, min_delta=min_delta)
    assert [record["lr_factor"] for record in result.history] == pytest.approx(factors[:epochs])
    assert (len(result.history), result.best_epoch) == (epochs, min(epochs, 6))


def test_monitor_logloss(data):
    result = fit(model_of(data), data, QUICK, monitor="logloss")
    assert result.best_score is not None
    assert result.best_score < 0


class TestTasks:
    """A model of one's own stops early, too, by the score of its Task."""

    SCORES = (0.5, 0.7, 0.6, 0.7, 0.6, 0.9)

    def task(self) -> tuple[Task, list[torch.Tensor]]:
        """A task of scripted scores, and the weights that were scored."""
        weights = []

        def score(model: torch.nn.Module) -> float:
            assert not model.training
            weights.append(model.user.weight.detach().clone())
            return self.SCORES[len(weights) - 1]

        task = foreign_task()
        task.score = score
        return task, weights

    @pytest.mark.parametrize(("patience", "epochs", "best"), [(1, 3, 2), (3, 5, 2), (4, 6, 6), (0, 6, 6)])
    def test_it_stops_after_so_many_epochs_without_a_better_score(self, patience, epochs, best):
        task, weights = self.task()
        result = task.fit(task.model, epochs=6, seed=0, patience=patience)
        assert [record["score"] for record in result.history] == list(self.SCORES[:epochs])
        assert {record["lr_factor"] for record in result.history} == {1.0}
        assert (result.best_epoch, result.best_score) == (best, self.SCORES[best - 1])
        assert torch.equal(task.model.user.weight, weights[best - 1])
        assert not torch.equal(weights[0], weights[best - 1])

    def test_it_warns_where_few_steps_decide(self, caplog, monkeypatch):
        for few, warns in ((100, True), (4, False)):
            monkeypatch.setattr(loop, "FEW_STEPS", few)
            caplog.clear()
            task, _ = self.task()
            result = task.fit(task.model, epochs=6, seed=0, patience=1)
            said = f"at step {3 * task.num_batches('train')}, in epoch 3 of {task.num_batches('train')} steps each"
            assert len(result.history) == 3
            assert (said in caplog.text) == warns

    def test_without_patience_no_score_is_looked_at(self):
        task, weights = self.task()
        result = task.fit(task.model, epochs=6, seed=0)
        assert (result.best_epoch, result.best_score, weights) == (6, None, [])

    def test_without_a_score_the_validation_loss_counts(self):
        task = foreign_task()
        result = task.fit(task.model, epochs=3, seed=0, patience=1)
        assert result.best_score == pytest.approx(task.valid_score(task.model))
        assert result.best_score < 0

    def test_it_says_what_patience_needs(self):
        task = foreign_task()
        task._valid = None
        with pytest.raises(EmbtrimError, match="patience watches a validation score; give the Task `valid=` or"):
            task.fit(task.model, epochs=2, seed=0, patience=1)
        task._valid = iter(list(task.batches("train")))  # once only
        with pytest.raises(EmbtrimError, match="no valid batches to score on"):
            task.fit(task.model, epochs=2, seed=0, patience=1)

    def test_a_task_of_the_zoo_does_the_same(self, data):
        model, epochs = model_of(data, init_std=0.05), 30
        result = CTRTask(model, data, QUICK).fit(model, epochs=epochs, seed=0, patience=1)
        scores = [record["score"] for record in result.history]
        assert len(scores) == result.best_epoch + 1 < epochs
        assert evaluate(model, data, "valid").auc == pytest.approx(max(scores), abs=1e-12)
        assert CTRTask(model, data, QUICK).fit(model, epochs=1, seed=0).best_score is None


def test_hooks_are_called_and_extra_loss_counts(data):
    steps, extra = [], torch.nn.Parameter(torch.ones(()))
    hooks = Hooks(
        param_groups=lambda _: [torch.optim.SGD([extra], lr=0.1)],
        extra_loss=lambda m, b: extra**2,
        on_step=steps.append,
    )
    fit(model_of(data), data, QUICK, hooks=hooks, epochs=1)
    assert steps == list(range(1, data.num_batches("train", 256) + 1))
    assert extra.item() < 0.2


def test_sample_weights_matter(data):
    arrays = data.split("train")
    schema = data.schema.replace(weight="w")
    weights = np.where(np.asarray(arrays.labels) == 1, 5.0, 1.0).astype(np.float32)
    weighted = EncodedDataset(schema, {"train": dataclasses.replace(arrays, weights=weights)})
    heavy, plain = DeepFM(schema, embedding_dim=4, hidden_units=(8,)), model_of(data, hidden_units=(8,))
    fit(heavy, weighted, QUICK)
    fit(plain, EncodedDataset(data.schema, {"train": arrays}), QUICK)
    assert predict_logits(heavy, weighted, "train").mean() > predict_logits(plain, data, "train").mean() + 0.5


def test_a_checkpoint_from_before_a_setting_came_is_taken(data, tmp_path, monkeypatch):
    path, model = tmp_path / "state.safetensors", model_of(data)
    with monkeypatch.context() as earlier:
        earlier.setattr("embtrim.training.fitting.training_settings", lambda *given: {"epochs": 1, "model": "deepfm"})
        fit(model, data, QUICK, epochs=1, checkpoint=path)
    again = model_of(data)
    fit(again, data, QUICK, epochs=1, checkpoint=path)
    assert torch.equal(again.tables.weight, model.tables.weight)
    with pytest.raises(DataError, match="epochs = 1, now it is 2"):
        fit(model_of(data), data, QUICK, epochs=2, checkpoint=path)


def test_no_dense_gradient_when_lazy(data):
    model = model_of(data)
    seen = []
    fit(model, data, QUICK, epochs=1, hooks=Hooks(on_step=lambda _: seen.append(model.tables.weight.grad is None)))
    assert all(seen)
    assert len(seen) > 1


@pytest.mark.slow
def test_lazy_and_dense_agree_with_whole_table_l2(data):
    """The replayed decay keeps the lazy optimiser near the dense one: same metric on the planted data."""
    aucs = []
    for tables in ("lazy", "dense"):
        model = model_of(data)
        fit(model, data, QUICK, tables=tables, embedding_l2=0.01, epochs=6)
        aucs.append(evaluate(model, data, "test").auc)
    assert abs(aucs[0] - aucs[1]) < 0.01


@pytest.mark.slow
def test_bf16_and_fp32_agree(data):
    aucs = []
    for precision in ("fp32", "bf16"):
        model = model_of(data)
        result = fit(model, data, QUICK, precision=precision, epochs=6)
        assert precision in result.precision
        aucs.append(evaluate(model, data, "test").auc)
    assert abs(aucs[0] - aucs[1]) < 0.01


def torch_warns_of_itself(test):
    """While compiling, torch calls its own deprecated functions and reads gradients of tensors without one."""
    for warning in ("The .grad attribute of a Tensor that is not a leaf", ".torch.jit.script_method. is deprecated"):
        test = pytest.mark.filterwarnings(f"ignore:{warning}")(test)
    return test


@pytest.fixture
def traced_only(monkeypatch):
    """torch.compile without code generation, which takes many seconds; the fixture lists the graphs that ran."""
    calls = []

    def backend(graph, _inputs):
        return lambda *inputs: (calls.append(graph), graph(*inputs))[1]

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return calls


@pytest.mark.slow
@torch_warns_of_itself
@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_train_as_the_others_do(name, wide_data, traced_only):
    sizes = {key: value for key, value in {"embedding_dim": 4, "hidden_units": [8]}.items() if key in arguments(name)}
    plain, model = (build(name, wide_data.schema, **sizes) for _ in range(2))
    expected = fit(plain, wide_data, QUICK, epochs=1)
    assert not traced_only
    result = fit(model, wide_data, QUICK, epochs=1, compile=True)
    steps = wide_data.num_batches("train", QUICK.batch_size)
    assert len(traced_only) == steps, "one graph, in training alone"
    assert not {"forward", "look_up"} & set(vars(model))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    assert expected.compile_seconds == 0
    assert result.compile_seconds > 0
    assert sum(epoch["seconds"] for epoch in result.history) < result.seconds - result.compile_seconds
    seconds = result.history[0]["seconds"]
    rows = wide_data.num_rows("train") - QUICK.batch_size
    assert result.rows_per_second == pytest.approx(rows / seconds)


@pytest.mark.slow
@torch_warns_of_itself
def test_compiled_dropout_is_of_the_seed(data, traced_only):
    found = []
    for seed in (0, 0, 1):
        model = model_of(data, dropout=0.3)
        fit(model, data, QUICK, epochs=1, compile=True, seed=seed)
        found.append(predict_logits(model, data))
    assert len(traced_only) == 3 * data.num_batches("train", QUICK.batch_size), "one graph"
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_searches_do_not_compile(data, traced_only):
    task = CTRTask(model_of(data), data, QUICK.replace(compile=True))
    assert task.fit(model_of(data), epochs=1, seed=0).compile_seconds == 0
    assert not traced_only


@pytest.mark.slow
@torch_warns_of_itself
def test_compilation_without_a_compiler_says_what_to_do(data, tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(EmbtrimError, match=r"No working C.. compiler found.*; install a C.. compiler such as g.., or"):
        fit(model_of(data), data, QUICK, epochs=1, compile=True)


def test_a_fitted_model_can_be_copied_and_trained_by_anyone(data):
    model = model_of(data)
    fit(model, data, QUICK, epochs=1)
    clone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(clone.parameters(), lr=0.1)
    before = clone.tables.weight.detach().clone()
    batch = next(iter(data.batches("train", 64)))
    clone.train()
    clone(batch.ids_BC).sum().backward()
    optimizer.step()
    assert not torch.equal(before, clone.tables.weight)


def test_errors(data, wide_data):
    with pytest.raises(DataError, match="made for schema"):
        fit(model_of(wide_data), data, QUICK)
    with pytest.raises(DataError, match="no split 'holdout'"):
        evaluate(model_of(data), data, "holdout")
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        fit(model_of(data), data, batch_sise=3)
    with pytest.raises(ConfigError, match="l2_scope = 'batch' needs"):
        fit(model_of(data), data, QUICK, tables="dense", l2_scope="batch", embedding_l2=0.1)
    with pytest.raises(EmbtrimError, match="lower learning_rate"):
        fit(model_of(data, batch_norm=False), data, QUICK, optimizer="sgd", learning_rate=1e12)
    maps = {name: np.zeros(n, np.int32) for name, n in data.schema.tables.items()}
    with pytest.raises(DataError, match="recode"):
        evaluate(model_of(data), data.with_id_maps(maps), "test")


def test_lr_trains_without_embeddings(data):
    model = LR(data.schema)
    fit(model, data, QUICK, learning_rate=0.02)
    assert evaluate(model, data, "test").auc > 0.7


@given(rows=st.integers(1, 300), batch=st.integers(1, 70), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_row_is_read_once_an_epoch(rows, batch, seed):
    ids = np.arange(rows, dtype=np.int32)[:, None]
    data = EncodedDataset(Schema.from_sizes([rows]), {"train": SplitArrays(ids, np.zeros(rows, np.float32))})
    seen = [b.ids_BC[:, 0].tolist() for b in data.batches("train", batch, shuffle_seed=seed)]
    assert sorted(i for part in seen for i in part) == list(range(rows))
    assert len(seen) == data.num_batches("train", batch)
    assert all(len(part) == batch for part in seen[:-1])


def test_large_splits_are_shuffled_in_windows(monkeypatch):
    monkeypatch.setattr("embtrim.data.dataset.WINDOW_ROWS", 64)
    monkeypatch.setattr("embtrim.data.dataset.CHUNK_ROWS", 16)
    assert WINDOW_ROWS > 64
    ids = np.arange(1000, dtype=np.int32)[:, None]
    data = EncodedDataset(Schema.from_sizes([1000]), {"train": SplitArrays(ids, np.zeros(1000, np.float32))})
    order = [i for b in data.batches("train", 33, shuffle_seed=1) for i in b.ids_BC[:, 0].tolist()]
    assert sorted(order) == list(range(1000))
    assert order != sorted(order)
    assert abs(np.mean(order[:64]) - 500) < 250, "a window draws chunks from the whole split"
    assert order == [i for b in data.batches("train", 33, shuffle_seed=1) for i in b.ids_BC[:, 0].tolist()]


@pytest.mark.parametrize("rows, batch", [(64, 33), (999, 33), (1000, 16), (1000, 100)])
def test_the_order_of_a_seed_is_the_one_that_resumed_trainings_rely_on(monkeypatch, rows, batch):
    monkeypatch.setattr("embtrim.data.dataset.WINDOW_ROWS", 64)
    monkeypatch.setattr("embtrim.data.dataset.CHUNK_ROWS", 16)
    ids = np.arange(rows, dtype=np.int32)[:, None]
    data = EncodedDataset(Schema.from_sizes([rows]), {"train": SplitArrays(ids, np.zeros(rows, np.float32))})
    rng, expected = np.random.default_rng(7), []
    if rows == 64:
        expected = rng.permutation(64).tolist()
    else:
        starts = 16 * rng.permutation(-(-rows // 16))
        for first in range(0, len(starts), 4):
            chunks = [np.arange(start, min(start + 16, rows)) for start in sorted(starts[first : first + 4])]
            expected += rng.permutation(np.concatenate(chunks)).tolist()
    for skip in (0, 1, 5):
        read = [b.ids_BC[:, 0].tolist() for b in data.batches("train", batch, shuffle_seed=7, skip=skip)]
        assert read == [expected[i : i + batch] for i in range(skip * batch, rows, batch)]


def test_shuffled_reading_holds_row_numbers_and_no_window_of_rows(monkeypatch):
    monkeypatch.setattr("embtrim.data.dataset.WINDOW_ROWS", 4096)
    monkeypatch.setattr("embtrim.data.dataset.CHUNK_ROWS", 256)
    num_rows, num_columns = 20_000, 64
    arrays = SplitArrays(np.zeros((num_rows, num_columns), np.int32), np.zeros(num_rows, np.float32))
    data = EncodedDataset(Schema.from_sizes([1] * num_columns), {"train": arrays})
    tracemalloc.start()
    try:
        for _ in data.batches(
            "train", 30, shuffle_seed=1
        ):  # holds the last batch while the next is made, as `fit` does
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4096 * num_columns * 4 / 4


@pytest.mark.parametrize("window", [7, WINDOW_ROWS])
def test_rarest_value_counts(window, data, monkeypatch):
    monkeypatch.setattr("embtrim.training.evaluation.WINDOW_ROWS", window)
    counts, ids = data.value_counts("train"), data.split("test").ids
    names = [field.name for field in data.schema.id_fields]
    expected = [min(counts[name][i] for name, i in zip(names, row, strict=True)) for row in ids]
    assert rarest_value_counts(data, "test").tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    CONFIG = QUICK.replace(device="cuda")

    def test_it_trains_as_the_cpu_does(self, data):
        aucs = []
        for config in (QUICK, self.CONFIG):
            model = model_of(data)
            fit(model, data, config, embedding_l2=0.01)
            aucs.append(evaluate(model, data, "test", config).auc)
        assert abs(aucs[0] - aucs[1]) < 0.005

    @pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
    def test_an_interrupted_training_ends_as_an_uninterrupted_one(self, optimizer, data, tmp_path):
        config = self.CONFIG.replace(optimizer=optimizer, embedding_l2=0.01, checkpoint_seconds=0)
        whole, model = model_of(data, dropout=0.2), model_of(data, dropout=0.2)

        def interrupt(step: int) -> None:
            if step == 25:
                raise KeyboardInterrupt

        fit(whole, data, config)
        with pytest.raises(KeyboardInterrupt):
            fit(copy.deepcopy(model), data, config, hooks=Hooks(on_step=interrupt), checkpoint=tmp_path / "state")
        result = fit(model, data, config, checkpoint=tmp_path / "state")
        assert result.restored_seconds > 0
        for name, value in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("method", ["sseds", "pme", "guided"])
    def test_searches_keep_their_promises(self, method, check):
        task = zoo_task()
        CHECKS[check](CTRTask(task.model, task.data, task.config.replace(device="cuda")), METHODS[method].config())

    def test_foreign_modules_are_verified(self):
        task = foreign_task()
        model = copy.deepcopy(task.model).cuda()
        assert verify(model, search(task, PMEConfig(), "40%"), task).passed

    @pytest.mark.parametrize("align", ["scatter", "project"])
    def test_compact_models_predict_as_on_the_cpu(self, align, wide_data):
        model = model_of(wide_data)
        fit(model, wide_data, self.CONFIG, epochs=1)
        task = CTRTask(model, wide_data, self.CONFIG)
        plan = search(task, SSEDSConfig(align=align), "40%")
        recoded = wide_data.recode(plan)
        for init in ("inherit", "scratch"):
            small = compact(model, plan, init=init)
            assert small.tables.weight.device.type == "cuda"
            fit(small, recoded, self.CONFIG, epochs=1)
            small.tables.settle()
            on_cuda = predict_logits(small, recoded, "test", self.CONFIG)
            np.testing.assert_allclose(on_cuda, predict_logits(small, recoded, "test"), rtol=1e-3, atol=1e-4)


class TestKeepsStart:
    """A training that keeps its start ends no worse than it began."""

    @staticmethod
    def train(data, learning_rate: float, started: bool, **settings):
        model = DeepFM(data.schema, embedding_dim=4, hidden_units=(8,))
        if started:
            fit(model, data, epochs=3, batch_size=256, learning_rate=0.02, precision="fp32")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        settings = {"epochs": 2, "batch_size": 256, "learning_rate": learning_rate, "precision": "fp32", **settings}
        result = fit(model, data, hooks=Hooks(keeps_start=True), **settings)
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return model, result, same

    def test_the_start_is_kept_where_every_epoch_is_worse(self, data):
        model, result, same = self.train(data, learning_rate=3.0, started=True)
        assert same
        assert result.best_epoch == 0
        assert result.best_score == evaluate(model, data, "valid").auc
        assert all(epoch["score"] < result.best_score for epoch in result.history)

    def test_an_epoch_may_have_to_beat_it(self, data):
        epochs = {}
        for start_to_beat in (False, True):
            model = DeepFM(data.schema, embedding_dim=4, hidden_units=(8,))
            fit(model, data, epochs=3, batch_size=256, learning_rate=0.02, precision="fp32")
            hooks = Hooks(keeps_start=True, start_to_beat=start_to_beat)
            settings = {"epochs": 3, "batch_size": 256, "learning_rate": 3.0, "patience": 1, "precision": "fp32"}
            result = fit(model, data, hooks=hooks, **settings)
            assert result.best_epoch == 0
            epochs[start_to_beat] = len(result.history)
        assert epochs[True] == 1 < epochs[False]

    def test_a_better_epoch_replaces_it(self, data):
        model, result, same = self.train(data, learning_rate=0.02, started=False)
        assert not same
        assert result.best_epoch > 0
        assert result.best_score == evaluate(model, data, "valid").auc

    def test_without_it_the_best_epoch_counts(self, data):
        model = DeepFM(data.schema, embedding_dim=4, hidden_units=(8,))
        fit(model, data, epochs=3, batch_size=256, learning_rate=0.02, precision="fp32")
        assert fit(model, data, epochs=1, batch_size=256, learning_rate=3.0).best_epoch == 1

    def test_a_resumed_training_keeps_the_same_start(self, data, tmp_path):
        path = tmp_path / "state.safetensors"

        def train(checkpoint=None, stop=None):
            model = DeepFM(data.schema, embedding_dim=4, hidden_units=(8,))
            fit(model, data, epochs=3, batch_size=256, learning_rate=0.02, precision="fp32")

            def on_step(step: int) -> None:
                if step == stop:
                    raise KeyboardInterrupt

            hooks = Hooks(keeps_start=True, on_step=on_step)
            settings = {"epochs": 2, "batch_size": 256, "learning_rate": 3.0, "checkpoint_seconds": 0}
            return model, fit(model, data, hooks=hooks, checkpoint=checkpoint, precision="fp32", **settings)

        whole, expected = train()
        for stop in (4, 25):  # in the first epoch, and in the second one
            with pytest.raises(KeyboardInterrupt):
                train(path, stop)
        model, result = train(path)
        assert (
            (result.best_epoch, result.best_score)
            == (expected.best_epoch, expected.best_score)
            == (0, result.best_score)
        )
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
        )
