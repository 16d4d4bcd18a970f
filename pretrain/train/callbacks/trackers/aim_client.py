"""Aim."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pretrain.train.callbacks.trackers.entry import Entry


class AimClient:
    """The server of AIM_REPO (aim://host:port), or files for `aim up`."""

    package = module = "aim"

    def open(self, entry: Entry) -> str:
        """As `Client`."""
        import aim

        where = str(entry.path) if entry.offline else os.environ.get("AIM_REPO")
        if where is None:
            raise ValueError("AIM_REPO names no server: set it, or log.offline=true")
        self._run: Any = aim.Run(
            run_hash=entry.id,
            repo=where,
            experiment=entry.project,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        if entry.id is None:
            self._run.name = entry.name
            self._run["config"] = dict(entry.config)
        return str(self._run.hash)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Client`."""
        for name, value in values.items():
            self._run.track(value, name=name, step=step)

    def close(self, finished: bool) -> None:
        """As `Client`."""
        self._run["finished"] = finished
        self._run.close()
