"""Recordings that come with Debian packages: prompts of a telephone exchange, with their words."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import typer

from model.errors import UserError
from model.files import atomic_write_text
from tools.dev import run
from tools.dev.quickstarts import PROMPTS

SHARE = Path("/usr/share")
SOUNDS = "asterisk/sounds/en_US_f_Allison"
TEXTS = "doc/asterisk-core-sounds-{0}/core-sounds-{0}.txt.gz"
INSTALL = "apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-en asterisk-core-sounds-fr"
CREDIT = (
    "Asterisk core sounds, spoken by Allison Smith; French texts by Clod Patry, Kristopher Lalletti and "
    "June Wallack; CC BY-SA 3.0. Debian packages asterisk-core-sounds-en, -en-wav and -fr.\n"
)
NO_SPEECH = ("[", "(")
"""What a text that is no speech begins with."""


def texts(share: Path, language: str) -> dict[str, str]:
    """Texts of prompts by their names; none where the package is not there."""
    path = share / TEXTS.format(language)
    if not path.is_file():
        return {}
    lines = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith(";"))
    return {name.strip(): " ".join(text.split()) for name, text in pairs}


def prompts(share: Path) -> Iterator[tuple[Path, str, str]]:
    """(recording, English text, French text or nothing) of all prompts that are speech."""
    french = texts(share, "fr")
    for name, text in sorted(texts(share, "en").items()):
        path = share / SOUNDS / f"{name}.wav"
        if path.is_file() and text and not text.startswith(NO_SPEECH):
            yield path, text, french.get(name, "")


def write_prompts(folder: Path, share: Path = SHARE) -> None:
    """Writes FOLDER/clips.tsv, and links to the recordings beside it.

    share: where packages are installed. Raises UserError where they are not.
    """
    found = list(prompts(share))
    if not found:
        raise UserError(f"there are no recordings in {share / SOUNDS}: {INSTALL}")
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["path\ttranscript\ttranslation"]
    for path, english, french in found:
        name = path.relative_to(share / SOUNDS).as_posix().replace("/", "-")
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
        rows.append("\t".join((name, english.replace('"', ""), french.replace('"', ""))))
    atomic_write_text(folder / "clips.tsv", "\n".join(rows) + "\n")
    atomic_write_text(folder / PROMPTS, CREDIT)


def main(
    folder: Path = typer.Argument(metavar="DIR", help="Folder that gets clips.tsv and links to recordings."),
    share: Path = typer.Option(SHARE, help="Where packages have their data."),
) -> None:
    """Make a table of the prompts of installed Debian packages."""
    write_prompts(folder, share)


if __name__ == "__main__":
    run(main)
