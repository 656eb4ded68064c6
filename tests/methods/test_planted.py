"""Planted signal: which methods leave planted noise behind."""

from __future__ import annotations

import pytest

from embtrim.methods import (
    HardMaskConfig,
    method_named,
    search,
)
from embtrim.tasks.ctr_task import CTRTask
from embtrim.testing.checks import check_planted, kept_shares
from embtrim.testing.matrix import KEEPS_NOISE, matrix_configs, planted_cell

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [*matrix_configs(), "hard_mask-quantile"])
def test_planted_noise_of_many_values_goes_first(name: str):
    """Of methods that keep it: that they do, and what mends it."""
    config = {**matrix_configs(), "hard_mask-quantile": HardMaskConfig(mode="quantile")}[name]
    if name not in KEEPS_NOISE:
        check_planted(config)
        return
    said = planted_cell(name, config)
    assert said.startswith("fails as expected, noise is kept: ")
    signed = "score = 'signed', data = 'valid', batches = 0"
    mended = {"magnitude": "cost_aware = True", "sseds": "min_dim = 0", "sseds-faithful": signed}
    assert said.endswith(f"; holds with {mended[name]}" if name in mended else f"({KEEPS_NOISE[name][0]})")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sseds", {}),
        ("sseds", {"preset": "faithful"}),
        ("hard_mask", {}),
        ("hard_mask", {"mode": "quantile"}),
        ("optembed", {}),
        ("magnitude", {}),
        ("magnitude", {"unit": "rows"}),
        ("guided", {}),
        ("guided", {"start": "low_rank"}),
    ],
)
def test_methods_that_read_the_data_leave_planted_noise_behind(name: str, settings: dict, planted: CTRTask):
    """Strong, weak and noise cost the same, the model is at its best epoch: noise keeps the least."""
    kept = kept_shares(search(planted, method_named(name).parse(settings), "30%"))
    assert kept["noise"] < 0.2
    assert kept["noise"] < kept["strong"] / 2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("uniform", {}),
        ("frequency", {}),
        ("mde", {}),
        ("mde", {"popularity": "occurrences"}),
        ("pme", {}),
        ("pme", {"score": "frequency"}),
    ],
)
def test_rules_that_do_not_look_cannot_tell_noise_from_signal(name: str, settings: dict, planted: CTRTask):
    """PME is among them: at initialisation its saliency tells how often a value occurs, and little more."""
    kept = kept_shares(search(planted, method_named(name).parse(settings), "30%"))
    assert kept["noise"] > kept["strong"] / 2
