"""A run that a start has claimed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.cluster.supervise import start
from tests.pretrain.cluster.starts import OWNER, RUNNING, checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that start 12.0 has claimed, with a checkpoint of step 100."""
    run_dir = tmp_path / "run"
    (run_dir / "control").mkdir(parents=True)
    checkpoint(run_dir, 100)
    assert start(run_dir, OWNER, RUNNING) is None
    return run_dir
