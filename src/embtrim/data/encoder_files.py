"""The files of an encoder, read and checked: schema.json, vocab.parquet, transforms.json, hash_maps.npz.

Ids are checked once, here: an id beyond its table would read a row of another table.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, FiniteFloat

from embtrim.config import Config, Entry
from embtrim.data.parquet_sizes import unpacked_bytes
from embtrim.errors import ConfigError, DataError, first_line_of, shown
from embtrim.schema import OOV, Schema
from embtrim.system.arrays import read_integers
from embtrim.system.files import read_json

VOCABULARY_SCHEMA = {"value": pl.String, "id": pl.Int32, "count": pl.Int64}
# A vocabulary of numbers in a row unpacks to some 30 times its file, an id map of one value to 1,000 times.
_VOCABULARY_RATIO, _VOCABULARY_BYTES = 64, 128 << 20
_SLICE_ROWS = 1 << 18  # as many as one row group holds
MAP_RATIO, MAP_BYTES = 100, 256 << 20


class Fitted(Entry):
    """What a transform has learned, edges of buckets or mean and standard deviation; or how numbers are rounded before it."""

    edges: list[FiniteFloat] | None = None
    mean: FiniteFloat | None = None
    std: FiniteFloat | None = Field(default=None, gt=0)
    rounded: Literal["float32"] | None = None


class State(Config):
    """What transforms.json holds.

    Attributes:
        fields: What the transforms have learned, by field.
        unseen_ids: Ids of values that are not in the vocabulary, by table, where that is not OOV.
    """

    fields: dict[str, Fitted] = Field(default_factory=dict)
    unseen_ids: dict[str, Annotated[int, Field(strict=True)]] = Field(default_factory=dict)


@dataclass(frozen=True)
class EncoderFiles:
    """What the files of an encoder hold; see `embtrim.data.encoder.Encoder`."""

    schema: Schema
    vocabularies: dict[str, pl.DataFrame]
    transforms: dict[str, dict[str, Any]]
    unseen_ids: dict[str, int]
    hash_maps: dict[str, np.ndarray]


def read_schema(folder: Path) -> Schema:
    """The schema of encoded data or of an encoder.

    Raises:
        DataError: schema.json is missing or damaged.
    """
    path = folder / "schema.json"
    try:
        schema = Schema.parse(read_json(path), where=str(path))
        schema.tables  # noqa: B018 - which raises for a draft
    except ConfigError as error:
        raise DataError(f"{error}; encode again") from None
    return schema


def read_encoder(folder: Path, num_ids: Mapping[str, int] | None = None) -> EncoderFiles:
    """Read the encoder of an encoded folder or a bundle.

    Args:
        folder: The folder.
        num_ids: Rows of each table that the ids must lie in; None means those of the schema.

    Raises:
        DataError: A file is missing or damaged, unpacks to far more than its like, or holds an id beyond its table.
    """
    schema = read_schema(folder)
    num_ids = schema.tables if num_ids is None else num_ids
    state = _read_state(folder / "transforms.json", schema)
    maps = _read_maps(folder / "hash_maps.npz", schema)
    for name, number in state.unseen_ids.items():
        if name not in num_ids or not 0 <= number < num_ids[name]:
            raise DataError(
                f"{folder / 'transforms.json'}: unseen_ids: table {shown(name)} has id {number}, ids lie in "
                f"0..{num_ids.get(name, 0) - 1:,}; encode again"
            )
    for name, size in schema.tables.items():
        is_hashed = schema.fields_of_table[name][0].hash_size is not None
        ids = maps.get(name, np.array([0, size - 1])) if is_hashed else np.array([OOV])
        if ids.min() < 0 or ids.max() >= num_ids[name]:
            where = folder / ("hash_maps.npz" if name in maps else "schema.json")
            raise DataError(
                f"{where}: ids of table {shown(name)} lie in {ids.min()}..{ids.max()}, its rows are 0..{num_ids[name] - 1:,}; "
                "encode again"
            )
    vocabularies = _read_vocabularies(folder / "vocab.parquet", schema, num_ids)
    fitted = {name: values.model_dump(exclude_none=True) for name, values in state.fields.items()}
    return EncoderFiles(schema, vocabularies, fitted, state.unseen_ids, maps)


def _read_state(path: Path, schema: Schema) -> State:
    try:
        state = State.parse(read_json(path), where=str(path))
    except ConfigError as error:
        raise DataError(f"{error}; encode again") from None
    for field in schema.fields:
        fitted, missing = state.fields.get(field.name, Fitted()), None
        if (field.transform or "").startswith("quantile:") and fitted.edges is None:
            missing = "edges"
        elif field.transform == "standard" and (fitted.mean is None or fitted.std is None):
            missing = "mean or std"
        if missing is not None:
            raise DataError(f"{path} lacks {missing} of field {shown(field.name)}; encode again")
        edges = fitted.edges or []
        if any(a > b for a, b in itertools.pairwise(edges)):
            raise DataError(f"{path}: the edges of field {shown(field.name)} do not rise; encode again")
    return state


def _read_maps(path: Path, schema: Schema) -> dict[str, np.ndarray]:
    """The id maps of hashed tables, of those that have one."""
    if not path.exists():
        return {}
    hashed = [f.table_name for f in schema.id_fields if f.hash_size]
    try:
        return read_integers(path, {name: schema.tables[name] for name in hashed}, MAP_RATIO, MAP_BYTES, optional=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); encode again") from None


def _read_vocabularies(path: Path, schema: Schema, num_ids: Mapping[str, int]) -> dict[str, pl.DataFrame]:
    """The vocabulary of each table that is not hashed: value, id, count."""
    try:
        size, most = unpacked_bytes(path), max(_VOCABULARY_BYTES, _VOCABULARY_RATIO * path.stat().st_size)
        if size > most:
            raise ValueError(f"it unpacks to some {size:,} bytes, a vocabulary of its size to {most:,} at most")
        by_table = _read_by_table(path)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({first_line_of(error)}); encode again") from None
    empty = pl.DataFrame(schema=VOCABULARY_SCHEMA)
    tables = [field.table_name for field in schema.id_fields if not field.hash_size]
    found = {name: by_table.get(name, empty) for name in tables}
    for name, listed in found.items():
        _check_vocabulary(f"{path}: table {shown(name)}", listed, num_ids[name])
    return found


def _read_by_table(path: Path) -> dict[str | None, pl.DataFrame]:
    """The values of each table, read some rows at a time: the whole file would take as much again as its tables.

    Raises:
        ValueError: The ids are not integers.
    """
    scan = pl.scan_parquet(path, glob=False)
    dtype = scan.collect_schema().get("id", pl.Int32())
    if not dtype.is_integer():
        raise ValueError(f"its ids are {dtype}, not integers")
    rows, parts = scan.select(pl.len()).collect().item(), defaultdict(list)
    wanted = scan.select(pl.col("table").cast(pl.String), *VOCABULARY_SCHEMA).cast(VOCABULARY_SCHEMA)  # type: ignore[arg-type]
    for start in range(0, max(rows, 1), _SLICE_ROWS):  # a file without rows is looked at as well
        frame = wanted.slice(start, _SLICE_ROWS).collect()
        for (name,), part in frame.partition_by("table", as_dict=True, include_key=False).items():
            parts[name].append(part)
    return {name: pl.concat(parts.pop(name), rechunk=True) for name in list(parts)}


def _check_vocabulary(where: str, listed: pl.DataFrame, num_ids: int) -> None:
    least, most = listed["id"].min(), listed["id"].max()
    if listed["id"].null_count() or (least is not None and (least < 0 or most >= num_ids)):  # type: ignore[operator]
        raise DataError(f"{where} has ids {least}..{most}, its rows are 0..{num_ids - 1:,}; encode again")
    if listed["value"].n_unique() < listed.height:
        twice = listed["value"].filter(listed["value"].is_duplicated())[0]
        raise DataError(f"{where} lists the value {shown(twice)} twice; encode again")


def maps_unpack(maps: Mapping[str, np.ndarray]) -> bool:
    """Whether a reader unpacks these maps however small they are packed."""
    return max((id_map.nbytes for id_map in maps.values()), default=0) + 4096 <= MAP_BYTES
