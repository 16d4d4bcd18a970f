"""What the fuzzers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import artefacts


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound results of Fathom, made once."""
    return artefacts.make(tmp_path_factory.mktemp("sound"))
