"""Quantile edges, and the buckets of log2."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embtrim.data.encoder import Encoder
from embtrim.data.transforms import bucket_numbers, noted_rounding, quantile_edges
from embtrim.schema import FieldSpec
from tests.data.small_logs import ids, schema_of


def least_rounded_to(number: float) -> float:
    """The least float64 that rounds to a float32, found by bisection."""
    low, high = number - 1e-6 * abs(number), number
    while np.nextafter(low, high) < high:
        middle = (low + high) / 2
        low, high = (low, middle) if np.float32(middle) == np.float32(number) else (middle, high)
    return high


class TestNumbers:
    def test_quantile_edges(self):
        assert quantile_edges(np.array([]), 4) == []
        assert quantile_edges(np.array([7.0, 7.0, 7.0]), 4) == []
        assert quantile_edges(np.array([0.0] * 6 + [1.0, 2.0]), 4) == [least_rounded_to(0.5)]
        assert quantile_edges(np.array([3.0, 1.0, 4.0, 2.0]), 2) == [least_rounded_to(2.5)]

    def test_values_that_are_one_float32_share_a_bucket(self):
        values = [1.0, 1.5, 1.5 + 1e-12, 1.5 + 2e-12, 4.0, 5.0]
        assert quantile_edges(np.array(values), 3) == [least_rounded_to(1.25), least_rounded_to(2.75)]
        assert quantile_edges(np.array([1.0, 1 + 1e-12, 1 + 2e-12]), 3) == []
        neighbours = [1.0, float(np.nextafter(np.float32(1), np.float32(2)))]
        assert quantile_edges(np.array(neighbours), 2) == [least_rounded_to(neighbours[1])]
        assert quantile_edges(np.array([1.0, 1e300, 1e301]), 3) == [least_rounded_to(2.0**127)]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 10))
    def test_every_bucket_has_a_value(self, values, num_buckets):
        edges = quantile_edges(np.array(values), num_buckets)
        assert edges == sorted(set(edges))
        buckets = np.searchsorted(edges, values, side="right")
        assert set(buckets) == set(range(len(edges) + 1))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6) | st.floats(), min_size=1, max_size=60), st.integers(2, 10))
    def test_a_float64_and_its_float32_are_in_one_bucket(self, values, num_buckets):
        values = np.array(values)[np.isfinite(values)]
        edges = np.array(quantile_edges(values, num_buckets))
        near = [np.nextafter(edges, -np.inf), edges, np.nextafter(edges, np.inf)]  # numbers that training did not see
        numbers = np.concatenate([values, *near])
        with np.errstate(over="ignore"):
            single, single_edges = numbers.astype(np.float32), edges.astype(np.float32)
        expected = np.searchsorted(edges, numbers, side="right").tolist()
        assert np.searchsorted(edges, single.astype(float), side="right").tolist() == expected
        assert np.searchsorted(single_edges, single, side="right").tolist() == expected

    def test_a_price_has_one_id_in_every_type(self, run):
        cents = np.random.default_rng(0).integers(1, 3_000, 4_000)
        price = pl.Series("price", cents / 100)
        columns = [price, price.cast(pl.Float32), price.cast(pl.Decimal(18, 2)), price.cast(pl.String)]
        schema = schema_of(FieldSpec(name="price", type="numeric", transform="quantile:40"))
        clicks = pl.Series("y", np.arange(4_000) % 2)
        data = [run(pl.DataFrame([clicks, column]), schema) for column in columns]
        encoders = [Encoder.load(d.folder) for d in data]
        assert len(encoders[0].transforms["price"]["edges"]) == 39
        for encoder in encoders:
            assert encoder.transforms == encoders[0].transforms
            for column in columns:
                assert encoder.encode_chunk(pl.DataFrame([column])).ids.tolist() == ids(data[0])

    def test_data_of_before_keep_their_edges(self, run):
        frame = pl.DataFrame({"y": [0, 1] * 3, "q": [1.0, 2, 3, 4, 5, 6]})
        folder = run(frame, schema_of(FieldSpec(name="q", type="numeric", transform="quantile:3"))).folder
        transforms = json.loads((folder / "transforms.json").read_text())
        transforms["fields"]["q"]["edges"] = [3.0, 5.0]
        (folder / "transforms.json").write_text(json.dumps(transforms))
        rows = pl.DataFrame({"q": [2.75, 3.0, 4.75, 5.0]})
        assert Encoder.load(folder).encode_chunk(rows).ids.tolist() == [[1], [2], [2], [3]]

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


def test_log2_rounds_numbers_to_float32_where_data_note_it():
    field, border = FieldSpec(name="n", type="numeric", transform="log2"), np.exp(2.0)
    numbers = np.array(
        [border * (1 - 1e-9), border * (1 + 1e-9), np.float32(border), 1.99999999, -3.00000001, -(2.0**31), 1e39]
    )
    new = bucket_numbers(numbers, field, noted_rounding(schema_of(field)))
    assert new[:3].tolist() == [int(np.log(float(np.float32(border))) ** 2)] * 3
    assert new[3:].tolist() == [2, -3, -(2**31) + 1, int(np.log(1e39) ** 2)]
    assert bucket_numbers(numbers, field, {})[[0, 1, 3, 4]].tolist() == [3, 4, 1, -4]


def test_new_data_note_the_rounding_of_log2(run):
    frame = pl.DataFrame({"y": [0, 1, 0, 1], "n": [1.5, 7.389056, 9.0, 20.0]})
    data = run(frame, schema_of(FieldSpec(name="n", type="numeric", transform="log2")))
    assert Encoder.load(data.folder).transforms == {"n": {"rounded": "float32"}}
    assert Encoder.load(data.folder).encode_chunk(frame.with_columns(pl.col("n").cast(pl.Float32))).ids.tolist() == ids(
        data
    )
