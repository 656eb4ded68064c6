"""Times order rows as moments, however they are written; cuts are moments too; and which column is the clock."""

from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest

from embtrim.data.drafting import infer_schema
from embtrim.errors import ConfigError, DataError
from embtrim.schema import FieldSpec
from tests.cli.workshop import call
from tests.data.small_logs import schema_of

NUM_ROWS = 240
# Three hours apart, over the end of summer time in Berlin (2024-10-27) and from one- to two-digit months and days.
TIMES = [datetime(2024, 9, 25, 22) + timedelta(hours=3.25 * i) for i in range(NUM_ROWS)]
CUTS = ("2024-10-05T07:00:00", "2024-10-15T13:00:00")
SCHEMA = schema_of(FieldSpec(name="place", type="dense", transform="none"), FieldSpec(name="a"), time="t")


def offset_text(moment: datetime, hours: float) -> str:
    return moment.replace(tzinfo=timezone.utc).astimezone(timezone(timedelta(hours=hours))).isoformat(sep=" ")


def frame_of(times) -> pl.DataFrame:
    """A log in order of time; `place` is the row's place in this order, and rows are shuffled."""
    frame = pl.DataFrame(
        {"y": [i % 2 for i in range(NUM_ROWS)], "place": np.arange(float(NUM_ROWS)), "a": ["u"] * NUM_ROWS, "t": times}
    )
    return frame.sample(fraction=1.0, shuffle=True, seed=0)


def places(data) -> dict[str, list[float]]:
    return {name: sorted(data.split(name).dense[:, 0].tolist()) for name in data.splits}


EPOCH = [(t - datetime(1970, 1, 1)).total_seconds() for t in TIMES]
BERLIN = pl.Series(TIMES).dt.replace_time_zone("UTC").dt.convert_time_zone("Europe/Berlin")
FORMS = {
    "space": [f"{t:%Y-%m-%d %H:%M:%S}" for t in TIMES],
    "T": [t.isoformat() for t in TIMES],
    "fraction": [f"{t:%Y-%m-%dT%H:%M:%S}.{i:03}" for i, t in enumerate(TIMES)],
    "short": [f"{t.year}/{t.month}/{t.day} {t.hour}:{t.minute:02}" for t in TIMES],
    "dots": [f"{t.year}.{t.month}.{t.day} {t.hour}:{t.minute:02}" for t in TIMES],
    "month name": [f"{t:%b %d %Y %H:%M}" for t in TIMES],
    "month name, AM and PM": [f"{t:%B} {t.day}, {t.year}, {t:%I:%M:%S %p}" for t in TIMES],
    "day first, month name": [f"{t:%a, %d %b %Y %H:%M:%S} GMT" for t in TIMES],
    "web server": [f"{t:%d/%b/%Y:%H:%M:%S} +0000" for t in TIMES],
    "ctime": [f"{t:%a %b %d %H:%M:%S} +0000 {t:%Y}" for t in TIMES],
    "AM and PM": [f"{t:%Y-%m-%d %I:%M %p}" for t in TIMES],
    "compact": [f"{t:%Y%m%dT%H%M%S}" for t in TIMES],
    "Z": [t.isoformat() + "Z" for t in TIMES],
    "mixed forms": [f"{t:%b %d %Y %H:%M}" if i % 3 else t.isoformat() for i, t in enumerate(TIMES)],
    "datetimes": TIMES,
    "milliseconds": pl.Series(TIMES, dtype=pl.Datetime("ms")),
    "nanoseconds in UTC": pl.Series(TIMES, dtype=pl.Datetime("ns", "UTC")),
    "seconds since 1970": [int(e) for e in EPOCH],
    "seconds as text": [str(int(e)) for e in EPOCH],
    "milliseconds since 1970": [int(e * 1000) for e in EPOCH],
    "compact numbers": [int(f"{t:%Y%m%d%H%M%S}") for t in TIMES],
}


