"""Messages and their translations in gettext catalogues, `.po` and `.mo`."""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pretrain.data.reading.compressed import open_binary
from pretrain.data.reading.file_kinds import inner_suffix

SUFFIXES = (".po", ".mo")
CONTEXT = b"\x04"
"""Stands between the context of a message in a `.mo` file and the message."""
_MAGICS = {0x950412DE: "<", 0xDE120495: ">"}
_CHARSET = re.compile(rb"charset=([\w.:-]+)")
_FIELD = re.compile(r"(msgctxt|msgid_plural|msgid|msgstr)(?:\[(\d+)\])?\s*(\".*\")\s*\Z")


class Message(NamedTuple):
    """One message and its translation."""

    line: int
    """1-based line of a `.po` file, or number of the entry in a `.mo` file."""
    source: str
    target: str


def is_catalogue(name: str) -> bool:
    """Whether a file of this name holds messages and translations."""
    return inner_suffix(name) in SUFFIXES


def catalogue_messages(name: str) -> Iterator[Message]:
    """The translated messages of a file, in its order.

    Fuzzy and obsolete entries are left out, and so are the header and what is not translated.
    Of a message with plural forms the singular and the last form are given.
    Raises ValueError or OSError for a file that is none.
    """
    with open_binary(name) as file:
        data = file.read()
    yield from _mo_messages(data) if inner_suffix(name) == ".mo" else _po_messages(data)


def _forms(line: int, ids: list[str], texts: list[str]) -> Iterator[Message]:
    """ids: the message, and its plural where it has one. texts: its forms in the other language."""
    pairs = [(ids[0], texts[0])] if len(ids) == 1 or len(texts) > 1 else []
    if len(ids) > 1:
        pairs.append((ids[1], texts[-1]))
    for source, target in pairs:
        if source and target:
            yield Message(line, source, target)


def _mo_messages(data: bytes) -> Iterator[Message]:
    order = _MAGICS.get(int.from_bytes(data[:4], "little"))
    if order is None:
        raise ValueError("no gettext catalogue: it does not begin as a .mo file does")
    charset = "utf-8"
    try:
        count, ids_at, texts_at = struct.unpack_from(f"{order}3I", data, 8)
        for number in range(count):
            key, value = (_mo_string(data, order, table + 8 * number) for table in (ids_at, texts_at))
            if not key:
                charset = _charset(value)
                continue
            ids = [part.decode(charset) for part in key.rpartition(CONTEXT)[2].split(b"\0")]
            texts = [part.decode(charset) for part in value.split(b"\0")]
            yield from _forms(number + 1, ids, texts)
    except struct.error as error:
        raise ValueError(f"a damaged .mo file: {error}") from error


def _mo_string(data: bytes, order: str, at: int) -> bytes:
    length, offset = struct.unpack_from(f"{order}2I", data, at)
    if offset + length > len(data):
        raise ValueError("a damaged .mo file: a text lies beyond its end")
    return data[offset : offset + length]


def _charset(header: bytes) -> str:
    """Of a catalogue by its header. Raises ValueError for one that Python does not know."""
    found = _CHARSET.search(header)
    name = found[1].decode() if found else "utf-8"
    if name == "CHARSET":  # of a template that nobody has filled in
        return "utf-8"
    try:
        "".encode(name)
    except LookupError:
        raise ValueError(f"a catalogue with the unknown character set {name!r}") from None
    return name


@dataclass
class _Entry:
    """One entry of a `.po` file while it is read."""

    line: int = 0
    fuzzy: bool = False
    ids: dict[str, str] = field(default_factory=dict)
    """By keyword."""
    texts: dict[int, str] = field(default_factory=dict)
    """Translations by number of the form."""

    def messages(self) -> Iterator[Message]:
        """What the entry gives."""
        if self.fuzzy or not self.ids.get("msgid") or not self.texts:
            return
        ids = [self.ids[key] for key in ("msgid", "msgid_plural") if key in self.ids]
        yield from _forms(self.line, ids, [self.texts[form] for form in sorted(self.texts)])


def _po_messages(data: bytes) -> Iterator[Message]:
    text = data.decode(_charset(data)).removeprefix("\ufeff")
    entry, key, form = _Entry(), "", 0
    for number, given in enumerate(text.split("\n"), start=1):
        line = given.strip()
        if line.startswith("#"):
            if entry.texts:  # comments belong to the entry that follows them
                yield from entry.messages()
                entry = _Entry()
            entry.fuzzy |= line.startswith("#,") and "fuzzy" in line
            continue
        if not line:
            continue
        if found := _FIELD.match(line):
            key, form, quoted = found[1], int(found[2] or 0), found[3]
            if entry.texts and key in ("msgid", "msgctxt"):
                yield from entry.messages()
                entry = _Entry()
            entry.line = entry.line or number
        elif key and line.startswith('"'):
            quoted = line
        else:
            raise ValueError(f"no gettext catalogue: line {number} is {line[:60]!r}")
        said = _unquoted(quoted, number)
        if key == "msgstr":
            entry.texts[form] = entry.texts.get(form, "") + said
        else:
            entry.ids[key] = entry.ids.get(key, "") + said
    yield from entry.messages()


def _unquoted(quoted: str, line: int) -> str:
    """The text of a quoted string, whose escapes are those of C. Raises ValueError."""
    try:
        text = ast.literal_eval(quoted) if "\\" in quoted else quoted[1:-1]
        if len(quoted) < 2 or not quoted.endswith('"') or not isinstance(text, str):
            raise ValueError
    except (ValueError, SyntaxError):
        raise ValueError(f"no gettext catalogue: line {line} is no quoted text") from None
    return text
