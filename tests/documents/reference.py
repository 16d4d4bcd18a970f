"""Writes the reference pages: every key of a configuration, and every command.

python -m tests.documents.reference

They are made from the schema and from the commands. A test fails while they are older.
"""

from __future__ import annotations

import enum
import itertools
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from model.files import atomic_write_text
from pretrain.config.keys import SchemaField, schema
from pretrain.config.schema import RunConfig
from tools import cli

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"
MADE = "<!-- Made by `python -m tests.documents.reference`: change the code, not this page. -->\n"
COMPARED = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
NAMES = {"integer": "whole number", "number": "number", "string": "text", "null": "null"}
NAMES |= {"boolean": "true or false", "object": "section"}
TYPES = {int: "whole number", float: "number", str: "text", Path: "path", bool: "true or false"}


def cell(text: str) -> str:
    """Text as the cell of a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Text as code in a cell of a table."""
    return f"`{' '.join(text.split())}`".replace("|", "\\|")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- the configuration


class Takes:
    """What a key may hold, from the schema in JSON."""

    def __init__(self) -> None:
        self.whole = RunConfig.model_json_schema(mode="validation")

    def of(self, key: str) -> str:
        """In words."""
        place: dict[str, Any] = self.whole
        for part in key.split("."):
            place = self._inside(place, part)
        return self._words(place)

    def _meant(self, place: dict[str, Any]) -> dict[str, Any]:
        """A part of the schema, behind its reference."""
        while "$ref" in place:
            place = self.whole["$defs"][place["$ref"].rpartition("/")[2]]
        return place

    def _forms(self, place: dict[str, Any]) -> list[dict[str, Any]]:
        place = self._meant(place)
        forms = place.get("anyOf") or place.get("oneOf") or place.get("allOf")
        return [inner for form in forms for inner in self._forms(form)] if forms else [place]

    def _inside(self, place: dict[str, Any], part: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = [
            form["items"] if part == "*" else form["properties"][part]
            for form in self._forms(place)
            if (part == "*" and "items" in form) or part in form.get("properties", {})
        ]
        return found[0]

    def _words(self, place: dict[str, Any]) -> str:
        return " or ".join(dict.fromkeys(self._form(form) for form in self._forms(place)))

    def _form(self, form: dict[str, Any]) -> str:
        if "enum" in form or "const" in form:
            return ", ".join(f"`{value}`" for value in form.get("enum", [form.get("const")]))
        if "prefixItems" in form:
            return f"list of {len(form['prefixItems'])}: {self._words(form['prefixItems'][0])}"
        if form.get("type") == "array":
            return f"list: {self._words(form.get('items', {}))}"
        limits = [f"{word} {_number(form[limit])}" for limit, word in COMPARED.items() if limit in form]
        return ", ".join([NAMES.get(form.get("type", ""), "any value"), *limits])


def _number(value: float) -> str:
    """A limit, short: 1e-30, 67108864 as 2^26."""
    whole = int(value)
    if whole == value and whole > 1 << 15:
        for offset, sign in ((0, ""), (1, " - 1")):
            if (whole + offset).bit_count() == 1:
                return f"2^{(whole + offset).bit_length() - 1}{sign}"
    return f"{value:g}" if abs(value) < 1e6 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def default_of(field: SchemaField) -> str:
    """Its default in a cell."""
    if field.required:
        return "**required**"
    if field.kind in ("section", "list"):
        return "null" if field.default is None else ""
    return code(json.dumps(field.default, default=list))


def configuration() -> str:
    """The page of keys."""
    takes = Takes()
    text = f"""# Configuration reference
{MADE}
A run is one YAML file. A key is given in the file, or after it on the command line with dots:
`fathom pretrain FILE train.steps=1000`. `include:` merges other files before this one, and
`+include=FILE` merges one after it. An unknown key is refused, with the key that was meant.
`fathom config FILE` prints every key of a run with its value and where the value comes from.

A star in a key stands for the number of an entry: `data.corpora.0.path`.

"""
    fields = schema().values()
    for section, members in itertools.groupby(fields, key=lambda field: field.key.partition(".")[0]):
        rows = list(members)
        if rows[0].kind == "value":
            text += table(("key", "takes", "default", "meaning"), [_row(row, takes) for row in rows])
            continue
        text += f"\n## {section}\n\n{rows[0].description}".rstrip() + "\n\n"
        text += table(("key", "takes", "default", "meaning"), [_row(row, takes) for row in rows[1:]])
    return re.sub(r"(\|\n)\| key [^\n]*\n\| ---[^\n]*\n(?=\| `)", r"\1", text)


def _row(field: SchemaField, takes: Takes) -> tuple[str, ...]:
    return f"`{field.key}`", cell(takes.of(field.key)), default_of(field), cell(field.description)


# ---- the commands


def commands() -> str:
    """The page of commands."""
    text = f"""# Command reference
{MADE}
Every command also explains itself: `fathom COMMAND --help`. A mistake is one line that begins with
`fathom: error:`, and exit code 2.
"""
    for panel, rows in itertools.groupby(cli.COMMANDS, key=lambda row: row.panel):
        text += f"\n## {panel}\n"
        for row in rows:
            text += "".join(_command(f"fathom {row.name}", cli.load_command(row), row.help))
    return text


def _command(name: str, command: Any, help_line: str) -> Iterator[str]:
    yield f"\n### {name}\n\n"
    yield _paragraphs(command.help or help_line)
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from _command(f"{name} {word}", inner, "")
        return
    words = [_argument(one) for one in command.params if one.param_type_name == "argument"]
    yield f"\n```\n{' '.join([name, *words, '[OPTIONS]'])}\n```\n"
    rows = [_parameter(one) for one in command.params if "--help" not in one.opts]
    if rows:
        yield "\n" + table(("", "takes", "default", "meaning"), rows)


def _paragraphs(text: str) -> str:
    """A command's help: lines that stand alone there are joined."""
    parts = re.split(r"\n\s*\n", text.replace("\f", "").strip())
    return "\n\n".join(" ".join(part.split()).replace("<", "&lt;") for part in parts) + "\n"


def _argument(one: Any) -> str:
    name = one.metavar or one.name.upper()
    bare: str = name.strip("[]") if name.startswith("[") and name.endswith("]") else name
    bare += "..." if one.nargs == -1 and "..." not in bare else ""
    return bare if one.required else f"[{bare}]"


def _parameter(one: Any) -> tuple[str, ...]:
    flag = getattr(one, "is_flag", False)
    if one.param_type_name == "argument":
        name = code(_argument(one))
    else:
        name = ", ".join(code(word) for word in (*one.opts, *one.secondary_opts))
    default = "" if one.default is None or flag else code(_plain(one.default))
    default = "**required**" if one.required else default
    return name, "" if flag else _kind(one), default, cell(one.help or "")


def _kind(one: Any) -> str:
    """What it takes, in words."""
    kind = one.type_descriptor.annotation
    inner = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) in (list, Union, types.UnionType) and inner:
        kind = inner[0]
    if get_origin(kind) is Literal:
        return ", ".join(map(code, get_args(kind)))
    if issubclass(kind, enum.Enum):
        return ", ".join(code(member.value) for member in kind)
    words = [TYPES.get(kind, kind.__name__)]
    words += [
        f"{word} {limit:g}"
        for word, limit in (("at least", one.min), ("at most", one.max))
        if limit is not None
    ]
    return ", ".join(words)


def _plain(value: object) -> str:
    value = getattr(value, "value", value)
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


PAGES = {"configuration.md": configuration, "commands.md": commands}


def main() -> None:
    """Write both pages."""
    for name, page in PAGES.items():
        atomic_write_text(FOLDER / name, page())
        print(FOLDER / name, file=sys.stderr)


if __name__ == "__main__":
    main()
