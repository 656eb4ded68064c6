"""Encoder: the frozen transformation from raw rows to ids, made once from the training rows and kept with the model.

Conventions:

- What a cell's value is: see values.py for texts, cells.py for lists, numbers and hashes, transforms.py for buckets and
  dense values. A field that was encoded without its kind compares texts as they are.
- A missing value is a value of its own, null in vocab.parquet. In a multi field it is an empty list. In a dense field
  it is 0 after the transform, which for `standard` is the mean.
- Ids of a table: 0 is OOV; 1.. are the values kept, by descending count in the training rows, ties by value (missing
  last). A value needs `min_count` occurrences.
- Ids of a hashed table are hashes, so vocab_size = hash_size + 1 and row 0 stays unused. Hashes are the same in every
  process, version and machine.

Shapes: N rows, C id columns, E dense fields, V values of a table.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embtrim.data.cells import (
    canonical_values,
    dense_values,
    flatten,
    needed_columns,
    nulls_of,
    number_cells,
    require_columns,
    row_number,
)
from embtrim.data.dataset import EncodedDataset
from embtrim.data.encoder_files import VOCABULARY_SCHEMA, maps_unpack, read_encoder
from embtrim.data.frames import as_polars
from embtrim.data.hashing import missing_hash
from embtrim.data.log_file import Chunk
from embtrim.data.tally import KNOWN, MISSING, UNSEEN, Tally
from embtrim.data.transforms import MISSING_BUCKET, is_learned
from embtrim.data.values import brought_texts, one_texts
from embtrim.errors import DataError
from embtrim.plan.plan import SizePlan
from embtrim.schema import OOV, FieldSpec, Schema

logger = logging.getLogger(__name__)

MAX_PLACES = 1 << 22  # more buckets than this, 16 MB of ids, are searched and not looked up by place


@dataclass(frozen=True)
class EncodedChunk:
    """Rows as models read them.

    Attributes:
        ids: Ids local to their table, int32 (N, C), PAD = -1.
        dense: Dense values, float32 (N, E), or None if the schema has no dense field.
    """

    ids: np.ndarray
    dense: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Turns raw rows into ids and dense values; the rows need no label.

    Attributes:
        schema: The encoded schema, with sizes.
        vocabularies: By table, a frame with columns value, id and count; a hashed table has none.
        transforms: By field, {"edges": [..]} for quantile buckets, {"mean": .., "std": ..} for standardised fields and
            {"rounded": "float32"} for log2 buckets.
        unseen_ids: By table, the id of values that are not in the vocabulary, if it is not OOV (0).
        hash_maps: By hashed table, an int32 map from hashed ids to the ids given out (see `with_id_maps`).
        columns: The raw columns that the fields read.
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
        for field in schema.id_fields:
            if not field.hash_size and field.table_name not in self.vocabularies:
                raise DataError(f"vocabulary of table {field.table_name!r} is missing; encode again")
        for field in schema.fields:
            if is_learned(field.transform) and field.name not in self.transforms:
                raise DataError(f"transforms.json lacks field {field.name!r}; encode again")

    @classmethod
    def load(cls, folder: str | Path, num_ids: Mapping[str, int] | None = None) -> Encoder:
        """Read the encoder of an encoded folder or a bundle.

        Args:
            folder: The folder.
            num_ids: Rows of each table that the ids must lie in; None means those of the schema.

        Raises:
            DataError: A file is missing or damaged, unpacks to far more than its like, or holds an id beyond its table.
        """
        found = read_encoder(Path(folder), num_ids)
        return cls(found.schema, found.vocabularies, found.transforms, found.unseen_ids, found.hash_maps)

    def save(self, folder: str | Path) -> None:
        """Write schema.json, vocab.parquet and transforms.json, and hash_maps.npz if hashed ids are mapped."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schema.json").write_text(json.dumps(self.schema.model_dump(mode="json"), indent=1), "utf-8")
        state = {"fields": self.transforms, "unseen_ids": self.unseen_ids}
        (folder / "transforms.json").write_text(json.dumps(state, indent=1), "utf-8")
        # Sorted by id, wherever the ids come from, and in one chunk, which packs the same for any number of threads.
        tables = pl.Series("table", list(self.vocabularies), pl.String)
        heights = np.array([frame.height for frame in self.vocabularies.values()], np.int64)
        frames = [frame.select(*VOCABULARY_SCHEMA) for frame in self.vocabularies.values()]
        frames = [f if f["id"].is_sorted() else f.sort("id", maintain_order=True) for f in frames]
        whole = pl.concat([pl.DataFrame(schema=VOCABULARY_SCHEMA), *frames], rechunk=True)
        place = np.repeat(np.arange(len(tables), dtype=np.uint32), heights)
        whole = whole.with_columns(tables.gather(pl.Series(place)))
        whole.select("table", *VOCABULARY_SCHEMA).write_parquet(folder / "vocab.parquet", compression="zstd")
        if self.hash_maps:
            # A reader does not unpack a map that is larger than that, and packed far smaller.
            write = np.savez_compressed if maps_unpack(self.hash_maps) else np.savez
            write(folder / "hash_maps.npz", **self.hash_maps)  # type: ignore[arg-type]

    def encode_chunk(self, rows: Chunk | pl.DataFrame, tally: Tally | None = None) -> EncodedChunk:
        """Encode rows; a value that is not in its table's vocabulary gets the table's OOV id.

        Args:
            rows: A frame with the raw columns (other columns are ignored), of polars or pandas, or a chunk of a raw log.
            tally: Counts missing and unseen values, if given.

        Raises:
            DataError: A column is missing, or a value or a column's type does not fit its field.

        Example:
            >>> schema = Schema(label="click", fields=(FieldSpec(name="user", vocab_size=3),))
            >>> vocabulary = pl.DataFrame({"value": ["ann", "bob"], "id": [1, 2], "count": [5, 3]})
            >>> Encoder(schema, {"user": vocabulary}).encode_chunk(pl.DataFrame({"user": ["bob", "eve"]})).ids.tolist()
            [[2], [0]]
        """
        rows = as_polars(rows)
        frame, locate = (rows.frame, rows.locate) if isinstance(rows, Chunk) else (rows, row_number)
        require_columns(frame, self.columns)
        codes = {name: lookup.code for name, lookup in self._text_lookups.items()}
        finish = partial(self._ids_of_cells, tally=tally)
        ids_CN = number_cells(frame, self.schema, self.transforms, locate, codes, finish)
        dense_NE = dense_values(frame, self.schema, self.transforms, locate)
        if tally is not None:
            tally.add_rows(rows, ids_CN, dense_NE)
        if dense_NE is not None:
            np.nan_to_num(dense_NE, copy=False)
        return EncodedChunk(np.ascontiguousarray(ids_CN.T), dense_NE)

    def ids(self, field: FieldSpec, code_N: np.ndarray) -> np.ndarray:
        """Ids of a field's cells: int32 (N,), from their hashed ids, buckets, or codes in the field's vocabulary."""
        if field.hash_size:
            hash_map = self.hash_maps.get(field.table_name)
            if not code_N.all():
                code_N = np.where(code_N == 0, np.int32(missing_hash(field)), code_N)
            return code_N if hash_map is None else hash_map[code_N]
        if field.type == "numeric":
            return self._bucket_lookups[field.name].ids(code_N)
        return self._text_lookups[field.name].ids_V[code_N]

    def read_texts(self, field: FieldSpec, values: pl.Series) -> tuple[np.ndarray, np.ndarray]:
        """Texts and nulls as cells of a listed categorical or multi field: ids, int32 (N,), and KNOWN, UNSEEN or MISSING, int8.

        They are joined with the vocabulary: to read texts once, that takes less than a lookup to be made.
        """
        listing = self.listing(field)
        codes_of, unseen = partial(_places, listing.values), len(listing.values)
        code_N = self._brought_codes(field, codes_of, unseen, codes_of(values), values, lambda _: "the log")
        return listing.ids_of_codes[code_N], listing.status_of_codes[code_N]

    def _ids_of_cells(
        self,
        field: FieldSpec,
        code_N: np.ndarray,
        texts: pl.Series | None,
        where: Callable[[int], str],
        tally: Tally | None,
    ) -> np.ndarray:
        """Ids of a field's cells, see `ids`; texts are brought to the field's kind, and their statuses counted."""
        if texts is not None and not field.hash_size:
            lookup = self._text_lookups[field.name]
            code_N = self._brought_codes(field, partial(lookup.codes, field), lookup.unseen, code_N, texts, where)
            if tally is not None:
                tally.add_statuses(field, lookup.status_V[code_N], texts)
        elif tally is not None:
            tally.add_missing(field, code_N, 0 if field.hash_size else MISSING_BUCKET)
        return self.ids(field, code_N)

    def _brought_codes(
        self,
        field: FieldSpec,
        codes_of: Callable[[pl.Series], np.ndarray],
        unseen: int,
        code_N: np.ndarray,
        texts: pl.Series,
        where: Callable[[int], str],
    ) -> np.ndarray:
        """The codes of texts; texts that the vocabulary lacks (code `unseen`) are first brought to the field's kind."""
        rows = np.flatnonzero(code_N == unseen) if field.kind is not None else np.empty(0, np.int64)
        if len(rows):
            code_N = code_N.copy()
            cells = texts.gather(rows)
            one = one_texts(cells, field, nulls_of(self.schema, field), lambda place: where(int(rows[place])))
            code_N[rows] = codes_of(one)
        return code_N

    def with_id_maps(self, id_maps: Mapping[str, np.ndarray]) -> Encoder:
        """The same encoder with new ids: it gives out `id_maps[table][id]` instead of id.

        A vocabulary gets the new ids and loses the values whose new id is that of unseen values. A hashed table has no
        vocabulary and stores its map. The schema, and so its fingerprint, stays.

        Raises:
            DataError: A map is for an unknown table, or does not cover the ids given out so far.
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

    def for_rows(self, frame: pl.DataFrame) -> Encoder:
        """The same encoder with no more values than some rows hold: it encodes these rows alike, without an index of all values.

        Args:
            frame: The rows, see `encode_chunk`.
        """
        texts, _ = canonical_values(frame, self.schema, self.transforms, row_number)
        vocabularies = dict(self.vocabularies)
        for name, readers in self.schema.fields_of_table.items():
            if readers[0].hash_size or any(field.type == "numeric" for field in readers):
                continue
            held = []
            for field in readers:
                cells = texts[field.name] if field.type != "multi" else flatten(texts[field.name])
                held += [cells, one_texts(cells, field, nulls_of(self.schema, field), row_number)]
            is_held = pl.col("value").is_in(pl.concat(held).unique().implode())
            vocabularies[name] = vocabularies[name].filter(is_held | pl.col("value").is_null())
        return Encoder(self.schema, vocabularies, self.transforms, self.unseen_ids, self.hash_maps)

    @cached_property
    def _text_lookups(self) -> dict[str, _TextLookup]:
        fields = [f for f in self.schema.id_fields if not f.hash_size and f.type != "numeric"]
        if fields and fields[0].kind is None:
            logger.warning(
                "the vocabulary was made without the kinds of its columns: values are compared as texts, so that 1034.0 is "
                "not 1034; encode the training log again to have them compared by kind"
            )
        return {field.name: self._text_lookup(field) for field in fields}

    def _text_lookup(self, field: FieldSpec) -> _TextLookup:
        # A polars Enum builds its index once, when the expression is made; each chunk then costs one hash probe per
        # cell. Two more codes stand for "not in it" and "missing".
        listing = self.listing(field)
        texts, text = listing.values, pl.col(field.name)
        code = text.cast(pl.Enum(texts), strict=False).to_physical().cast(pl.UInt32).fill_null(len(texts))
        code = pl.when(text.is_null()).then(pl.lit(len(texts) + 1, pl.UInt32)).otherwise(code).alias(field.name)
        return _TextLookup(code, listing.ids_of_codes, listing.status_of_codes)

    @cached_property
    def _bucket_lookups(self) -> dict[str, _BucketLookup]:
        lookups = {}
        for field in self.schema.id_fields:
            if field.hash_size or field.type != "numeric":
                continue
            listing = self.listing(field)
            lookups[field.name] = _BucketLookup(
                listing.values.to_numpy(), listing.ids_V, listing.unseen, listing.missing
            )
        return lookups

    def listing(self, field: FieldSpec) -> Listing:
        """What a listed field finds in its vocabulary."""
        listed, unseen, missing_id = self._listed(field)
        if field.type == "numeric":
            number = pl.col("value").cast(pl.Int32, strict=False)
            # A table shared with a field of texts may hold texts that do not name a bucket, such as "05".
            listed = listed.with_columns(number=number).filter(pl.col("number").cast(pl.String) == pl.col("value"))
            ids_V = listed["id"].to_numpy()
            return Listing(
                listed["number"], ids_V, np.where(ids_V == unseen, UNSEEN, KNOWN).astype(np.int8), unseen, missing_id
            )
        if len({f.kind for f in self.schema.fields_of_table[field.table_name]}) > 1:
            listed = self._brought(listed, field, unseen, missing_id)
        ids_V, texts = listed["id"].to_numpy(), listed["value"]
        status_V = np.where(ids_V == unseen, UNSEEN, KNOWN).astype(np.int8)
        if field.type == "categorical":
            # Texts that mean "missing" are listed too, so that no pass over the cells has to replace them.
            nulls = sorted({*nulls_of(self.schema, field)})
            is_null = texts.is_in(nulls)
            extra = sorted(set(nulls) - set(texts.filter(is_null)))
            ids_V = np.where(is_null.to_numpy(), missing_id, ids_V)
            ids_V = np.concatenate([ids_V, np.full(len(extra), missing_id)])
            status_V = np.concatenate([np.where(is_null.to_numpy(), MISSING, status_V), np.full(len(extra), MISSING)])
            texts = pl.concat([texts, pl.Series("value", extra, pl.String)])
        return Listing(texts, ids_V, status_V, unseen, missing_id)

    def _brought(self, listed: pl.DataFrame, field: FieldSpec, unseen: int, missing_id: int) -> pl.DataFrame:
        """A vocabulary shared with fields of other kinds: a text that has another text in this field gets its id."""
        one = listed.select("value", one=brought_texts(listed["value"], field, nulls_of(self.schema, field)))
        found = one.join(listed.select(one="value", id="id"), on="one", how="left", maintain_order="left")
        missing = pl.when(pl.col("one").is_null()).then(missing_id).otherwise(unseen).cast(pl.Int32)
        return found.select("value", pl.col("id").fill_null(missing))

    def _listed(self, field: FieldSpec) -> tuple[pl.DataFrame, int, int]:
        """A field's vocabulary without the missing value, the id of unseen values, and the id of the missing value."""
        frame = self.vocabularies[field.table_name]
        unseen = self.unseen_ids.get(field.table_name, OOV)
        missing = frame.filter(pl.col("value").is_null())["id"]
        return frame.filter(pl.col("value").is_not_null()), unseen, int(missing[0]) if len(missing) else unseen


