"""Benchmarks of growth, of the whole way and of sizes on paper: what they run and what they print."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import polars as pl
import pytest

import bench
import embtrim
import fields
import growth
import measure
import sizing
import whole_way

ROWS = 2000
PRECISIONS = {"fp32": {"matmul": "medium", "bf16": False}, "auto": {"matmul": "medium", "bf16": True}}
SMALL = {"hidden_units": (8, 8)}
PEERS_PYTHON = bench.HERE / ".peers-venv" / "bin" / "python"


def test_costs_of_many_fields_are_counted_by_stage():
    command = [sys.executable, bench.HERE / "fields.py", "--worker", "--fields", "4", "--rows", "600"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    spent = json.loads(done.stdout.splitlines()[-1])
    stages = {"import", "other", *fields.STAGES}
    assert set(spent) == stages
    assert all(seconds > 0 for seconds in spent.values())


def test_growth_runs_the_steps_whose_results_a_step_reads():
    assert growth.with_needs(["compact"]) == ["encode", "fit", "search guided", "compact"]
    assert set(growth.with_needs(list(growth.STEPS))) == set(growth.STEPS)


def test_growth_is_a_power_of_the_size():
    assert growth.exponent(16.0, 2.0, 4.0) == "1.50"
    assert growth.exponent(16.0, None, 1.0) == growth.exponent(0.0, 2.0, 4.0) == ""


def test_a_step_is_watched_in_a_process_of_its_own_and_its_peak_needs_no_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "SAMPLE_SECONDS", 1.0)  # a training step takes milliseconds
    growth.write_field_data(tmp_path, 50)
    found = growth.watched("fields", "training step", tmp_path)
    assert 0 < found.seconds < 60
    assert (1 << 20 if measure.forget_peak() else 0) <= found.peak < 1 << 30


def test_each_value_of_a_growing_log_occurs(tmp_path):
    growth.write_log(tmp_path / "log.parquet", num_rows=500, num_values=200)
    log = pl.read_parquet(tmp_path / "log.parquet")
    assert log.shape == (500, 1 + growth.NUM_FIELDS)
    assert sum(log[name].n_unique() for name in log.columns[1:]) == pytest.approx(200, rel=0.1)


def test_the_whole_way_gives_both_the_same_fields_and_settings(tmp_path):
    log = whole_way.Log({"train": tmp_path / "train.csv"}, "click", {"user": "str", "price": "float"}, 8, 0.5)
    log.files["valid"] = log.files["test"] = log.files["train"]
    schema = embtrim.Schema.load_draft(log.write_schema(tmp_path / "schema.toml"))
    assert [(f.name, f.type, f.transform, f.min_count) for f in schema.fields] == [
        ("user", "categorical", None, 1),
        ("price", "numeric", "log2", 1),
    ]
    *_, order = whole_way.of_embtrim(log, tmp_path / "ours", "10%")
    kind, threads, _, settings = json.loads(order)
    encode, run = settings["commands"]
    assert (kind, threads, encode[0], run[0]) == ("whole_way", 1, "encode", "run")
    assert {"--set=hparams.embedding_dim=8", "--set=train.embedding_l2=0.5"} < set(run)
    *_, order = whole_way.of_fuxictr("python", log, tmp_path / "theirs", "memory")
    model = json.loads(order)[3]["model"]
    assert (model["width"], model["embedding_regularizer"], model["hidden"]) == (8, 0.5, [400, 400, 400])


def test_a_line_of_the_whole_way_holds_medians_or_the_first_error():
    runs = [
        {"cpu_seconds": s, "wall_seconds": 2 * s, "peak_bytes": 5e6, "auc": 0.5, "epochs": 3, "table_bytes": 4096}
        for s in (3.0, 1.0, 2.0)
    ]
    assert whole_way.line("x", "embtrim", runs) == "| x | embtrim, small | 2 | 4 | 5 | 0.5000 | 3 | 4,096 | 3 |"
    assert whole_way.line("x", "ray", [*runs, {"error": "died"}]) == "| x | FuxiCTR, full, ray | died |"


def sizes_on_paper(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["sizing.py", *words])
    sizing.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines if len(cells) == 8 and cells[0] != "part"}


def test_sizes_on_paper_are_those_computed_by_hand(monkeypatch, capsys):
    sizes = ["--rows", "1e9", "--tables", "1", "--width", "64", "--columns", "13", "--devices", "2", "--batch", "1000"]
    work = [
        "--train-rows",
        "1e6",
        "--score-rows",
        "1e5",
        "--hidden",
        "1",
        "--rates",
        "1000",
        "500",
        "2000",
        "4000",
        "1e9",
    ]
    found = sizes_on_paper(monkeypatch, capsys, *sizes, *work)  # the last table is sharded by tables: all on device 0
    assert list(found) == [
        "an epoch of the full model", "search, sseds", "counts of rows", "inherit", "verify", "an epoch of the compact model",
    ]  # fmt: skip
    # 1e9 rows of 64 numbers and a state; 500 steps of 1000 rows on each of two devices
    # device 0 sends 24 + outputs 256,000 + all-reduces of 4 x 67 and 4 x 4; 1e6 / 2 rows at 1000 a second
    assert found["an epoch of the full model"] == ["260.0", "500", "0.3", "0.1", "0", "500", "0.0"]
    assert found["search, sseds"][1] == "50"
    assert found["search, sseds"][5] == "100"
    assert found["counts of rows"][2:5] == ["0.3", "0.1", "0"]  # 500 lookups of 0.26 MB, and ids of 8 kB
    job = sizing.Job(2, 1000, 1, 67, 4, "row_wise")
    assert job.counts([(10, 4)], 5) - 5 * job.lookup([(10, 4)]) == 8 * 6 + 16 * 5 + 8 + 5 * 8000
    assert job.counted([(10, 4)]) == 32 * 5
    # 16 columns after filling: 68 GB; 256 GB are summed in 15,259 chunks, gone through in 256 s, and cross a bus of 25 GB/s twice
    assert found["inherit"] == ["328.0", "15,259", "16.8", "256.0", "512", "276", "5.1"]
    assert found["verify"][0] == "584.0"
    assert found["an epoch of the compact model"] == ["68.0", "500", "0.1", "0.0", "0", "125", "0.0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--columns", "65"], "--columns 65 is more than --width 64"),
        (["--network", "0"], "--network must be above 0"),
        (["--rows", "inf"], "'inf' is not a whole number"),
    ],
)
def test_sizes_that_cannot_be_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        sizing.arguments(words)
    assert said in capsys.readouterr().err


def test_the_page_of_large_tables_is_what_the_script_prints(monkeypatch, capsys):
    page = (bench.HERE.parent / "docs" / "guides" / "large.md").read_text("utf-8")
    named = ("training", "scoring", "counting", "retraining", "inherit")
    rates = [re.search(rf"^\| {name} \| ([\d,]+) ", page, flags=re.MULTILINE) for name in named]
    sizes_of = ["sizing.py", "--rates", *(found[1].replace(",", "") for found in rates if found)]
    monkeypatch.setattr("sys.argv", sizes_of)
    sizing.main()
    printed = capsys.readouterr().out.replace("as given", "one thread of this CPU").strip()
    assert printed in page
