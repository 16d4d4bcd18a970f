"""What a user can do something about, as an exception and as one line.

Everything else is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import sysconfig
from pathlib import Path
from types import TracebackType

from model.words import printable

HOME = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "parallel", "pretrain", "tools")
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE)
"""Faults of disks and limits, which are the user's to mend also where the error names no file."""

LONGEST = 2000
"""Characters of the longest line for a mistake."""

ADVICE = {
    errno.ENOENT: "No such file or directory: check the path",
    errno.ENOTDIR: "Not a directory: a part of this path is a file; check the path",
    errno.EISDIR: "Is a directory, where a file is meant: check the path",
    errno.EEXIST: "File exists: remove it, or name another place",
    errno.ENOTEMPTY: "Directory not empty: remove what is in it, or name another place",
    errno.EACCES: "Permission denied: name another place, or ask its owner",
    errno.EPERM: "Operation not permitted: name another place, or ask its owner",
    errno.ENAMETOOLONG: "File name too long: shorten it",
    errno.ELOOP: "Too many levels of symbolic links: they lead in a circle",
    errno.ENXIO: "No such device or address: name a regular file",
    errno.ENOSPC: "No space left on device: make room, or name a place on another disk",
    errno.EDQUOT: "Disk quota exceeded: remove files, or name a place on another disk",
    errno.EROFS: "Read-only file system: name a place that can be written",
    errno.EFBIG: "File too large: the file system or `ulimit -f` allows no more",
    errno.EIO: "Input/output error: the disk or the network file system failed; look at `dmesg`",
    errno.ESTALE: "Stale file handle: the network file system lost the file; try again",
    errno.EMFILE: "Too many open files: raise the limit with `ulimit -n`",
    errno.ENFILE: "Too many open files in system: end other processes",
}
"""What happened and what to do, by the number of an OSError."""


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message names the key or file, the value, and what to do.
    """


def told(error: BaseException, about: str = "") -> bool:
    """Prints the one line of an error that the user can mend, after the words `about`.

    False for a fault of the program, and under FATHOM_DEBUG=1, which shows every traceback.
    """
    line = user_line(error)
    if line is None or debugging():
        return False
    say(about + line)
    return True


def debugging() -> bool:
    """Whether every traceback is to be seen."""
    return os.environ.get("FATHOM_DEBUG") == "1"


def say(line: str) -> None:
    """Prints what a user has to know before this process exits."""
    if line and sys.stderr is not None:
        print(f"fathom: error: {printable(line, LONGEST)}", file=sys.stderr, flush=True)


def user_line(error: BaseException) -> str | None:
    """One line for an error that the user can mend.

    That is a UserError, or a file system's answer about a file that is not ours.
    None for a fault of the program. That includes an OSError about files of this package or of
    Python, one about no file at all, and one about a program, a socket or a pipe.
    """
    if isinstance(error, UserError):
        return " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError):
        if error.errno is None:
            ours = type(error).__module__.partition(".")[0] in PACKAGES
            return " ".join(str(error).split()) if ours else None
        return _about_files(error.errno, error.filename, error.__traceback__)
    # Libraries written in Rust put the system's answer into the text of an exception of their own.
    number = re.search(r"\(os error (\d+)\)", str(error))
    return _about_files(int(number[1]), None, None) if number else None


def _about_files(number: int, name: object, trace: TracebackType | None) -> str | None:
    text = ADVICE.get(number) or os.strerror(number)
    if isinstance(name, (str, bytes)) and name:
        path = os.fsdecode(name)
        return None if _ours(path) or _in_subprocess(trace) else f"{printable(path)}: {text}"
    if number == errno.ENOENT and not _has_working_folder():
        return "the working folder is gone: change to another one"
    return text if number in STORAGE else None


def _ours(path: str) -> bool:
    """Whether a file belongs to this package, to Python, or to an installed library."""
    if not os.path.isabs(path):
        return False
    folders = [HOME / package for package in PACKAGES] + [
        Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")
    ]
    return any(Path(os.path.realpath(path)).is_relative_to(folder.resolve()) for folder in folders)


def _in_subprocess(trace: TracebackType | None) -> bool:
    """Whether the error arose in the start of another program."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == "subprocess"


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
