"""What pydantic wants in place of a value, in words that fit behind `must be`."""

from __future__ import annotations

import json
import math

from pydantic_core import ErrorDetails

from model.words import printable

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true/false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section of keys",
    "model": "a section of keys",
}
"""What a value must be, by the first word of the error's type."""
LIMITS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
LONGEST_VALUE = 60
"""Characters of a value that are shown."""


def shown_value(value: object) -> str:
    """A value about as it is written in YAML, cut where it is long."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    return printable(repr(value) if isinstance(value, str) else json.dumps(value, default=str), LONGEST_VALUE)


def typed_value(value: object) -> str:
    """A value as it is typed after an option, cut where it is long."""
    return repr("") if value == "" else printable(value, LONGEST_VALUE)


def _number(limit: float) -> str:
    """A limit; whole ones with all digits."""
    return str(int(limit)) if float(limit).is_integer() and abs(limit) < 1e19 else f"{limit:g}"


def expected(item: ErrorDetails) -> str:
    """What a value must be, by what pydantic found."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return f"one of {context['expected']}" if " or " in context["expected"] else str(context["expected"])
    if kind in LIMITS:
        name, words = LIMITS[kind]
        return f"{words} {_number(context[name])}"
    if kind == "finite_number":
        return "a finite number"
    if kind in ("string_too_short", "string_too_long"):
        name, words = ("min_length", "at least") if kind == "string_too_short" else ("max_length", "at most")
        number = context[name]
        return f"text of {words} {number} character{'s' if number > 1 else ''}"
    if kind == "path":
        return str(item["msg"])
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "too_long":
        return f"a list of at most {context['max_length']}"
    if kind == "string_pattern_mismatch":
        return f"text like {context['pattern']}"
    return EXPECTED.get(kind.split("_")[0], item["msg"])
