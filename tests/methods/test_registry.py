"""The list of methods: ours, registered ones, those of installed packages; what may import torch."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import embtrim.methods
from embtrim.config import Config, describe_settings
from embtrim.errors import ConfigError
from embtrim.methods import METHODS, SSEDSConfig, method_named, method_of, registry, search
from embtrim.methods.registry import OWN, register
from embtrim.testing import foreign_task
from embtrim.training.settings import TrainConfig
from tests.cli.workshop import TINY, call, environment, write_log

TOY = '''
"""first: the first columns of all tables, as many as fit."""
from embtrim.config import Config
from embtrim.methods import register

class FirstConfig(Config):
    """Settings of the first columns.

    Attributes:
        spare: Columns left out, beside the ones that do not fit.
    """
    spare: int = 0

@register("first", FirstConfig, needs="nothing", adds=())
def search_first(task, config, budget, seed):
    full = task.full_plan()
    width = full.max_params(budget) // sum(t.num_rows for t in full.tables) - config.spare
    return full.with_columns({t.name: range(min(width, t.width)) for t in full.tables})
'''


def install(site: Path, distribution: str, method: str, source: str) -> None:
    """Put a package with one module and an entry point where pip would put it."""
    module = distribution.replace("-", "_")
    (site / module).mkdir(parents=True)
    (site / module / "__init__.py").write_text("")
    (site / module / "method.py").write_text(source)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[embtrim.methods]\n{method} = {module}.method\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages: one good, four that must be left out."""
    site = tmp_path_factory.mktemp("site")
    install(site, "toy-first", "first", TOY)
    install(site, "toy-broken", "broken", "import no_such_module")
    install(site, "toy-exit", "leaves", "raise SystemExit(3)")
    install(site, "toy-silent", "silent", "")
    install(site, "toy-double", "sseds", "raise RuntimeError('never imported')")
    return site


def embtrim_beside(site: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line, with the packages of a folder installed."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "embtrim", *map(str, arguments)]
    settings = {**environment(), "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=settings)


@pytest.mark.slow
def test_an_installed_package_is_listed_and_broken_ones_are_named(site: Path):
    done = embtrim_beside(site, "methods", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == [*OWN, "first"]
    assert rows[-1] == {"name": "first", "needs": "nothing", "what": "the first columns of all tables, as many as fit."}
    for words in (
        "package toy-broken 1.0: its method 'broken' cannot be used: importing 'toy_broken.method' failed with Module",
        "package toy-exit 1.0: its method 'leaves' cannot be used: importing 'toy_exit.method' failed with SystemExit",
        "package toy-silent 1.0: its method 'silent' cannot be used: importing 'toy_silent.method' registers no method",
        "package toy-double 1.0: its method 'sseds' is left out: embtrim has one of this name",
    ):
        assert done.stderr.count(words) == 1


@pytest.mark.slow
def test_an_installed_method_shows_its_settings(site: Path):
    done = embtrim_beside(site, "methods", "first", "--json")
    assert json.loads(done.stdout)["settings"] == [
        {"name": "spare", "default": 0, "what": "Columns left out, beside the ones that do not fit."}
    ]
    assert "toy-broken" not in done.stderr, "only the package that was asked for is imported"


@pytest.mark.slow
def test_a_broken_package_that_is_asked_for_is_an_error(site: Path):
    done = embtrim_beside(site, "methods", "broken")
    assert done.returncode == 2
    assert "package toy-broken 1.0: its method 'broken' cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_installed_method_runs_in_a_comparison(site: Path, tmp_path: Path):
    write_log(tmp_path / "log.csv", num_rows=600)
    assert call("encode", tmp_path / "log.csv", "--label", "click", "--out", tmp_path / "data").code == 0
    chosen = ("--models", "fnn", "--methods", "uniform,first", "--budgets", "50%", "--seeds", "1")
    done = embtrim_beside(site, "compare", tmp_path / "data", *chosen, *TINY, "--out", tmp_path / "cmp", "--json")
    assert done.returncode == 0, done.stderr
    found = {record["variant"]: record for record in json.loads(done.stdout)["records"]}
    assert set(found) == {"full", "uniform", "first"}
    assert found["first"]["table_bytes"] <= 0.5 * found["full"]["table_bytes"]
    assert found["first"]["search"] == {"spare": 0}


def test_a_package_that_does_not_work_does_not_stop_a_search(monkeypatch: pytest.MonkeyPatch):
    entry = EntryPoint("absent", "no_such_package.method", "embtrim.methods")
    monkeypatch.setattr(registry, "_installed", lambda: {"absent": entry})
    registry._fault.cache_clear()
    try:
        assert search(foreign_task(), embtrim.methods.UniformConfig(), "50%").method == "uniform"
        assert "absent" not in METHODS
        assert set(METHODS) >= set(OWN)
        with pytest.raises(ConfigError, match=r"a package: its method 'absent' cannot be used: .* uninstall it"):
            method_named("absent")
    finally:
        registry._fault.cache_clear()


def test_one_method_shows_its_settings_and_its_preset():
    done = call("methods", "sseds")
    assert done.code == 0
    assert "needs: trained" in done.out
    assert "preset faithful: score abs, data train, batches 1, min_dim 0" in done.out
    assert re.search(r'score +"signed" +How slots are ranked', done.out)
    assert call("methods", "frequency").out.splitlines()[-1].startswith("what: ")
    as_json = json.loads(call("methods", "sseds", "--json").out)
    defaults = {setting["name"]: setting["default"] for setting in as_json["settings"]}
    assert defaults == SSEDSConfig().model_dump(mode="json")
    unknown = call("methods", "ssed")
    assert unknown.code == 2
    assert "did you mean 'sseds'?" in unknown.err


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "--json"]])
def test_the_list_of_methods_needs_no_torch(arguments: list[str]):
    code = (
        "import sys; from embtrim.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", OWN)
