"""ONNX files written and read without their large tensors in memory.

A message of protobuf that holds the tables takes their bytes four times: as tensors, as a message, serialised, and serialised
inside the message around it. Here the message is made without the data of large tensors, and the data go from where they
lie into the file. The file is the same, byte for byte.

Numbers of fields are those of onnx.proto.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx

if TYPE_CHECKING:
    import onnx_ir

# Tensors of fewer bytes stay in the message.
LARGE_BYTES = 1 << 16

_GRAPH_OF_MODEL, _INITIALIZER_OF_GRAPH, _NAME_OF_TENSOR, _DATA_OF_TENSOR = 7, 5, 8, 9
_VARINT, _EIGHT_BYTES, _MESSAGE, _FOUR_BYTES = 0, 1, 2, 5


class Parts(NamedTuple):
    """A model in parts.

    Attributes:
        model: The model, in which large initializers have no data.
        data: Bytes of the large initializers, by name.
    """

    model: onnx.ModelProto
    data: Mapping[str, memoryview]


def parts_of(model: onnx_ir.Model) -> Parts:
    """The parts of a model as exporters have it; the data are those of the model, without a copy."""
    import onnx_ir

    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    large = {n: t for n, t in held.items() if t is not None and t.nbytes >= LARGE_BYTES and t.dtype.itemsize >= 1}
    for name, tensor in large.items():
        stand_in = onnx_ir.ExternalTensor("", None, None, tensor.dtype, shape=tensor.shape, name=tensor.name or name)  # type: ignore[arg-type]
        model.graph.initializers[name].const_value = stand_in
    try:
        message = onnx_ir.to_proto(model)
    finally:
        for name, tensor in large.items():
            model.graph.initializers[name].const_value = tensor
    for tensor in message.graph.initializer:
        if tensor.name in large:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return Parts(message, {name: _bytes_of(tensor) for name, tensor in large.items()})


def _bytes_of(tensor: onnx_ir.TensorProtocol) -> memoryview:
    """The bytes of a tensor, the lowest first in each number."""
    if sys.byteorder == "big":
        return memoryview(tensor.tobytes())
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


def read_parts(path: Path) -> Parts:
    """The parts of a file; the data are mapped, so the file must stay as it is. Weights in a file of their own stay there."""
    with path.open("rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    data: dict[str, memoryview] = {}
    small: list[bytes | memoryview] = []
    for field in _fields(whole):
        if field.number != _GRAPH_OF_MODEL:
            small.append(field.whole)
            continue
        graph: list[bytes | memoryview] = []
        for part in _fields(field.content):
            name, values = _large_data(part)
            if values is None:
                graph.append(part.whole)
                continue
            data[name] = values
            kept = [inner.whole for inner in _fields(part.content) if inner.number != _DATA_OF_TENSOR]
            graph += _message(_INITIALIZER_OF_GRAPH, kept)
        small += _message(_GRAPH_OF_MODEL, graph)
    return Parts(onnx.ModelProto.FromString(b"".join(small)), data)


def _large_data(field: _Field) -> tuple[str, memoryview | None]:
    """Name and data of an initializer, if they are large."""
    if field.number != _INITIALIZER_OF_GRAPH or len(field.content) < LARGE_BYTES:
        return "", None
    inner = {
        part.number: part.content
        for part in _fields(field.content)
        if part.number in (_NAME_OF_TENSOR, _DATA_OF_TENSOR)
    }
    values = inner.get(_DATA_OF_TENSOR)
    return bytes(inner.get(_NAME_OF_TENSOR, b"")).decode(), None if values is None or len(
        values
    ) < LARGE_BYTES else values


def write_parts(parts: Parts, path: Path) -> None:
    """Write a model as one file."""
    whole: list[bytes | memoryview] = []
    for field in _fields(memoryview(parts.model.SerializeToString())):
        if field.number != _GRAPH_OF_MODEL:
            whole.append(field.whole)
            continue
        graph: list[bytes | memoryview] = []
        for part in _fields(field.content):
            if part.number != _INITIALIZER_OF_GRAPH:
                graph.append(part.whole)
                continue
            inner = [*_fields(part.content)]
            name = next((bytes(i.content).decode() for i in inner if i.number == _NAME_OF_TENSOR), "")
            before = [i.whole for i in inner if i.number < _DATA_OF_TENSOR]
            values = _message(_DATA_OF_TENSOR, [parts.data[name]]) if name in parts.data else []
            after = [i.whole for i in inner if i.number >= _DATA_OF_TENSOR]
            graph += _message(_INITIALIZER_OF_GRAPH, [*before, *values, *after])
        whole += _message(_GRAPH_OF_MODEL, graph)
    with path.open("wb") as file:
        file.writelines(whole)


class _Field(NamedTuple):
    """One field of a serialised message: its number, its bytes with and without what says number and length."""

    number: int
    whole: memoryview
    content: memoryview


def _fields(message: memoryview) -> Iterator[_Field]:
    """The fields of a serialised message, in order."""
    place = 0
    while place < len(message):
        begin = place
        key, place = _read_varint(message, place)
        kind = key & 7
        if kind == _VARINT:
            start, stop = place, _read_varint(message, place)[1]
        elif kind == _MESSAGE:
            length, start = _read_varint(message, place)
            stop = start + length
        else:
            assert kind in (_EIGHT_BYTES, _FOUR_BYTES), f"a field of kind {kind} in an ONNX file"
            start, stop = place, place + (8 if kind == _EIGHT_BYTES else 4)
        yield _Field(key >> 3, message[begin:stop], message[start:stop])
        place = stop


def _message(number: int, parts: list[bytes | memoryview] | list[memoryview]) -> list[bytes | memoryview]:
    """A field that holds a message, or bytes, given in parts."""
    return [_varint(number << 3 | _MESSAGE) + _varint(sum(map(len, parts))), *parts]


def _read_varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _varint(value: int) -> bytes:
    """A number as seven bits a byte, the lowest first."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