def vocabulary_bytes(data: EncodedDataset, plan: SizePlan | None = None) -> int:
    """Bytes of the encoder's files in a model's bundle or export; 0 for data made in memory, which has no encoder.

    Args:
        data: The dataset with its stored ids.
        plan: Plan of the model; None for the full model.

    Raises:
        DataError: The encoder cannot be read, or the temporary folder has no room for it.
    """
    if data.folder is None:
        return 0
    encoder = Encoder.load(data.folder)
    if plan is not None:
        encoder = encoder.with_id_maps(data.recode(plan).id_maps)
    try:
        with tempfile.TemporaryDirectory(prefix="embtrim-") as folder:
            encoder.save(folder)
            return sum(path.stat().st_size for path in Path(folder).iterdir())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"the vocabulary could not be written to {tempfile.gettempdir()}, where its bytes are counted ({error}); make room "
            "there, or set TMPDIR to another folder"
        ) from None


@dataclass(frozen=True)
class Listing:
    """What one field finds in the vocabulary of its table.

    Attributes:
        values: Distinct texts, or buckets of a numeric field, V of them; for a categorical field also the texts that mean
            "missing".
        ids_V: The id of each of them.
        status_V: KNOWN, UNSEEN or MISSING for each of them.
        unseen: The id of other values.
        missing: The id of missing values.
    """

    values: pl.Series
    ids_V: np.ndarray
    status_V: np.ndarray
    unseen: int
    missing: int

    @property
    def ids_of_codes(self) -> np.ndarray:
        """The ids of codes: the places of `values`, then one for unseen and one for missing values; int32 (V + 2,)."""
        return np.concatenate([self.ids_V, [self.unseen, self.missing]]).astype(np.int32)

    @property
    def status_of_codes(self) -> np.ndarray:
        """The statuses of codes: int8 (V + 2,)."""
        return np.concatenate([self.status_V, [UNSEEN, MISSING]]).astype(np.int8)


