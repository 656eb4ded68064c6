"""The profile that encoding writes, counted by hand, and when a log is said to have drifted."""

import numpy as np
import polars as pl
import pytest

from embtrim.data.encoder import Encoder
from embtrim.data.profile import QUANTILES, Counts, FieldProfile, Profile, describe_drift, find_drift, shares_of
from embtrim.data.tally import Tally, sample_of
from embtrim.errors import DataError
from embtrim.schema import FieldSpec
from tests.data.small_logs import schema_of

FIELDS = (
    FieldSpec(name="a", min_count=2),
    FieldSpec(name="h", hash_size=5),
    FieldSpec(name="tags", type="multi", max_len=2, min_count=2),
    FieldSpec(name="n", type="numeric", transform="log2"),
    FieldSpec(name="d", type="dense", transform="log1p"),
)
TRAIN = pl.DataFrame(
    {
        "y": [0, 1, 0, 1, 0, 1],
        "a": ["u", "u", "v", "v", "w", ""],
        "h": ["x", None, "z", "", "x", "x"],
        "tags": [["p", "q"], ["p"], [], None, ["q", "r"], ["p"]],
        "n": [1.0, 2.0, 3.0, 4.0, None, 6.0],
        "d": [0.5, None, None, 2.0, 1.0, 1.0],
    }
)
VALID = pl.DataFrame(
    {
        "y": [0, 1, 0, 1],
        "a": ["u", "new", "w", None],
        "h": ["x", "q", None, "k"],
        "tags": [["p", "s"], ["r"], [], ["q"]],
        "n": [0.0, 5.0, 7.0, None],
        "d": [3.0, None, 0.5, 0.7],
    },
    schema=TRAIN.schema,
)


@pytest.fixture
def profiled(run):
    """The data and the profile of TRAIN and VALID."""
    data = run(TRAIN, schema_of(*FIELDS), valid=VALID, split=None)
    profile = Profile.load(data.folder)
    assert profile is not None
    return data, profile


def test_by_hand(profiled):
    _, profile = profiled
    a, h, tags, n, d = profile.fields
    assert (a.distinct, a.top) == (3, (("u", 2), ("v", 2), ("w", 1), (None, 1)))
    assert a.counts == {
        # "w" is too rare for a row of its own, and so is the missing value, which is missing all the same.
        "train": Counts(rows=6, missing=1, values=6, unseen=1),
        "valid": Counts(rows=4, missing=1, values=4, unseen=2),
    }
    assert (h.distinct, h.top) == (None, ())
    assert h.counts["train"].of("missing") == (2, 6)
    assert h.counts["valid"].of("missing") == (1, 4)
    assert h.counts["valid"].of("unseen")[0] is None
    assert (tags.distinct, tags.top) == (3, (("p", 3), ("q", 2), ("r", 1)))
    assert tags.counts == {
        "train": Counts(rows=6, missing=2, values=6, unseen=1),
        "valid": Counts(rows=4, missing=1, values=4, unseen=2),
    }
    assert n.quantiles == tuple(np.quantile([1.0, 2, 3, 4, 6], QUANTILES, method="lower"))
    assert n.counts == {
        "train": Counts(rows=6, missing=1, values=5, unseen=0),
        "valid": Counts(rows=4, missing=1, values=3, unseen=2),  # 0 and 7 lie outside 1..6
    }
    assert (d.quantiles[0], d.quantiles[-1]) == (0.5, 2.0)
    assert d.counts["train"] == Counts(rows=6, missing=2, values=4, unseen=0)
    assert d.counts["valid"] == Counts(rows=4, missing=1, values=3, unseen=1)


def test_a_tally_of_the_same_rows_counts_the_same(profiled):
    data, profile = profiled
    encoder = Encoder.load(data.folder)
    tally = Tally(encoder.schema, sample_of(encoder.schema, VALID), profile)
    for start in (0, 3):
        encoder.encode_chunk(VALID[start : start + 3], tally)
    counts = tally.counts()
    assert counts == {field.name: field.counts["valid"] for field in profile.fields}
    assert tally.examples["a"] == ["new", "w"]
    assert tally.quantiles()["n"][0] == 0.0


