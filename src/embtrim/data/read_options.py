"""Options of reading a raw log: its format, its columns and how its text is parsed."""

from __future__ import annotations

import codecs
from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from embtrim.config import Config

Format: TypeAlias = Literal["csv", "parquet", "libsvm", "libfm"]

# None: any text format; the first line tells which.
SUFFIXES: dict[str, Format | None] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".txt": None,
    ".dat": None,
    ".parquet": "parquet",
    ".pq": "parquet",
    ".libsvm": "libsvm",
    ".svm": "libsvm",
    ".libfm": "libfm",
    ".libffm": "libfm",
    ".ffm": "libfm",
}


class ReadOptions(Config):
    """How a raw log is read. What is None is found from the first megabyte of each file, and logged.

    Attributes:
        format: "csv" (any text with separators), "parquet", "libsvm" or "libfm"; None finds out from name and content.
        header: Whether the first line of text names the columns.
        columns: Names of the columns, instead of the names in the header; with header = true the header line is
            skipped.
        separator: Text between two cells.
        quoted: Whether cells may be quoted.
        quote: Character that quotes cells.
        escape: How a quoted cell holds a quote: "double" (two quotes) or "backslash" (a backslash before it; the
            backslash then also escapes itself, a separator and the end of a line).
        encoding: Character encoding of text, by its name in Python, such as "utf-8", "cp1252" or "utf-16". If None,
            text that is not UTF-8 and has no byte order mark is read as cp1252, which holds latin-1.
        line_end: Where a line ends: "lf" (also after CR) or "cr" alone.
        index: Whether the first column numbers the rows and is left out; None leaves it out if it has no name or that of
            a pandas index, and no number comes twice.
        on_error: What to do with a line that cannot be split into the log's columns: "fail", or "skip" it and report
            how many lines were skipped.
        max_skipped: Largest share of lines that may be skipped, 0..1; above it reading fails.
    """

    format: Format | None = None
    header: bool = True
    columns: tuple[str, ...] | None = None
    separator: str | None = Field(default=None, min_length=1)
    quoted: bool | None = None
    quote: str | None = Field(default=None, min_length=1, max_length=1)
    escape: Literal["double", "backslash"] | None = None
    encoding: str | None = None
    line_end: Literal["lf", "cr"] | None = None
    index: bool | None = None
    on_error: Literal["fail", "skip"] = "fail"
    max_skipped: float = Field(default=0.01, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> ReadOptions:
        try:
            if self.encoding is not None:
                b"".decode(codecs.lookup(self.encoding).name)
        except LookupError:
            raise ValueError(
                f"encoding {self.encoding!r} is not known; known are the names of Python, such as utf-8, cp1252, latin-1, "
                "utf-16 or gb18030"
            ) from None
        return self
