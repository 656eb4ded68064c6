"""Exports as one graph: pt2 (torch.export) and ONNX."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from embtrim.errors import EmbtrimError
from embtrim.serving.served import Served, copy_for_export, named_tensors
from embtrim.system.torch_private import ONNX_LOGGER, saved_from_where_they_lie, set_example_inputs, tree_map
from embtrim.tables.gathered_bags import gather_bags

if TYPE_CHECKING:
    import onnx_ir
    from typing_extensions import Buffer

# Values that constant folding may add to an ONNX graph per constant. A folded table would be stored beside the table itself.
FOLDED_VALUES = 64
# Weights of more bytes get a file of their own: protobuf ends at 2 GiB, graph included.
ONNX_FILE_BYTES = 3 * 2**29


def traced(served: Served) -> torch.export.ExportedProgram:
    """The module as one graph, for any batch of at least one row."""
    program = torch.export.export(served.module, served.args, served.kwargs, dynamic_shapes=served.shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of this machine, and the file leaves it
    drop_unread(program)
    return program


def drop_unread(program: torch.export.ExportedProgram) -> None:
    """Remove parameters and buffers that the graph does not read, such as the layout that only training needs; in place."""
    specs = program.graph_signature.input_specs
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for spec, node in list(zip(specs, placeholders, strict=True)):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None and not node.users:
            specs.remove(spec)
            program.graph.erase_node(node)
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
    program.graph_module.recompile()


def write_pt2(served: Served, folder: Path) -> None:
    """Write model.pt2: `torch.export.load(..).module()(ids=ids, dense=dense)` gives logits, without embtrim."""
    with quiet_exporter(), _Sink((folder / "model.pt2").open("wb", buffering=0)) as sink:
        program = traced(served)
        # torch keeps the example: somebody's rows, and the whole tensor that they are a slice of. The shapes are enough.
        set_example_inputs(
            program,
            tree_map(lambda x: x.new_zeros(()).expand(x.shape) if isinstance(x, Tensor) else x, program.example_inputs),
        )
        with saved_from_where_they_lie():
            torch.export.save(program, sink)
        if sink.error is not None:
            raise sink.error


class _Sink(io.BufferedWriter):
    """A file for the writer of torch, which aborts the process where a write fails: the first error is kept instead.

    Attributes:
        error: The first error; what comes after it is not written.
    """

    error: OSError | None = None

    def write(self, data: Buffer) -> int:
        """Write to the file."""
        try:
            if self.error is None:
                super().write(data)
        except OSError as error:
            self.error = error
        return len(memoryview(data))


def write_onnx(served: Served, folder: Path, external_data: bool = False, other_bytes: int = 0) -> None:
    """Write model_ids.onnx for a zoo model, model.onnx for a module of one's own.

    The first has the inputs `ids` and `dense` and the output `logits`, the second those of its forward.

    Args:
        served: The model.
        folder: Folder to write to.
        external_data: Store the weights in a file of their own, whatever their size.
        other_bytes: Bytes of what else a file with the weights will hold.

    Raises:
        EmbtrimError: onnx or onnxscript is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise EmbtrimError(f"format 'onnx' needs {' and '.join(missing)}; pip install embtrim[export]")
    from onnxscript.optimizer import optimize_ir

    from embtrim.serving.onnx_files import parts_of, write_parts

    with quiet_exporter():
        program = torch.onnx.export(
            traced(replace(served, module=gather_bags(copy_for_export(served.module)))),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=list(named_tensors(served)),
            output_names=served.outputs,
        )
        assert program is not None
        optimize_ir(program.model, output_size_limit=FOLDED_VALUES)
    name_batch(program.model)
    weights = sum(
        value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None
    )
    path = folder / served.onnx_name
    if external_data or weights + other_bytes > ONNX_FILE_BYTES:
        program.save(path, external_data=True)
    else:
        write_parts(parts_of(program.model), path)
    for value in program.model.graph.initializers.values():
        value.const_value = None  # onnx_ir keeps the graph after its last use; it must not keep the tables


def name_batch(model: onnx_ir.Model) -> None:
    """Call the dimension that counts rows `batch` in all shapes, in place; the exporter numbers it."""
    import onnx_ir

    first = next(value.shape[0] for value in model.graph.inputs if value.shape)
    for value in [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]:
        if value.shape is not None and first in value.shape.dims:
            value.shape = onnx_ir.Shape(["batch" if size == first else size for size in value.shape.dims])


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence exporters about their own insides, and about a torchvision that they do not need."""
    loggers = [ONNX_LOGGER, *map(logging.getLogger, ("onnxscript", "onnx_ir"))]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
