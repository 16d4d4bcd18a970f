"""Processes beside the stand-in for Transformer Engine's kernels.

One of a kind serves all tests, whatever process of pytest-xdist they run in.
Both ends of the supported range are there: the newest release, and in slow tests the oldest.
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

from tests.te.extension import NEWEST, OLDEST
from tests.te.standin import python_part

RELEASES = [NEWEST, pytest.param(OLDEST, marks=pytest.mark.slow)]
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1500
"""A worker is one minute of an idle core."""


def findings(module: str, release: str, factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a module of this folder wrote beside a release.

    Skips, with the reason, where Transformer Engine's Python part cannot be had.
    """
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / f"{module}-{release}.lock"):
        with FileLock(shared / "download.lock"):
            folder, why = python_part(release)
        if folder is None:
            pytest.skip(why)
        output = shared / f"{module}-{release}.json"
        if not output.is_file():
            environment = dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
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


@pytest.fixture(scope="session", params=RELEASES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models described."""
    return findings("worker", request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=RELEASES)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Engines run."""
    return findings("engine_worker", request.param, tmp_path_factory)
