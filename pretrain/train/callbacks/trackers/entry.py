"""What is told to a tracker, and what every client of one has to do. No packages needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """A run as a tracker keeps it."""

    name: str
    project: str
    folder: str
    """Where the client may keep files, absolute."""
    id: str | None
    """What the tracker called it when the run began; None for a new one."""
    offline: bool
    """Write files and reach no server."""
    config: Mapping[str, str | int | float | bool | None]
    """The run's configuration, by dotted keys."""

    @property
    def path(self) -> Path:
        """The folder, which exists."""
        path = Path(self.folder)
        path.mkdir(parents=True, exist_ok=True)
        return path


class Client(Protocol):
    """Talks to one tracker by its own library. Any exception means that it cannot go on."""

    package: str
    """What `pip install` calls the library."""
    module: str
    """What Python calls it."""

    def open(self, entry: Entry) -> str:
        """Begins an entry, or continues one. Returns the id that continues it."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers of a step, by their names."""

    def close(self, finished: bool) -> None:
        """Ends the entry. finished: whether the run went as it should."""
