"""Catalogues are read as gettext reads them, and what is no catalogue says so."""

from __future__ import annotations

import gettext
import io
import struct
from pathlib import Path

import pytest

from pretrain.data.reading.catalogues import Message, catalogue_messages

PO = r"""# A catalogue.
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\n"

#: window.c:3
msgid "Open \"%s\"\n"
msgstr ""
"%s "
"öffnen\n"

#, c-format, fuzzy
#| msgid "Close"
msgid "Closed"
msgstr "Schließen"

msgctxt "verb"
msgid "Print"
msgstr "Drucken"
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

msgid "Nobody translated this"
msgstr ""

#~ msgid "Old"
#~ msgstr "Alt"
"""
MESSAGES = [
    ('Open "%s"\n', "%s öffnen\n"),
    ("Print", "Drucken"),
    ("%d file", "%d Datei"),
    ("%d files", "%d Dateien"),
]
ENTRIES = {
    "": "Content-Type: text/plain; charset=ISO-8859-1\nPlural-Forms: nplurals=2; plural=(n != 1);\n",
    "verb\x04Print": "Drucken",
    "%d file\0%d files": "%d Datei\0%d Dateien",
    "Close": "Schließen",
}


def compiled(entries: dict[str, str], order: str = "<", charset: str = "latin-1") -> bytes:
    """A .mo file as msgfmt writes it."""
    texts = [(key.encode(charset), value.encode(charset)) for key, value in sorted(entries.items())]
    tables, at = b"", 28 + 16 * len(texts)
    content = b""
    for side in (0, 1):
        for pair in texts:
            tables += struct.pack(f"{order}2I", len(pair[side]), at + len(content))
            content += pair[side] + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(texts), 28, 28 + 8 * len(texts), 0, at)
    return head + tables + content


def test_messages_of_a_text_catalogue(tmp_path: Path) -> None:
    (tmp_path / "de.po").write_text(PO, encoding="utf-8")
    found = list(catalogue_messages(str(tmp_path / "de.po")))
    assert [(one.source, one.target) for one in found] == MESSAGES
    assert found[0] == Message(8, *MESSAGES[0])


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_of_a_compiled_catalogue_are_those_of_gettext(tmp_path: Path, order: str) -> None:
    data = compiled(ENTRIES, order)
    (tmp_path / "de.mo").write_bytes(data)
    found = {one.source: one.target for one in catalogue_messages(str(tmp_path / "de.mo"))}
    theirs = gettext.GNUTranslations(io.BytesIO(data))
    assert set(found) == {"Print", "%d file", "%d files", "Close"}
    assert found["Close"] == theirs.gettext("Close")
    assert found["Print"] == theirs.pgettext("verb", "Print")
    assert [found["%d file"], found["%d files"]] == [
        theirs.ngettext("%d file", "%d files", number) for number in (1, 2)
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mo", b"PK\x03\x04", "does not begin as a .mo file"),
        ("b.mo", compiled(ENTRIES)[:60], "damaged .mo file"),
        ("c.mo", compiled(ENTRIES)[:-20], "beyond its end"),
        ("d.mo", compiled({"": "charset=klingon", "a": "b"}), "unknown character set 'klingon'"),
        ("e.po", b"Just some words\n", "line 1 is 'Just some words'"),
        ("f.po", b'msgid "a"\nmsgstr "b\\', "line 2"),
        ("g.po", b'msgid "a\\"\n', "no quoted text"),
    ],
)
def test_what_is_no_catalogue_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(catalogue_messages(str(tmp_path / name)))
