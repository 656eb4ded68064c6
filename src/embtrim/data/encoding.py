"""Encode a raw log into an EncodedDataset: schema, splits, vocabulary from the training rows, ids on disk.

All fields are read once, chunk by chunk, each by another thread while the one before it is in use. Their values get
codes in the order in which they come (numbering.py), and rows go to disk with these codes, 4 bytes a value. Then the codes of the
training rows are counted, which gives the vocabulary and its ids, and the codes are written again as ids. Before that are
passes over single columns, where they are needed: over the time column if a split by quantiles of time asks for it, and over
those whose transform is learned (quantile edges, mean and std). Only training rows are learned from.

Memory: bounded whatever the number of rows, by about 600 MB for 16 MB chunks of text or slices of parquet, plus what
distinct values take: about 150 bytes for each distinct text, or none for a hashed field. Quantiles (of fields and of time) are
exact up to SAMPLE_ROWS values, and beyond that come from a seeded sample of that many rows. Disk: twice the ids, until
the end.

Splits do not depend on the size of chunks: a row's part is a hash (splitmix64) of the seed and of its index in the log.

The output is written to a working folder beside the target and renamed: a run that fails, or is interrupted, leaves the
target as it was. The working folder of an interrupted or killed run holds a checkpoint, from which the same call goes on
(see encoding_state.py); passes that are finished are not made again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import polars as pl

from embtrim._version import __version__
from embtrim.data.dataset import FORMAT_VERSION, SPLITS, EncodedDataset
from embtrim.data.drafting import draft_schema, infer_schema
from embtrim.data.encoder import Encoder, dense_values, digest, needed_columns, number_columns, to_numbers
from embtrim.data.encoding_state import CHECKPOINT_VERSION, Coded, Work, check_target, working_folder
from embtrim.data.numbering import Numbering
from embtrim.data.reading import (
    CHUNK_BYTES,
    START,
    Chunk,
    Format,
    Position,
    RawLog,
    ReadOptions,
    Source,
    open_log,
    read_ahead,
)
from embtrim.data.splitting import Sample, Split, Splitter, choose_split
from embtrim.errors import DataError
from embtrim.schema import Schema
from embtrim.system.files import flush_file

__all__ = ["Encoder", "ReadOptions", "Split", "encode", "infer_schema", "open_log"]

# Training rows whose codes are counted together: a pass over all counts pays for that many, and a column of them is in memory.
COUNTED_ROWS = 2_000_000

logger = logging.getLogger(__name__)


def encode(
    source: Source,
    schema: Schema | str | Path | None = None,
    *,
    label: str | None = None,
    out: str | Path,
    split: Split | str | None = None,
    valid: Source | None = None,
    test: Source | None = None,
    seed: int = 0,
    format: Format | None = None,
    header: bool = True,
    columns: Sequence[str] | None = None,
    separator: str | None = None,
    encoding: Literal["utf-8", "latin-1"] = "utf-8",
    quoted: bool | None = None,
    overwrite: bool = False,
    progress: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
    checkpoint_seconds: float | None = 60.0,
) -> EncodedDataset:
    """Encode a raw log into a folder and open it.

    Interrupted, killed, or out of disk space, it leaves its work in `.<name of out>.encoding` beside `out`, and the same call
    goes on from the last checkpoint there, to the same result. It starts anew, with a warning, if anything that the result
    depends on has changed since: a source (by size and time of change), the schema, the split, the seed, how the log is
    read, or the version of embtrim, polars or numpy. A fault in the data removes the work. For a frame there are no
    checkpoints.

    Args:
        source: path, paths, glob, folder or polars DataFrame; the training rows if `valid` or `test` is given.
        schema: the fields, or a TOML file with them; None infers a draft and writes it to `<out>.schema.toml`.
        label: the label column; needed without a schema unless the column has a usual name (label, click, ..).
        out: folder to write.
        split: how `source` is divided, such as "8:1:1" (the default) or "time:8:1:1"; with `valid` and `test` given,
            all of `source` is for training, unless a split is asked for whose parts for the given files are 0.
        valid: a log with the validation rows.
        test: a log with the test rows.
        seed: of the random split and of the sample for quantiles.
        format: see `ReadOptions`, like `header`, `columns`, `separator`, `encoding` and `quoted`.
        header: whether the first line of text names the columns.
        columns: names of the columns.
        separator: between cells of text.
        encoding: of text.
        quoted: whether `"` quotes cells.
        overwrite: replace an encoded dataset at `out`; anything else there is never touched.
        progress: show a bar on stderr for what takes longer than two seconds.
        chunk_bytes: bytes of text read at a time.
        checkpoint_seconds: least time between two checkpoints while values are counted and ids written; None makes no
            checkpoint at all.

    Raises:
        DataError: a column is missing; a label, number or weight cannot be used (with file and line); a split is empty or
            has one class only; `out` exists, or another run is making it; the disk is full.
        KeyboardInterrupt: at Ctrl-C, with a message if the same call can go on.

    Example:
        >>> import polars as pl, tempfile
        >>> log = pl.DataFrame({"click": [0, 1] * 50, "user": ["ann", "bob", "eve", "eve"] * 25})
        >>> data = encode(log, label="click", out=tempfile.mkdtemp() + "/data")
        >>> data.schema.tables
        {'user': 4}
    """
    options = ReadOptions(
        format=format,
        header=header,
        columns=None if columns is None else tuple(columns),
        separator=separator,
        encoding=encoding,
        quoted=quoted,
    )
    target = Path(out).expanduser()
    check_target(target, overwrite)
    logs = {"train": open_log(source, options)}
    for name, given in (("valid", valid), ("test", test)):
        if given is not None:
            logs[name] = open_log(given, options)
    chosen = choose_split(split, given=[name for name in logs if name != "train"])
    draft_path = None
    if schema is None:
        schema = draft_schema(logs["train"], label)
        draft_path = target.with_name(target.name + ".schema.toml")
        _check_draft(schema, draft_path)
    elif isinstance(schema, (str, Path)):
        schema = Schema.load_draft(schema)
    if label is not None and label != schema.label:
        schema = schema.replace(label=label)
    schema = _as_draft(schema)
    _check_logs(logs, schema, chosen)
    data = _encode_logs(
        target, logs, schema, None, chosen, seed, options, partial(_fit_encoder, schema), {}, overwrite=overwrite,
        progress=progress, chunk_bytes=chunk_bytes, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    if draft_path is not None:
        _write_draft(schema, draft_path)
    return data


def encode_further(
    source: Source,
    encoder: Encoder,
    extend: Callable[[dict[str, pl.DataFrame], Path], Encoder],
    *,
    out: str | Path,
    split: str | None = None,
    min_count: int | None = None,
    seed: int = 0,
    options: ReadOptions,
    inputs: Mapping[str, Any],
    progress: bool = False,
) -> EncodedDataset:
    """Encode another log of an encoder's columns, with the encoder extended by values of its training rows.

    Interrupted, it goes on as `encode` does.

    Args:
        source: the log, as for `encode`.
        encoder: its fields, labels and transforms are taken as they are.
        extend: makes the encoder from the values that occur at least `min_count` times in the training rows - by table a
            frame of value, id and count, as `Numbering.vocabularies` gives them - and from the folder, in which files
            that it writes stay with the data.
        out: folder to write; an encoded dataset there is replaced.
        split: as for `encode`.
        min_count: of all listed fields; None takes each field's own.
        seed: of the random split.
        options: how the log is read.
        inputs: all that `extend` depends on, as JSON.
        progress: show a bar on stderr.

    Raises:
        DataError: as `encode`.
    """
    target = Path(out)
    check_target(target, overwrite=True)
    logs = {"train": open_log(source, options)}
    chosen = choose_split(split, given=[])
    counted = encoder.schema
    if min_count is not None:
        listed = {f.name for f in counted.id_fields if not f.hash_size}
        fields = [f.replace(min_count=min_count) if f.name in listed else f for f in counted.fields]
        counted = counted.replace(fields=tuple(fields))
    _check_logs(logs, counted, chosen)
    return _encode_logs(
        target, logs, counted, encoder.transforms, chosen, seed, options,
        lambda vocabularies, _, folder: extend(vocabularies, folder), inputs,
        overwrite=True, progress=progress, chunk_bytes=CHUNK_BYTES, checkpoint_seconds=60.0,
    )  # fmt: skip


def _check_logs(logs: Mapping[str, RawLog], schema: Schema, chosen: Split | None) -> None:
    """Raise DataError unless the logs have the columns that the schema and the split need."""
    if chosen is not None and chosen.by == "time" and schema.time is None:
        raise DataError("a split by time needs the schema's time column; set time = '<column>' in the schema")
    for name, log in logs.items():
        by_time = name == "train" and chosen is not None and chosen.by == "time"
        log.require(_raw_columns(schema, with_time=by_time))


def _encode_logs(
    target: Path,
    logs: Mapping[str, RawLog],
    schema: Schema,
    transforms: Mapping[str, Mapping[str, Any]] | None,
    chosen: Split | None,
    seed: int,
    options: ReadOptions,
    fit: Callable[[dict[str, pl.DataFrame], Mapping[str, Mapping[str, Any]], Path], Encoder],
    more_inputs: Mapping[str, Any],
    *,
    overwrite: bool,
    progress: bool,
    chunk_bytes: int,
    checkpoint_seconds: float | None,
) -> EncodedDataset:
    """Make the encoder by `fit`, of the vocabularies and transforms of the training rows (None: to be learned), and write all
    rows as its ids."""
    started = time.perf_counter()
    sources = {name: log.identity() for name, log in logs.items()}
    if None in sources.values():
        checkpoint_seconds = None
    inputs = {
        "versions": [CHECKPOINT_VERSION, __version__, pl.__version__, np.__version__],
        "schema": schema.model_dump(mode="json"),
        "split": None if chosen is None else chosen.model_dump(mode="json"),
        "seed": seed,
        "read options": options.model_dump(mode="json"),
        "chunk_bytes": chunk_bytes,
        "source files": sources,
        **more_inputs,
    }
    bar = _Bar(progress)
    with working_folder(target, overwrite, inputs, checkpoint_seconds) as work, bar:
        seconds_before = work.checkpoint.seconds
        splitter = Splitter(chosen, schema, seed)
        _learn_cuts(splitter, logs["train"], chunk_bytes, bar, work)
        if transforms is None:
            transforms = work.checkpoint.transforms
        if transforms is None:
            transforms = _fit_transforms(schema, logs["train"], splitter, seed, chunk_bytes, bar)
            if transforms:
                work.save(transforms=transforms)
        numbering = Numbering(schema, transforms)
        parts = {name: (log, splitter if name == "train" else SPLITS.index(name)) for name, log in logs.items()}
        coded = _write_codes(numbering, parts, chunk_bytes, bar, work)
        num_rows = {name: sum(coded.blocks[name]) for name in SPLITS if name in coded.blocks}
        positives = {name: coded.positives[name] for name in num_rows}
        _check_splits(num_rows, positives, schema.label, chosen, list(logs))
        if work.checkpoint.is_fitted:
            encoder = Encoder.load(work.folder)
        else:
            encoder = fit(
                numbering.vocabularies(_groups_of_training_codes(coded, schema, bar, work)), transforms, work.folder
            )
            encoder.save(work.folder)
        _write_ids(numbering, encoder, coded, bar, work)
        seconds = seconds_before + time.perf_counter() - started
        meta = {
            "format_version": FORMAT_VERSION,
            "num_rows": num_rows,
            "positives": positives,
            "sources": {name: log.describe() for name, log in logs.items()},
            "read_options": options.model_dump(mode="json", exclude_none=True),
            "split": None if chosen is None else {**chosen.model_dump(mode="json"), "cuts": splitter.cuts},
            "seed": seed,
            "seconds": round(seconds, 3),
        }
        (work.folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    listed = ", ".join(f"{name} {n:,}" for name, n in num_rows.items())
    logger.info("encoded %s rows into %s in %.1f s", listed, target, seconds)
    return EncodedDataset.load(target)


# --- fitting ----------------------------------------------------------------------------------------------------------


def _learn_cuts(splitter: Splitter, log: RawLog, chunk_bytes: int, bar: _Bar, work: Work) -> None:
    """Find the moments at which to cut, if the split is by time."""
    if splitter.column is None:
        return
    if work.checkpoint.cuts is not None:
        splitter.cuts, splitter.is_text = list(work.checkpoint.cuts), work.checkpoint.times_are_text
        return
    splitter.learn_cuts(log, chunk_bytes, bar.update)
    work.save(cuts=splitter.cuts, times_are_text=splitter.is_text)


def _fit_transforms(
    schema: Schema, log: RawLog, splitter: Splitter, seed: int, chunk_bytes: int, bar: _Bar
) -> dict[str, dict[str, Any]]:
    """Quantile edges, and mean and std, from the training rows."""
    fitted = [f for f in schema.fields if f.transform == "standard" or (f.transform or "").startswith("quantile:")]
    if not fitted:
        return {}
    samples = {f.name: Sample(seed) for f in fitted if f.transform != "standard"}
    moments = {f.name: _Moments() for f in fitted if f.transform == "standard"}
    columns = [f.raw_column for f in fitted]
    numbers = set(columns) & set(number_columns(schema))
    if splitter.column is not None:
        columns.append(splitter.column)
    for chunk in read_ahead(log.chunks(columns, chunk_bytes, numbers=numbers)):
        is_train_N = splitter.assign(chunk) == 0
        values = to_numbers(chunk.frame, fitted, schema, chunk.locate)
        for name in samples:
            rows = np.flatnonzero(is_train_N & values[name].is_not_null().to_numpy())
            samples[name].add(chunk.first_row, values[name].gather(rows), rows)
        for name, moment in moments.items():
            moment.add(values[name].filter(pl.Series(is_train_N)).drop_nulls().to_numpy())
        bar.update("reading numbers", chunk.done)
    transforms: dict[str, dict[str, Any]] = {}
    for f in fitted:
        if f.transform == "standard":
            transforms[f.name] = moments[f.name].result()
        else:
            num_buckets = int((f.transform or "").partition(":")[2])
            transforms[f.name] = {"edges": quantile_edges(samples[f.name].values().to_numpy(), num_buckets)}
    return transforms


def _fit_encoder(
    schema: Schema,
    vocabularies: dict[str, pl.DataFrame],
    transforms: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> Encoder:
    """The encoder of a new dataset."""
    fields = []
    for field_spec in schema.fields:
        if field_spec.type != "dense":
            kept = field_spec.hash_size or vocabularies[field_spec.table_name].height
            field_spec = field_spec.replace(vocab_size=1 + kept)
        fields.append(field_spec)
    encoded = schema.replace(fields=tuple(fields), vocabulary_digest=digest(vocabularies, transforms))
    return Encoder(encoded, vocabularies, transforms)


def quantile_edges(values: np.ndarray, num_buckets: int) -> list[float]:
    """Edges that divide values into buckets of equal size as far as ties allow; rising, at most num_buckets - 1.

    Example:
        >>> quantile_edges(np.array([1.0, 2, 3, 4, 5, 6]), 3)
        [3.0, 5.0]
    """
    ordered = np.sort(values)
    if not len(ordered):
        return []
    edges = np.unique(ordered[len(ordered) * np.arange(1, num_buckets) // num_buckets])
    return [float(edge) for edge in edges if edge > ordered[0]]


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations, merged chunk by chunk (Chan et al.)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        if not len(values):
            return
        mean, count = float(values.mean()), self.count + len(values)
        delta = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + delta * delta * self.count * len(values) / count
        self.mean += delta * len(values) / count
        self.count = count

    def result(self) -> dict[str, float]:
        std = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return {"mean": self.mean, "std": std if std > 0 else 1.0}


# --- labels and weights -----------------------------------------------------------------------------------------------


def read_labels(chunk: Chunk, column: str) -> np.ndarray:
    """Labels of a chunk: float32 (N,), 0 or 1.

    Raises:
        DataError: a label is missing, or is not 0, 1, true or false; names file and line.
    """
    raw = chunk.frame[column]
    if not (raw.dtype.is_numeric() or raw.dtype in (pl.String, pl.Boolean, pl.Null, pl.Categorical, pl.Enum)):
        raise DataError(f"label column {column!r} holds {raw.dtype}; it must hold 0 and 1, or true and false")
    raw = raw.cast(pl.String) if raw.dtype in (pl.Categorical, pl.Enum) else raw
    labels = raw.cast(pl.Float64, strict=False)
    if raw.dtype == pl.String and labels.null_count() > raw.null_count():
        word = raw.str.strip_chars().str.to_lowercase()
        is_word = word.is_in(["true", "false"]).fill_null(False)
        labels = labels.fill_null(word.cast(pl.Float64, strict=False)).set(is_word, None)
        labels = labels.fill_null((word == "true").cast(pl.Float64).set(~is_word, None))
    bad = (~labels.is_in([0.0, 1.0])).fill_null(True).arg_true()
    if len(bad):
        value = raw[bad[0]]
        if value is None or value != value:
            raise DataError(f"{chunk.locate(bad[0])}: label {column!r} is missing; drop the row or fill it in")
        raise DataError(
            f"{chunk.locate(bad[0])}: label {column!r} is {value!r}; a label is 0 or 1, or true or false: "
            "is this the right column?"
        )
    return labels.cast(pl.Float32).to_numpy()


def read_weights(chunk: Chunk, column: str) -> np.ndarray:
    """Sample weights of a chunk: float32 (N,), finite in it, not negative.

    Raises:
        DataError: a weight is missing, no number, infinite or negative; names file and line.
    """
    raw = chunk.frame[column]
    weights = raw.cast(pl.Float64, strict=False).cast(pl.Float32)
    bad = (~(weights.is_finite() & (weights >= 0))).fill_null(True).arg_true()
    if len(bad):
        raise DataError(
            f"{chunk.locate(bad[0])}: weight {column!r} is {raw[bad[0]]!r}; a weight is a finite number, 0 or more"
        )
    return weights.to_numpy()


# --- writing ----------------------------------------------------------------------------------------------------------


class _ArrayFile:
    """An .npy file written row by row: appended, not mapped, so that a full disk is an error and not a crash."""

    HEADER_BYTES = 128

    def __init__(self, path: Path, dtype: str, num_columns: int | None, num_rows: int) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.num_columns = num_columns
        self.num_rows = num_rows
        self.file: IO[bytes] = open(path, "r+b" if num_rows else "wb", buffering=1 << 20)  # noqa: SIM115 - closed by _closed_at_the_end
        if num_rows:
            self.file.seek(0, os.SEEK_END)
        else:
            self.file.write(bytes(self.HEADER_BYTES))

    def append(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, self.dtype).data if rows.size else b"")
        self.num_rows += len(rows)

    def flush(self) -> int:
        """Wait until all rows are on the disk; the length of the file in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def complete(self) -> None:
        """Write the header and close the file."""
        shape = (self.num_rows,) if self.num_columns is None else (self.num_rows, self.num_columns)
        text = repr({"descr": self.dtype.str, "fortran_order": False, "shape": shape}).encode()
        room = self.HEADER_BYTES - 10
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", room) + text.ljust(room - 1) + b"\n")
        self.file.close()


