"""Arrays that one process computes and all others map from disk, on a file system that they share.

No collective operation is involved, so a slow build cannot run into a communication time-out. The lock only saves work: the content is a pure function
of the file's name and is put in place by one rename, so two processes that build the same file at once do no harm.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from model.errors import UserError
from model.files import atomic_path

POLL_S = 0.1
HEARTBEAT_S = 5.0
STALE_S = 60.0  # a lock without a sign of life for this long is taken over
NOTICE_S = 5.0  # waiting is reported after this time, and then each minute

logger = logging.getLogger(__name__)


def build_once(path: Path, build: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the array stored at `path` (.npy), mapped read-only; builds and stores it first if nobody has.

    Raises UserError when the folder cannot be written or the file is damaged, and whatever `build` raises.
    """
    lock = path.with_name(path.name + ".lock")
    waiting = _Waiting(lock)
    while not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            acquired = _acquire(lock)
        except OSError as error:
            raise UserError(
                f"data.cache: no sample indices can be written to {path.parent} ({error.strerror}); set data.cache to another folder"
            ) from error
        if acquired:
            with _held(lock):
                if not path.exists():
                    _store(path, build())
        else:
            waiting.wait()
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(
            np.ndarray
        )  # a plain array: the memmap class makes every look-up slow
    except (ValueError, EOFError) as error:
        raise UserError(
            f"data.cache: {path} is damaged ({error}); delete this file, it will be built again"
        ) from error


def _store(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _acquire(lock: Path) -> bool:
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}, file)
    return True


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Shows signs of life (the lock's modification time) while the body runs, then removes the lock."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                os.utime(lock)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        lock.unlink(missing_ok=True)


class _Waiting:
    """Waiting for another process's lock. Clocks of hosts are never compared: a lock is stale when it has not changed for STALE_S of our own time."""

    def __init__(self, lock: Path) -> None:
        self.lock = lock
        self.started = self.seen_at = time.monotonic()
        self.next_notice = self.started + NOTICE_S
        self.seen: tuple[int, int] | None = None

    def wait(self) -> None:
        """Sleeps a little; removes the lock if its owner is gone."""
        time.sleep(POLL_S)
        now = time.monotonic()
        try:
            status = self.lock.stat()
            owner = json.loads(self.lock.read_text())
        except OSError:
            return  # released meanwhile
        except ValueError:
            owner = {}  # created, not yet written
        state = (status.st_mtime_ns, status.st_ino)
        if state != self.seen:
            self.seen, self.seen_at = state, now
        if now - self.seen_at > STALE_S or _dead(owner):
            self._take_over(owner)
        elif now >= self.next_notice:
            self.next_notice = now + 60
            logger.warning(
                "waiting for index built by %s, process %s: %s",
                owner.get("host", "?"),
                owner.get("pid", "?"),
                self.lock.with_suffix("").name,
            )

    def _take_over(self, owner: dict[str, object]) -> None:
        grave = self.lock.with_name(f"{self.lock.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            self.lock.rename(grave)  # of several waiters only one succeeds
            grave.unlink()
            logger.warning(
                "removed the lock of %s, process %s, which is gone: %s",
                owner.get("host", "?"),
                owner.get("pid", "?"),
                self.lock.name,
            )
        self.seen = None


def _dead(owner: dict[str, object]) -> bool:
    """Whether the owner ran on this host and its process is no more."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
