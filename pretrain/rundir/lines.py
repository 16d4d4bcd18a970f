"""Files of lines that may be large, may be written right now, and may be no files at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from model.errors import UserError
from model.files import about

BLOCK = 1 << 16


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to be read.

    Raises UserError for what is no regular file, such as a pipe, which would wait for ever.
    Raises OSError as the file system does.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is no regular file: move it away")
    return os.fdopen(handle, "rb")


def lines_backwards(path: Path, block: int = BLOCK, limit: int | None = None) -> Iterator[bytes]:
    """Lines from the last one on, without their ends; empty for what follows the last line end.

    None where there is no file.

    block: bytes read at once; limit: of the file's end that are looked at.
    """
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    with about(path), file:
        end = file.seek(0, os.SEEK_END)
        first, rest = 0 if limit is None else max(0, end - limit), b""
        while end > first:
            begin = max(first, end - block)
            file.seek(begin)
            lines = (file.read(end - begin) + rest).split(b"\n")
            end, rest = begin, lines[0]
            yield from reversed(lines[1:])
            if len(lines) == 1:
                block *= (
                    2  # a line longer than what was read: not to be put together from ever so many pieces
                )
        if first == 0:
            yield rest
