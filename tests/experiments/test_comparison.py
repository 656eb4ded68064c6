"""`compare`: what a grid writes, skips and estimates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from embtrim.config import read_toml
from embtrim.data.dataset import EncodedDataset
from embtrim.errors import DataError, EmbtrimError
from embtrim.experiments import comparison, estimates
from embtrim.experiments.comparison import Comparison, compare, estimate
from embtrim.experiments.estimates import Measured, Range
from embtrim.experiments.grid import CompareConfig, cell_of, grid, read_skipped, resolve
from embtrim.experiments.records import RunRecord, read_records
from embtrim.methods import METHODS
from embtrim.plan.plan import SizePlan
from embtrim.reports.comparison_tables import comparison_tables
from tests.experiments.grids import CONFIG, FM_ONLY, never, outcome
from tests.recorder import Recorder

pytestmark = pytest.mark.slow


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


def test_grid_writes_records_weights_and_settings(first: tuple[Path, Comparison]) -> None:
    out, made = first
    assert not made.skipped
    assert [cell_of(r.model, r.seed, r.variant, r.budget) for r in made.records] == grid(resolve(CONFIG))
    for r in made.records:
        assert RunRecord.load(out / "records" / f"{cell_of(r.model, r.seed, r.variant, r.budget).name}.json") == r
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
    train_full = comparison.train_full_swept

    def fails_for_fm(data: Any, config: Any, *rest: Any) -> Any:
        if config.model == "fm":
            raise EmbtrimError("training loss is nan")
        return train_full(data, config, *rest)

    monkeypatch.setattr(comparison, "train_full_swept", fails_for_fm)
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


def test_two_jobs_give_what_one_gives(first: tuple[Path, Comparison], small: EncodedDataset, tmp_path: Path) -> None:
    told = Recorder()
    made = compare(small, FM_ONLY.replace(budgets=("50%", "30%", "2%")), tmp_path / "two", jobs=2, callbacks=[told])
    here = {name: value for name, value in outcome(made.records).items() if " 2% " not in name}
    assert here == {name: value for name, value in outcome(first[1].records).items() if name.startswith("fm ")}
    assert len(here) == 7
    assert {(s.label, s.budget) for s in made.skipped} >= {("wide-sseds", "2%")}
    assert {r.hardware["threads"] for r in made.records} == {1}
    assert outcome(read_records(tmp_path / "two")) == outcome(made.records)
    # Callbacks are called in this process, with the epochs of a cell before its record.
    assert told.pids == {os.getpid()}
    assert sorted(r.model_dump_json() for r, *_ in told.records) == sorted(r.model_dump_json() for r in made.records)
    assert [done for _, done, _ in told.records] == list(range(1, len(made.records) + 1))
    names = [epoch.name for epoch in told.epochs]
    assert sorted(set(names)) == sorted(path.stem for path in (tmp_path / "two" / "records").iterdir())
    assert len(names) == sum(r.epochs for r in made.records)


def test_estimate_is_of_what_is_left(
    first: tuple[Path, Comparison], small: EncodedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(Range(1.0, 2.0), Range(0.0, 0.0), 100, 10)
    monkeypatch.setattr(estimates, "measure", lambda *_: measured)
    monkeypatch.setattr(estimates, "FILE_SECONDS", 0.0)
    facts = estimate(small, CONFIG.replace(budgets=("50%", "40%")), first[0])
    assert (facts["num_cells"], facts["num_cells_on_disk"]) == (14, 8)
    # 800 rows are 7 batches of 128. Three models for each of two base models train an epoch and are verified in a pass;
    # sseds reads the trained model in another one.
    assert facts["seconds"]["most"] == 2.0 * 7 * 2 * (2 + 2 + 3)


def test_an_error_of_a_callback_loses_no_cell(small: EncodedDataset, tmp_path: Path) -> None:
    """It goes through, also one of ours, which would skip the cell; the grid goes on where it stopped."""
    out, grid = tmp_path / "x", FM_ONLY.replace(methods=("uniform",), variants={}, budgets=("50%",))
    with pytest.raises(DataError, match="mine"):
        compare(small, grid, out, callbacks=[Recorder(DataError("mine"), at=1)])
    assert (names(out / "records"), read_skipped(out)) == ([], [])

    class Full:
        def on_record(self, record: RunRecord, done: int, total: int) -> None:
            raise RuntimeError(record.variant)

    recorder = Recorder()
    with pytest.raises(RuntimeError, match="full"):
        compare(small, grid, out, callbacks=[recorder, Full()])
    assert recorder.epochs == [], "the training had ended"
    assert names(out / "records") == ["fm-full-seed0.json"]
    made = compare(small, grid, out, callbacks=[recorder])
    assert [(r.variant, done, total) for r, done, total in recorder.records] == [("full", 1, 2), ("uniform", 2, 2)]
    assert [r.variant for r in made.records] == ["full", "uniform"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))
