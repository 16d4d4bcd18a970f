"""A folder that appears whole or not at all, and replaces nothing that it does not know."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from model.files import check_room, sync_folder, umask

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""What a file system says that has no place for a file, whichever file it is."""
LONGEST = 200
"""Characters of a folder's name in that of the hidden one beside it."""
NO_ROOM_TEXT = "no space left on device"
"""The same from libraries that keep the text of the error only."""


@dataclass(frozen=True)
class FolderKind:
    """What is written, and how messages speak of it."""

    what: str
    """With its article: `a data set`."""
    marker: str | None
    """File that tells a folder of this kind from any other; None: never replace a folder."""
    advice: str
    """What to do where there is one already, a phrase: `add --overwrite to replace it`."""
    option: str = ""
    """What stands before the folder in messages, where the user named it by an option: `--out`."""

    def name(self, out: Path) -> str:
        """The folder as messages name it."""
        return f"{self.option} {out}".strip()


def check_target(out: Path | str, kind: FolderKind, replace: bool = False) -> None:
    """Raises UserError where `out` cannot be written, or holds what may not be replaced.

    To be asked before long work.
    replace: whether a folder of the same kind may be.
    """
    _check_free(Path(out), kind, replace)
    real = Path(os.path.realpath(out))
    check_room(real.parent / real.name[:LONGEST], kind.name(Path(out)))


def _check_free(out: Path, kind: FolderKind, replace: bool) -> None:
    """Raises UserError where `out` holds what may not be replaced."""
    name = kind.name(out)
    try:
        taken = os.path.lexists(out) and (not out.is_dir() or any(out.iterdir()))
        known = kind.marker is not None and (out / kind.marker).is_file()
    except OSError as error:
        raise UserError(f"{name}: cannot be written: {error.strerror}; name another folder") from None
    if not taken:
        return
    if not out.is_dir():
        raise UserError(f"{name}: is a file; name a folder")
    if kind.marker is not None and not known:
        raise UserError(f"{name}: the folder holds something else than {kind.what}; name another folder")
    if not replace or kind.marker is None:
        raise UserError(f"{name}: {kind.what} is there already; {kind.advice}")


@contextmanager
def whole_folder(out: Path | str, kind: FolderKind, replace: bool = False) -> Iterator[Path]:
    """Gives a hidden folder beside `out`.

    On leaving without an error, syncs it and renames it to `out`; else removes it.
    replace: whether a folder of the same kind may be replaced.
    What is at `out` is looked at before and, in case it came meanwhile, once more at the end.
    A link to a folder is followed.
    Files get the permissions that the umask leaves; programs stay so.
    Raises UserError where `out` holds what may not be replaced or cannot be written, a full disk
    included.
    """
    given, out = out, Path(os.path.realpath(out))
    name = kind.name(Path(given))
    _check_free(out, kind, replace)
    made = [folder for folder in out.parents if not folder.exists()]
    staging = _beside(out, "tmp", name)
    done = False
    try:
        yield staging
        _settle(staging)
        _into_place(staging, out, kind, replace, name)
        done = True
    except Exception as error:
        reason = no_room(error)
        if reason is None:
            raise
        raise UserError(f"{name}: cannot be written: {reason}; nothing is left of it") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in [] if done else made:
            _remove_empty(folder)


def no_room(error: Exception) -> str | None:
    """The file system's words where an error means that it has no place; None for other errors."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return error.strerror
    if NO_ROOM_TEXT in str(error).lower() and not isinstance(error, UserError):
        return NO_ROOM_TEXT.capitalize()
    return None


def _beside(out: Path, suffix: str, name: str) -> Path:
    """A new hidden folder on the same file system."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name[:LONGEST]}.", suffix=f".{suffix}", dir=out.parent))
    except OSError as error:
        raise UserError(f"{name}: cannot write to {out.parent}: {error.strerror}") from error


def _settle(folder: Path) -> None:
    """Gives everything in a folder its permissions, and makes it durable."""
    mask = umask()
    for parent, _, names in os.walk(folder):
        for path in (Path(parent) / name for name in names):
            if path.is_symlink():
                continue
            executable = path.stat().st_mode & 0o100
            path.chmod((0o777 if executable else 0o666) & ~mask)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        Path(parent).chmod(0o777 & ~mask)
        sync_folder(Path(parent))


def _into_place(staging: Path, out: Path, kind: FolderKind, replace: bool, name: str) -> None:
    """Renames.

    An older folder is moved aside, looked at where nobody else finds it, and only then removed.
    """
    _check_free(out, kind, replace)
    old = None
    if out.is_dir() and any(out.iterdir()):
        old = _beside(out, "old", name)
        out.rename(old)  # onto the empty folder just made
    try:
        if old is not None:
            _check_free(old, kind, replace)
        staging.rename(out)  # which takes the place of nothing but an empty folder
    except (OSError, UserError) as error:
        kept = "" if old is None else _put_back(old, out)
        reason = (error.strerror or error) if isinstance(error, OSError) else "it was exchanged"
        meanwhile = f"something else wrote there meanwhile{kept}"
        raise UserError(f"{name}: cannot be put in place: {reason}; {meanwhile}") from error
    sync_folder(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, out: Path) -> str:
    """Moves a folder back to where it was. Returns what there is to say about it."""
    try:
        old.rename(out)
    except OSError:
        return f"; what was there is now {old}"
    return ""


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # someone else has put something there
