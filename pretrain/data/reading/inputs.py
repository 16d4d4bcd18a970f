"""Where documents come from: local files, and data sets that the `datasets` library knows by name.

This module says which files and data sets an INPUT stands for; documents.py reads them.
Nothing here imports torch or Megatron.
"""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from pretrain.data.reading.compressed import DECODERS, compression
from pretrain.data.reading.file_kinds import FILE_KINDS, Kind, descriptions, kind_of, not_text

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:]*){0,2}")


@dataclass(frozen=True)
class InputFile:
    """A part of the input read in one go: a file, or a data set of the `datasets` library."""

    name: str
    """Path, or hub name."""
    kind: Kind
    group: str
    """Its identity for splitting by file, free of the folder it lies in today."""
    size: int = 0
    """Bytes on disk; 0 if unknown."""
    problem: str = ""
    """Why it is not read, where that is known beforehand."""

    @property
    def compressed(self) -> bool:
        """Whether the bytes on disk say little about the amount of text."""
        return self.kind == "parquet" or compression(self.name) is not None


@dataclass(frozen=True)
class Source:
    """One INPUT of the command line, and what it stands for."""

    input: str
    shards: tuple[InputFile, ...]
    left_out: tuple[str, ...] = ()
    """Files of a folder that only describe the data beside them, and are not read."""


def standard_library_files() -> list[Path]:
    """Returns the .py files of the running Python's standard library, sorted.

    That is about 30 MB of text that every machine has.
    Packages installed beside it are left out, and so are files that are not UTF-8, which the
    library's own tests keep on purpose.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "__pycache__"}.intersection(path.relative_to(root).parts):
            continue
        try:
            path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        found.append(path)
    return found


def find_sources(inputs: list[str]) -> list[Source]:
    """Resolves the INPUTs: files, folders, globs, or names of data sets.

    A name is `hf://name`, `name`, or `name:config:split`.
    A folder stands for every file below it, links followed, except hidden ones, Python's caches
    and files that only describe the data beside them.
    The order is that of the arguments, sorted within a folder or glob.
    A file named twice is read once.
    Raises UserError when an input matches nothing, is no text, or none is given.
    """
    if not inputs:
        raise UserError("INPUT: nothing to read; name files, a glob, or a data set")
    seen: set[str] = set()
    sources = []
    for given in inputs:
        shards = []
        found, left_out = _shards(given)
        for shard in found:
            identity = str(Path(shard.name).resolve()) if shard.kind != "hub" else shard.name
            if identity not in seen:
                seen.add(identity)
                shards.append(shard)
        sources.append(Source(given, tuple(shards), left_out))
    return sources


def _shards(given: str) -> tuple[list[InputFile], tuple[str, ...]]:
    """What an INPUT stands for, and the files left out of it."""
    path = Path(given)
    if given.startswith("hf://"):
        return [InputFile(given.removeprefix("hf://"), "hub", given)], ()
    if _is_file(path):
        # Many folders hold an __init__.py or a README: the folder's name belongs to the identity.
        shard = _file_shard(path, path.absolute().parent.parent)
        if shard.problem:
            raise UserError(f"INPUT {given}: {shard.problem}")
        return [shard], ()
    if path.is_dir():
        return _folder(given)
    if glob.has_magic(given):
        return _matches(given), ()
    suffixes = {path.suffix.lower(), path.with_suffix("").suffix.lower()} if path.name else {""}
    looks_like_file = given.startswith((".", "/", "~")) or suffixes & {
        *FILE_KINDS,
        *DECODERS,
        ".txt",
        ".md",
        ".py",
    }
    if looks_like_file or not _HUB_NAME.fullmatch(given):
        raise UserError(f"INPUT {given}: no such file or folder")
    return [InputFile(given, "hub", f"hf://{given}")], ()


def _is_file(path: Path) -> bool:
    """Whether there is something that is no folder. Raises UserError for an impossible name."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(f"INPUT {str(path)[:200]}: {getattr(error, 'strerror', error)}") from None


def _folder(given: str) -> tuple[list[InputFile], tuple[str, ...]]:
    folder = Path(given)
    files = _files_below(folder)
    if not files:
        raise UserError(f"INPUT {given}: the folder holds no files")
    left_out = descriptions(files)
    kept = [_file_shard(file, folder) for file in files if file not in left_out]
    return kept, tuple(str(file) for file in files if file in left_out)


def _matches(given: str) -> list[InputFile]:
    files = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if not Path(name).is_dir()]
    if not files:
        hint = "; a [ that stands for itself is written [[]" if "[" in given else ""
        raise UserError(f"INPUT {given}: no file matches this pattern{hint}")
    magic = re.search(r"[*?[]", given)
    fixed = given[: magic.start()].rpartition("/")[0] if magic else ""
    base = Path(fixed or ("/" if given.startswith("/") else "."))
    return [_file_shard(file, base) for file in files]


def _files_below(folder: Path) -> list[Path]:
    """All files of a folder, sorted. A folder that is reached twice, through links, is read once.

    Links are followed after everything else, so that a file goes by its real name where it has one.
    """
    seen: set[tuple[int, int]] = set()
    found: list[Path] = []
    waiting = [folder]
    while waiting:
        for parent, folders, names in os.walk(waiting.pop(0), onerror=_unreadable):
            status = os.stat(parent)
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            folders[:] = sorted(name for name in folders if not _hidden(name))
            waiting += [path for path in (Path(parent, name) for name in folders) if path.is_symlink()]
            found += [Path(parent, name) for name in names if not _hidden(name)]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise UserError(f"INPUT {error.filename}: {error.strerror}; leave it out, or make it readable") from error


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _file_shard(path: Path, base: Path) -> InputFile:
    problem, size = not_text(path), 0
    if path.is_file():
        size = path.stat().st_size
    elif path.is_symlink() and not path.exists():
        problem = "a link to something that is not there"
    else:
        problem = "no regular file"
    return InputFile(str(path), kind_of(path), os.path.relpath(path, base), size, problem)
