"""What encoding writes: array files, the rows of each split as codes, and the codes once more as ids.

Shapes: N rows, C id columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embtrim.data.array_file import ArrayFile, completed_at_the_end
from embtrim.data.cells import dense_values, log_columns, number_columns
from embtrim.data.dataset import SPLITS
from embtrim.data.encoder import Encoder
from embtrim.data.encoding_state import Coded, WorkingFolder
from embtrim.data.labels import read_labels, read_weights
from embtrim.data.log_file import START, Chunk
from embtrim.data.numbering import Numbering
from embtrim.data.reading import RawLog, read_ahead
from embtrim.data.splitting import Splitter
from embtrim.data.tally import NumberSample, sample_of
from embtrim.schema import Schema
from embtrim.system.files import flush_file
from embtrim.system.progress import Counter

# Training rows whose codes are counted together. Each group costs a pass over all counts and holds one column in
# memory.
COUNTED_ROWS = 2_000_000


class _SplitWriter:
    """The files of one split that are written while the log is read: all except the ids.

    Attributes:
        blocks: Rows of each block of codes written.
        positives: Rows with label 1 written.
        codes: The codes, block by block, each of shape (C, N).
        labels: The labels.
        dense: The dense values, or None if the schema has no dense field.
        weights: The sample weights, or None if the schema has no weight column.
        numbers: The sampled numbers, or None if the schema has no numeric and no dense field.
        dense_missing: Missing values written of each dense field: int64 (E,).
    """

    def __init__(self, work: WorkingFolder, name: str, schema: Schema, done: Coded) -> None:
        folder = work.folder / name
        folder.mkdir(exist_ok=True)
        blocks = done.blocks.get(name, ())
        self.blocks, self.positives = list(blocks), done.positives.get(name, 0)
        self.dense_missing = np.array(done.dense_missing.get(name, [0] * len(schema.dense_fields)), np.int64)
        num_numbers = sum(field.type in ("numeric", "dense") for field in schema.fields)
        self.numbers = None
        if num_numbers:
            path = numbers_path(work.codes, name)
            self.numbers = ArrayFile(path, "<f8", num_numbers, num_rows=done.num_sampled.get(name, 0))
        array_file = partial(ArrayFile, num_rows=sum(blocks))
        self.codes = ArrayFile(work.codes / f"{name}.npy", "<i4", None, sum(blocks) * schema.num_id_columns)
        self.labels = array_file(folder / "labels.npy", "<f4", None)
        self.dense = array_file(folder / "dense.npy", "<f4", len(schema.dense_fields)) if schema.dense_fields else None
        self.weights = array_file(folder / "weights.npy", "<f4", None) if schema.weight else None

    def files(self) -> list[ArrayFile]:
        """The open files."""
        return [file for file in (self.codes, self.labels, self.dense, self.weights, self.numbers) if file is not None]

    def append(
        self,
        codes_CN: np.ndarray,
        labels_N: np.ndarray,
        dense_NE: np.ndarray | None,
        weights_N: np.ndarray | None,
        numbers_NK: np.ndarray,
    ) -> None:
        """Append rows as one block, and the numbers of those among them that are in the sample."""
        self.codes.append(codes_CN.ravel())
        self.blocks.append(codes_CN.shape[1])
        self.labels.append(labels_N)
        self.positives += int(labels_N.sum())
        if self.dense is not None and dense_NE is not None:
            self.dense_missing += np.isnan(dense_NE).sum(0)
            self.dense.append(np.nan_to_num(dense_NE))
        if self.weights is not None and weights_N is not None:
            self.weights.append(weights_N)
        if self.numbers is not None:
            self.numbers.append(numbers_NK)


def write_codes(
    numbering: Numbering,
    parts: Mapping[str, tuple[RawLog, Splitter | int]],
    chunk_bytes: int,
    bar: Counter,
    work: WorkingFolder,
) -> Coded:
    """Read every log and append its rows to their splits, values as codes.

    Args:
        numbering: Gives the codes; it is set back to the last checkpoint.
        parts: By name, a log and what divides it: a `Splitter`, or the index in SPLITS of the split of all its rows.
        chunk_bytes: Bytes of text read at a time.
        bar: Shows how far the reading is.
        work: The working folder.

    Raises:
        DataError: A label, weight or value cannot be used; the message names file and line.
    """
    schema, done = numbering.schema, work.state.coded
    if (texts := work.texts()) is not None:
        numbering.restore(pl.read_parquet(texts, glob=False))
    if work.state.is_fitted:
        return done
    writers: dict[str, _SplitWriter] = {}
    skipped = dict(done.skipped)
    with completed_at_the_end() as files:
        for name in done.blocks:
            writers[name] = _SplitWriter(work, name, schema, done)
            files.extend(writers[name].files())
        for index, (part, (log, splitter)) in enumerate(parts.items()):
            if index < done.log:
                continue
            start = done.position if index == done.log else START
            by_time = isinstance(splitter, Splitter) and splitter.column is not None
            columns, sample = log_columns(schema, with_time=by_time), sample_of(schema, log)
            for chunk in read_ahead(log.chunks(columns, chunk_bytes, start, number_columns(schema))):
                _append_chunk(chunk, numbering, sample, splitter, writers, files, work)
                at = {"log": index, "position": chunk.end, "skipped": skipped}
                work.save_if_due(partial(_coded_so_far, numbering, writers, at, work))
                bar.reach("reading", chunk.done)
            skipped[part] = log.skipped
    num_bytes = {_within(file.path, work): file.path.stat().st_size for file in files}
    return _coded(writers, num_bytes).replace(skipped=skipped)


def _append_chunk(
    chunk: Chunk,
    numbering: Numbering,
    sample: NumberSample,
    splitter: Splitter | int,
    writers: dict[str, _SplitWriter],
    files: list[ArrayFile],
    work: WorkingFolder,
) -> None:
    """Append the rows of a chunk to their splits; a new split adds its writer to `writers` and its files to `files`."""
    schema = numbering.schema
    labels_N = read_labels(chunk, schema)
    weights_N = None if schema.weight is None else read_weights(chunk, schema.weight)
    codes_CN = numbering.codes(chunk)
    dense_NE = dense_values(chunk.frame, schema, numbering.transforms, chunk.locate)
    sampled = sample.rows(chunk.first_row, chunk.frame.height)
    numbers_NK = sample.numbers(chunk.frame, sampled)
    part_N = splitter.assign(chunk) if isinstance(splitter, Splitter) else None
    for part in [splitter] if part_N is None else np.unique(part_N):
        name = SPLITS[part]  # type: ignore[call-overload]
        if name not in writers:
            writers[name] = _SplitWriter(work, name, schema, Coded())
            files.extend(writers[name].files())
        rows = slice(None) if part_N is None else part_N == part
        dense = None if dense_NE is None else dense_NE[rows]
        weights = None if weights_N is None else weights_N[rows]
        numbers = numbers_NK if part_N is None else numbers_NK[part_N[sampled] == part]
        writers[name].append(codes_CN[:, rows], labels_N[rows], dense, weights, numbers)


def _coded_so_far(
    numbering: Numbering, writers: Mapping[str, _SplitWriter], at: Mapping[str, Any], work: WorkingFolder
) -> dict[str, Any]:
    """What a checkpoint of the reading holds, once all of it is on the disk."""
    num_bytes = {_within(file.path, work): file.flush() for writer in writers.values() for file in writer.files()}
    coded = _coded(writers, num_bytes).replace(**at)
    return {"coded": coded, "files": [_write_texts(numbering, work)]}


def _coded(writers: Mapping[str, _SplitWriter], num_bytes: Mapping[str, int]) -> Coded:
    return Coded(
        blocks={name: tuple(writer.blocks) for name, writer in writers.items()},
        positives={name: writer.positives for name, writer in writers.items()},
        dense_missing={name: tuple(map(int, writer.dense_missing)) for name, writer in writers.items()},
        num_sampled={name: writer.numbers.num_rows for name, writer in writers.items() if writer.numbers is not None},
        num_bytes=dict(num_bytes),
    )


def _write_texts(numbering: Numbering, work: WorkingFolder) -> Path:
    path = work.new_texts()
    numbering.state().write_parquet(path, compression="lz4")
    return path


def blocks_of_codes(name: str, coded: Coded, schema: Schema, folder: Path) -> Iterator[np.ndarray]:
    """The codes of a split in a folder of codes, block by block: int32 (C, N), memory-mapped."""
    codes = np.load(folder / f"{name}.npy", mmap_mode="r")
    start = 0
    for num_rows in coded.blocks[name]:
        end = start + num_rows * schema.num_id_columns
        yield codes[start:end].reshape(schema.num_id_columns, num_rows)
        start = end


def groups_of_training_codes(
    coded: Coded, schema: Schema, bar: Counter, work: WorkingFolder
) -> Iterator[list[np.ndarray]]:
    """The codes of the training rows, in groups of blocks with COUNTED_ROWS rows or more each."""
    group: list[np.ndarray] = []
    counted, before = 0, 0
    for block in blocks_of_codes("train", coded, schema, work.codes):
        group.append(block)
        counted += block.shape[1]
        if counted - before >= COUNTED_ROWS:
            yield group
            group, before = [], counted
            bar.reach("counting values", counted / sum(coded.blocks["train"]))
    if group:
        yield group


def write_ids(numbering: Numbering, encoder: Encoder, coded: Coded, bar: Counter, work: WorkingFolder) -> None:
    """Rewrite the codes of all splits as the encoder's ids."""
    schema, encoded = numbering.schema, numbering.encoded_by(encoder)
    row_bytes = 4 * schema.num_id_columns
    num_bytes = dict(work.state.num_bytes)
    total, seen = sum(map(sum, coded.blocks.values())), 0
    for name in coded.blocks:
        path = work.folder / name / "ids.npy"
        written = max(0, num_bytes.get(_within(path, work), 0) - ArrayFile.HEADER_BYTES) // row_bytes
        with completed_at_the_end() as files:
            ids = ArrayFile(path, "<i4", schema.num_id_columns, written)
            files.append(ids)
            blocks, skipped = blocks_of_codes(name, coded, schema, work.codes), 0
            while skipped < written:
                skipped += next(blocks).shape[1]
            for ids_NC in read_ahead(np.ascontiguousarray(encoded(codes_CN).T) for codes_CN in blocks):
                ids.append(ids_NC)
                num_bytes[_within(path, work)] = ArrayFile.HEADER_BYTES + ids.num_rows * row_bytes
                work.save_if_due(partial(_written_so_far, numbering, coded, ids, num_bytes, work))
                bar.reach("writing ids", (seen + ids.num_rows) / total)
        seen += ids.num_rows


def _written_so_far(
    numbering: Numbering, coded: Coded, ids: ArrayFile, num_bytes: Mapping[str, int], work: WorkingFolder
) -> dict[str, Any]:
    """What a checkpoint of the writing holds, once all of it is on the disk."""
    ids.flush()
    if work.state.is_fitted:
        return {"num_bytes": num_bytes}
    for name in [*coded.num_bytes, *num_bytes]:
        flush_file(work.root / name)
    files = [_write_texts(numbering, work), *(path for path in work.folder.iterdir() if path.is_file())]
    return {"coded": coded, "is_fitted": True, "num_bytes": num_bytes, "files": files}


def numbers_path(codes: Path, split: str) -> Path:
    """The file with the sampled numbers of a split: float64 (rows of the sample, numeric and dense fields)."""
    return codes / f"{split}-numbers.npy"


def _within(path: Path, work: WorkingFolder) -> str:
    return path.relative_to(work.root).as_posix()
