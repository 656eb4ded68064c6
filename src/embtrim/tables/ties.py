"""Ties: modules that read the weight of a compact table as a parameter of their own, such as a tied output layer.

A tie stores nothing: the parameter is computed from the table at every read, and an nn.Linear multiplies by what the table
stores. State dicts, optimisers and files hold the table once.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from embtrim.tables.logits import table_logits
from embtrim.tables.replacements import Replacement


class Tied(nn.Module):
    """A module some of whose parameters are weights of compact tables.

    Attributes:
        tied_tables: The tables by the names of the parameters. They belong to other modules.
    """

    tied_tables: dict[str, Replacement]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made again where the module is copied or opened."""
        return _new, (type(self).__bases__[1], tuple(self.tied_tables)), vars(self)


def tie(module: nn.Module, name: str, table: Replacement) -> None:
    """Let a module read a parameter from a compact table, in place."""
    del module._parameters[name]
    tables = {**vars(module).get("tied_tables", {}), name: table}
    base = type(module).__bases__[1] if isinstance(module, Tied) else type(module)
    vars(module)["tied_tables"] = tables
    module.__class__ = _tied_class(base, tuple(tables))  # type: ignore[assignment]


def _new(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _tied_class(base, names)
    return made.__new__(made)


@functools.cache
def _tied_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: property(functools.partial(_read, name=name)) for name in names}
    if "weight" in names and base.forward is nn.Linear.forward:
        members["forward"] = _linear
    return type(
        f"Tied{base.__name__}", (Tied, base), {**members, "__module__": base.__module__, "__doc__": base.__doc__}
    )


def _read(module: Tied, name: str) -> Tensor:
    return module.tied_tables[name].weight


def _linear(module: Any, input: Tensor) -> Tensor:
    """nn.Linear.forward, without building the weight."""
    logits = table_logits(input, module.tied_tables["weight"])
    return logits if module.bias is None else logits + module.bias
