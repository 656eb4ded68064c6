"""Which embeddings of a foreign model a user wants searched, by the paths of their modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from embtrim.errors import ModelError, hint

# Paths of modules, or patterns of the shell such as "towers.*.item"; one alone needs no list.
Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Chosen:
    """Which embeddings a search may shrink.

    Attributes:
        include: Patterns of the paths that are searched; None includes all.
        exclude: Patterns of the paths that are left alone, whatever `include` says.
    """

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    @classmethod
    def parse(cls, include: Patterns | None, exclude: Patterns | None) -> Chosen:
        """The choice that a user's arguments make.

        Raises:
            ModelError: An argument is neither text nor a list of texts.
        """
        return cls(None if include is None else _patterns("include", include), _patterns("exclude", exclude or ()))

    def why_left(self, paths: Collection[str]) -> str:
        """Why a weight that modules of these paths share is not searched; empty if it is."""
        if any(_matches(path, self.exclude) for path in paths):
            return "excluded"
        is_included = self.include is None or any(_matches(path, self.include) for path in paths)
        return "" if is_included else "not included"

    def check(self, paths: Collection[str]) -> None:
        """Raise ModelError for a pattern that no path of an embedding matches."""
        for argument, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(_matches(path, (pattern,)) for path in paths):
                    raise ModelError(
                        f"{argument}= names {pattern!r}, which no embedding of the model matches; {hint(pattern, paths)}"
                    )


def _patterns(argument: str, given: Patterns) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(isinstance(p, str) for p in patterns):
        raise ModelError(
            f"{argument}= is the path of a module, a pattern such as 'towers.*.item', or a list of them; given {given!r}"
        )
    return tuple(patterns)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(path == pattern or fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
