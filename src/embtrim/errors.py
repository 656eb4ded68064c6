"""The errors embtrim raises for a user's input.

Each message says where, what was given, what is allowed, and what to do. Broken invariants of our own are
assertions, not these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EmbtrimError(ValueError):
    """Base of all errors that a user's input can cause."""


class ConfigError(EmbtrimError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(EmbtrimError):
    """A log, a schema or an encoded dataset cannot be used as it is."""


class UnreachableError(DataError):
    """A server does not answer or refuses; the same call may succeed later."""


class BudgetError(EmbtrimError):
    """A budget cannot be parsed, or lies below the smallest plan that a method may make."""


class PlanError(EmbtrimError):
    """A plan is malformed, or belongs to another schema."""


class ModelError(EmbtrimError):
    """A model, or a module of one's own, cannot be searched, compacted, trained, saved or exported as it is."""


class BundleError(EmbtrimError):
    """A bundle is truncated, tampered with, or of a version this release cannot read."""


def hint(given: str, allowed: Iterable[str]) -> str:
    """What a message says after an unknown name: the nearest allowed one, or all of them.

    Example:
        >>> hint("clik", ["click", "price"])
        "did you mean 'click'?"
    """
    allowed = list(allowed)
    near = difflib.get_close_matches(given.lower(), [name.lower() for name in allowed], n=1)
    if near:
        return f"did you mean {next(name for name in allowed if name.lower() == near[0])!r}?"
    return f"allowed: {', '.join(allowed)}"


def shown(value: object, limit: int = 120) -> str:
    """A value for a message: what `repr` says, cut off after `limit` characters.

    Example:
        >>> shown("abc" * 100, 10)
        "'abcabcabc.."
    """
    try:
        text = repr(value[:limit] if isinstance(value, (str, bytes)) else value)
    except (RecursionError, ValueError):  # Python writes no integer of more than some thousand digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}.."


def first_line_of(error: BaseException) -> str:
    """The first line of an error's text, cut off where it is long."""
    text = str(error).strip().partition("\n")[0]
    return text if len(text) <= 300 else f"{text[:300]}.."
