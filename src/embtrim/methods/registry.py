"""The list of search methods: a config type, a name and a search function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from embtrim.config import Config
from embtrim.errors import ConfigError, hint
from embtrim.plan.budget import Budget
from embtrim.plan.limits import Unit
from embtrim.plan.plan import SizePlan

SearchT = TypeVar("SearchT", bound=Callable[..., SizePlan])


@dataclass(frozen=True)
class Method:
    """One search method.

    Attributes:
        name: as on the command line.
        config: its settings class.
        search: (task, config, budget, seed) -> plan.
        needs: whether it reads a "trained" model, an "initial" one, or "nothing".
        adds: units that it fills a budget with to the last that fits: one more column of a table, one more row, or the
            next size of a row; empty for a rule that may leave room.
        search_mixed: (task, config, budget, seed) -> plan that also says the bits of each table, for `bits="mixed"` and a
            budget in percent or bytes; None where bits are chosen for the rows and columns that `search` finds.
    """

    name: str
    config: type[Config]
    search: Callable[[Any, Any, Budget, int], SizePlan]
    needs: Literal["trained", "initial", "nothing"]
    adds: tuple[Unit, ...]
    search_mixed: Callable[[Any, Any, Budget, int], SizePlan] | None = None

    def parse(self, values: Mapping[str, Any], where: str = "search") -> Config:
        """Settings of this method; `preset = "faithful"` among them starts from the paper's instead of our defaults.

        Raises:
            ConfigError: an unknown or wrong setting, or a preset that this method has not.
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


METHODS: dict[str, Method] = {}


def register(
    name: str,
    config: type[Config],
    needs: Literal["trained", "initial", "nothing"],
    adds: tuple[Unit, ...] = ("columns",),
    search_mixed: Callable[[Any, Any, Budget, int], SizePlan] | None = None,
) -> Callable[[SearchT], SearchT]:
    """Decorator that lists a search function under a name and a config type; for the other arguments see Method."""

    def add(search: SearchT) -> SearchT:
        METHODS[name] = Method(name, config, search, needs, adds, search_mixed)
        return search

    return add


def method_named(name: str) -> Method:
    """The method of this name; ConfigError with the nearest name if there is none."""
    if name in METHODS:
        return METHODS[name]
    raise ConfigError(f"unknown method {name!r}; {hint(name, METHODS)}")


def method_of(config: Config) -> Method:
    """The method whose settings these are."""
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    names = ", ".join(f"{m.config.__name__}()" for m in METHODS.values())
    raise ConfigError(f"{config!r} is not the config of a search method; there are {names}")
