"""What is wished for, and what was chosen for it, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config.yaml_reader import Plain


@dataclass(frozen=True)
class Wish:
    """The options of `fathom design`."""

    params: float
    layers: int
    gpu: str
    gpus: int
    tokens: float
    scheme: str
    family: str = "gpt"
    vocab_size: int = 32000
    seq_length: int = 2048
    data: Path = Path("data/corpus")
    name: str | None = None


def put(tree: dict[str, Any], key: str, value: object) -> None:
    """Puts a value under a dotted key into nested sections, making those that are missing."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


@dataclass(frozen=True)
class Choice:
    """A section of the configuration, or a part of one."""

    values: dict[str, Plain]
    """By dotted keys, in the order in which they are written."""
    reason: str
    """One line: how it was chosen."""


@dataclass
class Design:
    """All that was chosen, in order."""

    name: str
    choices: list[Choice] = field(default_factory=list)

    def add(self, reason: str, **values: Plain) -> None:
        """Another choice. values: by keys with `__` for the dots."""
        self.choices.append(Choice({key.replace("__", "."): value for key, value in values.items()}, reason))

    @property
    def reasons(self) -> list[str]:
        """A line each."""
        return [choice.reason for choice in self.choices]

    def overrides(self) -> dict[str, Plain]:
        """The whole configuration as nested sections."""
        whole: dict[str, Plain] = {"name": self.name}
        for choice in self.choices:
            for key, value in choice.values.items():
                put(whole, key, value)
        return whole
