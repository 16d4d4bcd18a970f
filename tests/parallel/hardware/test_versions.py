"""Supported releases are those of pyproject.toml."""

from __future__ import annotations

import sys

import pytest

from parallel.hardware.versions import in_range, installed, supported


@pytest.mark.skipif(
    sys.version_info < (3, 11) and installed("fathom") is None,
    reason="pyproject.toml cannot be read before Python 3.11, and Fathom is not installed",
)
@pytest.mark.parametrize(
    ("package", "version", "expected"),
    [
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.4.1", False),
        ("megatron-core", "0.16.1", True),
        ("megatron_core", "0.17.0", False),
        ("transformer-engine", "2.11.0", True),
        ("transformer-engine", "2.20.2", True),
        ("transformer-engine", "2.21.0", False),
        ("transformer-engine", "1.13.0", False),
        ("transformer-engine", "2.11.0+c90a920", True),
        ("torch", "not a version", False),
        ("left-out", "1", True),
    ],
)
def test_ranges(package: str, version: str, expected: bool) -> None:
    assert in_range(package, version) is expected


def test_development_packages_have_no_range() -> None:
    assert "ruff" not in supported()
    assert installed("no-such-package") is None
