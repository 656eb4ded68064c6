"""Hooks of the site: the page of the command line, the notebook, and pages for files outside docs/.

A file outside docs/ that a page links to becomes the page `repository/PATH`: Markdown as it is, other text in a block, and a
folder as a list of its Markdown files. So the site is whole without the repository. A page that would load anything
from elsewhere fails the build.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cli_page import cli_page
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
UNSEARCHED = "---\nsearch: { exclude: true }\n---\n"  # tables of numbers and scripts would crowd out the pages
LANGUAGES = {".py": "python", ".toml": "toml"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
MARK = re.compile(r"^<!-- (not run|needs): (.*?) -->\n(?=```)", re.MULTILINE)
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that no file of docs/ holds."""
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    for path in (ROOT / "docs").glob("*.ipynb"):
        files.append(File.generated(config, page_of(f"docs/{path.name}"), content=_notebook(path)))
    waiting = [name for page in _pages(config.nav) if (name := page.removeprefix("repository/")) != page]
    for file in files.documentation_pages():
        waiting += _outside(f"docs/{file.src_uri}", file.content_string)
    while waiting:
        name = waiting.pop().removesuffix(".md")
        name = name if (ROOT / name).exists() else f"{name}.md"
        if files.get_file_from_path(page_of(name)) is None and (ROOT / name).exists():
            text = _text(name)
            files.append(File.generated(config, page_of(name), content=text))
            waiting += _outside(name, text)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    here = page.file.src_uri
    source = here.removeprefix("repository/") if here.startswith("repository/") else f"docs/{here}"

    def turned(found: re.Match[str]) -> str:
        name = _target(source, found[0])
        return found[0] if name is None else posixpath.relpath(page_of(name), posixpath.dirname(here) or ".")

    if here == "reference/cli.md":
        return markdown
    return MARK.sub(_shown_mark, LINK.sub(turned, markdown))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Raise ValueError if the page loads a script, a style, a font or a picture from elsewhere."""
    if found := LOADED.search(output):
        raise ValueError(f"{page.file.src_uri} loads {found[1]}; the site has to work offline")
    return output


def page_of(name: str) -> str:
    """The page of the site, relative to docs/, for a path of the repository."""
    if name.startswith("docs/"):
        return re.sub(r"\.ipynb$", "-notebook.md", name.removeprefix("docs/"))
    return f"repository/{name}" if name.endswith(".md") else f"repository/{name}.md"


def _pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages(part)


def _target(source: str, link: str) -> str | None:
    """The path of the repository that a link of a file means; None for a URL."""
    if urlsplit(link).scheme:
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _outside(source: str, text: str) -> list[str]:
    """Paths outside docs/ that a file of the repository links to."""
    found = [_target(source, link) for link in LINK.findall(CODE.sub("", text))]
    return [name for name in found if name and page_of(name).startswith("repository/")]


def _shown_mark(found: re.Match[str]) -> str:
    kind, text = found.groups()
    return f"*Not run by the tests: {text}.*\n\n" if kind == "not run" else f"*Needs `pip install {text}`.*\n\n"


def _notebook(path: Path) -> str:
    """A notebook as Markdown: its texts, its code and what the code printed."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = ["".join(output.get("text", ())) for output in cell.get("outputs", ())]
        parts += [f"```text\n{text.rstrip()}\n```" for text in printed if text]
    return "\n\n".join(parts) + "\n"


def _text(name: str) -> str:
    path = ROOT / name
    if path.is_dir():
        parts = sorted(part.relative_to(path).as_posix() for part in path.rglob("*.md"))
        return f"# {name}\n\n" + "".join(f"- [{part}]({path.name}/{part})\n" for part in parts)
    text = path.read_text("utf-8")
    if path.suffix != ".md":
        text = f"# {name}\n\n```{LANGUAGES.get(path.suffix, 'text')}\n{text}```\n"
    return UNSEARCHED + text if name.startswith(("benchmarks/", "recipes/")) else text
