"""Codes for the values of a log in the order in which they first occur.

Codes make one pass over the log enough: ids follow frequency, which is known only at the end, and then replace the
codes.

The code of a text is 1 + its place among the texts of its table, and 0 if the text is missing. The code of a number is
its bucket. The code of a hashed value is its id already. Each table keeps its texts once, in a polars Categories, whose
index costs one hash probe per cell. If several fields share a table, the codes of texts may change from run to run; ids
do not.

Shapes: N rows, C id columns, V values of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embtrim.data.cells import nulls_of, number_cells
from embtrim.data.encoder import Encoder
from embtrim.data.kinds import kind_of_texts
from embtrim.data.log_file import Chunk
from embtrim.data.profile import NUM_TOP
from embtrim.data.transforms import bucket_texts
from embtrim.data.values import one_texts
from embtrim.errors import DataError
from embtrim.schema import PAD, FieldSpec, Schema

# Counts of the values of training rows. `field` is an index in the id fields of the schema; a numeric field has buckets.
COUNTED_SCHEMA = {"field": pl.UInt32, "value": pl.String, "bucket": pl.Int32, "count": pl.Int64}
_NO_BUCKETS = pl.DataFrame(schema={"bucket": pl.Int32, "count": pl.Int64})


@dataclass
class Seen:
    """What the training rows hold.

    Attributes:
        rows: Rows.
        missing: Rows without a value, by field.
        counts: How often each code occurs, by listed field of texts: int64 (1 + texts of the table,).
        buckets: How often each bucket occurs, by listed numeric field: a frame of bucket and count.
        distinct: Different values, by field of a listed table.
        top: The most frequent values and their counts, most frequent first, by field of a listed table.
    """

    rows: int = 0
    missing: dict[str, int] = dataclass_field(default_factory=dict)
    counts: dict[str, np.ndarray] = dataclass_field(default_factory=dict)
    buckets: dict[str, pl.DataFrame] = dataclass_field(default_factory=dict)
    distinct: dict[str, int] = dataclass_field(default_factory=dict)
    top: dict[str, list[tuple[str | None, int]]] = dataclass_field(default_factory=dict)

    def note_values(self, field: FieldSpec, values: pl.DataFrame) -> None:
        """Note the different values of a field, from a frame of values and counts."""
        is_null = values["value"].is_null()
        self.distinct[field.name] = len(values) - int(is_null.sum())
        least = values["count"].top_k(NUM_TOP).min() or 0
        top = values.filter(pl.col("count") >= least).sort("count", "value", descending=[True, False], nulls_last=True)
        self.top[field.name] = top.head(NUM_TOP).rows()
        if field.type != "multi":
            self.missing[field.name] = int(values["count"].filter(is_null).sum())


class Numbering:
    """The texts seen so far and their codes.

    Attributes:
        schema: The fields, without sizes.
        transforms: Learned transforms of the numeric fields.
        undecided: Names of the fields whose kind the texts of the training rows say.
        seen: What the training rows hold; `count` and `vocabularies` fill it in.
    """

    def __init__(
        self, schema: Schema, transforms: Mapping[str, Mapping[str, Any]], undecided: Collection[str] = ()
    ) -> None:
        self.schema = schema
        self.transforms = transforms
        self.undecided = frozenset(undecided)
        self.seen = Seen()
        self._read_by: Encoder | None = None
        self._read: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._texts = [f for f in schema.id_fields if f.type in ("categorical", "multi") and not f.hash_size]
        self._categories = {field.table_name: pl.Categories.random() for field in self._texts}
        self._num_texts = dict.fromkeys(self._categories, 0)
        self._listed: dict[str, pl.Series] = {}  # see `_drop_index`
        # These columns keep the categories alive: polars forgets categories that no column uses.
        self._kept = {name: pl.Series([], dtype=pl.Categorical(of)) for name, of in self._categories.items()}
        self._codes = {
            f.name: (pl.col(f.name).cast(pl.Categorical(self._categories[f.table_name])).to_physical() + 1).fill_null(0)
            for f in self._texts
        }

    def codes(self, chunk: Chunk) -> np.ndarray:
        """The id fields of a chunk: int32 (C, N), PAD where a multi field has no more values.

        Raises:
            DataError: A value or a column's type does not fit its field.
        """
        return number_cells(chunk.frame, self.schema, self.transforms, chunk.locate, self._codes, self._noted)

    def _noted(
        self, field: FieldSpec, code_N: np.ndarray, _texts: pl.Series | None, _where: Callable[[int], str]
    ) -> np.ndarray:
        """The codes as they are; the number of texts of the field's table is updated."""
        if field.name in self._codes and len(code_N):
            self._num_texts[field.table_name] = max(self._num_texts[field.table_name], int(code_N.max()))
        return code_N

    def texts(self, table: str) -> pl.Series:
        """The texts of a table in the order of their codes, which start at 1."""
        if table in self._listed:
            return self._listed[table]
        places = pl.DataFrame({"value": np.arange(self._num_texts[table], dtype=np.uint32)})
        return places.select(
            pl.col("value").cat.to(pl.Categorical(self._categories[table])).cast(pl.String)
        ).to_series()

    def _drop_index(self) -> None:
        """Keep the texts alone, a sixth of the memory of an index that gives further texts their codes."""
        self._codes.clear()
        for name in list(self._categories):
            self._listed[name] = self.texts(name)
            del self._categories[name], self._kept[name]

    def values(self, table: str) -> pl.Series:
        """The values of a table in the order of their codes: the missing value, then the texts."""
        return pl.concat([pl.Series("value", [None], pl.String), self.texts(table)])

    def state(self) -> pl.DataFrame:
        """The texts seen so far, as a frame with columns table and value."""
        tables = pl.Enum(list(self._num_texts))
        empty = pl.DataFrame(schema={"table": tables, "value": pl.String})
        parts = [
            pl.DataFrame({"value": self.texts(name)}).select(pl.lit(name, tables).alias("table"), "value")
            for name in self._num_texts
        ]
        return pl.concat([empty, *parts])

    def restore(self, state: pl.DataFrame) -> None:
        """Go on from a `state`.

        Raises:
            DataError: polars gives the texts other codes than before.
        """
        for key, part in state.partition_by("table", as_dict=True, include_key=False).items():
            dtype = pl.Categorical(self._categories[str(key[0])])
            if not np.array_equal(part["value"].cast(dtype).to_physical().to_numpy(), np.arange(len(part))):
                raise DataError(f"the values of table {key[0]!r} cannot be numbered as before")
            self._num_texts[str(key[0])] = len(part)

    def count(self, groups: Iterable[Sequence[np.ndarray]]) -> None:
        """Count the values of the training rows; no text gets a code afterwards.

        Args:
            groups: The codes of all training rows in any order, blocks of shape (C, N). The blocks of a group are
                counted together, because each group costs a pass over the counts.
        """
        counts = {f.name: np.zeros(1 + self._num_texts[f.table_name], np.int64) for f in self._texts}
        seen = self.seen = Seen(counts=counts)
        seen.buckets = {f.name: _NO_BUCKETS for f in self.schema.id_fields if f.type == "numeric" and not f.hash_size}
        for group in groups:
            seen.rows += sum(codes_CN.shape[1] for codes_CN in group)
            for field, columns in zip(self.schema.id_fields, self.schema.column_slices, strict=True):
                if field.hash_size or field.type == "multi":
                    missing = PAD if field.type == "multi" else 0
                    empty = sum(int(np.count_nonzero(codes_CN[columns.start] == missing)) for codes_CN in group)
                    seen.missing[field.name] = seen.missing.get(field.name, 0) + empty
                if field.hash_size:
                    continue
                code = np.concatenate([codes_CN[columns].ravel() for codes_CN in group])
                if field.type == "numeric":
                    new = pl.DataFrame({"bucket": code}).group_by("bucket").agg(pl.len().cast(pl.Int64).alias("count"))
                    merged = pl.concat([seen.buckets[field.name], new]).group_by("bucket")
                    seen.buckets[field.name] = merged.agg(pl.col("count").sum())
                    continue
                code = code[code != PAD] if field.type == "multi" else code
                added = np.bincount(code, minlength=len(counts[field.name]))
                added[: len(counts[field.name])] += counts[field.name]
                counts[field.name] = added
        for field in self._texts:  # a log whose codes are made while they are counted has more texts by now
            counts[field.name] = np.pad(
                counts[field.name], (0, 1 + self._num_texts[field.table_name] - len(counts[field.name]))
            )
        self._drop_index()

    def vocabularies(self) -> tuple[Schema, dict[str, pl.DataFrame]]:
        """The schema with all kinds; and by table the values kept, a frame with columns value, id and count by ids.

        Raises:
            DataError: A value cannot be brought to the kind of its field.
        """
        seen, counts, buckets = self.seen, self.seen.counts, self.seen.buckets
        schema, result = self._decided(counts), {}
        for name, readers in schema.fields_of_table.items():
            if readers[0].hash_size:
                continue
            parts = [
                self._texts_counted(f, counts[f.name])
                if f.name in counts
                else buckets[f.name].select(bucket_texts(buckets[f.name]["bucket"]).alias("value"), "count")
                for f in readers
            ]
            for field, part in zip(readers, parts, strict=True):
                seen.note_values(field, part)
            kept = parts[0] if len(parts) == 1 else _added_up(pl.concat(parts))
            kept = kept.filter(pl.col("count") >= readers[0].min_count)
            kept = kept.sort("count", "value", descending=[True, False], nulls_last=True)
            ids = pl.int_range(1, kept.height + 1, dtype=pl.Int32, eager=True).alias("id")
            result[name] = kept.with_columns(ids).select("value", "id", "count")
        return schema, result

    def _decided(self, counts: Mapping[str, np.ndarray]) -> Schema:
        """The schema with the kinds that the texts of the training rows say."""
        fields = []
        for field in self.schema.fields:
            if field.name in self.undecided and field.name in counts:
                texts = self.texts(field.table_name).filter(pl.Series(counts[field.name][1:] > 0))
                field = field.replace(kind=kind_of_texts(texts, nulls_of(self.schema, field)))
            fields.append(field)
        return self.schema.replace(fields=tuple(fields))

    def _texts_counted(self, field: FieldSpec, count_V: np.ndarray) -> pl.DataFrame:
        """The values that occur in a field of texts, with their counts; a missing value is null."""
        nulls = nulls_of(self.schema, field)
        frame = pl.DataFrame({"value": self.values(field.table_name), "count": count_V}).filter(pl.col("count") > 0)
        if field.type == "categorical":
            frame = frame.with_columns(pl.when(~pl.col("value").is_in(nulls)).then("value").alias("value"))
        texts = frame["value"]
        values = one_texts(texts, field, nulls, lambda _: "training rows")
        if values is not texts or values.null_count() > 1:  # two texts of a field may be one value
            frame = _added_up(frame.with_columns(values))
        return frame if field.type == "categorical" else frame.filter(pl.col("value").is_not_null())

    def counted(self) -> pl.DataFrame:
        """The counts of the training rows of a part of a log: a frame of COUNTED_SCHEMA; a missing value is null."""
        parts = [pl.DataFrame(schema=COUNTED_SCHEMA)]
        for number, field in enumerate(self.schema.id_fields):
            frame = None
            if field.name in self.seen.counts:
                frame = pl.DataFrame({"value": self.values(field.table_name), "count": self.seen.counts[field.name]})
                frame = frame.filter(pl.col("count") > 0).with_columns(bucket=pl.lit(None, pl.Int32))
            elif field.name in self.seen.buckets:
                frame = self.seen.buckets[field.name].with_columns(value=pl.lit(None, pl.String))
            if frame is not None:
                parts.append(frame.with_columns(field=pl.lit(number, pl.UInt32)).select(*COUNTED_SCHEMA))
        return pl.concat(parts)

    def take_counted(self, counted: pl.DataFrame, rows: int, missing: Mapping[str, int]) -> None:
        """Take over what the training rows hold, in place of `count`.

        Args:
            counted: The sum of the `counted` of all parts of a log, see `sum_counted`.
            rows: Number of training rows.
            missing: Rows without a value, by hashed and multi field.
        """
        by_field = counted.partition_by("field", as_dict=True, include_key=False)
        frames = {f.name: by_field.get((i,), counted.clear()) for i, f in enumerate(self.schema.id_fields)}
        seen = self.seen = Seen(rows=rows, missing=dict(missing))
        for table in self._num_texts:
            readers = [field.name for field in self._texts if field.table_name == table]
            texts = pl.concat([frames[name]["value"].drop_nulls() for name in readers])
            self._list_texts(table, texts if len(readers) == 1 else texts.unique())
            for name in readers:
                null, frame = pl.col("value").is_null(), frames[name].select("value", "count")
                counts = frame.filter(~null)["count"]
                if len(readers) > 1:
                    in_order = self.texts(table).to_frame().join(frame, on="value", how="left", maintain_order="left")
                    counts = in_order["count"].fill_null(0)
                seen.counts[name] = np.append(int(frame.filter(null)["count"].sum()), counts.to_numpy())
        for field in self.schema.id_fields:
            if field.type == "numeric" and not field.hash_size:
                seen.buckets[field.name] = frames[field.name].select("bucket", "count")

    def list_texts(self, state: pl.DataFrame) -> None:
        """Take over the texts of a `state`; no text gets a code afterwards."""
        for key, part in state.partition_by("table", as_dict=True, include_key=False).items():
            self._list_texts(str(key[0]), part["value"])
        self._drop_index()

    def _list_texts(self, table: str, texts: pl.Series) -> None:
        self._listed[table], self._num_texts[table] = texts, len(texts)
        del self._categories[table], self._kept[table]

    def read_by(self, encoder: Encoder, field: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids and statuses of a listed field's codes in an encoder, see `Encoder.read_texts`: (1 + V,) each."""
        if self._read_by is not encoder:
            self._read_by, self._read = encoder, {}
        if field not in self._read:
            spec = next(f for f in encoder.schema.id_fields if f.name == field)  # with the kind decided since
            self._read[field] = encoder.read_texts(spec, self.values(spec.table_name))
        return self._read[field]

    def encoded_by(self, encoder: Encoder) -> Callable[[np.ndarray], np.ndarray]:
        """A function that turns codes into the encoder's ids, both int32 (C, N)."""
        # The last place holds PAD, so that the code PAD (-1) reads PAD.
        ids_of = {name: np.append(self.read_by(encoder, name)[0], PAD) for name in (f.name for f in self._texts)}

        def encoded(codes_CN: np.ndarray) -> np.ndarray:
            ids_CN = np.empty_like(codes_CN)
            for field, columns in zip(self.schema.id_fields, self.schema.column_slices, strict=True):
                codes = codes_CN[columns]
                if field.name in ids_of:
                    np.take(ids_of[field.name], codes, out=ids_CN[columns], mode="wrap")
                    continue
                ids_CN[columns] = encoder.ids(field, codes)
                if field.type == "multi":
                    ids_CN[columns][codes == PAD] = PAD
            return ids_CN

        return encoded


def _added_up(values: pl.DataFrame) -> pl.DataFrame:
    """A frame of distinct values, from one of values and counts that may name a value twice."""
    return values.group_by("value").agg(pl.col("count").sum())


def sum_counted(paths: Sequence[Path], schema: Schema) -> pl.DataFrame:
    """The sum of the frames of COUNTED_SCHEMA in parquet files, which are read field by field."""
    scan, parts = pl.scan_parquet([*paths], glob=False, hive_partitioning=False), [pl.DataFrame(schema=COUNTED_SCHEMA)]
    for number, field in enumerate(schema.id_fields):
        key = "bucket" if field.type == "numeric" else "value"
        counted = scan.filter(pl.col("field") == number).select(key, "count").collect()
        sums = counted.group_by(key).agg(pl.col("count").sum())
        parts.append(sums.select(pl.lit(number, pl.UInt32).alias("field"), key, "count"))
    return pl.concat(parts, how="diagonal").select(*COUNTED_SCHEMA)