def _places(values: pl.Series, texts: pl.Series) -> np.ndarray:
    """The place of each text among V distinct values, V for others and V + 1 for null: uint32 (N,)."""
    listed = pl.DataFrame({"text": values, "place": np.arange(len(values), dtype=np.uint32)})
    if len(texts) < len(values) // 4:
        listed = listed.filter(pl.col("text").is_in(texts.implode()))
    found = texts.alias("text").to_frame().join(listed, on="text", how="left", maintain_order="left")
    place = pl.when(pl.col("text").is_null()).then(len(values) + 1).otherwise(pl.col("place").fill_null(len(values)))
    return found.select(place.cast(pl.UInt32)).to_series().to_numpy()


@dataclass(frozen=True)
class _TextLookup:
    """A table as one field of texts reads it.

    Attributes:
        code: Turns texts into codes: their places in the vocabulary, then one for unseen and one for missing values.
        ids_V: The id of each code.
        status_V: KNOWN, UNSEEN or MISSING for each code.
    """

    code: pl.Expr
    ids_V: np.ndarray
    status_V: np.ndarray

    @property
    def unseen(self) -> int:
        """The code of unseen values."""
        return len(self.ids_V) - 2

    def codes(self, field: FieldSpec, texts: pl.Series) -> np.ndarray:
        """The codes of texts and nulls as cells of a field: uint32 (N,)."""
        return texts.to_frame(field.name).select(self.code).to_series().to_numpy()


