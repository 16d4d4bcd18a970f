"""What is used of files of safetensors, whose library has no types."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from torch import Tensor


class TensorSlice(Protocol):
    """A tensor that is not read."""

    def get_shape(self) -> Sequence[int]:
        """Its shape."""

    def get_dtype(self) -> str:
        """Its element type as safetensors calls it."""


class TensorFile(Protocol):
    """A file of named tensors."""

    def keys(self) -> Sequence[str]:
        """Names of all tensors."""

    def get_tensor(self, name: str) -> Tensor:
        """A tensor, mapped. Raises SafetensorError where the file has none of this name."""

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor's facts, from the file's header."""


def open_tensors(path: Path) -> TensorFile:
    """Maps a file. Raises SafetensorError for one that is damaged, and OSError."""
    file: TensorFile = safe_open(path, framework="pt")
    return file
