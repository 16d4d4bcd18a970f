"""Processes forked from a server that has loaded the libraries, one server for a process of tests.

Loading them takes longer than most of what tests do with them.
What other tests did to the process that asks (a process group, its environment, its folder)
is not in a fork.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
OF_A_RUN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "FATHOM_DEBUG",
)
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""What libraries read when they are loaded. CUDA does not outlive a fork."""


def shell_environment() -> dict[str, str]:
    """This process's variables without those that say it is a rank, or a task of Slurm."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in OF_A_RUN and not name.startswith("SLURM")
    }


@functools.cache
def server() -> ForkServerContext:
    """Starts in the project's folder, as from a shell."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    folder, before = Path.cwd(), dict(os.environ)
    try:
        os.chdir(ROOT)
        for name in before.keys() - shell_environment().keys():
            del os.environ[name]
        paths = os.pathsep.join(filter(None, (str(ROOT), before.get("PYTHONPATH"))))
        os.environ.update(ENVIRONMENT, PYTHONPATH=paths)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.chdir(folder)
    return context


def start(
    function: Callable[..., Any],
    *args: Any,
    cwd: Path,
    out: Path,
    err: Path,
    env: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Starts `function(*args)`, a module-level function of this project, in a fork.

    It leads a session of its own, so that all that it starts can be ended by its group.
    Its exit code is that of SystemExit, 1 after another exception, whose traceback is printed.

    out, err: files for what it prints; they may be the same.
    env: variables beside those of the server.
    """
    process = server().Process(target=_child, args=(function, args, cwd, out, err, dict(env or {})))
    process.start()
    return process


def finish(process: ForkServerProcess, limit: float) -> int | None:
    """Waits until it has ended, and ends all that it has started.

    Returns its exit code, or None where it took longer than `limit` seconds.
    """
    process.join(limit)
    code = process.exitcode
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        process.kill()  # one that does not lead its session yet
    process.join()
    return code


def code_of(leaving: SystemExit) -> int:
    """The exit code of a process that leaves by this exception."""
    return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)


def leave(function: Callable[..., Any], *args: Any) -> NoReturn:
    """Ends a forked process with what `function(*args)` says; see `start`."""
    code = 1
    try:
        function(*args)
        code = 0
    except SystemExit as leaving:
        code = code_of(leaving)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 0xFF)


def _child(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    cwd: Path,
    out: Path,
    err: Path,
    env: Mapping[str, str],
) -> None:
    os.setsid()
    for source, target in ((Path(os.devnull), 0), (out, 1), (err, 2)):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND if target else os.O_RDONLY
        os.dup2(os.open(source, flags, 0o600), target)
    # Those of the server keep what is written for themselves.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    # The server ignores it, so that a terminal's ctrl-C is not its end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(env)
    tempfile.tempdir = None  # asked for again, as `env` may name another
    os.chdir(cwd)
    leave(function, *args)
