"""The command line: the whole way as a stranger types it, and bad inputs."""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import torch

from embtrim.cli.main import app
from embtrim.cli.settings import EncodeSettings
from embtrim.data.dataset import EncodedDataset
from embtrim.engines import Local
from embtrim.plan.plan import SizePlan
from tests.cli.bad_calls import BAD_CALLS, BadCall
from tests.cli.bad_inputs import BAD_INPUTS, DOCUMENTED, HEAD, BadInput, table_row
from tests.cli.workshop import TINY, Workshop, call, environment, write_log
from tests.conftest import interrupt_encoding

PAGE = (Path(__file__).parents[2] / "docs" / "bad_inputs.md").read_text("utf-8").splitlines()
REWRITE = "docs/bad_inputs.md says something else: python -m tests.cli.bad_inputs > docs/bad_inputs.md"
INTERRUPTIBLE = (
    "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from embtrim.cli.main import main; main()"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    torch.set_num_threads(1)
    return Workshop(tmp_path_factory.mktemp("shop"))


def embtrim(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line as a stranger runs it."""
    command = [sys.executable, "-m", "embtrim", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())


@pytest.mark.slow
def test_whole_way_as_a_process(tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv")
    done = embtrim("encode", tmp_path / "log.csv", "--label", "click", "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert "tags" in done.stdout

    out = tmp_path / "run"
    done = embtrim(
        "run", tmp_path / "data", *TINY, "--method", "sseds", "--budget", "20%", "--seeds", "2", "--out", out
    )
    assert done.returncode == 0, done.stderr
    for word in ("full", "sseds 20%", "uniform 20%", "test AUC", "logloss", "table bytes", "bundle on disk", "peak memory",
                 "search time", "training time", "±"):  # fmt: skip
        assert word in done.stdout
    assert "sseds 20%, seed 1: test AUC" in done.stderr
    assert 20_000 < (out / "report.html").stat().st_size < 1_000_000
    found = {path.name for path in (out / "records").iterdir()}
    assert found == {f"{variant}-seed{seed}.json" for variant in ("full", "sseds", "uniform") for seed in (0, 1)}

    # Each bundle's card tells how the metrics spread over the seeds, also of a run that was killed while it wrote that.
    card = out / "bundles" / "sseds-seed1" / "README.md"
    aucs = [json.loads((out / "records" / f"sseds-seed{seed}.json").read_text())["test"]["auc"] for seed in (0, 1)]
    line = f"| test auc | {aucs[1]:.5f} | {statistics.fmean(aucs):.5f} ± {statistics.stdev(aucs):.5f} |"
    whole = card.read_text()
    assert line in whole.splitlines()
    card.write_text("half of it")
    again = ["run", tmp_path / "data", *TINY, "--method", "sseds", "--budget", "20%", "--seeds", "2", "--out", out]
    assert call(*again).code == 0
    assert card.read_text() == whole

    # Values that training never saw, an empty list, a missing price; no label is needed.
    log = tmp_path / "new.csv"
    log.write_text("user,tags,item,price,session\nnobody,t1|t99,i1,3.5,a\nu1,,i999,,b\nu1,t2,i2,1.0,c\n")
    scores = tmp_path / "scores.parquet"
    done = embtrim("predict", out / "bundles" / "sseds-seed0", log, "--keep", "session", "--out", scores)
    assert done.returncode == 0, done.stderr
    frame = pl.read_parquet(scores)
    assert frame.columns == ["session", "score"]
    assert frame["session"].to_list() == ["a", "b", "c"]
    assert frame["score"].is_between(0, 1).all()

    before = (out / "report.html").read_bytes()
    done = embtrim("report", out, "--out", tmp_path / "again.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.html").read_bytes() == before


@pytest.mark.slow
def test_json_is_all_of_stdout(shop: Workshop) -> None:
    out = shop.new("json-run")
    done = call("run", shop.data, *TINY, "--budget", "20%", "--controls", "", "--out", out, "--json")
    assert done.code == 0, done.err
    records = json.loads(done.out)
    assert [r["variant"] for r in records] == ["full", "guided"]
    assert records[1]["table_bytes"] <= 0.8 * records[0]["num_params"] + 4 * records[0]["num_first_order_params"]
    assert records == [json.loads((out / "records" / f"{v}-seed0.json").read_text()) for v in ("full", "guided")]
    assert "test AUC" in done.err
    shown = call("report", out, "--json")
    assert json.loads(shown.out) == records


@pytest.mark.slow
def test_bits_of_a_run_and_of_a_search(shop: Workshop) -> None:
    out, plan = shop.new("bits-run"), shop.new("bits-plan").with_suffix(".json")
    done = call("run", shop.data, *TINY, "--budget", "10%", "--method", "uniform", "--out", out, "--json")
    assert done.code == 0, done.err
    full, small = json.loads(done.out)
    assert (small["bits"], small["teacher"]) == ("mixed", 0.5)
    assert small["num_params"] > 0.2 * full["num_params"]
    bundle = out / "bundles" / "uniform-seed0"
    assert call("predict", bundle, shop.log, "--out", shop.new("bits-scores").with_suffix(".parquet")).code == 0

    assert call("search", shop.bundle, shop.data, "--bits", "8", "--budget", "20%", "--out", plan).code == 0
    assert {table["bits"] for table in json.loads(plan.read_text())["tables"]} == {8}
    done = call("compact", shop.bundle, plan, shop.data, *TINY, "--out", shop.new("bits-small"), "--json")
    assert json.loads(done.out)["table_bytes_after"] < 0.35 * json.loads(done.out)["table_bytes_before"]
    plan = shop.new("fbgemm-plan").with_suffix(".json")
    arguments = ("--target", "fbgemm", "--method", "uniform", "--budget", "50%", "--out", plan)
    done = call("search", shop.bundle, shop.data, *arguments)
    assert done.code == 0
    assert f"{SizePlan.load(plan).num_bytes('fbgemm'):,} bytes with" in done.out
    assert {len(b["columns"]) % 4 for t in json.loads(plan.read_text())["tables"] for b in t["blocks"]} == {0}
    facts = json.loads(call("run", shop.data, *TINY, "--bits", "8", "--budget", "100%", "--json", "--dry-run").out)
    assert facts["table_bytes_allowed"] < 0.4 * facts["table_bytes_before"]
    for budget, target, bits in (("20%", "torch", "mixed"), ("3000 params", "torch", 32), ("20%", "fbgemm", 32)):
        given = ("--budget", budget, "--target", target, "--dry-run")
        assert json.loads(call("run", shop.data, *TINY, *given, "--json").out)["config"]["bits"] == bits
        assert f"bits = {json.dumps(bits)}\n" in call("search", shop.bundle, shop.data, *given).out
    plan = shop.new("mixed-plan").with_suffix(".json")
    assert call("search", shop.bundle, shop.data, "--method", "sseds", "--budget", "20%", "--out", plan).code == 0
    assert {table["bits"] for table in json.loads(plan.read_text())["tables"]} <= {16, 8, 4, 3, 2}
    assert "bits" in call("run", shop.data, "--bits", "5").err


@pytest.mark.parametrize("command", ["datasets", "models", "methods"])
def test_lists(command: str) -> None:
    as_json, table = call(command, "--json"), call(command)
    assert as_json.code == table.code == 0
    rows = json.loads(as_json.out)
    assert len(rows) >= 3
    for row in rows:
        assert row["name"] in table.out


@pytest.mark.slow
def test_steps_agree_with_the_functions(shop: Workshop) -> None:
    import embtrim

    done = call(
        "search",
        shop.bundle,
        shop.data,
        "--method",
        "sseds",
        "--budget",
        "30%",
        "--bits",
        "32",
        "--out",
        shop.new("p30.json"),
        "--json",
    )
    assert done.code == 0, done.err
    data = embtrim.load(str(shop.data))
    task = embtrim.CTRTask(embtrim.load_bundle(shop.bundle).model, data)
    expected = embtrim.search(task, embtrim.methods.SSEDSConfig(), "30%", 0)
    assert not SizePlan.load(shop.folder / "p30.json").diff(expected)
    assert json.loads(done.out)["tables"][0]["name"] == "user"

    out = shop.new("small30")
    done = call(
        "compact",
        shop.bundle,
        shop.folder / "p30.json",
        shop.data,
        "--init",
        "inherit",
        "--no-train",
        "--out",
        out,
        "--json",
    )
    facts = json.loads(done.out)
    assert facts["verification"]["passed"]
    assert facts["table_bytes_after"] == expected.num_bytes()
    small = embtrim.compact(task.model, expected, init="inherit")
    assert facts["test"]["auc"] == embtrim.evaluate(small, data.recode(expected), "test").auc

    for suffix in ("csv", "parquet"):
        scores = shop.new(f"scores30.{suffix}")
        done = call("predict", out, shop.log, "--out", scores, "--json")
        facts = json.loads(done.out)
        assert (facts["out"], facts["num_rows"], facts["drift"]) == (str(scores), 3000, [])
        assert [share["field"] for share in facts["shares"]] == ["user", "item", "tags", "price"]
        frame = pl.read_csv(scores) if suffix == "csv" else pl.read_parquet(scores)
        expected_scores = embtrim.load_bundle(out).predict(shop.log)
        assert frame["score"].to_numpy() == pytest.approx(expected_scores, rel=1e-6)


@pytest.mark.slow
def test_dry_run_writes_nothing(shop: Workshop) -> None:
    out = shop.new("dry")
    before = shop.snapshot()
    for arguments in (
        ["encode", shop.log, "--label", "click"],
        ["encode", shop.log, "--label", "click", "--draft", shop.folder / "draft.toml"],
        ["train", shop.data, *TINY],
        ["search", shop.bundle, shop.data, "--budget", "20%"],
        ["search", shop.bundle, shop.data, "--budget", "auto"],
        ["curve", shop.bundle, shop.data],
        ["compact", shop.bundle, shop.plan, shop.data, *TINY],
        ["predict", shop.small, shop.log],
        ["run", shop.data, *TINY, "--budget", "20%"],
    ):
        done = call(*arguments, *(["--out", out] if "--draft" not in arguments else []), "--dry-run")
        assert done.code == 0, done.err
        assert shop.snapshot() == before
        assert done.out
    assert "table bytes before: 14.8 KB" in done.out
    assert re.search(r"^time: .* to ", done.out, re.M)
    assert "# not set: max_loss, target" in done.out
    assert "hidden_units" in done.out
    facts = json.loads(call("run", shop.data, *TINY, "--budget", "20%", "--json", "--dry-run").out)
    assert facts["config"]["train"]["epochs"] == 2
    assert facts["table_bytes_allowed"] < facts["table_bytes_before"]


@pytest.mark.slow
def test_flags_over_set_over_file_over_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embtrim.data import catalog

    monkeypatch.setenv("EMBTRIM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "settings.toml"
    file.write_text('budget = "30%"\nmodel = "fm"\nseed = 3\n[train]\nlearning_rate = 0.5\npatience = 7\n')

    def resolved(*arguments: str) -> dict:
        return json.loads(call("run", "flights", "--dry-run", "--json", *arguments).out)["config"]

    recipe = catalog.CATALOG["flights"].recipe
    plain = resolved("--set", "train.epochs=1")
    assert recipe["model"].items() <= plain["hparams"].items()
    assert plain["train"]["batch_size"] == recipe["train"]["batch_size"]
    layered = resolved("--config", str(file), "--set", "train.patience=4", "--set", "seed=5", "--seed", "6")
    assert layered["budget"] == "30%"
    assert layered["train"]["learning_rate"] == 0.5
    assert layered["train"]["patience"] == 4
    assert layered["train"]["batch_size"] == recipe["train"]["batch_size"]
    assert layered["seed"] == 6
    assert layered["hparams"]["embedding_dim"] == recipe["model"]["embedding_dim"]
    assert "hidden_units" not in layered["hparams"]  # FM knows none


def test_draft_is_edited_and_used(shop: Workshop) -> None:
    draft, out = shop.new("draft.toml"), shop.new("drafted")
    done = call("encode", shop.log, "--label", "click", "--draft", draft, "--json")
    assert done.code == 0, done.err
    assert [f["name"] for f in json.loads(done.out)["fields"]] == ["user", "item", "tags", "price"]
    draft.write_text(draft.read_text().replace('name = "user"', 'name = "user", hash_size = 16'))
    done = call("encode", shop.log, "--schema", draft, "--out", out, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["schema"]["fields"][0]["vocab_size"] == 17
    assert call("encode", shop.log, "--label", "click", "--draft", draft).code == 1


def test_encode_takes_worker_processes(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(
        "embtrim.encode", lambda *_, engine, **__: given.append(engine) or EncodedDataset.load(shop.data)
    )
    for jobs in ((), ("--jobs", "1"), ("--jobs", "3")):
        assert call("encode", shop.log, "--label", "click", "--out", shop.data, *jobs).code == 0
    assert given == [None, None, Local(3)]
    assert "'--jobs'" in call("encode", shop.log, "--label", "click", "--out", shop.data, "--jobs", "0").err


def test_encode_reads_settings_and_headerless_files(shop: Workshop) -> None:
    lines = shop.log.read_text().splitlines()
    parts = [shop.text(f"part{i}.tsv", "\n".join(lines[1 + i :: 3]).replace(",", "\t")) for i in range(3)]
    settings = shop.text("encode.toml", 'label = "click"\n[read]\nheader = false\n')
    out = shop.new("headerless")
    flags = ["--columns", "click,user,item,tags,price", "--config", settings, "--set", "seed=1"]
    done = call("encode", parts[0], "--valid", parts[1], "--test", parts[2], *flags, "--out", out, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["num_rows"] == {"train": 1000, "valid": 1000, "test": 1000}
    assert EncodeSettings().seed == 0


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_bad_input(bad: BadInput, shop: Workshop) -> None:
    result, before, after = bad.run(shop)
    assert result.code == bad.code, result.err
    assert result.out == ""
    for word in bad.words:
        assert word in result.err
    assert "Traceback" not in result.err
    assert (
        str(shop.folder) in result.err or bad.code == 2 or not re.search(r"\.(csv|parquet|json)\b", " ".join(bad.words))
    )
    # Nothing that was there has changed, and nothing is half-written.
    assert {path: after.get(path) for path in before} == before
    finished = re.compile(
        r"out(/(config.toml|(records|bundles|plans)(/full-seed0.*)?)|/unfinished(/.*)?)?|\.out\.encoding(/.*)?"
        if bad.leaves
        else "nothing"
    )
    assert [path for path in after if path not in before and not finished.fullmatch(path)] == []
    if bad.name in DOCUMENTED:
        assert table_row(bad.name, result.code, result.err.replace(f"{shop.folder}/", "")) in PAGE, REWRITE


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda bad: bad.name)
def test_bad_call(bad: BadCall) -> None:
    message = bad.message()
    for word in bad.words:
        assert word in message
    if bad.name in DOCUMENTED:
        assert table_row(bad.name, None, message) in PAGE, REWRITE


def test_bad_inputs_are_many_and_the_page_shows_some() -> None:
    names = [bad.name for bad in (*BAD_INPUTS, *BAD_CALLS)]
    assert len(set(names)) == len(names) >= 100
    head = HEAD.splitlines()
    assert PAGE[: len(head)] == head, REWRITE
    assert [line.split(" | ")[0].removeprefix("| ") for line in PAGE[len(head) :]] == list(DOCUMENTED), REWRITE
    assert set(DOCUMENTED) <= set(names)


def test_unexpected_errors_keep_their_traceback(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("embtrim.experiments.records.read_records", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        call("report", shop.folder)


@pytest.mark.slow
def test_curve_of_a_bundle(shop: Workshop) -> None:
    run, out = shop.new("curve-run"), shop.new("curve")
    command = ["curve", shop.bundle, shop.data, "--budgets", "20%,5%", "--tolerance", "0.02"]
    before = shop.snapshot()
    for more in ([], ["--json"]):
        planned = call(*command, "--out", out, "--dry-run", *more)
        assert planned.code == 0, planned.err
        assert "tolerance" in planned.out
    assert shop.snapshot() == before

    done = call(*command, "--json")
    assert done.code == 0, done.err
    curve = json.loads(done.out)
    assert shop.snapshot() == before, "nothing is written without --out"
    assert set(curve["lines"]) == {"widths", "rows and widths", "rows, widths and bits"}
    assert [point["budget"] for point in curve["lines"]["rows, widths and bits"]] == ["20%", "5%"]
    assert curve["knee"]["predicted_loss"] <= curve["tolerance"] == 0.02

    shown = call(*command)
    assert shown.code == 0, shown.err
    assert f"knee: {curve['knee']['budget']}, " in shown.out
    assert f"{curve['knee']['budget']} (knee)" in shown.out
    assert "This is the error of the score, not of the predictions." in shown.out

    settings = [*TINY, "--method", "sseds", "--budget", "20%", "--controls", ""]
    assert call("run", shop.data, *settings, "--out", run).code == 0
    assert "curve.html" not in (run / "report.html").read_text()
    written = call(*command, "--run", run, "--out", run)
    assert written.code == 0, written.err
    assert json.loads((run / "curve.json").read_text()) == curve
    assert "measured: sseds 20%" in (run / "curve.html").read_text()
    again = call(*command, "--out", run)
    assert again.code == 1
    assert "curve.json exists; choose another --out or pass --overwrite" in again.err
    assert call(*command, "--out", run, "--overwrite").code == 0
    assert "measured: " not in (run / "curve.html").read_text()
    assert call("report", run).code == 0
    assert '<a href="curve.html">' in (run / "report.html").read_text()


@pytest.mark.slow
def test_search_at_the_knee(shop: Workshop) -> None:
    path = shop.new("auto.json")
    done = call("search", shop.bundle, shop.data, "--budget", "auto", "--tolerance", "0.02", "--out", path)
    assert done.code == 0, done.err
    plan = SizePlan.load(path)
    assert plan.details["predicted_loss"] <= 0.02
    assert plan.budget is not None
    assert f"budget {plan.budget} (" in done.err
    curve = json.loads(call("curve", shop.bundle, shop.data, "--budgets", "50%", "--tolerance", "0.02", "--json").out)
    assert curve["knee"]["digest"] == plan.digest


@pytest.mark.slow
def test_interrupt_leaves_nothing_half_written(shop: Workshop) -> None:
    out = shop.new("interrupted")
    settings = [*TINY, "--set", "train.epochs=100000", "--set", "train.patience=0"]
    command = [sys.executable, "-c", INTERRUPTIBLE, "run", shop.data, *settings, "--out", out]
    before = shop.snapshot()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        for _ in _until(300):
            if (out / "config.toml").exists():
                break
        time.sleep(0.5)  # into training
        process.send_signal(signal.SIGINT)
        printed, message = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert printed == ""
    told = message.strip().splitlines()[-1]
    assert "Traceback" not in message
    new = {path for path in shop.snapshot() if path not in before}
    if new == {"interrupted", "interrupted/config.toml"}:  # it had not begun to train
        assert told.startswith("embtrim: interrupted; nothing is half-written; there is no checkpoint, and the same")
    else:
        assert new == {"interrupted", "interrupted/config.toml", *(f"interrupted/unfinished{end}" for end in
                                                                   ("", "/seed0", "/seed0/full.safetensors"))}  # fmt: skip
        assert told.startswith(f"embtrim: interrupted; the same call goes on with {out}: embtrim run {shop.data} ")


def test_interrupted_encode_goes_on(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["encode", shop.log, "--label", "click", "--out", shop.new("data-interrupted")]

    with monkeypatch.context() as patch:
        interrupt_encoding(patch)
        done = call(*command)
    assert done.code == 130
    where = shop.folder / ".data-interrupted.encoding"
    assert done.err.strip().splitlines()[-1] == (
        f"embtrim: interrupted; the same call goes on with {where}: embtrim {' '.join(map(str, command))}"
    )
    done = call(*command)
    assert done.code == 0
    assert "going on from where an interrupted run left" in done.err


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.mark.slow
def test_full_device_and_closed_pipe_as_stdout() -> None:
    command = f"{sys.executable} -m embtrim datasets --json"  # more than a buffer holds
    full = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, env=environment())
    assert full.returncode == 1
    assert full.stderr.strip() == "embtrim: No space left on device; free space or choose another --out"
    reader = subprocess.Popen(
        command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.close()  # what `embtrim datasets | head -1` may do
    assert reader.stderr.read() == ""
    assert reader.wait(300) == 1
    reader.stderr.close()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from embtrim.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'polars'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__name__ in done.stdout


def test_version_and_nothing() -> None:
    import embtrim

    assert call("--version").out == f"embtrim {embtrim.__version__}\n"
    assert call().code == 2


@pytest.mark.slow
def test_a_plan_for_a_low_rank_start_needs_no_training(shop: Workshop) -> None:
    import embtrim

    plan, out = shop.new("low-rank-plan").with_suffix(".json"), shop.new("low-rank")
    searched = ("--method", "guided", "--set", "search.start=low_rank", "--budget", "30%", "--bits", "32")
    assert call("search", shop.bundle, shop.data, *searched, "--out", plan).code == 0
    done = call("compact", shop.bundle, plan, shop.data, "--no-train", "--out", out, "--json")
    assert done.code == 0, done.err
    data, model = embtrim.load(str(shop.data)), embtrim.load_bundle(shop.bundle).model
    found, task = SizePlan.load(plan), embtrim.CTRTask(model, data)
    assert found.details["config"] == {"start": "low_rank"}
    expected = embtrim.compact(model, found, init="low_rank", task=task)
    auc = embtrim.evaluate(expected, data.recode(found), "test").auc
    assert json.loads(done.out)["test"]["auc"] == pytest.approx(auc, abs=1e-6)
    other = call(
        "compact", shop.bundle, plan, shop.data, "--no-train", "--init", "scratch", "--out", out, "--overwrite"
    )
    assert other.code == 2
    assert "--no-train would save the untrained weights of --init scratch" in other.err
