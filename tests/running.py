"""One command with a time limit, and what its answer must look like.

It runs in a process forked from a server where it computes: the libraries are loaded once then, and
what other tests did to the process that asks (a process group, its environment) is not there.
A crash of the interpreter, a hang or what a command leaves in memory stays its own.
It runs in this process where it only reads a configuration.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.launch.local import reserve_port
from tests import forks
from tools.cli import main

LIMIT = 240.0
"""Seconds until a command counts as hanging.

Far above what any needs, as machines are slow at times.
"""
LINE = 2100
"""Characters of the longest line for a mistake."""
HUNG = -1000
"""In place of an exit code: there was no answer in time."""


@dataclass(frozen=True)
class Outcome:
    """What a command answered."""

    arguments: tuple[str, ...]
    code: int
    """Exit code; -n where signal n has ended it."""
    out: str
    err: str
    seconds: float
    """Of this process's processors where it ran here, else by the clock."""

    @property
    def wrong(self) -> str:
        """What is wrong with the answer, or nothing."""
        if self.code == HUNG:
            return "no answer in time"
        if "Traceback" in self.err or "Exception ignored" in self.err:
            return f"a traceback: {' | '.join(self.err.strip().splitlines()[-4:])[-600:]}"
        if self.code == 2:
            return _wrong_line(self.err)
        return "" if self.code == 0 else f"exit code {self.code}: {self.err[-500:]!r}"


def _wrong_line(err: str) -> str:
    """What is wrong with the line for a mistake.

    Before it, a start may have noted what it found.
    """
    *notes, line = err.removesuffix("\n").split("\n")
    if not all(re.match(r"(note|tiny|new|other|preflight): ", note) for note in notes):
        return f"more than one line: {err[:800]!r}"
    if not line.startswith("fathom: error: "):
        return f"not one line: {err[:800]!r}"
    if len(line) > LINE:
        return f"a line of {len(line)} characters: {err[:200]!r}"
    return "" if line.isprintable() else f"control characters: {err[:500]!r}"


class Hung(BaseException):
    """The time is over. No Exception, so that no command catches it."""


def run_here(*arguments: object, limit: float = LIMIT) -> Outcome:
    """Runs `fathom arguments...` in this process."""
    words = tuple(map(str, arguments))
    out, err = io.StringIO(), io.StringIO()
    code, begin = 1, time.process_time()
    try:
        with time_limit(limit), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(words))
    except SystemExit as leaving:
        code = forks.code_of(leaving)
    except Hung:
        code = HUNG
    except BaseException:
        err.write(traceback.format_exc())
    return Outcome(words, code, out.getvalue(), err.getvalue(), time.process_time() - begin)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Hung in the block when the time is over.

    Puts the timer of pytest-timeout aside meanwhile.
    """

    def over(number: int, frame: object) -> None:
        raise Hung

    begin = time.monotonic()
    handler = signal.signal(signal.SIGALRM, over)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, left - (time.monotonic() - begin)))


def run(
    *arguments: object,
    cwd: Path | None = None,
    limit: float = LIMIT,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs `fathom arguments...` in `cwd`."""
    words = tuple(map(str, arguments))
    return _outcome(words, cwd, limit, env, main, list(words))


def run_ranks(
    world: int,
    *arguments: object,
    cwd: Path | None = None,
    limit: float = LIMIT,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs `fathom arguments...` in `world` processes, as under a launcher.

    The exit code is the first of a rank that is not 0.
    """
    words = tuple(map(str, arguments))
    return _outcome(words, cwd, limit, env, _ranks, world, list(words))


class Started:
    """Processes that compute while the test goes on. Inside `with`; what is left ends there."""

    def __init__(self, words: tuple[str, ...], function: Callable[..., Any], *args: Any, **how: Any) -> None:
        self.words, self.begin = words, time.monotonic()
        self.folder = tempfile.TemporaryDirectory()
        self.files = Path(self.folder.name, "out"), Path(self.folder.name, "err")
        out, err = self.files
        self.process = forks.start(function, *args, out=out, err=err, **how)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        forks.finish(self.process, 0)
        self.folder.cleanup()

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def outcome(self, limit: float) -> Outcome:
        """What it answered; waits until it has."""
        code = forks.finish(self.process, limit)
        out, err = (file.read_bytes().decode(errors="backslashreplace") for file in self.files)
        return Outcome(self.words, HUNG if code is None else code, out, err, time.monotonic() - self.begin)


def start_ranks(world: int, *arguments: object) -> Started:
    """Starts `fathom arguments...` in `world` processes, as `run_ranks`."""
    words = tuple(map(str, arguments))
    return Started(words, _ranks, world, list(words), cwd=Path.cwd())


def _outcome(
    words: tuple[str, ...],
    cwd: Path | None,
    limit: float,
    env: Mapping[str, str] | None,
    function: Callable[..., Any],
    *args: Any,
) -> Outcome:
    with Started(words, function, *args, cwd=cwd or Path.cwd(), env=env) as started:
        return started.outcome(limit)


def _ranks(world: int, words: list[str]) -> None:
    """In a fork: becomes a launcher."""
    with reserve_port() as holder:
        ranks = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                be_rank(rank, world, holder.getsockname()[1])
                forks.leave(main, words)
            ranks.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    sys.exit(next(filter(None, codes), 0))


def be_rank(rank: int, world: int, port: int) -> None:
    """Tells this process what a launcher on one machine would."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything in a folder by its path: mode, size and time of the last change."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            status = path.lstat()
            plain = not (path.is_dir() and not path.is_symlink())
            found[str(path.relative_to(folder))] = (
                status.st_mode,
                status.st_size * plain,
                status.st_mtime_ns * plain,
            )
    return found
