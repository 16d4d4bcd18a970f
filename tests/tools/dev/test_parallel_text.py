"""Pairs come out of wheels cleaned, and what cannot be had says so in a line."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from model.errors import UserError
from tests.pretrain.data.reading.test_catalogues import ENTRIES, compiled
from tools.dev.parallel_text import Package, cleaned, messages_of, usable, write


def test_messages_of_a_language_are_taken_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a/locale/de/LC_MESSAGES/a.mo", compiled(ENTRIES))
        wheel.writestr("a/locale/de/LC_MESSAGES/a.po", 'msgid "Close"\nmsgstr "Zu"\n')
        wheel.writestr("a/locale/de_AT/LC_MESSAGES/b.po", 'msgid "Bye"\nmsgstr "Servus"\n')
        wheel.writestr("a/locale/fr/LC_MESSAGES/a.po", 'msgid "Bye"\nmsgstr "Adieu"\n')
    found = {one.source: one.target for one in messages_of(tmp_path / "a.whl", "de")}
    assert found["Close"] == "Schließen"
    assert found["Bye"] == "Servus"


def test_messages_are_cleaned_and_judged() -> None:
    assert cleaned("<b>Save</b> &all\n _files & fonts") == "Save all files & fonts"
    assert usable("Save all files", "Alle Dateien speichern")
    for source, target in (("Save all", "Alle speichern"), ("a b c", "a b c"), ("1 2 3 4", "x y z w")):
        assert not usable(source, target)


def test_without_the_package_there_is_one_line_and_no_folder(tmp_path: Path) -> None:
    missing = Package("fathom-no-such-package", "0.0.0", "", "MIT", permissive=True)
    with pytest.raises(UserError, match=r"fathom-no-such-package==0.0.0 cannot be downloaded"):
        write(tmp_path / "out", (missing,))
    assert not (tmp_path / "out").exists()
