"""Sparse text: files in the libsvm and libfm formats.

In libsvm lines (`label index:value ...`) column `features` is the list of a row's indices, for 0/1 values (0 is
dropped). A column named by an index, such as `7`, is the value at that index, 0 where the index is absent.

In libfm lines with fields (`label field:index:value ...`, also known as libffm) column `3` is the list of indices of
field 3, for 0/1 values, and column `3:17` is the value at index 17 of field 3.

The label column is `label`; label -1 reads as 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import polars as pl

from embtrim.data.log_file import SHOWN_LINES, Chunk, LogFile, Position, Skipped
from embtrim.data.places import Place
from embtrim.data.read_options import Format, ReadOptions
from embtrim.data.text_stream import PLAIN, TextLines, find_encoding, read_head, text_head
from embtrim.errors import DataError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TWO_PARTS = re.compile(rf"\s*{_NUMBER}(\s+[^\s:#]+:{_NUMBER})*\s*(#.*)?")
_THREE_PARTS = re.compile(rf"\s*{_NUMBER}(\s+[^\s:#]+:[^\s:#]+:{_NUMBER})*\s*(#.*)?")


class SparseFile(LogFile):
    """A libsvm or libfm file; see the module docstring for its columns.

    Attributes:
        place: Where the file is.
        num_parts: Parts of a token: 2 for index:value, 3 for field:index:value.
    """

    def __init__(self, place: Place, kind: Format, options: ReadOptions) -> None:
        self.place = place
        self.name = place.name
        self.size = place.size
        self._skips = options.on_error == "skip"
        raw, is_whole = read_head(place)
        self._encoding = find_encoding(raw, options.encoding).name
        head, self._line_end = text_head(raw, is_whole, find_encoding(raw, options.encoding), options.line_end)
        self._head = self._decoded(head)
        lines = (line.split() for line in self._head.split("\n"))
        first = next((line for line in lines if line), None)
        if first is None:
            raise DataError(f"{self.name} is empty")
        self.num_parts = 3 if kind == "libfm" else 2
        if self.num_parts == 3 and len(first) > 1 and first[1].count(":") == 1:
            self.num_parts = 2  # libfm without fields has the layout of libsvm
        if self.num_parts == 2:
            self.columns = ("label", "features")
        else:
            fields = {token.split(":")[0] for token in self._head.split() if token.count(":") == 2}
            self.columns = ("label", *sorted(fields, key=lambda name: (len(name), name)))

    def __getstate__(self) -> dict[str, Any]:
        """How the file reaches another process: without its first megabyte, which a draft reads."""
        return {**self.__dict__, "_head": ""}

    def _decoded(self, text: bytes) -> str:
        name = self._encoding if self._encoding in PLAIN else "utf-8"
        return text.decode(name, "replace").removeprefix("\ufeff")

    def identity(self) -> list[Any]:
        """See `LogFile.identity`."""
        return self.place.identity()

    def missing(self, columns: Sequence[str]) -> list[str]:
        """The names in `columns` that are not an index; which indices a file has is known only once it is read."""
        form = r"features|\d+" if self.num_parts == 2 else r"[^\s:]+(:[^\s:]+)?"
        return [name for name in columns if name != "label" and not re.fullmatch(form, name)]

    def valued_indices(self, column: str) -> list[str]:
        """The columns of all indices in list column `column` if any value is not 0 or 1, otherwise an empty list."""
        names: dict[str, None] = {}
        plain = True
        for token in self._head.split():
            *name, value = token.split(":")
            if len(name) == self.num_parts - 1 and (self.num_parts == 2 or name[0] == column):
                names[":".join(name)] = None
                plain = plain and value in ("0", "1", "1.0", "0.0")
        return [] if plain else sorted(names, key=lambda text: (len(text), text))

    def chunks(
        self, columns: list[str], chunk_bytes: int, start: Position, numbers: Collection[str]
    ) -> Iterator[Chunk]:
        """Yield the rows in order; see `LogFile.chunks`.

        Blocks are smaller than for other text, because pairs of index and value take several times the memory.
        """
        size, offset, skipped = max(1, chunk_bytes // 4), start.offset, Skipped()
        with TextLines(self.place, self._encoding, self._line_end, start.offset, start.line) as blocks:
            while block := blocks.read(size):
                offset += len(block)
                first_line = blocks.line - block.count(b"\n")
                lines = [
                    (first_line + number, line)
                    for number, line in enumerate(self._decoded(block).split("\n"))
                    if line.partition("#")[0].strip()
                ]
                if self._skips:
                    faults = {number for number, line in lines if not self._form.fullmatch(line)}
                    shown = [
                        f"{self.name} line {n:,} is not {self._what}: {text[:120]}" for n, text in lines if n in faults
                    ]
                    skipped = skipped.plus(Skipped(num_lines=len(faults), first=tuple(shown[:SHOWN_LINES])))
                    lines = [(number, line) for number, line in lines if number not in faults]
                if not lines:
                    continue
                line_numbers = [number for number, _ in lines]

                def locate(row: int, line_numbers: list[int] = line_numbers) -> str:
                    return f"{self.name} line {line_numbers[row]:,}"

                frame = self._parse([line.partition("#")[0] for _, line in lines], columns, locate)
                end = Position(offset=offset, line=blocks.line)
                yield Chunk(frame, 0, locate, blocks.done, end, skipped)
                skipped = Skipped()
        if skipped.num_lines:
            yield Chunk(pl.DataFrame(schema=dict.fromkeys(columns, pl.String)), 0, str, 1.0, start, skipped)

    @property
    def _what(self) -> str:
        """The form of a token, for messages."""
        return "index:value" if self.num_parts == 2 else "field:index:value"

    @property
    def _form(self) -> re.Pattern[str]:
        """The form of a line."""
        return _TWO_PARTS if self.num_parts == 2 else _THREE_PARTS

    def _parse(self, lines: list[str], columns: list[str], locate: Callable[[int], str]) -> pl.DataFrame:
        """The columns of the lines, without comments."""
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
            raise DataError(f"{locate(bad['row'][0])} holds {bad['token'][0]!r}, which is not {self._what}")
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
        """Column `name` for the rows that have it: a list of indices, or the value at one index."""
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
