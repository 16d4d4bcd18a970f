"""The secret by which the ranks of a run know each other. Standard library only.

Ranks that `fathom pretrain` starts get it in their environment, which other users cannot read.
Ranks that something else starts, perhaps on several nodes, read it from a file of the run that
its owner alone may read; whoever needs it first makes it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
import time
from pathlib import Path

from model.errors import UserError

VARIABLE = "FATHOM_SECRET"
FILE = "secret"
CHARACTERS = 64
"""Hexadecimal digits, 256 bits."""
PATIENCE_SECONDS = 10.0
"""How long whoever makes the file may take to fill it."""


def new_secret() -> str:
    """A secret that nobody can guess."""
    return secrets.token_hex(CHARACTERS // 2)


def run_secret(control: Path) -> str:
    """The secret of a run: from the environment, or from a file in its folder `control`.

    The file is made where it is missing.
    Raises UserError for a file that another user has put there,
    OSError where it can be neither made nor read.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return given
    control.mkdir(parents=True, exist_ok=True)
    path = control / FILE
    with contextlib.suppress(FileExistsError):
        _make(path)
    return _read(path)


def _make(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            print(
                f"fathom: {path} can be read by others, as its file system has no permissions: "
                f"so can they join the run's ranks. Export {VARIABLE} to all ranks instead",
                file=sys.stderr,
                flush=True,
            )
        file.write(new_secret())
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> str:
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            facts = os.fstat(file.fileno())
            # Where a file system maps root to nobody, our own file has the owner of its folder.
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in (
                os.geteuid(),
                path.parent.stat().st_uid,
            ):
                raise UserError(f"{path} was not made by this user: remove it, and start again")
            content = file.read(CHARACTERS + 1)
        if len(content) == CHARACTERS:
            return content.decode(errors="replace")
        if len(content) > CHARACTERS or time.monotonic() > end:
            raise UserError(f"{path} is damaged: remove it, and start again")
        time.sleep(0.1)
