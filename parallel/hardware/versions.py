"""Which releases of other packages Fathom supports.

The ranges are in its own package metadata,
or in pyproject.toml of a checkout that is not installed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
DEVELOPMENT = "dev"


def _requirements() -> tuple[Sequence[str], Sequence[str]]:
    """What every installation needs, and what the extras for users bring."""
    try:
        lines = [
            line for line in metadata.requires("fathom") or [] if f'extra == "{DEVELOPMENT}"' not in line
        ]
        return [line for line in lines if "extra ==" not in line], [
            line for line in lines if "extra ==" in line
        ]
    except metadata.PackageNotFoundError:
        pass
    if sys.version_info >= (3, 11) and PYPROJECT.is_file():
        import tomllib

        project = tomllib.loads(PYPROJECT.read_text())["project"]
        extras = project.get("optional-dependencies", {})
        return project["dependencies"], [
            line for name, lines in extras.items() if name != DEVELOPMENT for line in lines
        ]
    return [], []


@functools.cache
def supported() -> dict[str, SpecifierSet]:
    """Range of releases by normalised package name, needed and optional packages alike.

    Empty where neither source can be read.
    """
    return {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in map(Requirement, [line for part in _requirements() for line in part])
    }


def needed() -> set[str]:
    """Normalised names of the packages that training cannot do without."""
    return {canonicalize_name(Requirement(line).name) for line in _requirements()[0]}


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def in_range(package: str, version: str) -> bool:
    """Whether a version is in the supported range. True without a range.

    Local suffixes (+cu130) and pre-releases count as what they stand for.
    """
    wanted = supported().get(canonicalize_name(package))
    try:
        return wanted is None or wanted.contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        return False
