"""What the fuzzers share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fuzz import artefacts


@pytest.fixture(autouse=True)
def subnormal_numbers() -> None:
    """hypothesis needs them. Compiled code that other tests load turns them off for the process."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound results of Fathom, made once."""
    return artefacts.make(tmp_path_factory.mktemp("sound"))
