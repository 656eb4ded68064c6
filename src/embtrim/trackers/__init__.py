"""Callbacks that write into tracking tools: TensorBoard, MLflow and Weights & Biases; see docs/trackers.md.

Each class needs its tool: pip install 'embtrim[tensorboard]', 'embtrim[mlflow]' or 'embtrim[wandb]'.
"""

from __future__ import annotations

import os
from pathlib import Path

from embtrim.errors import ConfigError, hint
from embtrim.trackers.mlflow import MLflow
from embtrim.trackers.tensorboard import TensorBoard
from embtrim.trackers.tracker import Tracker
from embtrim.trackers.wandb import WandB

__all__ = ["MLflow", "TensorBoard", "Tracker", "WandB", "tracker_beside"]

NAMES = ("tensorboard", "mlflow", "wandb")


def tracker_beside(name: str, out: Path) -> Tracker:
    """The tracker of a command: its files lie beside `out`, so that several runs share them.

    Args:
        name: One of NAMES.
        out: The command's --out. Its name is that of the MLflow experiment, the W&B project, or the folder of TensorBoard.

    Raises:
        ConfigError: The name is unknown, or its tool is not installed.
    """
    folder = out.absolute().parent
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard" / out.name)
    if name == "mlflow":
        return MLflow(
            os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}",
            os.environ.get("MLFLOW_EXPERIMENT_NAME") or out.name,
        )
    if name == "wandb":
        return WandB(folder, os.environ.get("WANDB_PROJECT") or out.name)
    raise ConfigError(f"--track: unknown tracker {name!r}; {hint(name, NAMES)}")
