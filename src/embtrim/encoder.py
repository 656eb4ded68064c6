"""Encoder: the frozen transformation from raw rows to ids, made once from the training rows and kept with the model.

Conventions:

- A categorical value is its text. Whole-numbered floats are written without a fraction (`5.0` in parquet is `5`),
  booleans as `true` / `false`, dates in ISO form; text is taken as it stands (`05` is not `5`).
- A numeric field becomes the number of a bucket. log2: v > 2 -> floor(ln(v)^2), else floor(v), so negative numbers
  keep one bucket per unit. quantile:k: bucket i holds edge[i-1] <= v < edge[i]; equal edges are merged.
- Missing (null, NaN in a number, or a text in `nulls`) is a value of its own: null in vocab.parquet. In a multi field a
  missing cell is an empty list and missing or empty elements are left out; in a dense field it is 0 after the
  transform, which for `standard` is the mean.
- dense log1p is sign(v) ln(1 + |v|); standard is (v - mean) / std over the training rows that have a value, std 1 if
  all are equal.
- Ids of a table: 0 is OOV; 1.. are the values kept, by descending count in the training rows, ties by value (missing
  last). A value needs `min_count` occurrences.
- Hashed table: id = 1 + blake2b-64(UTF-8 text, key "embtrim") mod hash_size, so vocab_size = hash_size + 1 and row 0 stays
  unused; missing is hashed as the text "\\0missing". The same in every process, version and machine.

Shapes: N rows, C id columns, E dense fields, V values of a table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embtrim.dataset import read_json
from embtrim.errors import DataError
from embtrim.reading import Chunk
from embtrim.schema import OOV, PAD, FieldSpec, Schema

HASH_KEY = b"embtrim"
MISSING_TOKEN = "\0missing"

# A vocabulary is looked up through a polars Enum, whose index is built once, when the expression is made; each chunk
# then costs one hash probe a cell. Codes beyond the vocabulary's stand for "not in it" and "missing".
_VOCABULARY_SCHEMA = {"value": pl.String, "id": pl.Int32, "count": pl.Int64}


@dataclass(frozen=True)
class EncodedChunk:
    """Rows as models read them.

    Attributes:
        ids: int32 (N, C), ids local to their table, PAD = -1.
        dense: float32 (N, E), or None if the schema has no dense field.
    """

    ids: np.ndarray
    dense: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Turns raw rows into ids and dense values; needs no label.

    Attributes:
        schema: the encoded schema, sizes filled in.
        vocabularies: by table, a frame with columns value, id, count (none for a hashed table).
        transforms: by field, {"edges": [..]} of quantile buckets, {"mean": .., "std": ..} of standardised fields.
        unseen_ids: by table, the id of a value that is not in the vocabulary, where it is not OOV (0).
        hash_maps: by hashed table, an int32 map from hashed ids to the ids given out (see `with_id_maps`).
    """

    def __init__(
        self,
        schema: Schema,
        vocabularies: Mapping[str, pl.DataFrame],
        transforms: Mapping[str, Mapping[str, Any]] | None = None,
        unseen_ids: Mapping[str, int] | None = None,
        hash_maps: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.schema = schema
        self.vocabularies = dict(vocabularies)
        self.transforms = {name: dict(values) for name, values in (transforms or {}).items()}
        self.unseen_ids = dict(unseen_ids or {})
        self.hash_maps = dict(hash_maps or {})
        self.columns = needed_columns(schema)
        self._lookups: dict[str, _Lookup] | None = None
        for field in schema.id_fields:
            if not field.hash_size and field.table_name not in self.vocabularies:
                raise DataError(f"vocabulary of table {field.table_name!r} is missing; encode again")
        for field in schema.fields:
            learns = field.transform == "standard" or (field.transform or "").startswith("quantile:")
            if learns and field.name not in self.transforms:
                raise DataError(f"transforms.json lacks field {field.name!r}; encode again")

    @classmethod
    def load(cls, folder: str | Path) -> Encoder:
        """Read the encoder of an encoded folder or a bundle.

        Raises:
            DataError: a file is missing or damaged.
        """
        folder = Path(folder)
        schema = Schema.parse(read_json(folder / "schema.json"), where=str(folder / "schema.json"))
        state = read_json(folder / "transforms.json")
        path = folder / "vocab.parquet"
        try:
            frame = pl.read_parquet(path)
            by_table = {
                str(key[0]): part.drop("table") for key, part in frame.partition_by("table", as_dict=True).items()
            }
            empty = pl.DataFrame(schema=_VOCABULARY_SCHEMA)
            tables = [field.table_name for field in schema.id_fields if not field.hash_size]
            vocabularies = {name: by_table.get(name, empty).cast(_VOCABULARY_SCHEMA) for name in tables}  # type: ignore[arg-type]
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path} cannot be read ({str(error).partition(chr(10))[0]}); encode again") from None
        hash_maps = {}
        if (folder / "hash_maps.npz").exists():
            with np.load(folder / "hash_maps.npz", allow_pickle=False) as stored:
                hash_maps = {name: stored[name] for name in stored.files}
        return cls(schema, vocabularies, state.get("fields", {}), state.get("unseen_ids", {}), hash_maps)

    def save(self, folder: str | Path) -> None:
        """Write schema.json, vocab.parquet, transforms.json (and hash_maps.npz if hashed ids were re-mapped)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schema.json").write_text(json.dumps(self.schema.model_dump(mode="json"), indent=1), "utf-8")
        state = {"fields": self.transforms, "unseen_ids": self.unseen_ids}
        (folder / "transforms.json").write_text(json.dumps(state, indent=1), "utf-8")
        parts = [
            frame.select(pl.lit(name).alias("table"), *_VOCABULARY_SCHEMA) for name, frame in self.vocabularies.items()
        ]
        empty = pl.DataFrame(schema={"table": pl.String, **_VOCABULARY_SCHEMA})
        pl.concat([empty, *parts]).write_parquet(folder / "vocab.parquet", compression="zstd")
        if self.hash_maps:
            np.savez(folder / "hash_maps.npz", **self.hash_maps)  # type: ignore[arg-type]

    def encode_chunk(self, rows: Chunk | pl.DataFrame) -> EncodedChunk:
        """Encode rows; a value that the training rows did not hold gets its table's OOV id.

        Args:
            rows: a frame with the raw columns (others are ignored), or a chunk of a raw log.

        Raises:
            DataError: a column is missing, or a value or a column's type does not fit its field.

        Example:
            >>> schema = Schema(label="click", fields=(FieldSpec(name="user", vocab_size=3),))
            >>> vocabulary = pl.DataFrame({"value": ["ann", "bob"], "id": [1, 2], "count": [5, 3]})
            >>> Encoder(schema, {"user": vocabulary}).encode_chunk(pl.DataFrame({"user": ["bob", "eve"]})).ids.tolist()
            [[2], [0]]
        """
        frame, locate = (rows.frame, rows.locate) if isinstance(rows, Chunk) else (rows, _row_number)
        require_columns(frame, self.columns)
        if self._lookups is None:
            self._lookups = self._build_lookups()
        values = id_values(frame, self.schema, self.transforms, locate)
        single = [f.name for f in self.schema.id_fields if f.type != "multi" and not f.hash_size]
        codes = values.select(self._lookups[name].code for name in single)
        ids_NC = np.full((frame.height, self.schema.num_id_columns), PAD, np.int32)
        for field, columns in zip(self.schema.id_fields, self.schema.column_slices, strict=True):
            column = values[field.name]
            if field.type != "multi":
                if field.hash_size:
                    ids_NC[:, columns.start] = self._hash(column, field)
                else:
                    ids_NC[:, columns.start] = self._lookups[field.name].ids(codes[field.name], column)
                continue
            length_N = column.list.len().fill_null(0).to_numpy().astype(np.int64)
            flat = flatten(column)
            if field.hash_size:
                flat_ids = self._hash(flat, field)
            else:
                lookup = self._lookups[field.name]
                flat_ids = lookup.ids(flat.to_frame().select(lookup.code)[field.name], flat)
            row = np.repeat(np.arange(frame.height), length_N)
            place = np.arange(len(flat)) - np.repeat(np.cumsum(length_N) - length_N, length_N)
            ids_NC[row, columns.start + place] = flat_ids
        return EncodedChunk(ids_NC, self._dense(frame, locate))

    def with_id_maps(self, id_maps: Mapping[str, np.ndarray]) -> Encoder:
        """The same encoder with ids re-numbered: `id_maps[table][id]` is given out instead of id.

        Vocabularies are rewritten: a value whose new id is that of an unseen value is dropped from them. A hashed
        table has no vocabulary and keeps its map. The schema, and so its fingerprint, stays.

        Raises:
            DataError: a map is for an unknown table, or does not cover the ids given out so far.
        """
        vocabularies, unseen_ids, hash_maps = dict(self.vocabularies), dict(self.unseen_ids), dict(self.hash_maps)
        for name, id_map in id_maps.items():
            if name not in self.schema.tables:
                raise DataError(f"id map for unknown table {name!r}; tables: {', '.join(self.schema.tables)}")
            id_map = np.asarray(id_map, np.int32)
            if name in vocabularies:
                ids_V = vocabularies[name]["id"].to_numpy()
                given = np.append(ids_V, unseen_ids.get(name, OOV))
            else:
                given = hash_maps.get(name, np.arange(self.schema.tables[name], dtype=np.int32))
            if len(id_map) <= given.max():
                raise DataError(f"id map for table {name!r} has {len(id_map)} rows, its ids go up to {given.max()}")
            if name not in vocabularies:
                hash_maps[name] = id_map[given]
                continue
            unseen = int(id_map[given[-1]])
            unseen_ids[name] = unseen
            frame = vocabularies[name].with_columns(pl.Series("id", id_map[ids_V], pl.Int32))
            vocabularies[name] = frame.filter(pl.col("id") != unseen)
        return Encoder(self.schema, vocabularies, self.transforms, unseen_ids, hash_maps)

    def _hash(self, values: pl.Series, field: FieldSpec) -> np.ndarray:
        assert field.hash_size is not None
        ids = hash_values(values, field.hash_size)
        hash_map = self.hash_maps.get(field.table_name)
        return ids if hash_map is None else hash_map[ids]

    def _build_lookups(self) -> dict[str, _Lookup]:
        lookups = {}
        for field in self.schema.id_fields:
            if field.hash_size:
                continue
            frame = self.vocabularies[field.table_name]
            unseen = self.unseen_ids.get(field.table_name, OOV)
            missing = frame.filter(pl.col("value").is_null())["id"]
            missing_id = int(missing[0]) if len(missing) else unseen
            listed = frame.filter(pl.col("value").is_not_null())
            ids_V, texts = listed["id"].to_numpy(), listed["value"]
            if field.type == "categorical":
                # Texts that mean "missing" become codes too, so that no pass over the cells has to replace them.
                nulls = sorted({*self.schema.nulls, *field.nulls})
                is_null = texts.is_in(nulls)
                extra = sorted(set(nulls) - set(texts.filter(is_null)))
                ids_V = np.where(is_null.to_numpy(), missing_id, ids_V)
                ids_V = np.concatenate([ids_V, np.full(len(extra), missing_id)])
                texts = pl.concat([texts, pl.Series("value", extra, pl.String)])
            code = pl.col(field.name).cast(pl.Enum(texts), strict=False).to_physical().cast(pl.UInt32)
            ids_V = np.concatenate([ids_V, [unseen, missing_id]]).astype(np.int32)
            lookups[field.name] = _Lookup(code.fill_null(len(texts)), ids_V)
        return lookups

    def _dense(self, frame: pl.DataFrame, locate: Callable[[int], str]) -> np.ndarray | None:
        if not self.schema.dense_fields:
            return None
        numbers = to_numbers(frame, self.schema.dense_fields, self.schema, locate)
        dense_NE = np.empty((frame.height, len(self.schema.dense_fields)), np.float32)
        for e, field in enumerate(self.schema.dense_fields):
            value_N = numbers[field.name].to_numpy()  # null becomes NaN
            if field.transform == "log1p":
                value_N = np.sign(value_N) * np.log1p(np.abs(value_N))
            elif field.transform == "standard":
                fitted = self.transforms[field.name]
                value_N = (value_N - fitted["mean"]) / fitted["std"]
            dense_NE[:, e] = np.nan_to_num(value_N, nan=0.0)
        return dense_NE


@dataclass(frozen=True)
class _Lookup:
    """A table as one field reads it: `code` numbers the values, `ids_V` holds their ids, then unseen, then missing."""

    code: pl.Expr
    ids_V: np.ndarray

    def ids(self, codes: pl.Series, values: pl.Series) -> np.ndarray:
        code_N = codes.to_numpy()
        if values.null_count():
            code_N = np.where(values.is_null().to_numpy(), len(self.ids_V) - 1, code_N)
        return self.ids_V[code_N]


def needed_columns(schema: Schema) -> tuple[str, ...]:
    """The raw columns that the fields read, each once."""
    return tuple(dict.fromkeys(field.raw_column for field in schema.fields))


def require_columns(frame: pl.DataFrame, columns: Sequence[str]) -> None:
    """Check that `frame` has `columns`; DataError names those given and those needed."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise DataError(
            f"the rows have no column {', '.join(map(repr, missing))}; they have {', '.join(frame.columns)}; "
            f"needed: {', '.join(columns)}"
        )


