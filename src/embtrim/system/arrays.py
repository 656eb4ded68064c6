"""Arrays and tensors of files that a stranger may have made: sizes are checked before anything is unpacked."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from embtrim.untrusted import open_regular, parse_json

MAX_HEADER_BYTES = 16 << 20  # of a safetensors file
_FREE_BYTES = 64 << 20  # what an npz may unpack to however small it is
# What numpy raises for the header of an npy file, which it reads as a Python literal, beside ValueError.
_HEADER_ERRORS = (
    struct.error, tokenize.TokenError, EOFError, SyntaxError, TypeError, LookupError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class TensorShape:
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        dtype: Name of its type, such as "F32".
        shape: Its shape.
        num_bytes: Its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def tensor_shapes(path: Path) -> dict[str, TensorShape]:
    """The tensors of a safetensors file by name, from its header alone.

    Raises:
        ValueError: The file is not regular, its header is damaged, or it is shorter than the header says.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("its header is damaged")
        header = parse_json(file.read(length))
    found, end = {}, 0
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            shape = tuple(int(length) for length in entry["shape"])
            found[name] = TensorShape(entry["dtype"], shape, last - first)
            end = max(end, last)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("its header is damaged") from None
    if 8 + length + end != size:
        raise ValueError("it is truncated" if 8 + length + end > size else "it is longer than its header says")
    return found


def map_array(path: Path) -> np.ndarray:
    """The array of an npy file, memory-mapped: nothing but its header is read.

    Raises:
        ValueError: The file is not regular or not an npy file of numbers, or is truncated.
    """
    open_regular(path).close()
    try:
        return np.lib.format.open_memmap(path, "r")
    except _HEADER_ERRORS as error:
        raise ValueError(f"its header is damaged: {type(error).__name__}") from None


def read_integers(
    path: Path,
    lengths: Mapping[str, int],
    max_ratio: int,
    free_bytes: int = _FREE_BYTES,
    optional: bool = False,
    wide: bool = False,
) -> dict[str, np.ndarray]:
    """Arrays of integers of an npz file, as int32.

    Args:
        path: The file.
        lengths: Number of entries of each array by its name; other arrays of the file are left alone.
        max_ratio: How many times its packed size an array may unpack to, if it has more than `free_bytes`.
        free_bytes: Bytes that an array may unpack to however small it is packed.
        optional: Whether the file may lack some of them.
        wide: Whether an array that is int64 in the file may hold larger integers; it then stays int64.

    Returns:
        The arrays by name, each (length,).

    Raises:
        ValueError: The file is not regular or not an npz, or lacks an array of that length.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            held = set(archive.namelist()) if optional else {f"{name}.npy" for name in lengths}
            wanted = {name: length for name, length in lengths.items() if f"{name}.npy" in held}
            return {
                name: _integers(archive, name, length, max_ratio, free_bytes, wide) for name, length in wanted.items()
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"it is not an npz file, or is damaged: {error}") from None


def _integers(
    archive: zipfile.ZipFile, name: str, length: int, max_ratio: int, free_bytes: int, wide: bool
) -> np.ndarray:
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"it has no array {name!r}") from None
    if entry.file_size > max(free_bytes, max_ratio * entry.compress_size):
        raise ValueError(
            f"array {name!r} unpacks from {entry.compress_size:,} to {entry.file_size:,} bytes; more than {free_bytes:,} bytes "
            f"may be at most {max_ratio} times as many as are packed"
        )
    with archive.open(entry) as member:
        dtype = _check_header(member, name, length)
        content = member.read(length * dtype.itemsize + 1)
    if len(content) != length * dtype.itemsize:
        raise ValueError(f"array {name!r} is damaged")
    found = np.frombuffer(content, dtype)
    if dtype.itemsize > 4 and length and not (int(found.min()) >= -(2**31) and int(found.max()) < 2**31):
        if wide and dtype == np.int64:
            return found
        raise ValueError(f"array {name!r} holds integers of more than 32 bits")
    return found.astype(np.int32, copy=False)


def _check_header(member: IO[bytes], name: str, length: int) -> np.dtype[Any]:
    """The type of the array of an npy file, which must hold `length` integers."""
    try:
        major, _ = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    except (ValueError, *_HEADER_ERRORS):
        raise ValueError(f"array {name!r} is damaged") from None
    if shape != (length,) or dtype.kind not in "iu":
        raise ValueError(f"array {name!r} is {dtype} {shape}; integers of shape ({length},) are needed")
    return dtype
