"""What a command imports before it works: help waits for nothing, and predict not for what it does not use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from embtrim.data.encoding import encode
from embtrim.models import DeepFM
from embtrim.serving.bundle import save

AVOIDED = {"sympy", "torch._dynamo", "torch._inductor", "onnx", "pandas", "numba"}
CODE = """
import json, sys
from embtrim.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(json.dumps([ended.code, sorted(sys.modules)]), file=sys.stderr)
"""


def imported(*arguments: str | Path) -> set[str]:
    """Names of the modules that are imported when a command has ended."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    code, names = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(names)


def test_help_imports_neither_torch_nor_polars_nor_rich():
    for command in ((), ("predict",)):
        assert not {"torch", "polars", "numpy", "rich"} & imported(*command, "--help")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, its encoded data, and a bundle."""
    tmp_path = tmp_path_factory.mktemp("startup")
    log = pl.DataFrame({"click": [0, 1] * 50, "user": [f"u{i % 7}" for i in range(100)]})
    log.write_csv(tmp_path / "log.csv")
    data = encode(tmp_path / "log.csv", label="click", out=tmp_path / "data", progress=False)
    save(DeepFM(data.schema, embedding_dim=2, hidden_units=(2,)), tmp_path / "bundle", data)
    return tmp_path


def test_predict_imports_no_compiler_and_no_page(folder: Path):
    found = imported("predict", folder / "bundle", folder / "log.csv", "--out", folder / "scores.csv")
    assert (folder / "scores.csv").exists()
    assert AVOIDED & found == set()


def test_a_search_of_a_small_log_imports_no_compiler(folder: Path):
    plan = folder / "plan.json"
    found = imported("search", folder / "bundle", folder / "data", "--budget", "60%", "--out", plan)
    assert plan.exists()
    assert AVOIDED & found == set()
