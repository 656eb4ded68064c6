"""TensorBoard: one folder of events a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embtrim.trackers.tracker import Tracker, tool_module


class TensorBoard(Tracker):
    """Writes events for TensorBoard: scalars by epoch, and settings with final metrics in its table of HPARAMS.

    Args:
        folder: Folder of the events, one folder in it a model. Look at it with `tensorboard --logdir FOLDER`.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    tool = "tensorboard"

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        tool_module("tensorboard", "tensorboard")
        self._writer = tool_module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.folder = Path(folder)

    def begin(self, name: str) -> Any:
        """See Tracker."""
        return self._writer(str(self.folder / name))

    def write(self, run: Any, metrics: dict[str, float], step: int) -> None:
        """See Tracker."""
        for name, value in metrics.items():
            run.add_scalar(name, value, step)
        run.flush()

    def describe(self, run: Any, params: dict[str, str | int | float], metrics: dict[str, float]) -> None:
        """See Tracker."""
        run.add_hparams(params, {f"final/{name}": value for name, value in metrics.items()}, run_name=".")

    def end(self, run: Any, finished: bool) -> None:
        """See Tracker."""
        run.close()
