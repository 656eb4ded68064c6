"""run: the whole way, its records, and what it refuses."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.compaction.verification import verify
from embtrim.data.encoder import Encoder
from embtrim.errors import BudgetError, ConfigError, DataError, EmbtrimError
from embtrim.experiments import estimates, steps
from embtrim.experiments.estimates import Measured, Range, dry_run
from embtrim.experiments.records import RunRecord
from embtrim.experiments.run import run
from embtrim.experiments.settings import RunConfig
from embtrim.experiments.steps import shrink, train_full
from embtrim.experiments.sweep import sweep_passes
from embtrim.experiments.tolerance import smallest_within
from embtrim.models import build
from embtrim.plan.plan import SizePlan
from embtrim.serving.bundle import Bundle, load_bundle
from embtrim.serving.predicting import write_predictions
from embtrim.system import memory
from embtrim.system.memory import peak_memory
from embtrim.testing.toys import planted_data
from embtrim.training.evaluation import predict_logits
from embtrim.training.fitting import training_settings
from embtrim.training.settings import TrainConfig
from tests.recorder import Recorder

pytestmark = pytest.mark.slow

CONFIG = RunConfig(
    hparams={"embedding_dim": 8, "hidden_units": [16]},
    train=TrainConfig(epochs=2, batch_size=256, learning_rate=3e-3, precision="fp32", embedding_l2=0.0),
    budget="30%",
    controls=("uniform", "random"),
    seeds=2,
)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 30, 4000), rng.integers(0, 200, 4000)
    click = (rng.random(4000) < 1 / (1 + np.exp(-rng.normal(size=30)[user] * 2))).astype(int)
    log = pl.DataFrame({"user": user, "item": item, "click": click}).cast({"user": pl.String, "item": pl.String})
    return embtrim.encode(log, label="click", out=tmp_path_factory.mktemp("logs") / "data")


def test_run_writes_records_plans_bundles_and_its_settings(encoded, tmp_path):
    told = Recorder()
    records = run(encoded, CONFIG, tmp_path / "x", callbacks=[told])
    assert told.records == [(record, done, 8) for done, record in enumerate(records, 1)]
    names = list(dict.fromkeys(epoch.name for epoch in told.epochs))
    assert names == [f"deepfm-{record.variant}-seed{record.seed}" for record in records]
    counts = {name: sum(e.name == name for e in told.epochs) for name in names}
    for name, record in zip(names, records, strict=True):  # guided may train from several starts
        assert counts[name] == record.epochs or (record.variant == "guided" and counts[name] > record.epochs)
    assert told.epochs[0].stage == "seed 0, full model"
    assert [r.variant for r in records] == ["full", "guided", "uniform", "random"] * 2
    assert {r.seed for r in records} == {0, 1}
    for record in records:
        path = tmp_path / "x" / "records" / f"{record.variant}-seed{record.seed}.json"
        assert RunRecord.load(path) == record
        bundle = load_bundle(tmp_path / "x" / "bundles" / path.stem)
        assert bundle.info["metrics"]["test"]["auc"] == record.test["auc"]
        assert record.bundle_bytes > record.table_bytes
        assert sum(record.bytes_by_table.values()) == record.table_bytes
        assert set(record.bits_by_field) == set(record.widths)
        if record.variant == "full":
            assert record.verification is None
            assert record.num_params == record.num_full_params
            assert set(record.bits_by_field.values()) == {32}
        else:
            assert all(2 <= bits <= 32 or bits == 0 for bits in record.bits_by_field.values())
            assert record.verification["passed"]
            assert record.bits == "mixed"
            assert record.table_bytes <= 4 * (0.3 * record.num_full_params + record.num_first_order_params)
            plan = SizePlan.load(tmp_path / "x" / "plans" / path.with_suffix(".json").name)
            assert plan.num_params == record.num_params
    again = RunConfig.parse(embtrim.config.read_toml(tmp_path / "x" / "config.toml"))
    assert again == CONFIG.replace(bits="mixed")
    with pytest.raises(DataError, match=r'run with budget = "50%", now it is "7%"'.replace("50%", CONFIG.budget.text)):
        run(encoded, CONFIG.replace(budget="7%"), tmp_path / "x")
    (tmp_path / "x" / "config.toml").unlink()
    with pytest.raises(DataError, match="not empty"):
        run(encoded, CONFIG, tmp_path / "x")


def test_finished_run_is_not_made_again(encoded, tmp_path, monkeypatch):
    config = CONFIG.replace(seeds=1, controls=())
    first = run(encoded, config, tmp_path)
    monkeypatch.setattr("embtrim.experiments.run.train_full_swept", None)
    assert run(encoded, config.replace(train=config.train.replace(checkpoint_seconds=1)), tmp_path) == first
    with pytest.raises(
        DataError, match=r"belongs to a run with train\.epochs = \d+, now it is 9; choose another --out"
    ):
        run(encoded, config.replace(train=config.train.replace(epochs=9)), tmp_path)
    path = tmp_path / "records" / "full-seed0.json"
    path.write_text(path.read_text().replace(encoded.schema.fingerprint, "0123456789ab"))
    with pytest.raises(DataError, match="made on data 0123456789ab"):
        run(encoded, config, tmp_path)


def test_a_continued_run_counts_all_of_its_models(encoded, tmp_path, capsys):
    config = CONFIG.replace(seeds=1, controls=("random",), bits=32, train=CONFIG.train.replace(epochs=1))
    first = run(encoded, config, tmp_path)
    for record in first[1:]:
        (tmp_path / "records" / f"{record.variant}-seed0.json").unlink()
    assert [r.test for r in run(encoded, config, tmp_path, progress=True)] == [r.test for r in first]
    lines = capsys.readouterr().err.splitlines()
    assert "1 of 3 models are made already" in lines
    assert any(line.startswith("seed 0: 2 of 3 models are made, about ") for line in lines)


def test_same_seed_same_metrics(encoded, tmp_path):
    config = CONFIG.replace(seeds=1, controls=())
    first, second = (run(encoded, config, tmp_path / name) for name in ("a", "b"))
    assert [r.test for r in first] == [r.test for r in second]
    assert [r.widths for r in first] == [r.widths for r in second]


def test_max_loss_finds_a_small_plan_within_the_tolerance(encoded, monkeypatch):
    monkeypatch.setattr("embtrim.experiments.tolerance.BISECTIONS", 3)
    config = CONFIG.replace(method="sseds", train=CONFIG.train.replace(epochs=4), max_loss=0.02, bits=32, teacher=0)
    full = train_full(encoded, config)
    found = smallest_within(full, encoded, config)
    assert found.record.valid["auc"] >= full.record.valid["auc"] - 0.02
    assert found.record.num_params < full.record.num_params / 2
    assert found.record.search_seconds > found.record.train_seconds, "the trainings of the bisection count as search"
    monkeypatch.setattr("embtrim.experiments.tolerance.SMALLEST_SHARE", 0.0001)
    monkeypatch.setattr("embtrim.experiments.tolerance.BISECTIONS", 1)
    with pytest.raises(EmbtrimError, match="allow more loss"):
        smallest_within(full, encoded, config.replace(max_loss=1e-9))


def test_a_share_that_buys_no_slot_is_too_small_for_any_loss(encoded, monkeypatch):
    """Of shares 1% and 10% the first buys no column of either table: the search for the smallest plan goes on above it."""
    monkeypatch.setattr("embtrim.experiments.tolerance.SMALLEST_SHARE", 0.0001)
    monkeypatch.setattr("embtrim.experiments.tolerance.BISECTIONS", 2)
    config = CONFIG.replace(method="random", max_loss=0.4, bits=32)
    full = train_full(encoded, config)
    with pytest.raises(
        BudgetError, match=r"'random' keeps no row of any table within a budget of 1%; 1\.\d+% is enough"
    ):
        shrink(full, encoded, config.replace(method="random", budget="1%"))
    assert smallest_within(full, encoded, config).record.budget == "10.0000%"


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, "mixed"),
        ({"budget": "2 MB"}, "mixed"),
        ({"budget": "2000 params"}, 32),
        ({"budget": "2000 params", "max_loss": 0.01}, "mixed"),  # the budget is not read
        ({"target": "onnx"}, "mixed"),
        ({"target": "fbgemm"}, 32),
        ({"bits": 8, "budget": "2000 params", "target": "fbgemm"}, 8),
        ({"bits": 32}, 32),
    ],
)
def test_bits_follow_the_budget_and_the_target(changes, bits):
    config = RunConfig(**changes)
    assert config.stored_bits == bits
    assert config.replace(bits=config.stored_bits).stored_bits == bits


def test_a_run_within_parameters_stores_32_bits(encoded, tmp_path):
    config = CONFIG.replace(seeds=1, controls=(), method="uniform", budget="800 params")
    record = run(encoded, config, tmp_path)[1]
    assert record.bits == 32
    assert record.num_params <= 800
    assert embtrim.config.read_toml(tmp_path / "config.toml")["bits"] == 32


def test_dry_run_says_what_would_happen(encoded):
    mixed = dry_run(encoded, CONFIG)
    assert (mixed["config"]["budget"], mixed["config"]["bits"]) == ("30%", "mixed")
    facts = dry_run(encoded, CONFIG.replace(bits=32))
    assert mixed["table_bytes_allowed"] <= facts["table_bytes_allowed"]
    rows = sum(encoded.schema.tables.values())
    assert facts["table_bytes_before"] == 4 * (rows * 8 + rows)
    assert facts["table_bytes_allowed"] == int(4 * rows * 8 * 0.3 + 4 * rows)
    assert facts["config"]["hparams"]["hidden_units"]  # a default of the model
    for name in ("seconds_per_step", "seconds", "memory_bytes", "disk_bytes"):
        assert 0 < facts[name]["least"] < facts[name]["most"]
    json.dumps(facts)
    found = dry_run(
        encoded, CONFIG.replace(method="guided", search={}, budget="auto")
    )  # the controls predict no budget
    assert found["config"]["budget"] == "auto"
    assert found["config"]["controls"]


def test_an_estimate_counts_all_trainings(encoded, monkeypatch):
    measured = Measured(Range(1, 2), Range(0, 0), 100, 10)
    monkeypatch.setattr(estimates, "measure", lambda *given: measured)
    monkeypatch.setattr(estimates, "FILE_SECONDS", 0.0)
    steps = encoded.num_batches("train", CONFIG.train.batch_size)
    config = CONFIG.replace(seeds=1, controls=(), method="uniform", teacher=0.0, bits=32)
    config = config.replace(train=config.train.replace(epochs=10, patience=2, embedding_l2=0.1))
    # Three to ten epochs of the full model, as many of a compact one that is 0.3 to 1 times as slow, and a pass to verify.
    assert dry_run(encoded, config)["seconds"] == {"least": round(3 * 1.3 * steps, 1), "most": (10 + 11) * 2 * steps}
    swept = dry_run(encoded, config.replace(train=config.train.replace(embedding_l2=None)))["seconds"]
    share, least, most = sweep_passes(encoded, config)
    more = round(share * steps)
    assert swept == {"least": round(3 * 1.3 * steps + least * more, 1), "most": (21 * steps + most * more) * 2}
    assert dry_run(encoded, config.replace(seeds=2))["seconds"]["most"] == 84 * steps


def test_it_refuses_early(encoded, data, tmp_path):
    out = tmp_path / "never"
    with pytest.raises(ConfigError, match="did you mean 'sseds'"):
        run(encoded, CONFIG.replace(method="ssed"), out)
    with pytest.raises(ConfigError, match="unknown key 'scor'"):
        run(encoded, CONFIG.replace(search={"scor": "abs"}), out)
    with pytest.raises(ConfigError, match="no embedding tables"):
        run(encoded, CONFIG.replace(model="lr", hparams={}), out)
    with pytest.raises(EmbtrimError, match="budget"):
        run(encoded, CONFIG.replace(budget="ten percent"), out)
    without_test = embtrim.data.dataset.EncodedDataset(
        data.schema, {"train": data.split("train"), "valid": data.split("valid")}
    )
    for bits in (None, 32, 8, "mixed"):
        with pytest.raises(BudgetError, match="budget of 1 params is below the smallest plan of any method, 2 params"):
            run(encoded, CONFIG.replace(budget="1 params", bits=bits), out)
    with pytest.raises(DataError, match="no split 'test'"):
        run(without_test, CONFIG, out)
    assert not out.exists()


def test_peak_memory_sees_an_allocation():
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        block = np.ones(400_000_000, np.uint8)
        block += 1
    assert peak.bytes - before.bytes > 250_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_training_takes_its_pages_once():
    """In processes of their own: what other tests have freed decides what glibc does here."""
    code = """
