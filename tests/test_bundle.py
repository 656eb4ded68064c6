"""Bundles: they score raw logs, survive the disk, and refuse what is damaged."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.bundle import load_bundle, save
from embtrim.compaction import compact
from embtrim.errors import BundleError, DataError
from embtrim.methods import UniformConfig, search
from embtrim.models import DeepFM
from embtrim.plan import SizePlan
from embtrim.schema import OOV
from embtrim.sites import CTRTask
from embtrim.train import TrainConfig, fit, predict_logits
from tests.conftest import planted_data


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
    # The encoder's ids of the raw rows, brought to the model's, give the same logits.
    from embtrim.encoder import Encoder

    ids = Encoder.load(encoded.folder).encode_chunk(raw).ids
    from embtrim.dataset import EncodedDataset, SplitArrays

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
    # OOV, which training never saw, is among the dropped rows; here it is kept.
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


def test_it_refuses_what_is_damaged(saved, tmp_path):
    import shutil

    folder, _, _ = saved

    def copy_of() -> object:
        target = tmp_path / "copy"
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(folder, target)

    with pytest.raises(BundleError, match="is no bundle"):
        load_bundle(tmp_path / "nothing")
    broken = copy_of()
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BundleError, match="changed or truncated"):
        load_bundle(broken)
    broken = copy_of()
    (broken / "encoder" / "vocab.parquet").unlink()
    with pytest.raises(BundleError, match=r"vocab\.parquet is missing"):
        load_bundle(broken)
    broken = copy_of()
    info = json.loads((broken / "bundle.json").read_text())
    (broken / "bundle.json").write_text(json.dumps({**info, "bundle_version": 99}))
    with pytest.raises(BundleError, match="version 99"):
        load_bundle(broken)
    (broken / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        load_bundle(broken)


def test_saving_needs_a_vocabulary_and_keeps_what_is_there(saved, data, tmp_path):
    folder, model, own_data = saved
    with pytest.raises(BundleError, match="exists"):
        save(model, folder, own_data)
    load_bundle(folder)
    with pytest.raises(BundleError, match="made in memory"):
        save(DeepFM(data.schema, embedding_dim=4, hidden_units=(4,)), tmp_path / "b", data)
    assert not list(tmp_path.iterdir())


def test_saved_plan_is_layout_only(saved):
    folder, model, _ = saved
    plan = SizePlan.load(folder / "plan.json", rows=False)
    assert plan.num_params == model.tables.plan.num_params
    assert not (folder / "plan.npz").exists()


def test_a_model_of_other_data_cannot_be_saved(saved, tmp_path):
    other = planted_data()
    with pytest.raises((DataError, BundleError)):
        save(DeepFM(other.schema, embedding_dim=4, hidden_units=(4,)), tmp_path / "b", saved[2])
