"""Numbers with commas: what they mean, how a draft tells them from lists, and what is said."""

import logging

import numpy as np
import polars as pl
import pytest

from embtrim.data.drafting import infer_schema
from embtrim.data.written_numbers import find_decimal, written_numbers
from embtrim.errors import ConfigError, DataError
from embtrim.schema import FieldSpec
from tests.data.small_logs import schema_of

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "decimal, text, number",
    [
        (",", "12,17", 12.17),
        (",", "1.217,5", 1217.5),
        (",", "1 217", 1217.0),
        (",", "1\u00a0217,5", 1217.5),
        (",", " -,5 ", -0.5),
        (",", "1,5E+03", 1500.0),
        (",", "12.17", None),
        (",", "1,2,3", None),
        (".", "1,217", 1217.0),
        (".", "-1,000,000.5", -1e6 - 0.5),
        (".", "12.5", 12.5),
        (".", "12,17", None),
        (".", "", None),
    ],
)
def test_numbers(decimal, text, number):
    assert pl.select(written_numbers(pl.lit(text), decimal)).item() == number


@pytest.mark.parametrize(
    "texts, decimal",
    [
        ([f"{k % 37},{k % 10}0" for k in range(999)], ","),
        ([f"{x:.2f}".replace(".", ",") for x in 100 * RNG.random(500)], ","),
        ([f"{x:.3f}".replace(".", ",") for x in 100 * RNG.random(500)], ","),
        (["1.217,50", "3,2"], ","),
        (["5,1034", "7,2"], ","),
        ([f"{x:,}" for x in RNG.integers(1, 99_999, 500)], "."),
        (["1 217", "2 333 000"], "."),
        ([f"{a},{b}" for a, b in RNG.integers(1, 30, (500, 2))], None),
        ([f"{a},{b}" for a, b in RNG.integers(1000, 1030, (500, 2))], None),
        (["101,205", "333,101,205", "205"], None),
        (["1,2,3", "4"], None),
        (["a,b", "1,2"], None),
        (["12.5", "3"], None),
    ],
)
def test_a_draft_tells_numbers_from_lists(texts, decimal):
    assert find_decimal(pl.Series(texts)) == decimal


def test_a_column_with_decimal_commas(run, caplog):
    numbers = [round(float(x), 2) for x in 100 * np.random.default_rng(1).random(600)]
    frame = pl.DataFrame({"y": [0, 1] * 300, "a": ["u", "v"] * 300, "price": numbers})
    written = frame.with_columns(price=pl.col("price").cast(pl.String).str.replace(".", ",", literal=True))
    with caplog.at_level(logging.INFO, "embtrim"):
        field = infer_schema(written, "y").fields[1]
    assert (field.name, field.type, field.decimal) == ("price", "numeric", ",")
    assert "column 'price' is taken as numbers with a decimal comma" in caplog.text
    plain = run(frame, schema_of(field.replace(decimal=None)))
    assert run(written, schema_of(field)).split("train").ids.tolist() == plain.split("train").ids.tolist()
    dense = FieldSpec(name="price", type="dense", transform="none", decimal=",")
    wrong = written.with_columns(price=pl.Series(["12.5", *written["price"][1:]]))
    with pytest.raises(DataError, match=r"row 1: column 'price' holds '12.5', which is not a number"):
        run(wrong, schema_of(FieldSpec(name="a"), dense))


def test_a_point_between_thousands_is_not_parsed_as_a_decimal_point(run, write):
    dense = FieldSpec(name="price", type="dense", transform="none", decimal=",")
    data = run(write("log.csv", "y;a;price\n0;u;1.217\n1;v;3\n"), schema_of(FieldSpec(name="a"), dense))
    assert np.asarray(data.split("train").dense)[:, 0].tolist() == [1217.0, 3.0]


def test_decimal_is_for_numbers():
    with pytest.raises(ConfigError, match="decimal is for type = 'numeric' and 'dense'"):
        FieldSpec(name="a", decimal=",")
