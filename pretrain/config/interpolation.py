r"""`${other.key}` and `${oc.env:NAME,default}` in the texts of a configuration.

They are replaced by what they stand for.

A text that is nothing but one `${...}` becomes the value itself, also a number or a list.
Inside a longer text it is written out.
`\${` is the text `${`; two backslashes before `${` are one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping

from model.errors import UserError
from model.words import printable
from pretrain.config.yaml_reader import MOST_VALUES, Plain, dotted, scalar

MARK = re.compile(r"(\\*)\$\{")
INSIDE = re.compile(
    r"(?:oc\.env:(?P<variable>[A-Za-z_]\w*)(?:,(?P<default>[^{}$]*))?|(?P<key>[\w\-.\[\]]+))\}"
)
BRACKETS = re.compile(r"\[(\d+)\]")
MISSING = "???"
"""What a piece writes for a value that somebody else has to give."""
LONGEST_TEXT, LONGEST_CHAIN = 10_000, 10
"""Characters of a text after replacement; interpolations that lead to each other in a row."""


def interpolated(values: dict[str, Plain], origins: Mapping[str, str]) -> dict[str, Plain]:
    """The values with every interpolation replaced.

    origins: where each dotted key was written, for messages. Raises UserError for one that leads
    nowhere, in a circle or to too much, and for a value that is still `???`.
    """
    return _Resolver(values, origins).section(values, "", ())


class _Resolver:
    def __init__(self, values: dict[str, Plain], origins: Mapping[str, str]) -> None:
        self._values, self._origins = values, origins
        self._count = 0

    def section(self, values: dict[str, Plain], key: str, chain: tuple[str, ...]) -> dict[str, Plain]:
        """A section and all inside it. chain: the keys whose interpolations led here."""
        return {name: self._value(inner, dotted(key, name), chain) for name, inner in values.items()}

    def _value(self, value: Plain, key: str, chain: tuple[str, ...]) -> Plain:
        self._count += 1
        if self._count > 2 * MOST_VALUES:
            raise self._error(key, f"its interpolations stand for more than {MOST_VALUES} values")
        if isinstance(value, dict):
            return self.section(value, key, chain)
        if isinstance(value, list):
            return [self._value(inner, dotted(key, str(index)), chain) for index, inner in enumerate(value)]
        return self._text(value, key, chain) if isinstance(value, str) else value

    def _text(self, text: str, key: str, chain: tuple[str, ...]) -> Plain:
        if text == MISSING:
            raise self._error(key, "must be set")
        mark = MARK.search(text)
        if mark is None:
            return text
        parts: list[str] = []
        end = 0
        while mark is not None:
            backslashes = len(mark[1])
            parts.append(text[end : mark.start()] + "\\" * (backslashes // 2))
            if backslashes % 2:
                parts.append("${")
                end = mark.end()
            else:
                inside = INSIDE.match(text, mark.end())
                if inside is None:
                    wrong = printable(text[mark.start() :], 40)
                    raise self._error(
                        key,
                        (
                            f"{wrong!r} is no interpolation: "
                            "write ${other.key} or ${oc.env:NAME}, or \\${ for the text itself"
                        ),
                    )
                value = self._one(inside, key, chain)
                if mark.start() == 0 and inside.end() == len(text):
                    return value
                parts.append(value if isinstance(value, str) else json.dumps(value))
                end = inside.end()
            mark = MARK.search(text, end)
        whole = "".join(parts) + text[end:]
        if len(whole) > LONGEST_TEXT:
            raise self._error(key, f"its interpolations make a text of more than {LONGEST_TEXT} characters")
        return whole

    def _one(self, inside: re.Match[str], key: str, chain: tuple[str, ...]) -> Plain:
        """What one interpolation stands for."""
        if inside["variable"]:
            given = os.environ.get(inside["variable"], inside["default"])
            if given is None:
                raise self._error(key, f"the environment has no variable {printable(inside['variable'], 60)}")
            if any("\ud800" <= character <= "\udfff" for character in given):
                raise self._error(
                    key, f"the variable {printable(inside['variable'], 60)} of the environment is no UTF-8"
                )
            return given if inside["variable"] in os.environ else scalar(given.strip())
        wanted = BRACKETS.sub(r".\1", inside["key"])
        if wanted == key or wanted in chain or key in chain:
            raise self._error(key, f"${{{printable(wanted, 60)}}} leads back to itself")
        if len(chain) == LONGEST_CHAIN:
            raise self._error(key, f"more than {LONGEST_CHAIN} interpolations lead to each other in a row")
        node: Plain = self._values
        for part in wanted.split("."):
            if isinstance(node, dict) and part in node:
                node = node[part]
            elif isinstance(node, list) and part.isdecimal() and len(part) < 10 and int(part) < len(node):
                node = node[int(part)]
            else:
                raise self._error(
                    key, f"there is no key {printable(wanted, 60)} for ${{{printable(wanted, 60)}}}"
                )
        return self._value(node, wanted, (*chain, key))

    def _error(self, key: str, problem: str) -> UserError:
        place = f" ({self._origins[key]})" if key in self._origins else ""
        return UserError(f"{printable(key, 100)}: {problem}{place}")
