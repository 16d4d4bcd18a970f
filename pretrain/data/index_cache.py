"""Arrays that one process computes and all others map from disk, on a file system they share.

No collective operation is involved, so a slow build cannot run into a communication time-out.
The lock only saves work: the content is a pure function of the file's name and is put in place by
one rename, so two processes that build the same file at once do no harm.
A file is a one-dimensional .npy of int64 whose last number is the checksum of the others.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import xxhash
from pydantic import Field

from model.errors import UserError
from model.files import TEMPORARY, atomic_path
from model.records import Record
from model.words import printable

POLL_S = 0.1
HEARTBEAT_S = 5.0
STALE_S = 60.0
"""A lock without a sign of life for this long is taken over."""
NOTICE_S = 5.0
"""Waiting is reported after this time, and then each minute."""

logger = logging.getLogger(__name__)


def cache_folder(given: str | Path | None, corpus: str | Path) -> Path:
    """Where indices are kept: `data.cache`, or `index_cache` beside the first corpus."""
    return Path(given) if given else Path(corpus).absolute().parent / "index_cache"


class _Owner(Record):
    """What a lock file says."""

    host: str = "?"
    pid: Annotated[int, Field(ge=1, lt=2**31)] | None = None


def build_once(
    path: Path,
    build: Callable[[], np.ndarray],
    length: int,
    alone: bool = False,
) -> np.ndarray:
    """Returns the int64 array stored at `path`, mapped read-only.

    Builds and stores it first if nobody has, or if what is there is damaged.
    length: of the array. alone: no other process needs it, so that it may stay in memory where the
    folder cannot be written.
    Raises UserError when the folder cannot be written, and whatever `build` raises.
    """
    lock = path.with_name(path.name + ".lock")
    waiting = _Waiting(lock)
    while (found := _load(path, length)) is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            acquired = _acquire(lock)
        except OSError as error:
            if alone:
                return build()
            raise _unwritable(path, error) from error
        if not acquired:
            waiting.wait()
            continue
        with _held(lock):
            found = _load(path, length)
            if found is not None:
                break
            _remove_leftovers(path)
            built = build()
            try:
                _store(path, built)
            except OSError as error:
                found = _load(path, length)  # of a process that was thought dead, and was not
                if found is not None:
                    break
                if alone:
                    return built
                raise _unwritable(path, error) from error
    return found


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = f"no sample indices can be written to {path.parent} ({error.strerror})"
    return UserError(f"data.cache: {reason}; set data.cache to another folder")


def _load(path: Path, length: int) -> np.ndarray | None:
    """The array of a file; None where there is none, or a damaged one, which is said."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        # A plain array: the memmap class makes every look-up slow.
        stored = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError) as error:
        problem = str(error)
    else:
        if stored.dtype != np.int64 or stored.shape != (length + 1,):
            problem = f"{stored.dtype} {list(stored.shape)} instead of int64 [{length + 1}]"
        elif stored[-1] != _checksum(stored[:-1]):
            problem = "another checksum"
        else:
            return stored[:-1]
    logger.warning("%s is damaged (%s) and is built again", path, printable(problem))
    return None


def _checksum(array: np.ndarray) -> int:
    """64 bits as a signed number, which is what the array holds."""
    return int.from_bytes(xxhash.xxh3_64_digest(array.data), "big", signed=True)


def _store(path: Path, array: np.ndarray) -> None:
    if path.exists() and not path.is_file():
        path.unlink()  # a pipe, say, that took its name
    header = {"descr": "<i8", "fortran_order": False, "shape": (len(array) + 1,)}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        array.tofile(file)
        np.array([_checksum(array)]).tofile(file)


def _remove_leftovers(path: Path) -> None:
    """Removes what a process left that was killed while it wrote this file."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


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
    """Shows signs of life (the lock's modification time) in the body, then removes the lock."""
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
    """Waiting for another process's lock.

    Clocks of hosts are never compared: a lock is stale when it has not changed for STALE_S of our
    own time.
    """

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
            text = self.lock.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            owner = _Owner.model_validate_json(text)
        except OSError:
            return  # released meanwhile
        except ValueError:
            owner = _Owner()  # created and not yet written, or damaged
        state = (status.st_mtime_ns, status.st_ino)
        if state != self.seen:
            self.seen, self.seen_at = state, now
        if now - self.seen_at > STALE_S or _dead(owner):
            self._take_over(owner)
        elif now >= self.next_notice:
            self.next_notice = now + 60
            logger.warning("waiting for index built by %s: %s", _shown(owner), self.lock.with_suffix("").name)

    def _take_over(self, owner: _Owner) -> None:
        grave = self.lock.with_name(f"{self.lock.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            self.lock.rename(grave)  # of several waiters only one succeeds
            grave.unlink()
            logger.warning("removed the lock of %s, which is gone: %s", _shown(owner), self.lock.name)
        self.seen = None


def _shown(owner: _Owner) -> str:
    return f"{printable(owner.host)}, process {owner.pid or '?'}"


def _dead(owner: _Owner) -> bool:
    """Whether the owner ran on this host and its process is no more."""
    if owner.host != socket.gethostname() or owner.pid is None:
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
