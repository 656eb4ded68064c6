"""Counting a log while an encoder reads it: missing and unseen values by field, and a sample of its numbers.

Shapes: N rows of a chunk, C id columns, E dense fields.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from embtrim.data.cells import row_number, to_numbers
from embtrim.data.log_file import Chunk
from embtrim.data.profile import QUANTILES, Counts, Profile
from embtrim.data.reading import RawLog
from embtrim.data.splitting import random_bits
from embtrim.schema import PAD, FieldSpec, Schema

KNOWN, UNSEEN, MISSING = 0, 1, 2

SAMPLE_ROWS = 1 << 16  # at this size a quantile is off by about 0.2% of the rows
SAMPLE_CELLS = 1 << 22  # numbers in a sample, for logs of many fields
_LEAST_ROW_BYTES = 24
_NUM_EXAMPLES = 3


class NumberSample:
    """Which rows of a log are looked at for their numbers, and the numbers.

    Attributes:
        fields: The numeric and dense fields of the schema.
        rate: Share of the rows in the sample.
    """

    def __init__(self, schema: Schema, size: int, rows: int | None = None) -> None:
        """A sample of a log of `size` bytes, or of `rows` rows if that is known."""
        self._schema = schema
        self.fields = [field for field in schema.fields if field.type in ("numeric", "dense")]
        wanted = min(SAMPLE_ROWS, SAMPLE_CELLS // max(1, len(self.fields)))
        self.rate = min(1.0, wanted / max(1.0, size / _LEAST_ROW_BYTES if rows is None else rows))

    def rows(self, first_row: int, num_rows: int) -> np.ndarray:
        """The rows of a chunk that are in the sample: int64, ascending. The size of chunks does not matter."""
        if not self.fields:
            return np.empty(0, np.int64)
        if self.rate == 1.0:
            return np.arange(num_rows)
        return np.flatnonzero(random_bits(first_row, num_rows, 1) < np.uint64(self.rate * 2.0**64))

    def numbers(self, frame: pl.DataFrame, rows: np.ndarray) -> np.ndarray:
        """Numbers of the sampled rows of a frame, which was read before: float64 (rows, fields), NaN if missing."""
        if not len(rows):
            return np.empty((0, len(self.fields)))
        cells = frame.select(list(dict.fromkeys(field.raw_column for field in self.fields)))[rows]
        found = to_numbers(cells, self.fields, self._schema, row_number)
        return found.select(pl.all().fill_null(float("nan"))).to_numpy()


def sample_of(schema: Schema, log: RawLog | pl.DataFrame) -> NumberSample:
    """The sample of a log."""
    if isinstance(log, pl.DataFrame):
        return NumberSample(schema, 0, log.height)
    return NumberSample(schema, log.size, log.size if log.is_frame else None)


class Tally:
    """Counts of the values of a log, and examples of unseen ones.

    Attributes:
        examples: Unseen values by field, a few each.
    """

    def __init__(self, schema: Schema, sample: NumberSample, profile: Profile | None) -> None:
        """An empty tally; the profile says the range of the numbers that training saw."""
        self._schema, self._sample = schema, sample
        self._range = ranges(profile)
        self._rows = 0
        self._counts = {f.name: {"missing": 0, "values": 0, "unseen": 0} for f in schema.fields}
        self._numbers: list[np.ndarray] = []
        self.examples: dict[str, list[str]] = {}

    def add_statuses(self, field: FieldSpec, status_N: np.ndarray, texts: pl.Series) -> None:
        """Count the cells, or elements of lists, of a listed field of texts."""
        counts = self._counts[field.name]
        unseen = int(np.count_nonzero(status_N == UNSEEN))
        counts["values"] += len(status_N)
        counts["unseen"] += unseen
        counts["missing"] += int(np.count_nonzero(status_N == MISSING))
        shown = self.examples.setdefault(field.name, [])
        if unseen and len(shown) < _NUM_EXAMPLES:
            found = texts.gather(np.flatnonzero(status_N == UNSEEN)[:1000]).unique(maintain_order=True)
            shown += [text for text in found if text not in shown][: _NUM_EXAMPLES - len(shown)]

    def add_missing(self, field: FieldSpec, code_N: np.ndarray, missing: int) -> None:
        """Count the cells of a hashed or numeric field; `missing` is the code of a missing value."""
        self._counts[field.name]["missing"] += int(np.count_nonzero(code_N == missing))

    def add_rows(self, rows: Chunk | pl.DataFrame, ids_CN: np.ndarray, dense_NE: np.ndarray | None) -> None:
        """Count the rows of a chunk, its empty lists and missing dense values, and look at some of its numbers."""
        frame, first_row = (rows.frame, rows.first_row) if isinstance(rows, Chunk) else (rows, self._rows)
        for field, columns in zip(self._schema.id_fields, self._schema.column_slices, strict=True):
            if field.type == "multi":
                self._counts[field.name]["missing"] += int(np.count_nonzero(ids_CN[columns.start] == PAD))
        if dense_NE is not None:
            for field, missing in zip(self._schema.dense_fields, np.isnan(dense_NE).sum(0), strict=True):
                self._counts[field.name]["missing"] += int(missing)
        sampled = self._sample.rows(first_row, frame.height)
        if len(sampled):
            numbers_NK = self._sample.numbers(frame, sampled)
            self._numbers.append(numbers_NK)
            for name, (count, outside) in outside_range(self._sample, numbers_NK, self._range).items():
                self._counts[name]["values"] += count
                self._counts[name]["unseen"] += outside
        self._rows += frame.height

    def counts(self) -> dict[str, Counts]:
        """The counts by field."""
        found = {}
        for field in self._schema.fields:
            counts = self._counts[field.name]
            has_unseen = not field.hash_size if field.type in ("categorical", "multi") else field.name in self._range
            found[field.name] = Counts(
                rows=self._rows, missing=counts["missing"], values=counts["values"], unseen=counts["unseen"] if has_unseen else None
            )  # fmt: skip
        return found

    def quantiles(self) -> dict[str, tuple[float, ...]]:
        """Quantiles of the sampled numbers by field."""
        parts = self._numbers or [np.empty((0, len(self._sample.fields)))]
        return quantiles_of(self._sample, np.concatenate(parts))


def ranges(profile: Profile | None) -> dict[str, tuple[float, float]]:
    """The range of the numbers of the training rows, by field."""
    fields = () if profile is None else profile.fields
    return {field.name: (field.quantiles[0], field.quantiles[-1]) for field in fields if field.quantiles}


def outside_range(
    sample: NumberSample, numbers_NK: np.ndarray, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[int, int]]:
    """How many numbers there are, and how many lie outside their field's range, by field.

    Float32 numbers are compared, so that a range holds both the float32 and the float64 of a number.
    """
    found = {}
    for k, field in enumerate(sample.fields):
        with np.errstate(over="ignore"):
            low, high = np.array(ranges.get(field.name, (-np.inf, np.inf)), np.float32)
            number_N = numbers_NK[:, k].astype(np.float32)
        outside = np.count_nonzero((number_N < low) | (number_N > high))
        found[field.name] = (int(np.count_nonzero(~np.isnan(number_N))), int(outside))
    return found


def quantiles_of(sample: NumberSample, numbers_NK: np.ndarray) -> dict[str, tuple[float, ...]]:
    """Quantiles of the numbers of each field, by its name. A field without numbers has an empty tuple."""
    found = {}
    for k, field in enumerate(sample.fields):
        numbers = numbers_NK[:, k][~np.isnan(numbers_NK[:, k])]
        found[field.name] = tuple(map(float, np.quantile(numbers, QUANTILES, method="lower"))) if len(numbers) else ()
    return found
