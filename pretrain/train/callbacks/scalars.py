"""Which numbers of a run have curves, and what these are called, wherever they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pretrain.train.callbacks.base import Callback, EvalRecord, RunView, StepRecord
from pretrain.train.callbacks.spread import spread

Scalar = Literal["loss", "grad_norm", "lr", "tokens_per_s", "data_wait_share"]
SCALARS: dict[Scalar, str] = {
    "loss": "loss/train",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "tokens_per_s": "speed/tokens_per_s",
    "data_wait_share": "speed/data_wait_share",
}
SHOWN_LAYERS = 16
"""Layers with curves of their own."""


class Scalars(Callback):
    """Hands every number on by its name."""

    def add(self, tag: str, value: float, step: int) -> None:
        """One number of a step."""
        raise NotImplementedError

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        """Scalars of a step."""
        for key, tag in SCALARS.items():
            self.add(tag, record[key], trainer.step)
        if "batch_size" in record:
            self.add("growth/batch_size", record["batch_size"], trainer.step)
        if "seq_length" in record:
            self.add("growth/seq_length", record["seq_length"], trainer.step)

    def on_signal(
        self, trainer: RunView, short: dict[str, float], layers: Sequence[dict[str, float]]
    ) -> None:
        """Ends and extremes of the signal, and curves of a few layers."""
        for key, value in short.items():
            if not key.endswith("_layer"):
                self.add(f"signal/{key}", value, trainer.step)
        for number in spread(len(layers), SHOWN_LAYERS):
            for key, value in layers[number - 1].items():
                if key != "layer":
                    self.add(f"signal_{key}/layer_{number:04}", value, trainer.step)

    def on_eval(self, trainer: RunView, record: EvalRecord) -> None:
        """Evaluation loss, and accuracy where it is measured."""
        self.add(f"loss/{record['split']}", record["loss"], trainer.step)
        if "accuracy" in record:
            self.add(f"accuracy/{record['split']}", record["accuracy"], trainer.step)
        if "top5" in record:
            self.add(f"top5/{record['split']}", record["top5"], trainer.step)
