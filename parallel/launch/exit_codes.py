"""What a training process's exit code says: whether whatever started it should start it again."""

from __future__ import annotations

import contextlib
import os
import sys
from enum import IntEnum
from typing import NoReturn


class ExitCode(IntEnum):
    """Exit codes of `fathom pretrain`.

    64 to 78 are the range of sysexits.h; 75 is its "temporary failure, try again".
    Nothing here collides with 128 + signal number.
    """

    FINISHED = 0
    """All steps are done."""
    CRASH = 1
    """An unexpected error, a traceback: worth another try while there is progress."""
    USER_ERROR = 2
    """A mistake in the configuration or the call: the same start would end the same way."""
    STOPPED = 75
    """Saved and left on request (time limit, preemption): start again."""
    STOPPED_BY_USER = 76
    """Saved and left because a person, or train.stop_at_step, said so: do not start again."""
    DIVERGED = 77
    """A loss is not finite and train.nan_guard is `stop`, or has left out too many steps: the same
    data would do it again.
    """
    HUNG = 78
    """A step or a collective did not end in time; the watchdog ended the process: start again."""
    BAD_NODE = 79
    """This node failed its check before the first step: start again elsewhere."""
    STALE = 80
    """The run directory is not this start's any more: a newer one owns it, or it is gone.

    Nothing was touched.
    """


ENDED_IN_ORDER = frozenset({ExitCode.FINISHED, ExitCode.STOPPED, ExitCode.STOPPED_BY_USER})
"""Codes of processes that have left their group together."""

RESTARTABLE = frozenset({ExitCode.CRASH, ExitCode.STOPPED, ExitCode.HUNG, ExitCode.BAD_NODE})
"""Codes after which another start can help.

Everything that is no ExitCode (a signal, an out-of-memory kill) counts as a crash.
"""


def as_exit_code(code: int) -> ExitCode:
    """The meaning of a process's return code; numbers without one, such as 137, are crashes."""
    try:
        return ExitCode(code)
    except ValueError:
        return ExitCode.CRASH


def leave(code: int) -> NoReturn:
    """Ends this process at once with a code, after what it has said is written.

    For a rank that failed.
    Others may be inside a collective with it, whose threads in C++ end only then.
    One that asks for the interpreter while Python is being torn down aborts the process (134),
    and the code that says whether to start again would be lost.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
