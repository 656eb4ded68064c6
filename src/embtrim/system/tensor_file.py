"""safetensors files written from the tensors themselves: the library's own writer makes a copy of all of them first."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# Names of types in a file, in the order in which the library writes them: the widest numbers first, so that all are aligned.
_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, byte for byte as `safetensors.torch.save_file` does.

    Args:
        tensors: Contiguous tensors by name. The library writes them all if one has a type that is rare, or lies on a device.
        path: File to write.
        metadata: Texts for the header.

    Raises:
        ValueError: A tensor is not contiguous.
        OSError: The file cannot be written.
    """
    as_in_file = all(t.dtype in _NAMES and t.is_contiguous() and t.device.type == "cpu" for t in tensors.values())
    if not as_in_file or sys.byteorder != "little":
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
        return
    order = [*_NAMES]
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name.encode()))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        value, start = tensors[name], end
        end += value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if tensors[name].numel():
                file.write(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data)
