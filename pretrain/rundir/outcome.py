"""How a start can end: one table, from which state.json, metrics.jsonl, `fathom status` and the
report take what they say.

Standard library only, as the batch script's Python reads it too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.errors import UserError, user_line
from parallel.checkpoint.errors import SaveError
from parallel.checkpoint.folders import step_folder
from parallel.launch.exit_codes import RESTARTABLE, ExitCode, as_exit_code
from pretrain.rundir.state import FAILED, FINISHED, STOPPED, latest_step, read_state, write_state
from pretrain.rundir.state_file import State


@dataclass(frozen=True)
class Ending:
    """What one exit code means to whoever looks at the run."""

    state: str
    """In state.json, where no batch script decides otherwise."""
    mark: Literal["good", "open", "bad"]
    """Colour of the mark in a report."""
    words: str
    """What happened, before `at step N`."""


ENDINGS: dict[ExitCode, Ending] = {
    ExitCode.FINISHED: Ending(FINISHED, "good", "finished"),
    ExitCode.STOPPED: Ending(STOPPED, "open", "stopped, to be started again,"),
    ExitCode.STOPPED_BY_USER: Ending(STOPPED, "open", "stopped as asked"),
    ExitCode.DIVERGED: Ending(FAILED, "bad", "diverged"),
    ExitCode.CRASH: Ending(FAILED, "bad", "failed"),
    ExitCode.USER_ERROR: Ending(FAILED, "bad", "failed"),
    ExitCode.HUNG: Ending(FAILED, "bad", "hung"),
    ExitCode.BAD_NODE: Ending(FAILED, "bad", "failed on an unfit node"),
    ExitCode.STALE: Ending(FAILED, "bad", "replaced by another start"),
}

FORMER_REASONS = (
    ("loss or gradient is not finite", ExitCode.DIVERGED),
    ("not_finite", ExitCode.DIVERGED),
    ("ended by an error", ExitCode.CRASH),
    ("all steps are done", ExitCode.FINISHED),
    ("finished", ExitCode.FINISHED),
    ("train.stop_at_step", ExitCode.STOPPED_BY_USER),
    ("stop_at_step", ExitCode.STOPPED_BY_USER),
    ("asked to save and stop", ExitCode.STOPPED_BY_USER),
    ("interrupted from the keyboard", ExitCode.STOPPED_BY_USER),
)
"""How reasons began that were written without an exit code, by earlier versions."""


def ending(code: int) -> Ending:
    """What an exit code means; one of no meaning of ours is a crash."""
    return ENDINGS[as_exit_code(code)]


def exit_code_of(error: BaseException) -> ExitCode:
    """What a process ends with that met an error.

    A file system that refuses is a mistake where nothing starts the run again.
    On Slurm it may be one node's, or pass.
    """
    if isinstance(error, UserError):
        return ExitCode.USER_ERROR
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return as_exit_code(code)
    lasting = isinstance(error, OSError) and not isinstance(error, SaveError) and user_line(error) is not None
    return ExitCode.USER_ERROR if lasting and "SLURM_JOB_ID" not in os.environ else ExitCode.CRASH


def known_line(error: BaseException) -> str | None:
    """One line for what a user, a node, another rank or another start is the cause of.

    None for a fault of the program.
    """
    if isinstance(getattr(error, "exit_code", None), int):
        return " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted at once: the steps since the last checkpoint are lost"
    return user_line(error)


def words_of(error: BaseException) -> str:
    """An error in one line, with its name where it is a fault of the program."""
    line = known_line(error)
    return (
        line
        if line is not None
        else f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    )


def going_on(run_dir: Path) -> str:
    """What the next start takes up, after an end that is not the run's fault."""
    step = latest_step(run_dir)
    return "" if step is None else f". The same command goes on from {step_folder(step)}"


def code_of_reason(reason: str) -> ExitCode:
    """The exit code that belongs to the reason of an end that was written without one."""
    return next((code for words, code in FORMER_REASONS if reason.startswith(words)), ExitCode.STOPPED)


def write_end(run_dir: Path | str, code: int, reason: str, step: int | None = None) -> None:
    """Writes into state.json how this start ended.

    step: that it had reached; what the file says already where it is not known.
    A fault that another start may mend is left to the batch script, where one waits for this end.
    Raises StaleStartError as `write_state` does.
    """
    mendable = as_exit_code(code) in RESTARTABLE - {ExitCode.STOPPED}
    if mendable and read_state(run_dir).get("supervised"):
        return
    end: State = {"state": ending(code).state, "reason": reason, "exit_code": int(code)}
    if step is not None:
        end["step"] = step
    write_state(run_dir, **end)
