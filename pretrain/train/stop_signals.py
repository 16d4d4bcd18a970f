"""How a running process learns that it should save and leave."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from parallel.launch.exit_codes import ExitCode
from parallel.launch.local import leave_terminal, stop_signals
from pretrain.rundir.state import Owner, asked_to_stop

REASONS = {
    "USR1": "the time limit is near, or the job is preempted",
    "TERM": "ended from outside (preemption, scancel, or the time limit itself)",
    "HUP": "the terminal it was started from is gone",
    "USR2": "asked to save and stop for good",
    "INT": "interrupted from the keyboard",
    "FILE": "asked to save and stop by the file control/exit",
    "TIME": "checkpoint.leave_after_minutes is over",
}
FOR_GOOD = ("USR2", "INT", "FILE")
BEGAN = time.monotonic()
"""About when this process started, by time.monotonic."""


class StopRequest:
    """A flag that signals set. `code()` is 0 until then.

    The ranks of a run must agree on it (all-reduce, maximum) before one of them acts.

    SIGUSR1, SIGTERM and SIGHUP ask for save, leave and be started again.
    SIGUSR2 and ctrl-C ask for save and leave for good.
    A second ctrl-C interrupts at once.
    SIGHUP stays ignored where it is, as under nohup.
    """

    def __init__(self, run_dir: Path | str, env: Mapping[str, str] | None = None) -> None:
        self._run_dir, self._owner = run_dir, Owner.from_environment(env)
        self._name = ""

    def install(self) -> None:
        """Sets the signal handlers.

        A request that came earlier, while this process was still importing, is found in the file
        that the batch script wrote.
        """
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                signal.signal(number, self._receive)
        self._name = self._name or ("USR1" if asked_to_stop(self._run_dir, self._owner) else "")

    def ask(self, name: str) -> None:
        """Asks as a signal would. name: a key of REASONS; the first request counts."""
        self._name = self._name or name

    def code(self) -> int:
        """0 while nobody asked, else a member of ExitCode.

        STOPPED, or STOPPED_BY_USER, which is the larger number.
        """
        if not self._name:
            return 0
        return int(ExitCode.STOPPED_BY_USER if self._resolved() in FOR_GOOD else ExitCode.STOPPED)

    def reason(self) -> str:
        """What asked, in words; empty while nobody did."""
        return REASONS.get(self._resolved(), self._name) if self._name else ""

    def _resolved(self) -> str:
        # srun passes USR1 on for every request that reaches the batch script.
        # Which one it was is in the file.
        return (self._name == "USR1" and asked_to_stop(self._run_dir, self._owner)) or self._name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name.removeprefix("SIG")
        if name == "INT" and self._name == "INT":
            raise KeyboardInterrupt
        if name == "HUP":
            leave_terminal()
        self._name = self._name or name


def task_exit_code(code: ExitCode, env: Mapping[str, str] | None = None) -> int:
    """What a rank should pass to sys.exit after it left in order.

    A task of srun ends with 0 when all ranks left together.
    Any other code would make `srun --kill-on-bad-exit` kill those that are a moment later, and hide
    the code behind theirs.
    state.json holds it (`exit_code`).
    Failures keep their code, so that the others are ended.
    """
    env = os.environ if env is None else env
    in_order = code in (ExitCode.FINISHED, ExitCode.STOPPED, ExitCode.STOPPED_BY_USER)
    return 0 if in_order and "SLURM_STEP_ID" in env else int(code)
