"""config.pbtxt of a Triton repository, parsed by the part of Triton's model_config.proto that exports use, and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

# Names and numbers of fields and types as in github.com/triton-inference-server/common, protobuf/model_config.proto.
TYPES = {
    "INVALID": 0, "BOOL": 1, "UINT8": 2, "UINT16": 3, "UINT32": 4, "UINT64": 5, "INT8": 6, "INT16": 7, "INT32": 8, "INT64": 9,
    "FP16": 10, "FP32": 11, "FP64": 12, "STRING": 13, "BF16": 14,
}  # fmt: skip
OF_SESSION = {
    "tensor(string)": "STRING", "tensor(int64)": "INT64", "tensor(int32)": "INT32", "tensor(double)": "FP64",
    "tensor(float)": "FP32",
}  # fmt: skip


def parsed(text: str) -> Any:
    """The settings; a text that Triton could not parse is refused."""
    one, many = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL, descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    enum = file.enum_type.add(name="DataType")
    for name, number in TYPES.items():
        enum.value.add(name=f"TYPE_{name}", number=number)

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> None:
        added = file.message_type.add(name=name)
        for field, number, label, kind, of in fields:
            added.field.add(
                name=field, number=number, label=label, type=kind, type_name=f".inference.{of}" if of else None
            )

    message("ModelTensorReshape", ("shape", 1, many, kinds.TYPE_INT64, ""))
    reshape = ("reshape", 5, one, kinds.TYPE_MESSAGE, "ModelTensorReshape")
    for name, number in (("ModelInput", 3), ("ModelOutput", 2)):
        dtype = (("data_type", 2, one, kinds.TYPE_ENUM, "DataType"), ("dims", number + 1, many, kinds.TYPE_INT64, ""))
        message(name, ("name", 1, one, kinds.TYPE_STRING, ""), *dtype, (*reshape[:1], number + 3, *reshape[2:]))
    message("ModelDynamicBatching")
    message(
        "ModelConfig",
        ("name", 1, one, kinds.TYPE_STRING, ""),
        ("max_batch_size", 4, one, kinds.TYPE_INT32, ""),
        ("input", 5, many, kinds.TYPE_MESSAGE, "ModelInput"),
        ("output", 6, many, kinds.TYPE_MESSAGE, "ModelOutput"),
        ("dynamic_batching", 11, one, kinds.TYPE_MESSAGE, "ModelDynamicBatching"),
        ("backend", 17, one, kinds.TYPE_STRING, ""),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, kind())


def check_repository(folder: Path, name: str, batches: bool) -> onnxruntime.InferenceSession:
    """Compare a repository's settings with its graph as onnxruntime reads it; returns the session of the graph."""
    config = parsed((folder / name / "config.pbtxt").read_text("utf-8"))
    session = onnxruntime.InferenceSession(str(folder / name / "1" / "model.onnx"))
    assert (config.name, config.backend) == (name, "onnxruntime")
    assert (config.max_batch_size > 0, config.HasField("dynamic_batching")) == (batches, batches)
    numbers = {number: kind for kind, number in TYPES.items()}
    for told, read in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in told] == [tensor.name for tensor in read]
        for tensor, value in zip(told, read, strict=True):
            assert numbers[tensor.data_type] == OF_SESSION[value.type]
            sizes = [size if isinstance(size, int) else -1 for size in value.shape]
            if batches:
                assert value.shape[0] == "batch"
                sizes = sizes[1:]
            assert list(tensor.dims), "Triton needs a dimension"
            assert list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims) == sizes
    return session
