"""How runs are doing, from the files they leave and from Slurm's queue.

Works for runs that train, wait, or died without a word.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from model.errors import UserError, debugging
from model.records import finite
from parallel.checkpoint.folders import MANIFEST, step_folder
from parallel.launch import slurm_client
from parallel.launch.exit_codes import ExitCode
from parallel.launch.slurm_client import Queued
from pretrain.rundir import state as states
from pretrain.rundir.description import read_config
from pretrain.rundir.events import End, Place, Start, Train, event_of
from pretrain.rundir.lines import lines_backwards
from pretrain.rundir.outcome import code_of_reason, ending, words_of
from pretrain.rundir.state_file import State

MARKS = (states.STATE_FILE, "metrics.jsonl", "config.yaml")
SKIPPED = frozenset({"code", "checkpoints", "tensorboard", "trackers", "hf", "control"})
DEPTH = 3
RECENT_STEPS = 20
SILENT_SECONDS, SILENT_STEPS = 300.0, 20
"""A run that trains is called silent after this long without a step.

Or after this many of its steps, whichever is longer.
"""

DEAD = "dead"


@dataclass(frozen=True)
class RunStatus:
    """One run. Unknown numbers are None."""

    name: str
    folder: str
    state: str
    reason: str = ""
    step: int = 0
    total: int | None = None
    loss: float | None = None
    """Nats per token."""
    tokens_per_s: float | None = None
    left_s: float | None = None
    """Seconds to the last step at the present speed."""
    restarts: int = 0
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    """Seconds."""
    job: str | None = None
    nodes: str = ""


def check_root(path: Path) -> None:
    """Raises UserError where the folder of runs does not exist, or is none."""
    if not path.is_dir():
        wrong = "is no folder" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {wrong}: give a run directory or the folder of several (runs_dir of the configuration)"
        )


def find_runs(path: Path) -> list[Path]:
    """Run directories at or below a folder, oldest name first.

    Raises UserError where the folder does not exist or holds none.
    """
    check_root(path)
    runs = sorted(_search(path, DEPTH))
    if not runs:
        raise UserError(f"no run in {path}: a run directory holds {' or '.join(MARKS)}")
    return runs


def collect(path: Path) -> list[RunStatus]:
    """The state of all runs at or below a folder. Raises as `find_runs`.

    A run that cannot be read is shown as damaged, and hides no other. FATHOM_DEBUG=1 shows why.
    """
    queued = slurm_client.queue()
    return [status_of(folder, queued) for folder in find_runs(path)]


def status_of(folder: Path, queued: Mapping[str, Queued] | None) -> RunStatus:
    """As `run_status`, but a run that cannot be read is damaged. FATHOM_DEBUG=1 shows why."""
    try:
        return run_status(folder, queued)
    except Exception as error:
        if debugging():
            raise
        return RunStatus(folder.name, str(folder), "damaged", words_of(error))


def run_status(folder: Path, queued: Mapping[str, Queued] | None, now: float | None = None) -> RunStatus:
    """The state of one run.

    queued: this user's jobs, None where there is no Slurm.
    now: seconds since 1970.
    """
    now = time.time() if now is None else now
    state, submitted = states.read_state(folder), states.read_submitted(folder)
    recent = recent_events(folder / "metrics.jsonl")
    step = recent.train[-1].step if recent.train else int(state.get("step") or 0)
    # As the run's own lines count: train.stop_at_step ends a start, and not the run.
    total = read_config(folder).count("train.steps")
    step_time = _mean([event.step_time_s for event in recent.train])
    checkpoint = states.latest_step(folder)
    known, reason = _told(state, recent.end) or (_state_by_age(folder, now), "")
    status = RunStatus(
        name=folder.name,
        folder=str(folder),
        state=known,
        reason=reason,
        step=step,
        total=total,
        loss=finite(recent.train[-1].loss) if recent.train else None,
        tokens_per_s=_mean([event.tokens_per_s for event in recent.train]),
        left_s=max(0, total - step) * step_time if total is not None and step_time is not None else None,
        restarts=state.get("restarts") or 0,
        checkpoint_step=checkpoint,
        checkpoint_age_s=_checkpoint_age(folder, checkpoint, now),
        job=state.get("job_id"),
        nodes=state.get("nodes") or "",
    )
    jobs = [job for job in (status.job, *(submitted.get("jobs") or [])) if job is not None]
    status = _with_job(status, jobs, queued, to_be_continued=state.get("exit_code") == ExitCode.STOPPED)
    if status.state == states.RUNNING:
        if status.job is None and states.alive(state) is False:
            gone = f"process {state.get('pid')} is gone; it left no word"
            return replace(status, state=DEAD, reason=gone, left_s=None)
        silent = _age(folder / "metrics.jsonl", now)
        if silent is not None and silent > max(SILENT_SECONDS, SILENT_STEPS * (step_time or 0)):
            return replace(status, reason=f"no step for {silent / 60:.0f} min")
    elif status.state not in (states.STARTING, states.REQUEUED):
        status = replace(status, left_s=None)
    return status


@dataclass(frozen=True)
class Recent:
    """The end of a run's history."""

    train: list[Train]
    """The newest steps, oldest first."""
    end: End | None
    """How the loop was left after them; None while it runs, or where it was killed."""


