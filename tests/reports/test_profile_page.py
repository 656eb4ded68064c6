"""The profile of a raw log: its rows, its page, and the command."""

import json

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.data.log_profile import profile
from embtrim.errors import DataError
from embtrim.models import FM
from embtrim.reports.profile_page import render_profile
from embtrim.reports.profile_tables import bars_of, profile_rows
from embtrim.serving.bundle import save
from tests.cli.workshop import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two days, encoded data and a bundle of the first."""
    folder = tmp_path_factory.mktemp("profiles")
    rng = np.random.default_rng(0)

    def day(first_user: int) -> pl.DataFrame:
        user = rng.integers(first_user, first_user + 60, 3000)
        return pl.DataFrame(
            {
                "click": rng.integers(0, 2, 3000),
                "user": [f"<b>{k}" if k % 9 else None for k in user],
                "tags": [f"t{k % 5}|t{k % 3}" if k % 4 else "" for k in user],
                "price": rng.normal(50.0, 10.0, 3000),
                "constant": 1.5,
            }
        )

    day(0).write_csv(folder / "monday.csv")
    day(30).write_csv(folder / "tuesday.csv")
    data = embtrim.encode(str(folder / "monday.csv"), label="click", out=folder / "data", progress=False)
    save(FM(data.schema, embedding_dim=2), folder / "bundle", data)
    return folder


def test_a_log_alone(folder):
    found = profile(folder / "monday.csv")
    rows = {row["field"]: row for row in profile_rows(found)}
    monday = pl.read_csv(folder / "monday.csv")
    assert found.rows == 3000
    assert rows["user"]["distinct"] == str(monday["user"].drop_nulls().n_unique())
    assert rows["user"]["missing"] == f"{monday['user'].null_count() / 3000:.1%}"
    assert rows["tags"]["missing"] == f"{(monday['tags'].fill_null('') == '').mean():.1%}"
    assert rows["tags"]["holds"].startswith("t")
    assert rows["click"]["distinct"] == "2"
    assert rows["price"]["type"] == "dense"
    middle = float(rows["price"]["holds"].split()[0])
    assert abs(middle - float(monday["price"].median())) < 0.1


@pytest.mark.parametrize("against", ["data", "bundle"])
def test_a_log_against_an_earlier_one(folder, against):
    same, other = (profile(folder / name, folder / against) for name in ("monday.csv", "tuesday.csv"))
    assert same.drift == ()
    assert [(drift.field, drift.what) for drift in other.drift] == [("user", "unseen")]
    rows = {row["field"]: row for row in profile_rows(other)}
    assert 0.3 < float(rows["user"]["unseen"].rstrip("%")) / 100 < 0.6
    assert rows["user"]["unseen before"] == "0.0%"


def test_the_page_shows_names_as_text_and_loads_nothing(folder):
    page = render_profile(profile(folder / "tuesday.csv", folder / "data"))
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "http://" not in page.replace("http-equiv", "")
    assert "https://" not in page
    assert "drift:" in page
    assert page.count("<svg") == 2 * 4  # now and before
    assert "<script" not in page


def test_bars_of_numbers_have_the_area_of_their_rows(folder):
    price = next(f for f in profile(folder / "monday.csv").profile.fields if f.name == "price")
    bars = bars_of(price, 3000)
    area = np.array([bar["width"] * bar["height"] for bar in bars])
    assert area / area.sum() * 0.98 == pytest.approx([0.04, 0.05, 0.15, 0.25, 0.25, 0.15, 0.05, 0.04])
    assert sum(bar["width"] for bar in bars) == pytest.approx(100.0)
    constant = price.replace(quantiles=(2.0,) * 11)
    assert len(bars_of(constant, 3000)) == 1


def test_the_command(folder, tmp_path):
    page = tmp_path / "page.html"
    done = call("profile", folder / "tuesday.csv", "--against", folder / "bundle", "--out", page)
    assert done.code == 0
    assert "drift: field 'user'" in done.out
    assert page.read_text().startswith("<!DOCTYPE html>")
    done = call("profile", folder / "tuesday.csv", "--against", folder / "data", "--strict", "--json", "--quiet")
    assert done.code == 1
    assert json.loads(done.out)["drift"][0]["field"] == "user"
    assert "the log has drifted" in done.err
    assert (
        call("profile", folder / "tuesday.csv", "--against", folder / "data", "--drift-tolerance", "1", "--strict").code
        == 0
    )
    assert call("profile", folder / "monday.csv", "--out", tmp_path / "page.txt").code == 2


def test_the_schema_says_which_rows_count(folder, tmp_path, caplog):
    log = pl.DataFrame({"click": [0, 1] * 300, "user": [f"u{k % 7}" for k in range(600)], "rating": [0, 3, 5] * 200})
    other = log.with_columns(user=pl.when(pl.col("rating") == 0).then(pl.lit("bot")).otherwise("user"))
    embtrim.encode(log, label="click", where="rating > 0", out=tmp_path / "data")
    found = profile(other, tmp_path / "data")
    assert (found.rows, found.drift) == (400, ())
    assert "all its rows are counted" not in caplog.text
    assert profile(other.drop("click"), tmp_path / "data").rows == 400
    with pytest.raises(DataError, match="has no column 'rating'"):  # a field of the data, and not only of the rule
        profile(other.drop("rating"), tmp_path / "data")


def test_a_log_without_the_columns_that_choose_rows_counts_whole(tmp_path, caplog):
    log = pl.DataFrame({"rating": [0, 3, 9] * 200, "user": [f"u{k % 7}" for k in range(600)]})
    embtrim.encode(log, label="rating > 5", where="rating > 0", out=tmp_path / "data")
    assert profile(log, tmp_path / "data").rows == 400
    assert profile(log.drop("rating"), tmp_path / "data").rows == 600
    assert "has no column 'rating', which where = 'rating > 0' reads: all its rows are counted" in caplog.text


def test_lines_that_were_skipped_are_in_the_profile(folder, tmp_path):
    lines = (folder / "monday.csv").read_text().splitlines()
    log = tmp_path / "log.csv"
    log.write_text("\n".join([*lines[:100], "broken", *lines[100:]]))
    done = call("profile", log, "--on-error", "skip", "--json", "--quiet")
    assert json.loads(done.out)["profile"]["skipped"] == {
        "log": {"num_lines": 1, "first": [f"{log} line 101 has 1 cells, the log has 5 columns: broken"]}
    }
    assert "skipped 1 lines that cannot be read" in call("profile", log, "--on-error", "skip").out
    scores = tmp_path / "scores.csv"
    done = call("predict", folder / "bundle", log, "--out", scores, "--on-error", "skip", "--json", "--quiet")
    assert json.loads(done.out)["skipped"]["num_lines"] == 1
    assert json.loads(done.out)["num_rows"] == 3000
    done = call("predict", folder / "bundle", log, "--out", scores, "--on-error", "skip", "--overwrite")
    assert "skipped lines: 1" in done.out


def test_against_something_else(folder, tmp_path):
    with pytest.raises(DataError, match="neither encoded data nor a bundle"):
        profile(folder / "monday.csv", tmp_path)