class _SplitWriter:
    """The files of one split that are written while the log is read: all but the ids. Codes come in blocks (C, N)."""

    def __init__(self, work: Work, name: str, schema: Schema, blocks: Sequence[int] = (), positives: int = 0) -> None:
        folder = work.folder / name
        folder.mkdir(exist_ok=True)
        self.blocks, self.positives = list(blocks), positives
        array_file = partial(_ArrayFile, num_rows=sum(blocks))
        self.codes = _ArrayFile(work.codes / f"{name}.npy", "<i4", None, sum(blocks) * schema.num_id_columns)
        self.labels = array_file(folder / "labels.npy", "<f4", None)
        self.dense = array_file(folder / "dense.npy", "<f4", len(schema.dense_fields)) if schema.dense_fields else None
        self.weights = array_file(folder / "weights.npy", "<f4", None) if schema.weight else None

    def files(self) -> list[_ArrayFile]:
        return [file for file in (self.codes, self.labels, self.dense, self.weights) if file is not None]


def _write_codes(
    numbering: Numbering,
    parts: Mapping[str, tuple[RawLog, Splitter | int]],
    chunk_bytes: int,
    bar: _Bar,
    work: Work,
) -> Coded:
    """Read every log and append its rows to their splits, values as codes."""
    schema, done = numbering.schema, work.checkpoint.coded
    if (texts := work.texts()) is not None:
        numbering.restore(pl.read_parquet(texts))
    if work.checkpoint.is_fitted:
        return done
    writers: dict[str, _SplitWriter] = {}
    with _closed_at_the_end() as files:
        for name, blocks in done.blocks.items():
            writers[name] = _SplitWriter(work, name, schema, blocks, done.positives[name])
            files.extend(writers[name].files())
        for index, (log, splitter) in enumerate(parts.values()):
            if index < done.log:
                continue
            start = done.position if index == done.log else START
            by_time = isinstance(splitter, Splitter) and splitter.column is not None
            columns = _raw_columns(schema, with_time=by_time)
            for chunk in read_ahead(log.chunks(columns, chunk_bytes, start, number_columns(schema))):
                labels_N = read_labels(chunk, schema.label)
                weights_N = None if schema.weight is None else read_weights(chunk, schema.weight)
                codes_CN = numbering.codes(chunk)
                dense_NE = dense_values(chunk.frame, schema, numbering.transforms, chunk.locate)
                part_N = splitter.assign(chunk) if isinstance(splitter, Splitter) else None
                present = [splitter] if part_N is None else np.unique(part_N)
                for part in present:
                    name = SPLITS[part]  # type: ignore[call-overload]
                    if name not in writers:
                        writers[name] = _SplitWriter(work, name, schema)
                        files.extend(writers[name].files())
                    writer, rows = writers[name], slice(None) if part_N is None else part_N == part
                    block_CN = codes_CN[:, rows]
                    writer.codes.append(block_CN.ravel())
                    writer.blocks.append(block_CN.shape[1])
                    writer.labels.append(labels_N[rows])
                    writer.positives += int(labels_N[rows].sum())
                    if writer.dense is not None and dense_NE is not None:
                        writer.dense.append(dense_NE[rows])
                    if writer.weights is not None and weights_N is not None:
                        writer.weights.append(weights_N[rows])
                work.save_if_due(partial(_coded_so_far, numbering, writers, index, chunk.end, work))
                bar.update("reading", chunk.done)
    return _coded(writers, {_within(file.path, work): file.path.stat().st_size for file in files})


