"""Processes beside the stand-in for Transformer Engine's kernels.

One of a kind serves all tests, whatever process of pytest-xdist they run in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.te.standin import python_part

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 500


def findings(module: str, factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a module of this folder wrote.

    Skips, with the reason, where Transformer Engine's Python part cannot be had.
    """
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / f"{module}.lock"):
        with FileLock(shared / "download.lock"):
            folder, why = python_part()
        if folder is None:
            pytest.skip(why)
        output = shared / f"{module}.json"
        if not output.is_file():
            environment = dict(os.environ, DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
            command = [sys.executable, "-m", f"tests.te.{module}", str(folder), str(output)]
            done = subprocess.run(
                command,
                cwd=shared,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models described."""
    return findings("worker", tmp_path_factory)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Engines run."""
    return findings("engine_worker", tmp_path_factory)
