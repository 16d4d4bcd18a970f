"""Keeps `config.yaml` and `environment.json`: what the run is, and where it was trained."""

from __future__ import annotations

import json
from pathlib import Path

from model.files import atomic_write_text
from pretrain.config.load import dump_config
from pretrain.config.schema import RunConfig
from pretrain.train.callbacks.base import Callback, RunView, StepRecord


def describe(config: RunConfig, run_dir: Path) -> None:
    """Writes what the run is and where it runs."""
    from pretrain.rundir.environment import environment

    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_text(run_dir / "config.yaml", dump_config(config))
    atomic_write_text(run_dir / "environment.json", json.dumps(environment(), indent=1))


class Description(Callback):
    """Describes the run anew once this start has taken a step.

    A start that takes none (refused, failed, all steps done) leaves the run as it trained.
    """

    def __init__(self) -> None:
        self.written = False

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        """After the first step."""
        if not self.written:
            describe(trainer.config, trainer.run_dir)
            self.written = True