class TestForms:
    @pytest.mark.parametrize("name", FORMS)
    def test_rows_are_divided_in_order_of_time(self, run, name):
        frame = frame_of(FORMS[name])
        expected = {"train": [*range(192)], "valid": [*range(192, 216)], "test": [*range(216, 240)]}
        assert places(run(frame, SCHEMA, split="time:8:1:1")) == expected
        # The cuts lie at rows 69.2 and 144.9.
        at_cuts = {"train": [*range(70)], "valid": [*range(70, 145)], "test": [*range(145, 240)]}
        for mark in "T ":
            cuts = ",".join(cut.replace("T", mark) for cut in CUTS)
            assert places(run(frame, SCHEMA, split=f"time:{cuts}")) == at_cuts

    @pytest.mark.parametrize(
        "times, cuts",
        [
            (BERLIN, ("2024-10-05T09:00:00", "2024-10-15 15:00")),
            (BERLIN, ("2024-10-05T07:00:00Z", "2024-10-15 14:00:00+01:00")),
            ([offset_text(t, (i * 7) % 25 - 12) for i, t in enumerate(TIMES)], ("2024-10-05T07:00Z", "2024-10-15T15:00+0200")),
        ],
    )  # fmt: skip
    def test_zones_and_summer_time_are_instants(self, run, times, cuts):
        frame = frame_of(times)
        assert places(run(frame, SCHEMA, split="time:8:1:1"))["train"] == [*range(192)]
        found = places(run(frame, SCHEMA, split=f"time:{','.join(cuts)}"))
        assert [found[name][0] for name in ("train", "valid", "test")] == [0, 70, 145]

    def test_the_hour_that_comes_twice(self, run):
        """At the end of summer time, local texts repeat an hour; instants do not."""
        local = [datetime(2024, 10, 27, 0, tzinfo=timezone.utc) + timedelta(minutes=i) for i in range(NUM_ROWS)]
        times = [moment.astimezone(ZoneInfo("Europe/Berlin")).isoformat() for moment in local]
        assert sorted(times) != times
        assert places(run(frame_of(times), SCHEMA, split="time:8:1:1"))["train"] == [*range(192)]

    def test_a_named_format(self, run):
        times = [f"{t.day}.{t.month}.{t:%y %H:%M}" for t in TIMES]
        named = run(frame_of(times), SCHEMA, split="time:8:1:1", time_format="%d.%m.%y %H:%M")
        assert places(named)["train"] == [*range(192)]
        cuts = run(frame_of(times), SCHEMA, split="time:5.10.24 07:00,2024-10-15 13:00", time_format="%d.%m.%y %H:%M")
        assert [found[0] for found in places(cuts).values()] == [0, 70, 145]


