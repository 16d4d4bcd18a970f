"""Saving while training goes on.

The step waits for a copy in host memory; a thread of each process does the rest.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint.writer import Content, Fence, Snapshot, take_snapshot, write
from parallel.engine.engine import Engine

if TYPE_CHECKING:
    from typing_extensions import Unpack

PATIENCE = timedelta(hours=2)
"""How long a process waits for the slowest writer.

One that died is noticed at once: its connections are closed.
"""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    step: int
    seconds: float
    """From the beginning to the move of `latest`."""
    stall_seconds: float
    """Of these, those in which training stood still."""
    bytes: int
    """Over all processes."""


class Saver:
    """Saves the checkpoints of a run, at most one at a time.

    Collective: all processes make one, and call `save` and `wait` at the same steps.
    The processes talk over a gloo group of their own, as training uses theirs at the same time.

    fence, tag: see `writer.write`.
    after: called by process 0 when a checkpoint is the newest, in the background;
    its OSError is ignored.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fence: Fence | None = None,
        tag: str = "",
        after: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.fence, self.tag, self.after = folder, fence, tag, after
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._begin = self._stall = 0.0
        self._result: int | Exception = 0
        self._step = -1

    @property
    def busy(self) -> bool:
        """Whether a save was begun and its outcome not yet taken by `wait`."""
        return self._thread is not None

    @property
    def failed(self) -> bool:
        """Whether the save that was begun has failed; `wait` raises why."""
        return (
            self._thread is not None and not self._thread.is_alive() and isinstance(self._result, Exception)
        )

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._thread is None or not self._thread.is_alive()

    def save(
        self, engine: Engine, step: int, *, asynchronous: bool, **content: Unpack[Content]
    ) -> Saved | None:
        """Saves `step`.

        asynchronous: returns None as soon as the copy is made, and `wait` tells the rest.
        Raises RuntimeError while a save is not finished (`wait` first), and as `writer.write` does.
        """
        if self._thread is not None:
            raise RuntimeError(f"the save of step {self._step} was not waited for")
        self._begin, self._step = time.monotonic(), step
        snapshot = take_snapshot(engine, step, buffers=self._buffers if asynchronous else None, **content)
        if not asynchronous:
            size = self._write(snapshot)
            seconds = time.monotonic() - self._begin
            return Saved(step, seconds, seconds, size)
        self._stall, self._seconds = time.monotonic() - self._begin, 0.0
        # A daemon: a process that ends by an error must not wait for others that never come.
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()
        return None

    def wait(self) -> Saved | None:
        """Waits for the save that was begun; None where there is none.

        Raises what made it fail, on every process.
        """
        if self._thread is None:
            return None
        begin = time.monotonic()
        alive = self._thread.is_alive()
        self._thread.join()
        if alive:
            self._stall += time.monotonic() - begin
        self._thread = None
        if isinstance(self._result, Exception):
            raise self._result
        # The join ends a moment after the thread has looked at the clock.
        return Saved(self._step, self._seconds, min(self._stall, self._seconds), self._result)

    def close(self) -> None:
        """Gives up the group. Collective; not while a save is going on."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._buffers.clear()

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._result = self._write(snapshot)
        except Exception as error:
            self._result = error
        self._seconds = time.monotonic() - self._begin

    def _write(self, snapshot: Snapshot) -> int:
        size = write(snapshot, self.folder, group=self._group, fence=self.fence, tag=self.tag)
        if self.after is not None and dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # what should have gone is still there, and goes with the next
                self.after()
        return size
