"""Settings: frozen, validated pydantic models, read from TOML and written to TOML; an unknown key is an error."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_jsonable_python

from embtrim.errors import ConfigError, hint, shown
from embtrim.untrusted import parse_toml, read_toml_tables

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every settings class. Settings cannot change, and an error names the section and the allowed keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls: type[ConfigT], values: Mapping[str, Any], where: str = "") -> ConfigT:
        """Validate values; the message of a ConfigError begins with `where`, a file or a section."""
        if not isinstance(values, Mapping):
            prefix = f"[{where}] " if where else ""
            raise ConfigError(f"{prefix}{cls.__name__}: given {shown(values)}: keys with their values are needed")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(describe_errors(cls, error, where)) from None

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(describe_errors(type(self), error, "")) from None

    def replace(self: ConfigT, **changes: Any) -> ConfigT:
        """Return a validated copy with some fields changed."""
        return type(self).parse({**self.model_dump(), **changes})


class Entry(BaseModel):
    """Base of what lies inside a file that a Config describes; an error names its whole path, such as `tables.0.width`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def describe_settings(cls: type[BaseModel]) -> list[dict[str, Any]]:
    """Name, default (JSON-able) and documentation of each setting; a required setting has no default.

    The documentation is the setting's entry in the Attributes of the class's docstring.

    Example:
        >>> class Speed(Config):
        ...     '''Settings of a road.
        ...
        ...     Attributes:
        ...         limit: Kilometres
        ...             an hour.
        ...     '''
        ...     limit: int = 30
        >>> describe_settings(Speed)
        [{'name': 'limit', 'default': 30, 'what': 'Kilometres an hour.'}]
    """
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    documented = dict(re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE))
    found = []
    for name, field in cls.model_fields.items():
        value = (
            {} if field.is_required() else {"default": to_jsonable_python(field.get_default(call_default_factory=True))}
        )
        found.append({"name": name, **value, "what": " ".join(documented.get(name, "").split())})
    return found


def describe_errors(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    """Pydantic's report as one line per fault: where, which key, what was given, what is allowed."""
    prefix = f"[{where}] " if where else ""
    faults = error.errors()
    nested = [str(e) for f in faults if isinstance(e := f.get("ctx", {}).get("error"), ConfigError)]
    if nested:  # a settings class inside this one has reported the fault; pydantic's further faults follow from it
        return "\n".join(prefix + text for text in nested)
    lines = []
    for fault in faults:
        path = ".".join(_shown_key(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            key = str(fault["loc"][-1])
            allowed = list(_model_at(cls, fault["loc"][:-1]).model_fields)
            lines.append(f"{prefix}unknown key {path!r} for {cls.__name__}; {hint(key, allowed)}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            given = "" if fault["type"] == "missing" else f", given {shown(fault['input'])}"
            lines.append(f"{prefix}{cls.__name__}: {path or 'value'}{given}: {message}")
    return "\n".join(lines)


def _shown_key(key: str | int) -> str:
    """A key as it is, if it is a short printable text."""
    return str(key) if isinstance(key, int) or (key.isprintable() and len(key) <= 80) else shown(key, 80)


def _model_at(cls: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The settings class at a path inside a settings class, or that class itself where annotations do not tell."""
    for part in path:
        if isinstance(part, str) and part in cls.model_fields:
            annotation = cls.model_fields[part].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
            if nested:
                cls = nested[0]
    return cls


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file; a ConfigError names the file, and the line that cannot be parsed."""
    try:
        return read_toml_tables(path)
    except FileNotFoundError:
        raise ConfigError(f"settings file {path} does not exist") from None
    except ValueError as error:
        raise ConfigError(f"settings file {path} is not valid TOML: {error}") from None


def to_toml(config: BaseModel) -> str:
    """Write settings as TOML; keys whose value is None are left out, since TOML has no null."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def all_settings(values: Mapping[str, Any]) -> str:
    """JSON-able settings as TOML for a reader, with the names of those that are None in a comment at the end."""

    def given(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: given(v) if isinstance(v, Mapping) else v for k, v in values.items() if v is not None}

    def unset(values: Mapping[str, Any], before: str = "") -> list[str]:
        nested = [unset(v, f"{before}{k}.") for k, v in values.items() if isinstance(v, Mapping)]
        return [f"{before}{k}" for k, v in values.items() if v is None] + [name for names in nested for name in names]

    names = unset(values)
    return tomli_w.dumps(given(values)) + (f"\n# not set: {', '.join(names)}\n" if names else "")


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `section.key=value` strings to nested settings; a value that is not TOML is a string."""
    result = _copy_nested(values)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set takes section.key=value, given {override!r}")
        try:
            value = parse_toml(f"value = {text}")["value"]
        except ValueError:
            value = text
        node = result
        *parents, last = key.strip().split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {override}: {parent!r} is a value, not a section")
        node[last] = value
    return result


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings: `above` wins over `below`, section by section; neither argument is changed."""
    result = _copy_nested(below)
    for key, value in above.items():
        lower = result.get(key)
        result[key] = merge(lower, value) if isinstance(lower, dict) and isinstance(value, Mapping) else value
    return result


def _copy_nested(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy_nested(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def first_change(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that differs between two sets of JSON-able values, in words; None if none differs.

    Example:
        >>> first_change({"seed": 0, "train": {"epochs": 5}}, {"seed": 0, "train": {"epochs": 9}})
        'train.epochs = 5, now it is 9'
    """
    for name in dict.fromkeys([*now, *then]):
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if (change := first_change(old, new)) is not None:
                return f"{name}.{change}"
        elif old != new:
            return f"{name} = {json.dumps(old)}, now it is {json.dumps(new)}"
    return None
