"""Text files, plain or gzipped, in blocks of whole rows."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from embtrim.data.log_file import START, Position, first_line_of
from embtrim.errors import DataError

MAX_LINE_BYTES = 256 << 20
QUOTES_ARE_TEXT = 'if " is plain text in this log, read it with ReadOptions(quoted=False) (--set read.quoted=false)'


def _open_binary(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """The file, unzipped if it is gzipped, and the raw file underneath, whose position tells the progress."""
    raw = open(path, "rb")  # noqa: SIM115 - closed by the caller
    if raw.read(2) == b"\x1f\x8b":
        raw.seek(0)
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
    raw.seek(0)
    return raw, raw


def first_nonblank_line(path: Path) -> bytes:
    """The first line that is not blank; DataError if there is none."""
    for block, *_ in row_blocks(path, 1 << 16, quoted=False):
        for line in block.split(b"\n"):
            if line.strip():
                return line.rstrip(b"\r")
    raise DataError(f"{path} is empty")


def row_blocks(
    path: Path, size: int, quoted: bool, skip_lines: int = 0, start: Position = START
) -> Iterator[tuple[bytes, int, float, Position]]:
    """Yield the file in blocks of whole rows.

    A quoted cell may span lines: a row ends at a newline with an even number of quotes before it.

    Args:
        path: The file.
        size: Bytes per block, to which the rest of the last row is added.
        quoted: Whether `"` quotes cells.
        skip_lines: Lines to leave out at the start of the file; blank lines are not counted.
        start: Place where reading goes on.

    Yields:
        The block, the number of its first line, the part of the file read so far, and the offset and line after the
        block.

    Raises:
        DataError: The gzip stream is damaged, or a row does not end within MAX_LINE_BYTES.
    """
    file_size = max(1, path.stat().st_size)
    line_number = start.line
    if start.offset:
        skip_lines = 0  # a position lies after a block, and so after these lines
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
                    f"{path} is a damaged gz file after line {line_number:,} ({first_line_of(error)})"
                ) from None
            if not block:
                return
            if len(block) > size + MAX_LINE_BYTES - 1:
                raise DataError(
                    f"{path} line {line_number:,} and the lines after it do not end within {MAX_LINE_BYTES >> 20} MB"
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
    """The lines up to the line that closes a quoted cell."""
    lines, num_bytes = [], 0
    for line in file:
        lines.append(line)
        num_bytes += len(line)
        if line.count(b'"') % 2:
            break
        if num_bytes > MAX_LINE_BYTES:
            raise DataError(
                f"{path}: a quote opened after line {line_number:,} is not closed within {MAX_LINE_BYTES >> 20} MB; "
                f"{QUOTES_ARE_TEXT}"
            )
    return b"".join(lines)