def _coded_so_far(
    numbering: Numbering, writers: Mapping[str, _SplitWriter], log: int, position: Position, work: Work
) -> dict[str, Any]:
    """What a checkpoint of the reading holds, once all of it is on the disk."""
    num_bytes = {_within(file.path, work): file.flush() for writer in writers.values() for file in writer.files()}
    coded = _coded(writers, num_bytes).replace(log=log, position=position)
    return {"coded": coded, "files": [_write_texts(numbering, work)]}


def _coded(writers: Mapping[str, _SplitWriter], num_bytes: Mapping[str, int]) -> Coded:
    return Coded(
        blocks={name: tuple(writer.blocks) for name, writer in writers.items()},
        positives={name: writer.positives for name, writer in writers.items()},
        num_bytes=dict(num_bytes),
    )


def _write_texts(numbering: Numbering, work: Work) -> Path:
    path = work.new_texts()
    numbering.state().write_parquet(path, compression="lz4")
    return path


def _blocks_of_codes(name: str, coded: Coded, schema: Schema, work: Work) -> Iterator[np.ndarray]:
    """The codes of a split, block by block: int32 (C, N), mapped."""
    codes = np.load(work.codes / f"{name}.npy", mmap_mode="r")
    start = 0
    for num_rows in coded.blocks[name]:
        end = start + num_rows * schema.num_id_columns
        yield codes[start:end].reshape(schema.num_id_columns, num_rows)
        start = end


