"""Templates: escaped by the kind of file, strict about names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest

from embtrim.system.templates import cell, count, render

HOSTILE = '<b>"&|\\\nnext'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An importable package with one template of each kind."""
    name = f"package_{tmp_path.name}"
    folder = tmp_path / name / "templates"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "page.html.j2").write_text("<p>{{ name }}</p>\n")
    (folder / "card.md.j2").write_text(
        "{% for name in names %}\n| {{ name|cell }} | {{ 1234|count }} |\n{% endfor %}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_html_is_escaped_and_markdown_keeps_its_cells(package):
    assert render(package, "page.html.j2", name="<b>&'") == "<p>&lt;b&gt;&amp;&#39;</p>\n"
    assert (
        render(package, "card.md.j2", names=["<b>", HOSTILE])
        == '| &lt;b> | 1,234 |\n| &lt;b>"&\\|\\\\ next | 1,234 |\n'
    )


def test_a_missing_value_is_an_error(package):
    with pytest.raises(jinja2.UndefinedError, match="'name' is undefined"):
        render(package, "page.html.j2")


def test_filters():
    assert (cell("a|b"), cell("a\\|b"), cell("two\r\nlines\u2028")) == ("a\\|b", "a\\\\\\|b", "two lines")
    assert count(1_234_567) == "1,234,567"
