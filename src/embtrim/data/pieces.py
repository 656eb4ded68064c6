"""What a worker of an engine does with one file of a log; each function may run anywhere, in any order, and more than once.

    .<target>.encoding/token             says which run the folder belongs to, and that a worker sees it
    .<target>.encoding/files/000012/     file 12, whole or not there at all
        codes/, data/                    its rows as `write_codes` writes those of a log
        texts.parquet                    the texts of its codes
        counted.parquet                  the values of its training rows with their counts
        file.json                        a `CodedFile`
    .<target>.encoding/sums/             sums of the counts of several files

Every file has codes of its own: a file's codes depend on nothing but the file. A task that is repeated, by a retry or by
speculation, writes under a name of its own and renames, or writes the same bytes to the same place.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embtrim._version import __version__
from embtrim.config import Config
from embtrim.data.array_file import ArrayFile
from embtrim.data.clock import Clock
from embtrim.data.dataset import SPLITS
from embtrim.data.encoder import Encoder
from embtrim.data.encoding_state import Coded, EncodingState, FileRows, WorkingFolder
from embtrim.data.learning import Learned, learned_columns
from embtrim.data.log_file import START
from embtrim.data.numbering import Numbering, sum_counted
from embtrim.data.parts import PART_ROWS, Part, part_name, write_part
from embtrim.data.profile import Counts
from embtrim.data.profiling import counts_of_split
from embtrim.data.reading import RawLog, read_ahead
from embtrim.data.splitting import Sample, Splitter
from embtrim.data.writing import blocks_of_codes, groups_of_training_codes, write_codes
from embtrim.errors import DataError
from embtrim.schema import Schema
from embtrim.system.files import read_json, write_then_rename
from embtrim.system.folders import flush_folder
from embtrim.system.progress import Counter

TOKEN = "token"
VERSIONS = {"embtrim": __version__, "polars": pl.__version__, "numpy": np.__version__}


@dataclass(frozen=True)
class Piece:
    """One file of the logs.

    Attributes:
        number: Its place among the files of all logs.
        part: Name of its log: "train", "valid" or "test".
        log: The log of this file alone.
        first_row: Index of its first row in its log.
    """

    number: int
    part: str
    log: RawLog
    first_row: int = 0

    @property
    def start(self) -> Any:
        """Where reading starts, so that rows have their index in the whole log."""
        return START.replace(row=self.first_row)


@dataclass(frozen=True)
class Job:
    """What all tasks of a run share.

    Attributes:
        root: The working folder, on storage that all workers see.
        token: Content of the file `token` in it.
        schema: The fields, without sizes.
        splitter: Divides the main log.
        seed: Seed of the samples.
        chunk_bytes: Bytes of text read at a time.
        transforms: What the transforms have learned.
        undecided: Fields whose kind the texts of the training rows say.
        versions: Releases that decide what is written.
    """

    root: Path
    token: str
    schema: Schema
    splitter: Splitter
    seed: int
    chunk_bytes: int
    transforms: Mapping[str, Mapping[str, Any]]
    undecided: frozenset[str]
    versions: Mapping[str, str]

    def check(self) -> None:
        """Check that this worker can take part.

        Raises:
            DataError: It does not see the working folder, or has other releases, whose result might differ.
        """
        other = [f"{name} {VERSIONS[name]}" for name in VERSIONS if VERSIONS[name] != self.versions[name]]
        if other:
            needed = ", ".join(f"{name} {version}" for name, version in self.versions.items())
            raise DataError(
                f"worker on {socket.gethostname()} has {', '.join(other)}; all workers need the releases of the process that "
                f"calls encode: {needed}"
            )
        path = self.root / TOKEN
        if not path.exists() or path.read_text("utf-8") != self.token:
            raise DataError(
                f"worker on {socket.gethostname()} does not see {self.root} as it is where encode was called; choose an --out on "
                "storage that all workers share"
            )


class CodedFile(Config):
    """The rows of a file, written as codes.

    Attributes:
        coded: How many they are, by split.
        rows: Training rows.
        missing: Training rows without a value, by hashed and multi field.
    """

    coded: Coded
    rows: int
    missing: dict[str, int]


def folder_of(root: Path, number: int) -> Path:
    """The folder of a file in the working folder of a run."""
    return root / "files" / f"{number:06}"


def load_coded(root: Path, number: int) -> CodedFile:
    """What file.json of a file holds."""
    return CodedFile.parse(read_json(folder_of(root, number) / "file.json"), where="file.json")


# --- tasks ------------------------------------------------------------------------------------------------------------


def count_rows(job: Job, piece: Piece) -> FileRows:
    """The rows of a file."""
    job.check()
    num_rows = piece.log.count_rows(job.chunk_bytes)
    return FileRows(num_rows=num_rows, num_read=piece.log.num_read, skipped=piece.log.skipped)


def clock_of(job: Job, piece: Piece) -> Clock | None:
    """What the time column holds, as the first rows of a file say."""
    job.check()
    assert job.splitter.column is not None
    chunk = next(piece.log.chunks([job.splitter.column], job.chunk_bytes))
    job.splitter.times(chunk)
    return job.splitter.clock


def sample_times(job: Job, piece: Piece) -> Sample:
    """A sample of the times of a file."""
    job.check()
    assert job.splitter.column is not None
    sample = Sample(job.seed)
    for chunk in piece.log.chunks([job.splitter.column], job.chunk_bytes, piece.start):
        sample.add(chunk.first_row, job.splitter.times(chunk))
    return sample.shrunk()


def learn(job: Job, piece: Piece) -> Learned:
    """What the learned transforms need of the training rows of a file."""
    job.check()
    learned, (columns, numbers) = Learned(job.schema, job.seed), learned_columns(job.schema, job.splitter)
    for chunk in read_ahead(piece.log.chunks(columns, job.chunk_bytes, piece.start, numbers)):
        learned.add(chunk, job.splitter)
    return learned.shrunk()


def code(job: Job, piece: Piece) -> int:
    """Write the rows of a file as codes, and the counts of its training rows; the number of the file."""
    job.check()
    place = folder_of(job.root, piece.number)
    if place.exists():
        return piece.number
    work = WorkingFolder(place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}"), {}, None)
    try:
        work.state = EncodingState(coded=Coded(position=piece.start))
        numbering, bar = Numbering(job.schema, job.transforms, job.undecided), Counter(False)
        divides = job.splitter if piece.part == "train" else SPLITS.index(piece.part)
        coded = write_codes(numbering, {piece.part: (piece.log, divides)}, job.chunk_bytes, bar, work)
        trained = "train" in coded.blocks
        numbering.count(groups_of_training_codes(coded, job.schema, bar, work) if trained else ())
        numbering.state().write_parquet(work.root / "texts.parquet", compression="lz4")
        numbering.counted().write_parquet(work.root / "counted.parquet", compression="lz4")
        found = CodedFile(coded=coded, rows=numbering.seen.rows, missing=numbering.seen.missing)
        (work.root / "file.json").write_text(found.model_dump_json(), "utf-8")
        flush_folder(work.root)
        _take_place(work.root, place)
    finally:
        shutil.rmtree(work.root, ignore_errors=True)
    return piece.number


def _take_place(new: Path, place: Path) -> None:
    """Rename a folder, unless another task of the same content was faster."""
    try:
        os.rename(new, place)
    except OSError:
        if not place.exists():
            raise


def sum_files(job: Job, paths: Sequence[Path]) -> Path:
    """Sum the counts in several files; the file with the sums."""
    job.check()
    sums = sum_counted(paths, job.schema)
    place = job.root / "sums" / f"{uuid.uuid4().hex}.parquet"
    write_then_rename(place, lambda file: sums.write_parquet(file, compression="lz4"))
    return place


def write_arrays(job: Job, task: tuple[int, Mapping[str, int]]) -> Written:
    """Write the rows of a file into the arrays of their splits.

    Args:
        job: The run. Its folder `data` holds the encoder, and arrays of full length.
        task: The number of the file; and by split, the place of its first row.
    """
    number, first_rows = task
    file = _read_file(job, number)
    for split, first_row in first_rows.items():
        with open(job.root / "data" / split / "ids.npy", "r+b") as ids:
            ids.seek(ArrayFile.HEADER_BYTES + 4 * file.encoder.schema.num_id_columns * first_row)
            for ids_CN in file.ids(split):
                ids.write(np.ascontiguousarray(ids_CN.T).data)
        for part in (file.place / "data" / split).iterdir():
            _copy_rows(part, job.root / "data" / split / part.name, first_row)
    return Written(number, file.counts())


def write_parts(job: Job, task: tuple[int, Mapping[str, int]]) -> Written:
    """Write the rows of a file as parquet parts of their splits; the arguments are those of `write_arrays`."""
    number, parts = task[0], {}
    file = _read_file(job, number)
    for split in file.coded.blocks:
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in (file.place / "data" / split).iterdir()}
        folder, start, parts[split] = job.root / "data" / split, 0, []
        for ids_CN in _in_runs(file.ids(split), PART_ROWS):
            rows = slice(start, start + ids_CN.shape[1])
            dense, weights = (arrays[name][rows] if name in arrays else None for name in ("dense", "weights"))
            name = part_name(number, len(parts[split]))
            parts[split].append(write_part(folder / name, ids_CN, arrays["labels"][rows], dense, weights))
            start = rows.stop
    return Written(number, file.counts(), parts)


def _in_runs(blocks: Iterable[np.ndarray], num_rows: int) -> Iterator[np.ndarray]:
    """Blocks of shape (C, N) put together until they have `num_rows` rows."""
    held: list[np.ndarray] = []
    for block in blocks:
        held.append(block)
        if sum(part.shape[1] for part in held) >= num_rows:
            yield np.concatenate(held, axis=1)
            held = []
    if held:
        yield np.concatenate(held, axis=1)


@dataclass(frozen=True)
class Written:
    """The rows of a file, written as ids.

    Attributes:
        number: The file.
        counts: Counts by split and field, of the splits that are not for training.
        parts: Its parquet parts by split.
    """

    number: int
    counts: dict[str, dict[str, Counts]]
    parts: dict[str, list[Part]] = field(default_factory=dict)


@dataclass(frozen=True)
class _ReadFile:
    """A file that is written as codes, and the encoder that reads them."""

    place: Path
    coded: Coded
    encoder: Encoder
    numbering: Numbering

    def ids(self, split: str) -> Iterator[np.ndarray]:
        """The ids of a split, block by block: int32 (C, N)."""
        encoded = self.numbering.encoded_by(self.encoder)
        return map(encoded, blocks_of_codes(split, self.coded, self.encoder.schema, self.place / "codes"))

    def counts(self) -> dict[str, dict[str, Counts]]:
        """Counts by split and field, of the splits that are not for training."""
        others, codes = [split for split in self.coded.blocks if split != "train"], self.place / "codes"
        return {split: counts_of_split(self.numbering, self.encoder, split, self.coded, codes) for split in others}


def _read_file(job: Job, number: int) -> _ReadFile:
    job.check()
    place, encoder = folder_of(job.root, number), _encoder(job.root / "data", job.token)
    numbering = Numbering(encoder.schema, encoder.transforms)
    numbering.list_texts(pl.read_parquet(place / "texts.parquet", glob=False))
    return _ReadFile(place, load_coded(job.root, number).coded, encoder, numbering)


def _copy_rows(part: Path, whole: Path, first_row: int) -> None:
    """Copy the rows of an array file into a larger one."""
    array = np.load(part, mmap_mode="r")
    with open(part, "rb") as source, open(whole, "r+b") as target:
        source.seek(ArrayFile.HEADER_BYTES)
        target.seek(ArrayFile.HEADER_BYTES + first_row * array[:1].nbytes)
        shutil.copyfileobj(source, target, 1 << 20)


@lru_cache(maxsize=1)
def _encoder(folder: Path, _token: str) -> Encoder:
    """The encoder in a folder, read once for all files that this process writes in a run."""
    return Encoder.load(folder)
