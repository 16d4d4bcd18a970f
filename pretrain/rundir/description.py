"""What a run's folder says the run is: config.yaml and environment.json, read as far as they can
be.

They may be of another version, damaged, or somebody else's: whoever shows a run shows what is
known, and leaves out the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import UserError
from pretrain.config.yaml_reader import parse, read_text


@dataclass(frozen=True)
class Facts:
    """Values by dotted key, each asked for as what it has to be.

    None where it is missing or something else.
    """

    tree: Mapping[str, object] = field(default_factory=dict)
    text: str = ""
    """As it stands in the file."""

    def get(self, key: str) -> object:
        """Whatever there is."""
        value: object = self.tree
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def word(self, key: str) -> str | None:
        """A text."""
        value = self.get(key)
        return value if isinstance(value, str) else None

    def count(self, key: str) -> int | None:
        """A whole number above 0."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        return value if 0 < value < 2**53 else None

    def number(self, key: str) -> float | None:
        """A finite number."""
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        return float(value) if abs(value) < 1e300 else None

    def rows(self, key: str) -> list[Facts]:
        """A list of sections."""
        value = self.get(key)
        return [Facts(row) for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []

    def words(self, key: str) -> list[str]:
        """A list of texts."""
        value = self.get(key)
        return [str(word) for word in value] if isinstance(value, list) else []


def read_config(run_dir: Path) -> Facts:
    """The run's configuration, empty where there is none that can be read."""
    return _read(run_dir / "config.yaml", lambda text: parse(text).value)


def read_environment(run_dir: Path) -> Facts:
    """Where and with what the run was done, empty where there is nothing that can be read."""
    return _read(run_dir / "environment.json", json.loads)


def _read(path: Path, parsed: Callable[[str], object]) -> Facts:
    try:
        text = read_text(path, str(path))
    except (OSError, UserError):
        return Facts()
    try:
        tree = parsed(text)
    except (ValueError, RecursionError):
        return Facts({}, text)
    return Facts(tree if isinstance(tree, dict) else {}, text)