def id_values(
    frame: pl.DataFrame, schema: Schema, transforms: Mapping[str, Mapping[str, Any]], locate: Callable[[int], str]
) -> pl.DataFrame:
    """The canonical values of each id field, as one column a field: text, or lists of text for a multi field.

    Texts that mean "missing" are null in numeric, multi and hashed fields; in a listed categorical field they are left as
    they stand, and counting and lookup treat them.

    Raises:
        DataError: a value or a column's type does not fit its field.
    """
    numeric = [field for field in schema.id_fields if field.type == "numeric"]
    numbers = to_numbers(frame, numeric, schema, locate)
    texts: list[pl.Expr] = []
    for field in schema.id_fields:
        dtype, column = frame.schema[field.raw_column], pl.col(field.raw_column)
        nulls = [*schema.nulls, *field.nulls]
        if field.type == "numeric":
            continue
        if field.type == "multi":
            lists = _lists(field, dtype, column)
            kept = pl.element().filter(pl.element().is_not_null() & ~pl.element().is_in([*nulls, ""]))
            texts.append(lists.list.eval(kept).list.head(field.max_len).alias(field.name))
            continue
        if isinstance(dtype, (pl.List, pl.Array)):
            raise DataError(f"column {field.raw_column!r} holds lists; declare field {field.name!r} as type = 'multi'")
        text = _text(field, dtype, column)
        if field.hash_size:
            text = pl.when(~text.is_in(nulls)).then(text)
        texts.append(text.alias(field.name))
    # Each select runs its columns in parallel.
    buckets = numbers.select(_bucket(field, transforms).cast(pl.String) for field in numeric)
    return pl.concat([frame.select(texts), buckets], how="horizontal")


