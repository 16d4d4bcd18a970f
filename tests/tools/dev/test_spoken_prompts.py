"""The prompts of Debian packages: what is speech, with its words; and what is said without them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from model.errors import UserError
from tools.dev.spoken_prompts import SOUNDS, TEXTS, write_prompts


def test_speech_is_found_with_its_words_and_credited(tmp_path: Path) -> None:
    share, folder = tmp_path / "share", tmp_path / "clips"
    for language, text in (
        ("en", "; comment\nadded: Added.\ndigits/1: one\nbeep: [beep]\nlost: Lost.\nsaid:  He:  yes\n"),
        ("fr", "added: ajout\u00e9\n"),
    ):
        path = share / TEXTS.format(language)
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(text.encode()))
    for name in ("added", "digits/1", "beep", "said"):
        (share / SOUNDS / f"{name}.wav").parent.mkdir(parents=True, exist_ok=True)
        (share / SOUNDS / f"{name}.wav").write_bytes(name.encode())
    write_prompts(folder, share)
    write_prompts(folder, share)
    rows = ["path\ttranscript\ttranslation", "added.wav\tAdded.\tajout\u00e9"]
    rows += ["digits-1.wav\tone\t", "said.wav\tHe: yes\t"]
    assert (folder / "clips.tsv").read_text().splitlines() == rows
    assert (folder / "digits-1.wav").read_bytes() == b"digits/1"
    assert "Allison Smith" in (folder / "SOURCE.txt").read_text()


def test_missing_packages_are_named_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install asterisk-core-sounds-en-wav"):
        write_prompts(tmp_path / "clips", tmp_path)
    assert not (tmp_path / "clips").exists()
