"""Raw logs, read in chunks of bounded size: csv, tsv and other text (gz too), parquet, libsvm and libfm, or a frame.

A log is one file, several, a glob, a folder, or a polars DataFrame. `open_log` finds its format and its columns;
`RawLog.chunks` yields frames, and each chunk knows the file and line that a row comes from, for error messages.

Conventions. Text cells stay strings; an empty cell is null; a file may be gzipped whatever its name. A separator may
have several characters (`::`). Tab-separated files have no quoting, other text has `"` as csv has it. Blank lines are
skipped. Every line must have as many cells as there are columns.

Sparse text. In libsvm lines (`label index:value ...`) column `features` is the list of the row's indices, for 0/1
values (0 is dropped); a column named by an index, such as `7`, is that index's value, 0 where absent. In libfm lines
with fields (`label field:index:value ...`, also known as libffm) column `3` is the list of indices of field 3, for 0/1
values, and column `3:17` the value of index 17 in field 3. The label column is `label`; label -1 reads as 0.

Memory. Text is read in blocks of `chunk_bytes` (16 MB), cut at a line's end; a parsed block takes up to about ten times
that. Parquet and frames are read in slices of at most 131,072 rows, fewer where there are many columns. Neither grows
with the length of the log.
"""

from __future__ import annotations

import csv
import glob
import gzip
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, TypeVar, cast

import numpy as np
import polars as pl

from embtrim.config import Config
from embtrim.errors import DataError

T = TypeVar("T")

CHUNK_BYTES = 16 << 20
MAX_LINE_BYTES = 256 << 20
SLICE_ROWS = 131_072
SLICE_CELLS = 6_000_000

Source: TypeAlias = "str | Path | Sequence[str | Path] | pl.DataFrame"
Format: TypeAlias = Literal["csv", "parquet", "libsvm", "libfm"]

SUFFIXES: dict[str, Format | None] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".txt": None,  # any text format: the first line tells
    ".dat": None,
    ".parquet": "parquet",
    ".pq": "parquet",
    ".libsvm": "libsvm",
    ".svm": "libsvm",
    ".libfm": "libfm",
    ".libffm": "libfm",
    ".ffm": "libfm",
}
_SPARSE_LINE = re.compile(rb"^[+-]?[0-9.]+([ \t]+[^\s:,]+:[^\s:,]+(:[^\s:,]+)?)+\s*$")
_CELL_SEPARATOR = b"\x1f"  # stands in for separators of several characters, which the csv parser does not take


class ReadOptions(Config):
    """How a raw log is to be read.

    Attributes:
        format: "csv" (any text with separators), "parquet", "libsvm" or "libfm"; None finds out from name and content.
        header: whether the first line of text names the columns.
        columns: names of the columns, instead of the header's (with header = true the header line is skipped).
        separator: what separates cells; None means tab for .tsv, else the one the first line uses.
        encoding: of text.
        quoted: whether `"` quotes cells; None means yes, unless the separator is a tab or has several characters.
    """

    format: Format | None = None
    header: bool = True
    columns: tuple[str, ...] | None = None
    separator: str | None = None
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    quoted: bool | None = None


class Position(Config):
    """A place between two rows of a log, from which reading can go on without a look at what lies before.

    Attributes:
        file: index of the file.
        offset: within the file: bytes of text, unzipped; rows of parquet and frames.
        line: number of the line that starts at `offset`, for messages.
        row: index in the whole log of the row that comes next.
    """

    file: int = 0
    offset: int = 0
    line: int = 1
    row: int = 0