def to_numbers(
    frame: pl.DataFrame, fields: Sequence[FieldSpec], schema: Schema, locate: Callable[[int], str]
) -> pl.DataFrame:
    """Numbers of numeric and dense fields, as one float64 column a field; missing is null.

    Raises:
        DataError: a cell holds no finite number.
    """
    for field in fields:
        dtype = frame.schema[field.raw_column]
        if not (dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Null, pl.Categorical, pl.Enum)):
            raise DataError(
                f"column {field.raw_column!r} holds {dtype}, which is no number; declare field {field.name!r} categorical"
            )
    numbers = frame.select(
        (pl.col(f.raw_column).cast(pl.String) if _is_category(frame.schema[f.raw_column]) else pl.col(f.raw_column))
        .cast(pl.Float64, strict=False)
        .fill_nan(None)
        .alias(f.name)
        for f in fields
    )
    # Only a column that holds more than plain finite numbers and nulls is looked at again.
    num_null = numbers.null_count()
    num_null_raw = frame.select(list(dict.fromkeys(f.raw_column for f in fields))).null_count()
    is_infinite = numbers.select(pl.all().is_infinite().any())
    repaired = []
    for f in fields:
        numeric_nulls = any(_is_finite(text) for text in (*schema.nulls, *f.nulls))
        if numeric_nulls or is_infinite[f.name][0] or num_null[f.name][0] > num_null_raw[f.raw_column][0]:
            repaired.append(_repair(numbers[f.name], frame[f.raw_column], f, schema, locate))
    return numbers.with_columns(repaired)