def test_the_range_of_numbers_holds_their_float32(run):
    schema = schema_of(FieldSpec(name="a"), FieldSpec(name="d", type="dense", transform="none"))
    folder = run(pl.DataFrame({"y": [0, 1], "a": ["u", "v"], "d": [0.7, 1.1]}), schema).folder
    encoder = Encoder.load(folder)
    numbers = pl.Series([0.7, 1.1, 0.6, 1.2], dtype=pl.Float32)  # which are 0.69999999, 1.10000002, ..
    rows = pl.DataFrame({"a": ["u"] * 4, "d": numbers})
    tally = Tally(schema, sample_of(schema, rows), Profile.load(folder))
    encoder.encode_chunk(rows, tally)
    assert tally.counts()["d"] == Counts(rows=4, values=4, unseen=2)


def test_the_size_of_chunks_and_of_the_sample_does_not_matter(run, write, monkeypatch):
    rng = np.random.default_rng(0)
    rows = "".join(f"{k % 2},u{rng.integers(0, 400)},{rng.normal():.4f}\n" for k in range(6000))
    path = write("log.csv", "y,a,n\n" + rows)
    schema = schema_of(FieldSpec(name="a", min_count=3), FieldSpec(name="n", type="numeric", transform="quantile:5"))
    monkeypatch.setattr("embtrim.data.tally.SAMPLE_ROWS", 1000)
    small, large = (
        run(path, schema, split="8:1:1", chunk_bytes=size).folder.joinpath("profile.json").read_text()
        for size in (10_000, 1 << 24)
    )
    assert small == large
    field = Profile.model_validate_json(small).fields[1]
    assert 100 < field.counts["train"].values < 2000
    assert abs(field.quantiles[QUANTILES.index(0.5)]) < 0.15


def _profile(unseen: int, values: int, missing: int = 0) -> Profile:
    counts = Counts(rows=values, missing=missing, values=values, unseen=unseen)
    return Profile(fields=(FieldProfile(name="a", type="categorical", counts={"train": Counts(), "valid": counts}),))


@pytest.mark.parametrize(
    "unseen, values, reported",
    [
        (5, 5, False),  # fewer than six say nothing
        (8, 8, True),
        (20, 1000, False),  # 3% are expected: 1% of validation, its error of 0.86%, the tolerance of 1%
        (54, 1000, False),
        (55, 1000, True),
        (3400, 100_000, True),
        (3000, 100_000, False),
    ],
)
def test_a_share_that_leaves_what_validation_saw(unseen, values, reported):
    found = find_drift(_profile(10, 1000), {"a": Counts(rows=values, values=values, unseen=unseen)})
    assert bool(found) == reported


def test_tolerance_missing_and_order():
    profile = _profile(0, 10_000)
    now = {"a": Counts(rows=10_000, missing=3000, values=10_000, unseen=400)}
    found = find_drift(profile, now, 0.01, {"a": ["1034.0"]})
    assert [(drift.what, drift.share) for drift in found] == [("missing", 0.3), ("unseen", 0.04)]
    assert "4% of the values are unseen, such as '1034.0'; validation had 0%" in describe_drift(found)[1]
    assert [drift.what for drift in find_drift(profile, now, 0.05)] == ["missing"]
    assert find_drift(profile, now, 1.0) == []
    assert shares_of(profile, now)[0]["expected_unseen"] == 0.0
    many = Profile(fields=tuple(profile.fields[0].replace(name=f"f{k}") for k in range(30)))
    assert (
        describe_drift(find_drift(many, {f"f{k}": now["a"] for k in range(30)}))[-1] == "and 50 more fields or shares"
    )


def test_a_profile_of_a_newer_version_is_refused(tmp_path):
    (tmp_path / "profile.json").write_text('{"profile_version": 9}')
    with pytest.raises(DataError, match="has version 9, this release reads 1"):
        Profile.load(tmp_path)
    assert Profile.load(tmp_path / "none") is None