START = Position()


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a raw log.

    Attributes:
        frame: the rows; text cells are strings, parquet columns keep their type.
        first_row: index of the first row in the whole log, over all files.
        locate: says where a row of this chunk lies, such as `logs.csv line 18,204`.
        done: part of the log that has been read after this chunk, in 0..1.
        end: where the log goes on after this chunk.
    """

    frame: pl.DataFrame
    first_row: int
    locate: Callable[[int], str]
    done: float
    end: Position


class RawLog:
    """An opened raw log: its files, its columns, and its rows in chunks.

    Attributes:
        name: for messages.
        files: the files in the order in which they are read; one pseudo-file for a DataFrame.
        columns: names of the columns (of sparse text: those of the first block).
    """

    def __init__(self, name: str, files: Sequence[_File]) -> None:
        self.name = name
        self.files = tuple(files)
        self.columns = self.files[0].columns
        self.is_sparse = isinstance(self.files[0], SparseText)

    def require(self, columns: Sequence[str]) -> None:
        """Check that every file has the columns; DataError names those given and those needed."""
        for file in self.files:
            missing = file.missing(columns)
            if missing:
                quoted = ", ".join(repr(name) for name in missing)
                raise DataError(
                    f"{file.name} has no column {quoted}; it has {_some(file.columns)}; needed: {_some(columns)}{file.hint(missing)}"
                )

    def chunks(
        self,
        columns: Sequence[str] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        start: Position = START,
        numbers: Collection[str] = (),
    ) -> Iterator[Chunk]:
        """Yield the rows in order, `columns` only (None: all).

        Args:
            columns: names; asked twice is given once.
            chunk_bytes: bytes of text a chunk; parquet and frames are cut by rows, fewer than usual for small values.
            start: the `end` of a chunk of the same size; what lies before is not parsed again (a gz is unzipped again).
            numbers: those of `columns` that text may give as float64, which saves a pass over the cells; chunks in which a
                cell is not a number give them as text still.

        Raises:
            DataError: a file lacks a column, has lines of another length, or cannot be read.
        """
        wanted = list(dict.fromkeys(self.columns if columns is None else columns))
        self.require(wanted)
        total = max(1, sum(file.size for file in self.files))
        first_row = start.row
        size_before = sum(file.size for file in self.files[: start.file])
        for index, file in enumerate(self.files[start.file :], start.file):
            for chunk in file.chunks(wanted, chunk_bytes, start if index == start.file else START, numbers):
                done = (size_before + chunk.done * file.size) / total
                end = chunk.end.replace(file=index, row=first_row + chunk.frame.height)
                yield Chunk(chunk.frame, first_row, chunk.locate, done, end)
                first_row = end.row
            size_before += file.size

    def describe(self) -> list[dict[str, object]]:
        """Path and bytes of each file, for records."""
        return [{"path": file.name, "bytes": file.size} for file in self.files]

    def identity(self) -> list[list[Any]] | None:
        """Absolute path, bytes and time of the last change (ns) of each file; None for a frame, which has no such marks."""
        if isinstance(self.files[0], _Frame):
            return None
        stats = [(Path(file.name).absolute(), os.stat(file.name)) for file in self.files]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def open_log(source: Source, options: ReadOptions | None = None) -> RawLog:
    """Open a raw log.

    Args:
        source: a path, several, a glob, a folder (its log files in order of name), or a polars DataFrame.
        options: how to read it; None finds out.

    Raises:
        DataError: nothing there, an unknown format, an empty file, or files of different formats.

    Example:
        >>> import polars as pl
        >>> open_log(pl.DataFrame({"click": [0, 1], "user": ["a", "b"]})).columns
        ('click', 'user')
    """
    options = options or ReadOptions()
    if isinstance(source, pl.DataFrame):
        return RawLog("the frame", [_Frame(source)])
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
        listed = ", ".join(f"{path} ({kind})" for path, kind in zip(paths[:4], formats, strict=False))
        raise DataError(f"files of different formats cannot be one log: {listed}; encode them apart")
    files: list[_File] = []
    for path, kind in zip(paths, formats, strict=True):
        if kind == "parquet":
            files.append(_Parquet(path))
        elif kind == "csv":
            files.append(_Text(path, options))
        else:
            files.append(SparseText(path, kind))
    return RawLog(name, files)


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, such as chunks, made by another thread while the ones before them are in use.

    Two are on their way: with one, that thread would wait whenever making an item is quicker than using the one before.
    """
    with ThreadPoolExecutor(1, "read_ahead") as pool:
        coming = deque(pool.submit(next, items, None) for _ in range(2))
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item


class _File:
    """One file of a log. Its chunks count within the file: `done`, offset and line of `end`; their row numbers are not set."""

    name: str
    size: int
    columns: tuple[str, ...]

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        raise NotImplementedError

    def missing(self, columns: Sequence[str]) -> list[str]:
        """Those of `columns` that the file does not have."""
        there = set(self.columns)
        return [name for name in columns if name not in there]

    def hint(self, missing: Sequence[str]) -> str:
        """What might be wrong when columns are missing; starts with `; ` unless empty."""
        return ""


