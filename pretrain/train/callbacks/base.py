"""What is optional about a run, one file each. The loop calls them; they never change what is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parallel.launch.exit_codes import ExitCode

if TYPE_CHECKING:
    from pretrain.train.loop import Trainer


class Callback:
    """Base of all callbacks: every moment of a run, doing nothing.

    A callback that cannot write raises OSError; the run then ends on all ranks at once.
    """

    watching = False
    """Whether hooks of modules must run in the step about to be taken; set in `before_step`."""
    order = 0
    """Callbacks are called by rising order, and equal ones as they were added."""

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

    def on_end(self, trainer: Trainer, code: ExitCode, reason: str) -> None:
        """When the loop is left, finished or not."""
