"""One command with a time limit, and what its answer must look like.

It runs in a process forked from a server where it computes: the libraries are loaded once then, and
what other tests did to the process that asks (a process group, its environment) is not there.
A crash of the interpreter, a hang or what a command leaves in memory stays its own.
It runs in this process where it only reads a configuration.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
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
SERVER = multiprocessing.get_context("forkserver")


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
    """Has the server import what its forks would each import for themselves."""
    SERVER.set_forkserver_preload([*PRELOADED, __name__])


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
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = SERVER.Process(target=_child, args=(words, cwd or Path.cwd(), out, err))
        process.start()
        process.join(limit)
        code = process.exitcode
        if code is None:
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            code = HUNG
        texts = [file.read_bytes().decode(errors="backslashreplace") for file in (out, err)]
    return Outcome(words, code, texts[0], texts[1], time.monotonic() - begin)


def _child(words: tuple[str, ...], cwd: Path, out: Path, err: Path) -> None:
    code = 1
    try:
        os.setsid()
        for source, target in ((Path(os.devnull), 0), (out, 1), (err, 2)):
            flags = os.O_RDWR | os.O_CREAT if target else os.O_RDONLY
            os.dup2(os.open(source, flags, 0o600), target)
        # Those of the server keep what is written for themselves.
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FATHOM_DEBUG"):
            os.environ.pop(name, None)
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
