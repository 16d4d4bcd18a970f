"""A start of a run under Slurm, as the tests of who starts again have it."""

from __future__ import annotations

from pathlib import Path

from parallel.launch.exit_codes import ExitCode
from parallel.launch.slurm_client import Job
from pretrain.rundir.state import Owner, write_state

OWNER = Owner("12", 0)
RUNNING = Job("RUNNING")


def checkpoint(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
    (run_dir / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


def left(run_dir: Path, state: str, code: ExitCode, reason: str = "why") -> None:
    write_state(run_dir, OWNER, state=state, exit_code=int(code), reason=reason)
