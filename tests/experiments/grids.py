"""Grids and runs that the tests of experiments make, and what they tell of them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embtrim.experiments.comparison import Comparison
from embtrim.experiments.grid import CompareConfig
from embtrim.experiments.records import RunRecord
from embtrim.experiments.settings import RunConfig
from embtrim.training.settings import TrainConfig

CONFIG = CompareConfig(
    models=("deepfm", "fm"),
    hparams={"embedding_dim": 4, "hidden_units": [8]},
    train=TrainConfig(epochs=1, batch_size=128, learning_rate=1e-2, precision="fp32", embedding_l2=0.0),
    methods=("uniform", "random"),
    variants={"wide-sseds": {"method": "sseds", "min_dim": 1}},
    budgets=("50%", "30%"),
    seeds=1,
)

FM_ONLY = CompareConfig(**{**CONFIG.model_dump(), "models": ("fm",), "hparams": {"embedding_dim": 4}})

# A run of two epochs that keeps its state at every step.
FM_RUN = RunConfig(
    model="fm",
    hparams={"embedding_dim": 4},
    train=TrainConfig(
        epochs=2, batch_size=128, learning_rate=1e-2, precision="fp32", checkpoint_seconds=0, embedding_l2=0.0
    ),
    controls=(),
    budget="40%",
)


def outcome(records: list[RunRecord]) -> dict[str, Any]:
    """What a record says that must not depend on how it was made."""
    return {
        f"{r.model} {r.variant} {r.budget} {r.seed}": (r.valid, r.test, r.widths, r.kept_rows, r.num_params, r.epochs)
        for r in records
    }


def until(true: Callable[[], Any], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def copy_of(first: tuple[Path, Comparison], target: Path) -> Path:
    subprocess.run(["cp", "-a", str(first[0]), str(target)], check=True)
    return target


def never(*_: object, **__: object) -> None:
    raise AssertionError("this was to be read from disk")


def interrupted(function: Callable[..., Any], *given: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        function(*given)


def ctrl_c(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