class _BucketLookup:
    """A table as one numeric field reads it: rising buckets and their ids."""

    def __init__(self, bucket_V: np.ndarray, ids_V: np.ndarray, unseen: int, missing_id: int) -> None:
        order_V = np.argsort(bucket_V)
        self._bucket_V, self._ids_V = bucket_V[order_V], ids_V[order_V]
        self._unseen, self._missing_id = unseen, missing_id
        # One place per bucket from the first to the last, and one at either end for all buckets beyond.
        self._start = int(self._bucket_V[0]) - 1 if len(bucket_V) else 0
        self._end = int(self._bucket_V[-1]) + 1 if len(bucket_V) else 0
        self._by_place = None
        if self._end - self._start < MAX_PLACES:
            self._by_place = self._searched(np.arange(self._start, self._end + 1))

    def ids(self, bucket_N: np.ndarray) -> np.ndarray:
        """Ids of buckets: int32 (N,)."""
        if self._by_place is None:
            ids_N = self._searched(bucket_N)
        else:
            ids_N = self._by_place[np.clip(bucket_N, self._start, self._end) - self._start]
        ids_N[bucket_N == MISSING_BUCKET] = self._missing_id
        return ids_N

    def _searched(self, bucket_N: np.ndarray) -> np.ndarray:
        if not len(self._bucket_V):
            return np.full(bucket_N.shape, self._unseen, np.int32)
        place_N = np.minimum(np.searchsorted(self._bucket_V, bucket_N), len(self._bucket_V) - 1)
        return np.where(self._bucket_V[place_N] == bucket_N, self._ids_V[place_N], np.int32(self._unseen))


def digest(vocabularies: Mapping[str, pl.DataFrame], transforms: Mapping[str, Mapping[str, Any]]) -> str:
    """Sixteen hex digits over the values in the order of their ids, and over what the transforms learned."""
    state = hashlib.sha256(json.dumps(transforms, sort_keys=True).encode())
    for table, frame in sorted(vocabularies.items()):
        state.update(f"\x1d{table}\x1d".encode())
        for part in frame.select(pl.col("value").fill_null("\0")).iter_slices(100_000):
            state.update("\x1f".join(part["value"]).encode())
            state.update(b"\x1f")
    return state.hexdigest()[:16]
