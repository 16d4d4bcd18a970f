"""Metrics to `metrics.jsonl` and TensorBoard, on the first process only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pretrain.rundir.metrics import MetricsWriter
from pretrain.train.callbacks.base import Callback

if TYPE_CHECKING:
    from pretrain.train.loop import Trainer

SCALARS = {
    "loss": "loss/train",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "tokens_per_s": "speed/tokens_per_s",
    "data_wait_share": "speed/data_wait_share",
}


class MetricsFile(Callback):
    """Every event as a line of `metrics.jsonl`."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def on_start(self, trainer: Trainer) -> None:
        """Opens the file and writes the start event."""
        self.writer = MetricsWriter(trainer.run_dir / "metrics.jsonl")
        self.write("start", trainer.start_record())

    def write(self, event: str, record: dict[str, Any]) -> None:
        """One line."""
        self.writer.write(event, **record)

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """A train line every `interval` steps."""
        if trainer.step % self.interval == 0 or record["skipped"] or trainer.step == trainer.last_step:
            self.write("train", record)

    def on_eval(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """An eval line."""
        self.write("eval", record)

    def on_checkpoint(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """A checkpoint line."""
        self.write("checkpoint", record)

    def on_end(self, trainer: Trainer, reason: str) -> None:
        """The end line."""
        self.write("end", {"step": trainer.step, "reason": reason})
        self.writer.close()


class TensorBoard(Callback):
    """Scalars for TensorBoard."""

    def on_start(self, trainer: Trainer) -> None:
        """Opens the event file; events of steps that are done again are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(
            str(trainer.run_dir / "tensorboard"), purge_step=trainer.step + 1 if trainer.step else None
        )

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Scalars of a step."""
        for key, tag in SCALARS.items():
            if math.isfinite(record[key]):
                self.writer.add_scalar(tag, record[key], trainer.step)

    def on_eval(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Evaluation loss."""
        self.writer.add_scalar(f"loss/{record['split']}", record["loss"], trainer.step)

    def on_end(self, trainer: Trainer, reason: str) -> None:
        """Flushes."""
        self.writer.close()
