"""Comet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pretrain.train.callbacks.trackers.entry import Entry


class CometClient:
    """Online (COMET_API_KEY or `comet login`), or archives for `comet upload` later."""

    package, module = "comet_ml", "comet_ml"

    def open(self, entry: Entry) -> str:
        """As `Client`."""
        os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")
        import comet_ml

        settings = comet_ml.ExperimentConfig(
            name=entry.name,
            offline_directory=str(entry.path),
            auto_output_logging=False,
            log_code=False,
            log_git_metadata=False,
            log_git_patch=False,
            parse_args=False,
        )
        self._run: Any = comet_ml.start(
            project_name=entry.project,
            online=not entry.offline,
            mode="create" if entry.id is None else "get",
            experiment_key=entry.id,
            experiment_config=settings,
        )
        if entry.id is None:
            self._run.log_parameters(dict(entry.config))
        return str(self._run.get_key())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Client`."""
        self._run.log_metrics(dict(values), step=step)

    def close(self, finished: bool) -> None:
        """As `Client`."""
        self._run.log_other("finished", finished)
        self._run.end()
