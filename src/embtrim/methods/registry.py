"""The list of search methods: our own methods, registered methods, and methods of installed packages.

A method of our own is a line of OWN. Its module is imported when its settings or its search are first needed, so that the
list can be shown without torch. A package offers a method through an entry point of the group `embtrim.methods`, whose
module calls `register`.
"""

from __future__ import annotations

import ast
import logging
import re
import sys
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from embtrim.config import Config
from embtrim.errors import ConfigError, hint

if TYPE_CHECKING:  # importing numpy would take longer than the list
    from embtrim.plan.budget_limits import Unit
    from embtrim.plan.plan import SizePlan

    Search = Callable[..., SizePlan]

Needs = Literal["trained", "initial", "nothing"]
SearchT = TypeVar("SearchT", bound="Search")

logger = logging.getLogger(__name__)

ENTRY_POINTS = "embtrim.methods"
# Names that `embtrim compare` gives to the full model and to the list of all methods.
TAKEN_NAMES = ("full", "all")


class Implementation(NamedTuple):
    """What the module of a method defines.

    Attributes:
        config: Settings class of the method.
        search: Function of (task, config, budget, seed) that returns a plan within the budget.
        plans_bits: Whether the function also takes `bits` and `target`, and plans for tables as they will be stored.
    """

    config: type[Config]
    search: Search
    plans_bits: bool = False


@dataclass(frozen=True)
class Method:
    """One search method.

    Attributes:
        name: Name on the command line and in records.
        module: Name of the module that defines the method.
        config_name: Name of the settings class.
        needs: Model that the method reads: a "trained" one, an "initial" one, or "nothing".
        adds: Units that the method adds while one fits the budget: "columns" of a table, "rows", or "sizes" of rows. Empty
            for a method that may leave room.
        implementation: Function that imports the method's module and returns its Implementation.
    """

    name: str
    module: str
    config_name: str
    needs: Needs
    adds: tuple[Unit, ...]
    implementation: Callable[[], Implementation] = field(repr=False)

    @property
    def config(self) -> type[Config]:
        """Settings class of the method."""
        return self.implementation().config

    @property
    def search(self) -> Search:
        """Function of (task, config, budget, seed) that returns a plan."""
        return self.implementation().search

    @property
    def plans_bits(self) -> bool:
        """Whether `search` also takes `bits` and `target`; see Implementation."""
        return self.implementation().plans_bits

    @property
    def what(self) -> str:
        """One line about the method: the first line of its module's docstring, read without importing the module."""
        line = _docstring(self.module).strip().partition("\n")[0]
        return line.partition(": ")[2] or line

    def parse(self, values: Mapping[str, Any], where: str = "search") -> Config:
        """Settings of this method; `preset = "faithful"` among them starts from the paper's values instead of our defaults.

        Raises:
            ConfigError: A setting is unknown or wrong, or the method does not have the preset.
        """
        values = dict(values)
        preset = values.pop("preset", None)
        if preset is not None:
            faithful = getattr(self.config, "faithful", None)
            if preset != "faithful" or faithful is None:
                allowed = "no preset" if faithful is None else "'faithful'"
                raise ConfigError(f"[{where}] preset {preset!r} is not known; method {self.name!r} has {allowed}")
            values = {**faithful, **values}
        return self.config.parse(values, where=where)


def _docstring(module: str) -> str:
    """The docstring of a module, read from its source unless the module is imported already."""
    if module in sys.modules:
        return sys.modules[module].__doc__ or ""
    spec = find_spec(module)
    source = spec.loader.get_source(module) if spec and spec.loader else None  # pyright: ignore[reportAttributeAccessIssue]
    return ast.get_docstring(ast.parse(source or "")) or ""


def _own(
    name: str, config: str, needs: Needs, adds: tuple[Unit, ...] = ("columns",), plans_bits: bool = False
) -> Method:
    """A method of ours: `search_NAME` in the module NAME of this package."""
    home = f"{__package__}.{name}"

    def implementation() -> Implementation:
        module = import_module(home)
        return Implementation(getattr(module, config), getattr(module, f"search_{name}"), plans_bits)

    return Method(name, home, config, needs, adds, implementation)


OWN = {
    method.name: method
    for method in (
        _own("frequency", "FrequencyConfig", needs="nothing", adds=("rows",)),
        _own("mde", "MDEConfig", needs="nothing"),
        _own("sseds", "SSEDSConfig", needs="trained"),
        _own("uniform", "UniformConfig", needs="nothing", adds=()),
        _own("guided", "GuidedConfig", needs="trained", adds=(), plans_bits=True),
        _own("hard_mask", "HardMaskConfig", needs="trained"),
        _own("magnitude", "MagnitudeConfig", needs="trained", adds=("columns", "rows")),
        _own("optembed", "OptEmbedConfig", needs="initial"),
        _own("pme", "PMEConfig", needs="initial", adds=("sizes",)),
        _own("random", "RandomConfig", needs="nothing"),
    )
}


# ---- methods of others -------------------------------------------------------------------------------------------------


class Methods(UserDict[str, Method]):
    """Methods by name.

    The module of an installed package is imported when its method, or the whole list, is first needed. A package that
    does not work is logged and left out.
    """

    def __missing__(self, name: str) -> Method:
        if _fault(name) is None and name in self.data:
            return self.data[name]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self.data or (isinstance(name, str) and _fault(name) is None and name in self.data)

    def __iter__(self) -> Iterator[str]:
        for name in _installed():
            _fault(name)
        return iter(list(self.data))

    def __len__(self) -> int:
        return len(list(iter(self)))


METHODS = Methods(OWN)


