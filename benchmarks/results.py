"""What a benchmark leaves: its numbers as JSON.

The time, the commit and the machine they were measured on come with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from model.files import atomic_write_text
from pretrain.rundir.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
FACTS = ("time", "git", "platform", "cpu", "gpus", "packages")


def write_results(path: Path, report: Mapping[str, object]) -> None:
    """Writes a report and what it was measured with; makes the folder.

    The entry `load` counts jobs that ran on the machine, the mean of the last minute.
    """
    facts = environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(
        path,
        json.dumps({name: facts[name] for name in FACTS} | {"load": os.getloadavg()[0], **report}, indent=1)
        + "\n",
    )
