"""Text made from the jinja2 templates that lie beside a package's code: pages, model cards, READMEs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from embtrim.untrusted import printable

if TYPE_CHECKING:
    from jinja2 import Environment


def render(package: str, name: str, /, **values: Any) -> str:
    """Fill in a template.

    Values of an HTML template (`*.html.j2`) are escaped. A Markdown template escapes names with the filter `cell`.

    Args:
        package: Package that holds the folder `templates`, such as "embtrim.serving".
        name: File in that folder, such as "model_card.md.j2".
        values: Values by their names in the template.

    Raises:
        jinja2.UndefinedError: The template reads a name that `values` lacks.
    """
    return _environment(package).get_template(name).render(values)


_MARKDOWN = {"<": "&lt;", **{letter: f"\\{letter}" for letter in "\\|[]`"}}


def cell(text: object) -> str:
    """Text for one cell of a Markdown table: it ends neither the cell nor the line, and is no HTML, link or picture.

    Example:
        >>> cell("a|b")
        'a\\\\|b'
    """
    line = printable(" ".join(str(text).splitlines()))
    return "".join(_MARKDOWN.get(letter, letter) for letter in line)


def count(number: int) -> str:
    """A number with commas between its thousands.

    Example:
        >>> count(12_345)
        '12,345'
    """
    return f"{number:,}"


@cache
def _environment(package: str) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(package),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=cell, count=count)
    return environment
