"""Parameters that a module indexes itself, as embeddings without nn.Embedding: found in the source of its class."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

# Functions and methods that look rows up.
LOOKUPS = ("embedding", "embedding_bag", "index_select", "gather", "take", "take_along_dim")
# Modules of these packages index their parameters for reasons of their own.
KNOWN = ("torch.", "embtrim.")


def bare_tables(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Matrices (rows, columns) that the source of a module's class looks rows up in, by the name of the parameter.

    A subscript counts unless it is a slice, a constant, or the counter of a loop over a range. A parameter of a
    ParameterList or a ParameterDict is named "list.0". A class without readable source has none.
    """
    if type(module).__module__.startswith(KNOWN):
        return
    for name in sorted(_looked_up(type(module))):
        value = getattr(module, name, None)
        held = {name: value}
        if isinstance(value, (nn.ParameterList, nn.ParameterDict)):
            held = {f"{name}.{key}": parameter for key, parameter in value.named_parameters(recurse=False)}
        for path, parameter in held.items():
            if isinstance(parameter, nn.Parameter) and parameter.ndim == 2 and parameter.is_floating_point():
                yield path, parameter


@cache
def _looked_up(kind: type[nn.Module]) -> frozenset[str]:
    """Attributes of `self` that a class and its bases look rows up in, as far as their source is there."""
    found: set[str] = set()
    for cls in kind.__mro__:
        if cls.__module__.startswith(KNOWN) or cls is object:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name != "__init__":
                found |= _of_function(function)
    return frozenset(found)


def _of_function(function: ast.FunctionDef) -> set[str]:
    """Attributes of `self` that one function looks rows up in."""
    aliases: dict[str, str] = {}
    counters: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and (owner := _attribute(node.value, aliases)):
            aliases.update({target.id: owner for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, (ast.For, ast.comprehension)):
            targets = [name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)]
            if (
                isinstance(node.iter, ast.Call)
                and isinstance(node.iter.func, ast.Name)
                and node.iter.func.id == "range"
            ):
                counters.update(targets)
            for owner in filter(None, (_attribute(part, aliases) for part in ast.walk(node.iter))):
                aliases.update(dict.fromkeys(targets, owner))
    found: set[str] = set()
    for node in ast.walk(function):
        read: list[ast.expr] = []
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _is_lookup(node.slice, counters):
            read = [node.value]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in LOOKUPS:
                receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
                read = [*receiver, *node.args, *(keyword.value for keyword in node.keywords)]
        found.update(filter(None, (_attribute(value, aliases) for value in read)))
    return found


def _attribute(node: ast.expr | ast.AST, aliases: dict[str, str]) -> str | None:
    """NAME of `self.NAME`, `self.NAME[constant]` or a variable that stands for it; None for anything else."""
    if isinstance(node, ast.Subscript):
        return _attribute(node.value, aliases)
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _is_lookup(index: ast.expr, counters: set[str]) -> bool:
    """Whether a subscript may be a tensor of ids."""
    if isinstance(index, ast.Tuple):
        return any(_is_lookup(part, counters) for part in index.elts)
    if isinstance(index, (ast.Slice, ast.Constant, ast.UnaryOp)):
        return False
    return not (isinstance(index, ast.Name) and index.id in counters)
