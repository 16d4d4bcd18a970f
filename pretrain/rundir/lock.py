"""One start at a time in a run directory: a lock against a second one beside it, and the fence against an old one that still lives."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import UserError
from pretrain.rundir.state import Owner, claim, read_state

LOCK_FILE = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer; there, state.json alone keeps starts apart."""


UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
"""What stays as it is until somebody changes something; other errors of file systems may pass."""


class InUseError(UserError):
    """Another process trains in the run directory. Nothing was touched."""


class UnwritableError(UserError):
    """The run directory cannot be made or written, and another attempt would not change that."""


@contextmanager
def owned(run_dir: Path, rank: int) -> Iterator[None]:
    """Rank 0 holds the run directory for this start while the block runs; the kernel lets it go when the process dies. Other ranks do nothing.

    Raises InUseError where another process trains in it, UnwritableError where it cannot be written, and StaleStartError where a newer start of this
    Slurm job has it.
    """
    if rank:
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = _lock(run_dir)
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise UnwritableError(
                f"runs_dir: {run_dir} cannot be written ({error.strerror}): name another folder, or change its permissions"
            ) from None
        raise
    try:
        if read_state(run_dir):
            claim(run_dir)  # from here on an older start that still lives is fenced off
        yield
    finally:
        os.close(handle)


def check_free(run_dir: Path) -> None:
    """Raises InUseError where a process trains in the run directory, before any other is started."""
    if (run_dir / LOCK_FILE).exists():
        os.close(_lock(run_dir))


def _lock(run_dir: Path) -> int:
    """An open file that holds the lock, to be closed. Raises InUseError.

    Between starts of Slurm jobs state.json decides: a lock that a lost node holds on a network file system may stay for a long time.
    """
    handle = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED or (
            isinstance(error, BlockingIOError) and Owner.from_environment().job_id is not None
        ):
            return handle
        holder = os.read(handle, 200).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise
        raise InUseError(
            f"{run_dir} is in use by {holder}: wait for it, stop it, or start this run under another name (name=...)"
        ) from None
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle
