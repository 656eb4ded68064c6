"""Files and texts that a stranger may have made, so that no file takes the memory or the time of its reader.

A size, a depth or a number that a file claims is checked before anything is made of it. Each function here raises ValueError
with a few words on what is wrong, or OSError; its callers add the file and the remedy, in an error of their own.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from embtrim.errors import shown

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

MAX_JSON_BYTES = 32 << 20
MAX_JSON_VALUES = 2_000_000  # a value takes some 100 bytes of memory, and three bytes of a file
MAX_TOML_BYTES = 4 << 20
# What moves the cursor, colours, hides or turns around the text of a terminal. A lone surrogate cannot be printed at all.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_INT64 = range(-(2**63), 2**63)


def open_regular(path: str | Path, may_be_pipe: bool = False) -> BinaryIO:
    """Open a regular file: a pipe would wait for ever, and a device may never end.

    Args:
        path: The file.
        may_be_pipe: Whether a pipe or a device is read as well, for a path that a user typed.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (0 if may_be_pipe else getattr(os, "O_NONBLOCK", 0))
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode) or not (may_be_pipe or stat.S_ISREG(mode)):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, max_bytes: int, may_be_pipe: bool = False) -> bytes:
    """The content of a file of at most `max_bytes`; see `open_regular`."""
    with open_regular(path, may_be_pipe) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes >> 20} MB")
    return content


def read_json(path: str | Path, any_number: bool = False) -> Any:
    """The value of a JSON file; see `parse_json`."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), any_number)


def parse_json(content: bytes | str, any_number: bool = False) -> Any:
    """The value of a JSON text with a bounded number of values and numbers of 64 bits.

    Args:
        content: The text, as UTF-8 or decoded.
        any_number: Whether NaN, infinities and integers of any size are read too.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES >> 20} MB")
    if sum(map(text.count, ",[{")) > MAX_JSON_VALUES:
        raise ValueError(f"it holds more than {MAX_JSON_VALUES:,} values")
    hooks: dict[str, Any] = {"parse_int": _integer, "parse_float": _number, "parse_constant": _refuse}
    try:
        return json.loads(text, **({} if any_number else hooks))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_toml_tables(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file or pipe; its integers have 64 bits, as TOML says."""
    return parse_toml(read_bytes(path, MAX_TOML_BYTES, may_be_pipe=True).decode("utf-8"))


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text; see `read_toml_tables`."""
    try:
        found = tomllib.loads(text)
        large = next((value for value in _leaves(found) if isinstance(value, int) and value not in _INT64), None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # Python reads no integer of more than some thousand digits
        raise ValueError("it holds an integer of more than 64 bits") from None
    if large is not None:
        raise ValueError(f"it holds the integer {shown(large)}; integers have 64 bits")
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _integer(digits: str) -> int:
    if len(digits) > 20 or int(digits) not in _INT64:
        raise ValueError(f"it holds an integer of {len(digits):,} digits; integers have 64 bits")
    return int(digits)


def _number(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        _refuse(digits)
    return found


def _refuse(digits: str) -> NoReturn:
    raise ValueError(f"it holds {digits[:20]}, which is not a finite number")


def printable(text: str) -> str:
    r"""A text for a terminal: control characters other than newlines and tabs become escapes.

    Example:
        >>> printable("\x1b[31mred")
        '\\x1b[31mred'
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
