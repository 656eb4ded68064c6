"""Modules of one's own as others leave them: inside wrappers, compiled, in several modes, or refusing to be copied."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

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
}
WRAPPING_PACKAGES = ("torch", "lightning", "lightning_fabric")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside a `with` block; each of its modules then returns to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def copied(model: ModuleT, memo: dict[int, Any] | None = None) -> ModuleT:
    """A deep copy of a model.

    Args:
        model: The model.
        memo: Objects that take the place of others in the copy, by the id of the other. All copies are added to it; see
            `copy.deepcopy`.

    Raises:
        ModelError: An attribute cannot be copied; the message names it.
    """
    memo = {} if memo is None else memo
    given = dict(memo)
    try:
        return copy.deepcopy(model, memo)
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
