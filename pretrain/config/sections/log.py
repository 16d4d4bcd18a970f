"""Section `log`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from model.sections import Strict
from pretrain.config.sections.limits import NAME, STEPS

PROJECT = "fathom"
"""What a run belongs to where nothing is said."""


class LogConfig(Strict):
    """What is written while training."""

    interval: int = Field(1, ge=1, le=STEPS, description="Steps between lines of metrics.jsonl.")
    signal_interval: int = Field(
        50, ge=0, le=STEPS, description="Steps between per-layer signal measurements; 0 turns them off."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events.")
    wandb: bool = Field(False, description="Send metrics to Weights & Biases.")
    mlflow: bool = Field(False, description="Send metrics to MLflow (MLFLOW_TRACKING_URI).")
    comet: bool = Field(False, description="Send metrics to Comet.")
    aim: bool = Field(False, description="Send metrics to Aim (AIM_REPO).")
    project: str = Field(
        PROJECT, min_length=1, max_length=NAME, description="Project, or experiment, of these four."
    )
    offline: bool = Field(
        False, description="They reach no server, and write into the run's folder `trackers` instead."
    )
    progress: Literal["auto", "bar", "plain", "none"] = Field(
        "auto", description="Live progress: a bar on a terminal, else plain lines."
    )

    @model_validator(mode="after")
    def _check(self) -> LogConfig:
        if not (self.wandb or self.mlflow or self.comet or self.aim):
            for name, given in {"project": self.project != PROJECT, "offline": self.offline}.items():
                if given:
                    raise ValueError(
                        f"log.{name} has no effect without log.wandb, log.mlflow, log.comet or log.aim: "
                        "turn one on, or leave it out"
                    )
        return self
