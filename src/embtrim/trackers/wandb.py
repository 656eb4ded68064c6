"""Weights & Biases: one run a model, in one project."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from embtrim.trackers.tracker import Tracker, tool_module


class WandB(Tracker):
    """Writes runs of Weights & Biases.

    Args:
        folder: Folder in which W&B makes its folder `wandb`.
        project: Name of the project.
        mode: "offline" keeps all on this machine, `wandb sync` sends it later; "online" sends it at once. None takes
            WANDB_MODE, and "offline" if that is not set.

    Raises:
        ConfigError: wandb is not installed.
    """

    tool = "wandb"

    def __init__(self, folder: str | Path = ".", project: str = "embtrim", mode: str | None = None) -> None:
        super().__init__()
        self._wandb = tool_module("wandb", "wandb")
        self.folder, self.project = Path(folder), project
        self.mode = mode or os.environ.get("WANDB_MODE") or "offline"

    def begin(self, name: str) -> Any:
        """See Tracker."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._wandb.init(
            project=self.project, name=name, dir=str(self.folder), mode=self.mode, reinit="create_new",
            settings=self._wandb.Settings(silent=True),
        )  # fmt: skip

    def write(self, run: Any, metrics: dict[str, float], step: int) -> None:
        """See Tracker."""
        run.log(metrics, step=step)

    def describe(self, run: Any, params: dict[str, str | int | float], metrics: dict[str, float]) -> None:
        """See Tracker."""
        run.config.update(params)
        run.summary.update(metrics)

    def end(self, run: Any, finished: bool) -> None:
        """See Tracker."""
        run.finish(exit_code=0 if finished else 1)
