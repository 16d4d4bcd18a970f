"""state.json: what a run is doing and why, in one small file that outlives every process.

The fence around it is here too.

`state_file.py` has its keys. submitted.json, beside it, is written once per submission.
Standard library only, as the batch script's Python reads both.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from model.files import atomic_write_text
from parallel.checkpoint.folders import STEP_FOLDER, resolve
from parallel.launch.exit_codes import ExitCode
from parallel.launch.slurm_client import job_handle
from pretrain.rundir.state_file import State, Submitted, read_state_file

if TYPE_CHECKING:
    from typing_extensions import Unpack

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

START = "FATHOM_START"
"""Environment variable of a training process: the random name of the start that it belongs to."""

FULL = (errno.ENOSPC, errno.EDQUOT)


class StaleStartError(RuntimeError):
    """The run directory is not this start's any more: a newer one owns it, or it is gone."""

    exit_code = ExitCode.STALE


@dataclass(frozen=True)
class Owner:
    """One start of a run."""

    job_id: str | None
    """The Slurm job; None without Slurm."""
    restart_count: int
    """How often Slurm had started it again."""
    start: str = ""
    """Random name that no other start has; empty where it is not known, as to the batch script."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Owner:
        """The start this process belongs to."""
        env = os.environ if env is None else env
        return cls(job_handle(env), int(env.get("SLURM_RESTART_COUNT", "0")), env.get(START, ""))

    @property
    def label(self) -> str:
        """Part of names of files that the batch script reads too: `12.0`, or `local.0`."""
        return f"{self.job_id or 'local'}.{self.restart_count}"

    @property
    def tag(self) -> str:
        """Part of names that no other start may use: `local.0.f3a81c20`."""
        return f"{self.label}.{self.start}" if self.start else self.label

    def is_at(self, held: Owner) -> bool:
        """Whether a run directory that `held` has is this start's."""
        return self.label == held.label and self.start in ("", held.start)


def read_state(run_dir: Path | str) -> State:
    """The newest state, empty where the run has none.

    Raises UserError for a file that is damaged.
    """
    return read_state_file(Path(run_dir) / STATE_FILE, State)


def read_submitted(run_dir: Path | str) -> Submitted:
    """What `fathom submit` last wrote about the run, empty where it was never submitted.

    Raises UserError for a file that is damaged.
    """
    return read_state_file(Path(run_dir) / SUBMITTED_FILE, Submitted)


def next_in_chain(run_dir: Path | str, owner: Owner) -> str | None:
    """The job that goes on with the run when this one ends, None where there is none."""
    jobs = read_submitted(run_dir).get("jobs") or []
    place = jobs.index(owner.job_id) if owner.job_id in jobs else len(jobs)
    return jobs[place + 1] if place + 1 < len(jobs) else None


def owner_of(state: State) -> Owner:
    """The start that a state names as the owner of the run directory."""
    return Owner(state.get("job_id"), state.get("restart_count") or 0, state.get("start") or "")


def claim(run_dir: Path | str, owner: Owner | None = None, **fields: Unpack[State]) -> State:
    """Makes this start the owner of the run directory and writes fields.

    A start that has the run already may claim again.

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
            f"{run_dir} belongs to restart {held.restart_count} of job {held.job_id}; "
            f"this is restart {owner.restart_count}"
        )
    if owner != held:
        # The batch script has claimed it for this start, and will say what follows after its end.
        fields["supervised"] = current.get("state") == STARTING and owner.label == held.label
    return _write(run_dir, {**current, **fields, **_owned_by(owner)})


def check_owner(run_dir: Path | str, owner: Owner | None = None) -> None:
    """Call before a checkpoint is made the newest, and before anything else that a newer start
    would trip over.

    Raises StaleStartError where another start owns the run directory, or it is gone.
    Without a state.json, nobody else does.
    """
    owner = owner or Owner.from_environment()
    state = read_state(run_dir)
    held = owner_of(state)
    if not state and not Path(run_dir).is_dir():
        raise StaleStartError(f"{run_dir} was moved or removed; nothing more is written there")
    if not state or owner.is_at(held):
        return
    if held.label != owner.label:
        raise StaleStartError(
            f"{run_dir} belongs to start {held.label} now; "
            f"this process is of start {owner.label} and leaves it alone"
        )
    raise StaleStartError(
        f"{run_dir} belongs to another start now, "
        f"process {state.get('pid')} on {state.get('host')}; this one leaves it alone"
    )


def write_state(run_dir: Path | str, owner: Owner | None = None, **fields: Unpack[State]) -> State:
    """Merges fields into state.json, whole or not at all, and returns the result.

    Only the owning start may (see `claim`).
    `cancelled` and `requeued` stay, whatever a rank that is still saving says of itself.

    Raises StaleStartError for another start than the owner.
    """
    owner = owner or Owner.from_environment()
    check_owner(run_dir, owner)
    current = read_state(run_dir)
    if current.get("state") in (CANCELLED, REQUEUED) and fields.get("state") in (RUNNING, STOPPED):
        fields.pop("state")
        fields.pop("reason", None)
    return _write(run_dir, {**_owned_by(owner), **current, **fields})


def latest_step(run_dir: Path | str) -> int | None:
    """Step of the newest checkpoint, None where there is none.

    The one that `checkpoints/latest` names, or the newest complete one where that is not there.
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
    """The rank's own node; with BAD_NODE the one that failed its check."""
    time: float
    at_fault: str | None = None
    """With HUNG the node that this rank found to hold up the others; None where it found none."""


