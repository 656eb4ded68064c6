"""Splits by ratio and by time."""

import json

import numpy as np
import polars as pl
import pytest

from embtrim.data.splitting import Split, random_bits
from embtrim.errors import ConfigError, DataError
from tests.data.small_logs import DATED, ONE, ids


class TestSplits:
    FRAME = DATED

    @pytest.mark.slow
    def test_ratio_does_not_depend_on_chunks(self, run, tmp_path):
        self.FRAME.write_csv(tmp_path / "log.csv")
        many = run(tmp_path / "log.csv", ONE, split="8:1:1", chunk_bytes=100)
        one = run(tmp_path / "log.csv", ONE, split="8:1:1")
        for name in one.splits:
            assert ids(many, name) == ids(one, name)
        sizes = [one.num_rows(name) for name in one.splits]
        assert sum(sizes) == 1200
        # standard deviation of a tenth of 1200 rows is 10.4
        assert sizes[1] == pytest.approx(120, abs=42)
        assert sizes[2] == pytest.approx(120, abs=42)

    def test_seed_changes_the_split_and_repeats_it(self, run):
        first, same, other = (run(self.FRAME, ONE, split="8:1:1", seed=seed) for seed in (0, 0, 1))
        assert ids(first) == ids(same)
        assert ids(first) != ids(other)

    def test_random_bits_are_fixed(self):
        assert random_bits(5, 2, seed=3).tolist() == random_bits(0, 7, seed=3).tolist()[5:]
        ones = np.unpackbits(random_bits(0, 20_000, seed=0).view(np.uint8)).mean()
        assert ones == pytest.approx(0.5, abs=0.002)

    def test_time_quantiles_never_part_a_moment(self, run):
        data = run(self.FRAME, ONE.replace(time="t"), split="time:8:1:1")
        assert [data.num_rows(name) for name in data.splits] == [960, 120, 120]
        meta = json.loads((data.folder / "meta.json").read_text())
        assert meta["split"]["cuts"] == [480.0, 540.0]
        assert meta["positives"] == {"train": 640, "valid": 80, "test": 80}

    def test_time_cuts(self, run):
        days = [f"2024-01-{1 + i // 60:02}" for i in range(1200)]
        frame = self.FRAME.with_columns(pl.Series("t", days))
        for dated in (frame, frame.with_columns(pl.col("t").str.to_date())):
            data = run(dated, ONE.replace(time="t"), split="time:2024-01-11,2024-01-16")
            assert [data.num_rows(name) for name in data.splits] == [600, 300, 300]
        data = run(frame, ONE.replace(time="t"), split=Split(by="time", cuts=("2024-01-11",)))
        assert list(data.splits) == ["train", "valid"]

    def test_zero_parts_leave_splits_out(self, run):
        data = run(self.FRAME, ONE, split="9:1:0")
        assert list(data.splits) == ["train", "valid"]
        both = run(self.FRAME, ONE, split="9:1:0", test=self.FRAME)
        assert both.num_rows("test") == 1200

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"split": "8:1"}, "split '8:1' is not understood"),
            ({"split": "0:1:1"}, "needs a positive part for train"),
            ({"split": "time:8:1:1"}, "needs the schema's time column"),
            ({"split": "8:1:1", "test": FRAME}, "a test log is given, and the split also cuts test rows"),
            (
                {"split": "time:5,x", "schema": ONE.replace(time="t")},
                "time column 't' holds numbers, the cut is 'x'; write it as a number",
            ),
            ({"split": "time:9,5", "schema": ONE.replace(time="t")}, "must not decrease"),
            ({"split": "time:9999,99999", "schema": ONE.replace(time="t")}, "split 'valid' is empty"),
        ],
    )
    def test_bad_splits(self, run, options, message):
        with pytest.raises((DataError, ConfigError), match=message):
            run(self.FRAME, **{"schema": ONE, **options})

    def test_empty_and_one_class_splits(self, run):
        ten = self.FRAME.head(3)
        with pytest.raises(DataError, match=r"split '(valid|test)' is empty \(split by ratio, 98:1:1\)"):
            run(ten, ONE, split="98:1:1")
        with pytest.raises(DataError, match="split 'train' has 1,200 rows, all with label 'y' = 1"):
            run(self.FRAME.with_columns(y=1), ONE)
        with pytest.raises(DataError, match="split 'test' has 2 rows, all with label 'y' = 0"):
            run(self.FRAME, ONE, split=None, test=self.FRAME.head(2).with_columns(y=0))
