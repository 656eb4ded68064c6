"""An extension of griffe: the section `Example:` of a docstring is shown as code, as `Examples:` is."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ShownExamples(griffe.Extension):
    """Renames the section while a docstring is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See griffe."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
