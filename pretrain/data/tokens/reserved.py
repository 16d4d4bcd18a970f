"""Tokens that no text contains, and what trains a tokenizer that has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from model.hf.tokenizer.special import SENTINEL, Role


@dataclass(frozen=True)
class Reserved:
    """Tokens that no text contains, beside those that every tokenizer of a kind has."""

    names: Mapping[Role, str] = field(default_factory=dict)
    sentinels: int = 0
    """Tokens that stand for hidden spans."""

    @property
    def sentinel_names(self) -> list[str]:
        """Of all of them, in order."""
        return [SENTINEL.format(number) for number in range(self.sentinels)]


class Trainer(Protocol):
    """Trains one kind of tokenizer."""

    @property
    def file(self) -> str:
        """The usual name of what it writes."""

    def fixed(self, special: Reserved) -> int:
        """Pieces of the vocabulary that no training chooses."""

    def folder(self, out: Path) -> Path | None:
        """Where its files go, if they are several; None for one file, which is `out` itself.

        Raises UserError for a name that it cannot have.
        """

    def train(self, texts: Sequence[str], vocab_size: int, special: Reserved, size: int) -> dict[str, bytes]:
        """The files by name, the main one first.

        size: bytes of all texts in UTF-8.
        Raises UserError for texts that cannot fill the vocabulary.
        """
