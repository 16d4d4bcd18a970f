"""Keeps `state.json`: what the run is doing, for `fathom status` and for whatever started it."""

from __future__ import annotations

from parallel.launch.exit_codes import ExitCode
from pretrain.rundir import state
from pretrain.rundir.outcome import write_end
from pretrain.train.callbacks.base import Callback, RunView, SaveRecord


class RunState(Callback):
    """Claims the run directory for this start and reports every change."""

    def on_start(self, trainer: RunView) -> None:
        """The run is this start's."""
        state.claim(trainer.run_dir, state=state.RUNNING, reason="", step=trainer.step, exit_code=None)

    def on_checkpoint(self, trainer: RunView, record: SaveRecord) -> None:
        """A new checkpoint is progress."""
        state.write_state(trainer.run_dir, step=record["step"])

    def on_end(self, trainer: RunView, code: ExitCode, reason: str) -> None:
        """How it ended."""
        write_end(trainer.run_dir, code, reason, step=trainer.step)
