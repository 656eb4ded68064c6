"""Raw logs, read in chunks of bounded size: csv, tsv and other text (gz too), parquet, libsvm and libfm, or a frame.

A log is one file, several files, a glob, a folder, or a polars DataFrame. `open_log` finds its format and its columns.
`RawLog.chunks` yields frames; each chunk knows the file and line of its rows, for error messages.

Conventions. Text cells stay strings; an empty cell is null; a file of any name may be gzipped. A separator may
have several characters (`::`). Tab-separated files have no quoting; in other text `"` quotes cells as in csv. Blank
lines are skipped. Every line must have a cell for each column. For libsvm and libfm see sparse_text.py.

Memory. Text is read in blocks of `chunk_bytes` (16 MB), cut at the end of a line; a parsed block takes up to about ten
times as much. Parquet and frames are read in slices of at most 131,072 rows, fewer if there are many columns. Neither
grows with the length of the log.
"""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import polars as pl

from embtrim.data.csv_text import CsvFile
from embtrim.data.log_file import CHUNK_BYTES, START, Chunk, LogFile, Position, listed, suffix_of
from embtrim.data.parquet import FrameFile, ParquetFile
from embtrim.data.read_options import SUFFIXES, Format, ReadOptions
from embtrim.data.rule_cells import check_rule, chunk_where
from embtrim.data.sparse_text import SparseFile
from embtrim.data.text_blocks import first_nonblank_line
from embtrim.errors import DataError
from embtrim.rules import Rule, parse_rule

T = TypeVar("T")

Source: TypeAlias = "str | Path | Sequence[str | Path] | pl.DataFrame"

_SPARSE_LINE = re.compile(rb"^[+-]?[0-9.]+([ \t]+[^\s:,]+:[^\s:,]+(:[^\s:,]+)?)+\s*$")


