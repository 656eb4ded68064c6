"""The unit costs that sizes on paper start from are measured in one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch.distributed as dist

pytest.importorskip("torchrec")
import sizing
from sizing_runs import measured_rates

pytestmark = pytest.mark.filterwarnings("ignore")


def test_unit_costs_are_measured_and_printed(monkeypatch, capsys):
    words = [
        "--tables",
        "2",
        "--width",
        "8",
        "--columns",
        "4",
        "--hidden",
        "4",
        "--unit-rows",
        "50",
        "--unit-batch",
        "8",
    ]
    given = sizing.arguments(words)
    rates = measured_rates(given)
    assert all(rate > 0 for rate in dataclasses.astuple(rates))
    assert not dist.is_initialized()
    monkeypatch.setattr("sizing_runs.measured_rates", lambda _: rates)
    sizing.print_sizes(given)
    assert f"| scoring | {rates.scoring:,.0f} rows |" in capsys.readouterr().out
