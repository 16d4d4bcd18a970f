"""A start of a run under Slurm, as the tests of who starts again have it."""

from __future__ import annotations

from pathlib import Path

from parallel.launch.exit_codes import ExitCode
from parallel.launch.slurm_client import Job
from pretrain.rundir.metrics import MetricsWriter
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


def make_run(folder: Path, steps: int = 10, total: int = 100, layers: int = 0) -> Path:
    """A run that has trained some steps at 0.5 s each."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"name: {folder.name}\ntrain: {{steps: {total}, stop_at_step: null}}\n"
    )
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        writer.write("start", 0, world_size=4)
        for step in range(1, steps + 1):
            writer.write(
                "train", step, loss=10.0 / step, tokens=step * 512, tokens_per_s=1024.0, step_time_s=0.5
            )
            if layers:
                writer.write(
                    "signal",
                    step,
                    layers=[
                        {"layer": layer, "residual_rms": 1.0, "grad_norm": 0.1}
                        for layer in range(1, layers + 1)
                    ],
                )
    return folder
