"""`fathom pretrain` ended by SIGKILL at random moments.

Every start goes on, and the run ends as if nothing had been, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.forks import ROOT
from tests.pretrain import killed
from tests.pretrain.small import small_data


def trial(folder: Path, kills: int, seed: int, timeout: float) -> list[dict[str, Any]]:
    """Rows of a trial in a process of its own.

    Raises AssertionError with its last words where anything is not as it must be.
    """
    config = folder / "config.yaml"
    config.write_text(
        killed.CONFIG + f"data: {{corpora: [{{path: {small_data(folder)}}}], seq_length: 16}}\n"
    )
    runs = folder / "runs"
    runs.mkdir()
    said = folder / "said"
    process = forks.start(killed.trial, config, runs, kills, seed, cwd=ROOT, out=said, err=said)
    assert forks.finish(process, timeout) == 0, said.read_text()[-6000:]
    rows: list[dict[str, Any]] = json.loads((runs / "rows.json").read_text())
    assert [row["kill"] for row in rows] == list(range(1, kills + 1))
    return rows


def test_killed_a_few_times(tmp_path: Path) -> None:
    trial(tmp_path, kills=2, seed=4, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_fifty_times(tmp_path: Path) -> None:
    rows = trial(tmp_path, kills=50, seed=0, timeout=7000)
    assert any("incomplete" in row["said"] for row in rows), (
        "no kill fell into a save: the moments are badly chosen"
    )
    assert {row["asynchronous"] for row in rows} == {False, True}
