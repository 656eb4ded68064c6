"""The passes over the logs that make encoded data: in this process, or file by file on an engine, to the same result.

`InProcess` reads a log as a stream. `OnEngine` has workers read each file apart, by the functions of pieces.py, and puts
together what they return. Where the result depends on the order of rows, it uses their index in the log and not the order
in which workers finish. A first pass therefore counts the rows of each file.

Both have the same methods, which `encoding.py` calls one after the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from embtrim.data import pieces
from embtrim.data.array_file import make_arrays
from embtrim.data.dataset import SPLITS
from embtrim.data.encoder import Encoder
from embtrim.data.encoding_state import Coded, WorkingFolder
from embtrim.data.learning import Learned, learned_columns
from embtrim.data.log_file import Skipped
from embtrim.data.numbering import Numbering, sum_counted
from embtrim.data.parts import Part
from embtrim.data.pieces import Job, Piece, folder_of
from embtrim.data.profile import Counts
from embtrim.data.profiling import counts_of_split, sampled_numbers
from embtrim.data.reading import RawLog, read_ahead
from embtrim.data.splitting import Sample, Splitter
from embtrim.data.writing import groups_of_training_codes, write_codes, write_ids
from embtrim.engines.engine import Run
from embtrim.errors import DataError, EmbtrimError
from embtrim.schema import Schema
from embtrim.system.files import write_then_rename
from embtrim.system.progress import Counter

logger = logging.getLogger(__name__)

# Files whose counts are summed at once.
FAN_IN = 32


class InProcess:
    """The passes as this process makes them, one chunk after the other, into arrays."""

    parts = None

    def __init__(
        self, logs: Mapping[str, RawLog], seed: int, chunk_bytes: int, bar: Counter, work: WorkingFolder
    ) -> None:
        self._logs, self._seed, self._chunk_bytes, self._bar, self._work = logs, seed, chunk_bytes, bar, work

    def learn_cuts(self, splitter: Splitter, _schema: Schema) -> None:
        """Find the moments at which to cut the main log, which is split by time."""
        splitter.learn_cuts(self._logs["train"], self._chunk_bytes, self._bar.reach)

    def learn_transforms(self, splitter: Splitter, schema: Schema) -> dict[str, dict[str, Any]]:
        """What the transforms learn from the training rows, by field."""
        learned, (columns, numbers) = Learned(schema, self._seed), learned_columns(schema, splitter)
        for chunk in read_ahead(self._logs["train"].chunks(columns, self._chunk_bytes, numbers=numbers)):
            learned.add(chunk, splitter)
            self._bar.reach("reading numbers", chunk.done)
        return learned.transforms()

    def write_codes(self, numbering: Numbering, splitter: Splitter) -> Coded:
        """Write all rows as codes."""
        divides = {name: splitter if name == "train" else SPLITS.index(name) for name in self._logs}
        parts = {name: (log, divides[name]) for name, log in self._logs.items()}
        return write_codes(numbering, parts, self._chunk_bytes, self._bar, self._work)

    def count(self, numbering: Numbering, coded: Coded) -> None:
        """Count the values of the training rows."""
        numbering.count(groups_of_training_codes(coded, numbering.schema, self._bar, self._work))

    def write_ids(self, numbering: Numbering, encoder: Encoder, coded: Coded) -> dict[str, dict[str, Counts]]:
        """Write the ids of all rows; counts of the splits that are not for training, by split and field."""
        write_ids(numbering, encoder, coded, self._bar, self._work)
        others = [split for split in SPLITS[1:] if split in coded.blocks]
        return {split: counts_of_split(numbering, encoder, split, coded, self._work.codes) for split in others}

    def numbers(self, schema: Schema, coded: Coded) -> dict[str, np.ndarray]:
        """The sampled numbers of each split: float64 (rows of the sample, numeric and dense fields)."""
        return {split: sampled_numbers(schema, split, self._work.codes) for split in coded.blocks}


class OnEngine:
    """The passes as the workers of an engine make them, one file each.

    Attributes:
        parts: The parquet parts by split, once they are written; None for arrays.
    """

    def __init__(
        self,
        run: Run,
        logs: Mapping[str, RawLog],
        seed: int,
        chunk_bytes: int,
        bar: Counter,
        work: WorkingFolder,
        as_parts: bool,
    ) -> None:
        self._run, self._logs, self._bar, self._work = run, logs, bar, work
        self._seed, self._chunk_bytes, self._as_parts, self._token = seed, chunk_bytes, as_parts, uuid.uuid4().hex
        self.parts: dict[str, list[Part]] | None = None
        self._pieces: list[Piece] = []
        self._coded: dict[int, Coded] = {}
        write_then_rename(work.root / pieces.TOKEN, lambda file: file.write(self._token.encode()))

    def learn_cuts(self, splitter: Splitter, schema: Schema) -> None:
        """See `InProcess.learn_cuts`."""
        assert splitter.split is not None
        train, sample = self._rows_of("train", splitter, schema), Sample(self._seed)
        for _, clock in self._each("reading times", pieces.clock_of, self._job(splitter, schema), train[:1]):
            splitter.clock = clock
        if splitter.split.cuts is None:
            for _, part in self._each("reading times", pieces.sample_times, self._job(splitter, schema), train):
                sample.merge(part)
        splitter.take_cuts(sample, self._logs["train"].name)

    def learn_transforms(self, splitter: Splitter, schema: Schema) -> dict[str, dict[str, Any]]:
        """See `InProcess.learn_transforms`."""
        learned, job = Learned(schema, self._seed), self._job(splitter, schema)
        for _, part in self._each("reading numbers", pieces.learn, job, self._rows_of("train", splitter, schema)):
            learned.merge(part)
        return learned.transforms()

    def write_codes(self, numbering: Numbering, splitter: Splitter) -> Coded:
        """See `InProcess.write_codes`."""
        job = self._job(splitter, numbering.schema, numbering.transforms, numbering.undecided)
        every = [piece for part in self._logs for piece in self._rows_of(part, splitter, numbering.schema)]
        for _ in self._each("reading", pieces.code, job, every):
            pass
        found = {piece.number: pieces.load_coded(self._work.root, piece.number) for piece in every}
        self._coded = {number: file.coded for number, file in found.items()}
        for piece in every:
            self._check_unchanged(piece)
        return _sum_of(list(self._coded.values())).replace(
            skipped={part: log.skipped for part, log in self._logs.items()}
        )

    def count(self, numbering: Numbering, coded: Coded) -> None:
        """See `InProcess.count`."""
        trained = [number for number, file in self._coded.items() if "train" in file.blocks]
        paths = [folder_of(self._work.root, number) / "counted.parquet" for number in trained]
        while len(paths) > FAN_IN:
            groups = [paths[i : i + FAN_IN] for i in range(0, len(paths), FAN_IN)]
            job = self._job(Splitter(None, numbering.schema, self._seed), numbering.schema)
            paths = [path for _, path in self._each("counting values", pieces.sum_files, job, groups)]
        missing: dict[str, int] = {}
        for number in trained:
            for name, rows in pieces.load_coded(self._work.root, number).missing.items():
                missing[name] = missing.get(name, 0) + rows
        numbering.take_counted(sum_counted(paths, numbering.schema), sum(coded.blocks["train"]), missing)

    def write_ids(self, numbering: Numbering, encoder: Encoder, coded: Coded) -> dict[str, dict[str, Counts]]:
        """See `InProcess.write_ids`."""
        num_rows = {split: sum(blocks) for split, blocks in coded.blocks.items()}
        for split in num_rows:
            if self._as_parts:
                (self._work.folder / split).mkdir(exist_ok=True)
            else:
                make_arrays(self._work.folder / split, numbering.schema, num_rows[split])
        tasks, start = [], dict.fromkeys(num_rows, 0)
        for number, file in self._coded.items():
            tasks.append((number, {split: start[split] for split in file.blocks}))
            for split, blocks in file.blocks.items():
                start[split] += sum(blocks)
        job = self._job(Splitter(None, numbering.schema, self._seed), numbering.schema)
        found: dict[str, dict[str, Counts]] = {split: {} for split in SPLITS[1:] if split in num_rows}
        parts: dict[int, dict[str, list[Part]]] = {}
        write = pieces.write_parts if self._as_parts else pieces.write_arrays
        for _, written in self._each("writing ids", write, job, tasks):
            parts[written.number] = written.parts
            for split, by_field in written.counts.items():
                for name, more in by_field.items():
                    found[split][name] = found[split][name].plus(more) if name in found[split] else more
        if self._as_parts:
            in_order = [parts[number] for number in self._coded]
            self.parts = {split: [part for file in in_order for part in file.get(split, [])] for split in num_rows}
        return found

    def numbers(self, schema: Schema, coded: Coded) -> dict[str, np.ndarray]:
        """See `InProcess.numbers`."""
        found = {}
        for split in coded.blocks:
            files = [number for number, file in self._coded.items() if split in file.blocks]
            folders = [folder_of(self._work.root, number) / "codes" for number in files]
            found[split] = np.concatenate([sampled_numbers(schema, split, folder) for folder in folders])
        return found

    def _job(
        self,
        splitter: Splitter,
        schema: Schema,
        transforms: Mapping[str, Mapping[str, Any]] | None = None,
        undecided: frozenset[str] = frozenset(),
    ) -> Job:
        return Job(
            self._work.root.resolve(), self._token, schema, splitter, self._seed, self._chunk_bytes, transforms or {},
            undecided, pieces.VERSIONS,
        )  # fmt: skip

    def _each(
        self, stage: str, function: Callable[..., Any], job: Job, items: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """The results of a task for each item, with the items' indices, in the order in which workers finish them."""
        if not items:
            return
        with closing(self._run(partial(_tried, function, job), items)) as results:
            for done, (index, result) in enumerate(results, 1):
                if isinstance(result, Exception):
                    raise result
                self._bar.reach(stage, done / len(items))
                yield index, result

    def _rows_of(self, part: str, splitter: Splitter, schema: Schema) -> list[Piece]:
        """The files of a log that have rows; the rows of all files are counted when they are first asked for."""
        if not self._pieces:
            self._count_rows(splitter, schema)
        return [piece for piece in self._pieces if piece.part == part]

    def _count_rows(self, splitter: Splitter, schema: Schema) -> None:
        numbers = itertools.count()
        files = {
            part: [Piece(next(numbers), part, log.of_file(i)) for i in range(len(log.files))]
            for part, log in self._logs.items()
        }
        if self._work.state.file_rows is None:
            every = [piece for pieces_of_log in files.values() for piece in pieces_of_log]
            found = dict(self._each("counting rows", pieces.count_rows, self._job(splitter, schema), every))
            self._work.save(
                file_rows={part: tuple(found[piece.number] for piece in listed) for part, listed in files.items()}
            )
            counted = {part: [found[piece.number] for piece in listed] for part, listed in files.items()}
        else:
            counted = {part: list(rows) for part, rows in self._work.state.file_rows.items()}
        for part, log in self._logs.items():
            first_row, log.skipped, log.num_read = 0, Skipped(), 0
            for piece, rows in zip(files[part], counted[part], strict=True):
                if rows.num_rows:
                    self._pieces.append(dataclasses.replace(piece, first_row=first_row))
                first_row += rows.num_rows
                log.skipped, log.num_read = log.skipped.plus(rows.skipped), log.num_read + rows.num_read
            log.check_skipped()
        self._num_rows = {
            p.number: r.num_rows for part in files for p, r in zip(files[part], counted[part], strict=True)
        }

    def _check_unchanged(self, piece: Piece) -> None:
        """Raise DataError if a file has other rows than when they were counted: rows after it would get wrong splits."""
        found = sum(map(sum, self._coded[piece.number].blocks.values()))
        if found != self._num_rows[piece.number]:
            raise DataError(
                f"{piece.log.files[0].name} had {self._num_rows[piece.number]:,} rows, and now has {found:,}: it was changed while "
                "it was encoded; start again"
            )


def _tried(function: Callable[[Job, Any], Any], job: Job, item: Any) -> Any:
    """The result of a task, or the error that it raised: engines wrap errors, each in its own way."""
    try:
        return function(job, item)
    except (EmbtrimError, OSError, pl.exceptions.PolarsError) as error:
        return error


def _sum_of(files: Sequence[Coded]) -> Coded:
    """The rows of all files, in their order."""
    blocks: dict[str, tuple[int, ...]] = {}
    positives: dict[str, int] = {}
    dense_missing: dict[str, tuple[int, ...]] = {}
    for coded in files:
        for split, rows in coded.blocks.items():
            blocks[split] = (*blocks.get(split, ()), *rows)
            positives[split] = positives.get(split, 0) + coded.positives[split]
            before = dense_missing.get(split, (0,) * len(coded.dense_missing[split]))
            dense_missing[split] = tuple(a + b for a, b in zip(before, coded.dense_missing[split], strict=True))
    return Coded(blocks=blocks, positives=positives, dense_missing=dense_missing)
