"""Options of reading a raw log: its format, its columns and how its text is parsed."""

from __future__ import annotations

from typing import Literal, TypeAlias

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
    """How a raw log is read.

    Attributes:
        format: "csv" (any text with separators), "parquet", "libsvm" or "libfm"; None finds out from name and content.
        header: Whether the first line of text names the columns.
        columns: Names of the columns, instead of the names in the header; with header = true the header line is
            skipped.
        separator: Text between two cells; None means a tab in .tsv files, otherwise the separator of the first line.
        encoding: Character encoding of text.
        quoted: Whether `"` quotes cells; None means yes, unless the separator is a tab or has several characters.
    """

    format: Format | None = None
    header: bool = True
    columns: tuple[str, ...] | None = None
    separator: str | None = None
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    quoted: bool | None = None
