"""Metrics to `metrics.jsonl`, TensorBoard and trackers, on the first process only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from model.files import about
from parallel.launch.exit_codes import ExitCode
from pretrain.rundir.metrics import MetricsWriter
from pretrain.train.callbacks.base import Callback, EvalRecord, RunView, SaveRecord, StepRecord
from pretrain.train.callbacks.scalars import Scalars
from pretrain.train.callbacks.trackers.tracked import Aim, Comet, Mlflow, Wandb


class MetricsFile(Callback):
    """Every event as a line of `metrics.jsonl`."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def on_start(self, trainer: RunView) -> None:
        """Opens the file and writes the start event."""
        self.writer = MetricsWriter(trainer.run_dir / "metrics.jsonl")
        self.writer.write("start", **trainer.start_record())

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        """A train line every `interval` steps."""
        if trainer.step % self.interval == 0 or record["skipped"] or trainer.step == trainer.last_step:
            self.writer.write("train", **record)

    def on_signal(
        self, trainer: RunView, short: dict[str, float], layers: Sequence[dict[str, float]]
    ) -> None:
        """Writes a line with every layer, where all were measured.

        The short form is part of the step's own line.
        """
        if layers:
            self.writer.write("signal", trainer.step, layers=layers)

    def on_warning(self, trainer: RunView, text: str) -> None:
        """A warning line."""
        self.writer.write("warning", trainer.step, message=text)

    def on_eval(self, trainer: RunView, record: EvalRecord) -> None:
        """An eval line."""
        self.writer.write("eval", **record)

    def on_checkpoint(self, trainer: RunView, record: SaveRecord) -> None:
        """A checkpoint line."""
        self.writer.write("checkpoint", **record)

    def on_end(self, trainer: RunView, code: ExitCode, reason: str) -> None:
        """The end line."""
        try:
            self.writer.write("end", trainer.step, reason=reason, exit_code=int(code))
        finally:
            self.writer.close()


class TensorBoard(Scalars):
    """Scalars for TensorBoard."""

    def on_start(self, trainer: RunView) -> None:
        """Opens the event file; events of steps that are done again are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder = trainer.run_dir / "tensorboard"
        with about(self.folder):
            self.writer = SummaryWriter(
                str(self.folder), purge_step=trainer.step + 1 if trainer.step else None
            )

    def add(self, tag: str, value: float, step: int) -> None:
        """One number, where it is finite.

        Raises OSError, naming the folder, for what could not be written of earlier ones.
        """
        with about(self.folder):
            if math.isfinite(value):
                self.writer.add_scalar(tag, value, step)

    def on_end(self, trainer: RunView, code: ExitCode, reason: str) -> None:
        """Flushes."""
        with about(self.folder):
            self.writer.close()


LOGGERS: dict[str, type[Callback]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "comet": Comet,
    "aim": Aim,
}
"""What else keeps a run's metrics, by the field of `log` that turns it on.

A new logger is one entry and one field.
"""
