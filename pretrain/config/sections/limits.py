"""Limits of numbers, names and paths that a user may give."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

STEPS, SAMPLES, MINUTES = 10**9, 1 << 24, 10**6
"""Most steps of a run, samples of a step, minutes of any time."""
NAME, COMPONENT, PATH = 128, 255, 4000
"""Characters of the longest name of a run.

Bytes of a name inside a path and of a path, as file systems have them.
"""


def _usable(path: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in path):
        raise PydanticCustomError("path", "a path without control characters")
    if len(path.encode()) > PATH or any(len(part.encode()) > COMPONENT for part in path.split("/")):
        raise PydanticCustomError(
            "path", f"a path of at most {PATH} bytes, and {COMPONENT} for each name in it"
        )
    return path


FilePath = Annotated[str, Field(min_length=1), AfterValidator(_usable)]
"""A path that any file system takes; whether it is there is another question."""
