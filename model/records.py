"""What is read from files that others wrote: parsed once into a typed record, or refused.

A refusal is one line.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from model.errors import UserError
from model.files import about
from model.words import printable

LARGEST = 1 << 28
"""Bytes of the largest JSON file that is read.

The manifest of a thousand layers has about one percent of it.
"""


class Record(BaseModel):
    """Base of what is read from a file.

    Frozen, typed without conversion from text, finite, and tolerant of keys it does not know.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


R = TypeVar("R", bound=Record)


def read_json(path: Path | str, advice: str) -> object:
    """The content of a JSON file.

    advice: what the user can do where it is damaged, a phrase.
    Raises UserError for a file that is no regular file, too large, no UTF-8 or no JSON.
    Raises FileNotFoundError where there is none.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise UserError(f"{path} is no regular file: {advice}")
    if size > LARGEST:
        raise UserError(f"{path} has {size} bytes, which is no plausible size for it: {advice}")
    try:
        with about(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({printable(error)}): {advice}") from None


def read_record(path: Path | str, kind: type[R], advice: str) -> R:
    """A JSON file as a record of `kind`.

    Raises what `read_json` raises, and UserError naming the key that does not fit.
    """
    return as_record(read_json(path, advice), kind, str(path), advice)


def as_record(content: object, kind: type[R], source: str, advice: str) -> R:
    """Parsed JSON as a record of `kind`.

    source: where it came from, for the message.
    Raises UserError naming the first key that does not fit.
    """
    try:
        # By way of JSON, where a list is what stands for a tuple.
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(printable(part) for part in first["loc"]) or "the whole"
        raise UserError(f"{source} is damaged ({key}: {printable(first['msg'])}): {advice}") from None


def finite(value: float) -> float | None:
    """A number for JSON, which has none that is not finite: those are null."""
    return value if math.isfinite(value) else None


def without_nan(content: dict[str, Any]) -> dict[str, Any]:
    """An object for JSON, with every number inside it as `finite` has it."""
    return {key: _finite(value) for key, value in content.items()}


def _finite(value: object) -> object:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return without_nan(value)
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
