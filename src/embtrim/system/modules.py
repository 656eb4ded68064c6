"""Modules of one's own as others leave them: inside wrappers, compiled, in several modes, or refusing to be copied."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.errors import ModelError

# Classes that do nothing but call a module that they hold, by name, and the attribute that holds it. The classes are known
# by name: to import them takes seconds, or another package.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "_FabricModule": "_original_module",  # Lightning Fabric
    "DistributedModelParallel": "_dmp_wrapped_module",
}
WRAPPING_PACKAGES = ("torch", "lightning", "lightning_fabric", "torchrec")

# Most numbers of a buffer that a search gives back as they were: counters and running statistics.
KEPT_NUMEL = 2**20

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def is_finite(value: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor infinity; the look takes no memory."""
    return not value.numel() or bool(torch.stack(torch.aminmax(value)).isfinite().all())


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers such as torch.compile and DataParallel, or the module as given.

    Example:
        >>> unwrapped(nn.DataParallel(nn.Linear(2, 1)))
        Linear(in_features=2, out_features=1, bias=True)
    """
    while (inside := _inside(module)) is not None:
        module = inside
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    for kind in type(module).__mro__:
        if kind.__name__ in WRAPPERS and kind.__module__.partition(".")[0] in WRAPPING_PACKAGES:
            return module._modules.get(WRAPPERS[kind.__name__])
    return None


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of a model, as `nn.Module.named_modules` gives them, with wrappers left out of both."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if remove_duplicate and id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def uncompiled() -> AbstractContextManager[Any]:
    """Run everything that torch.compile made without compilation inside a `with` block.

    Compiled code does not call hooks that were added after it was compiled.
    """
    if "torch._dynamo" not in sys.modules:  # it takes seconds to import, and nothing is compiled without it
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def reads_given(module: nn.Module, name: str, get: Callable[[], Any]) -> Iterator[None]:
    """Let reads of `module.name` get what `get()` returns inside a `with` block.

    The module's parameter of this name stays as it is, for optimisers and state dicts.
    """
    own = type(module)
    reads = {name: property(lambda _self: get()), "__module__": own.__module__, "__qualname__": own.__qualname__}
    module.__class__ = type(own.__name__, (own,), reads)
    try:
        yield
    finally:
        module.__class__ = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside a `with` block; each of its modules then returns to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Give a model its attributes, modes, gradients and small buffers back after a `with` block, whatever ran it.

    A forward pass may keep results in attributes, draw random numbers and count in buffers. Generators of torch, NumPy and
    Python continue where they were. Parameters are left to those who change them.
    """
    modules = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    values = [(b, b.detach().clone()) for b in model.buffers() if b.layout == torch.strided and b.numel() <= KEPT_NUMEL]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    drawn, drawn_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (a loss may draw from it)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_numpy)  # noqa: NPY002
        for module, attributes, buffers in modules:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def graph_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Results of earlier computations that modules keep in attributes with their graphs, by path; copies leave them out."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        waiting = [(name, value) for name, value in vars(module).items() if name not in vars(nn.Module())]
        seen: set[int] = set()
        while waiting:
            name, value = waiting.pop(0)
            if isinstance(value, Tensor) and value.grad_fn is not None:
                found[f"{path}.{name}" if path else name] = value
            elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
                seen.add(id(value))
                items = value.items() if isinstance(value, dict) else enumerate(value)
                waiting.extend((f"{name}[{key!r}]", item) for key, item in items)
    return found


def copied(model: ModuleT, memo: dict[int, Any] | None = None) -> ModuleT:
    """A deep copy of a model, without the attributes that hold results of earlier computations with their graphs.

    Such an attribute is missing in the copy until a forward pass makes it again; in a list it is None.

    Args:
        model: The model.
        memo: Objects that take the place of others in the copy, by the id of the other. All copies are added to it; see
            `copy.deepcopy`.

    Raises:
        ModelError: An attribute cannot be copied; the message names it.
    """
    memo = {} if memo is None else memo
    memo.update((id(tensor), None) for tensor in graph_tensors(model).values())
    given = dict(memo)
    try:
        found = copy.deepcopy(model, memo)
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    vars(memo[id(module)]).pop(name, None)
        return found
    except Exception as error:  # an attribute may refuse in any way
        found = _uncopied(model, given) or f"{_said(error)}; give it a __deepcopy__"
        raise ModelError(f"this {type(model).__name__} cannot be copied: {found}") from error


def _uncopied(model: nn.Module, memo: Mapping[int, Any]) -> str | None:
    """What cannot be copied of a model, and the remedy; None if every attribute alone can."""
    modules = {id(module): module for module in model.modules()}  # each is looked at by itself
    for path, module in model.named_modules():
        if id(module) in memo:
            continue
        own = {name: value for name, value in vars(module).items() if name != "_modules"}
        for name, value in {**module._parameters, **module._buffers, **own}.items():
            try:
                copy.deepcopy(value, {**memo, **modules})
            except Exception as error:  # see `copied`
                where, kind = f"{path}.{name}" if path else name, type(value).__name__
                return f"its attribute {where!r}, a {kind}, refuses ({_said(error)}); {_remedy(module, name, value)}"
    return None


def _remedy(module: nn.Module, name: str, value: Any) -> str:
    """How a module can do without an attribute that cannot be copied."""
    if isinstance(value, Tensor) and f"{name}_g" in module._parameters:
        return "use torch.nn.utils.parametrizations.weight_norm, or call torch.nn.utils.remove_weight_norm first"
    if isinstance(value, Tensor) and f"{name}_orig" in module._parameters:
        return "use torch.nn.utils.parametrizations.spectral_norm, or call torch.nn.utils.remove_spectral_norm first"
    if isinstance(value, Tensor):
        return "it is the result of a computation: keep value.detach(), or compute it in forward"
    return "make it when it is first used, keep it outside of the module, or give its class a __deepcopy__"


def _said(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
