"""The documentation: every code block runs or says why not; pictures, links, versions and the reference are true.

The pages share one folder, in which the tutorial comes first: the guides use what it wrote. Logs and networks are small
here; commands and calls are those of the pages.

A block is marked by a comment on the line before it:

    <!-- not run: REASON -->     the block is not run, and the site shows the reason
    <!-- needs: PACKAGE -->      the block is run where the package is installed
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import floors_picture
import nbformat
import numpy as np
import polars as pl
import pytest
from cli_page import cli_page
from nbclient import NotebookClient

import curve_picture
import embtrim
from embtrim.data import catalog
from embtrim.data.dataset import FORMAT_VERSION
from embtrim.data.profile import PROFILE_VERSION
from embtrim.experiments import curve
from embtrim.experiments.grid import CompareConfig, resolve
from embtrim.experiments.records import RECORD_VERSION
from embtrim.methods import OWN, curves
from embtrim.plan.budget import Budget
from embtrim.plan.plan_file import PLAN_VERSION
from embtrim.schema import Schema
from embtrim.serving.bundle_files import BUNDLE_VERSION
from embtrim.serving.manifest import EXPORT_VERSION
from embtrim.untrusted import parse_toml
from tests.cli.workshop import call

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    DOCS / "tutorial.md",
    *sorted(set(DOCS.rglob("*.md")) - {DOCS / "tutorial.md"}),
]
BLOCK = re.compile(r"^((?:<!-- .*? -->\n)?)```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHOWN = ("text", "bibtex")  # what was printed, and what is copied as it is
NETWORK = ("hparams.hidden_units=[8]", "train.batch_size=512", "train.epochs=2", "train.precision=fp32")


class Block(NamedTuple):
    mark: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(page.read_text("utf-8"))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder with the logs of README; the bundled table has few rows."""
    month = pl.read_parquet(catalog.BUNDLED_FOLDER / "flights_2024_01.parquet").gather_every(150)
    names = [name for name, kind in month.schema.items() if kind == pl.String]
    month = month.with_columns(pl.col(names).str.slice(0, 1), pl.col("^(scheduled|distance|flight_n).*$") % 9)
    (tmp_path / "bundled").mkdir()
    month.write_parquet(tmp_path / "bundled" / "flights_2024_01.parquet")
    monkeypatch.setattr(catalog, "BUNDLED_FOLDER", tmp_path / "bundled")
    monkeypatch.setattr(curve, "BUDGETS", (Budget.parse("20%"), Budget.parse("5%")))
    monkeypatch.setattr(curves, "STEPS", 2)
    monkeypatch.setenv("EMBTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    log = pl.DataFrame({"user": rng.integers(0, 40, 1000), "item": rng.integers(0, 100, 1000)})
    log = log.with_columns(click=(pl.col("user") % 7 + pl.col("item") % 5 > 5).cast(int))
    log.write_csv("logs.csv")
    log.drop("click").head(50).write_csv("tomorrow.csv")
    return tmp_path


def run_line(line: str) -> None:
    """A line of a shell block, in this process. A training is smaller than the page's."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["python"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", words[1:])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(words[1], run_name="__main__")
        assert end.value.code == 0, line
        return
    assert words[0] == "embtrim", f"the tests do not run {line!r}; mark its block"
    if words[1] in ("run", "compare"):
        fewer = {"--seeds": "1", "--budgets": "5%"}
        words = [fewer.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        no_second_start = ["tolerance=0.4"] if words[1] == "run" else []
        words += [part for setting in (*NETWORK, *no_second_start) for part in ("--set", setting)]
    done = call(*words[1:])
    assert done.code == 0, f"{line}\n{done.err}"


def check_settings(text: str) -> None:
    """A schema, or the settings of a comparison, is accepted; of pyproject.toml only the syntax is checked."""
    values = parse_toml(text)
    if "fields" in values:
        Schema.parse(values)
    elif "project" not in values:
        resolve(CompareConfig.parse(values))


def run_page(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for mark, language, code in blocks(page):
        if mark.startswith("<!-- needs: "):
            package = mark.removeprefix("<!-- needs: ").removesuffix(" -->\n")
            if importlib.util.find_spec(package) is None:
                continue
        elif mark.startswith("<!-- not run: "):
            continue
        if language == "sh":
            for line in code.replace("\\\n", "").splitlines():
                run_line(line)
        elif language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif language == "toml":
            check_settings(code)
        else:
            assert language in SHOWN, f"{page.name}: the tests do not know the language {language!r}"


@pytest.mark.slow
def test_the_notebook_runs(folder: Path) -> None:
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    small = f"from pathlib import Path\nfrom embtrim.data import catalog\ncatalog.BUNDLED_FOLDER = Path({str(catalog.BUNDLED_FOLDER)!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(small))
    with warnings.catch_warnings():  # the kernel's own: its transport on this machine
        warnings.simplefilter("ignore")
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(folder))
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    (page,) = [output.data["text/html"] for output in found if output.output_type == "execute_result"]
    assert "iframe srcdoc" in page
    assert "guided" in page
    printed = "".join(output.text for output in found if output.output_type == "stream" and output.name == "stdout")
    assert "guided: test AUC" in printed


@pytest.mark.slow
def test_every_block_runs(folder: Path, subtests: pytest.Subtests) -> None:
    for page in PAGES:
        with subtests.test(page.relative_to(ROOT).as_posix()):
            run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_is_fenced(page: Path) -> None:
    """An indented block would escape the tests."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    assert not re.findall(r"\n\n {4}\S.*", text)
    assert "```" not in text


@pytest.mark.parametrize("module", [curve_picture, floors_picture], ids=lambda module: module.__name__)
def test_pictures_are_those_of_their_scripts(module: Any) -> None:
    assert module.PICTURE.read_text("utf-8") == module.drawn(), f"run {module.__file__}"


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "examples/README.md"]
)
def test_links_of_the_repository_lead_somewhere(name: str) -> None:
    """`make docs` checks those of docs/."""
    text = (ROOT / name).read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links or name == "CODE_OF_CONDUCT.md"
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, link


def test_the_reference_has_every_public_name_once() -> None:
    pages = "".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: embtrim\.(\w+)$", pages, flags=re.MULTILINE)
    assert sorted(named) == sorted([*embtrim.__all__, "testing", "torchrec"])


def test_the_reference_has_every_method() -> None:
    page = (DOCS / "reference" / "methods.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == set(OWN)


def test_the_page_of_file_formats_has_their_versions() -> None:
    page = (DOCS / "reference" / "files.md").read_text("utf-8")
    versions = {
        "format_version": FORMAT_VERSION, "profile_version": PROFILE_VERSION, "plan_version": PLAN_VERSION,
        "bundle_version": BUNDLE_VERSION, "record_version": RECORD_VERSION, "export_version": EXPORT_VERSION,
    }  # fmt: skip
    assert {name: int(number) for name, number in re.findall(r"`(\w+_version)` (\d+) \|", page)} == versions


@pytest.mark.parametrize("name", ["CITATION.cff", "docs/cite.md"])
def test_the_citation_has_the_version(name: str) -> None:
    (version,) = re.findall(r"^ *version *[:=] *\{?([\d.]+)", (ROOT / name).read_text("utf-8"), flags=re.MULTILINE)
    assert version == embtrim.__version__


def test_every_command_is_on_its_page() -> None:
    page = cli_page()
    for command, flag in {"encode": "--draft", "run": "--max-loss", "compare": "--jobs", "export": "--triton"}.items():
        section = page.partition(f"## {command} ")[2].partition("\n## ")[0]
        assert f"`{flag}" in section, command
