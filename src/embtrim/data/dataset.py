"""EncodedDataset: a folder of memory-mapped arrays that is read in batches.

    folder/schema.json          the Schema, with sizes
    folder/meta.json            format version, rows by split, sources, encode settings
    folder/vocab.parquet        columns table, value, id, count (no rows for hashed tables)
    folder/transforms.json      edges of quantile buckets, mean and std of standardised fields
    folder/<split>/ids.npy      int32 (N, C), row-major, ids local to their table, PAD = -1
    folder/<split>/labels.npy   float32 (N,)
    folder/<split>/dense.npy    float32 (N, number of dense fields), only if there are any
    folder/<split>/weights.npy  float32 (N,), only if the schema has a weight column

Format version 2 has parquet parts in the place of the arrays, see parts.py.

Shapes: N rows of a split, B batch, C id columns, F fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from embtrim.config import Config, Entry
from embtrim.data.encoder_files import read_schema
from embtrim.data.log_file import Skipped
from embtrim.data.parts import Part, unpacked
from embtrim.errors import ConfigError, DataError, shown
from embtrim.plan.plan import SizePlan
from embtrim.schema import PAD, Schema
from embtrim.system.arrays import map_array
from embtrim.system.files import read_json
from embtrim.system.holding import undo_replacement

if TYPE_CHECKING:  # workers that encode make no batches: they start in a quarter of the time without torch
    import torch
    from torch import Tensor

FORMAT_VERSION = 2  # with parquet parts; version 1 has arrays
ARRAYS_VERSION = 1
SPLITS = ("train", "valid", "test")

# Rows are shuffled in windows. A window consists of random chunks of CHUNK_ROWS consecutive rows, WINDOW_ROWS rows in
# all, and the order of its rows is fully random. A split no larger than a window gets a full shuffle. Only the row
# numbers of a window are in memory, 8 bytes each; the rows themselves are copied out of the memory map batch by batch.
CHUNK_ROWS = 4_096
WINDOW_ROWS = 1 << 20

# Values of a split on disk are checked in blocks of this size. NaN goes through `minimum` and `maximum`.
_BLOCK_BYTES = 16 << 20
_EXTREMES = ((np.minimum, np.min), (np.maximum, np.max))
_LARGEST = {"labels": 1.0, "weights": float(np.finfo(np.float32).max)}


class SplitNote(Entry):
    """How the rows were divided; see `embtrim.data.splitting.Split`."""

    by: Literal["ratio", "time"]
    ratio: tuple[float, float, float]
    cuts: tuple[str | int | float, ...] | None = None


class Meta(Config):
    """What meta.json of encoded data holds, as far as it is read; `encode` notes more.

    Attributes:
        format_version: 1 for arrays, 2 for parquet parts.
        num_rows: Rows by split.
        split: How one log was divided; None for a log of each split.
        seed: Seed of the random split.
        skipped: Lines that could not be read, by log.
        parts: The parts of each split in the order of the log; None for arrays.
    """

    model_config = ConfigDict(extra="ignore")

    format_version: Literal[1, 2]
    num_rows: dict[Literal["train", "valid", "test"], Annotated[int, Field(strict=True, ge=0)]]
    split: SplitNote | None = None
    seed: int | None = None
    skipped: dict[str, Skipped] = Field(default_factory=dict)
    parts: dict[Literal["train", "valid", "test"], tuple[Part, ...]] | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> Meta:
        if (self.parts is not None) != (self.format_version == FORMAT_VERSION):
            raise ValueError(f"parts belong to format_version {FORMAT_VERSION}, and are needed there")
        for name, num_rows in self.num_rows.items() if self.parts is not None else ():
            if sum(part.rows for part in self.parts_of(name)) != num_rows:
                raise ValueError(f"the parts of split {name!r} do not have its {num_rows:,} rows")
        return self

    def parts_of(self, split: str) -> tuple[Part, ...]:
        """The parts of a split."""
        return next((found for name, found in (self.parts or {}).items() if name == split), ())

    @classmethod
    def load(cls, folder: Path) -> Meta:
        """Read meta.json of encoded data.

        Raises:
            DataError: The file is missing, damaged or of another format version.
        """
        path = folder / "meta.json"
        values = read_json(path, hint="is this a folder written by `embtrim encode`?")
        if values.get("format_version") not in (ARRAYS_VERSION, FORMAT_VERSION):
            raise DataError(
                f"{folder} has dataset format {shown(values.get('format_version'))}, this release reads {ARRAYS_VERSION} and "
                f"{FORMAT_VERSION}; encode again"
            )
        try:
            return cls.parse(values, where=str(path))
        except ConfigError as error:
            raise DataError(f"{error}; encode again") from None


@dataclass(frozen=True)
class Batch:
    """One batch of examples.

    Attributes:
        ids_BC: Ids local to their table, int32, PAD = -1.
        labels_B: Labels 0 or 1, float32; soft labels lie between.
        dense_BE: Values of the dense fields, float32, or None if the schema has no dense field.
        weights_B: Sample weights, float32, or None if the schema has no weight column.
    """

    ids_BC: Tensor
    labels_B: Tensor
    dense_BE: Tensor | None = None
    weights_B: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        import torch

        if self.ids_BC.device == torch.device(device):
            return self
        move = [None if t is None else t.to(device, non_blocking=True) for t in self.tensors()]
        return Batch(*move)  # type: ignore[arg-type]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The four tensors, in the order of the attributes."""
        return (self.ids_BC, self.labels_B, self.dense_BE, self.weights_B)

    def __len__(self) -> int:
        return self.ids_BC.shape[0]


