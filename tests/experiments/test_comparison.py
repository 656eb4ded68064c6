"""compare: grids that are killed, resumed and grown; worker processes; and the tables, from records with known numbers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plotly.graph_objects import Figure
from rich.console import Console

from embtrim.config import read_toml
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import ConfigError, DataError, EmbtrimError
from embtrim.experiments import comparison, estimates, steps
from embtrim.experiments.comparison import Comparison, compare, estimate
from embtrim.experiments.grid import (
    Cell,
    CompareConfig,
    Skipped,
    grid,
    read_skipped,
    resolve,
    run_config,
    settings_by_label,
)
from embtrim.experiments.records import RunRecord, read_records
from embtrim.methods import METHODS
from embtrim.plan.plan import SizePlan
from embtrim.reports.comparison_page import MARK, render_comparison, write_comparison
from embtrim.reports.comparison_tables import comparison_tables, comparison_terminal, sheets
from embtrim.reports.entries import auc_of, entries_of, groups, is_comparison, labels, paired_differences, ranks
from embtrim.system.processes import in_processes
from embtrim.system.progress import grid_bar, seconds_left
from embtrim.training.checkpoint import Checkpoint
from embtrim.training.settings import TrainConfig
from tests.cli.bad_inputs import TINY, call, environment, write_log
from tests.conftest import planted_data
from tests.reports.test_report import HOSTILE, Page, record

CONFIG = CompareConfig(
    models=("deepfm", "fm"),
    hparams={"embedding_dim": 4, "hidden_units": [8]},
    train=TrainConfig(epochs=1, batch_size=128, learning_rate=1e-2, precision="fp32"),
    methods=("uniform", "random"),
    variants={"wide-sseds": {"method": "sseds", "min_dim": 1}},
    budgets=("50%", "30%"),
    seeds=1,
)
FM_ONLY = CompareConfig(**{**CONFIG.model_dump(), "models": ("fm",), "hparams": {"embedding_dim": 4}})
INTERRUPTIBLE = (
    "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from embtrim.cli.commands import main; main()"
)
GRID = ["--models", "deepfm,fm", "--methods", "uniform,random", "--budgets", "50%,20%", "--seeds", "1", *TINY]


@pytest.fixture(scope="module")
def small() -> EncodedDataset:
    return planted_data(num_rows=1000, noise_vocab=100)


@pytest.fixture(scope="module")
def first(small: EncodedDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("compare") / "grid"
    return out, compare(small, CONFIG, out)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    write_log(folder / "log.csv", num_rows=1500)
    assert call("encode", folder / "log.csv", "--label", "click", "--out", folder / "data").code == 0
    return folder / "data"


def outcome(records: list[RunRecord]) -> dict[str, Any]:
    """What a record says that must not depend on how it was made."""
    return {
        f"{r.model} {r.variant} {r.budget} {r.seed}": (r.valid, r.test, r.widths, r.kept_rows, r.num_params, r.epochs)
        for r in records
    }


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# --- the grid -------------------------------------------------------------------------------------------------------


def test_a_variant_of_fewer_bits(small: EncodedDataset, tmp_path: Path) -> None:
    variants = {f"uniform-{bits}": {"method": "uniform", "bits": bits} for bits in (32, 8, "mixed")}
    config = FM_ONLY.replace(methods=(), variants=variants, budgets=("30%",))
    _, plain, *quantised = compare(small, config, tmp_path / "out").records
    assert [r.bits for r in (plain, *quantised)] == [32, 8, "mixed"]
    for record_ in quantised:
        assert record_.num_params > 2 * plain.num_params
        assert record_.table_bytes < 1.1 * plain.table_bytes
    plans = [SizePlan.load(path) for path in sorted((tmp_path / "out" / "plans").glob("*.json"))]
    assert sorted(plan.num_bytes() for plan in plans) == sorted(r.table_bytes for r in (plain, *quantised))
    assert compare(small, config, tmp_path / "out").records == [_, plain, *quantised]
    changed = config.replace(variants={**variants, "uniform-8": {"method": "uniform", "bits": 4}})
    with pytest.raises(DataError, match=r"uniform-8.* was made with bits = 8, now it is 4;"):
        compare(small, changed, tmp_path / "out")


def test_a_variant_of_another_init(small: EncodedDataset, tmp_path: Path) -> None:
    variants = {"kept": {"method": "uniform", "init": "inherit"}, "plain": {"method": "uniform", "align": "scatter"}}
    config = FM_ONLY.replace(methods=("uniform",), variants=variants, budgets=("30%",), init="initial")
    full, uniform, kept, plain = compare(small, config, tmp_path / "out").records
    assert [r.init for r in (full, uniform, kept, plain)] == [None, "initial", "inherit", "initial"]
    assert uniform.widths == kept.widths
    assert uniform.test == plain.test
    assert kept.test["logloss"] < uniform.test["logloss"], "it has trained for an epoch already"
    assert compare(small, config, tmp_path / "out").records == [full, uniform, kept, plain]
    changed = config.replace(variants={**variants, "kept": {"method": "uniform"}})
    with pytest.raises(DataError, match=r'fm-kept\S+ was made with init = "inherit", now it is "initial";'):
        compare(small, changed, tmp_path / "out")


def test_a_grid_for_a_target(small: EncodedDataset, tmp_path: Path) -> None:
    variants = {"fills": {"method": "uniform"}, "mixes": {"method": "pme"}}
    config = FM_ONLY.replace(methods=(), variants=variants, budgets=("30%",), target="fbgemm")
    made = compare(small, config, tmp_path / "out")
    full, uniform = made.records
    assert (full.target, uniform.target) == ("fbgemm", "fbgemm")
    rows, wide = uniform.kept_rows.values(), [width > 0 for width in uniform.widths.values()]
    # Rows of four columns, as wide as the first-order weights are then.
    assert uniform.table_bytes == 16 * (sum(rows) + sum(n for n, w in zip(rows, wide, strict=True) if w))
    assert ["which fbgemm's tables cannot" in skipped.reason for skipped in made.skipped] == [True]
    with pytest.raises(DataError, match='made with target = "fbgemm", now it is "torch"'):
        compare(small, config.replace(target="torch"), tmp_path / "out")


def test_cells_and_names() -> None:
    cells = grid(resolve(CONFIG.replace(seeds=2, seed=5)))
    assert [c.name for c in cells[:4]] == ["deepfm-full-seed5", "fm-full-seed5", "deepfm-full-seed6", "fm-full-seed6"]
    assert cells[4:8] == [
        Cell("deepfm", 5, "uniform", "50%"), Cell("deepfm", 5, "random", "50%"),
        Cell("deepfm", 5, "wide-sseds", "50%"), Cell("deepfm", 5, "uniform", "30%"),
    ]  # fmt: skip
    assert len(cells) == 4 + 2 * 2 * 2 * 3
    names = {Cell("fm", 0, "pme", budget).name for budget in ("10%", "10.0 %", "2.5%", "1.5M params", "200 MB")}
    assert names == {
        "fm-pme-10pct-seed0", "fm-pme-2.5pct-seed0", "fm-pme-1500000params-seed0", "fm-pme-200000000bytes-seed0",
    }  # fmt: skip


def test_budgets_that_are_nearly_the_same_have_names_of_their_own() -> None:
    budgets = ("10%", "10.00001%", "10.000011%", "1000000 params", "1000000.5 params", "1e12 bytes")
    names = {Cell("fm", 0, "pme", budget).name for budget in budgets}
    assert len(names) == len(budgets)
    assert "fm-pme-1000000000000bytes-seed0" in names


def test_settings_are_resolved() -> None:
    every = resolve(CompareConfig(budgets=("10%", "10.0%", "5%")))
    assert every.methods == tuple(METHODS)
    assert every.budgets == ("10%", "5%")
    found = settings_by_label(CONFIG)
    assert list(found) == ["uniform", "random", "wide-sseds"]
    assert found["wide-sseds"].method == "sseds"
    assert found["wide-sseds"].search == {**METHODS["sseds"].config().model_dump(mode="json"), "min_dim": 1}
    assert run_config(CONFIG, "deepfm").hparams == {"embedding_dim": 4, "hidden_units": [8]}
    assert run_config(CONFIG, "fm").hparams == {"embedding_dim": 4}, "FM knows no hidden units"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"methods": ("ssed",)}, "unknown method 'ssed'; did you mean 'sseds'"),
        ({"methods": (), "variants": {}}, "nothing to compare"),
        ({"budgets": ("10 parsecs",)}, "budgets: budget '10 parsecs'"),
        ({"hparams": {"hiden_units": [8]}}, r"\[hparams\] 'hiden_units'.*did you mean 'hidden_units'"),
        ({"variants": {"x": {}}}, r"\[variants.x\] needs method"),
        ({"variants": {"x": {"method": "ssed"}}}, r"\[variants.x\] unknown method 'ssed'"),
        (
            {"variants": {"x": {"method": "sseds", "bits": 6}}},
            r"\[variants.x\] bits must be one of 32, 16, 8, 4, mixed; given 6",
        ),
        (
            {"variants": {"x": {"method": "sseds", "init": "warm"}}},
            r"\[variants.x\] init must be one of scratch, initial, inherit; given 'warm'",
        ),
        ({"variants": {"x": {"method": "sseds", "scor": 1}}}, r"\[variants.x\] unknown key 'scor' for SSEDSConfig"),
        ({"variants": {"a b": {"method": "sseds"}}}, "label 'a b'.*letters, digits"),
        ({"variants": {"../x": {"method": "sseds"}}}, "letters, digits"),
        ({"variants": {"random": {"method": "sseds"}}}, "the label is taken"),
        ({"variants": {"full": {"method": "sseds"}}}, "the label is taken"),
        ({"models": ("deepfn",)}, "unknown model 'deepfn'; did you mean 'deepfm'"),
        ({"models": ("lr",), "hparams": {}}, "'lr' has no embedding tables"),
        ({"train": {"device": "cuda:99"}}, "device 'cuda:99'"),
    ],
)
def test_faults_are_found_before_anything_is_trained(
    small: EncodedDataset, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        compare(small, CONFIG.replace(**changes), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_grid_writes_records_weights_and_settings(first: tuple[Path, Comparison]) -> None:
    out, made = first
    assert not made.skipped
    assert [Cell(r.model, r.seed, r.variant, r.budget) for r in made.records] == grid(resolve(CONFIG))
    for r in made.records:
        assert RunRecord.load(out / "records" / f"{Cell(r.model, r.seed, r.variant, r.budget).name}.json") == r
    variant = next(r for r in made.records if r.variant == "wide-sseds")
    assert variant.method == "sseds"
    assert variant.search["min_dim"] == 1
    assert variant.search["score"] == METHODS["sseds"].config().model_dump()["score"], "defaults are recorded too"
    assert {p.name for p in (out / "full").iterdir()} == {"deepfm-seed0.safetensors", "fm-seed0.safetensors"}
    assert CompareConfig.parse(read_toml(out / "config.toml")) == CONFIG
    for full, cells in ((made.records[0], made.records[2:8]), (made.records[1], made.records[8:])):
        epoch = full.data["num_rows"]["train"] / full.rows_per_second
        for r in cells:
            assert (r.model, r.epoch_seconds) == (full.model, epoch)
            assert r.search_epochs == pytest.approx(r.search_seconds / epoch)


# --- what is on disk is not made again ------------------------------------------------------------------------------


def copy_of(first: tuple[Path, Comparison], target: Path) -> Path:
    subprocess.run(["cp", "-a", str(first[0]), str(target)], check=True)
    return target


def never(*_: object, **__: object) -> None:
    raise AssertionError("this was to be read from disk")


def test_killed_grid_goes_on(encoded: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "embtrim", "compare", str(encoded), *GRID, "--out", str(out), "--quiet"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    until(lambda: len(list(out.glob("records/*.json"))) >= 3)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("records/*.json")}
    assert 3 <= len(before) < 10, "killed in the middle"

    done = call("compare", encoded, *GRID, "--out", out)
    assert done.code == 0, done.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(re.findall(r"of 10: ", done.err)) == 10 - len(before)
    assert "10 of 10: fm random 20%, seed 0: test AUC" in done.err
    assert call("compare", encoded, *GRID, "--out", whole, "--quiet").code == 0
    assert len(read_records(out)) == 10
    assert outcome(read_records(out)) == outcome(read_records(whole))


def interrupted(function: Callable[..., Any], *given: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        function(*given)


def ctrl_c(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["after the search", "while it retrains", "while the search trains"])
def test_unfinished_state_of_other_settings_is_not_taken(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """A cell that was killed goes on where only the settings are still the same: no record may say others than its plan's."""

    def config(**changes: Any) -> CompareConfig:
        settings = {"epochs": 2, "generations": 1, "threshold_weight": 0.0, **changes}
        variant = {"method": "optembed", **settings}
        train = CONFIG.train.replace(checkpoint_seconds=0)
        return FM_ONLY.replace(methods=(), variants={"x": variant}, budgets=("30%",), train=train)

    save, saved = Checkpoint.save, []

    def interrupting(self: Checkpoint, state: Any) -> None:
        save(self, state)
        saved.append(self.path.stem)
        if saved.count("training-1") == 3 if where == "while the search trains" else saved.count("retraining") == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "after the search":
            patch.setattr(steps, "verify", ctrl_c)
        else:
            patch.setattr(Checkpoint, "save", interrupting)
        interrupted(compare, small, config(), tmp_path / "x")
    changed = config(threshold_weight=0.1)
    expected = compare(small, changed, tmp_path / "whole").records
    plans = [
        outcome(records)["fm x 30% 0"] for records in (compare(small, config(), tmp_path / "old").records, expected)
    ]
    assert plans[0] != plans[1], "the settings matter"
    caplog.clear()
    found = compare(small, changed, tmp_path / "x").records
    assert outcome(found) == outcome(expected)
    assert "fm-x-30pct-seed0 was begun with search.threshold_weight = 0.0, now it is 0.1; this work" in caplog.text


