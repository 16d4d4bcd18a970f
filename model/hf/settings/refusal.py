"""A model that cannot be read, and why, in one line."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from model.config import ModelConfig
from model.errors import UserError
from model.words import printable

# Spellings of one function; files of GPT-2 have the first.
_SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
}


def refuse(kind: str, problem: str) -> UserError:
    """The error that says so. kind: the model's type."""
    return UserError(f"this {kind} model cannot be imported: {printable(problem, 600)}")


def refuse_first(kind: str, problems: list[tuple[bool, str]]) -> None:
    """Raises it for the first problem that is present."""
    for present, problem in problems:
        if present:
            raise refuse(kind, problem)


def activation(kind: str, name: str, table: Mapping[str, str]) -> str:
    """Our name of an activation. table: ours -> theirs.

    Raises UserError for one that is not in it.
    """
    name = _SAME_ACTIVATION.get(name, name)
    for ours, theirs in table.items():
        if _SAME_ACTIVATION.get(theirs, theirs) == name:
            return ours
    supported = ", ".join(table.values())
    raise refuse(kind, f"its activation is {printable(name, 60)}; supported: {supported}")


def model_config(kind: str, fields: Mapping[str, object]) -> ModelConfig:
    """A configuration. Raises UserError where it is none that we train."""
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = str(first["msg"]).removeprefix("Value error, ")
        raise refuse(kind, f"{key}: {problem}" if key else problem) from None
    except (ArithmeticError, TypeError) as error:
        raise refuse(kind, f"its numbers make no model ({error})") from None