def stop_file(run_dir: Path | str, owner: Owner) -> Path:
    """Where the batch script writes the name of the signal it got.

    A signal to a process that is still importing would be lost.
    """
    return Path(run_dir) / CONTROL / f"{owner.label}.stop"


def asked_to_stop(run_dir: Path | str, owner: Owner) -> str:
    """Name of the signal that reached the batch script of this start, such as USR1.

    Empty where none did.
    """
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
    at_fault: str | None = None,
) -> None:
    """Leaves one line about why a rank ends, for the batch script to find.

    The first one is what the user reads.

    host: the rank's node, if not this one. at_fault: as in `Failure`.

    Never raises. A run directory that is gone is not made anew.
    """
    owner = owner or Owner.from_environment()
    words = " ".join(reason.split())[:500]
    failure = Failure(rank, int(exit_code), words, host or _host(), time.time(), at_fault)
    with contextlib.suppress(OSError):  # the disk may be why it fails
        (Path(run_dir) / CONTROL).mkdir(exist_ok=True)
        atomic_write_text(
            Path(run_dir) / CONTROL / f"{owner.label}.rank{rank:05d}.json", json.dumps(asdict(failure))
        )


def forget_failures(run_dir: Path | str, owner: Owner | None = None) -> None:
    """Removes what an earlier start of the same name left.

    Without Slurm, and in an interactive allocation, all have the same one.
    In a batch job the batch script has claimed the run and cleared up, and other ranks of this
    start may have failed already.
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


def alive(state: State) -> bool | None:
    """Whether the process that wrote a state still lives.

    None where that cannot be known here, as on another host.
    """
    pid, began = state.get("pid"), state.get("began")
    if state.get("host") != _host() or not pid:
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (ProcessLookupError, OverflowError):
        return False
    now = process_began(pid)
    return now is None or (now > 0 and began in (None, now))


def process_began(pid: int) -> int | None:
    """When a process of this machine began, in the kernel's ticks since it was switched on.

    0 for one that has ended and was not waited for; None where that is hidden.
    Fields 3 and 22 of proc_pid_stat(5).
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()  # the second, the name in brackets, may hold blanks
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _owned_by(owner: Owner) -> State:
    return {"job_id": owner.job_id, "restart_count": owner.restart_count, "start": owner.start}


def _write(run_dir: Path | str, state: State) -> State:
    pid = os.getpid()
    state = {
        **state,
        "updated": round(time.time(), 3),
        "host": _host(),
        "pid": pid,
        "began": process_began(pid),
    }
    path, text = Path(run_dir) / STATE_FILE, json.dumps(state, indent=1) + "\n"
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(run_dir))
    try:
        atomic_write_text(path, text)
    except OSError as error:
        if error.errno not in FULL or not _written_over(path, text):
            raise
    return state


def _written_over(path: Path, text: str) -> bool:
    """On a full disk: puts a text into the blocks that a file has already.

    Returns whether it could.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            facts = os.fstat(file.fileno())
            # Blanks where the old text was longer: to cut the file would give its last block back.
            data = text.encode().ljust(facts.st_size)
            if len(data) > max(facts.st_size, 512 * facts.st_blocks) or file.write(data) != len(data):
                return False
            os.fsync(file.fileno())
    except OSError:
        return False
    return True
