"""Raw logs, read in chunks of bounded size: csv, tsv and other text (gz too), parquet, libsvm and libfm, or a frame.

A log is one file, several files, a glob, a folder, URLs, or a polars DataFrame. `open_log` finds its format and its columns.
`RawLog.chunks` yields frames; each chunk knows the file and line of its rows, for error messages.

Conventions. Text cells stay strings; an empty cell is null; a file of any name may be gzipped. How text is split into
cells is found from the head of each file (dialect.py); blank lines are skipped. Every other line must have a cell for
each column (text_rows.py). For libsvm and libfm see sparse_text.py, for folders, globs and URLs places.py.

Memory. Text is read in blocks of `chunk_bytes` (16 MB), cut at the end of a line; a parsed block takes up to about ten
times as much. Parquet and frames are read in slices of at most 131,072 rows, fewer if there are many columns. Neither
grows with the length of the log.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import polars as pl

from embtrim.data.csv_text import CsvFile
from embtrim.data.frames import as_polars
from embtrim.data.log_file import CHUNK_BYTES, START, Chunk, LogFile, Position, Skipped, listed, suffix_of
from embtrim.data.parquet import FrameFile, ParquetFile
from embtrim.data.places import Place, places
from embtrim.data.read_options import SUFFIXES, Format, ReadOptions
from embtrim.data.rule_cells import check_rule, chunk_where
from embtrim.data.sparse_text import SparseFile
from embtrim.data.text_stream import find_encoding, read_head, text_head
from embtrim.errors import DataError
from embtrim.rules import Rule, parse_rule

logger = logging.getLogger(__name__)

T = TypeVar("T")

Source: TypeAlias = "str | Path | Sequence[str | Path] | pl.DataFrame"

_PART_NAME = re.compile(r"^(part-[\w-]+|\d{6}_\d+(_copy_\d+)?)(\.gz)?$")  # text that Spark and Hive write has no suffix
_OTHER_FORMATS = {b"PK\x03\x04": "a zip archive (or a spreadsheet)", b"BZh": "a bzip2 file", b"\xfd7zXZ": "an xz file",
                  b"\x28\xb5\x2f\xfd": "a zstd file", b"ORC": "an ORC file", b"Obj\x01": "an Avro file",
                  b"ARROW1": "an Arrow file"}  # fmt: skip
_SPARSE_LINE = re.compile(rb"^[+-]?[0-9.]+([ \t]+[^\s:,]+:[^\s:,]+(:[^\s:,]+)?)+\s*$")


class RawLog:
    """An opened raw log: its files, its columns, and its rows in chunks.

    Attributes:
        name: Name for messages.
        files: The files in the order of reading; a DataFrame counts as one file.
        columns: Names of the columns; for sparse text, of the columns in the first block.
        size: Bytes of all files, or rows of a frame. A log of one file of another log has the size of that log.
        is_sparse: Whether the log is libsvm or libfm.
        skipped: Lines that were skipped when the log was last read to its end.
        num_read: Rows that were read then; a rule may have left some of them out.
    """

    def __init__(self, name: str, files: Sequence[LogFile], options: ReadOptions | None = None) -> None:
        self.name = name
        self.files = tuple(files)
        self.columns = tuple(dict.fromkeys([*self.files[0].columns, *self.files[0].constants]))
        self.size = sum(file.size for file in self.files)
        self.is_sparse = isinstance(self.files[0], SparseFile)
        self.skipped, self.num_read = Skipped(), 0
        self._max_skipped = (options or ReadOptions()).max_skipped
        self._is_skipping_said = False
        self._rule: Rule | None = None
        self._nulls: tuple[str, ...] = ()

    def choose_rows(self, rule: str | None, nulls: Sequence[str]) -> None:
        """Let `chunks` leave out the rows for which a rule does not hold, as if the log did not have them.

        Args:
            rule: The rule, see rules.py; None keeps all rows.
            nulls: Texts that mean "missing".

        Raises:
            ConfigError: The text is not a rule.
            DataError: The log lacks a column of the rule.
        """
        self._rule, self._nulls = None if rule is None else parse_rule(rule), tuple(nulls)
        if self._rule is not None and not self.is_sparse:
            check_rule(self._rule, self.columns, self.name)

    @property
    def is_frame(self) -> bool:
        """Whether the log is a DataFrame."""
        return isinstance(self.files[0], FrameFile)

    def of_file(self, index: int) -> RawLog:
        """The log of one file of this log. It allows any number of skipped lines; `check_skipped` counts those of all files."""
        log = copy.copy(self)
        log.files, log._max_skipped, log._is_skipping_said = (self.files[index],), 1.0, True
        return log

    def count_rows(self, chunk_bytes: int = CHUNK_BYTES) -> int:
        """Number of rows, read as little as it takes; `skipped` and `num_read` are those of reading all of them.

        Raises:
            DataError: The log cannot be read, see `chunks`.
        """
        known = [file.num_rows() for file in self.files]
        if self._rule is None and None not in known:
            self.skipped, self.num_read = Skipped(), sum(filter(None, known))
            return self.num_read
        return sum(chunk.frame.height for chunk in self.chunks(self.files[0].columns[:1], chunk_bytes))

    def require(self, columns: Sequence[str]) -> None:
        """Check that every file has the columns.

        Raises:
            DataError: A column is missing; the message names the columns there are and the columns needed.
        """
        for file in self.files:
            missing = [name for name in file.missing(columns) if name not in file.constants]
            if missing:
                quoted = ", ".join(repr(name) for name in missing)
                there = listed([*file.columns, *file.constants])
                elsewhere = [name for name in missing if name in self.columns]
                beside = f"; {self.files[0].name} has {listed(elsewhere)}" if elsewhere else ""
                raise DataError(
                    f"{file.name} has no column {quoted}; it has {there}; needed: {listed(columns)}{beside}{file.hint(missing)}"
                )

    def chunks(
        self,
        columns: Sequence[str] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        start: Position = START,
        numbers: Collection[str] = (),
    ) -> Iterator[Chunk]:
        """Yield the rows in order.

        Args:
            columns: Names of the columns to read; None reads all. A name given twice counts once.
            chunk_bytes: Bytes of text per chunk. Parquet and frames are cut by rows, into fewer rows if this is small.
            start: The `end` of an earlier chunk of the same size. Rows before it are not parsed again, but a gz file is
                unzipped again.
            numbers: Columns that text may give as float64, which saves a pass over the cells. A chunk in which one of
                their cells is not a number gives them as text.

        Raises:
            DataError: A file lacks a column, has lines of unequal length, or cannot be read; or too many lines are skipped.
        """
        wanted = list(dict.fromkeys(self.columns if columns is None else columns))
        read = list(dict.fromkeys([*wanted, *(() if self._rule is None else self._rule.columns)]))
        self.require(read)
        total = max(1, sum(file.size for file in self.files))  # of these files, which may be one of a larger log
        size_before = sum(file.size for file in self.files[: start.file])
        at = start
        for index, file in enumerate(self.files[start.file :], start.file):
            fixed = {k: pl.lit(v, pl.String) for k, v in file.constants.items() if k in read and k not in file.columns}
            cells = [name for name in read if name not in fixed] or [file.columns[0]]
            for chunk in file.chunks(cells, chunk_bytes, start if index == start.file else START, numbers):
                done = (size_before + chunk.done * file.size) / total
                at = chunk.end.replace(
                    file=index,
                    row=at.row,
                    num_read=at.num_read + chunk.frame.height,
                    skipped=at.skipped.plus(chunk.skipped),
                )
                if chunk.skipped.num_lines:
                    self._check_skipped(at.skipped, at.num_read / max(done, 1e-9))
                if fixed:
                    chunk = replace(chunk, frame=chunk.frame.with_columns(**fixed))
                if self._rule is not None and chunk.frame.height:
                    chunk = chunk_where(chunk, self._rule, self._nulls)
                if chunk.frame.height:
                    first_row, at = at.row, at.replace(row=at.row + chunk.frame.height)
                    yield Chunk(chunk.frame.select(wanted), first_row, chunk.locate, done, at)
            size_before += file.size
        self.skipped, self.num_read = at.skipped, at.num_read
        self.check_skipped()

    def check_skipped(self) -> None:
        """Raise DataError if too many of all lines were skipped; say once how many were."""
        if self.skipped.num_lines:
            self._check_skipped(self.skipped, self.num_read, is_all=True)

    def _check_skipped(self, skipped: Skipped, num_rows: float, is_all: bool = False) -> None:
        """Raise DataError if too many lines of a log are skipped; say once how many were, when all of it is read."""
        share = skipped.num_lines / (skipped.num_lines + num_rows)
        lines = "\n".join(["", *skipped.first])
        # Before the end the number of rows is an estimate from the bytes read.
        if share > self._max_skipped * (1 if is_all else 2):
            counted = f"{skipped.num_lines:,} lines" + ("" if is_all else " so far")
            raise DataError(
                f"{self.name}: {counted} cannot be read, more than {self._max_skipped:.2g} of all lines; check how the log is "
                f"read, or allow more with ReadOptions(max_skipped=..) (--set read.max_skipped=..). The first ones:{lines}"
            )
        if is_all and not self._is_skipping_said:
            self._is_skipping_said = True
            logger.warning(
                "%s: skipped %s lines (%.2g%%) that cannot be read. The first ones:%s",
                self.name, f"{skipped.num_lines:,}", 100 * share, lines,
            )  # fmt: skip

    def say_further_columns(self) -> None:
        """Warn of columns that the first file lacks, which no schema drafted from it can have."""
        for file in self.files[1:]:
            further = [name for name in (*file.columns, *file.constants) if name not in self.columns]
            if further and not self.is_sparse:
                logger.warning(
                    "%s has columns that %s lacks; they are left out: %s",
                    file.name,
                    self.files[0].name,
                    listed(further),
                )
                return

    def describe(self) -> list[dict[str, object]]:
        """Path and bytes (rows for a frame) of each file, and how its text is read, for records."""
        files = []
        for file in self.files:
            dialect = {"dialect": file.describe()} if file.describe() else {}
            files.append({"path": file.name, "bytes": file.size, **dialect})
        return files

    def identity(self) -> list[list[Any]] | None:
        """Absolute path, bytes and version of each file; None for a frame."""
        found = [file.identity() for file in self.files]
        return None if None in found else found  # type: ignore[return-value]


def open_log(source: Source, options: ReadOptions | None = None) -> RawLog:
    """Open a raw log.

    Args:
        source: A path or URL, several of them, a glob, a folder, or a DataFrame of polars or pandas; see places.py.
        options: How to read the log; None finds out from names and content.

    Raises:
        DataError: The source does not exist, has an unknown format, is empty, or mixes formats.

    Example:
        >>> import polars as pl
        >>> open_log(pl.DataFrame({"click": [0, 1], "user": ["a", "b"]})).columns
        ('click', 'user')
    """
    options, source = options or ReadOptions(), as_polars(source)
    if isinstance(source, pl.DataFrame):
        return RawLog("the frame", [FrameFile(source)])
    if isinstance(source, (str, Path)):
        name, found = str(source), _places(source, options)
    elif isinstance(source, Sequence) and all(isinstance(part, (str, Path)) for part in source):
        found = [place for part in source for place in _places(part, options)]
        name = str(source[0]) if len(source) == 1 else f"{len(found)} files"
    else:
        raise DataError(f"cannot read a {type(source).__name__}; give a path, a list of paths, or a DataFrame")
    if not found:
        raise DataError("the list of files is empty")
    formats: list[Format] = [options.format or _find_format(place) for place in found]
    if len(set(formats)) > 1:
        kinds = ", ".join(f"{found[formats.index(kind)].name} ({kind})" for kind in dict.fromkeys(formats))
        raise DataError(f"files of different formats cannot be one log: {kinds}; encode them apart")
    files: list[LogFile] = []
    for place, kind in zip(found, formats, strict=True):
        if kind == "parquet":
            files.append(ParquetFile(place))
        elif kind == "csv":
            files.append(CsvFile(place, options))
        else:
            files.append(SparseFile(place, kind, options))
        files[-1].constants = place.partitions
    _say_dialects(name, files)
    return RawLog(name, files, options)


def _places(source: str | Path, options: ReadOptions) -> list[Place]:
    """The files of a path, a folder, a glob or a URL."""

    def is_log(name: str) -> bool:
        has_suffix = "." in name.removesuffix(".gz")
        return (
            suffix_of(name) in SUFFIXES
            or bool(_PART_NAME.match(name))
            or (options.format is not None and not has_suffix)
        )

    return places(source, is_log)


def _say_dialects(name: str, files: Sequence[LogFile]) -> None:
    """Log how text is read: each dialect once, with the first file that has it."""
    dialects: dict[str, list[str]] = {}
    for file in files:
        if file.describe():
            dialects.setdefault(file.describe(), []).append(file.name)
    for dialect, names in dialects.items():
        shown = name if len(dialects) == 1 else names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        logger.info("%s: %s", shown, dialect)


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, such as chunks; another thread makes the next items while one is in use.

    Two items are in the making. With one, the thread would wait whenever an item is made faster than the one before is
    used.
    """
    with ThreadPoolExecutor(1, "read_ahead") as pool:
        coming = deque(pool.submit(next, items, None) for _ in range(2))
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item


def _find_format(place: Place) -> Format:
    """The format by the file's first bytes, its suffix or its first line."""
    with place.open() as file:
        head = file.read(6)
    if head.startswith(b"PAR1"):
        return "parquet"
    kind = next((kind for mark, kind in _OTHER_FORMATS.items() if head.startswith(mark)), None)
    if kind is not None:
        raise DataError(
            f"{place.name} is {kind}; embtrim reads text (also gzipped), parquet, libsvm and libfm: convert it"
        )
    suffix = suffix_of(place.name)
    if suffix not in SUFFIXES and not _PART_NAME.match(place.name.rpartition("/")[2]):
        raise DataError(
            f"{place.name}: unknown suffix {suffix!r}; known: {', '.join(SUFFIXES)}; or read it with "
            "ReadOptions(format=..) (--format csv)"
        )
    found = SUFFIXES.get(suffix)
    if found is not None:
        return found
    raw, is_whole = read_head(place)
    text, _ = text_head(raw, is_whole, find_encoding(raw, None), None)
    first = next((line for line in text.split(b"\n") if line.strip()), b"")
    if not _SPARSE_LINE.match(first):
        return "csv"
    return "libfm" if first.split()[1].count(b":") == 2 else "libsvm"
