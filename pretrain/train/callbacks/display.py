"""Live progress on the first process's terminal."""

from __future__ import annotations

import math

from parallel.checkpoint.folders import step_folder
from parallel.launch.exit_codes import ExitCode
from pretrain.train.callbacks.base import Callback, EvalRecord, RunView, SaveRecord, StepRecord
from pretrain.train.callbacks.progress import Progress


class Display(Callback):
    """Shows each step, evaluation and save.

    mode: see `LogConfig.progress`.
    resumed: checkpoint the run continues from, or None.
    """

    def __init__(self, mode: str, resumed: str | None) -> None:
        self.mode, self.resumed = mode, resumed

    def on_start(self, trainer: RunView) -> None:
        """Opens the display."""
        config = trainer.config
        self.progress = Progress(
            config.train.steps, self.mode, start_step=trainer.step, counted=config.task.counted
        )
        if self.resumed is not None:
            self.progress.note(f"continuing from {self.resumed}, step {trainer.step}")

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        """Moves the bar."""
        self.progress.update(
            record["step"], record["loss"], record["grad_norm"], record["lr"], record["tokens_per_s"]
        )
        if record["skipped"] and not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            self.progress.note(
                f"step {record['step']}: loss or gradient is not finite; the step was not applied"
            )

    def on_warning(self, trainer: RunView, text: str) -> None:
        """Shows it above the bar."""
        self.progress.note(f"step {trainer.step}: {text}")

    def on_eval(self, trainer: RunView, record: EvalRecord) -> None:
        """Shows the evaluation."""
        self.progress.evaluated(record["step"], record["loss"], record.get("accuracy"), record.get("top5"))

    def on_checkpoint(self, trainer: RunView, record: SaveRecord) -> None:
        """Says where the checkpoint is."""
        self.progress.note(
            f"saved {trainer.checkpoints / step_folder(record['step'])} in {record['seconds']:.1f} s"
        )

    def on_end(self, trainer: RunView, code: ExitCode, reason: str) -> None:
        """Closes the display."""
        self.progress.close()