def _groups_of_training_codes(coded: Coded, schema: Schema, bar: _Bar, work: Work) -> Iterator[list[np.ndarray]]:
    """The blocks of the training rows, of COUNTED_ROWS or more together."""
    group: list[np.ndarray] = []
    counted, before = 0, 0
    for block in _blocks_of_codes("train", coded, schema, work):
        group.append(block)
        counted += block.shape[1]
        if counted - before >= COUNTED_ROWS:
            yield group
            group, before = [], counted
            bar.update("counting values", counted / sum(coded.blocks["train"]))
    if group:
        yield group


def _write_ids(numbering: Numbering, encoder: Encoder, coded: Coded, bar: _Bar, work: Work) -> None:
    """Write the codes of all splits once more, as ids."""
    schema, encoded = numbering.schema, numbering.encoded_by(encoder)
    row_bytes = 4 * schema.num_id_columns
    num_bytes = dict(work.checkpoint.num_bytes)
    total, seen = sum(map(sum, coded.blocks.values())), 0
    for name in coded.blocks:
        path = work.folder / name / "ids.npy"
        written = max(0, num_bytes.get(_within(path, work), 0) - _ArrayFile.HEADER_BYTES) // row_bytes
        with _closed_at_the_end() as files:
            ids = _ArrayFile(path, "<i4", schema.num_id_columns, written)
            files.append(ids)
            blocks, skipped = _blocks_of_codes(name, coded, schema, work), 0
            while skipped < written:
                skipped += next(blocks).shape[1]
            for ids_NC in read_ahead(np.ascontiguousarray(encoded(codes_CN).T) for codes_CN in blocks):
                ids.append(ids_NC)
                num_bytes[_within(path, work)] = _ArrayFile.HEADER_BYTES + ids.num_rows * row_bytes
                work.save_if_due(partial(_written_so_far, numbering, coded, ids, num_bytes, work))
                bar.update("writing ids", (seen + ids.num_rows) / total)
        seen += ids.num_rows


