"""Encoded data as parquet parts, format version 2: what workers of an engine write, for other programs and object stores.

    folder/<split>/part-000012-000.parquet   rows of file 12 of the log, in their order; a large file has several parts
    folder/.arrays/<split>/                  the rows of all parts as arrays, made when the folder is first opened

A part has columns `id_0`, `id_1`, .. (int32, the id columns of the schema in order), `dense_0`, .. (float32, its dense fields),
`label` and, if the schema has a weight column, `weight` (float32). meta.json lists the parts of a split in the order of the
log, with their rows.

Training shuffles rows over a whole split, so it reads arrays, which are memory-mapped. A folder that cannot be written has
its arrays in the folder of temporary files, as a rank has those of its share.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
from pydantic import Field

from embtrim.config import Entry
from embtrim.data.array_file import array_files, completed_at_the_end
from embtrim.errors import DataError, first_line_of, shown
from embtrim.schema import Schema
from embtrim.system.files import write_then_rename

logger = logging.getLogger(__name__)

PART_ROWS = 1 << 20  # a part is closed once it has this many rows
GROUP_ROWS = 1 << 17  # rows that are packed, and unpacked, at a time


class Part(Entry):
    """A part as meta.json lists it.

    Attributes:
        file: Its name within the folder of its split.
        rows: Its rows.
    """

    file: Annotated[str, Field(pattern=r"^part-\d+-\d+\.parquet$")]
    rows: Annotated[int, Field(strict=True, ge=0)]


def part_name(number: int, index: int) -> str:
    """The name of a part of file `number` of the log."""
    return f"part-{number:06}-{index:03}.parquet"


def write_part(
    path: Path, ids_CN: np.ndarray, labels_N: np.ndarray, dense_NE: np.ndarray | None, weights_N: np.ndarray | None
) -> Part:
    """Write rows as one part, whole or not at all."""
    columns = {f"id_{c}": ids_N for c, ids_N in enumerate(ids_CN)}
    columns |= {f"dense_{e}": dense_N for e, dense_N in enumerate(() if dense_NE is None else dense_NE.T)}
    columns["label"] = labels_N
    if weights_N is not None:
        columns["weight"] = weights_N
    frame = pl.DataFrame({name: np.ascontiguousarray(values) for name, values in columns.items()})
    write_then_rename(path, lambda file: frame.write_parquet(file, row_group_size=GROUP_ROWS))
    return Part(file=path.name, rows=frame.height)


@contextlib.contextmanager
def unpacked(
    folder: Path, split: str, parts: Sequence[Part], schema: Schema, share: tuple[int, int] | None
) -> Iterator[Path]:
    """A folder with the arrays of a split inside a `with` block; maps of the arrays outlive it.

    Args:
        folder: The folder of encoded data.
        split: Name of the split.
        parts: Its parts.
        schema: The schema of the data.
        share: The first row and the end of the rows wanted; None for all rows.

    Raises:
        DataError: A part is missing, damaged, or not as meta.json and the schema say.
    """
    if share is None and (kept := _kept_arrays(folder, split, parts, schema)) is not None:
        yield kept
        return
    temporary = Path(tempfile.mkdtemp(prefix="embtrim-"))
    try:
        _unpack(temporary, folder / split, parts, schema, share or (0, sum(part.rows for part in parts)))
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _kept_arrays(folder: Path, split: str, parts: Sequence[Part], schema: Schema) -> Path | None:
    """The arrays that lie in the folder, made where they are missing or of other parts; None if it cannot be written."""
    place = folder / ".arrays" / split
    state = json.dumps([[part.file, *_version(folder / split / part.file)] for part in parts])
    with contextlib.suppress(OSError):
        if (place / "parts.json").read_text("utf-8") == state:
            return place
    new = place.with_name(f".{split}.{uuid.uuid4().hex[:8]}")
    try:
        new.mkdir(parents=True)
    except OSError as error:
        logger.info("%s: arrays go to %s (%s)", folder, tempfile.gettempdir(), error.strerror)
        return None
    try:
        _unpack(new, folder / split, parts, schema, (0, sum(part.rows for part in parts)))
        (new / "parts.json").write_text(state, "utf-8")
        if place.exists():
            os.rename(place, f"{new}.old")
        with contextlib.suppress(OSError):  # another process was faster, with the same arrays
            os.rename(new, place)
    finally:
        for left in (new, Path(f"{new}.old")):
            shutil.rmtree(left, ignore_errors=True)
    return place


def _version(path: Path) -> tuple[int, int]:
    """Bytes and modification time of a part."""
    try:
        stat = path.stat()
    except OSError:
        raise DataError(f"{path} does not exist; encode again") from None
    return stat.st_size, stat.st_mtime_ns


def _unpack(into: Path, folder: Path, parts: Sequence[Part], schema: Schema, rows: tuple[int, int]) -> None:
    """Write rows of the parts of a split as arrays; a group of rows is in memory at a time."""
    logger.info("unpacking %s rows of %s", f"{rows[1] - rows[0]:,}", folder)
    try:
        with completed_at_the_end() as files:
            files.extend(array_files(into, schema))
            for frame in _frames_of_parts(folder, parts, schema, *rows):
                for file, columns in zip(files, _columns(schema), strict=True):
                    found = frame.select(columns).to_numpy()
                    file.append(found[:, 0] if file.num_columns is None else found)
    except OSError as error:
        raise DataError(
            f"the parts of {folder} cannot be unpacked into {into.parent} ({error.strerror or error}); make room there, or set "
            "TMPDIR to another folder"
        ) from None


def _frames_of_parts(
    folder: Path, parts: Sequence[Part], schema: Schema, start: int, end: int
) -> Iterator[pl.DataFrame]:
    """The rows `start` to `end` of a split, a group at a time."""
    first = 0
    for part in parts:
        if first < end and first + part.rows > start:
            inside = (max(start - first, 0), min(end - first, part.rows))
            yield from _frames(folder / part.file, part, schema, inside)
        first += part.rows


def _columns(schema: Schema) -> list[list[str]]:
    """The columns of a part by array file, as `array_files` lists them."""
    found = [[f"id_{c}" for c in range(schema.num_id_columns)], ["label"]]
    if schema.dense_fields:
        found.append([f"dense_{e}" for e in range(len(schema.dense_fields))])
    return [*found, ["weight"]] if schema.weight else found


def _frames(path: Path, part: Part, schema: Schema, rows: tuple[int, int]) -> Iterator[pl.DataFrame]:
    """Rows of a part, a group at a time."""
    names = [name for columns in _columns(schema) for name in columns]
    types = {name: pl.Int32 if name.startswith("id_") else pl.Float32 for name in names}
    try:
        found = dict(pl.read_parquet_schema(path))
        if set(found.items()) != set(types.items()):
            wrong = {name: str(found.get(name)) for name in types if found.get(name) != types[name]} or set(
                found
            ) - set(types)
            raise DataError(f"{path} does not have the columns of the schema ({shown(wrong)}); encode again")
        scan = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        if (height := int(scan.select(pl.len()).collect().item())) != part.rows:
            raise DataError(f"{path} holds {height:,} rows, meta.json says {part.rows:,}; encode again")
        for first in range(*rows, GROUP_ROWS):
            frame = scan.slice(first, min(GROUP_ROWS, rows[1] - first)).collect()
            if sum(frame.null_count().row(0)):
                raise DataError(f"{path} has missing values; encode again")
            yield frame
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; encode again") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read ({first_line_of(error)}); encode again") from None
