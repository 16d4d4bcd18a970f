"""What is optional about a run, one file each. The loop calls them; they never change what is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.train.loop import Trainer


class Callback:
    """Base of all callbacks: every moment of a run, doing nothing.

    watching: hooks of modules that must run in the step about to be taken; set in `before_step`.
    """

    watching = False

    def on_start(self, trainer: Trainer) -> None:
        """After everything is built and loaded, before the first step."""

    def before_step(self, trainer: Trainer) -> None:
        """Before each optimizer step; `trainer.step` is the step about to be taken."""

    def on_gradients(self, trainer: Trainer) -> None:
        """Inside a step, when gradients are reduced and not yet clipped."""

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each step, with its metrics line."""

    def on_eval(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each evaluation."""

    def on_checkpoint(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each save."""

    def on_end(self, trainer: Trainer, reason: str) -> None:
        """When the loop is left, finished or not."""
