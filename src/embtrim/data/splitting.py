"""How one log is divided into training, validation and test rows; the size of chunks does not matter.

A random split is a hash (splitmix64) of the seed and of the row's index in the log. A split by time compares each row's
time with two moments, which are given or are quantiles of the time column; clock.py says what a time is.

Shapes: N rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl
from pydantic import model_validator

from embtrim.config import Config
from embtrim.data.clock import Clock, cut_at, cut_text, read_clock
from embtrim.data.dataset import SPLITS
from embtrim.data.log_file import Chunk
from embtrim.data.reading import RawLog
from embtrim.errors import ConfigError, DataError
from embtrim.schema import Schema

SAMPLE_ROWS = 1 << 18  # at this size a quantile is off by about 0.1% of the rows


class Split(Config):
    """How one log is divided into training, validation and test rows.

    Attributes:
        by: "ratio" draws each row's split at random; "time" cuts along the schema's time column.
        ratio: Parts of the whole for train, valid and test; a part of 0 leaves that split out.
        cuts: Moments that cut the log, for "time" only: train lies before the first cut, valid before the second, and
            test is the rest (with one cut there is no test). None cuts at quantiles of time according to `ratio`. Rows
            of the same moment stay together.
    """

    by: Literal["ratio", "time"] = "ratio"
    ratio: tuple[float, float, float] = (8.0, 1.0, 1.0)
    cuts: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Split:
        if min(self.ratio) < 0 or not np.isfinite(sum(self.ratio)) or self.ratio[0] <= 0:
            raise ValueError("ratio needs a positive part for train, and none below 0, such as 8:1:1")
        if self.cuts is not None and (self.by != "time" or len(self.cuts) not in (1, 2)):
            raise ValueError("cuts are one or two values of the time column, for by = 'time'")
        return self

    @classmethod
    def from_text(cls, text: str) -> Split:
        """Parse `8:1:1`, `time:8:1:1` or `time:2024-01-25,2024-01-28` (cuts are separated by commas).

        Raises:
            ConfigError: The text has none of these forms.
        """
        by, rest = ("time", text[5:]) if text.startswith("time:") else ("ratio", text)
        try:
            ratio = tuple(float(part) for part in rest.split(":"))
        except ValueError:
            ratio = ()
        if len(ratio) == 3:
            return cls.parse({"by": by, "ratio": ratio}, where=f"split {text}")
        if by == "time":
            cuts = tuple(cut.strip() for cut in rest.split(",") if cut.strip())
            return cls.parse({"by": by, "cuts": cuts}, where=f"split {text}")
        raise ConfigError(f"split {text!r} is not understood; allowed: 8:1:1, time:8:1:1, time:CUT,CUT")


def choose_split(split: Split | str | None, given: Sequence[str]) -> Split | None:
    """The split of the main log; None if all of it is for training.

    Args:
        split: The split asked for; None takes the default.
        given: Names of the splits that have a log of their own.

    Raises:
        DataError: The split also cuts rows for a split that has a log of its own.
    """
    if split is None:
        return None if given else Split()
    chosen = Split.from_text(split) if isinstance(split, str) else split
    for name in given:
        if chosen.cuts is not None or chosen.ratio[SPLITS.index(name)] > 0:
            raise DataError(
                f"a {name} log is given, and the split also cuts {name} rows out of the main log; give a ratio whose part for "
                f"{name} is 0, such as {'9:1:0' if name == 'test' else '9:0:1'}, or no split"
            )
    return chosen


class Splitter:
    """Assigns each row of the main log to a split.

    Attributes:
        split: How the log is divided; None if all of it is for training.
        seed: Seed of the random split.
        column: The time column, if the split is by time.
        clock: What the time column holds; None until learned.
        cuts: Times at which the next split starts; None until learned.
    """

    def __init__(self, split: Split | None, schema: Schema, seed: int) -> None:
        self.split = split
        self.seed = seed
        self.column = schema.time if split is not None and split.by == "time" else None
        self.time_format = schema.time_format
        self.clock: Clock | None = None
        self.cuts: list[float] | None = None

    def learn_cuts(self, log: RawLog, chunk_bytes: int, report: Callable[[str, float], None]) -> None:
        """Find the times at which to cut, from the split's settings or from the log's quantiles of time.

        Args:
            log: The main log.
            chunk_bytes: Bytes of text read at a time.
            report: Called with a stage and how far it is, 0..1.

        Raises:
            DataError: The cuts do not fit the time column, or a time cannot be ordered.
        """
        if self.column is None:
            return
        assert self.split is not None
        sample = Sample(self.seed)
        for chunk in log.chunks([self.column], chunk_bytes):
            sample.add(chunk.first_row, self.times(chunk))
            if self.split.cuts is not None:
                break
            report("reading times", chunk.done)
        self.take_cuts(sample, log.name)

    def take_cuts(self, sample: Sample, log_name: str) -> None:
        """Take the cuts from the split's settings or from a sample of the log's times; see `learn_cuts`."""
        assert self.split is not None
        assert self.column is not None
        if self.clock is None:
            raise DataError(f"{log_name} holds no rows")
        if self.split.cuts is not None:
            cuts = [cut_at(cut, self.clock, self.time_format, self.column) for cut in self.split.cuts]
            if cuts != sorted(cuts):
                raise DataError(f"time cuts must not decrease; given {', '.join(self.split.cuts)}")
            self.cuts = cuts
            return
        times = sample.values().sort()
        bounds = np.cumsum(self.split.ratio)[:2] / sum(self.split.ratio)
        ends = [times[min(len(times) - 1, int(len(times) * bound))] for bound in bounds]
        # A part of 0 leaves its split out, because no row lies after the last moment.
        self.cuts = ends if self.split.ratio[2] > 0 else ends[:1]

    def describe(self) -> str:
        """The time column and the cuts, in words."""
        assert self.clock is not None
        return f"time column {self.column!r} ({self.clock.describe()}), cut at {', '.join(map(str, self.cut_texts()))}"

    def cut_texts(self) -> list[str | float]:
        """The cuts for people: ISO texts, or numbers; none unless the split is by time."""
        return [cut_text(cut, self.clock) for cut in self.cuts or () if self.clock is not None]

    def assign(self, chunk: Chunk) -> np.ndarray:
        """The split of each row of a chunk: int8 (N,), an index into SPLITS."""
        num_rows = chunk.frame.height
        if self.split is None:
            return np.zeros(num_rows, np.int8)
        if self.column is None:
            draw_N = (random_bits(chunk.first_row, num_rows, self.seed) >> np.uint64(11)) * 2.0**-53
            bounds = np.cumsum(self.split.ratio)[:2] / sum(self.split.ratio)
            return ((draw_N >= bounds[0]).astype(np.int8) + (draw_N >= bounds[1])).astype(np.int8)
        assert self.cuts is not None
        times = self.times(chunk)
        return sum(((times >= cut).to_numpy().astype(np.int8) for cut in self.cuts), np.zeros(num_rows, np.int8))

    def times(self, chunk: Chunk) -> pl.Series:
        """Times as float64, see clock.py; the first chunk of a log says what the time column holds."""
        assert self.column is not None
        times, self.clock = read_clock(chunk, self.column, self.time_format, self.clock)
        return times


def random_bits(first_row: int, num_rows: int, seed: int) -> np.ndarray:
    """splitmix64 of (seed, row index): uint64 (N,)."""
    with np.errstate(over="ignore"):
        z = np.arange(first_row, first_row + num_rows, dtype=np.uint64) + np.uint64(
            (seed * 0xD1342543DE82EF95 + 1) % 2**64
        )
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Sample:
    """The values offered, or a uniform sample of SAMPLE_ROWS values: the values with the smallest random bits."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._bits: list[np.ndarray] = []
        self._parts: list[pl.Series] = []

    def add(self, first_row: int, values: pl.Series, rows: np.ndarray | None = None) -> None:
        """Offer the values of the rows `first_row` + `rows`; by default the rows are consecutive."""
        bits = random_bits(first_row, len(values) if rows is None else int(rows.max(initial=-1)) + 1, self.seed + 1)
        self._bits.append(bits if rows is None else bits[rows])
        self._parts.append(values)
        if sum(map(len, self._bits)) > 2 * SAMPLE_ROWS:
            self._shrink()

    def merge(self, other: Sample) -> None:
        """Offer the values of another sample of the same log; the order of merging does not matter."""
        self._bits += other._bits
        self._parts += other._parts
        if sum(map(len, self._bits)) > 2 * SAMPLE_ROWS:
            self._shrink()

    def shrunk(self) -> Sample:
        """The sample itself, once it holds no more values than it needs."""
        self._shrink()
        return self

    def values(self) -> pl.Series:
        """The sample."""
        self._shrink()
        return self._parts[0] if self._parts else pl.Series([], dtype=pl.Float64)

    def _shrink(self) -> None:
        if not self._parts:
            return
        bits, values = np.concatenate(self._bits), pl.concat(self._parts)
        if len(bits) > SAMPLE_ROWS:
            kept = np.argpartition(bits, SAMPLE_ROWS)[:SAMPLE_ROWS]
            bits, values = bits[kept], values.gather(kept)
        self._bits, self._parts = [bits], [values]