class _Frame(_File):
    def __init__(self, frame: pl.DataFrame) -> None:
        self.name = "the frame"
        self.frame = frame
        self.size = frame.height
        self.columns = tuple(frame.columns)

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        step = _slice_rows(len(columns), chunk_bytes)
        for first in range(start.offset, self.frame.height, step):
            part = self.frame.select(columns).slice(first, step)
            end = first + part.height
            yield Chunk(part, 0, _row_locator(self.name, first), end / self.frame.height, Position(offset=end))


class _Parquet(_File):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.size = path.stat().st_size
        try:
            self.columns = tuple(pl.read_parquet_schema(path))
            self.num_rows = int(pl.scan_parquet(path).select(pl.len()).collect().item())
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path} is not a readable parquet file ({_first_line(error)})") from None

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        # Slices of a scan, not the streaming engine's batches: those read ahead by several hundred megabytes.
        step = _slice_rows(len(columns), chunk_bytes)
        scan = pl.scan_parquet(self.path).select(columns)
        for first in range(start.offset, self.num_rows, step):
            try:
                part = scan.slice(first, step).collect()
            except (pl.exceptions.PolarsError, OSError) as error:
                raise DataError(f"{self.path} is damaged near row {first + 1:,} ({_first_line(error)})") from None
            end = first + part.height
            yield Chunk(part, 0, _row_locator(self.name, first), end / self.num_rows, Position(offset=end))


class _Text(_File):
    def __init__(self, path: Path, options: ReadOptions) -> None:
        self.path = path
        self.name = str(path)
        self.size = path.stat().st_size
        self.latin = options.encoding == "latin-1"
        self.header = options.header
        first = _first_nonblank_line(path)
        separator = options.separator or _find_separator(path, first)
        self.separator = separator.encode()
        self.quoted = options.quoted if options.quoted is not None else separator != "\t" and len(separator) == 1
        try:
            text = first.decode("latin-1" if self.latin else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path} line 1 is not UTF-8; pass encoding='latin-1' if that is what it is") from None
        if self.quoted:
            cells = next(csv.reader([text], delimiter=separator))
        else:
            cells = text.split(separator)
        if options.columns is not None:
            if len(options.columns) != len(cells):
                raise DataError(f"{path} line 1 has {len(cells)} cells, {len(options.columns)} column names were given")
            self.columns = options.columns
        elif options.header:
            self.columns = tuple(cells)
        else:
            self.columns = tuple(f"column_{i}" for i in range(1, len(cells) + 1))
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise DataError(f"{path} names a column twice: {_some(twice)}{self.hint(twice)}")

    def hint(self, missing: Sequence[str]) -> str:
        if self.header and sum(_is_number(name) or not name for name in self.columns) * 2 >= len(self.columns):
            return "; the first line looks like data: pass header=False (and columns=..)"
        if len(self.columns) == 1:
            return f"; is {self.separator.decode()!r} the separator?"
        return ""

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        schema = dict.fromkeys(self.columns, pl.String)
        separator = self.separator if len(self.separator) == 1 else _CELL_SEPARATOR
        blocks = _blocks(self.path, chunk_bytes, self.quoted, skip_lines=int(self.header), start=start)
        for block, first_line, done, end in blocks:
            rows = block
            if not self._is_even(rows):
                rows = _without_blank_lines(rows)
                if not rows:
                    continue
                if not self._is_even(rows):
                    raise self._fault(block, first_line, "lines of unequal length")
            if self.latin:
                rows = rows.decode("latin-1").encode()
            if len(self.separator) > 1:
                rows = rows.replace(self.separator, _CELL_SEPARATOR)
            parse = partial(
                pl.read_csv,
                rows,
                has_header=False,
                columns=[self.columns.index(name) for name in columns],
                separator=separator.decode(),
                quote_char='"' if self.quoted else None,
            )
            try:
                try:
                    frame = parse(schema={**schema, **dict.fromkeys(numbers, pl.Float64)})
                except pl.exceptions.PolarsError:
                    frame = parse(schema=schema)
            except pl.exceptions.PolarsError as error:
                raise self._fault(block, first_line, _first_line(error)) from None
            yield Chunk(frame.select(columns), 0, self._locator(block, first_line), done, end)

    def _is_even(self, rows: bytes) -> bool:
        """Whether every line has as many cells as there are columns, as a count of separators over the block tells."""
        if self.quoted and b'"' in rows:
            rows = re.sub(rb'"[^"]*"', b"", rows)
        num_lines = rows.count(b"\n") + (not rows.endswith(b"\n"))
        if len(self.separator) == 1:  # several times faster than bytes.count where every tenth byte is a separator
            num_separators = int(np.count_nonzero(np.frombuffer(rows, np.uint8) == self.separator[0]))
        else:
            num_separators = rows.count(self.separator)
        return num_separators == num_lines * (len(self.columns) - 1)

    def _width_error(self, block: bytes, first_line: int) -> DataError | None:
        for line, row in _logical_rows(block, self.quoted):
            if self.quoted:
                row = re.sub(rb'"[^"]*"', b"", row)
            num_cells = row.count(self.separator) + 1
            if num_cells != len(self.columns):
                return DataError(
                    f"{self.path} line {first_line + line:,} has {num_cells} cells, the log has {len(self.columns)} columns; "
                    "repair or drop the line"
                )
        return None

    def _fault(self, block: bytes, first_line: int, reason: str) -> DataError:
        """What is wrong with a block that does not parse, by a slow look at every line."""
        if not self.latin:
            for line, row in _logical_rows(block, self.quoted):
                try:
                    row.decode()
                except UnicodeDecodeError:
                    return DataError(
                        f"{self.path} line {first_line + line:,} is not UTF-8; pass encoding='latin-1' if that is what it is"
                    )
        return self._width_error(block, first_line) or DataError(
            f"{self.path} cannot be parsed after line {first_line:,} ({reason}); "
            'if " is plain text in this log, pass quoted=False'
        )

    def _locator(self, block: bytes, first_line: int) -> Callable[[int], str]:
        def locate(row: int) -> str:
            for index, (line, _) in enumerate(_logical_rows(block, self.quoted)):
                if index == row:
                    return f"{self.path} line {first_line + line:,}"
            return f"{self.path} row {row + 1:,}"

        return locate


