"""Settings of a run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from embtrim.compaction.foreign import Init
from embtrim.config import Config
from embtrim.plan.table import Bits, Target
from embtrim.training.settings import TrainConfig


class RunConfig(Config):
    """Everything that a run depends on, beside the data.

    Attributes:
        model: name of the base model (`embtrim models`).
        hparams: its arguments, such as embedding_dim and hidden_units.
        train: how full and compact models are trained.
        method: name of the search method (`embtrim methods`).
        search: its settings.
        budget: such as "10%", "200MB", "1.5M params".
        max_loss: if set, the budget is ignored and the smallest plan is sought whose validation AUC is at most this
            much below the full model's, by bisection over budgets.
        init: how the compact model starts: "scratch", "initial" or "inherit".
        bits: precision that compact tables are stored in: 32, 16, 8 or 4, see plan.py, or "mixed" for 16, 8 or 4 by
            table, see precision.py. They are trained in fp32 and quantised after that; the same budget then has room for more
            parameters. "auto" trains with 8, mixed and 4 and keeps what has the best validation AUC.
        target: what will store the tables, whose bytes the budget counts, and the vocabulary if it is one in bytes; see
            `search`. None counts the tables' bytes of "torch" alone.
        controls: methods run at the same budget for comparison, with their default settings.
        seed: first seed.
        seeds: how many seeds.
    """

    model: str = "deepfm"
    hparams: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    method: str = "guided"
    search: dict[str, Any] = Field(default_factory=dict)
    budget: str = "10%"
    max_loss: float | None = Field(default=None, gt=0, lt=0.5)
    init: Init = "scratch"
    bits: Literal[Bits, "auto"] = 32
    target: Target | None = None
    controls: tuple[str, ...] = ("uniform",)
    seed: int = Field(default=0, ge=0)
    seeds: int = Field(default=1, ge=1)
