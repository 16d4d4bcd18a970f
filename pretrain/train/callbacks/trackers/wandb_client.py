"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pretrain.train.callbacks.trackers.entry import Entry


class WandbClient:
    """Online (WANDB_API_KEY or `wandb login`), or offline, for `wandb sync` later."""

    package = module = "wandb"

    def open(self, entry: Entry) -> str:
        """As `Client`."""
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        self._run: Any = wandb.init(
            project=entry.project,
            name=entry.name,
            id=entry.id,
            resume="allow",
            mode="offline" if entry.offline else "online",
            dir=entry.path,
            config=dict(entry.config),
            settings=wandb.Settings(console="off", init_timeout=60),
        )
        # Its own counter never goes back, as steps do after a restart from an older checkpoint.
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Client`."""
        self._run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        """As `Client`."""
        self._run.finish(exit_code=0 if finished else 1)
