"""All that embtrim uses of torch's private API, each with a fallback for releases of torch that lack it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from torch.utils import _pytree
except ImportError:  # pragma: no cover - no release so far
    _pytree = None

# The logger that torch's ONNX exporter warns through; of another name it would merely not be silenced.
ONNX_LOGGER = logging.getLogger("torch.onnx._internal.exporter._registration")


def has_amx() -> bool:
    """Whether the processor has AMX tiles."""
    return _processor_has("_is_amx_tile_supported", "amx_tile")


def has_bf16() -> bool:
    """Whether the processor has bf16 instructions of AVX-512 or AMX."""
    return _processor_has("_is_avx512_bf16_supported", "avx512_bf16") or has_amx()


def _processor_has(function: str, flag: str) -> bool:
    ask = getattr(torch.cpu, function, None)
    if ask is not None:
        return ask()
    try:
        return flag in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that run before or after its forward pass; False if torch does not say."""
    return any(getattr(module, name, None) for name in ("_forward_pre_hooks", "_forward_hooks"))


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that run before or after its backward pass; False if torch does not say."""
    return any(getattr(module, name, None) for name in ("_backward_pre_hooks", "_backward_hooks"))


def compile_error() -> type[Exception]:
    """The exception that a forward pass raises where torch cannot compile it."""
    try:
        from torch._dynamo.exc import TorchDynamoException  # takes seconds to import
    except ImportError:
        return RuntimeError
    return TorchDynamoException


def set_example_inputs(program: torch.export.ExportedProgram, inputs: Any) -> None:
    """Replace the example that an exported program keeps, in place; some releases have no public way to do so."""
    program._example_inputs = inputs


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dicts, in order."""
    if _pytree is not None:
        return _pytree.tree_leaves(tree)
    return [leaf for _, leaf in _leaves_with_keys(tree)]


def tree_leaves_with_names(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of nested lists, tuples and dicts, each with the expression that reads it, such as `['ids'][0]`."""
    if _pytree is not None:
        return [(_pytree.keystr(path), leaf) for path, leaf in _pytree.tree_flatten_with_path(tree)[0]]
    return list(_leaves_with_keys(tree))


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Nested lists, tuples and dicts with a function applied to each leaf."""
    if _pytree is not None:
        return _pytree.tree_map(function, tree)
    if isinstance(tree, dict):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(tree_map(function, value) for value in tree)
    return function(tree)


def _leaves_with_keys(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves_with_keys(value, f"{path}[{key!r}]")
    else:
        yield path, tree


@contextmanager
def saved_from_where_they_lie() -> Iterator[None]:
    """Have `torch.export.save` write weights from their own memory inside a `with` block; torch copies each of them twice."""
    try:
        from torch.export.pt2_archive import _package

        writer, bytes_of = _package.PT2ArchiveWriter, _package._get_raw_tensor_bytes
        write_bytes = writer.write_bytes
    except (ImportError, AttributeError):  # pragma: no cover - no release so far
        yield
        return

    class InPlace(bytes):
        storage: torch.UntypedStorage

    def in_place(value: torch.Tensor) -> bytes:
        if type(value.data) is not torch.Tensor or value.device.type != "cpu" or not value.data_ptr():
            return bytes_of(value)
        found = InPlace()
        found.storage = value.untyped_storage()
        return found

    def write(self: Any, name: str, data: bytes) -> None:
        if isinstance(data, InPlace):
            self.archive_file.write_record(name, data.storage, data.storage.nbytes())
        else:
            write_bytes(self, name, data)

    _package._get_raw_tensor_bytes, writer.write_bytes = in_place, write
    try:
        yield
    finally:
        _package._get_raw_tensor_bytes, writer.write_bytes = bytes_of, write_bytes
