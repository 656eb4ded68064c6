"""The grid of `compare`: its cells, its settings, and the records that it takes or refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from embtrim.data.dataset import EncodedDataset
from embtrim.errors import ConfigError, DataError
from embtrim.experiments import comparison
from embtrim.experiments.comparison import Comparison, compare
from embtrim.experiments.grid import Cell, CompareConfig, grid, resolve, run_config, settings_by_label
from embtrim.methods import METHODS
from embtrim.plan.budget import Budget
from tests.conftest import planted_data
from tests.experiments.grids import CONFIG, copy_of, never


def test_cells_and_names() -> None:
    cells = grid(resolve(CONFIG.replace(seeds=2, seed=5)))
    assert [c.name for c in cells[:4]] == ["deepfm-full-seed5", "fm-full-seed5", "deepfm-full-seed6", "fm-full-seed6"]
    assert cells[4:8] == [
        Cell("deepfm", 5, "uniform", Budget.parse("50%")), Cell("deepfm", 5, "random", Budget.parse("50%")),
        Cell("deepfm", 5, "wide-sseds", Budget.parse("50%")), Cell("deepfm", 5, "uniform", Budget.parse("30%")),
    ]  # fmt: skip
    assert len(cells) == 4 + 2 * 2 * 2 * 3
    names = {
        Cell("fm", 0, "pme", Budget.parse(budget)).name for budget in ("10%", "10.0 %", "2.5%", "1.5M params", "200 MB")
    }
    assert names == {
        "fm-pme-10pct-seed0", "fm-pme-2.5pct-seed0", "fm-pme-1500000params-seed0", "fm-pme-200000000bytes-seed0",
    }  # fmt: skip


def test_budgets_that_are_nearly_the_same_have_names_of_their_own() -> None:
    budgets = ("10%", "10.00001%", "10.000011%", "1000000 params", "1000000.5 params", "1e12 bytes")
    names = {Cell("fm", 0, "pme", Budget.parse(budget)).name for budget in budgets}
    assert len(names) == len(budgets)
    assert "fm-pme-1000000000000bytes-seed0" in names


def test_settings_are_resolved() -> None:
    every = resolve(CompareConfig(budgets=("10%", "10.0%", "5%")))
    assert every.methods == tuple(METHODS)
    assert [budget.text for budget in every.budgets] == ["10%", "5%"]
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
        ({"budgets": ("10 parsecs",)}, "budgets.0, given '10 parsecs': budget '10 parsecs'"),
        ({"hparams": {"hiden_units": [8]}}, r"\[hparams\] 'hiden_units'.*did you mean 'hidden_units'"),
        ({"variants": {"x": {}}}, r"\[variants.x\] needs method"),
        ({"variants": {"x": {"method": "ssed"}}}, r"\[variants.x\] unknown method 'ssed'"),
        (
            {"variants": {"x": {"method": "sseds", "bits": 6}}},
            r"\[variants.x\] bits must be one of 32, 16, 8, 4, 3, 2, mixed; given 6",
        ),
        (
            {"variants": {"x": {"method": "sseds", "init": "warm"}}},
            r"\[variants.x\] init must be one of auto, scratch, initial, inherit, low_rank; given 'warm'",
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train": CONFIG.train.replace(epochs=2)}, "train.epochs = 1, now it is 2"),
        ({"hparams": {**CONFIG.hparams, "embedding_dim": 5}}, "hparams.embedding_dim = 4, now it is 5"),
        ({"init": "inherit"}, 'init = "auto", now it is "inherit"'),
        ({"teacher": 0}, "teacher = 0.5, now it is 0.0"),
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
    with pytest.raises(DataError, match=r"made with rows\.train = \d+, now it is \d+"):
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