def _repair(
    numbers: pl.Series, raw: pl.Series, field: FieldSpec, schema: Schema, locate: Callable[[int], str]
) -> pl.Series:
    """Numbers with stated nulls and padded text understood; DataError for what is left."""
    texts = raw.cast(pl.String)
    stripped = texts.str.strip_chars()
    is_stated = texts.is_in([*schema.nulls, *field.nulls]).fill_null(False)
    is_missing = is_stated | stripped.str.to_lowercase().is_in(["nan", "+nan", "-nan"]).fill_null(False)
    numbers = numbers.fill_null(stripped.cast(pl.Float64, strict=False)).fill_nan(None).set(is_missing, None)
    is_bad = (numbers.is_null() & texts.is_not_null() & ~is_missing) | numbers.is_infinite().fill_null(False)
    bad = is_bad.arg_true()
    if len(bad):
        row = bad[0]
        what = "no number" if numbers[row] is None else "not finite"
        raise DataError(
            f"{locate(row)}: column {field.raw_column!r} holds {raw[row]!r}, which is {what}; declare it categorical or "
            f"add {texts[row]!r} to nulls"
        )
    return numbers


def _bucket(field: FieldSpec, transforms: Mapping[str, Mapping[str, Any]]) -> pl.Expr:
    """The number of a numeric value's bucket, as an integer."""
    v = pl.col(field.name)
    if field.transform == "log2":
        log = v.log()
        return pl.when(v > 2).then((log * log).floor()).otherwise(v.clip(lower_bound=-1e15).floor()).cast(pl.Int64)
    edges = pl.Series("edges", transforms[field.name]["edges"], pl.Float64)
    return pl.when(v.is_not_null()).then(pl.lit(edges).search_sorted(v, side="right").cast(pl.Int64)).alias(field.name)


