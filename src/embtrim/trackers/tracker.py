"""Tracker: what the adapters of all tracking tools share. Each model is one run of the tool."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from embtrim.errors import ConfigError, first_line_of
from embtrim.experiments.grid import cell_of
from embtrim.experiments.records import RunRecord
from embtrim.training.callbacks import Epoch

logger = logging.getLogger(__name__)

# Numbers of a record that are metrics, beside those of its splits.
_METRICS = (
    "table_bytes", "bundle_bytes", "vocabulary_bytes", "num_params", "num_full_params", "predicted_loss", "search_seconds",
    "search_epochs", "train_seconds", "epochs", "best_epoch", "rows_per_second", "peak_memory_bytes",
)  # fmt: skip
_PARAMS = ("model", "variant", "method", "budget", "bits", "target", "init", "started", "teacher", "seed")


class Tracker:
    """A callback that writes each model of `fit`, `run` or `compare` as one run of a tracking tool.

    Epochs are written as they end. Their step is the number of the epoch; where a model is trained several times, further
    trainings count on. A record adds the settings, and
    the final metrics, and ends the run. If the tool raises an error, a warning says so, and nothing more is tracked: the
    work goes on.

    Used in a `with` block, or closed, it ends a run that got no record: after `fit`, or where work was interrupted.
    """

    tool = ""

    def __init__(self) -> None:
        self._name: str | None = None
        self._run: Any = None
        self._step = 0
        self._failed = False

    def on_epoch(self, epoch: Epoch) -> None:
        """Write the metrics of an epoch."""
        self._guarded(self._take_epoch, epoch)

    def on_record(self, record: RunRecord, done: int, total: int) -> None:
        """Write settings and final metrics of a model, and end its run."""
        self._guarded(self._take_record, record)

    def close(self) -> None:
        """End the run that is open, if any."""
        if self._name is not None:
            self._guarded(self._end, False)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take_epoch(self, epoch: Epoch) -> None:
        if self._name is not None and self._name != epoch.name:
            self._end(False)
        self._begin(epoch.name)
        self._step = max(self._step + 1, epoch.epoch)
        self.write(self._run, epoch.metrics(), self._step)

    def _take_record(self, record: RunRecord) -> None:
        self._begin(name_of(record))  # where no epoch was left to train
        self.describe(self._run, params_of(record), metrics_of(record))
        self._end(True)

    def _begin(self, name: str) -> None:
        if self._name is None:
            self._run, self._name, self._step = self.begin(name or "fit"), name, 0

    def _end(self, finished: bool) -> None:
        run, self._name, self._run = self._run, None, None
        self.end(run, finished)

    def _guarded(self, work: Callable[[Any], None], value: Any) -> None:
        if self._failed:
            return
        try:
            work(value)
        except Exception as error:
            self._failed, self._name = True, None
            logger.warning(
                "%s raised %s (%s); nothing more is tracked, the work goes on",
                self.tool, type(error).__name__, first_line_of(error),
            )  # fmt: skip

    # What each tool does in its own way.

    def begin(self, name: str) -> Any:
        """Begin a run of the tool."""
        raise NotImplementedError

    def write(self, run: Any, metrics: dict[str, float], step: int) -> None:
        """Write metrics of a step, from 1."""
        raise NotImplementedError

    def describe(self, run: Any, params: dict[str, str | int | float], metrics: dict[str, float]) -> None:
        """Write settings and final metrics."""
        raise NotImplementedError

    def end(self, run: Any, finished: bool) -> None:
        """End a run; not `finished` if its model got no record."""
        raise NotImplementedError


def tool_module(module: str, extra: str) -> ModuleType:
    """A module of a tracking tool.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"tracking with {extra} needs a package ({error}): pip install 'embtrim[{extra}]'") from None


def name_of(record: RunRecord) -> str:
    """The name that the epochs of a record's model have."""
    if record.method is None and record.budget is not None:  # of `run`
        return f"{record.model}-{record.variant}-seed{record.seed}"
    return cell_of(record.model, record.seed, record.variant, record.budget).name


def params_of(record: RunRecord) -> dict[str, str | int | float]:
    """The settings of a record by name; those of the model, the training and the search have a prefix."""
    values: dict[str, Any] = {name: getattr(record, name) for name in _PARAMS}
    values["data"] = record.data["folder"] or record.data["fingerprint"]
    for prefix, settings in (("hparams", record.hparams), ("train", record.train), ("search", record.search)):
        values |= {f"{prefix}.{name}": value for name, value in settings.items()}
    return {
        name: value if isinstance(value, (str, int, float)) else str(value)
        for name, value in values.items()
        if value is not None
    }


def metrics_of(record: RunRecord) -> dict[str, float]:
    """The final numbers of a record by name, such as test_auc and table_bytes."""
    found = {
        f"{split}_{name}": float(scores[name])
        for split, scores in (("valid", record.valid), ("test", record.test))
        for name in ("auc", "logloss", "calibration")
        if name in scores
    }
    sizes = {name: value for name in _METRICS if (value := getattr(record, name)) is not None}
    return {**found, **{name: float(value) for name, value in sizes.items()}}