class TestRefusals:
    @pytest.mark.parametrize(
        "times, settings, message",
        [
            (["1/2/2024", "2/1/2023"], {}, "row 1: time column 't' holds '1/2/2024', which cannot be read as a time in only one way; name its form in the schema, such as time_format"),
            (["2024-09-05", "5.9.2024"], {}, "row 2: .* holds '5.9.2024', which cannot be read"),
            (["2024-09-05", "yesterday"], {}, "row 2: .* holds 'yesterday'"),
            (["2024-09-05", "2024-13-05"], {}, "row 2: .* holds '2024-13-05'"),
            (["Foo 05 2024", "Sep 05 2024"], {}, "row 1: .* holds 'Foo 05 2024'"),
            (["2024-09-05", None], {}, "row 2: time column 't' is missing"),
            (["2024-09-05 08:00", "2024-09-05 08:00Z"], {}, r"row 2: .* holds '2024-09-05 08:00Z' \(a zone\), which has no place among"),
            ([True, False], {}, "time column 't' holds Boolean; it must hold numbers, times or text"),
            (["2024-09-05", "5/9/2024"], {"time_format": "%d/%m/%Y"}, "row 1: .* is not of the form '%d/%m/%Y'"),
            (["24090508", "24090509"], {"time_format": "%y%m%d%H"}, "time_format '%y%m%d%H' is not a format of strptime"),
            (["2024-09-05", "2024-09-06"], {"split": "time:1725523200"}, "holds times without a zone, the cut is '1725523200'; write it as 2024"),
            (["2024-09-05", "2024-09-06"], {"split": "time:2024-09-05T12:00Z"}, "the cut '2024-09-05T12:00Z' has a zone"),
            (["2024-09-05 00:00+02:00", "2024-09-06 00:00-07:00"], {"split": "time:2024-09-05"}, "the cut '2024-09-05' has no zone"),
            ([1.5, 2.5], {"split": "time:2024-09-05"}, "holds numbers, the cut is '2024-09-05'; write it as a number"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_ordered(self, run, times, settings, message):
        frame = pl.DataFrame({"y": [0, 1], "place": [0.0, 1.0], "a": ["u", "v"], "t": times})
        with pytest.raises((DataError, ConfigError), match=message):
            run(frame, SCHEMA, **{"split": "time:8:1:1", **settings})

    def test_a_cut_in_the_hour_that_is_left_out(self, run):
        times = pl.Series([datetime(2024, 3, 31, i) for i in (0, 5)]).dt.replace_time_zone("Europe/Berlin")
        frame = pl.DataFrame({"y": [0, 1], "place": [0.0, 1.0], "a": ["u", "v"], "t": times})
        with pytest.raises(DataError, match="the cut '2024-03-31 02:30' does not exist in Europe/Berlin"):
            run(frame, SCHEMA, split="time:2024-03-31 02:30")

    @pytest.mark.parametrize(
        "later, message",
        [
            ([1_725_523_200_000], r"holds '1725523200000' \(milliseconds since 1970, other rows seconds since 1970\)"),
            ([datetime(2024, 9, 6)], r"holds '2024-09-06 00:00:00' \(times without a zone\)"),
        ],
    )
    def test_parts_in_other_units(self, run, tmp_path, later, message):
        for name, times in (("one", [1_725_523_200, 1_725_523_201]), ("two", later)):
            frame = pl.DataFrame({"y": [0, 1][: len(times)], "place": 0.0, "a": "u", "t": times})
            frame.write_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=rf"two.parquet row 1: time column 't' {message}"):
            run([tmp_path / "one.parquet", tmp_path / "two.parquet"], SCHEMA, split="time:8:1:1")


class TestChoice:
    NUM_ROWS = 60
    CLOCK = tuple(f"{datetime(2024, 9, 5) + timedelta(hours=i)}" for i in range(NUM_ROWS))

    def draft(self, columns: dict, **settings):
        return infer_schema(pl.DataFrame({"click": [0, 1] * 30, "user": ["a", "b"] * 30, **columns}), **settings)

    @pytest.mark.parametrize(
        "other",
        [
            {"birthday": [f"19{50 + i % 50}-03-{1 + i % 28:02}" for i in range(NUM_ROWS)]},
            {"DateOfBirth": [datetime(1950 + i % 50, 3, 1) for i in range(NUM_ROWS)]},
            {"joined": [f"20{10 + i * 7 % 13}-03-{1 + i % 28:02}" for i in range(NUM_ROWS)]},
            {"expires": [f"{datetime(2030, 1, 1) + timedelta(hours=i * 37 % 60)}" for i in range(NUM_ROWS)]},
        ],
    )
    def test_of_two_columns_the_clock_is_taken_and_said(self, other, caplog):
        caplog.set_level("INFO")
        for columns in ({**other, "seen": list(self.CLOCK)}, {"seen": list(self.CLOCK), **other}):
            draft = self.draft(columns)
            assert draft.time == "seen"
            assert [field.name for field in draft.fields] == ["user"]
        assert f"time column: 'seen'; {next(iter(other))!r} holds dates or times as well" in caplog.text

    def test_in_a_shuffled_log_a_time_goes_before_a_day(self):
        order = np.random.default_rng(0).permutation(self.NUM_ROWS)
        days = [f"{datetime(2024, 9, 5) + timedelta(days=int(i)):%Y-%m-%d}" for i in order]
        assert self.draft({"due": days, "seen": [self.CLOCK[i] for i in order]}).time == "seen"
        assert self.draft({"seen": [self.CLOCK[i] for i in order], "date": days}).time == "date"

    def test_a_birthday_alone_is_no_clock(self):
        assert self.draft({"birthday": [f"19{50 + i % 50}-03-01" for i in range(self.NUM_ROWS)]}).time is None

    def test_the_column_and_its_format_may_be_given(self, caplog):
        caplog.set_level("INFO")
        columns = {"seen": list(self.CLOCK), "when": [f"{1 + i % 28}/9/2024" for i in range(self.NUM_ROWS)]}
        assert self.draft(columns).time == "seen"
        assert "column 'when' seems to hold dates such as '1/9/2024'" in caplog.text
        draft = self.draft(columns, time="when", time_format="%d/%m/%Y")
        assert (draft.time, draft.time_format) == ("when", "%d/%m/%Y")
        with pytest.raises(DataError, match="there is no column 'wen'; did you mean 'when'"):
            self.draft(columns, time="wen")

    def test_the_split_says_its_clock(self, run, caplog):
        caplog.set_level("INFO")
        frame = frame_of(FORMS["Z"])
        data = run(frame, label="y", split="time:8:1:1")
        assert "split by time: time column 't' (times with a zone), cut at 2024-10-21 22:00:00Z, " in caplog.text
        assert data.schema.time == "t"

    def test_the_command_names_column_and_form(self, tmp_path):
        times = [f"{t.month}/{t.day}/{t:%Y %I:%M %p}" for t in TIMES]
        frame = frame_of(times).with_columns(pl.Series("birthday", [f"19{50 + i % 50}-03-01" for i in range(NUM_ROWS)]))
        frame.write_csv(tmp_path / "log.csv")
        command = ["encode", tmp_path / "log.csv", "--label", "y", "--out", tmp_path / "data", "--split", "time:8:1:1"]
        refused = call(*command)
        assert refused.code == 1
        assert (
            "a split by time needs the schema's time column; set time = '<column>' in the schema (--time" in refused.err
        )
        refused = call(*command, "--time", "t")
        assert "time_format" in refused.err
        done = call(*command, "--time", "t", "--time-format", "%m/%d/%Y %I:%M %p")
        assert done.code == 0
        assert "split by time: time column 't' (times without a zone), cut at 2024-10-21 22:00:00, " in done.err
        assert "time column: t" in done.out