@cache
def _installed() -> dict[str, EntryPoint]:
    """Entry points of installed packages by method name; if two have one name, the first counts."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name in OWN or entry.name in found:
            owner = "embtrim" if entry.name in OWN else _distribution(found[entry.name])
            logger.warning(
                "%s: its method %r is left out: %s has one of this name", _distribution(entry), entry.name, owner
            )
        else:
            found[entry.name] = entry
    return found


@cache
def _fault(name: str) -> str | None:
    """Import the package that offers a method. Returns what is wrong with the package; None if nothing is, or without one."""
    entry = _installed().get(name)
    if entry is None or name in METHODS.data:
        return None
    about = f"{_distribution(entry)}: its method {name!r} cannot be used: "
    try:
        import_module(entry.module)
    except (Exception, SystemExit) as error:  # a foreign module must not break the other methods
        fault = f"{about}importing {entry.module!r} failed with {type(error).__name__}: {error}; repair or uninstall it"
    else:
        if name in METHODS.data:
            return None
        fault = (
            f"{about}importing {entry.module!r} registers no method of this name; the module must call "
            f"embtrim.methods.register({name!r}, ...)"
        )
    logger.warning("%s", fault)
    return fault


def _distribution(entry: EntryPoint) -> str:
    return f"package {entry.dist.name} {entry.dist.version}" if entry.dist else "a package"


def register(
    name: str,
    config: type[Config],
    needs: Needs,
    adds: tuple[Unit, ...] = ("columns",),
    plans_bits: bool = False,
) -> Callable[[SearchT], SearchT]:
    """Decorator that adds a search function to the methods of `search`, `run`, `compare` and the command line.

    A registered method is known in the running process only. To offer it to the command line and to the processes of
    `compare`, install a package with an entry point that names the module of the method:

        [project.entry-points."embtrim.methods"]
        NAME = "package.module"

    `embtrim.testing.check_method` checks what every method promises.

    Args:
        name: Name of the method: lower-case letters, digits, "_" and "-". A second call with the name replaces the first.
        config: Settings class, a subclass of `embtrim.config.Config`; `config()` must give the defaults.
        needs: Model that the method reads: a "trained" one, an "initial" one, or "nothing".
        adds: Units that the method adds while one fits the budget: "columns" of a table, "rows", or "sizes" of rows. Empty
            for a method that may leave room.
        plans_bits: Whether the search function takes two further arguments, `bits` and `target`, and returns a plan with
            the bits of each table within a budget for tables as the target stores them. Otherwise bits are chosen for the
            rows and columns that the function finds.

    Returns:
        A decorator for a function of (task, config, budget, seed) that returns a SizePlan within the budget; it returns
        the function itself.

    Raises:
        ConfigError: The name is malformed or taken, or another argument is of the wrong kind.

    Example:
        >>> import embtrim
        >>> from embtrim import testing
        >>> from embtrim.config import Config
        >>> from embtrim.methods import register
        >>> class LastColumnsConfig(Config):
        ...     '''Settings of the last columns; there are none.'''
        >>> @register("last_columns", LastColumnsConfig, needs="nothing", adds=())
        ... def search_last_columns(task, config, budget, seed):
        ...     full = task.full_plan()
        ...     limit, rows = full.max_params(budget), sum(table.num_rows for table in full.tables)
        ...     kept = {t.name: range(max(0, t.width - limit // rows), t.width) for t in full.tables}
        ...     return full.with_columns(kept).made_by("last_columns", budget, seed, {})
        >>> plan = embtrim.search(testing.foreign_task(), LastColumnsConfig(), "50%")
        >>> plan.num_params <= 0.5 * plan.num_full_params
        True
    """
    from embtrim.plan.budget_limits import Unit

    if not re.fullmatch("[a-z][a-z0-9_-]*", name):
        raise ConfigError(f"method name {name!r} is malformed; allowed: lower-case letters, digits, '_' and '-'")
    if name in OWN or name in TAKEN_NAMES:
        raise ConfigError(f"method name {name!r} is taken by embtrim; give the method another name")
    if not (isinstance(config, type) and issubclass(config, Config)):
        raise ConfigError(f"method {name!r}: config {config!r} is not a subclass of embtrim.config.Config")
    if needs not in get_args(Needs):
        raise ConfigError(f"method {name!r}: needs {needs!r} is not known; {hint(str(needs), get_args(Needs))}")
    if unknown := [unit for unit in adds if unit not in get_args(Unit)]:
        raise ConfigError(f"method {name!r}: adds {unknown[0]!r} is not known; {hint(str(unknown[0]), get_args(Unit))}")

    def add(search: SearchT) -> SearchT:
        implementation = Implementation(config, search, plans_bits)
        METHODS[name] = Method(name, search.__module__, config.__name__, needs, tuple(adds), lambda: implementation)
        return search

    return add


# ---- lookups -----------------------------------------------------------------------------------------------------------


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: No method has the name, or the package that offers it does not work.
    """
    if name in METHODS:
        return METHODS[name]
    if fault := _fault(name):
        raise ConfigError(fault)
    raise ConfigError(f"unknown method {name!r}; {hint(name, METHODS)}")


def method_of(config: Config) -> Method:
    """The method that a settings object belongs to.

    Raises:
        ConfigError: The object is not the settings of a method.
    """
    kind = type(config)
    for method in chain(
        METHODS.data.copy().values(), METHODS.values()
    ):  # packages are imported only if no other method fits
        if method.config_name == kind.__name__ and method.config is kind:
            return method
    names = ", ".join(f"{m.config_name}()" for m in METHODS.values())
    raise ConfigError(f"{config!r} is not the config of a search method; there are {names}")
