"""Where a parquet file holds its columns, and how much it unpacks to, read from its headers: nothing is unpacked.

A stranger's file of some kilobytes may unpack to gigabytes, and the footer may say otherwise. What a reader allocates for a
page is what the page's own header claims, so the headers are added up. They are structs of thrift's compact protocol; see
parquet.thrift of the Parquet format for the numbers of the fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from embtrim.untrusted import open_regular

_MAX_FOOTER_BYTES = 1 << 20
_MAX_PAGES = 20_000
_MAX_PAGE_HEADER_BYTES = 1 << 16
_MAX_DEPTH = 16
_BYTES_PER_VALUE = 16  # a text in a frame has a view of 16 bytes, a number at most 8
_MAGIC = b"PAR1"

# Fields of parquet.thrift by number.
_ROW_GROUPS, _COLUMNS, _NUM_ROWS, _META_DATA, _NAMES = 4, 1, 3, 3, 3
_NUM_VALUES, _PACKED_BYTES, _DATA_START, _DICTIONARY_START = 5, 7, 9, 11
_PAGE_BYTES, _PACKED_PAGE_BYTES, _PAGE_KINDS = 2, 3, (5, 7, 8)


@dataclass(frozen=True)
class RowGroup:
    """Rows that a parquet file holds together.

    Attributes:
        num_rows: The number of rows.
        ranges: The column, start and end of each range of bytes; a nested column has several.
    """

    num_rows: int
    ranges: tuple[tuple[str, int, int], ...]


def row_groups(end: bytes) -> list[RowGroup]:
    """The row groups of a parquet file, by the last bytes of the file, with its whole footer.

    Raises:
        ValueError: The footer is damaged.
    """
    try:
        footer = _Struct(end[-8 - int.from_bytes(end[-8:-4], "little") : -8]).fields()
        found = []
        for group in footer[_ROW_GROUPS]:
            chunks = [column[_META_DATA] for column in group[_COLUMNS]]
            names = [chunk[_NAMES][0].decode() for chunk in chunks]
            starts = [_start(chunk) for chunk in chunks]
            ranges = [(n, s, s + c[_PACKED_BYTES]) for n, s, c in zip(names, starts, chunks, strict=True)]
            found.append(RowGroup(group[_NUM_ROWS], tuple(ranges)))
        return found
    except (AttributeError, IndexError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError("its footer is damaged") from None


def unpacked_bytes(path: Path) -> int:
    """Bytes that a parquet file takes as a frame, at most.

    Raises:
        ValueError: The file is not regular or not parquet, is damaged, or has more pages than a file of its kind.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little")
        if end[4:] != _MAGIC or length > size - 8:
            raise ValueError("it is not a parquet file, or it is truncated")
        if length > _MAX_FOOTER_BYTES:
            raise ValueError(f"its footer has more than {_MAX_FOOTER_BYTES >> 20} MB")
        file.seek(size - 8 - length)
        try:
            footer = _Struct(file.read(length)).fields()
            chunks = [column[_META_DATA] for group in footer[_ROW_GROUPS] for column in group[_COLUMNS]]
            total = num_pages = 0
            for chunk in chunks:
                num_values = 0
                for num_bytes, num_inside in _pages(file, chunk):
                    total += num_bytes
                    num_values += num_inside
                    num_pages += 1
                    if num_pages > _MAX_PAGES:
                        raise ValueError(f"it has more than {_MAX_PAGES:,} pages")
                total += _BYTES_PER_VALUE * max(num_values, int(chunk[_NUM_VALUES]))
        except (AttributeError, IndexError, KeyError, TypeError, OverflowError, RecursionError):
            raise ValueError("its headers are damaged") from None
    return total


def _pages(file: BinaryIO, chunk: dict[int, Any]) -> Iterator[tuple[int, int]]:
    """Unpacked bytes and number of values of each page of a column chunk."""
    place = _start(chunk)
    end = place + chunk[_PACKED_BYTES]
    while place < end:
        file.seek(place)
        header = _Struct(file.read(_MAX_PAGE_HEADER_BYTES))
        fields = header.fields()
        sizes = next((fields[kind] for kind in _PAGE_KINDS if kind in fields), {})
        packed = fields[_PACKED_PAGE_BYTES]
        if packed < 0 or fields[_PAGE_BYTES] < 0:
            raise KeyError("a page of a negative size")
        yield fields[_PAGE_BYTES], max(0, sizes.get(1, 0))
        place += header.place + packed


def _start(chunk: dict[int, Any]) -> int:
    """The first byte of a column chunk."""
    place = min(chunk[_DATA_START], chunk.get(_DICTIONARY_START) or chunk[_DATA_START])
    if place < 0:
        raise IndexError("a page before the file")
    return place


class _Struct:
    """Reads a struct of thrift's compact protocol.

    Attributes:
        place: Bytes read so far.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.place = 0

    def fields(self, depth: int = 0) -> dict[int, Any]:
        """The values by the numbers of their fields; texts are bytes."""
        if depth > _MAX_DEPTH:
            raise RecursionError
        found: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            found[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):  # in a list, a truth value takes a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            length = self._unsigned()
            self._skip(length)
            return self._content[self.place - length : self.place]
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            if count > len(self._content) - self.place:
                raise IndexError
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.fields(depth + 1)
        raise KeyError(kind)

    def _byte(self) -> int:
        self.place += 1
        return self._content[self.place - 1]

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self._content):
            raise IndexError

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise OverflowError
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
