"""The benchmark suite computes what it says and times what `fit` does; no test here asserts a time."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import bench
import embtrim
import measure
import ours
import peers
import report
import synthetic
import workloads
from embtrim.data.dataset import EncodedDataset, SplitArrays
from embtrim.tables.views import stacked_projections

ROWS = 2000
PRECISIONS = {"fp32": {"matmul": "medium", "bf16": False}, "auto": {"matmul": "medium", "bf16": True}}
SMALL = {"hidden_units": (8, 8)}
PEERS_PYTHON = bench.HERE / ".peers-venv" / "bin" / "python"


@pytest.fixture(autouse=True)
def _kernels_chosen_by_a_job_are_forgotten(monkeypatch):
    monkeypatch.setenv("EMBTRIM_KERNELS", "torch")


def runs(key, **series):
    names, columns = list(series), zip(*series.values(), strict=True)
    return [
        {"key": key, "repeat": i, "commit": "0123 modified", **dict(zip(names, values, strict=True))}
        for i, values in enumerate(columns)
    ]


def accuracy(cell, auc):
    rest = {"logloss": [[0.4, 0.5]], "epochs": [[3, 4]], "max_epochs": [5], "rows_per_s": [1], "precision": ["fp32"]}
    return runs(f"accuracy/frappe-64/{cell}", auc=[auc], **rest)


@pytest.fixture
def results():
    """Medians: FuxiCTR 200 ms, ours 10 ms in fp32 and 40 in auto, at middle tables; auto 10 and 11.5 at small and large."""
    ours_auto = {"precision": ["bf16"], "peak_bytes": [3e9]}
    return {
        "machine": {
            "processor": "a processor, 2 cores", "memory_bytes": 16e9, "system": "Linux 6", "env": {"OMP_WAIT_POLICY": "passive"},
            "versions": {"torch": "2.13.0"}, "commit": "0123 modified", "precisions": PRECISIONS, "load": 2.0, "started": "today",
            "device": "cpu",
        },
        "settings": {"quick": False, "repeats": 3, "threads": 2,
                     "scale": {"table_rows": [1_000_000, 5_000_000, 50_000_000], "batch_size": 4096}},
        "runs": [
            *runs("train/middle/FuxiCTR DeepFM as shipped", step_ms=[100, 300, 200], precision=["fp32"] * 3, peak_bytes=[1e9] * 3),
            *runs("train/middle/embtrim width 16 fp32", step_ms=[10, 9, 50], precision=["fp32"] * 3, peak_bytes=[1e9] * 3),
            *runs("train/middle/embtrim width 16 auto", step_ms=[40], **ours_auto),
            *runs("train/middle/embtrim mixed widths auto, compiled", step_ms=[12.5], compile_seconds=[41.2], **ours_auto),
            *runs("train/middle/torchrec width 16 auto", step_ms=[30], **ours_auto),
            *runs("train/small/embtrim width 16 auto", step_ms=[10], **ours_auto),
            *runs("train/large/embtrim width 16 auto", step_ms=[11.5], **ours_auto),
            *runs("train/middle/FBGEMM width 16 auto", error=["ImportError: no fbgemm"]),
            *runs("encode/embtrim", rows=[100], rows_per_s=[1000], peak_bytes=[2.5e9], peak_file_bytes=[3e8], vocabulary=[7],
                  log_bytes=[1e9]),
            *runs("encode/FuxiCTR preprocessing", rows=[100], rows_per_s=[100], peak_bytes=[6e9], vocabulary=[7], log_bytes=[1e9]),
            *runs("encode/embtrim, big log", rows=[1000], rows_per_s=[100], peak_bytes=[1e9], vocabulary=[7], log_bytes=[1e10]),
            *runs("read/fit/smallest log", rows=[10], rows_per_s=[1], peak_bytes=[5e8], kernels=["torch"]),
            *runs("read/fit/largest log", rows=[99], rows_per_s=[1], peak_bytes=[6e8], peak_file_bytes=[9e8], kernels=["torch"]),
            *runs("profile/embtrim width 16 auto", page_faults=[50], step_ms=[3], outside=[0.1], precision=["bf16"],
                  top=[[{"operator": "aten::mm", "self_ms": 2, "share": 0.7, "calls": 8}]],
                  allocations=[[{"operator": "aten::mm", "bytes": 2e6, "calls": 8}]]),
            *runs("export/full", latency_ms=[{"eager": {"1": 0.5}, "onnxruntime": {"1": 0.4}}], file_bytes=[{"onnxruntime": 8e6}]),
            *runs("export/compact 10%, 4 bits", latency_ms=[{"eager": {"1": 0.7}, "onnxruntime": {"1": 0.6}}],
                  file_bytes=[{"onnxruntime": 1e6}]),
            *runs("export/compact 10%", latency_ms=[{"eager": {"1": 0.5}, "onnxruntime": {"1": 0.5}}]),
            *accuracy("dense fp32", [0.80, 0.82]), *accuracy("lazy fp32", [0.82, 0.84]), *accuracy("lazy auto", [0.83, 0.85]),
            *runs("predict/embtrim full", latency_ms=[{"1": 1.0, "4096": 30.0}]),
            *runs("predict/embtrim compact 10%", latency_ms=[{"1": 1.0, "4096": 24.0}]),
        ],
    }  # fmt: skip


def verdicts(results):
    summary = report.summarise(results["runs"])
    return {goal.text: report.judge(goal, summary) for goal in report.GOALS}


def test_goals_are_judged_by_medians(results):
    found = verdicts(results)
    step = "step at middle tables: FuxiCTR as shipped over embtrim width 16"
    assert found[f"{step} fp32"] == {"value": 20.0, "verdict": "met", "margin": 2.0, "why": ""}
    assert found[f"{step} auto"]["verdict"] == "missed"
    assert found[f"{step} auto"]["margin"] == pytest.approx(5 / 17)
    grows = found["step, width 16 auto: large over small tables"]
    assert (grows["value"], grows["verdict"]) == (pytest.approx(1.15), "met")
    assert grows["margin"] == pytest.approx(1.2 / 1.15)
    encoding = "encoding, rows/s: embtrim over FuxiCTR"
    assert found[encoding]["margin"] == pytest.approx(10 / 8)
    assert found[f"{encoding}, with [fast], which encoding does not use"]["margin"] == pytest.approx(1)
    memory = found["encoding: peak anonymous memory, GB"]
    assert (memory["value"], memory["verdict"]) == (2.5, "missed")
    assert found["minor page faults per step at middle tables, width 16 auto"]["margin"] == 2
    assert found["inference at batch 1: full over compact"]["verdict"] == "met"
    assert found["inference at batch 4096: full over compact"]["value"] == pytest.approx(1.25)


def test_the_goals_of_memory_exports_and_torchrec(results):
    found = verdicts(results)
    assert found["step at middle tables, width 16 auto: torchrec over embtrim"]["value"] == 0.75
    assert found["step at middle tables, width 16 fp32: torchrec over embtrim"]["verdict"] == "not measured"
    assert found["encoding the big log: peak anonymous memory, GB"]["margin"] == 2
    training = found["training: peak anonymous memory, largest over smallest log"]
    assert (training["value"], training["verdict"]) == (1.2, "missed")
    onnx = "inference at batch 1, {}: onnxruntime over eager"
    assert found[onnx.format("full")]["verdict"] == "met"  # 0.8, at most 0.83
    assert found[onnx.format("compact 10%")]["verdict"] == "missed"
    assert found[onnx.format("mixed widths")]["why"] == "export/mixed widths: not run; export/mixed widths: not run"


def test_accuracies_are_within_noise_where_means_differ_by_no_more_than_the_spread(results):
    # Both have the spread sqrt(2) / 100; the means differ by 2/100 and by 1/100.
    found = verdicts(results)
    text = "test AUC, frappe-64: {}, difference of means over spread of seeds"
    lazy, auto = found[text.format("lazy fp32 from dense fp32")], found[text.format("lazy auto from lazy fp32")]
    assert (lazy["value"], lazy["verdict"]) == (pytest.approx(2**0.5), "missed")
    assert (auto["value"], auto["verdict"]) == (pytest.approx(2**-0.5), "met")
    page = report.markdown(results)
    assert "1.41: beyond seed noise" in page
    assert "0.71: within seed noise" in page


def test_equal_values_neither_divide_by_zero_nor_miss():
    assert report.difference_over_spread([0.5, 0.5], [0.5, 0.5]) == float("inf")
    goal = report.Goal("none", of=("a", "n"), at_most=1)
    assert report.judge(goal, {"a": {"n": 0.0}})["verdict"] == "met"


def test_what_was_not_measured_is_said_with_the_reason(results):
    found = verdicts(results)["step at middle tables, width 16 auto: FBGEMM over embtrim"]
    assert (found["verdict"], found["value"]) == ("not measured", None)
    assert "ImportError: no fbgemm" in found["why"]
    never_run = verdicts(results)["reading shuffled batches: million rows/s"]
    assert never_run["why"] == "read/shuffled batches: not run"


def test_the_page_has_the_figures_and_what_makes_them_doubtful(results):
    page = report.markdown(results)
    assert "| ≥ 10 | 20 | met by 100% |" in page
    assert "| ≥ 17 | 5 | missed by 71% |" in page
    assert "| embtrim width 16 fp32 | fp32 | 10.00 | 9.00 to 50.00 | 409,600 |" in page
    assert "| train/middle/FBGEMM width 16 auto | ImportError: no fbgemm |" in page
    assert "| embtrim | 100 | 1.00 | 1,000 | 2.50 | 0.30 | 7 |" in page
    assert "| FuxiCTR preprocessing | 100 | 1.00 | 100 | 6.00 |  | 7 |" in page
    assert "fused kernels: 10% of 3.00 ms. Minor page faults per step: 50." in page
    assert "\n\nembtrim mixed widths auto, compiled: 41 s for the first step.\n\n" in page
    assert "| full | onnxruntime | 0.400 | 8.00 | 100.0% |" in page
    assert "| compact 10%, 4 bits | eager | 0.700 |  |  |" in page
    assert "| compact 10%, 4 bits | onnxruntime | 0.600 | 1.00 | 12.5% |" in page
    assert "| an epoch of fit, largest log | 99 | torch | 1 | 0.600 | 0.90 |" in page
    assert "| embtrim commit | 0123 modified: train, encode, read, " in page
    for doubt in ("OMP_WAIT_POLICY was passive", "The load was 2.0", "tree was modified", "3 repeats"):
        assert doubt in page
    results["machine"] |= {"env": {}, "load": 0.1}
    results["settings"]["repeats"] = 5
    for run in results["runs"]:
        run["commit"] = "0123"
    results["runs"] = [run for run in results["runs"] if run["key"].startswith("train/middle/")]
    (few,) = report.warnings(results)
    assert "train/middle (1), train/middle (3)" in few
    results["runs"] = [run for run in results["runs"] if run["key"].endswith("shipped")] * 2
    assert report.warnings(results) == []


def test_goals_name_jobs_that_there_are(tmp_path):
    keys = {
        job.key
        for name in workloads.NAMES
        for job in workloads.jobs(name, workloads.QUICK, tmp_path, tmp_path, PRECISIONS)
    }
    for goal in report.GOALS:
        for place in (goal.of, goal.over):
            assert not isinstance(place, tuple) or place[0] in keys, goal.text


@pytest.fixture
def machine():
    return {"processor": "a processor", "commit": "0123", "load": 0.1, "started": "today"}


SETTINGS = {"threads": 1, "device": "cpu"}


def test_interrupted_results_go_on_without_their_errors(tmp_path, machine, monkeypatch):
    path = tmp_path / "bench.json"
    assert bench.started_results(path, machine, SETTINGS)["runs"] == []
    done = {"key": "a", "repeat": 0, "commit": "0123", "step_ms": 1.0}
    failed = {"key": "b", "repeat": 0, "commit": "0123", "error": "no peers"}
    path.write_text(json.dumps({"machine": machine, "settings": SETTINGS, "runs": [done, failed]}))
    results = bench.started_results(path, {**machine, "load": 2.0, "started": "later"}, SETTINGS)
    assert results["runs"] == [done]
    ran = []
    monkeypatch.setattr(measure, "run_alone", lambda command, env: ran.append(command) or {"step_ms": 2.0})
    for repeat in range(3):
        for key in "ab":
            bench.run_once(workloads.Job(key, "ours.py", "train", max_repeats=2), repeat, results, None, "")
    assert [(run["key"], run["repeat"]) for run in results["runs"]] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert len(ran) == 3
    assert json.loads(ran[0][2]) == ["train", 1, "cpu", {}]


def test_results_of_two_commits_are_not_mixed_within_a_workload(tmp_path, machine):
    path, job = tmp_path / "bench.json", workloads.Job("train/small/a", "ours.py", "train")
    done = {"key": "train/small/a", "repeat": 0, "commit": "0123", "step_ms": 1.0}
    path.write_text(json.dumps({"machine": machine, "settings": SETTINGS, "runs": [done]}))
    results = bench.started_results(path, machine | {"commit": "4567", "load": 0.3}, SETTINGS)
    assert (results["runs"], results["machine"]["commit"]) == ([done], "4567")
    bench.check_commits(path, [workloads.Job("read/a", "ours.py", "read")], results)
    with pytest.raises(SystemExit, match="has results of 'train' of commit 0123, this is 4567; move it away"):
        bench.check_commits(path, [job], results)
    bench.check_commits(path, [job], bench.started_results(path, machine, SETTINGS))


@pytest.mark.parametrize("changed", ["processor", "threads"])
def test_results_of_another_machine_or_with_other_settings_are_not_mixed(tmp_path, machine, changed):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"machine": machine, "settings": SETTINGS, "runs": []}))
    with pytest.raises(SystemExit, match="another machine or settings"):
        bench.started_results(path, *({**d, changed: 7} if changed in d else d for d in (machine, SETTINGS)))


def test_without_an_environment_peers_are_not_measured(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("torch==0.0.0\n")
    monkeypatch.setattr(bench, "REQUIREMENTS", tmp_path / "requirements.txt")
    fails = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: fails)
    python, why = bench.peers_environment(tmp_path / "venv", "cpu")
    assert python is None
    assert "No matching distribution" in why
    results = {"settings": SETTINGS, "runs": [], "machine": {"commit": "0123"}}
    key = "train/middle/FBGEMM width 16 auto"
    for repeat in range(2):
        bench.run_once(workloads.Job(key, "peers.py", "train", {}, "peers"), repeat, results, python, why)
    summary = report.summarise(results["runs"])
    assert len(results["runs"]) == 1
    goal = next(goal for goal in report.GOALS if (key, "step_ms") == goal.of)
    found = report.judge(goal, summary)
    assert found["verdict"] == "not measured"
    assert "No matching distribution" in found["why"]


def test_another_device_needs_an_environment_that_is_there(tmp_path):
    python, why = bench.peers_environment(tmp_path, "cuda")
    assert python is None
    assert "is not an environment with cuda builds" in why
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert bench.peers_environment(tmp_path, "cuda") == (tmp_path / "bin" / "python", "")


def test_real_data_that_are_not_there_are_not_measured(tmp_path):
    listed = workloads.jobs("real", workloads.QUICK, tmp_path, tmp_path / "nowhere", PRECISIONS)
    results = {"settings": SETTINGS, "runs": [], "machine": {"commit": "0123"}}
    bench.run_once(listed[0], 0, results, None, "")
    assert "nowhere/frappe_x1 lacks train.csv, valid.csv, test.csv" in results["runs"][0]["error"]


def test_real_data_have_peers_of_width_16_in_both_precisions(tmp_path):
    listed = workloads.jobs("real", workloads.QUICK, tmp_path, tmp_path, PRECISIONS)
    found = {job.key: job for job in listed}
    for precision, here in PRECISIONS.items():
        fbgemm = found[f"real/frappe/FBGEMM width 16 {precision}"]
        assert fbgemm.python == "peers"
        assert fbgemm.settings.items() >= {"layout": "full", "source": str(tmp_path / "frappe"), **here}.items()
    plain = [job.settings["optimizer"] for key, job in found.items() if key.startswith("real/frappe/nn.Embedding")]
    assert plain == ["dense", "fused", "sparse"]
    assert peers.rounded_widths("mixed", 9) == [8, 4, 8, 4, 4, 4, 4, 4, 8]


def test_what_is_compiled_once_and_what_is_exported_in_fewer_bits(tmp_path):
    train, predict = (
        workloads.jobs(name, workloads.QUICK, tmp_path, tmp_path, PRECISIONS) for name in ("train", "predict")
    )
    compiled = [(job.key, job.max_repeats) for job in train if job.settings.get("compile")]
    assert compiled == [("train/middle/embtrim mixed widths auto, compiled", 1)]
    exported = {job.key: job.settings["bits"] for job in predict if job.kind == "export" and job.settings["bits"] < 32}
    assert exported == {"export/compact 10%, 8 bits": 8, "export/compact 10%, 4 bits": 4}


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="the peers' environment is made by benchmarks/bench.py")
def test_the_step_of_fuxictr_has_its_parts():
    settings = {"contender": "fuxictr", "source": ROWS, "batch_size": 64, "warmup": 1, "steps": 4}
    order = json.dumps(["train", 1, "cpu", settings])
    found = measure.run_alone([str(PEERS_PYTHON), str(bench.HERE / "peers.py"), order], dict(os.environ))
    assert "error" not in found
    parts = [found[part] for part in ("forward_ms", "backward_ms", "update_ms")]
    assert min(parts) > 0
    assert max(parts) < found["step_ms"]


def test_batches_of_real_data_are_its_rows(tmp_path):
    ours.write_dataset(tmp_path / "data", 500, ROWS)
    source = str(tmp_path / "data")
    assert synthetic.table_sizes(source) == synthetic.table_sizes(ROWS)
    ids, labels = next(synthetic.batches(source, 64, 1))
    assert (ids.shape, ids.dtype, labels.shape, labels.dtype) == ((64, 39), np.int32, (64,), np.float32)
    stored = EncodedDataset.load(tmp_path / "data").split("train")
    assert {(*row, label) for row, label in zip(ids.tolist(), labels.tolist(), strict=True)} <= {
        (*row, label) for row, label in zip(stored.ids.tolist(), stored.labels.tolist(), strict=True)
    }


def test_bytes_of_a_step(monkeypatch):
    ids = np.array([[0, 5], [0, 6], [1, 7]], np.int32)  # 2 and 3 distinct values in 3 rows
    monkeypatch.setattr(synthetic, "batches", lambda *args: iter([(ids, None)]))
    assert synthetic.step_bytes(2, 3, [1, 4]) == 4 * ((3 + 6 * 2) * 1 + (3 + 6 * 3) * 4)


def test_kernels_are_those_asked_for_whatever_the_environment_says(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setenv("EMBTRIM_KERNELS", "torch")
    assert ours.use_kernels("fused") == "fused"
    assert ours.use_kernels("torch") == "torch"
    assert os.environ["EMBTRIM_KERNELS"] == "torch"
    monkeypatch.setattr(ours, "kernels_name", lambda weight: "torch")
    with pytest.raises(RuntimeError, match="takes the kernels 'torch', not 'fused'"):
        ours.use_kernels("fused")


@pytest.mark.parametrize("layout", ["full", "mixed", "compact"])
def test_our_step_learns(layout):
    (batch,) = ours.make_batches(ROWS, 256, 1)
    step = ours.make_step(ours.deepfm(ROWS, layout, **SMALL), nullcontext, embtrim.TrainConfig(learning_rate=0.01))
    found = measure.time_steps(step, [batch] * 20, warmup=2)
    assert found["last_loss"] < 0.9 * found["first_loss"]
    parts = ("forward_ms", "backward_ms", "update_ms")
    assert all(found[part] > 0 for part in parts)


@pytest.mark.slow
def test_page_faults_of_a_profile_are_those_of_its_steps(monkeypatch):
    before = ours.page_faults()
    touched = bytearray(64_000_000)
    assert ours.page_faults() - before > len(touched) / 4096 / 600  # a page may be a large one
    monkeypatch.setattr(ours, "page_faults", iter([100, 108]).__next__)
    found = ours.profile(ROWS, "mixed", batch_size=64, warmup=1, steps=4)
    assert found["page_faults"] == 2
    assert sum(entry["share"] for entry in found["top"]) > 0.5


def test_a_job_that_compiles_runs_compiled_and_says_how_long_that_took(monkeypatch):
    modes = []

    def recorded(forward, **options):
        modes.append(options)
        return lambda *inputs: modes.append("compiled") or forward(*inputs)

    monkeypatch.setattr(torch, "compile", recorded)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unlike")
    settings = {"source": ROWS, "layout": "mixed", "precision": "fp32", "batch_size": 64, "warmup": 1, "steps": 2}
    found = ours.train(**settings, compile=True)
    assert modes == [{"dynamic": True}, *["compiled"] * 4]
    assert found["compile_seconds"] > 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != "unlike"
    assert "compile_seconds" not in ours.train(**settings)
    assert len(modes) == 5


@pytest.mark.slow
def test_exports_of_fewer_bits_are_quantised_and_smaller():
    pytest.importorskip("onnxruntime")
    rows = 100_000
    found = ours.export(rows, "compact", [2], seconds=0.001, bits=4)
    assert found["latency_ms"].keys() == {"eager", *found["file_bytes"]}
    model, quantised = ours.deepfm(rows, "compact"), ours.deepfm(rows, "compact", bits=4).tables
    assert sum(value.nbytes for value in quantised.state_dict().values()) == quantised.plan.num_bytes()
    network = sum(p.nbytes for p in model.mlp.parameters())
    for size in found["file_bytes"].values():
        assert network + quantised.plan.num_bytes() < size < network + model.tables.plan.num_bytes() / 2


@pytest.mark.parametrize("optimizer", ["dense", "fused", "sparse"])
def test_the_step_of_plain_torch_learns(optimizer, monkeypatch):
    monkeypatch.setattr(peers, "HIDDEN", (8, 8))
    monkeypatch.setattr(peers, "LEARNING_RATE", 0.01)
    sizes = synthetic.table_sizes(ROWS)
    step, prepare = peers.one_table(sizes, optimizer)
    (batch,) = peers.prepared(ROWS, 256, 1, prepare)
    found = measure.time_steps(step, [batch] * 20, warmup=2)
    assert found["last_loss"] < 0.9 * found["first_loss"]


def test_our_step_is_that_of_fit():
    ids, labels = next(synthetic.batches(ROWS, 600, 1))
    model, again = (ours.deepfm(ROWS, "mixed", **SMALL) for _ in range(2))
    data = EncodedDataset(model.schema, {"train": SplitArrays(ids, labels)})
    config = embtrim.TrainConfig(epochs=1, batch_size=200, precision="fp32")
    embtrim.fit(model, data, config)
    before = torch.get_float32_matmul_precision()
    with ours.fast_matmul("fp32", ours.CPU) as (autocast, _):
        step = ours.make_step(again, autocast, config)
        for batch in data.batches("train", 200, shuffle_seed=1):  # the order of fit's first epoch, seed 0
            step(batch)
    assert torch.get_float32_matmul_precision() == before
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("layout", ["full", "mixed", "compact"])
def test_the_plain_head_is_the_same_model(layout):
    model = ours.deepfm(ROWS, layout).eval()
    torch.nn.init.normal_(model.tables.weight)
    head = peers.Head(ours.kept_columns(ROWS, layout), projected=layout == "mixed")
    (batch,) = ours.make_batches(ROWS, 50, 1)
    with torch.no_grad():
        for own, of_model in zip(head.mlp.parameters(), model.mlp.parameters(), strict=True):
            own.copy_(of_model)
        if layout == "mixed":
            head.projection_SD.copy_(stacked_projections(model.tables))
        views = model.tables(batch.ids_BC)
        assert torch.allclose(head(views.concat, views.first_order), model(batch.ids_BC), rtol=1e-4, atol=1e-3)


def test_logs_have_the_shape_they_should(tmp_path):
    assert sum(synthetic.widths_of("mixed")) == 4 * 39
    sizes = synthetic.table_sizes(1_000_000)
    assert len(sizes) == 39
    assert sum(sizes) == pytest.approx(1_000_000, rel=1e-3)
    ids = synthetic.zipf_ids(sizes, 4096, np.random.default_rng(0))
    assert (ids >= 0).all()
    assert (ids < sizes).all()
    assert 18_000 < sum(len(np.unique(column)) for column in ids.T) < 24_000
    synthetic.write_log(tmp_path / "log.tsv", 2000)
    found = ours.encode(str(tmp_path / "log.tsv"), str(tmp_path / "data"))
    assert found["rows"] == 2000
    ours.write_dataset(tmp_path / "made", 500, ROWS)
    made = EncodedDataset.load(tmp_path / "made")
    assert (made.num_rows("train"), made.num_rows("valid")) == (500, ours.VALID_ROWS)


def test_calls_are_timed_in_turn_in_blocks_the_first_two_of_which_warm_up(monkeypatch):
    clock, called = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        called.append(name)
        clock[0] += seconds

    calls = {"a": lambda: call("a", 0.25), "b": lambda: call("b", 1.5)}
    assert measure.time_in_turn(calls, 10.0) == {"a": 250, "b": 1500}
    in_blocks = [(name, len(list(group))) for name, group in itertools.groupby(called)]
    assert in_blocks == [("a", 4), ("b", 1)] * 12
    monkeypatch.setattr(measure.statistics, "median", len)
    assert measure.time_in_turn(calls, 10.0) == {"a": 1000 * 40, "b": 1000 * 10}


@pytest.mark.slow
def test_memory_of_children_counts_and_a_death_is_an_error():
    child = "import time; kept = bytearray(200_000_000); time.sleep(1)"
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print({measure.RESULT!r} + '{{}}')"
    )
    assert 200e6 < measure.run_alone([sys.executable, "-c", parent], {})["peak_bytes"] < 300e6
    dead = measure.run_alone([sys.executable, "-c", "import sys; sys.exit('out of luck')"], {})
    assert dead == {"error": "ended with 1, without a result; out of luck"}


@pytest.mark.slow
def test_mapped_files_count_apart_from_anonymous_memory(tmp_path):
    (tmp_path / "data").write_bytes(bytes(200_000_000))
    read = (
        "import mmap, sys, time; file = open(sys.argv[1], 'rb'); kept = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); "
        f"sum(kept[::4096]); time.sleep(1); print({measure.RESULT!r} + '{{}}')"
    )
    found = measure.run_alone([sys.executable, "-c", read, str(tmp_path / "data")], {})
    assert found["peak_bytes"] < 100e6
    assert 200e6 < found["peak_file_bytes"] < 300e6


def test_a_contender_that_is_not_there_is_an_error(monkeypatch, capsys):
    order = ["train", 1, "cpu", {"source": 1, "layout": "full", "precision": "fp32", "batch_size": 1, "warmup": 0, "steps": 1,
                          "kernels": "nothing"}]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ours.py", json.dumps(order)])
    measure.worker(ours.KINDS)
    assert "ModuleNotFoundError: No module named 'embtrim.tables.kernels.nothing'" in capsys.readouterr().out
