"""YAML 1.2 as plain values, each with its line.

Limits keep a damaged or hostile file harmless.

The parser's events are read one by one, so nothing recurses.
What YAML 1.1 surprises with (`010` as 8, `1:30` as 90, `yes` as true, tags that make objects) is
read as YAML 1.2's core schema does, or refused.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import yaml

from model.errors import UserError
from model.files import about
from model.words import printable

LARGEST = 1 << 20
"""Bytes of the largest file."""
DEEPEST = 32
"""Levels of sections and lists."""
MOST_VALUES = 50_000
"""Values, sections and lists of one text, those repeated by aliases included."""
LONGEST_KEY, LONGEST_NUMBER = 200, 100
"""Characters."""

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""A value that YAML holds."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NULL = ("", "~", "null", "Null", "NULL")
BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class YamlError(UserError):
    """A text that is not YAML, or beyond what is read. The message begins with line and column."""


@dataclass
class Document:
    """What a text holds."""

    value: Plain
    lines: dict[str, int] = field(default_factory=dict)
    """Line of every dotted key, items of lists by number."""


def read_text(path: Path, name: str) -> str:
    """A whole UTF-8 file. name: the path as the user knows it.

    Raises UserError for what is no regular file, too large, or no UTF-8.
    Raises OSError as the file system does.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{name} is no regular file: write the text into one and name that")
    with about(path), path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise UserError(
            f"{name} is larger than {LARGEST} bytes, the most that is read: is it a configuration?"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} cannot be read: byte {error.start} is no UTF-8; save the file as UTF-8"
        ) from None


def parse(text: str, is_text: Callable[[str], bool] = lambda key: False, prefix: str = "") -> Document:
    """Reads one YAML document. Raises YamlError.

    is_text: whether a dotted key takes text, so that an unquoted `007` stays what was written.
    prefix: dotted key of the document itself, for `is_text`.
    """
    builder = _Builder(is_text, prefix)
    try:
        for event in yaml.parse(text, Loader=LOADER):
            builder.take(event)
    except yaml.YAMLError as error:
        raise YamlError(_problem(error)) from None
    except UnicodeEncodeError:
        raise YamlError("it holds characters that are no valid Unicode") from None
    return Document(builder.document, builder.lines)


