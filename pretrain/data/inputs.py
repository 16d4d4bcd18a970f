"""Where documents come from: local files of several formats, and data sets that the `datasets` library knows by name.

This module says which files and data sets an INPUT stands for; pretrain/data/documents.py reads them. Nothing here imports torch or Megatron.
"""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.errors import UserError

Kind = Literal["text", "json", "csv", "parquet", "hub"]
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
KINDS: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:]*){0,2}")


@dataclass(frozen=True)
class Shard:
    """A part of the input that is read in one go: a local file, or a data set of the `datasets` library.

    name: path or hub name. group: its identity for splitting by file, free of the folder it lies in today. size: bytes on disk, 0 if unknown.
    """

    name: str
    kind: Kind
    group: str
    size: int = 0

    @property
    def compressed(self) -> bool:
        """Whether the bytes on disk say little about the amount of text."""
        return self.kind == "parquet" or Path(self.name).suffix in COMPRESSIONS


@dataclass(frozen=True)
class Source:
    """One INPUT of the command line, and what it stands for."""

    input: str
    shards: tuple[Shard, ...]


def standard_library_files() -> list[Path]:
    """Returns the .py files of the running Python's standard library, sorted: about 30 MB of text that every machine has.

    Packages installed beside it are left out, and so are files that are not UTF-8, which the library's own tests keep on purpose.
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
    """Resolves the INPUTs: files, folders, globs, or data set names (`hf://name`, `name`, `name:config:split`).

    A folder stands for every file below it, except hidden ones and Python's caches.
    The order is that of the arguments, sorted within a folder or glob; a file named twice is read once.
    Raises UserError when an input matches nothing, cannot be read here, or none is given.
    """
    if not inputs:
        raise UserError("INPUT: nothing to read; name files, a glob, or a data set")
    seen: set[str] = set()
    sources = []
    for given in inputs:
        shards = []
        for shard in _shards(given):
            identity = str(Path(shard.name).resolve()) if shard.kind != "hub" else shard.name
            if identity not in seen:
                seen.add(identity)
                shards.append(shard)
        sources.append(Source(given, tuple(shards)))
    return sources


def _shards(given: str) -> list[Shard]:
    path = Path(given)
    if given.startswith("hf://"):
        return [Shard(given.removeprefix("hf://"), "hub", given)]
    if path.is_file():
        return [
            _file_shard(path, path.absolute().parent.parent)
        ]  # many folders hold an __init__.py or a README
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(map(_hidden, file.relative_to(path).parts))
        ]
        if not files:
            raise UserError(f"INPUT {given}: the folder holds no files")
        return [_file_shard(file, path) for file in files]
    if glob.has_magic(given):
        files = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if Path(name).is_file()]
        if not files:
            raise UserError(f"INPUT {given}: no file matches this pattern")
        fixed = given[: re.search(r"[*?[]", given).start()].rpartition("/")[0]  # type: ignore[union-attr]
        return [_file_shard(file, Path(fixed or ("/" if given.startswith("/") else "."))) for file in files]
    looks_like_file = given.startswith((".", "/", "~")) or {
        path.suffix,
        path.with_suffix("").suffix,
    }.intersection({*KINDS, *COMPRESSIONS, ".txt", ".md", ".py"})
    if looks_like_file or not _HUB_NAME.fullmatch(given):
        raise UserError(f"INPUT {given}: no such file or folder")
    return [Shard(given, "hub", f"hf://{given}")]


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _file_shard(path: Path, base: Path) -> Shard:
    compression = COMPRESSIONS.get(path.suffix)
    if compression:
        import fsspec.compression  # type: ignore[import-untyped]

        if compression not in fsspec.compression.compr:
            raise UserError(
                f"INPUT {path}: reading {path.suffix} files needs a package that is not installed: pip install zstandard"
            )
    kind = KINDS.get((path.with_suffix("") if compression else path).suffix, "text")
    return Shard(str(path), kind, os.path.relpath(path, base), path.stat().st_size)
