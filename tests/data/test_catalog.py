import gzip
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embtrim.data import catalog
from embtrim.data.catalog import CATALOG, encode_known, known, load
from embtrim.data.encoder import Encoder
from embtrim.errors import DataError
from embtrim.training.settings import TrainConfig

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="shared data folder is absent")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBTRIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def options(tmp_path) -> dict:
    return {"out": tmp_path / "out", "progress": False}


@pytest.mark.parametrize("name", CATALOG)
def test_entries_say_all(name):
    entry = known(name)
    assert entry.name == name
    assert entry.source.startswith("https://")
    assert entry.licence
    assert entry.title
    assert entry.how_to_get
    assert entry.files
    assert set(entry.recipe) == {"model", "train"}
    assert entry.recipe["model"]["embedding_dim"] > 0
    TrainConfig.parse(entry.recipe["train"])
    assert f"--dataset {name}" in entry.command()
    assert entry.split is not None or len(entry.files) == 3


def test_names():
    assert {"criteo", "avazu", "frappe", "movielens-1m", "movielenslatest_x1", "kdd12", "flights"} <= set(CATALOG)
    with pytest.raises(DataError, match=r"no dataset 'cryteo' in the catalog; did you mean 'criteo'\?"):
        known("cryteo")


class TestLoad:
    @pytest.mark.slow
    def test_bundled_is_encoded_once(self, cache, caplog):
        with caplog.at_level(logging.INFO):
            first = load("flights")
            second = load("flights")
        assert caplog.text.count("encoded train") == 1
        assert first.folder == second.folder
        assert first.folder is not None
        assert first.folder.parent == cache
        rows = [first.num_rows(name) for name in ("train", "valid", "test")]
        assert sum(rows) == 186_239
        assert rows[1] == pytest.approx(18_624, abs=600)
        assert first.split("train").labels.mean() == pytest.approx(0.24, abs=0.005)
        assert len(first.schema.fields) == 14
        assert first.schema.tables["tail_number"] > 5_000
        assert load(first.folder).schema == first.schema

    def test_xdg_cache(self, tmp_path, monkeypatch):
        monkeypatch.delenv("EMBTRIM_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert catalog._cache_folder() == tmp_path / "embtrim"

    def test_not_bundled(self, cache):
        with pytest.raises(
            DataError, match=r"criteo .* is not bundled; licence: .* embtrim encode FOLDER --dataset criteo"
        ):
            load("criteo")

    def test_what_is_no_dataset(self, tmp_path):
        (tmp_path / "log.csv").write_text("y,a\n0,u\n")
        with pytest.raises(
            DataError, match=r"is a file, not an encoded folder; encode it first: embtrim encode .*log.csv"
        ):
            load(tmp_path / "log.csv")
        with pytest.raises(DataError, match=r"is not an encoded folder \(it has no meta.json\)"):
            load(tmp_path)
        with pytest.raises(DataError, match=r"neither a folder nor a dataset .* did you mean 'flights'\?"):
            load("flight")


def test_bundled_files_carry_their_licence():
    text = (catalog.BUNDLED_FOLDER / "README.txt").read_text()
    assert "public domain" in text
    assert "transtats.bts.gov" in text
    assert sum(path.stat().st_size for path in catalog.BUNDLED_FOLDER.iterdir()) < 2_500_000


@pytest.mark.slow
def test_flights_by_date(tmp_path):
    data = encode_known("flights", None, split="time:8:1:1", **options(tmp_path))
    assert "flight_date" not in [field.name for field in data.schema.fields]
    days = pl.read_parquet(catalog.BUNDLED_FOLDER / "flights_2024_01.parquet")["flight_date"].cast(pl.String)
    ordered = days.sort()
    cuts = [(days < ordered[int(len(days) * part)]).sum() for part in (0.8, 0.9)]  # whole days
    assert [data.num_rows(name) for name in data.splits] == [cuts[0], cuts[1] - cuts[0], len(days) - cuts[1]]


class TestLayouts:
    """Each layout on a few made-up rows, in the files' published form."""

    def test_criteo(self, tmp_path):
        row = [*(str(i) for i in range(13)), *(f"{i:08x}" for i in range(26))]
        other = [""] * 39
        lines = ["\t".join([str(i % 2), *(row if i % 3 else other)]) for i in range(300)]
        (tmp_path / "train.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        data = encode_known("criteo", tmp_path, **options(tmp_path))
        assert set(data.schema.tables.values()) == {3}
        assert set(np.unique(data.split("train").ids)) == {1, 2}
        with pytest.raises(DataError, match=r"lacks train\.txt"):
            encode_known("criteo", tmp_path / "nowhere", tmp_path / "out2")

    def test_avazu(self, tmp_path):
        header = (
            "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,"
        )
        header += "device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
        rows = [f"{i},{i // 8 % 2},1410{20 + i % 8}{10 + i % 5}" + ",v" * 21 for i in range(400)]
        (tmp_path / "train.csv").write_text("\n".join([header, *rows]))
        data = encode_known("avazu", tmp_path, **options(tmp_path))
        assert {n: data.schema.tables[n] for n in ("hour", "weekday", "is_weekend")} == {
            "hour": 6,
            "weekday": 8,
            "is_weekend": 3,
        }
        assert len(data.schema.fields) == 24
        by_time = encode_known("avazu", tmp_path, tmp_path / "out2", split="time:8:1:1", progress=False)
        assert len(by_time.schema.fields) == 24
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out2", "train.csv"]  # no work folder left

    def test_kdd12(self, tmp_path):
        rows = [f"{i % 4 // 3}\t{1 + i % 2}\turl\tad\tadv\t1\t2\tq\tk\tt\td\t{i % 5}" for i in range(400)]
        (tmp_path / "training.txt").write_text("\n".join(rows))
        (tmp_path / "userid_profile.txt").write_text("1\t1\t3\n2\t2\t4\n")
        data = encode_known("kdd12", tmp_path, **options(tmp_path))
        assert data.schema.tables["user_id"] == 6
        assert data.schema.tables["gender"] == 4  # 1, 2, missing, and OOV
        assert sum(data.split(name).labels.sum() for name in data.splits) == 100

    def test_movielens_latest(self, tmp_path):
        for name in ("train", "valid", "test"):
            (tmp_path / f"{name}.csv").write_text("label,user_id,item_id,tag_id\n" + "0,1,2,3\n1,4,5,6\n" * 3)
        data = encode_known("movielenslatest_x1", tmp_path, **options(tmp_path))
        assert data.schema.tables == {"user_id": 3, "item_id": 3, "tag_id": 3}
        with pytest.raises(DataError, match="comes divided into files; it takes no split"):
            encode_known("movielenslatest_x1", tmp_path, tmp_path / "out2", split="8:1:1")

    def test_movielens_1m(self, tmp_path):
        ratings = "".join(
            f"{1 + i % 2}::{1 + i % 3}::{(1, 2, 3, 3, 5)[i % 5]}::{956703932 + i * 1000}\n" for i in range(500)
        )
        (tmp_path / "ratings.dat").write_text(ratings)
        (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
        movies = (
            "1::Toy Story (1995)::Animation|Comedy\n2::Misérables, Les (1995)::Drama\n3::Léon (1994)::Crime|Drama\n"
        )
        (tmp_path / "movies.dat").write_bytes(movies.encode("latin-1"))
        data = encode_known("movielens-1m", tmp_path, **options(tmp_path))
        assert sum(data.num_rows(name) for name in data.splits) == 300  # two fifths have rating 3
        assert sum(data.split(name).labels.sum() for name in data.splits) == 100
        assert data.folder is not None
        vocabularies = Encoder.load(data.folder).vocabularies
        assert set(vocabularies["genres"]["value"]) == {"Animation", "Comedy", "Drama", "Crime"}
        assert set(vocabularies["year"]["value"]) == {"1995", "1994"}
        assert data.schema.num_id_columns == 8 + 6


@needs_data
@pytest.mark.slow
class TestRealFiles:
    def test_frappe(self, tmp_path):
        data = encode_known("frappe", DATA / "frappe_x1", **options(tmp_path))
        assert [data.num_rows(name) for name in data.splits] == [202_027, 57_722, 28_860]
        sizes = data.schema.tables
        # the published vocabularies, and OOV; three of the 957 users occur in valid or test only
        assert sizes.pop("user") == 955
        assert list(sizes.values()) == [4083, 8, 8, 3, 4, 3, 10, 81, 234]

    def test_criteo_sample(self, tmp_path):
        data = encode_known("criteo", DATA / "criteo_80k" / "raw_8k.tsv", min_count=2, **options(tmp_path))
        assert sum(data.num_rows(name) for name in data.splits) == 8_000
        assert data.schema.num_id_columns == 39
        assert data.schema.tables["C9"] == 4

    def test_movielens_1m(self, tmp_path):
        data = encode_known("movielens-1m", DATA / "ml-1m", **options(tmp_path))
        assert sum(data.num_rows(name) for name in data.splits) == 739_012
        positives = sum(data.split(name).labels.sum() for name in data.splits)
        assert positives / 739_012 == pytest.approx(0.778, abs=0.001)
        assert data.schema.tables["genres"] == 19  # 18 genres
        assert data.schema.tables["user_id"] == 6_041
        assert data.split("train").ids[:, 8:].max() == 18

    def test_movielens_1m_prepared(self, tmp_path):
        data = encode_known("movielens-1m-ctr", DATA / "ml-1m", **options(tmp_path))
        assert sum(data.num_rows(name) for name in data.splits) == 739_012
        assert data.schema.tables["genre"] == 302
