"""One command with a time limit, and what its answer must look like.

It runs in a forked process where it computes: the libraries are loaded once then.
A crash of the interpreter, a hang or what a command leaves in memory stays its own.
It runs in this process where it only reads a configuration.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.cli import main

LIMIT = 60.0
"""Seconds until a command counts as hanging.

Far above what any needs, as machines are slow at times.
"""
LINE = 2100
"""Characters of the longest line for a mistake."""
HUNG = -1000
"""In place of an exit code: there was no answer in time."""
PRELOADED = (
    "deepspeed",
    "matplotlib.pyplot",
    "megatron.core.models.gpt",
    "pretrain.train.loop",
    "pretrain.train.build",
    "transformers.models.gpt2.modeling_gpt2",
)


@dataclass(frozen=True)
class Outcome:
    """What a command answered."""

    arguments: tuple[str, ...]
    code: int
    """Exit code; -n where signal n has ended it."""
    out: str
    err: str
    seconds: float

    @property
    def wrong(self) -> str:
        """What is wrong with the answer, or nothing."""
        if self.code == HUNG:
            return f"no answer in {self.seconds:.0f} s"
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


def preload() -> None:
    """Imports in this process what forked ones would each import for themselves."""
    for module in PRELOADED:
        importlib.import_module(module)


class Hung(BaseException):
    """The time is over. No Exception, so that no command catches it."""


def run_here(*arguments: object, limit: float = LIMIT) -> Outcome:
    """Runs `fathom arguments...` in this process."""
    words = tuple(map(str, arguments))
    out, err = io.StringIO(), io.StringIO()
    code, begin = 1, time.monotonic()
    try:
        with time_limit(limit), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(words))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Hung:
        code = HUNG
    except BaseException:
        err.write(traceback.format_exc())
    return Outcome(words, code, out.getvalue(), err.getvalue(), time.monotonic() - begin)


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


def run(*arguments: object, cwd: Path | None = None, limit: float = LIMIT) -> Outcome:
    """Runs `fathom arguments...` in `cwd`."""
    words = tuple(map(str, arguments))
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        pid = os.fork()
        if pid == 0:
            _child(words, cwd, out.fileno(), err.fileno())
        code = _wait(pid, begin + limit)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
    return Outcome(words, code, texts[0], texts[1], time.monotonic() - begin)


def _child(words: tuple[str, ...], cwd: Path | None, out: int, err: int) -> None:
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        # Those of pytest keep what is written for themselves.
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FATHOM_DEBUG"):
            os.environ.pop(name, None)
        if cwd is not None:
            os.chdir(cwd)
        main(list(words))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 0xFF)


def _wait(pid: int, end: float) -> int:
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HUNG
        time.sleep(0.002)


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
