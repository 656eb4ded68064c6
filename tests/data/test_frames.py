"""Frames of pandas and pyarrow, read as polars frames are."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

import embtrim
from embtrim.data.encoder import Encoder
from embtrim.data.frames import as_polars
from embtrim.errors import DataError
from embtrim.models import FM
from embtrim.serving.bundle import Bundle
from tests.data.small_logs import ids, vocabulary

LOG = pl.DataFrame(
    {
        "click": [0, 1] * 50,
        "user": [None, "bob", "eve", "ann"] * 25,
        "item": [7, 8, None, 9, 10] * 20,
        "price": pl.Series(np.arange(100) / 8, dtype=pl.Float32),
        "tags": [["a", "b"], ["b"]] * 50,
    }
)


def as_pandas(frame: pl.DataFrame) -> pd.DataFrame:
    columns = {name: pd.Series(frame[name].to_list()) for name in frame.columns}
    found = pd.DataFrame({**columns, "price": frame["price"].to_numpy()})
    return found.set_index(pd.Index(range(5, 5 + len(frame))))


def test_a_pandas_frame_is_the_same_log(run):
    assert as_pandas(LOG)["item"].dtype == float  # what a missing value does to integers
    theirs, ours = (
        run(as_pandas(LOG), label="click"),
        run(LOG.with_columns(pl.col("item").cast(pl.Float64)), label="click"),
    )
    assert ids(theirs) == ids(ours)
    assert theirs.schema.fingerprint == ours.schema.fingerprint
    assert vocabulary(theirs, "user") == vocabulary(ours, "user")
    assert (
        embtrim.profile(as_pandas(LOG)).profile == embtrim.profile(LOG.with_columns(pl.col("item").cast(float))).profile
    )
    encoder = Encoder.load(theirs.folder)
    assert encoder.encode_chunk(as_pandas(LOG)).ids.tolist() == encoder.encode_chunk(LOG).ids.tolist()
    bundle = Bundle(FM(theirs.schema, embedding_dim=2).eval(), encoder, {})
    assert (
        bundle.predict(as_pandas(LOG)).tolist()
        == bundle.predict(LOG).tolist()
        == bundle.predict(LOG.to_arrow()).tolist()
    )


def test_a_column_of_several_kinds_is_named():
    with pytest.raises(DataError, match=r"column 'a' of the pandas frame has values of several kinds .*astype\(str\)"):
        as_polars(pd.DataFrame({"b": [1, 2], "a": ["x", 3]}))


def test_pyarrow_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("embtrim.data.frames.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        as_polars(pd.DataFrame({"a": [1]}))


def test_dir_shows_the_public_names():
    assert set(dir(embtrim)) == {*embtrim.__all__, "__version__"}