def _written_so_far(
    numbering: Numbering, coded: Coded, ids: _ArrayFile, num_bytes: Mapping[str, int], work: Work
) -> dict[str, Any]:
    """What a checkpoint of the writing holds, once all of it is on the disk."""
    ids.flush()
    if work.checkpoint.is_fitted:
        return {"num_bytes": num_bytes}
    for name in [*coded.num_bytes, *num_bytes]:
        flush_file(work.root / name)
    files = [_write_texts(numbering, work), *(path for path in work.folder.iterdir() if path.is_file())]
    return {"coded": coded, "is_fitted": True, "num_bytes": num_bytes, "files": files}


def _within(path: Path, work: Work) -> str:
    return path.relative_to(work.root).as_posix()


@contextlib.contextmanager
def _closed_at_the_end() -> Iterator[list[_ArrayFile]]:
    """A list of files to be completed at the end; after an error they are only closed."""
    files: list[_ArrayFile] = []
    try:
        yield files
        for file in files:
            file.complete()
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                file.file.close()


def _check_splits(
    num_rows: Mapping[str, int], positives: Mapping[str, int], label: str, split: Split | None, logs: Sequence[str]
) -> None:
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


class _Bar:
    """A progress bar on stderr that appears after two seconds, if at all."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.started = time.monotonic()
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, stage: str, done: float) -> None:
        """Show how far a stage is, 0..1."""
        if not self.enabled or time.monotonic() - self.started < 2:
            return
        if self._progress is None:
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(stage, total=1.0)
            self._progress.start()
        self._progress.update(self._task, description=stage, completed=done)


# --- the schema of a run ----------------------------------------------------------------------------------------------


def _raw_columns(schema: Schema, with_time: bool) -> list[str]:
    extra = [schema.weight, schema.time if with_time else None]
    return [schema.label, *needed_columns(schema), *(name for name in extra if name is not None)]


def _as_draft(schema: Schema) -> Schema:
    """The schema without what encoding fills in."""
    fields = tuple(spec.replace(vocab_size=None) for spec in schema.fields)
    return schema.replace(fields=fields, vocabulary_digest=None)


def _check_draft(schema: Schema, path: Path) -> None:
    if path.exists() and Schema.load_draft(path) != schema:
        raise DataError(
            f"{path} exists and is not what would be inferred now; pass it as schema (--schema), or remove it"
        )


def _write_draft(schema: Schema, path: Path) -> None:
    if path.exists():
        return
    schema.save_draft(path)
    logger.info("wrote the inferred schema to %s; edit it and pass it as schema to encode again", path)