def check_splits(
    num_rows: Mapping[str, int], positives: Mapping[str, int], label: str, split: Split | None, logs: Sequence[str]
) -> None:
    """Check that every expected split has rows of both classes.

    Args:
        num_rows: Rows of each split.
        positives: Rows with label 1 of each split.
        label: Name of the label column.
        split: How the main log was divided; None if all of it is for training.
        logs: Names of the splits that have a log, "train" for the main log.

    Raises:
        DataError: A split is empty or has one class only.
    """
    expected = set(logs)
    if split is not None and split.cuts is not None:
        expected |= set(SPLITS[: 1 + len(split.cuts)])
    elif split is not None:
        expected |= {name for name, part in zip(SPLITS, split.ratio, strict=True) if part > 0}
    for name in SPLITS:
        if name in expected:
            _check_split(name, num_rows.get(name, 0), positives.get(name, 0), label, split)


def _check_split(name: str, num_rows: int, positives: int, label: str, split: Split | None) -> None:
    how = "" if split is None else f" (split by {split.by}, {':'.join(f'{part:g}' for part in split.ratio)})"
    if num_rows == 0:
        raise DataError(f"split {name!r} is empty{how}; give more rows or another split")
    if positives in (0, num_rows):
        raise DataError(
            f"split {name!r} has {num_rows:,} rows, all with label {label!r} = {int(positives > 0)}{how}; both classes are "
            "needed: give more rows, another split or another label"
        )
