"""A model repository of NVIDIA's Triton server around the ONNX graph of an export.

triton/NAME/config.pbtxt   inputs, outputs and batching, read from the graph itself
triton/NAME/1/model.onnx   the graph, from raw values where the export has it; the same file as the export's own

`tritonserver --model-repository=EXPORT/triton` serves it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from embtrim.errors import ConfigError

if TYPE_CHECKING:
    import onnx
    from onnx import ValueInfoProto

# Most rows of a request, or of several requests that Triton joins; an operator may change it in config.pbtxt.
MAX_BATCH = 4096

# Types of Triton's model_config.proto, without their prefix TYPE_, by those of ONNX's TensorProto.
_TYPES = {
    "FLOAT": "FP32", "DOUBLE": "FP64", "FLOAT16": "FP16", "BFLOAT16": "BF16", "BOOL": "BOOL", "STRING": "STRING",
    "INT8": "INT8", "INT16": "INT16", "INT32": "INT32", "INT64": "INT64",
    "UINT8": "UINT8", "UINT16": "UINT16", "UINT32": "UINT32", "UINT64": "UINT64",
}  # fmt: skip


def check_name(name: str) -> str:
    """The name of a model, which is that of its folder.

    Raises:
        ConfigError: It cannot name a folder.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"triton name {name!r} cannot name a folder; allowed: letters, digits, '_', '-' and '.'")
    return name


def write_repository(graph: Path, name: str) -> Path:
    """Write a model repository beside a graph, and return its folder.

    The graph and its external data are linked, not copied, where the file system can.

    Args:
        graph: ONNX file.
        name: Name of the model.
    """
    import onnx

    read = onnx.load(graph, load_external_data=False)
    home = graph.parent / "triton" / name
    (home / "1").mkdir(parents=True)
    _link(graph, home / "1" / "model.onnx")
    for data in {entry.value for tensor in _stored_apart(read) for entry in tensor if entry.key == "location"}:
        _link(graph.parent / data, home / "1" / data)
    stored = {tensor.name for tensor in read.graph.initializer}
    inputs = [value for value in read.graph.input if value.name not in stored]
    (home / "config.pbtxt").write_text(config_text(name, inputs, read.graph.output), "utf-8")
    return home.parent


def config_text(name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> str:
    """Text of config.pbtxt, as Triton's model_config.proto defines it.

    Triton batches a model if the first dimension of every input and output counts rows; `dims` then leave this dimension
    out, and a tensor without another one has `dims: [ 1 ]`, reshaped to none. Any other model takes one request at a time.
    """
    shapes = {value.name: _shape(value) for value in (*inputs, *outputs)}
    batches = all(shape[:1] == ["batch"] for shape in shapes.values())
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH if batches else 0}",
    ]
    for kind, values in (("input", inputs), ("output", outputs)):
        for value in values:
            shape = shapes[value.name][1:] if batches else shapes[value.name]
            dims = ", ".join(str(size if isinstance(size, int) else -1) for size in shape) or "1"
            lines += [
                f"{kind} {{",
                f"  name: {_quoted(value.name)}",
                f"  data_type: TYPE_{_type(value)}",
                f"  dims: [ {dims} ]",
            ]
            lines += [*(["  reshape { shape: [ ] }"] if not shape else []), "}"]
    return "\n".join([*lines, *(["dynamic_batching { }"] if batches else []), ""])


def _shape(value: ValueInfoProto) -> list[int | str]:
    """Sizes of a tensor's dimensions; a name, or "", for one that may vary."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]


def _type(value: ValueInfoProto) -> str:
    import onnx

    return _TYPES[onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)]


def _stored_apart(model: onnx.ModelProto) -> list[Sequence[onnx.StringStringEntryProto]]:
    """Where the tensors outside the file are: entries by tensor."""
    import onnx

    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    tensors = [*model.graph.initializer, *(a.t for a in attributes if a.HasField("t"))]
    return [t.external_data for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL]


def _quoted(text: str) -> str:
    r"""A string of protobuf's text format; bytes beyond printable ASCII become octal escapes.

    Example:
        >>> print(_quoted('a"b\nc'))
        "a\"b\012c"
    """
    escaped = (f"\\{chr(b)}" if chr(b) in '"\\' else chr(b) if 32 <= b < 127 else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(escaped)}"'


def _link(source: Path, target: Path) -> None:
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