class SparseText(_File):
    """A libsvm or libfm file; see the module docstring for its columns."""

    def __init__(self, path: Path, kind: Format) -> None:
        self.path = path
        self.name = str(path)
        self.size = path.stat().st_size
        self.num_parts = 3 if kind == "libfm" else 2
        first = _first_nonblank_line(path).split()
        if self.num_parts == 3 and len(first) > 1 and first[1].count(b":") == 1:
            self.num_parts = 2  # libfm proper has no fields: it is libsvm's layout
        if self.num_parts == 2:
            self.columns = ("label", "features")
        else:
            block, *_ = next(_blocks(path, 1 << 20, quoted=False))
            fields = {
                token.split(b":")[0].decode("utf-8", "replace") for token in block.split() if token.count(b":") == 2
            }
            self.columns = ("label", *sorted(fields, key=lambda name: (len(name), name)))

    def missing(self, columns: Sequence[str]) -> list[str]:
        """Those of `columns` that cannot be an index; which indices a file has is known only at its end."""
        form = r"features|\d+" if self.num_parts == 2 else r"[^\s:]+(:[^\s:]+)?"
        return [name for name in columns if name != "label" and not re.fullmatch(form, name)]

    def valued_indices(self, column: str) -> list[str]:
        """Names of the columns of all indices within list column `column`, if any of them has a value but 0 or 1."""
        block, *_ = next(_blocks(self.path, 1 << 20, quoted=False))
        names: dict[str, None] = {}
        plain = True
        for token in block.decode("utf-8", "replace").split():
            *name, value = token.split(":")
            if len(name) == self.num_parts - 1 and (self.num_parts == 2 or name[0] == column):
                names[":".join(name)] = None
                plain = plain and value in ("0", "1", "1.0", "0.0")
        return [] if plain else sorted(names, key=lambda text: (len(text), text))

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        """Yield the columns; blocks are smaller than of other text, since exploded pairs take several times more."""
        for block, first_line, done, end in _blocks(self.path, max(1, chunk_bytes // 4), quoted=False, start=start):
            lines = [
                (number, line)
                for number, line in enumerate(block.decode("utf-8", "replace").split("\n"))
                if line.partition("#")[0].strip()
            ]
            if not lines:
                continue
            line_numbers = [first_line + number for number, _ in lines]

            def locate(row: int, line_numbers: list[int] = line_numbers) -> str:
                return f"{self.path} line {line_numbers[row]:,}"

            frame = self._parse([line.partition("#")[0] for _, line in lines], columns, locate)
            yield Chunk(frame, 0, locate, done, end)

    def _parse(self, lines: list[str], columns: list[str], locate: Callable[[int], str]) -> pl.DataFrame:
        tokens = pl.Series("tokens", lines).str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
        frame = pl.DataFrame({"row": range(len(lines))}, schema={"row": pl.UInt32}).with_columns(tokens)
        pairs = (
            frame.select("row", pl.col("tokens").list.slice(1).alias("token"))
            .filter(pl.col("token").list.len() > 0)
            .explode("token")
            .with_columns(pl.col("token").str.split(":").alias("part"))
        )
        bad = pairs.filter(pl.col("part").list.len() != self.num_parts)
        if bad.height:
            form = "index:value" if self.num_parts == 2 else "field:index:value"
            raise DataError(f"{locate(bad['row'][0])} holds {bad['token'][0]!r}, which is not {form}")
        names = ["index", "text"] if self.num_parts == 2 else ["field", "index", "text"]
        pairs = pairs.with_columns(pl.col("part").list.get(i).alias(name) for i, name in enumerate(names))
        pairs = pairs.with_columns(pl.col("text").cast(pl.Float64, strict=False).alias("value"))
        bad = pairs.filter(pl.col("value").is_null())
        if bad.height:
            raise DataError(f"{locate(bad['row'][0])} holds {bad['token'][0]!r}, whose value is not a number")

        result = frame.select("row")
        for name in columns:
            if name == "label":
                label = frame["tokens"].list.first()
                is_minus_one = label.cast(pl.Float64, strict=False) == -1
                column = pl.DataFrame({"row": frame["row"], name: label.set(is_minus_one.fill_null(False), "0")})
            else:
                column = self._column(pairs, name, locate)
            result = result.join(column, on="row", how="left", maintain_order="left")
            if name != "label":
                absent = (
                    pl.lit([], dtype=pl.List(pl.String)) if result.schema[name] == pl.List(pl.String) else pl.lit("0")
                )
                result = result.with_columns(pl.col(name).fill_null(absent))
        return result.select(columns)

    def _column(self, pairs: pl.DataFrame, name: str, locate: Callable[[int], str]) -> pl.DataFrame:
        """Column `name` of the rows that have it: a list of indices, or the value of one index."""
        if self.num_parts == 2:
            is_list, mine = name == "features", pl.lit(True) if name == "features" else pl.col("index") == name
        else:
            field, separator, index = name.partition(":")
            is_list = not separator
            mine = pl.col("field") == field
            if separator:
                mine = mine & (pl.col("index") == index)
        mine_only = pairs.filter(mine)
        if not is_list:
            return mine_only.group_by("row").agg(pl.col("text").first().alias(name))
        bad = mine_only.filter(~pl.col("value").is_in([0.0, 1.0]))
        if bad.height:
            numbered = bad["index"][0] if self.num_parts == 2 else f"{bad['field'][0]}:{bad['index'][0]}"
            raise DataError(
                f"{locate(bad['row'][0])} holds {bad['token'][0]!r}: an index in column {name!r} has no value but 0 or 1; "
                f"declare a numeric or dense field with column = {numbered!r} instead"
            )
        return (
            mine_only.filter(pl.col("value") == 1).group_by("row", maintain_order=True).agg(pl.col("index").alias(name))
        )


def _expand(source: str | Path) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p) in SUFFIXES and p.name[0] not in "._")
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


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _find_format(path: Path) -> Format:
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        return "parquet"
    if head.startswith((b"PK\x03\x04", b"\xff\xfe", b"\xfe\xff")):
        kind = "a zip archive (or a spreadsheet)" if head.startswith(b"PK") else "UTF-16 text"
        raise DataError(
            f"{path} is {kind}; embtrim reads UTF-8 or latin-1 text (also gzipped), parquet, libsvm and libfm"
        )
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: unknown suffix {suffix!r}; known: {', '.join(SUFFIXES)}; or pass format='csv', 'parquet', .."
        )
    found = SUFFIXES[suffix]
    if found is None:
        first = _first_nonblank_line(path)
        if not _SPARSE_LINE.match(first):
            return "csv"
        return "libfm" if first.split()[1].count(b":") == 2 else "libsvm"
    return found