@dataclass(frozen=True)
class SplitArrays:
    """The arrays of one split, memory-mapped or in memory.

    Attributes:
        ids: Ids local to their table, int32 (N, C), PAD = -1.
        labels: Labels 0 or 1, float32 (N,); soft labels lie between.
        dense: Values of the dense fields, float32 (N, number of dense fields), or None.
        weights: Sample weights, float32 (N,), or None.
        fits: Fingerprints of the schemas that the values were checked against.
    """

    ids: np.ndarray
    labels: np.ndarray
    dense: np.ndarray | None = None
    weights: np.ndarray | None = None
    fits: set[str] = dataclasses.field(default_factory=set, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)


class EncodedDataset:
    """An encoded log: a schema and up to three splits of ids, labels, dense values and weights.

    Attributes:
        schema: The fields and the vocabulary sizes of the *stored* ids.
        splits: Arrays by name of the split.
        folder: Folder on disk, or None for data made in memory.
        id_maps: By table, an int32 map from stored ids to the ids in batches (see `recode`).
    """

    def __init__(
        self,
        schema: Schema,
        splits: Mapping[str, SplitArrays],
        folder: Path | None = None,
        id_maps: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.schema = schema
        self.splits = dict(splits)
        self.folder = folder
        self.id_maps = dict(id_maps or {})
        for name, arrays in self.splits.items():
            _check_split(schema, name, arrays)

    @classmethod
    def load(cls, folder: str | Path, share: tuple[int, int] | None = None) -> EncodedDataset:
        """Open a folder written by `embtrim.encode`. Arrays are memory-mapped, so that nothing is read yet.

        Parquet parts (format version 2) are unpacked into arrays first, once for all later calls; those of a share, each time.

        Args:
            folder: The folder.
            share: (rank, number of ranks) opens the rows of one rank of a job: consecutive rows, a part of the whole for each
                rank. All ranks have equally many training rows, so that a loop of their batches makes equally many steps;
                the last rows, fewer than there are ranks, are left out. Other splits are divided without a rest.

        Raises:
            DataError: The folder is missing, incomplete, truncated or of another format version; or the share is not one.

        Example:
            >>> import polars as pl, tempfile
            >>> from embtrim.data.encoding import encode
            >>> log = pl.DataFrame({"click": [0, 1] * 50, "user": ["ann", "bob"] * 50})
            >>> data = encode(log, label="click", split="1:0:0", out=tempfile.mkdtemp() + "/data")
            >>> [EncodedDataset.load(data.folder, share=(rank, 3)).num_rows("train") for rank in range(3)]
            [33, 33, 33]
        """
        folder = Path(folder)
        undo_replacement(folder)
        meta = Meta.load(folder)
        schema, rows_of_split = read_schema(folder), {str(name): number for name, number in meta.num_rows.items()}
        splits = {}
        for name in (name for name in SPLITS if name in rows_of_split):
            rows = None if share is None else _rows_of_share(name, rows_of_split[name], *share)
            if meta.parts is None:
                arrays = _open_split(folder / name, schema, rows_of_split[name])
                splits[name] = arrays if rows is None else _take(arrays, slice(*rows))
                continue
            with unpacked(folder, name, meta.parts_of(name), schema, rows) as place:
                splits[name] = _open_split(place, schema, rows_of_split[name] if rows is None else rows[1] - rows[0])
        return cls(schema, splits, folder)

    def split(self, name: str) -> SplitArrays:
        """The arrays of a split. Arrays on disk are read through once, when they are first asked for.

        Raises:
            DataError: The dataset has no such split; the message names the splits it has. Or a split on disk holds an id beyond
                its table, or a label or a number that is none.
        """
        arrays = self._split(name)
        if isinstance(arrays.ids, np.memmap) and self.schema.fingerprint not in arrays.fits:
            _check_values(self.schema, name, arrays)
            arrays.fits.add(self.schema.fingerprint)
        return arrays

    def _split(self, name: str) -> SplitArrays:
        if name not in self.splits:
            raise DataError(f"dataset has no split {name!r}; it has {', '.join(self.splits) or 'none'}")
        return self.splits[name]

    def num_rows(self, split: str) -> int:
        """Number of rows of a split."""
        return len(self._split(split))

    def num_batches(self, split: str, batch_size: int) -> int:
        """Number of batches that `batches` yields for a split."""
        return -(-self.num_rows(split) // batch_size)

    def batches(self, split: str, batch_size: int, shuffle_seed: int | None = None, skip: int = 0) -> Iterator[Batch]:
        """Yield a split in batches; the last batch may be smaller.

        Args:
            split: "train", "valid" or "test".
            batch_size: Rows per batch.
            shuffle_seed: Seed of the order of rows (see CHUNK_ROWS); None keeps the stored order.
            skip: Number of batches to leave out at the start; their rows are not read.
        """
        arrays = self.split(split)
        for rows in islice(_rows_of_batches(len(arrays), batch_size, shuffle_seed), skip, None):
            yield self._batch(_take(arrays, rows))

    def value_counts(self, split: str = "train") -> dict[str, np.ndarray]:
        """How often each id occurs in a split: by table, int64 (rows of the table,). PAD is not counted."""
        sizes = self.schema.tables
        counts = {name: np.zeros(n, np.int64) for name, n in sizes.items()}
        ids = self.split(split).ids
        for start in range(0, len(ids), WINDOW_ROWS):
            block = np.asarray(ids[start : start + WINDOW_ROWS])
            for field, columns in zip(self.schema.id_fields, self.schema.column_slices, strict=True):
                used = block[:, columns].ravel()
                counts[field.table_name] += np.bincount(used[used != PAD], minlength=sizes[field.table_name])
        for name, id_map in self.id_maps.items():
            counts[name] = np.bincount(id_map, weights=counts[name], minlength=int(id_map.max()) + 1).astype(np.int64)
        return counts

    def recode(self, plan: SizePlan) -> EncodedDataset:
        """The same data with the ids of a compact model; a field-level plan changes no ids.

        Raises:
            PlanError: The plan was made for another schema.
        """
        plan.check_schema(self.schema)
        id_maps = {table.name: table.id_map() for table in plan.tables}
        return self.with_id_maps({name: id_map for name, id_map in id_maps.items() if id_map is not None})

    def with_id_maps(self, id_maps: Mapping[str, np.ndarray]) -> EncodedDataset:
        """The same data with other ids: batches hold `id_maps[table][stored id]`.

        Raises:
            DataError: A map does not have one entry per row of its table.
        """
        for name, id_map in id_maps.items():
            if len(id_map) != self.schema.tables.get(name, -1):
                raise DataError(
                    f"id map for table {name!r} has {len(id_map)} rows, the table {self.schema.tables.get(name)}"
                )
        return EncodedDataset(self.schema, self.splits, self.folder, id_maps)

    def sampled(self, split: str, max_rows: int, seed: int = 0) -> EncodedDataset:
        """The same data with at most that many rows of a split, drawn at random and kept in order and in memory."""
        arrays = self.split(split)
        if max_rows >= len(arrays):
            return self
        rows = np.sort(np.random.default_rng(seed).choice(len(arrays), max_rows, replace=False))
        return EncodedDataset(self.schema, {**self.splits, split: _take(arrays, rows)}, self.folder, self.id_maps)

    def _batch(self, arrays: SplitArrays) -> Batch:
        ids = np.ascontiguousarray(arrays.ids)
        if self.id_maps:
            ids = ids.copy()
            for field, columns in zip(self.schema.id_fields, self.schema.column_slices, strict=True):
                id_map = self.id_maps.get(field.table_name)
                if id_map is not None:
                    stored = ids[:, columns]
                    ids[:, columns] = np.where(stored == PAD, PAD, id_map[np.maximum(stored, 0)])
        return Batch(
            ids_BC=_tensor(ids),
            labels_B=_tensor(arrays.labels),
            dense_BE=None if arrays.dense is None else _tensor(arrays.dense),
            weights_B=None if arrays.weights is None else _tensor(arrays.weights),
        )


def _rows_of_share(split: str, num_rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The first row of a rank's share of a split, and the row after its last one; see `EncodedDataset.load`."""
    if not 0 <= rank < num_ranks:
        raise DataError(f"share is (rank, number of ranks), given ({rank}, {num_ranks}); ranks are 0..{num_ranks - 1}")
    if num_rows < num_ranks:
        raise DataError(f"split {split!r} has {num_rows:,} rows, too few for {num_ranks} ranks; use fewer ranks")
    if split == "train":
        return rank * (num_rows // num_ranks), (rank + 1) * (num_rows // num_ranks)
    return rank * num_rows // num_ranks, (rank + 1) * num_rows // num_ranks


def _open_split(folder: Path, schema: Schema, num_rows: int) -> SplitArrays:
    """The arrays of a split, memory-mapped."""
    arrays = SplitArrays(
        ids=_open_array(folder / "ids.npy"),
        labels=_open_array(folder / "labels.npy"),
        dense=_open_array(folder / "dense.npy") if schema.dense_fields else None,
        weights=_open_array(folder / "weights.npy") if schema.weight else None,
    )
    if len(arrays) != num_rows:
        raise DataError(f"{folder} holds {len(arrays)} rows, meta.json says {num_rows}; encode again")
    return arrays


def _open_array(path: Path) -> np.ndarray:
    try:
        return map_array(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; encode again") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); encode again") from None


def _check_split(schema: Schema, name: str, arrays: SplitArrays) -> None:
    if arrays.ids.shape != (len(arrays), schema.num_id_columns) or arrays.ids.dtype != np.int32:
        raise DataError(
            f"split {name!r}: ids are {arrays.ids.dtype} {arrays.ids.shape}, "
            f"schema {schema.describe()} needs int32 ({len(arrays)}, {schema.num_id_columns})"
        )
    if not isinstance(arrays.ids, np.memmap):
        _check_ids(schema, name, arrays.ids)
    if (arrays.dense is None) != (not schema.dense_fields):
        raise DataError(f"split {name!r}: the schema has {len(schema.dense_fields)} dense fields, but dense values are "
                        f"{'missing' if arrays.dense is None else 'given'}")  # fmt: skip


def _check_ids(schema: Schema, name: str, ids_NC: np.ndarray) -> None:
    """Raise DataError for an id beyond its table, which would read a row of another table."""
    if not ids_NC.size:
        return
    least_C, most_C = (reduce(pick, (part(block, axis=0) for block in _blocks(ids_NC))) for pick, part in _EXTREMES)
    for field, columns in zip(schema.id_fields, schema.column_slices, strict=True):
        allowed, rows = PAD if field.type == "multi" else 0, schema.tables[field.table_name]
        least, most = least_C[columns].min(), most_C[columns].max()
        if least < allowed or most >= rows:
            raise DataError(
                f"split {name!r}: ids of field {field.name!r} lie in {least}..{most}, its table has rows "
                f"{allowed}..{rows - 1}" + (", -1 where there is no value" if allowed == PAD else "")
            )


def _check_values(schema: Schema, name: str, arrays: SplitArrays) -> None:
    """Raise DataError for values on disk that `encode` does not write."""
    _check_ids(schema, name, arrays.ids)
    shapes = {"labels": (len(arrays),), "weights": (len(arrays),), "dense": (len(arrays), len(schema.dense_fields))}
    for what, shape in shapes.items():
        values = getattr(arrays, what)
        if values is None or not len(values):
            continue
        if values.dtype != np.float32 or values.shape != shape:
            raise DataError(
                f"split {name!r}: {what} are {values.dtype} {values.shape}, float32 {shape} is needed; encode again"
            )
        least, most = (float(reduce(pick, map(part, _blocks(values)))) for pick, part in _EXTREMES)
        if not (-np.inf <= least and most <= np.inf) or (what != "dense" and (least < 0 or most > _LARGEST[what])):
            raise DataError(f"split {name!r}: {what} lie in {least}..{most}; encode again")


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of an array in blocks of bounded size."""
    rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    return (np.asarray(array[start : start + rows]) for start in range(0, len(array), rows))


def _rows_of_batches(num_rows: int, batch_size: int, shuffle_seed: int | None) -> Iterator[np.ndarray | slice]:
    """Yield the rows of each batch; shuffled rows stay valid until the next batch is taken."""
    if shuffle_seed is None:
        yield from (slice(start, start + batch_size) for start in range(0, num_rows, batch_size))
        return
    carried = np.empty(0, np.int64)
    for window in _shuffled_windows(num_rows, np.random.default_rng(shuffle_seed)):
        start = batch_size - len(carried)
        if len(window) < start:
            carried = np.concatenate([carried, window])
            continue
        yield np.concatenate([carried, window[:start]])
        while start + batch_size <= len(window):
            yield window[start : start + batch_size]
            start += batch_size
        carried = window[start:].copy()
        del window  # frees its memory before the next window is made
    if len(carried):
        yield carried


def _shuffled_windows(num_rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    if num_rows <= WINDOW_ROWS:
        yield rng.permutation(num_rows)
        return
    starts = rng.permutation(-(-num_rows // CHUNK_ROWS)) * CHUNK_ROWS
    per_window = WINDOW_ROWS // CHUNK_ROWS
    for first in range(0, len(starts), per_window):
        yield _shuffled_chunks(np.sort(starts[first : first + per_window]), num_rows, rng)


def _shuffled_chunks(starts: np.ndarray, num_rows: int, rng: np.random.Generator) -> np.ndarray:
    rows = (starts[:, None] + np.arange(CHUNK_ROWS)).ravel()
    rows = rows[: np.searchsorted(rows, num_rows)]  # the last chunk of the split may be smaller
    rng.shuffle(rows)
    return rows


def _take(arrays: SplitArrays, rows: np.ndarray | slice) -> SplitArrays:
    """Some rows of a split: a view of consecutive rows, a copy of others, so that a batch owns only its own memory."""

    def part(array: np.ndarray) -> np.ndarray:
        # `take` copies rows twice as fast as indexing.
        return array[rows] if isinstance(rows, slice) else np.asarray(array).take(rows, axis=0)

    return SplitArrays(*(None if a is None else part(a) for a in _fields(arrays)))  # type: ignore[arg-type]


def _fields(arrays: SplitArrays) -> tuple[np.ndarray | None, ...]:
    return (arrays.ids, arrays.labels, arrays.dense, arrays.weights)


def _tensor(array: np.ndarray) -> Tensor:
    import torch

    # A memory-mapped slice is read-only, but torch needs a writable array, and a batch must outlive the map.
    return torch.from_numpy(array if array.flags.writeable else array.copy())
