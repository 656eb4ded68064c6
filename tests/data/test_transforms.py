"""Quantile edges."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtrim.data.encoder import Encoder
from embtrim.data.transforms import quantile_edges
from embtrim.schema import FieldSpec
from tests.data.small_logs import schema_of


class TestNumbers:
    def test_quantile_edges(self):
        assert quantile_edges(np.array([]), 4) == []
        assert quantile_edges(np.array([7.0, 7.0, 7.0]), 4) == []
        assert quantile_edges(np.array([0.0] * 6 + [1.0, 2.0]), 4) == [1.0]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 10))
    def test_every_bucket_has_a_value(self, values, num_buckets):
        edges = quantile_edges(np.array(values), num_buckets)
        assert edges == sorted(set(edges))
        buckets = np.searchsorted(edges, values, side="right")
        assert set(buckets) == set(range(len(edges) + 1))

    def test_large_columns_are_sampled(self, run, monkeypatch):
        monkeypatch.setattr("embtrim.data.splitting.SAMPLE_ROWS", 5_000)
        values = np.random.default_rng(0).permutation(40_000).astype(float)
        frame = pl.DataFrame({"y": np.arange(40_000) % 2, "q": values})
        schema = schema_of(FieldSpec(name="q", type="numeric", transform="quantile:4"))
        sets = [run(frame, schema, chunk_bytes=size) for size in (1 << 24, 1 << 20)]
        edges = [Encoder.load(data.folder).transforms["q"]["edges"] for data in sets]
        assert edges[0] == edges[1]  # for chunks of any size
        assert edges[0] == pytest.approx([10_000, 20_000, 30_000], abs=1_100)  # 5 std of a quartile of 5,000 rows
        assert edges[0] != [10_000, 20_000, 30_000]