def _is_category(dtype: pl.DataType) -> bool:
    return dtype in (pl.Categorical, pl.Enum)


def _lists(field: FieldSpec, dtype: pl.DataType, column: pl.Expr) -> pl.Expr:
    if isinstance(dtype, pl.Array):
        dtype, column = pl.List(dtype.inner), column.arr.to_list()
    if isinstance(dtype, pl.List):
        return column.list.eval(_text(field, dtype.inner, pl.element()))  # type: ignore[arg-type]
    if dtype == pl.Null:
        return column.cast(pl.List(pl.String))
    if dtype not in (pl.String, pl.Categorical, pl.Enum):
        raise DataError(
            f"column {field.raw_column!r} holds {dtype}, but multi field {field.name!r} needs lists or text with a separator"
        )
    if field.separator is None:
        raise DataError(
            f"column {field.raw_column!r} holds text, so multi field {field.name!r} needs separator = '|' or whatever is between "
            "its values"
        )
    return column.cast(pl.String).str.split(field.separator)


def _text(field: FieldSpec, dtype: pl.DataType, column: pl.Expr) -> pl.Expr:
    if dtype == pl.String:
        return column
    if dtype.is_float():
        whole = (column == column.floor()) & (column.abs() < 2.0**53)
        text = column.fill_nan(None).cast(pl.String)
        return pl.when(whole).then(column.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(text)
    if dtype.is_integer() or dtype.is_temporal() or dtype in (pl.Boolean, pl.Null, pl.Categorical, pl.Enum, pl.Decimal):
        return column.cast(pl.String)
    raise DataError(
        f"column {field.raw_column!r} holds {dtype}, which field {field.name!r} cannot read; convert it to text or lists"
    )


def flatten(lists: pl.Series) -> pl.Series:
    """The elements of all lists in order; an empty or missing list has none."""
    return lists.filter(lists.list.len().fill_null(0) > 0).explode()


def hash_values(values: pl.Series, hash_size: int) -> np.ndarray:
    """Ids 1..hash_size of texts; see the module docstring. Int32 (N,)."""
    texts = values.fill_null(MISSING_TOKEN)
    distinct = texts.unique()
    digests = [hashlib.blake2b(text.encode(), digest_size=8, key=HASH_KEY).digest() for text in distinct]
    ids = [1 + int.from_bytes(digest, "little") % hash_size for digest in digests]
    if not ids:
        return np.empty(0, np.int32)
    return texts.replace_strict(distinct, ids, return_dtype=pl.Int32).to_numpy()


class ValueCounter:
    """Counts the values of every listed table, chunk by chunk; holds one row a distinct value, and at times twice that."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._fields = [field for field in schema.id_fields if not field.hash_size]
        self._parts: dict[str, list[pl.DataFrame]] = {field.table_name: [] for field in self._fields}
        self._merged: dict[str, pl.DataFrame] = {}

    def add(self, values: pl.DataFrame) -> None:
        """Count one chunk of `id_values`."""
        counts = pl.collect_all([self._count(values, field) for field in self._fields])
        for field, count in zip(self._fields, counts, strict=True):
            parts = self._parts[field.table_name]
            parts.append(count)
            merged = self._merged.get(field.table_name)
            if sum(part.height for part in parts) > max(200_000, 0 if merged is None else merged.height):
                self._merge(field.table_name)

    def _count(self, values: pl.DataFrame, field: FieldSpec) -> pl.LazyFrame:
        if field.type == "multi":
            frame = flatten(values[field.name]).to_frame().lazy()
        else:
            frame = values.lazy()
        value = pl.col(field.name)
        counted = frame.group_by(value.alias("value")).agg(pl.len().cast(pl.Int64).alias("count"))
        if field.type != "categorical":
            return counted
        nulls = [*self.schema.nulls, *field.nulls]
        return counted.with_columns(pl.when(~pl.col("value").is_in(nulls)).then("value").alias("value"))

    def _merge(self, table: str) -> pl.DataFrame:
        empty = pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})
        merged = pl.concat([self._merged.get(table, empty), *self._parts[table]])
        self._merged[table] = merged.group_by("value").agg(pl.col("count").sum())
        self._parts[table] = []
        return self._merged[table]

    def counts(self) -> pl.DataFrame:
        """What was counted so far: columns table, value, count."""
        tables = pl.Enum(list(self._parts))
        empty = pl.DataFrame(schema={"table": tables, "value": pl.String, "count": pl.Int64})
        merged = [
            self._merge(name).select(pl.lit(name, tables).alias("table"), "value", "count") for name in self._parts
        ]
        return pl.concat([empty, *merged])

    def restore(self, counts: pl.DataFrame) -> None:
        """Go on from `counts`."""
        for key, part in counts.partition_by("table", as_dict=True, include_key=False).items():
            self._merged[str(key[0])] = part

    def vocabularies(self) -> dict[str, pl.DataFrame]:
        """By table, the values kept with their ids and counts, in the order of ids."""
        result = {}
        for field in self._fields:
            if field.table_name in result:
                continue
            kept = self._merge(field.table_name).filter(pl.col("count") >= field.min_count)
            kept = kept.sort("count", "value", descending=[True, False], nulls_last=True)
            ids = pl.int_range(1, kept.height + 1, dtype=pl.Int32, eager=True).alias("id")
            result[field.table_name] = kept.with_columns(ids).select("value", "id", "count")
        return result


def digest(vocabularies: Mapping[str, pl.DataFrame], transforms: Mapping[str, Mapping[str, Any]]) -> str:
    """Sixteen hex digits over the values in the order of their ids, and over what the transforms learned."""
    state = hashlib.sha256(json.dumps(transforms, sort_keys=True).encode())
    for table, frame in sorted(vocabularies.items()):
        state.update(f"\x1d{table}\x1d".encode())
        for part in frame.select(pl.col("value").fill_null("\0")).iter_slices(100_000):
            state.update("\x1f".join(part["value"]).encode())
            state.update(b"\x1f")
    return state.hexdigest()[:16]


def _is_finite(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _row_number(row: int) -> str:
    return f"row {row + 1:,}"
