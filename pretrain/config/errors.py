"""What pydantic finds wrong with a configuration, said in one line.

The line has the key, the value, what it must be, and where it was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from model.errors import UserError
from model.sections import Strict
from model.words import printable
from pretrain.config.compose import Composition
from pretrain.config.expected import expected, shown_value, typed_value
from pretrain.config.keys import general, schema, suggest
from pretrain.config.yaml_reader import Plain

LONGEST_KEY, LONGEST_LINE = 80, 600
"""Characters that are shown."""
SUGGESTIONS = 10
"""Unknown keys for which a meant one is looked for."""


class ConfigurationError(UserError):
    """Mistakes in one configuration: the message names the first and counts the rest."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [printable(" ".join(problem.split()), LONGEST_LINE) for problem in problems]
        rest = len(problems) - 1
        super().__init__(
            self.problems[0] + (f" (and {rest} more problem{'s' if rest > 1 else ''})" if rest else "")
        )


def user_error(error: ValidationError, composition: Composition) -> ConfigurationError:
    """The first problem as an exception to raise, with the number of the others.

    Spelling mistakes come first, then wrong values, then all that is missing as one problem.
    """
    groups: dict[str, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        groups.setdefault(_key(item, composition.values), []).append(item)
    strange = [key for key, items in groups.items() if items[0]["type"] == "extra_forbidden"]
    unknown = {key: suggest(key) if place < SUGGESTIONS else None for place, key in enumerate(strange)}
    meant = set(unknown.values())
    absent = {key for key, items in groups.items() if items[0]["type"] == "missing"}
    told = {*unknown, *absent}
    # A misspelt key is the likely cause of the rest, so it comes first.
    # The key it was meant to be is not reported as missing.
    return ConfigurationError(
        [_unknown(key, unknown[key], composition) for key in unknown]
        + [_wrong(key, groups[key], composition) for key in groups if key not in told]
        + _missing([key for key in groups if key in absent - meant], composition)
    )


S = TypeVar("S", bound=Strict)


def checked(
    kind: type[S], values: Mapping[str, object], prefix: str, typed: Mapping[str, str] | None = None
) -> S:
    """A section of values that no configuration file gave.

    typed: options of a command by the keys whose values they gave.
    Raises UserError in one line: with such an option as it was typed, else after `prefix`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "value_error":
            raise UserError(f"{prefix}{first['ctx']['error']}") from error
        said = f"{prefix}{place}={shown_value(first['input'])}"
        if typed is not None and place in typed:
            said = f"{typed[place]} {typed_value(first['input'])}"
        raise UserError(f"{said} must be {expected(first)}") from error


def _key(item: ErrorDetails, values: Plain) -> str:
    """The dotted key an error is about.

    It is the error's location without the marks that pydantic adds for the arms of a union.
    """
    path, node = [], values
    for part in item["loc"]:
        if isinstance(node, dict) and isinstance(part, str) and part in node:  # noqa: SIM114, as types narrow
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            if item["type"] == "missing":
                path.append(str(part))
            break
        path.append(str(part))
    if item["type"] == "extra_forbidden":
        while isinstance(node, dict) and node:
            part, node = next(iter(node.items()))
            path.append(str(part))
    return ".".join(path)


def _place(key: str, composition: Composition) -> str:
    origin = composition.origin(key)
    return f" ({origin})" if origin else ""


def _unknown(key: str, meant: str | None, composition: Composition) -> str:
    name = printable(key, LONGEST_KEY)
    if key.rpartition(".")[2] == "include":
        return f"{name}: `include` belongs at the top level of a file{_place(key, composition)}"
    hint = f"did you mean {meant}?" if meant else "`fathom config FILE` lists all keys"
    return f"{name} is not a known key{_place(key, composition)}; {hint}"


def _missing(keys: list[str], composition: Composition) -> list[str]:
    if not keys:
        return []
    *rest, key = keys
    if rest:
        return [f"{', '.join(rest)} and {key} must be set"]
    field = schema().get(general(key))
    meaning = f": {field.description.rstrip('.')}" if field and field.description else ""
    return [f"{key} must be set{meaning}{_place(key, composition)}"]


def _wrong(key: str, items: list[ErrorDetails], composition: Composition) -> str:
    first = items[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = printable(key, LONGEST_KEY)
    telling = [item for item in items if item["type"] == "finite_number"] or items
    wanted = " or ".join(dict.fromkeys(map(expected, telling)))
    return f"{name}={shown_value(first['input'])} must be {wanted}{_place(key, composition)}"
