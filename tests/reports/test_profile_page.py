"""The profile of a raw log: its rows, its page, and the command."""

import json

import numpy as np
import polars as pl
import pytest

import embtrim
from embtrim.data.log_profile import profile_log
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
    found = profile_log(folder / "monday.csv")
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
    same, other = (profile_log(folder / name, folder / against) for name in ("monday.csv", "tuesday.csv"))
    assert same.drift == ()
    assert [(drift.field, drift.what) for drift in other.drift] == [("user", "unseen")]
    rows = {row["field"]: row for row in profile_rows(other)}
    assert 0.3 < float(rows["user"]["unseen"].rstrip("%")) / 100 < 0.6
    assert rows["user"]["unseen before"] == "0.0%"


def test_the_page_shows_names_as_text_and_loads_nothing(folder):
    page = render_profile(profile_log(folder / "tuesday.csv", folder / "data"))
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "http://" not in page.replace("http-equiv", "")
    assert "https://" not in page
    assert "drift:" in page
    assert page.count("<svg") == 2 * 4  # now and before
    assert "<script" not in page


def test_bars_of_numbers_have_the_area_of_their_rows(folder):
    price = next(f for f in profile_log(folder / "monday.csv").profile.fields if f.name == "price")
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


def test_against_something_else(folder, tmp_path):
    with pytest.raises(DataError, match="neither encoded data nor a bundle"):
        profile_log(folder / "monday.csv", tmp_path)