def recent_events(path: Path, block: int = 1 << 16, limit: int = 1 << 24) -> Recent:
    """The newest steps and the end after them, read from the end of the file, as it may be large.

    What cannot be read is left out.
    """
    train: list[Train] = []
    end: End | None = None
    begun = False
    for line in lines_backwards(path, block, limit):
        # Lines of per-layer signals are long, and not needed here.
        if not any(kind in line[:40] for kind in (b'"train"', b'"end"', b'"start"')):
            continue
        try:
            event = event_of(line, Place(path, 0, 0))
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(event, End) and not train and not begun:
            end = end or event
        elif isinstance(event, Train):
            train.insert(0, event)
        begun = begun or isinstance(event, Start)
        if train and (isinstance(event, Start) or len(train) >= RECENT_STEPS):
            break
    return Recent(train, end)


def _with_job(
    status: RunStatus, jobs: list[str], queued: Mapping[str, Queued] | None, to_be_continued: bool = False
) -> RunStatus:
    """Adds what the queue knows.

    Why a job waits.
    That a run which says `running`, or stopped to be continued, has no job any more.
    """
    waiting = next((queued[job] for job in jobs if job in queued), None) if queued else None
    if waiting is not None:
        if status.state in (states.FINISHED, states.FAILED, states.CANCELLED, states.STOPPED):
            return status
        if waiting.state == "PENDING":
            start = f", expected start {waiting.start}" if waiting.start not in ("", "N/A") else ""
            return replace(
                status,
                job=waiting.job,
                reason=f"waits: {waiting.reason or 'in the queue'}{start}",
                left_s=None,
            )
        return replace(status, job=waiting.job, nodes=waiting.nodes or status.nodes)
    if not jobs:
        return status
    status = replace(status, job=status.job or jobs[0])
    if queued is None or (
        status.state in states.ENDED and not (status.state == states.STOPPED and to_be_continued)
    ):
        return status
    job = slurm_client.show_job(jobs[0])  # of another user, or ended not long ago
    if job is not None and job.state in (*slurm_client.ACTIVE, "PENDING", "REQUEUED"):
        return status
    if job is not None and job.state.startswith("CANCELLED"):
        return replace(status, state=states.CANCELLED, reason="cancelled with scancel")
    if status.state == states.STOPPED:
        return replace(
            status, reason=f"{status.reason}; it saved, but no job is there to go on: submit it again"
        )
    how = f"ended as {job.state}" if job is not None else "is not in the queue any more"
    return replace(status, state=DEAD, reason=f"job {jobs[0]} {how}; the run left no word", left_s=None)


def _search(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / mark).is_file() for mark in MARKS):
        yield folder
    if depth > 0:
        try:
            children = sorted(folder.iterdir())
        except OSError:
            return  # another user's, or gone meanwhile
        for child in children:
            if child.is_dir() and child.name not in SKIPPED and not child.name.startswith("."):
                yield from _search(child, depth - 1)


def _told(state: State, end: End | None) -> tuple[str, str] | None:
    """State and reason as the run itself tells them; None where it does not."""
    known, reason = state.get("state"), state.get("reason") or ""
    if known:
        # Earlier versions wrote `finished` of every end at the last step.
        if known == states.FINISHED and code_of_reason(reason) is ExitCode.CRASH:
            known = states.FAILED
        return known, reason
    return None if end is None else (ending(end.exit_code).state, end.reason)


def _state_by_age(folder: Path, now: float) -> str:
    age = _age(folder / "metrics.jsonl", now)
    if age is None:
        return "new"
    return states.RUNNING if age < SILENT_SECONDS else DEAD


def _checkpoint_age(folder: Path, step: int | None, now: float) -> float | None:
    return None if step is None else _age(folder / "checkpoints" / step_folder(step) / MANIFEST, now)


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _mean(values: list[float]) -> float | None:
    numbers = [value for value in values if math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else None
