"""What works in one process refuses to run on several ranks, each of which would do all of the work."""

from __future__ import annotations

import polars as pl
import pytest

import embtrim
from embtrim.errors import EmbtrimError
from embtrim.experiments.grid import CompareConfig
from embtrim.experiments.settings import RunConfig
from embtrim.methods import UniformConfig
from embtrim.system.ranks import num_ranks
from embtrim.testing.toys import foreign_task, zoo_task

ONE = "works in one process, but this one is one of 4 ranks"


def test_one_process_is_one_rank(monkeypatch):
    assert num_ranks() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it for all programs
    assert num_ranks() == 1
    monkeypatch.setenv("RANK", "3")
    assert num_ranks() == 8


def test_several_ranks_are_refused(monkeypatch, tmp_path, data):
    task, foreign = zoo_task(), foreign_task()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    log = pl.DataFrame({"click": [0, 1] * 50, "user": ["a", "b"] * 50})
    calls = {
        "encode": lambda: embtrim.encode(log, label="click", out=tmp_path / "data"),
        "fit": lambda: embtrim.fit(task.model, data),
        "run": lambda: embtrim.run(data, RunConfig(), tmp_path / "run"),
        "compare": lambda: embtrim.compare(data, CompareConfig(), tmp_path / "grid"),
        "search": lambda: embtrim.search(task, UniformConfig(), "50%"),
    }
    for name, call in calls.items():
        with pytest.raises(EmbtrimError, match=f"^{name}.* {ONE}.*; start it without torchrun, or .*embtrim.torchrec"):
            call()
    assert list(tmp_path.iterdir()) == []
    assert embtrim.search(foreign, UniformConfig(), "50%").num_params > 0
