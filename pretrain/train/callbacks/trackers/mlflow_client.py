"""MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from itertools import islice

from pretrain.train.callbacks.trackers.entry import Entry

MOST = 100
"""Parameters, and half of the metrics, that one request may hold."""


class MlflowClient:
    """The server of MLFLOW_TRACKING_URI, or a folder."""

    package, module = "mlflow-skinny", "mlflow"

    def open(self, entry: Entry) -> str:
        """As `Client`."""
        # A folder is in maintenance, says the library; the database needs packages beyond `skinny`.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient as Library

        where = entry.path.as_uri() if entry.offline else os.environ.get("MLFLOW_TRACKING_URI")
        if where is None:
            raise ValueError("MLFLOW_TRACKING_URI names no server: set it, or log.offline=true")
        self._library = Library(tracking_uri=where)
        if entry.id is not None:
            self._id = entry.id
            self._library.update_run(self._id, status="RUNNING")
            return self._id
        experiment = self._library.get_experiment_by_name(entry.project)
        number = experiment.experiment_id if experiment else self._library.create_experiment(entry.project)
        self._id = str(self._library.create_run(number, run_name=entry.name).info.run_id)
        rest = iter([Param(key, str(value)) for key, value in entry.config.items()])
        while some := list(islice(rest, MOST)):
            self._library.log_batch(self._id, params=some)
        return self._id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Client`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        rest = iter([Metric(key, value, now, step) for key, value in values.items()])
        while some := list(islice(rest, MOST)):
            self._library.log_batch(self._id, metrics=some)

    def close(self, finished: bool) -> None:
        """As `Client`."""
        self._library.set_terminated(self._id, "FINISHED" if finished else "FAILED")