def scalar(text: str) -> bool | int | float | str | None:
    """An unquoted word as null, true/false, a number or text.

    Raises ValueError for a number of too many digits.
    """
    if text in NULL:
        return None
    if text in BOOLEAN:
        return BOOLEAN[text]
    if SPECIAL.fullmatch(text):
        return float(text.lower().replace(".", ""))
    integer = INTEGER.fullmatch(text)
    if not integer and not FLOAT.fullmatch(text):
        return text
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} characters; {LONGEST_NUMBER} are the most")
    if not integer:
        return float(text)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def dump(value: Plain) -> str:
    """Plain values as YAML that `parse` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that is something else when read."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if _reads_as_text(text) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _reads_as_text(text: str) -> bool:
    try:
        return isinstance(scalar(text), str)
    except ValueError:
        return False


_Dumper.add_representer(str, _text)


@dataclass
class _Open:
    """A section or list that is being read."""

    value: list[Plain] | dict[str, Plain]
    key: str
    line: int
    anchor: str | None
    last: str | None = None
    """The key of a section whose value comes next."""


class _Builder:
    """Takes events and makes `document` of them."""

    def __init__(self, is_text: Callable[[str], bool], prefix: str) -> None:
        self.document: Plain = None
        self.lines: dict[str, int] = {}
        self._is_text, self._prefix = is_text, prefix
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Plain, int]] = {}
        self._values = self._documents = 0

    def take(self, event: yaml.Event) -> None:
        """One event of the parser. Raises YamlError for what is not read."""
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise _error(event, "a second document begins; one is read")
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            done = self._open.pop()
            if done.anchor:
                self._anchors[done.anchor] = (done.value, _size(done.value))
        elif isinstance(event, yaml.NodeEvent):
            self._node(event)

    def _node(self, event: yaml.NodeEvent) -> None:
        if getattr(event, "tag", None) is not None:
            raise _error(
                event, f"the tag {printable(event.tag, 60)} is not read: quote a value to make it text"
            )
        above = self._open[-1] if self._open else None
        if above is not None and isinstance(above.value, dict) and above.last is None:
            self._key(above, event)
            return
        self._count(event, 1)
        key = self._place(above, event)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, key)
            if event.anchor:
                self._anchors[event.anchor] = (value, 1)
        elif isinstance(event, yaml.AliasEvent):
            value, size = self._anchors.get(event.anchor, (None, 0))
            if not size:
                raise _error(event, f"the alias *{printable(event.anchor, 60)} stands for nothing complete")
            self._count(event, size)
            value = _copied(value)
        else:
            value = [] if isinstance(event, yaml.SequenceStartEvent) else {}
        self._put(above, value)
        begins = isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent))
        if begins and isinstance(value, (list, dict)):
            if len(self._open) == DEEPEST:
                raise _error(event, f"more than {DEEPEST} levels of sections and lists")
            self._open.append(_Open(value, key, event.start_mark.line + 1, event.anchor))

    def _key(self, section: _Open, event: yaml.NodeEvent) -> None:
        """The next event is a key: its text as it is written, also where it looks like a number."""
        if not isinstance(event, yaml.ScalarEvent):
            raise _error(event, "a key must be a word, not a section, a list or an alias")
        if len(event.value) > LONGEST_KEY:
            raise _error(event, f"a key of {len(event.value)} characters; {LONGEST_KEY} are the most")
        if event.value == "<<" and event.implicit[0]:
            raise _error(event, "merge keys (<<) are not read: use include, or write the keys out")
        if "." in event.value:
            raise _error(
                event,
                f"the key {printable(event.value, 60)} holds a dot: write a section for each part of it",
            )
        if event.value in section.value:
            raise _error(event, f"found duplicate key {printable(event.value, 60)}")
        section.last = event.value
        # The line of a key, not of its value, which may begin below it.
        self.lines[dotted(section.key, event.value)] = event.start_mark.line + 1

    def _place(self, above: _Open | None, event: yaml.NodeEvent) -> str:
        if above is None:
            return self._prefix
        if above.last is not None:
            return dotted(above.key, above.last)
        key = dotted(above.key, str(len(above.value)))
        self.lines[key] = event.start_mark.line + 1
        return key

    def _put(self, above: _Open | None, value: Plain) -> None:
        if above is None:
            self.document = value
        elif isinstance(above.value, list):
            above.value.append(value)
        else:
            assert above.last is not None
            above.value[above.last], above.last = value, None

    def _scalar(self, event: yaml.ScalarEvent, key: str) -> Plain:
        if not event.implicit[0]:
            return str(event.value)
        try:
            value = scalar(event.value)
        except ValueError as error:
            raise _error(event, str(error)) from None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return str(event.value) if number and self._is_text(key) else value

    def _count(self, event: yaml.NodeEvent, values: int) -> None:
        self._values += values
        if self._values > MOST_VALUES:
            raise _error(event, f"more than {MOST_VALUES} values")


def _size(value: Plain) -> int:
    """Values inside a value, itself included.

    What aliases repeat was counted when it was put in, so this stays small.
    """
    if not isinstance(value, (dict, list)):
        return 1
    return 1 + sum(map(_size, value.values() if isinstance(value, dict) else value))


def _copied(value: Plain) -> Plain:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def dotted(key: str, last: str) -> str:
    """A key below another one, or by itself where that is ''."""
    return f"{key}.{last}" if key else last


def _error(event: yaml.Event, problem: str) -> YamlError:
    mark = event.start_mark
    return YamlError(f"line {mark.line + 1}, column {mark.column + 1}: {problem}")


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = printable(str(getattr(error, "problem", None) or error).partition("\n")[0])
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark is not None else problem
