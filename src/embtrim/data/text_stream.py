"""Text files as a stream of whole lines: unzipped, in UTF-8 or a superset of ASCII, each line ended by a newline."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from embtrim.data.places import Place
from embtrim.errors import DataError, first_line_of

HEAD_BYTES = 1 << 20  # how much of a file its dialect is found from
REMOTE_HEAD_BYTES = 1 << 17
MAX_LINE_BYTES = 256 << 20

# Encodings whose text is cut into lines and cells as it is, and decoded afterwards. All others become UTF-8 first.
PLAIN = ("utf-8", "cp1252", "iso8859-1")

_VALID_PAIRS = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_CUT_CHARACTER = re.compile(rb"[\xc2-\xf4][\x80-\xbf]{0,2}\Z")
_HIGH = re.compile(rb"[\x80-\xff]")
# By WHATWG, the five bytes that cp1252 leaves out are the control characters of latin-1.
codecs.register_error("embtrim.c1", lambda e: (e.object[e.start : e.end].decode("latin-1"), e.end))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Encoding:
    """The character encoding of a file.

    Attributes:
        name: Its name in Python.
        is_sure: Whether it was given, or bytes above 127 show it. Otherwise the text seen so far is ASCII.
        has_mark: Whether the text starts with a byte order mark.
    """

    name: str
    is_sure: bool
    has_mark: bool


def read_head(place: Place) -> tuple[bytes, bool]:
    """The first bytes of a file, unzipped, and whether they are all of it."""
    size = HEAD_BYTES if place.remote is None else REMOTE_HEAD_BYTES
    file, raw = _unzipped(place)
    with contextlib.closing(raw), contextlib.closing(file), _zip_errors(place, 1):
        head = file.read(size)
        return head, len(head) < size or not file.read(1)


def find_encoding(head: bytes, given: str | None) -> Encoding:
    """The encoding of a file that starts with `head`."""
    marks = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
             (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
    mark = next((name for bom, name in marks if head.startswith(bom)), None)
    if given is not None:
        name = codecs.lookup(given).name
        return Encoding({"utf-8-sig": "utf-8", "ascii": "utf-8"}.get(name, name), True, mark is not None)
    if mark is not None:
        return Encoding(mark, True, True)
    zeros = head[: len(head) // 2 * 2].count(0)
    if zeros > len(head) // 4:
        little = head[1::2].count(0) > head[::2].count(0)
        return Encoding("utf-16-le" if little else "utf-16-be", True, False)
    head = _CUT_CHARACTER.sub(b"", head)
    if head.isascii():
        return Encoding("utf-8", False, False)
    num_pairs = len(_VALID_PAIRS.findall(head))
    num_alone = len(_HIGH.findall(_VALID_PAIRS.sub(b"", head)))
    return Encoding("utf-8" if num_pairs > num_alone else "cp1252", True, False)


def is_utf8(text: bytes) -> bool:
    """Whether text is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_latin(text: bytes) -> bool:
    """Whether text that is not UTF-8 has no character of UTF-8 either, so that cp1252 is the likely encoding."""
    return _VALID_PAIRS.search(text) is None


def decoded(text: bytes, encoding: str) -> bytes:
    """Text of an encoding in PLAIN as UTF-8; UTF-8 stays as it is."""
    if encoding == "utf-8" or text.isascii():
        return text
    return text.decode(encoding, "embtrim.c1").encode()


def text_head(head: bytes, is_whole: bool, encoding: Encoding, line_end: str | None) -> tuple[bytes, str]:
    """The head as whole lines that end in newlines, as `TextLines` reads them, and the line end found."""
    if encoding.name not in PLAIN:
        decoder = codecs.getincrementaldecoder(encoding.name)("replace")
        head = decoder.decode(head).encode()
    found = line_end or ("cr" if b"\r" in head and b"\n" not in head else "lf")
    if found == "cr":
        head = head.replace(b"\r", b"\n")
    cut = head.rfind(b"\n") + 1
    return head if is_whole or not cut else head[:cut], found


class TextLines(contextlib.AbstractContextManager["TextLines"]):
    """The lines of a file, read in blocks of whole lines.

    Attributes:
        done: The part of the file read so far, 0..1.
        line: Number of the next line.
    """

    def __init__(self, place: Place, encoding: str, line_end: str, offset: int = 0, line: int = 1) -> None:
        """Open the file.

        Args:
            place: The file.
            encoding: Its encoding. Text of an encoding in PLAIN comes as it is, any other as UTF-8.
            line_end: "cr" if lines end in CR alone; they come with newlines.
            offset: Bytes of text to leave out at the start.
            line: Number of the line at `offset`.
        """
        self._place, self.line, self.done = place, line, 0.0
        self._file, self._raw = _unzipped(place)
        if encoding not in PLAIN:
            self._file = io.BufferedReader(cast(Any, _Utf8(self._file, encoding, place.name)), 1 << 16)
        if line_end == "cr":
            self._file = io.BufferedReader(cast(Any, _Newlines(self._file)), 1 << 16)
        with _zip_errors(place, line):
            _skip(self._file, offset)

    def read(self, size: int) -> bytes:
        """The next `size` bytes and the rest of the last line; empty at the end of the file.

        Raises:
            DataError: The gzip stream is damaged, text does not fit the encoding, or a line is longer than MAX_LINE_BYTES.
        """
        with _zip_errors(self._place, self.line):
            block = self._file.read(size)
            if not block.endswith(b"\n"):
                block += self._file.readline(MAX_LINE_BYTES)
        if len(block) > size + MAX_LINE_BYTES - 1:
            raise DataError(f"{self._place.name} line {self.line:,} does not end within {MAX_LINE_BYTES >> 20} MB")
        self.done = min(1.0, self._raw.tell() / self._place.size) if self._place.size else 0.5
        self.line += block.count(b"\n")
        return block

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._raw.close()


def _unzipped(place: Place) -> tuple[BinaryIO, io.BufferedReader]:
    """The file, unzipped if it is gzipped, and the raw file underneath, whose position tells the progress."""
    raw = place.open()
    is_zipped = raw.peek(2)[:2] == b"\x1f\x8b"
    return (cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_zipped else raw), raw


def _skip(file: BinaryIO, num_bytes: int) -> None:
    if file.seekable():
        file.seek(num_bytes)
        return
    while num_bytes and (part := file.read(min(num_bytes, 1 << 20))):
        num_bytes -= len(part)


@contextlib.contextmanager
def _zip_errors(place: Place, line: int) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{place.name} is a damaged gz file after line {line:,} ({first_line_of(error)})") from None


class _Utf8(io.RawIOBase):
    """Text of any encoding as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str, name: str) -> None:
        self._file, self._name, self._encoding = file, name, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            part = self._file.read(1 << 20)
            try:
                self._ready = memoryview(self._decoder.decode(part, final=not part).encode())
            except UnicodeError as error:
                raise DataError(
                    f"{self._name} is not {self._encoding} text ({error}); say its encoding with ReadOptions(encoding=..) "
                    "(--encoding)"
                ) from None
            if not part:
                break
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken


class _Newlines(io.RawIOBase):
    """Text whose lines end in CR, with newlines instead."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._file.read(len(buffer)).replace(b"\r", b"\n")
        buffer[: len(part)] = part
        return len(part)
