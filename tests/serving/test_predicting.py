"""Scores of a log on disk, and the columns that are copied beside them."""

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.errors import DataError
from embtrim.models import FM
from embtrim.serving.bundle import Bundle, load_bundle, save
from embtrim.serving.predicting import write_predictions


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """An untrained model of users."""
    folder = tmp_path_factory.mktemp("predicting")
    rng = np.random.default_rng(0)
    log = pl.DataFrame({"click": [0, 1] * 300, "user": [f"u{k}" for k in rng.integers(0, 30, 600)]})
    data = embtrim.encode(log, label="click", out=folder / "data")
    save(FM(data.schema, embedding_dim=2), folder / "bundle", data)
    return load_bundle(folder / "bundle")


@pytest.mark.parametrize("column", [[["a"], ["b", "c"]], [{"a": 1}, {"a": 2}], [b"a", b"b"]])
def test_a_column_that_csv_cannot_hold_is_named(bundle, tmp_path, column):
    log = pl.DataFrame({"user": ["u1", "u2"], "tags": column})
    log.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"column 'tags' holds .*, which csv cannot hold; write scores\.parquet"):
        write_predictions(bundle, tmp_path / "log.parquet", tmp_path / "scores.csv", keep=["tags"])
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]
    assert write_predictions(bundle, tmp_path / "log.parquet", tmp_path / "scores.parquet", keep=["tags"]) == 2
    assert pl.read_parquet(tmp_path / "scores.parquet").columns == ["tags", "score"]
