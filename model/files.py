"""Durable files: written beside, synced, renamed.

A reader sees the old content or the new, never a part.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from model.errors import STORAGE, UserError
from model.words import printable

TEMPORARY = ".tmp"


def umask() -> int:
    """The permissions that the user wants withheld from new files."""
    with contextlib.suppress(
        OSError
    ):  # where Linux tells it, nothing need be changed for a moment under other threads
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def inside(folder: Path | str, name: str) -> Path:
    """The path of a name that a file from outside gives, such as an entry of an index or a pointer.

    Raises UserError for a name that is empty, absolute, leads out of `folder`,
    or is a link to somewhere else.
    """
    base = Path(folder)
    path = base / name
    if not name or "\0" in name or Path(name).is_absolute() or not _lies_in(path, base):
        raise UserError(f"{base}: the name {printable(name)!r} leads out of the folder; it is not followed")
    return path


def _lies_in(path: Path, base: Path) -> bool:
    # Not Path.resolve, which raises RuntimeError for links that lead in a circle.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(base))


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable. Raises OSError where the folder cannot be opened."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path in the same folder.

    On leaving without an error, syncs it and renames it to `path`.
    On an error the temporary file is removed and `path` is untouched.
    Raises OSError as the file system does, naming `path`.
    Raises UserError for a device, pipe or folder there: a rename would put a file in its place.
    """
    target = Path(path)
    _check_regular(target, str(path))
    with about(target):
        yield from _written_beside(target)


def check_output(path: Path | str, option: str = "") -> None:
    """Raises UserError where `atomic_path` could not write. To be asked before long work.

    Tries it with a file that is gone at once, and makes no folder.
    option: by which the user named the file.
    """
    name = f"{option} {path}".strip()
    try:
        _check_regular(Path(path), name)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"{name}: cannot be written: {error.strerror}; name another file") from None
    check_room(Path(path), name)


def check_outputs(named: Mapping[str, Path | None]) -> None:
    """As `check_output` of several files, by their options. None: no file is asked for.

    Raises UserError also where one would take the place of another.
    """
    taken: dict[str, str] = {}
    for option, path in named.items():
        if path is None:
            continue
        check_output(path, option)
        other = taken.setdefault(os.path.realpath(path), option)
        if other != option:
            raise UserError(f"{other} and {option} name the same file, {path}: give two")


def check_room(path: Path, name: str) -> None:
    """Raises UserError where nothing new can stand beside `path`. name: as messages have it."""
    place = path.parent
    try:
        place = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.NamedTemporaryFile(dir=place, prefix=f".{path.name}.", suffix=TEMPORARY):
            return
    except OSError as error:
        raise UserError(f"{name}: cannot write to {place}: {error.strerror}; name another place") from None


def _check_regular(target: Path, name: str) -> None:
    if target.exists() and not target.is_file():
        raise UserError(f"{name} is no regular file: name a file to write to")


@contextmanager
def about(path: Path | str) -> Iterator[None]:
    """Within it, an error that names no file, or a temporary one, names `path`.

    A full disk in `write` is one that names no file.
    """
    try:
        yield
    except OSError as error:
        nameless = error.filename is None and error.errno in STORAGE
        if nameless or str(error.filename).endswith(TEMPORARY):
            error.filename = str(path)
        raise


def _written_beside(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=TEMPORARY)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        temporary.replace(target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Writes a whole file durably."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Writes a whole UTF-8 text file durably."""
    atomic_write_bytes(path, text.encode())
