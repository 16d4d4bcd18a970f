"""state.json: what a run is doing and why, in one small file that outlives every process; and the fence around it.

Keys: state, reason, step (of the newest checkpoint or end), updated (seconds since 1970), host, pid, exit_code;
job_id and restart_count (the start that owns the run directory; job_id null without Slurm), restarts (starts of this submission before the newest),
stalled (starts in a row that left no new checkpoint), start_step (newest checkpoint when the newest start began), ends_at, nodes.
submitted.json, beside it, is written once per submission: jobs (handles of Slurm; more than one is a chain), time, log, command.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.files import atomic_write_text
from parallel.checkpoint.folders import STEP_FOLDER, resolve
from parallel.launch.slurm_client import job_handle

STATE_FILE = "state.json"
SUBMITTED_FILE = "submitted.json"
PREFLIGHT_FILE = "preflight.json"
CONTROL = "control"

QUEUED, STARTING, RUNNING, STOPPED, REQUEUED, FINISHED, FAILED, CANCELLED = (
    "queued",
    "starting",
    "running",
    "stopped",
    "requeued",
    "finished",
    "failed",
    "cancelled",
)
ENDED = frozenset({STOPPED, FINISHED, FAILED, CANCELLED})
"""States after which nothing starts the run again by itself."""


class StaleStartError(RuntimeError):
    """This process belongs to an earlier start of the run; a newer one owns the run directory."""


@dataclass(frozen=True)
class Owner:
    """One start of a run: the Slurm job (None without Slurm) and how often Slurm had started it again."""

    job_id: str | None
    restart_count: int

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Owner:
        """The start this process belongs to."""
        env = os.environ if env is None else env
        return cls(job_handle(env), int(env.get("SLURM_RESTART_COUNT", "0")))

    @property
    def label(self) -> str:
        """Part of file names: `12.0`, or `local.0`."""
        return f"{self.job_id or 'local'}.{self.restart_count}"


def read_state(run_dir: Path | str) -> dict[str, Any]:
    """The newest state, empty where the run has none. Raises UserError for a file that is no JSON object."""
    return _read(Path(run_dir) / STATE_FILE)


def read_submitted(run_dir: Path | str) -> dict[str, Any]:
    """What `fathom submit` last wrote about the run, empty where it was never submitted. Raises UserError for a file that is no JSON object."""
    return _read(Path(run_dir) / SUBMITTED_FILE)


def next_in_chain(run_dir: Path | str, owner: Owner) -> str | None:
    """The job that goes on with the run when this one ends, None where there is none."""
    jobs = [str(job) for job in read_submitted(run_dir).get("jobs") or []]
    place = jobs.index(owner.job_id) if owner.job_id in jobs else len(jobs)
    return jobs[place + 1] if place + 1 < len(jobs) else None


def owner_of(state: Mapping[str, Any]) -> Owner:
    """The start that a state names as the owner of the run directory."""
    return Owner(state.get("job_id"), int(state.get("restart_count") or 0))


def claim(run_dir: Path | str, owner: Owner | None = None, **fields: Any) -> dict[str, Any]:
    """Makes this start the owner of the run directory and writes fields. A start that has the run already may claim again.

    Raises StaleStartError where a later start of the same job has it.
    """
    owner = owner or Owner.from_environment()
    current = read_state(run_dir)
    held = owner_of(current)
    if (
        current
        and owner.job_id is not None
        and held.job_id == owner.job_id
        and held.restart_count > owner.restart_count
    ):
        raise StaleStartError(
            f"{run_dir} belongs to restart {held.restart_count} of job {held.job_id}; this is restart {owner.restart_count}"
        )
    return _write(
        run_dir, {**current, **fields, "job_id": owner.job_id, "restart_count": owner.restart_count}
    )


def check_owner(run_dir: Path | str, owner: Owner | None = None) -> None:
    """Call before a checkpoint is made the newest, and before anything else that a newer start would trip over. Raises StaleStartError."""
    owner = owner or Owner.from_environment()
    held = owner_of(read_state(run_dir))
    if held != owner:
        raise StaleStartError(
            f"{run_dir} belongs to start {held.label} now; this process is of start {owner.label} and leaves it alone"
        )


def write_state(run_dir: Path | str, owner: Owner | None = None, **fields: Any) -> dict[str, Any]:
    """Merges fields into state.json, whole or not at all, and returns the result. Only the owning start may (see `claim`).

    `cancelled` and `requeued` stay, whatever a rank that is still saving says of itself. Raises StaleStartError for another start than the owner.
    """
    owner = owner or Owner.from_environment()
    check_owner(run_dir, owner)
    current = read_state(run_dir)
    if current.get("state") in (CANCELLED, REQUEUED) and fields.get("state") in (RUNNING, STOPPED):
        fields = {key: value for key, value in fields.items() if key not in ("state", "reason")}
    return _write(run_dir, {**current, **fields})


def latest_step(run_dir: Path | str) -> int | None:
    """Step of the checkpoint that `checkpoints/latest` names, or the newest complete one where that is not there; None where there is none.

    It is the one that the next start goes on from.
    """
    try:
        match = STEP_FOLDER.match(resolve(Path(run_dir) / "checkpoints").name)
    except (UserError, UnicodeDecodeError):
        return None
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Failure:
    """How one rank ended, in its own words."""

    rank: int
    exit_code: int
    reason: str
    host: str
    time: float


def stop_file(run_dir: Path | str, owner: Owner) -> Path:
    """The batch script writes the name of the signal it got here: a signal to a process that is still importing would be lost."""
    return Path(run_dir) / CONTROL / f"{owner.label}.stop"


def asked_to_stop(run_dir: Path | str, owner: Owner) -> str:
    """Name of the signal that reached the batch script of this start, such as USR1; empty where none did."""
    try:
        return stop_file(run_dir, owner).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def record_failure(
    run_dir: Path | str,
    rank: int,
    exit_code: int,
    reason: str,
    owner: Owner | None = None,
    host: str | None = None,
) -> None:
    """Leaves one line about why a rank ends, for the batch script to find; the first one is what the user reads. host: its node, if not this one.

    Never raises.
    """
    owner = owner or Owner.from_environment()
    host = host or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    failure = Failure(rank, int(exit_code), " ".join(reason.split())[:500], host, time.time())
    with contextlib.suppress(OSError):  # the disk may be why it fails
        atomic_write_text(
            Path(run_dir) / CONTROL / f"{owner.label}.rank{rank:05d}.json", json.dumps(asdict(failure))
        )


def forget_failures(run_dir: Path | str, owner: Owner | None = None) -> None:
    """Removes what an earlier start of the same name left: without Slurm, and in an interactive allocation, all have the same one.

    In a batch job the batch script has claimed the run and cleared up, and other ranks of this start may have failed already.
    """
    owner = owner or Owner.from_environment()
    state = read_state(run_dir)
    if owner_of(state) == owner and state.get("state") == STARTING:
        return
    for pattern in (f"{owner.label}.rank*", f"{owner.label}.hang*", f"{owner.label}.preflight*"):
        for path in (Path(run_dir) / CONTROL).glob(pattern):
            path.unlink(missing_ok=True)


def read_failures(run_dir: Path | str, owner: Owner) -> list[Failure]:
    """What the ranks of one start left, first one first."""
    failures = []
    for path in (Path(run_dir) / CONTROL).glob(f"{owner.label}.rank*.json"):
        try:
            failures.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, OSError):
            continue
    return sorted(failures, key=lambda failure: failure.time)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it; checkpoints and metrics are not affected"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is damaged (no JSON object): remove it; checkpoints and metrics are not affected"
        )
    return content


def _write(run_dir: Path | str, state: dict[str, Any]) -> dict[str, Any]:
    state = {
        **state,
        "updated": round(time.time(), 3),
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "pid": os.getpid(),
    }
    atomic_write_text(Path(run_dir) / STATE_FILE, json.dumps(state, indent=1) + "\n")
    return state
