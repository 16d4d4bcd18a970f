"""One process beside the stand-in for Transformer Engine's kernels serves all tests of this folder, whatever process of pytest-xdist they run in."""

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


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.te.worker` found. Skips, with the reason, where Transformer Engine's Python part cannot be had."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "te.lock"):
        folder, why = python_part()
        if folder is None:
            pytest.skip(why)
        output = shared / "te.json"
        if not output.is_file():
            environment = dict(os.environ, DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
            done = subprocess.run(
                [sys.executable, "-m", "tests.te.worker", str(folder), str(output)],
                cwd=shared,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())
