"""One document as it is found, before it is text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pretrain.data.reading.inputs import InputFile


class Broken(NamedTuple):
    """A record that gave no document, and why."""

    file: str
    line: int
    """1-based, or the row of a table; 0: the whole file."""
    reason: str

    @property
    def place(self) -> str:
        """The whole complaint in one line."""
        return f"{self.file}:{self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


class Record(NamedTuple):
    """One document as found."""

    file: str
    group: str
    line: int
    raw: object
    """A path whose content is the document, a JSON line, a value of a table's text column, or what
    is broken about it."""


def broken(shard: InputFile, line: int, reason: str) -> Record:
    """A record of a file that gives no document, and why. line: as in Broken."""
    return Record(shard.name, shard.group, line, Broken(shard.name, line, reason))


def value_of(entry: Mapping[str, object], text_key: str) -> object:
    """The entry of a key, or of a path of keys with dots between them. Raises ValueError."""
    if text_key in entry:
        return entry[text_key]
    found: object = entry
    for part in text_key.split("."):
        if not isinstance(found, dict) or part not in found:
            shown = ", ".join(map(repr, list(entry)[:8])) or "none"
            raise ValueError(f"no key {text_key!r}; the keys are {shown}")
        found = found[part]
    return found
