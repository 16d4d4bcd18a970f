"""A run's folder as one thing: its history, and what its files say it is."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from model.errors import UserError
from pretrain.rundir.description import Facts, read_config, read_environment
from pretrain.rundir.metrics import Metrics, read_metrics
from pretrain.rundir.state import read_state
from pretrain.rundir.state_file import State
from pretrain.tasks.table import suited, task_of
from pretrain.tasks.task import Task


@dataclass(frozen=True)
class RunRecord:
    """Everything a run directory says about itself."""

    folder: Path
    metrics: Metrics
    config: Facts
    environment: Facts
    state: State
    """state.json; empty where there is none that can be read."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.word("name") or self.folder.resolve().name

    @functools.cached_property
    def model(self) -> ModelConfig | None:
        """The model's configuration, where this version still reads it."""
        try:
            return ModelConfig.model_validate(self.config.get("model"))
        except (ValueError, TypeError):
            return None

    @functools.cached_property
    def task(self) -> Task:
        """What it was trained for; the model's own task where the run names none that is known."""
        family = self.model.family if self.model is not None else "gpt"
        name = self.config.word("train.task")
        return task_of(name if name in suited(family) else None, family)

    @property
    def unigram_entropy(self) -> float:
        """Nats per label; nan where no start says it."""
        known = (start.unigram_entropy for start in reversed(self.metrics.starts))
        return next((entropy for entropy in known if math.isfinite(entropy)), math.nan)


def read_run(run_dir: Path) -> RunRecord:
    """Reads a run directory. Raises UserError where it is none."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(
            f"{run_dir} is no folder: give the folder of a run (it holds config.yaml and metrics.jsonl)"
        )
    metrics = read_metrics(run_dir / "metrics.jsonl").settled()
    try:
        state = read_state(run_dir)
    except UserError:
        state = {}
    return RunRecord(run_dir, metrics, read_config(run_dir), read_environment(run_dir), state)
