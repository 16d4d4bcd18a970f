"""One start at a time in a run directory.

A lock against a second one beside it, and the fence against an old one that still lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from model.files import about
from model.words import printable
from pretrain.rundir.state import (
    RUNNING,
    START,
    Owner,
    alive,
    claim,
    owner_of,
    read_state,
)

if TYPE_CHECKING:
    from torch.distributed import Store

LOCK_FILE = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer; there, state.json alone keeps starts apart."""

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
"""What stays as it is until somebody changes something; other errors of file systems may pass."""


class InUseError(UserError):
    """Another process trains in the run directory. Nothing was touched."""


class UnwritableError(UserError):
    """The run directory cannot be made or written, and another attempt would not change that."""


@contextmanager
def owned(run_dir: Path, rank: int) -> Iterator[None]:
    """Rank 0 holds the run directory for this start while the block runs; the kernel lets it go
    when the process dies.

    Other ranks do nothing.
    Raises InUseError where another process trains in it.
    Raises UnwritableError where it cannot be written.
    Raises StaleStartError where a newer start of this Slurm job has it.
    """
    former = os.environ.pop(START, None)
    handle = -1
    try:
        if rank == 0:
            os.environ[START] = secrets.token_hex(4)
            _make(run_dir)
            handle = _lock(run_dir)
            _check_alone(run_dir)
            claim(run_dir)  # from here on an older start that still lives is fenced off
        yield
    finally:
        if handle >= 0:
            os.close(handle)
        os.environ.pop(START, None)
        if former is not None:
            os.environ[START] = former


def share_start(store: Store, rank: int) -> None:
    """Tells all ranks the name of their start, which rank 0 has chosen."""
    if rank == 0:
        store.set("start", os.environ.get(START, ""))
    else:
        os.environ[START] = store.get("start").decode()


def check_free(run_dir: Path) -> None:
    """Checks that no process trains in the run directory, before any other is started.

    Raises InUseError where one does.
    """
    if (run_dir / LOCK_FILE).exists():
        os.close(_lock(run_dir))
        _check_alone(run_dir)


class HeldFolder:
    """A folder that is held open, so that it is noticed when it does not stand at its path any
    more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def lost(self) -> bool:
        """Whether another folder stands at the path, or none."""
        try:
            return not self._is(self.path)
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

    def whereabouts(self) -> Path | None:
        """Where the folder is now; None where it was removed, or this machine does not tell."""
        with suppress(OSError):
            place = Path(os.readlink(f"/proc/self/fd/{self._handle}"))
            if self._is(place):
                return place
        return None

    def close(self) -> None:
        """Lets the folder go. May be called again."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _is(self, path: Path) -> bool:
        return os.path.samestat(os.stat(path), os.fstat(self._handle))


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(run_dir, error) from None


def _unwritable(run_dir: Path, error: OSError) -> OSError | UnwritableError:
    if error.errno not in UNWRITABLE:
        return error
    advice = "name another folder, or change its permissions"
    return UnwritableError(f"runs_dir: {run_dir} cannot be written ({error.strerror}): {advice}")


def _lock(run_dir: Path) -> int:
    """An open file that holds the lock, to be closed. Raises InUseError, or UnwritableError.

    A lock that the start of another job holds is passed over: that of a lost node may stay for a
    long time on a network file system, and
    state.json fences off a node that lives.
    """
    path = run_dir / LOCK_FILE
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnwritableError(f"{path} is a link, which is not followed: remove it") from None
        raise _unwritable(run_dir, error) from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnwritableError(f"{path} is no regular file: remove it")
        with about(path):
            _take(handle, run_dir)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _take(handle: int, run_dir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not _of_another_job(run_dir):
            holder = os.read(handle, 200).decode(errors="replace")
            raise in_use(run_dir, printable(holder.strip()) or "another process") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    else:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _of_another_job(run_dir: Path) -> bool:
    """Whether the start that has the run so far is that of another Slurm job than this process's,
    or an earlier one of its own job.

    The batch script has claimed the run for its ranks then, and left the start without a name.
    """
    owner, state = Owner.from_environment(), read_state(run_dir)
    held = owner_of(state)
    if owner.job_id is None or held.job_id is None:
        return False
    return held.label != owner.label or not held.start


def _check_alone(run_dir: Path) -> None:
    """Raises InUseError where a process of this machine trains here by what state.json says: a lock
    may be missing, or its file removed.
    """
    state = read_state(run_dir)
    if state.get("state") in (None, RUNNING) and state.get("pid") != os.getpid() and alive(state):
        raise in_use(run_dir, f"process {state['pid']} on {state['host']}")


def in_use(run_dir: Path, holder: str) -> InUseError:
    """What to raise where `holder` trains in a run directory."""
    return InUseError(
        f"{run_dir} is in use by {holder}: wait for it, stop it, "
        "or start this run under another name (name=...)"
    )
