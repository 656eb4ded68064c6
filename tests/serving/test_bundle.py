"""Bundles: they score raw logs, survive the disk, and refuse what is damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.compaction.compacting import compact
from embtrim.errors import BundleError, DataError
from embtrim.methods import UniformConfig, search
from embtrim.models import DeepFM
from embtrim.plan.plan import PlanShape, SizePlan
from embtrim.plan.table import Block
from embtrim.schema import OOV, FieldSpec, Schema
from embtrim.serving.bundle import load_bundle, note_spread, save
from embtrim.serving.bundle_files import contents_digest
from embtrim.serving.model_card import model_card
from embtrim.tasks.ctr_task import CTRTask
from embtrim.training.evaluation import predict_logits
from embtrim.training.fitting import fit
from embtrim.training.settings import TrainConfig
from tests.broken_files import seal_bundle
from tests.conftest import planted_data
from tests.system.kills import killed


@pytest.fixture(scope="module")
def raw() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 50, 3000), rng.integers(0, 400, 3000)
    label = (rng.random(3000) < 1 / (1 + np.exp(-(user % 5 - 2.0)))).astype(int)
    return pl.DataFrame({"user": [f"u{i}" for i in user], "item": [f"i{i}" for i in item], "click": label})


@pytest.fixture(scope="module")
def encoded(raw, tmp_path_factory):
    return embtrim.encode(raw, label="click", out=tmp_path_factory.mktemp("logs") / "data")


@pytest.fixture(scope="module", params=["full", "columns", "rows"])
def saved(request, encoded, tmp_path_factory):
    """A bundle of the full model, of a column plan and of a row plan, with the model and its data."""
    model = DeepFM(encoded.schema, embedding_dim=8, hidden_units=(8,), init_std=0.1)
    data = encoded
    if request.param != "full":
        budget = "50%" if request.param == "columns" else "6%"
        plan = search(CTRTask(model, encoded), UniformConfig(), budget)
        assert any(t.has_dropped for t in plan.tables) == (request.param == "rows")
        model, data = compact(model, plan), encoded.recode(plan)
    fit(model, data, TrainConfig(epochs=2, batch_size=256, precision="fp32"))
    folder = tmp_path_factory.mktemp("bundle") / request.param
    save(model, folder, data, metrics={"test": {"auc": 0.5}})
    return folder, model, data


def test_a_bundle_scores_the_raw_log_as_the_model_does(saved, raw, encoded):
    folder, model, data = saved
    bundle = load_bundle(folder)
    scores = bundle.predict(raw)
    # The encoder's ids of the raw rows, mapped to the model's ids, give the same logits.
    from embtrim.data.encoder import Encoder

    ids = Encoder.load(encoded.folder).encode_chunk(raw).ids
    from embtrim.data.dataset import EncodedDataset, SplitArrays

    whole = EncodedDataset(
        encoded.schema, {"test": SplitArrays(ids, np.zeros(len(ids), np.float32))}, id_maps=data.id_maps
    )
    expected = 1 / (1 + np.exp(-predict_logits(model, whole, "test")))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.std() > 0.01


def test_unseen_values_read_the_oov_row(saved):
    folder, _, _ = saved
    bundle = load_bundle(folder)
    first, second = (bundle.predict(pl.DataFrame({"user": [u], "item": ["i1"]})) for u in ("nobody", "no one"))
    assert first == second
    assert np.isfinite(first).all()


def test_predict_reads_files_and_names_missing_columns(saved, raw, tmp_path):
    folder, _, _ = saved
    bundle = load_bundle(folder)
    raw.write_csv(tmp_path / "log.csv")
    np.testing.assert_allclose(bundle.predict(tmp_path / "log.csv"), bundle.predict(raw), atol=1e-7)
    with pytest.raises(DataError, match="item"):
        bundle.predict(raw.drop("item"))


def test_dropped_values_are_distinct_from_unseen_ones(encoded, tmp_path):
    model = DeepFM(encoded.schema, embedding_dim=8, hidden_units=(8,), init_std=0.1)
    found = search(CTRTask(model, encoded), UniformConfig(), "6%")
    # The search drops OOV, which training never saw; this plan keeps it.
    blocks = [(dataclasses.replace(b, num_rows=b.num_rows + 1, rows=np.append(np.int32(OOV), b.rows)),)
              if t.has_dropped and b.rows[0] != OOV else t.blocks for t in found.tables for b in t.blocks]  # fmt: skip
    tables = [dataclasses.replace(t, blocks=b) for t, b in zip(found.tables, blocks, strict=True)]
    plan = dataclasses.replace(found, tables=tuple(tables))
    small = compact(model, plan)
    table = next(t for t in plan.tables if t.has_dropped)
    small.tables.set_rows(table.name, np.array([table.dropped_id]), 1 + 0 * small.tables.weight[None, :1].expand(1, 8))
    save(small, tmp_path / "b", encoded.recode(plan))
    bundle = load_bundle(tmp_path / "b")
    values = pl.read_parquet(encoded.folder / "vocab.parquet").filter(pl.col("table") == table.name)
    dropped = values.filter(pl.Series(table.id_map()[values["id"].to_numpy()] == table.dropped_id))["value"][0]
    frame = pl.DataFrame({"user": ["u1", "u1"], "item": ["i1", "i1"]}).with_columns(
        pl.Series(table.name, [dropped, "never seen"])
    )
    scores = bundle.predict(frame)
    assert scores[0] != scores[1]


@pytest.fixture
def copied(saved, tmp_path):
    """A bundle to break."""
    return shutil.copytree(saved[0], tmp_path / "copy")


def test_it_refuses_what_is_damaged(copied, tmp_path):
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(tmp_path / "nothing")
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(BundleError, match="changed or truncated"):
        load_bundle(copied)
    weights.write_bytes(whole)
    (copied / "encoder" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"encoder/notes\.txt, which its bundle\.json does not list"):
        load_bundle(copied)
    (copied / "encoder" / "notes.txt").unlink()
    load_bundle(copied)
    (copied / "encoder" / "vocab.parquet").unlink()
    with pytest.raises(BundleError, match=r"vocab\.parquet is missing"):
        load_bundle(copied)


# A change to bundle.json, whether its digest is made to fit, as a tool that writes one would, and the error.
DAMAGES = {
    "newer": (lambda info: {**info, "bundle_version": 99}, False, "version 99, this release reads 2; upgrade"),
    "metrics changed": (lambda info: {**info, "metrics": {"test": {"auc": 0.99}}}, False, "digest differs"),
    "file not listed": (
        lambda info: {**info, "files": {k: v for k, v in info["files"].items() if k != "plan.json"}},
        True,
        r"holds plan\.json, which its bundle\.json does not list",
    ),
    "digest taken away": (lambda info: {k: v for k, v in info.items() if k != "digest"}, False, "digest differs"),
    "metrics missing": (
        lambda info: {k: v for k, v in info.items() if k != "metrics"},
        True,
        "metrics: Field required",
    ),
    "files a list": (lambda info: {**info, "files": list(info["files"])}, True, "files, given .*valid dictionary"),
    "version as text": (lambda info: {**info, "bundle_version": "1"}, True, "bundle_version, given '1'.*valid integer"),
    "unknown key": (lambda info: {**info, "metrcis": {}}, True, "unknown key 'metrcis'.* did you mean 'metrics'"),
    "unknown model": (lambda info: {**info, "model": "deepfn"}, True, "cannot be opened"),
    "no object": (lambda info: [info], None, "does not hold an object"),
    "cut off": (lambda info: None, None, "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_refuses_a_damaged_description(copied, damage):
    change, sealed, message = DAMAGES[damage]
    path = copied / "bundle.json"
    text = path.read_text()
    found = change(json.loads(text))
    if sealed:
        found["digest"] = contents_digest(found)
    path.write_text(text[:50] if found is None else json.dumps(found))
    with pytest.raises(BundleError, match=message):
        load_bundle(copied)


def test_it_refuses_a_folder_in_place_of_its_description(copied):
    (copied / "bundle.json").unlink()
    (copied / "bundle.json").mkdir()
    with pytest.raises(BundleError, match=r"bundle\.json is damaged"):
        load_bundle(copied)


def test_a_bundle_of_version_1_opens(saved, copied, raw):
    path = copied / "bundle.json"
    info = json.loads(path.read_text())
    held = ("embtrim", "model", "hparams", "schema", "metrics", "files")
    old = {"bundle_version": 1, **{name: info[name] for name in held}, "update": {"number": 2}}
    path.write_text(json.dumps(old))
    bundle = load_bundle(copied)
    assert bundle.info["version"] == 3
    np.testing.assert_array_equal(bundle.predict(raw), load_bundle(saved[0]).predict(raw))
    before = path.read_text()
    note_spread(copied, {0: info["metrics"], 1: info["metrics"]})
    assert path.read_text() == before
    (copied / "encoder" / "vocab.parquet").unlink()
    with pytest.raises(BundleError, match=r"vocab\.parquet is missing"):
        load_bundle(copied)


def test_the_card_says_where_the_model_comes_from(encoded, tmp_path):
    full = DeepFM(encoded.schema, embedding_dim=8, hidden_units=(8,), seed=4)
    plan = search(CTRTask(full, encoded), UniformConfig(), "30%", seed=7).with_bits(8)
    small = compact(full, plan)
    small.tables.quantize_()
    metrics = {"valid": {"auc": 0.75, "num_rows": 300}, "test": {"auc": 0.5}}
    save(small, tmp_path / "b", encoded, metrics=metrics, seed=9)
    card = (tmp_path / "b" / "README.md").read_text()
    rows = ", ".join(f"{name} {encoded.num_rows(name):,}" for name in encoded.splits)
    for line in (
        "# deepfm (uniform)",
        f"| data | schema {encoded.schema.fingerprint} (2 fields); rows: {rows} |",
        "| split | 8:1:1 at random, seed 0 |",
        "| seed of initial weights | 4 |",
        "| seed of training | 9 |",
        "| seed of the search | 7 |",
        "| budget | 30% |",
        "| valid auc | 0.75000 |  |",
        plan.summary().splitlines()[0],
    ):
        assert line in card.splitlines(), line
    assert "one seed: no spread" in card
    sizes = [int(text.replace(",", "")) for text in re.findall(r"^\| (?:user|item) .* \| 8 \| ([\d,]+) \|", card, re.M)]
    assert len(sizes) == 2
    assert sum(sizes) == plan.num_bytes()

    note_spread(tmp_path / "b", {s: {"valid": {"auc": a}, "test": {"auc": 0.5}} for s, a in ((0, 0.75), (1, 0.77))})
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| | this model | mean ± std, seeds 0, 1 |" in card
    assert "| valid auc | 0.75000 | 0.76000 ± 0.01414 |" in card
    assert load_bundle(tmp_path / "b").info["spread"]["valid"]["auc"]["mean"] == pytest.approx(0.76)


def test_hostile_names_break_no_table_of_the_card():
    name = "a|b\\|c\n| fake |\r"
    schema = Schema(
        label="y", fields=(FieldSpec(name=name, vocab_size=9), FieldSpec(name="plain", table=name, vocab_size=9))
    )
    info = {
        "model": "fm", "embtrim": "1", "version": 1, "hparams": {}, "seed": None, "schema": "", "spread": None, "update": None,
        "metrics": {"on|line": {"auc": 0.5}}, "data": {"num_rows": {}, "split": None, "split_seed": 0},
    }  # fmt: skip
    lines = model_card(schema, SizePlan.full(schema, 4), info, 7).splitlines()
    safe = r"a\|b\\\|c | fake |".replace("| fake |", r"\| fake \|")
    assert f"| {safe} | 9 of 9 | 4 of 4 | 32 | 144 | 144 |" in lines
    assert f"| plain | those of {safe} |  |  |  |  |" in lines
    assert r"| on\|line auc | 0.50000 |  |" in lines
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.sub(r"\\.", "", line).split("|")) for line in rows} == {4, 5, 8}


def test_names_are_no_html_no_link_and_no_escape_in_the_card():
    schema = Schema(label="y", fields=(FieldSpec(name="<b>[x](y)`\x1b[31m", vocab_size=9),))
    info = {
        "model": "fm", "embtrim": "<1>", "version": 1, "hparams": {}, "seed": None, "schema": "", "spread": None, "update": None,
        "metrics": {}, "data": {"num_rows": {}, "split": None, "split_seed": 0},
    }  # fmt: skip
    card = model_card(schema, SizePlan.full(schema, 4), info, 7)
    assert r"| &lt;b>\[x\](y)\`\\x1b\[31m | 9 of 9 |" in card.replace("\\\\x1b", r"\\x1b")
    assert "<" not in card
    assert "\x1b" not in card


def test_a_plan_of_fewer_bits_than_the_weights_is_refused(encoded, tmp_path):
    save(DeepFM(encoded.schema, embedding_dim=8, hidden_units=(4,)), tmp_path / "bundle", encoded)
    plan = json.loads((tmp_path / "bundle" / "plan.json").read_text())
    for table in plan["tables"]:
        table["bits"] = 8
    (tmp_path / "bundle" / "plan.json").write_text(json.dumps(plan))
    seal_bundle(tmp_path / "bundle")
    with pytest.raises(
        BundleError, match=r"plan.json says fewer than 32 bits, but model.safetensors holds fp32 tables"
    ):
        load_bundle(tmp_path / "bundle")


def test_bytes_of_the_fields_add_up_to_those_of_the_plan(encoded, tmp_path):
    """For tables with projections of their own, and for tables of several widths, which share projections."""
    own = SizePlan.full(encoded.schema, 8).with_columns({"user": (0, 2), "item": (1,)}, "project")
    rows = np.arange(encoded.schema.tables["item"], dtype=np.int32)
    blocks = (Block(20, 3, "project", rows=rows[:20]), Block(len(rows) - 30, 2, "project", rows=rows[20:-10]))
    mixed = dataclasses.replace(own, tables=(own.tables[0], dataclasses.replace(own.tables[1], blocks=blocks)))
    for name, plan in (("own", own), ("mixed", mixed)):
        model = DeepFM(encoded.schema, plan=plan, embedding_dim=8, hidden_units=(4,))
        save(model, tmp_path / name, encoded.recode(plan))
        card = (tmp_path / name / "README.md").read_text()
        sizes = re.findall(r"\| 32 \| ([\d,]+) \|", card)
        assert len(sizes) == (2 if name == "own" else 3)
        assert sum(int(size.replace(",", "")) for size in sizes) == model.tables.plan.num_bytes()
        assert ("shared projections" in card) == (name == "mixed")


def test_bytes_are_those_of_the_target_of_the_search(encoded, raw, tmp_path):
    full = DeepFM(encoded.schema, embedding_dim=8, hidden_units=(8,))
    plan = search(CTRTask(full, encoded), UniformConfig(), "50%", target="fbgemm")
    assert plan.num_bytes("fbgemm") > plan.num_bytes()  # first-order weights are padded
    save(compact(full, plan), tmp_path / "b", encoded)
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| bytes as stored by | fbgemm |" in card
    assert plan.summary().splitlines()[0] in card.splitlines()
    found = re.findall(r"^\| (?:user|item) .* \| 32 \| ([\d,]+) \| ([\d,]+) \|", card, re.M)
    sizes, full_sizes = ([int(text.replace(",", "")) for text in column] for column in zip(*found, strict=True))
    assert sum(sizes) == plan.num_bytes("fbgemm")
    assert sum(full_sizes) == SizePlan.full(encoded.schema, 8, first_order=True).num_bytes("fbgemm")

    report = embtrim.update(tmp_path / "b", raw, out=tmp_path / "new", retrain=False)
    assert report.table_bytes_before == plan.num_bytes("fbgemm")
    assert report.table_bytes_after == load_bundle(tmp_path / "new").model.tables.plan.num_bytes("fbgemm")
    # fbgemm has no tables of 8 bits, so a plan with 8 bits is for another target, and its model can be saved.
    small = compact(full, plan.with_bits(8))
    small.tables.quantize_()
    save(small, tmp_path / "8 bits", encoded)
    assert load_bundle(tmp_path / "8 bits").model.tables.plan.target is None


WITHOUT_SEARCH = """
import sys
blocked = {"embtrim." + name for name in ("methods", "tasks", "compaction", "experiments", "serving.exporting")}
class Blocked:
    def find_spec(self, name, *_):
        if name in blocked:
            raise ImportError(f"{name} is search code")
sys.meta_path.insert(0, Blocked())
import embtrim
print(*embtrim.load_bundle(sys.argv[1]).predict(sys.argv[2])[:20])
"""


@pytest.mark.slow
def test_a_bundle_scores_where_there_is_no_search_code(saved, raw, tmp_path):
    raw.drop("click").write_csv(tmp_path / "log.csv")
    command = [sys.executable, "-c", WITHOUT_SEARCH, str(saved[0]), str(tmp_path / "log.csv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    scores = np.array(done.stdout.split(), float)
    np.testing.assert_allclose(scores, load_bundle(saved[0]).predict(raw)[:20], atol=1e-6)


def test_saving_needs_a_vocabulary_and_keeps_what_is_there(saved, data, tmp_path):
    folder, model, own_data = saved
    with pytest.raises(BundleError, match="exists"):
        save(model, folder, own_data)
    load_bundle(folder)
    with pytest.raises(BundleError, match="made in memory"):
        save(DeepFM(data.schema, embedding_dim=4, hidden_units=(4,)), tmp_path / "b", data)
    assert not list(tmp_path.iterdir())


def test_overwriting_replaces_bundles_and_empty_folders_alone(saved, tmp_path):
    _, model, data = saved
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "logs" / "thesis.tex").touch()
    with pytest.raises(BundleError, match="out is not a bundle, so it is not overwritten"):
        save(model, out, data, overwrite=True)
    (out / "logs" / "thesis.tex").unlink()
    (out / "logs").rmdir()
    for seed in (1, 2):
        save(model, out, data, seed=seed, overwrite=True)
        assert load_bundle(out).info["seed"] == seed
    (tmp_path / "link").symlink_to(out)
    save(model, tmp_path / "link", data, seed=3, overwrite=True)
    assert load_bundle(out).info["seed"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}


def test_a_bundle_that_was_killed_between_its_renames_is_back_when_it_is_opened(saved, tmp_path):
    _, model, data = saved
    save(model, tmp_path / "out", data, seed=1)
    with killed(1, "replace", to="/out"):
        save(model, tmp_path / "out", data, seed=2, overwrite=True)
    assert not (tmp_path / "out").exists()
    assert load_bundle(tmp_path / "out").info["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in (tmp_path / "out").rglob("*.*"):
        assert path.stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666


def test_the_spread_of_a_run_is_noted_whole_or_not_at_all(saved, tmp_path):
    _, model, data = saved
    metrics = {seed: {"test": {"auc": 0.5 + seed / 10}} for seed in (0, 1)}
    save(model, tmp_path / "out", data, metrics=metrics[0])
    with killed(1, "replace", to="/out"):
        note_spread(tmp_path / "out", metrics)
    assert load_bundle(tmp_path / "out").info["spread"] is None
    note_spread(tmp_path / "out", metrics)
    assert load_bundle(tmp_path / "out").info["spread"]["test"]["auc"]["mean"] == pytest.approx(0.55)
    assert "0.55" in (tmp_path / "out" / "README.md").read_text()


def test_a_bundle_that_cannot_be_replaced_stays(saved, tmp_path, monkeypatch):
    _, model, data = saved
    save(model, tmp_path / "out", data, seed=1)
    rename = os.replace

    def refuse(source, target):
        if str(source).endswith(".tmp") and Path(source).is_dir():
            raise OSError("the disk went away")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(BundleError, match="out could not be written: the disk went away"):
        save(model, tmp_path / "out", data, seed=2, overwrite=True)
    assert load_bundle(tmp_path / "out").info["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_saved_plan_is_layout_only(saved):
    folder, model, _ = saved
    plan = PlanShape.load(folder / "plan.json")
    assert plan.num_params == model.tables.plan.num_params
    assert not (folder / "plan.npz").exists()


def test_a_model_of_other_data_cannot_be_saved(saved, tmp_path):
    other = planted_data()
    with pytest.raises((DataError, BundleError)):
        save(DeepFM(other.schema, embedding_dim=4, hidden_units=(4,)), tmp_path / "b", saved[2])


def test_the_profile_counts_what_the_bundle_reads(saved, raw):
    bundle = load_bundle(saved[0])
    tally = bundle.tally(raw)
    bundle.predict_chunk(raw, tally)
    counts = tally.counts()
    for field in bundle.profile.fields:
        for what in ("unseen", "missing"):
            by_split = [field.counts[split].of(what)[0] for split in ("train", "valid", "test")]
            assert sum(by_split) == counts[field.name].of(what)[0]