class RawLog:
    """An opened raw log: its files, its columns, and its rows in chunks.

    Attributes:
        name: Name for messages.
        files: The files in the order of reading; a DataFrame counts as one file.
        columns: Names of the columns; for sparse text, of the columns in the first block.
        is_sparse: Whether the log is libsvm or libfm.
    """

    def __init__(self, name: str, files: Sequence[LogFile]) -> None:
        self.name = name
        self.files = tuple(files)
        self.columns = self.files[0].columns
        self.is_sparse = isinstance(self.files[0], SparseFile)
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

    def require(self, columns: Sequence[str]) -> None:
        """Check that every file has the columns.

        Raises:
            DataError: A column is missing; the message names the columns there are and the columns needed.
        """
        for file in self.files:
            missing = file.missing(columns)
            if missing:
                quoted = ", ".join(repr(name) for name in missing)
                raise DataError(
                    f"{file.name} has no column {quoted}; it has {listed(file.columns)}; needed: {listed(columns)}{file.hint(missing)}"
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
            DataError: A file lacks a column, has lines of unequal length, or cannot be read.
        """
        wanted = list(dict.fromkeys(self.columns if columns is None else columns))
        read = list(dict.fromkeys([*wanted, *(() if self._rule is None else self._rule.columns)]))
        self.require(read)
        total = max(1, sum(file.size for file in self.files))
        first_row = start.row
        size_before = sum(file.size for file in self.files[: start.file])
        for index, file in enumerate(self.files[start.file :], start.file):
            for chunk in file.chunks(read, chunk_bytes, start if index == start.file else START, numbers):
                if self._rule is not None:
                    chunk = chunk_where(chunk, self._rule, self._nulls)
                    if not chunk.frame.height:
                        continue
                done = (size_before + chunk.done * file.size) / total
                end = chunk.end.replace(file=index, row=first_row + chunk.frame.height)
                yield Chunk(chunk.frame.select(wanted), first_row, chunk.locate, done, end)
                first_row = end.row
            size_before += file.size

    def describe(self) -> list[dict[str, object]]:
        """Path and bytes (rows for a frame) of each file, for records."""
        return [{"path": file.name, "bytes": file.size} for file in self.files]

    def identity(self) -> list[list[Any]] | None:
        """Absolute path, bytes and modification time (ns) of each file; None for a frame."""
        if isinstance(self.files[0], FrameFile):
            return None
        stats = [(Path(file.name).absolute(), os.stat(file.name)) for file in self.files]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def open_log(source: Source, options: ReadOptions | None = None) -> RawLog:
    """Open a raw log.

    Args:
        source: A path, several paths, a glob, a folder (its log files in order of name), or a polars DataFrame.
        options: How to read the log; None finds out from names and content.

    Raises:
        DataError: The source does not exist, has an unknown format, is empty, or mixes formats.

    Example:
        >>> import polars as pl
        >>> open_log(pl.DataFrame({"click": [0, 1], "user": ["a", "b"]})).columns
        ('click', 'user')
    """
    options = options or ReadOptions()
    if isinstance(source, pl.DataFrame):
        return RawLog("the frame", [FrameFile(source)])
    if type(source).__module__.split(".")[0] in ("pandas", "pyarrow"):
        raise DataError(
            f"cannot read a {type(source).__module__.split('.')[0]} object; convert it: polars.DataFrame(..)"
        )
    if isinstance(source, (str, Path)):
        name, paths = str(source), _expand(source)
    elif isinstance(source, Sequence) and all(isinstance(part, (str, Path)) for part in source):
        paths = [path for part in source for path in _expand(part)]
        name = str(source[0]) if len(source) == 1 else f"{len(paths)} files"
    else:
        raise DataError(f"cannot read a {type(source).__name__}; give a path, a list of paths, or a polars DataFrame")
    if not paths:
        raise DataError("the list of files is empty")
    formats: list[Format] = [options.format or _find_format(path) for path in paths]
    if len(set(formats)) > 1:
        kinds = ", ".join(f"{path} ({kind})" for path, kind in zip(paths[:4], formats, strict=False))
        raise DataError(f"files of different formats cannot be one log: {kinds}; encode them apart")
    files: list[LogFile] = []
    for path, kind in zip(paths, formats, strict=True):
        if kind == "parquet":
            files.append(ParquetFile(path))
        elif kind == "csv":
            files.append(CsvFile(path, options))
        else:
            files.append(SparseFile(path, kind))
    return RawLog(name, files)


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


def _expand(source: str | Path) -> list[Path]:
    """The files of a path, a folder or a glob."""
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and suffix_of(p) in SUFFIXES and p.name[0] not in "._")
        if not inside:
            raise DataError(f"folder {path} holds no log; looked for {', '.join(f'*{s}[.gz]' for s in SUFFIXES)}")
        return inside
    if path.exists():
        return [path]
    if any(mark in str(source) for mark in "*?["):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not found:
            raise DataError(f"no file matches {str(source)!r}")
        return found
    raise DataError(f"{source} does not exist")


def _find_format(path: Path) -> Format:
    """The format by the file's first bytes, its suffix or its first line."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        return "parquet"
    if head.startswith((b"PK\x03\x04", b"\xff\xfe", b"\xfe\xff")):
        kind = "a zip archive (or a spreadsheet)" if head.startswith(b"PK") else "UTF-16 text"
        raise DataError(
            f"{path} is {kind}; embtrim reads UTF-8 or latin-1 text (also gzipped), parquet, libsvm and libfm"
        )
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: unknown suffix {suffix!r}; known: {', '.join(SUFFIXES)}; or read it with "
            "ReadOptions(format=..) (--format csv)"
        )
    found = SUFFIXES[suffix]
    if found is None:
        first = first_nonblank_line(path)
        if not _SPARSE_LINE.match(first):
            return "csv"
        return "libfm" if first.split()[1].count(b":") == 2 else "libsvm"
    return found
