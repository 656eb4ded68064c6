"""MLflow: one run a model, in one experiment."""

from __future__ import annotations

import time
from typing import Any

from embtrim.trackers.tracker import Tracker, tool_module


class MLflow(Tracker):
    """Writes to an MLflow store or server. MLflow's own active run is neither read nor changed.

    Args:
        uri: Tracking URI, such as "sqlite:///mlflow.db" or "http://localhost:5000"; None takes MLflow's own, which
            MLFLOW_TRACKING_URI sets.
        experiment: Name of the experiment, made if there is none.

    Raises:
        ConfigError: mlflow is not installed.
    """

    tool = "mlflow"

    def __init__(self, uri: str | None = None, experiment: str = "embtrim") -> None:
        super().__init__()
        self._mlflow = tool_module("mlflow", "mlflow")
        self.uri, self.experiment = uri, experiment
        self._client: Any = None

    def begin(self, name: str) -> Any:
        """See Tracker."""
        if self._client is None:
            self._client = self._mlflow.MlflowClient(tracking_uri=self.uri)
        found = self._client.get_experiment_by_name(self.experiment)
        place = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        return self._client.create_run(place, run_name=name).info.run_id

    def write(self, run: Any, metrics: dict[str, float], step: int) -> None:
        """See Tracker."""
        now, kind = int(1000 * time.time()), self._mlflow.entities.Metric
        self._client.log_batch(run, metrics=[kind(name, value, now, step) for name, value in metrics.items()])

    def describe(self, run: Any, params: dict[str, str | int | float], metrics: dict[str, float]) -> None:
        """See Tracker."""
        kind = self._mlflow.entities.Param
        self._client.log_batch(run, params=[kind(name, str(value)) for name, value in params.items()])
        self.write(run, metrics, 0)

    def end(self, run: Any, finished: bool) -> None:
        """See Tracker."""
        self._client.set_terminated(run, "FINISHED" if finished else "KILLED")
