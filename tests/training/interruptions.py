"""Interrupting a training or a search, and comparing how it ends; for tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from embtrim.methods import HardMaskConfig, OptEmbedConfig, PMEConfig, SSEDSConfig
from embtrim.plan.plan import SizePlan
from embtrim.training.settings import FitResult, Hooks, TrainConfig

TRAIN = TrainConfig(epochs=4, batch_size=256, learning_rate=0.02, patience=2, checkpoint_seconds=0)


def stop_at(step: int) -> Hooks:
    """Ctrl-C in the given step: the last checkpoint is of the step before."""

    def interrupt(done: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return Hooks(on_step=interrupt)


def told(result: FitResult) -> list[dict[str, float]]:
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in result.history]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


SEARCHES = [
    SSEDSConfig(pretrain="epochs:2"),
    HardMaskConfig(),
    OptEmbedConfig(epochs=2, generations=4, population=4, mutations=2, crossovers=2, finalists=2),
    PMEConfig(warmup_epochs=1),
    HardMaskConfig(mode="quantile", start="initial", single_level=True, epochs=1.5, mask_every=2),
]


def plan_text(plan: SizePlan, path: Path) -> tuple[str, Any]:
    plan.save(path)
    return path.read_text(), [list(map(int, b.rows)) for t in plan.tables for b in t.blocks if b.rows is not None]