import resource, sys
from contextlib import nullcontext
import embtrim
from embtrim.training import loop, settings
from embtrim.testing.toys import planted_data
if sys.argv[1] == "given back":
    loop.freed_pages_kept = nullcontext
data = planted_data(num_rows=20_000)
model = embtrim.models.DeepFM(data.schema, embedding_dim=64, hidden_units=(400, 400))
faults = []
def note(step):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
embtrim.fit(model, data, epochs=6, patience=0, batch_size=4096, hooks=settings.Hooks(on_step=note))
print(faults[-1] - faults[11])  # three epochs, once the process has what it needs
"""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < given_back / 2


def test_thresholds_are_put_back_after_the_last_of_several_trainings(monkeypatch):
    called = []
    monkeypatch.setattr(memory, "_c_library", lambda *arguments: called.append(arguments))
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    with memory.freed_pages_kept():
        with pytest.raises(KeyError), memory.freed_pages_kept():
            raise KeyError
        assert ("malloc_trim", 0) not in called
        before = len(called)
    assert called[before:] == [("mallopt", -1, 64 << 20), ("malloc_trim", 0)]
    called.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")  # somebody's own choice
    with memory.freed_pages_kept():
        pass
    assert called == []


def test_scoring_keeps_freed_pages(encoded, tmp_path, monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    keeping = []
    model = build(CONFIG.model, encoded.schema, **CONFIG.hparams)
    model.register_forward_hook(lambda *_: keeping.append(memory._num_keeping))
    predict_logits(model, encoded, "test")
    bundle = Bundle(model, Encoder.load(encoded.folder), {})
    log = tmp_path / "log.parquet"
    pl.DataFrame({"user": ["1", "2"], "item": ["3", "4"]}).write_parquet(log)
    list(bundle.predict_chunks(log))
    write_predictions(bundle, log, tmp_path / "scores.parquet")
    assert len(keeping) >= 3
    assert set(keeping) == {1}
    assert memory._num_keeping == 0


def test_search_memory_is_what_the_search_alone_needs(data, monkeypatch):
    full = train_full(data, CONFIG.replace(train=CONFIG.train.replace(epochs=1)))
    resident = np.ones(300_000_000, np.uint8)
    really = steps.search

    def hungry(*arguments):
        block = np.ones(200_000_000, np.uint8)
        block += 1
        return really(*arguments)

    def hungry_after(*arguments, **more):
        block = np.ones(400_000_000, np.uint8)
        block += 1
        return verify(*arguments, **more)

    monkeypatch.setattr(steps, "search", hungry)
    monkeypatch.setattr(steps, "verify", hungry_after)
    record = shrink(full, data, CONFIG.replace(method="random", budget="30%")).record
    assert 190e6 < record.search_peak_bytes < 290e6
    assert record.peak_memory_bytes > resident.nbytes + 390e6
    assert record.epoch_seconds == data.num_rows("train") / full.record.rows_per_second
    assert record.search_epochs == pytest.approx(record.search_seconds / record.epoch_seconds)


@pytest.mark.parametrize(("tables", "kernels", "said"), [
    ("lazy", "", "fused"), ("lazy", "torch", "torch"), ("dense", "", None),
])  # fmt: skip
def test_a_record_says_which_kernels_moved_the_rows(tables, kernels, said, monkeypatch):
    monkeypatch.setenv("EMBTRIM_KERNELS", kernels)
    data = planted_data(num_rows=200, noise_vocab=20)
    config = RunConfig(model="fm", hparams={"embedding_dim": 2}, train=TrainConfig(epochs=1, tables=tables))
    assert training_settings(build("fm", data.schema, embedding_dim=2), data, config.train)["kernels"] == said
    assert train_full(data, config).record.versions.get("kernels") == said
