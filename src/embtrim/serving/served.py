"""What is exported: a module, an example of its inputs, and the dimensions that may vary.

Axes: B batch, C id columns, E dense fields.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from embtrim.errors import ConfigError, ModelError
from embtrim.models.ctr_model import CTRModel
from embtrim.schema import Schema
from embtrim.serving.manifest import Input
from embtrim.system.torch_private import tree_leaves, tree_leaves_with_names, tree_map
from embtrim.tables.replacements import CompactEmbedding

# A zoo model takes ids. From a bundle comes a second graph, model.onnx, which takes raw values.
IDS_GRAPH, RAW_GRAPH = "model_ids.onnx", "model.onnx"

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Served:
    """A module with all that an exporter needs to trace it.

    Attributes:
        module: The module in eval mode, on the CPU.
        args: Example of its positional inputs.
        kwargs: Example of its inputs by keyword.
        shapes: Dimensions that may vary, for each input, as torch.export wants them.
        outputs: Names of the outputs; None leaves them to the exporter.
        onnx_name: Name of the ONNX file.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    shapes: Any = None
    outputs: tuple[str, ...] | None = None
    onnx_name: str = RAW_GRAPH


class ServedModel(nn.Module):
    """A zoo model whose inputs have the names they are served under."""

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, dense: Tensor | None = None) -> Tensor:
        """(B,) logits of int32 ids (B, C) and float32 dense values (B, E)."""
        return self.model(ids, dense)


def serve_model(model: CTRModel) -> Served:
    """A zoo model with its tables split by width, and two rows of inputs.

    Raises:
        ModelError: The tables are not ready; see `export`.
    """
    model.tables.check_free()
    model.tables.check_quantized()
    served = copy_for_export(model)
    served.tables.split_by_width()
    # Two rows stand for any number: torch.export takes sizes 0 and 1 for constants.
    inputs = {"ids": torch.zeros(2, model.schema.num_id_columns, dtype=torch.int32)}
    if model.schema.dense_fields:
        inputs["dense"] = torch.zeros(2, len(model.schema.dense_fields))
    batch = torch.export.Dim("batch", min=1)
    return Served(ServedModel(served), (), inputs, {name: {0: batch} for name in inputs}, ("logits",), IDS_GRAPH)


def serve_module(module: nn.Module, example: object) -> Served:
    """A module of one's own, with an example of its inputs.

    Args:
        module: Any module; it is not changed.
        example: Inputs of its forward; see `export`.

    Raises:
        ConfigError: The example is missing, has one row, does not fit the module's forward, or holds a container that
            torch.export cannot describe.
        ModelError: The plan says fewer than 32 bits and a table is fp32.
    """
    for table in module.modules():
        if isinstance(table, CompactEmbedding) and table.bits < 32 and table.stores_columns and table.packed is None:
            raise ModelError(
                f"the plan says {table.bits} bits for the table of {table.path!r}, which is fp32 still; call "
                "embtrim.quantize_(model) once it is trained, or compact with plan.with_bits(32)"
            )
    kwargs: dict[str, Any] = example if isinstance(example, dict) else {}
    args: tuple[Any, ...] = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    sizes = [leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    if not sizes or min(sizes) < 2:
        given = "none" if example is None else f"one of {min(sizes, default=0)}"
        raise ConfigError(
            f"a {type(module).__name__} does not say what it reads: give export an example=batch of at least two rows, as "
            f"its forward takes it; given {given}"
        )
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"the example does not fit {type(module).__name__}.forward({', '.join(signature.parameters)}): {error}; give "
            "export an example= of its arguments, without labels: a tensor, a tuple of the arguments or a dict by name"
        ) from error
    batch = torch.export.Dim("batch", min=1)

    def varying(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return None
        return {0: batch if leaf.shape[0] == sizes[0] else torch.export.Dim.AUTO}

    args, kwargs = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, (args, kwargs))
    try:
        shapes = tree_map(varying, kwargs or args)
    except Exception as error:  # a container of one's own, such as a KeyedJaggedTensor, may want tensors inside
        kinds = ", ".join(sorted({type(value).__name__ for value in (*args, *kwargs.values())}))
        raise ConfigError(
            f"torch.export cannot be told which dimensions of these inputs may vary ({kinds}: {error}); export a module whose "
            "forward takes tensors, or lists or dicts of them, and builds its other inputs from them"
        ) from error
    module = copy_for_export(module)
    with torch.no_grad():
        outputs = module(*args, **kwargs)
    return Served(module, args, kwargs, shapes, _output_names(outputs, {*named_tensors(Served(module, args, kwargs))}))


def _output_names(outputs: Any, inputs: Container[str]) -> tuple[str, ...]:
    """Names of the tensors that a module gives: the keys of a dict, otherwise output_0, output_1, and so on."""
    leaves = [(_plain_name(path), leaf) for path, leaf in tree_leaves_with_names(outputs)]
    names = [
        f"output_{name}" if name.isdecimal() else name or "output_0"
        for name, leaf in leaves
        if isinstance(leaf, Tensor)
    ]
    return tuple(f"output_{name}" if name in inputs else name for name in names)


def _plain_name(path: str) -> str:
    """Keys of nested containers, with dots between them."""
    return re.sub(r"\W+", ".", path).strip(".")


def copy_for_export(model: ModuleT) -> ModuleT:
    """A copy in eval mode on the CPU; weights on the CPU are shared, not copied."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach().cpu(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared).eval().cpu()


def argument_names(served: Served) -> list[str]:
    """Names of the arguments of `forward` that the example gives."""
    return list(inspect.signature(served.module.forward).bind(*served.args, **served.kwargs).arguments)


def call_of(served: Served) -> str:
    """The arguments of `forward` as code, such as "ids=ids, dense=dense"."""
    by_position = argument_names(served)[: len(served.args)]
    return ", ".join([*by_position, *(f"{name}={name}" for name in served.kwargs)])


def named_tensors(served: Served) -> dict[str, Tensor]:
    """Tensors of the example in order, each by its argument and, after dots, its keys inside nested containers."""
    arguments = zip(argument_names(served), (*served.args, *served.kwargs.values()), strict=False)
    leaves = [(name + keys, leaf) for name, tree in arguments for keys, leaf in tree_leaves_with_names(tree)]
    return {_plain_name(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def describe_inputs(schema: Schema) -> dict[str, Input]:
    """The inputs of a zoo model, by name."""
    ids = [field.name for field in schema.id_fields for _ in range(field.length)]
    dense = [field.name for field in schema.dense_fields]
    inputs: dict[str, Input] = {"ids": {"dtype": "int32", "shape": ["batch", len(ids)], "columns": ids}}
    if dense:
        inputs["dense"] = {"dtype": "float32", "shape": ["batch", len(dense)], "columns": dense}
    return inputs


def describe_example(served: Served) -> dict[str, Input]:
    """The inputs of a module of one's own, by name, as its example has them."""
    tensors = named_tensors(served)
    rows = next(len(tensor) for tensor in tensors.values() if tensor.ndim)
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": [("batch" if n == rows else "any") if axis == 0 else n for axis, n in enumerate(tensor.shape)],
        }
        for name, tensor in tensors.items()
    }