def _find_separator(path: Path, first_line: bytes) -> str:
    if _suffix(path) in (".tsv", ".tab"):
        return "\t"
    counts = {sep: first_line.count(sep.encode()) for sep in ("\t", ",", ";", "|", "::")}
    if counts["::"]:
        return "::"
    best = max(counts, key=lambda sep: counts[sep])
    return best if counts[best] else ","


def _open_binary(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """The file's bytes, unzipped if it is a gz, and the raw file below (for its position)."""
    raw = open(path, "rb")  # noqa: SIM115 - closed by the caller
    if raw.read(2) == b"\x1f\x8b":
        raw.seek(0)
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
    raw.seek(0)
    return raw, raw


def _first_nonblank_line(path: Path) -> bytes:
    for block, *_ in _blocks(path, 1 << 16, quoted=False):
        for line in block.split(b"\n"):
            if line.strip():
                return line.rstrip(b"\r")
    raise DataError(f"{path} is empty")


def _blocks(
    path: Path, size: int, quoted: bool, skip_lines: int = 0, start: Position = START
) -> Iterator[tuple[bytes, int, float, Position]]:
    """Yield (block of whole rows, its first line number, part of the file read, offset and line after the block).

    `skip_lines` lines are left out at the start of the file, blank ones not counted. A quoted cell may span lines: a row
    ends at a newline with an even number of quotes before it.
    """
    file_size = max(1, path.stat().st_size)
    line_number = start.line
    if start.offset:
        skip_lines = 0  # a position lies behind a block, and so behind these lines
    file, raw = _open_binary(path)
    try:
        while True:
            try:
                if file.tell() < start.offset:
                    file.seek(start.offset)
                block = file.read(size)
                if not block.endswith(b"\n"):
                    block += file.readline(MAX_LINE_BYTES)
                if quoted and block.count(b'"') % 2:
                    block += _rest_of_quoted(file, path, line_number)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(
                    f"{path} is a damaged gz file after line {line_number:,} ({_first_line(error)})"
                ) from None
            if not block:
                return
            if len(block) > size + MAX_LINE_BYTES - 1:
                raise DataError(
                    f"{path} line {line_number:,} and those after it do not end within {MAX_LINE_BYTES >> 20} MB"
                )
            if line_number == 1 and block.startswith(b"\xef\xbb\xbf"):
                block = block[3:]
            first_line = line_number
            line_number += block.count(b"\n")
            while skip_lines and block:
                line, _, block = block.partition(b"\n")
                first_line += 1
                skip_lines -= bool(line.strip())
            if block:
                yield block, first_line, raw.tell() / file_size, Position(offset=file.tell(), line=line_number)
    finally:
        file.close()
        raw.close()


def _rest_of_quoted(file: BinaryIO, path: Path, line_number: int) -> bytes:
    """The lines up to the one that closes a quoted cell."""
    lines, num_bytes = [], 0
    for line in file:
        lines.append(line)
        num_bytes += len(line)
        if line.count(b'"') % 2:
            break
        if num_bytes > MAX_LINE_BYTES:
            raise DataError(
                f"{path}: a quote opened after line {line_number:,} is not closed within {MAX_LINE_BYTES >> 20} MB; "
                'if " is plain text in this log, pass quoted=False'
            )
    return b"".join(lines)


def _without_blank_lines(block: bytes) -> bytes:
    return re.sub(rb"(?m)^\r?(\n|\Z)", b"", block)


def _logical_rows(block: bytes, quoted: bool) -> Iterator[tuple[int, bytes]]:
    """Yield (line offset in the block, row) of the rows; a quoted cell may span lines. For error messages only."""
    row, start = b"", 0
    for offset, line in enumerate(block.split(b"\n")):
        if not row:
            if not line.strip(b"\r"):
                continue
            start = offset
        row = row + b"\n" + line if row else line
        if not quoted or row.count(b'"') % 2 == 0:
            yield start, row
            row = b""


def _row_locator(name: str, start: int) -> Callable[[int], str]:
    return lambda row: f"{name} row {start + row + 1:,}"


def _slice_rows(num_columns: int, chunk_bytes: int) -> int:
    rows = min(SLICE_ROWS, max(4_096, SLICE_CELLS // max(1, num_columns)))
    return max(1, rows * min(chunk_bytes, CHUNK_BYTES) // CHUNK_BYTES)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _some(names: Sequence[str], limit: int = 12) -> str:
    """The names for a message, cut after `limit`."""
    more = f", .. ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