def test_each_method_of_ours_is_what_its_line_says(name: str):
    method = METHODS[name]
    assert (method.name, method.config.__name__) == (name, method.config_name)
    assert method.config is getattr(embtrim.methods, method.config_name)
    assert method.config.__module__ == method.search.__module__ == method.module
    assert method_of(method.config()) is method
    assert method.what.endswith(".")
    undocumented = [s["name"] for s in describe_settings(method.config) if not re.match(r"[A-Z].*\.$", s["what"])]
    assert not undocumented, "a setting's entry under Attributes is a sentence or a noun phrase that stands alone"
    assert sys.modules[method.module].__doc__.startswith(f"{name}: ") or method.config_name.startswith(
        sys.modules[method.module].__doc__.partition(":")[0]
    )


def test_the_example_of_register_runs():
    runner = doctest.DocTestRunner()
    (example,) = [t for t in doctest.DocTestFinder().find(register, "register", globs={}) if t.examples]
    try:
        assert runner.run(example).failed == 0
        assert METHODS["last_columns"].needs == "nothing"
    finally:
        del METHODS["last_columns"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sseds", SSEDSConfig, "nothing"), "method name 'sseds' is taken by embtrim"),
        (("all", SSEDSConfig, "nothing"), "method name 'all' is taken by embtrim"),
        (("My Method", SSEDSConfig, "nothing"), "method name 'My Method' is malformed; allowed: lower-case"),
        (("mine", dict, "nothing"), "method 'mine': config <class 'dict'> is not a subclass of embtrim.config.Config"),
        (("mine", SSEDSConfig, "train"), "needs 'train' is not known; did you mean 'trained'?"),
        (("mine", SSEDSConfig, "nothing", ("column",)), "adds 'column' is not known; did you mean 'columns'?"),
    ],
)
def test_register_refuses(arguments: tuple, words: str):
    with pytest.raises(ConfigError) as caught:
        register(*arguments)
    assert words in str(caught.value)
    assert set(METHODS) == set(OWN)


def test_a_second_registration_replaces_the_first():
    class MineConfig(Config):
        pass

    try:
        register("mine", MineConfig, "nothing")(lambda *_: None)
        register("mine", MineConfig, "trained")(lambda *_: None)
        assert METHODS["mine"].needs == "trained"
    finally:
        del METHODS["mine"]


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'sseds'"):
        method_named("ssed")
    with pytest.raises(ConfigError, match="not the config of a search method"):
        search(foreign_task(), TrainConfig(), "10%")
    assert set(METHODS) >= {"sseds", "uniform", "random"}
    with pytest.raises(AttributeError, match=r"'embtrim\.methods' has no attribute 'Sseds'"):
        _ = embtrim.methods.Sseds


def test_presets():
    assert method_named("sseds").parse({"preset": "faithful", "batches": 3}) == SSEDSConfig(
        score="abs", data="train", batches=3, min_dim=0
    )
    assert method_named("sseds").parse({}) == SSEDSConfig()
    with pytest.raises(ConfigError, match=r"preset 'papers' is not known; method 'sseds' has 'faithful'"):
        method_named("sseds").parse({"preset": "papers"})
    with pytest.raises(ConfigError, match="has no preset"):
        method_named("uniform").parse({"preset": "faithful"})
