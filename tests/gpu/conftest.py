"""On a GPU that is there for minutes, what matters most comes first, the rest if time is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

VARIABLE = "FATHOM_GPU_MINUTES"
"""No test begins later than so many minutes after the first; unset: all run."""
ORDER = ("numerics", "joins", "products", "losses", "graphs", "training", "evaluate")
FOLDER = Path(__file__).resolve().parent
BEGUN: list[float] = []
"""When the first test began."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_gpu_{name}.py": place for place, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)) if item.path.parent == FOLDER else -1)


def pytest_runtest_setup() -> None:
    minutes = os.environ.get(VARIABLE)
    BEGUN.append(time.monotonic())
    if minutes and time.monotonic() - BEGUN[0] > 60 * float(minutes):
        pytest.skip(f"{minutes} minutes are over ({VARIABLE})")
