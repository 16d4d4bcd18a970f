"""Writing metrics.jsonl, line by line, whatever becomes of the file and of the disk meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import sys
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from pretrain.rundir.events import EVENT_KINDS
from pretrain.rundir.lines import lines_backwards

if TYPE_CHECKING:
    from typing_extensions import Self

FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
TORN_EVENT = "torn"
"""Event of a line that an interruption cut off; `text` is what there is of it."""


class MetricsWriter:
    """Appends events to a metrics.jsonl, which need not exist yet.

    One write call a line, so that lines of a killed run are whole but the last.
    A last line that was cut off is made a line of its own on opening.
    A file that is removed meanwhile is begun anew, and that is said.
    A line that the disk has no room for leaves nothing of itself.
    Usable as a context manager.
    Raises OSError as the file system does, and UserError for a link or what is no regular file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._start = ""
        self._file = self._open()
        self._close_last_line()

    def write(self, event: str, step: int, **fields: object) -> None:
        """One event, stamped with the current time unless `time` is given.

        Floats that are not finite become null (JSON has no NaN) and are named in `nonfinite`:
        `loss`, or `layers[2].residual_rms`.
        Raises ValueError for an unknown event name.
        """
        if event not in EVENT_KINDS:
            raise ValueError(f"event {event!r} is none of {', '.join(EVENT_KINDS)}")
        lost: list[str] = []
        cleaned = {key: _clean(value, key, lost) for key, value in fields.items()}
        record = {"event": event, "time": round(time.time(), 3), "step": step, **cleaned}
        if lost:
            record["nonfinite"] = lost
        line = json.dumps(record, allow_nan=False) + "\n"
        if event == "start":
            self._start = line
        self._find_again()
        self._put(line)

    def close(self) -> None:
        """Closes the file; further writes raise ValueError."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> FileIO:
        try:
            handle = os.open(self.path, FLAGS, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UserError(f"{self.path} is a link, which is not followed: move it away") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserError(f"{self.path} is no regular file: move it away")
        return FileIO(handle, "ab")

    def _find_again(self) -> None:
        """Goes over to the file that stands at the path now, if it is another one."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            pass
        try:
            file = self._open()
        except FileNotFoundError:
            return  # the folder itself is gone: that ends the run
        self._file.close()
        self._file = file
        print(
            f"fathom: {self.path} was removed or replaced while the run trains, which goes on in a new one",
            file=sys.stderr,
        )
        self._close_last_line()
        if self._start and not os.fstat(file.fileno()).st_size:
            self._put(self._start)

    def _close_last_line(self) -> None:
        """Ends a last line that has no end: as it is where it is complete, else as an event that
        holds what there is of it.
        """
        last = next(lines_backwards(self.path), b"")
        if not last:
            return
        try:
            json.loads(last)
        except ValueError:
            record = {"event": TORN_EVENT, "text": last.decode(errors="replace")}
            size = os.fstat(self._file.fileno()).st_size
            os.ftruncate(self._file.fileno(), size - len(last))
            self._put(json.dumps(record) + "\n")
        else:
            self._put("\n")

    def _put(self, text: str) -> None:
        data, handle = text.encode(), self._file.fileno()
        before = os.fstat(handle).st_size
        try:
            while data:  # an unbuffered write may take less than all of it, on a nearly full disk for example
                data = data[self._file.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, before)
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def _clean(value: object, name: str, lost: list[str]) -> object:
    """The value as JSON has it; NumPy and Torch scalars become Python's by their item()."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(name)
        return None
    if isinstance(value, Mapping):
        return {key: _clean(inner, f"{name}.{key}", lost) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner, f"{name}[{index}]", lost) for index, inner in enumerate(value)]
    return value