def test_unfinished_full_model_of_other_settings_is_not_taken(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = FM_ONLY.replace(methods=("uniform",), variants={}, budgets=("30%",))
    config = config.replace(train=CONFIG.train.replace(epochs=3, checkpoint_seconds=0))
    save = Checkpoint.save

    def interrupting(self: Checkpoint, state: Any) -> None:
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupting)
        interrupted(compare, small, config, tmp_path / "x")
        interrupted(compare, small, config, tmp_path / "y")
    made = compare(small, config.replace(train=config.train.replace(epochs=2)), tmp_path / "x")
    assert [record.variant for record in made.records] == ["full", "uniform"]
    assert "fm-full-seed0/full.safetensors belongs to a training with epochs = 3, now it is 2; " in caplog.text
    made = compare(planted_data(num_rows=500, noise_vocab=20), config, tmp_path / "y")
    assert [record.variant for record in made.records] == ["full", "uniform"]
    assert "fm-full-seed0/full.safetensors belongs to a training with plan = " in caplog.text


def test_unfinished_state_of_the_same_settings_is_taken(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FM_ONLY.replace(methods=("random",), variants={}, budgets=("30%",))
    with monkeypatch.context() as patch:
        patch.setattr(steps, "verify", ctrl_c)
        interrupted(compare, small, config, tmp_path / "x")
    monkeypatch.setattr(steps, "search", never)
    assert [r.variant for r in compare(small, config, tmp_path / "x").records] == ["full", "random"]
    assert not (tmp_path / "x" / "unfinished").exists()


def test_grid_grows_on_the_full_models_it_has(
    first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_of(first, tmp_path / "grown")
    before = {path: path.stat().st_mtime_ns for path in out.glob("records/*.json")}
    monkeypatch.setattr(comparison, "train_full", never)
    seen: list[tuple[str, int, int]] = []
    more = CONFIG.replace(methods=("random", "sseds"), budgets=("30%", "40%"))
    grown = compare(small, more, out, on_record=lambda r, done, total: seen.append((r.variant, done, total)))
    # 2 models x 2 budgets x 3 labels; of each model random and wide-sseds at 30% are there.
    assert len(grown.records) == 2 + 12
    assert len(seen) == 12 - 4
    assert seen[0] == ("sseds", 7, 14)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(out.glob("records/*.json"))) == len(before) + 8
    monkeypatch.undo()
    grown = compare(small, CONFIG.replace(seed=1, budgets=("50%",), variants={}), out)
    assert {r.seed for r in grown.records} == {1}


def test_loaded_full_model_gives_the_same_as_a_trained_one(
    first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path
) -> None:
    out = copy_of(first, tmp_path / "again")
    for path in out.glob("records/*sseds*"):
        path.unlink()
    assert outcome(compare(small, CONFIG, out).records) == outcome(first[1].records)


def test_lost_and_damaged_weights(first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path) -> None:
    out = copy_of(first, tmp_path / "lost")
    weights = out / "full" / "fm-seed0.safetensors"
    kept = weights.read_bytes()
    (out / "records" / "fm-random-30pct-seed0.json").unlink()
    weights.write_bytes(kept[: len(kept) // 2])
    (skipped,) = compare(small, CONFIG, out).skipped
    assert (skipped.model, skipped.label) == ("fm", "random")
    assert "fm-seed0.safetensors is damaged" in skipped.reason
    weights.unlink()
    again = compare(small, CONFIG, out)
    assert outcome(again.records) == outcome(first[1].records)
    assert weights.read_bytes() == kept
    assert read_skipped(out) == []
    weights.unlink()
    compare(small, CONFIG, out)
    assert not weights.exists(), "nothing needs them"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train": CONFIG.train.replace(epochs=2)}, "train.epochs = 1, now it is 2"),
        ({"hparams": {**CONFIG.hparams, "embedding_dim": 5}}, "hparams.embedding_dim = 4, now it is 5"),
        ({"init": "inherit"}, 'init = "scratch", now it is "inherit"'),
        ({"variants": {"wide-sseds": {"method": "sseds", "min_dim": 2}}}, "search.min_dim = 1, now it is 2"),
        ({"variants": {"wide-sseds": {"method": "random"}}}, 'method = "sseds", now it is "random"'),
    ],
)
def test_records_of_other_settings_are_refused(
    first: tuple[Path, Comparison], small: EncodedDataset, changes: dict[str, Any], words: str
) -> None:
    out = first[0]
    config = (out / "config.toml").read_bytes()
    with pytest.raises(DataError, match=rf"{out}/records/\S+\.json was made with {words}; choose another --out"):
        compare(small, CONFIG.replace(**changes), out)
    assert (out / "config.toml").read_bytes() == config


def test_records_of_other_data_and_other_folders_are_refused(
    first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="made with the data = "):
        compare(planted_data(num_rows=1000, noise_vocab=90), CONFIG, first[0])
    with pytest.raises(DataError, match="made with rows of the data = "):
        compare(planted_data(num_rows=900, noise_vocab=100), CONFIG, first[0])
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(DataError, match="is not a folder of `embtrim compare`"):
        compare(small, CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_setting_that_is_newer_than_a_record_had_its_default(
    first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_of(first, tmp_path / "old")
    path = out / "records" / "fm-wide-sseds-30pct-seed0.json"
    values = json.loads(path.read_text())
    del values["train"]["patience"], values["search"]["score"]
    path.write_text(json.dumps(values))
    monkeypatch.setattr(comparison, "shrink", never)
    assert len(compare(small, CONFIG, out).records) == 14
    with pytest.raises(DataError, match=r"train.patience = 2, now it is 3"):
        compare(small, CONFIG.replace(train=CONFIG.train.replace(patience=3)), out)


def test_records_of_other_code_are_kept_and_told(
    first: tuple[Path, Comparison],
    small: EncodedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = copy_of(first, tmp_path / "old")
    monkeypatch.setattr(comparison, "shrink", never)
    compare(small, CONFIG, out)
    assert "records of embtrim" not in caplog.text
    path = out / "records" / "fm-uniform-30pct-seed0.json"
    values = json.loads(path.read_text())
    assert re.fullmatch(r"0\.1\.0\+[0-9a-f]{8}", values["versions"]["embtrim"])
    values["versions"]["embtrim"] = "0.0.9"
    path.write_text(json.dumps(values))
    assert len(compare(small, CONFIG, out).records) == 14
    assert f"{out} has records of embtrim 0.0.9, this is 0.1.0+" in caplog.text


# --- cells that cannot be made --------------------------------------------------------------------------------------


def test_cell_below_the_floor_is_listed_and_tried_again(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    variants = {"floor": {"method": "sseds", "min_dim": 2}}
    config = FM_ONLY.replace(variants=variants, budgets=("10%", "60%"))
    made = compare(small, config, tmp_path / "x")
    assert [(s.label, s.budget, s.seed) for s in made.skipped] == [("floor", "10%", 0)]
    assert "2 column(s) in every table" in made.skipped[0].reason
    assert "fm-floor-10pct-seed0 skipped: budget allows" in caplog.text
    assert [r.variant for r in made.records] == ["full", "uniform", "random", "uniform", "random", "floor"]
    assert read_skipped(tmp_path / "x") == made.skipped
    assert "| fm | floor | 10% | 0 | budget allows" in comparison_tables(made.records, made.skipped)

    tried: list[str] = []
    shrink = comparison.shrink

    def counted(*args: Any, **more: Any) -> Any:
        tried.append(more["label"])
        return shrink(*args, **more)

    monkeypatch.setattr(comparison, "shrink", counted)
    assert compare(small, config, tmp_path / "x").skipped == made.skipped
    assert tried == ["floor"]

    # What could not be made is made once it can be, and is listed no more.
    def without_floor(full: Any, data: Any, config: Any, **more: Any) -> Any:
        return shrink(full, data, config.replace(search={"min_dim": 0}), **more)

    monkeypatch.setattr(comparison, "shrink", without_floor)
    assert compare(small, config, tmp_path / "x").skipped == []
    assert read_skipped(tmp_path / "x") == []


def test_other_cells_survive_a_full_model_that_fails(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_full = comparison.train_full

    def fails_for_fm(data: Any, config: Any, **rest: Any) -> Any:
        if config.model == "fm":
            raise EmbtrimError("training loss is nan")
        return train_full(data, config, **rest)

    monkeypatch.setattr(comparison, "train_full", fails_for_fm)
    made = compare(small, CONFIG.replace(budgets=("50%",), variants={}), tmp_path / "x")
    assert [r.variant for r in made.records] == ["full", "uniform", "random"]
    assert [(s.label, s.reason) for s in made.skipped] == [
        ("full", "training loss is nan"),
        ("uniform", "its full model could not be made"),
        ("random", "its full model could not be made"),
    ]
    monkeypatch.undo()
    assert compare(small, CONFIG.replace(budgets=("50%",), variants={}), tmp_path / "x").skipped == []


def test_faults_of_ours_are_not_swallowed(
    small: EncodedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "shrink", never)
    with pytest.raises(AssertionError, match="read from disk"):
        compare(small, CONFIG, tmp_path / "x")


# --- processes ------------------------------------------------------------------------------------------------------


def test_two_jobs_give_what_one_gives(first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path) -> None:
    made = compare(small, FM_ONLY.replace(budgets=("50%", "30%", "2%")), tmp_path / "two", jobs=2)
    here = {name: value for name, value in outcome(made.records).items() if " 2% " not in name}
    assert here == {name: value for name, value in outcome(first[1].records).items() if name.startswith("fm ")}
    assert len(here) == 7
    assert {(s.label, s.budget) for s in made.skipped} >= {("wide-sseds", "2%")}
    assert {r.hardware["threads"] for r in made.records} == {1}
    assert outcome(read_records(tmp_path / "two")) == outcome(made.records)


def start_killer(_: str) -> Callable[[int], int]:
    return _kill_at_three


def _kill_at_three(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_crash_of_a_worker_is_an_error_and_does_not_hang() -> None:
    def work() -> None:
        with in_processes(2, start_killer, "x") as make:
            list(make(range(40)))

    with pytest.raises(EmbtrimError, match="a worker process died"):
        work()


def start_sleeper(folder: str) -> Callable[[int], None]:
    (Path(folder) / f"{os.getpid()}.started").touch()
    return time.sleep


SLEEPERS = """
import signal
import sys
from embtrim.system.processes import in_processes
from tests.experiments.test_comparison import start_sleeper
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a parent in the background may have left ignored
    with in_processes(2, start_sleeper, sys.argv[1]) as make:
        print(list(make([1000, 1000])))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    paths = {**environment(), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=paths, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(list(tmp_path.glob("*.started"))) == 2)
        workers = [int(path.stem) for path in tmp_path.glob("*.started")]
        assert all(map(running, workers))
        process.send_signal(how)
        process.wait(30)
        until(lambda: not any(map(running, workers)), 30)
    finally:
        process.kill()
        process.wait()


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return " Z " not in re.sub(r"\(.*\)", "", Path(f"/proc/{pid}/stat").read_text())
    except OSError:
        return False


def test_eta_counts_what_was_finished_since_the_start() -> None:
    assert seconds_left(60.0, finished=0, remaining=10) is None
    assert seconds_left(60.0, finished=3, remaining=10) == 200
    with grid_bar(False) as bar:
        bar.get_time = lambda: 0.0
        bar.add_task("cells", total=20, completed=8, before=8)
        (task,) = bar.tasks
        column = bar.columns[-1]
        assert str(column.render(task)) == ""  # type: ignore[union-attr]
        bar.advance(task.id, 4)
        task.get_time = lambda: 60.0
        # Four cells in a minute, eight to go; with the eight on disk in the rate it would be 40 s.
        assert str(column.render(task)) == "0:02:00 left"  # type: ignore[union-attr]


# --- tables ---------------------------------------------------------------------------------------------------------


def cell(label: str, seed: int, auc: float, budget: str | None = "10%", **changes: Any) -> RunRecord:
    made = record(label, seed, auc, **({"budget": budget} if label != "full" else {}))
    method = None if label == "full" else changes.pop("method", label)
    more = {"search_peak_bytes": None if label == "full" else 2_000_000, "method": method, **changes}
    return made.replace(**more)


@pytest.fixture
def by_hand() -> list[RunRecord]:
    """Three seeds; the last lacks random."""
    return [
        cell("full", 0, 0.80), cell("full", 1, 0.75), cell("full", 2, 0.70),
        cell("sseds", 0, 0.80), cell("sseds", 1, 0.60), cell("sseds", 2, 0.70),
        cell("uniform", 0, 0.70), cell("uniform", 1, 0.70), cell("uniform", 2, 0.60),
        cell("random", 0, 0.70), cell("random", 1, 0.65),
    ]  # fmt: skip


def test_differences_by_hand(by_hand: list[RunRecord]) -> None:
    found = entries_of(by_hand)
    group = {g[0].label: g for g in groups(found)}
    assert paired_differences(found, group["sseds"], "full", auc_of) == pytest.approx([0.0, -0.15, 0.0])
    assert paired_differences(found, group["sseds"], "uniform", auc_of) == pytest.approx([0.1, -0.1, 0.1])
    assert paired_differences(found, group["random"], "uniform", auc_of) == pytest.approx([0.0, -0.05])
    # Another budget, model or data set has no pair.
    others = [
        cell("sseds", 0, 0.9, budget="5%"),
        cell("sseds", 0, 0.9, model="fm"),
        cell("sseds", 0, 0.9, data={"fingerprint": "xyz", "folder": "more", "num_rows": {}}),
    ]
    found = entries_of([*by_hand, *others])
    for group in groups(found):
        if group[0].label == "sseds" and group[0].record.test["auc"] == 0.9:
            assert paired_differences(found, group, "uniform", auc_of) == []
    table = {row[1]: row for row in sheets(by_hand)[1].rows}
    # (.1, -.1, .1): mean .0333, sd sqrt(2 (.0667)^2 + (.1333)^2) / sqrt(2) = .1155
    assert table["sseds"] == ["10%", "sseds", "-0.0500 ± 0.0866", "+0.0000 ± 0.0000", "3", "+0.0333 ± 0.1155",
                              "+0.0000 ± 0.0000", "3"]  # fmt: skip
    assert table["random"][4] == table["random"][7] == "2"
    assert table["uniform"][5:] == ["-", "-", "-"]


def test_ranks_by_hand(by_hand: list[RunRecord]) -> None:
    given, num_cells = ranks(entries_of(by_hand))
    # Seed 0: .80, .70, .70; seed 1: .60, .70, .65; seed 2 has not all labels.
    assert given == {"sseds": [1, 3], "uniform": [2.5, 1], "random": [2.5, 2]}
    assert num_cells == 3
    (sheet,) = [s for s in sheets(by_hand) if s.title == "Ranks"]
    assert sheet.rows == [["uniform", "1.75", "1"], ["sseds", "2.00", "1"], ["random", "2.25", "0"]]
    assert "2 of 3 cells" in sheet.note


def test_results_and_cost_by_hand(by_hand: list[RunRecord]) -> None:
    tables = {
        sheet.title: sheet.rows for sheet in sheets([*by_hand, cell("sseds", 0, 0.5, budget="50%", search_epochs=4.5)])
    }
    results = tables["Results: deepfm"]
    assert [row[:2] for row in results] == [
        ["", "full"], ["50%", "sseds"], ["10%", "sseds"], ["10%", "random"], ["10%", "uniform"],
    ]  # fmt: skip
    assert results[0] == [
        "",
        "full",
        "0.7500 ± 0.0500",
        "0.7400 ± 0.0500",
        "0.5000 ± 0.0000",
        "8,000",
        "36.0 KB",
        "-",
        "3",
    ]
    assert results[2] == [
        "10%",
        "sseds",
        "0.7000 ± 0.1000",
        "0.6900 ± 0.1000",
        "0.5000 ± 0.0000",
        "800",
        "7.2 KB",
        "0.50",
        "3",
    ]
    cost = {row[0]: row[1:] for row in tables["Search cost"]}
    assert cost["sseds"] == ["1.5 s", "1.5 s", "1.50", "4.50", "2.0 MB", "2.0 MB", "4"]


def test_variants_stand_beside_their_method_and_repeats_are_told_apart(by_hand: list[RunRecord]) -> None:
    variant = cell("a-variant", 0, 0.7, method="sseds")
    assert labels(entries_of([variant, *by_hand])) == ["sseds", "a-variant", "random", "uniform"]
    # Records of a folder that names no variants: settings tell them apart.
    signed = record("sseds", 0, 0.7, search={"score": "signed", "data": "train"})
    plain = record("sseds", 0, 0.7, search={"score": "abs", "data": "train"})
    assert labels(entries_of([record(), signed, plain])) == ["sseds score=abs", "sseds score=signed"]
    with pytest.raises(DataError, match="two records of logs, deepfm, sseds, 10%, seed 0"):
        entries_of([plain, plain])
    with pytest.raises(DataError, match="no records"):
        comparison_tables([])


def test_which_records_are_a_comparison(by_hand: list[RunRecord], two_runs: list[RunRecord]) -> None:
    assert is_comparison(by_hand)
    assert not is_comparison(two_runs)
    assert not is_comparison([record("sseds", 0, budget="7%"), record("sseds", 1, budget="9%")]), "run --max-loss"
    assert is_comparison([*two_runs, record("sseds", 0, budget="5%")])
    assert is_comparison([*two_runs, record(model="fm")])


@pytest.fixture
def two_runs() -> list[RunRecord]:
    return [record(label, seed) for label in ("full", "sseds", "uniform") for seed in (0, 1)]


def test_markdown_of_several_data_sets(by_hand: list[RunRecord]) -> None:
    more = [r.replace(data={**r.data, "fingerprint": "xyz", "folder": "more | less"}) for r in by_hand]
    text = comparison_tables([*by_hand, *more])
    titles = re.findall("^## (.*)$", text, flags=re.MULTILINE)
    assert titles == ["Results: deepfm on logs", "Results: deepfm on more \\| less", "Differences: deepfm on logs",
                      "Differences: deepfm on more \\| less", "Ranks", "Search cost"]  # fmt: skip
    assert "over the 4 of 6 cells" in text
    assert (
        text.count("| 10% | sseds | 0.7000 ± 0.1000 | 0.6900 ± 0.1000 | 0.5000 ± 0.0000 | 800 | 7.2 KB | 0.50 | 3 |")
        == 2
    )
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_terminal_shows_every_cell(by_hand: list[RunRecord]) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for table in comparison_terminal(
            by_hand, [Skipped(model="fm", label="pme", budget="1%", seed=0, reason="[no] way")]
        ):
            console.print(table)
    text = console.export_text()
    for sheet in sheets(by_hand):
        assert sheet.title in text
        assert all(value in text for row in sheet.rows for value in row)
    assert "[no] way" in text


def test_page_holds_everything(by_hand: list[RunRecord]) -> None:
    wide = [r.replace(widths={"user": 8, "item": 4}, budget="50%", table_bytes=20_000) for r in by_hand[3:]]
    skipped = [Skipped(model="deepfm", label="pme", budget="1%", seed=0, reason="the floor is higher")]
    found = Page(render_comparison([*by_hand, *wide], skipped))
    for words in ("-0.0500 ± 0.0866", "2.0 MB", "the floor is higher", "1.75", "train 80", "abacus"):
        assert words in found.text, words
    assert len(json.loads(found.scripts["records"])) == len(by_hand) + len(wide)
    figures = json.loads(found.scripts["figures"])
    assert len(figures) == 5
    for figure in figures.values():
        Figure(figure)  # plotly's own check of every property
    auc, logloss, widths, epochs, memory = figures.values()

    lines = {t["name"]: t for t in auc["data"] if not t.get("fill")}
    assert lines["sseds"]["x"] == [7_200, 20_000]
    assert lines["sseds"]["y"] == pytest.approx([0.7, 0.7])
    assert lines["full"]["x"] == [7_200, 36_000]
    assert lines["full"]["y"] == pytest.approx([0.75, 0.75])
    (band,) = [t for t in auc["data"] if t["name"] == "sseds" and t.get("fill")]
    assert band["x"] == [7_200, 20_000, 20_000, 7_200]
    assert band["y"] == pytest.approx([0.8, 0.8, 0.6, 0.6])
    assert {t["name"] for t in logloss["data"]} == {"full", "sseds", "uniform", "random"}

    assert [t["visible"] for t in widths["data"]] == [True, False]
    assert widths["data"][0]["z"] == [[8, 8, 8], [4, 4, 4]]
    assert widths["data"][1]["z"] == [[1, 1, 1], [0, 0, 0]]
    (menu,) = widths["layout"]["updatemenus"]
    assert [(b["label"], b["args"][0]["visible"]) for b in menu["buttons"]] == [
        ("budget 50%", [True, False]),
        ("budget 10%", [False, True]),
    ]
    assert epochs["data"][0]["x"] == [0.5, 0.5, 0.5]
    assert memory["data"][0]["x"] == [2.0, 2.0, 2.0]


def test_page_is_safe_and_works_offline(by_hand: list[RunRecord]) -> None:
    hostile = [
        r.replace(
            widths={HOSTILE: 1, "item": 2},
            data={**r.data, "folder": HOSTILE},
            hardware={HOSTILE: HOSTILE},
            variant=r.variant if r.variant == "full" else HOSTILE + r.variant,
        )
        for r in by_hand
    ]
    skipped = [Skipped(model=HOSTILE, label=HOSTILE, budget="1%", seed=0, reason=HOSTILE)]
    found, plain = Page(render_comparison(hostile, skipped)), Page(render_comparison(by_hand, skipped))
    assert found.tags.count("script") == 4
    assert set(found.tags) == set(plain.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not {"src", "href"} & {name for name, _ in found.attributes}
    assert HOSTILE in found.text
    assert "<" not in found.scripts["figures"]
    assert HOSTILE[:10] not in json.dumps(json.loads(found.scripts["figures"]))


def test_page_without_searches_or_test_split(by_hand: list[RunRecord]) -> None:
    figures = json.loads(Page(render_comparison(by_hand[:3])).scripts["figures"])
    assert not any(figure["data"] for name, figure in list(figures.items())[2:])
    bare = [r.replace(test={}, search_peak_bytes=None) for r in by_hand]
    assert "| 10% | sseds | - | - | - | 800 |" in comparison_tables(bare)
    assert [s.rows for s in sheets(bare) if s.title == "Ranks"] == [[]]
    render_comparison(bare)


def test_files_are_written_and_a_strangers_readme_is_left(by_hand: list[RunRecord], tmp_path: Path) -> None:
    write_comparison(by_hand, tmp_path / "x")
    readme = tmp_path / "x" / "README.md"
    assert readme.read_text().startswith(MARK)
    assert comparison_tables(by_hand) in readme.read_text()
    assert "Comparison of deepfm on logs" in readme.read_text()
    write_comparison(by_hand[:-1], tmp_path / "x", page=tmp_path / "page.html")
    assert comparison_tables(by_hand[:-1]) in readme.read_text()
    readme.write_text("mine")
    write_comparison(by_hand, tmp_path / "x")
    assert readme.read_text() == "mine"
    assert (tmp_path / "x" / "report.html").read_bytes() != (tmp_path / "page.html").read_bytes()


# --- the command ----------------------------------------------------------------------------------------------------


def test_command(encoded: Path, tmp_path: Path) -> None:
    out = tmp_path / "cmp"
    settings = tmp_path / "grid.toml"
    settings.write_text('models = ["fm"]\nbudgets = ["10%"]\n[variants.floor]\nmethod = "sseds"\nmin_dim = 3\n')
    arguments = ["compare", encoded, "--config", settings, "--methods", "uniform,random", "--seeds", "2",
                 "--set", "hparams.embedding_dim=8", "--set", "train.epochs=1", "--set", "train.precision=fp32"]  # fmt: skip
    facts = json.loads(call(*arguments, "--out", out, "--dry-run", "--json").out)
    assert (facts["num_cells"], facts["num_cells_on_disk"], facts["labels"]) == (8, 0, ["uniform", "random", "floor"])
    assert facts["config"]["budgets"] == ["10%"]
    assert not out.exists()

    done = call(*arguments, "--out", out)
    assert done.code == 0, done.err
    for words in ("Results: fm", "uniform", "±", "Ranks", "Search cost", "could not be made", "3 column(s)"):
        assert words in done.out
    assert "6 of 8: fm random 10%, seed 1: test AUC" in done.err
    readme, page = (out / "README.md").read_text(), (out / "report.html").read_bytes()
    assert "| fm | floor | 10% | 0, 1 |" in readme

    (out / "README.md").unlink()
    (out / "report.html").unlink()
    again = call("report", out)
    assert again.code == 0, again.err
    assert (again.out, (out / "README.md").read_text()) == (done.out, readme)
    assert (out / "report.html").read_bytes() == page
    assert len(json.loads(call("report", out, "--json", "--dry-run").out)) == 6

    both = json.loads(call(*arguments, "--out", out, "--json").out)
    assert [r["variant"] for r in both["records"]] == ["full", "full", "uniform", "random", "uniform", "random"]
    assert len(both["skipped"]) == 2
    facts = json.loads(call(*arguments, "--out", out, "--dry-run", "--json").out)
    assert facts["num_cells_on_disk"] == 6

    other = call(*arguments, "--out", out, "--set", "train.epochs=2")
    assert other.code == 1
    assert "fm-full-seed0.json was made with train.epochs = 1, now it is 2; choose another --out" in other.err


def test_recipe_of_a_known_dataset_is_merged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from embtrim.data import catalog

    monkeypatch.setenv("EMBTRIM_CACHE", str(tmp_path / "cache"))
    recipe = catalog.CATALOG["flights"].recipe

    def resolved(*arguments: str) -> dict[str, Any]:
        done = call("compare", "flights", "--dry-run", "--json", "--set", "train.epochs=1", *arguments)
        assert done.code == 0, done.err
        return json.loads(done.out)["config"]

    both = resolved("--models", "fm,deepfm", "--set", "train.patience=4")
    assert both["hparams"] == recipe["model"]
    assert both["train"]["batch_size"] == recipe["train"]["batch_size"]
    assert both["train"]["patience"] == 4
    assert both["methods"] == list(METHODS)
    assert resolved("--models", "fm")["hparams"] == {"embedding_dim": recipe["model"]["embedding_dim"]}


def test_interrupted_command(encoded: Path, tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    command = [sys.executable, "-c", INTERRUPTIBLE, "compare", str(encoded), *GRID, "--set", "train.epochs=100000",
               "--set", "train.patience=0", "--jobs", "2", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until(lambda: (out / "config.toml").exists())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: len(children.read_text().split()) >= 3)  # two workers and the tracker of their resources
        workers = list(map(int, children.read_text().split()))
        time.sleep(2)
        os.killpg(process.pid, signal.SIGINT)
        printed, message = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, message
    assert printed == ""
    assert message.strip().splitlines()[-1].startswith("embtrim: interrupted")
    assert "Traceback" not in message
    assert [path.name for path in out.rglob("*")] == ["config.toml"]
    until(lambda: not any(map(running, workers)), 30)


def test_estimate_is_of_what_is_left(
    first: tuple[Path, Comparison], small: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "seconds_per_step", lambda *_: 2.0)
    facts = estimate(small, CONFIG.replace(budgets=("50%", "40%")), first[0])
    assert (facts["num_cells"], facts["num_cells_on_disk"]) == (14, 8)
    assert facts["seconds_at_most"] == 2.0 * 7 * 6  # 800 rows are 7 batches of 128; one epoch, six models
