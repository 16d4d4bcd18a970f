"""How runs are doing, from the files they leave and from Slurm's queue; works for runs that train, wait, or died without a word."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from model.errors import UserError
from parallel.checkpoint.folders import MANIFEST, step_folder
from parallel.launch import slurm_client
from parallel.launch.exit_codes import ExitCode
from parallel.launch.slurm_client import Queued
from pretrain.rundir import state as states

MARKS = (states.STATE_FILE, "metrics.jsonl", "config.yaml")
SKIPPED = frozenset({"code", "checkpoints", "tensorboard", "hf", "control"})
DEPTH = 3
RECENT_STEPS = 20
SILENT_SECONDS, SILENT_STEPS = 300.0, 20
"""A run that trains is called silent after this long without a step, or after this many of its steps, whichever is longer."""

DEAD, LOCAL_END = "dead", {"finished": states.FINISHED, "not_finite": states.FAILED}


@dataclass(frozen=True)
class RunStatus:
    """One run. loss: nats per token; left_s: seconds to the last step at the present speed; checkpoint_age_s: seconds; unknown numbers are None."""

    name: str
    folder: str
    state: str
    reason: str = ""
    step: int = 0
    total: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None
    restarts: int = 0
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    job: str | None = None
    nodes: str = ""


def find_runs(path: Path) -> list[Path]:
    """Run directories at or below a folder, oldest name first. Raises UserError where the folder does not exist or holds none."""
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist: give a run directory or the folder of several (runs_dir of the configuration)"
        )
    runs = sorted(_search(path, DEPTH))
    if not runs:
        raise UserError(f"no run in {path}: a run directory holds {' or '.join(MARKS)}")
    return runs


def collect(path: Path) -> list[RunStatus]:
    """The state of all runs at or below a folder. Raises as `find_runs`; a run with damaged files is shown as such."""
    queued = slurm_client.queue()
    statuses = []
    for folder in find_runs(path):
        try:
            statuses.append(run_status(folder, queued))
        except UserError as error:
            statuses.append(RunStatus(folder.name, str(folder), "damaged", str(error)))
    return statuses


def run_status(folder: Path, queued: Mapping[str, Queued] | None, now: float | None = None) -> RunStatus:
    """The state of one run. queued: this user's jobs, None where there is no Slurm; now: seconds since 1970."""
    now = time.time() if now is None else now
    state, submitted, recent = (
        states.read_state(folder),
        states.read_submitted(folder),
        last_events(folder / "metrics.jsonl"),
    )
    train, end = recent["train"], recent["end"]
    step = int(train[-1]["step"]) if train else int(state.get("step") or 0)
    total = _total_steps(folder)
    step_time = _mean([event.get("step_time_s") for event in train])
    checkpoint = states.latest_step(folder)
    status = RunStatus(
        name=folder.name,
        folder=str(folder),
        state=str(state.get("state") or _state_without_file(end, folder, now)),
        reason=str(state.get("reason") or ""),
        step=step,
        total=total,
        loss=_number(train[-1].get("loss")) if train else None,
        tokens_per_s=_mean([event.get("tokens_per_s") for event in train]),
        left_s=max(0, total - step) * step_time if total is not None and step_time is not None else None,
        restarts=int(state.get("restarts") or 0),
        checkpoint_step=checkpoint,
        checkpoint_age_s=None
        if checkpoint is None
        else _age(folder / "checkpoints" / step_folder(checkpoint) / MANIFEST, now),
        job=state.get("job_id"),
        nodes=str(state.get("nodes") or ""),
    )
    jobs = [str(job) for job in (status.job, *submitted.get("jobs", [])) if job is not None]
    status = _with_job(status, jobs, queued, to_be_continued=state.get("exit_code") == ExitCode.STOPPED)
    if status.state == states.RUNNING:
        if status.job is None and state.get("host") == socket.gethostname() and not _alive(state.get("pid")):
            return replace(
                status, state=DEAD, reason=f"process {state.get('pid')} is gone; it left no word", left_s=None
            )
        silent = _age(folder / "metrics.jsonl", now)
        if silent is not None and silent > max(SILENT_SECONDS, SILENT_STEPS * (step_time or 0)):
            return replace(status, reason=f"no step for {silent / 60:.0f} min")
    elif status.state not in (states.STARTING, states.REQUEUED):
        status = replace(status, left_s=None)
    return status


def last_events(path: Path, block: int = 1 << 16, limit: int = 1 << 24) -> dict[str, list[dict[str, Any]]]:
    """The newest `train` events and the last `end` after them, read from the end of the file, as it may be large. Half a last line is left out."""
    found: dict[str, list[dict[str, Any]]] = {"train": [], "end": []}
    for line in _lines_backwards(path, block, limit):
        # Lines of per-layer signals are long, and not needed here.
        if b'"train"' not in line[:40] and b'"end"' not in line[:40] and b'"start"' not in line[:40]:
            continue
        try:
            event = json.loads(line)
        except ValueError:
            continue
        kind = event.get("event")
        if kind == "end" and not found["train"]:
            found["end"].append(event)
        elif kind == "train":
            found["train"].insert(0, event)
        if len(found["train"]) >= RECENT_STEPS or (kind == "start" and found["train"]):
            break
    return found


def _with_job(
    status: RunStatus, jobs: list[str], queued: Mapping[str, Queued] | None, to_be_continued: bool = False
) -> RunStatus:
    """What the queue adds: why a job waits, and that a run which says `running`, or stopped to be continued, has no job any more."""
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
        for child in folder.iterdir():
            if child.is_dir() and child.name not in SKIPPED and not child.name.startswith("."):
                yield from _search(child, depth - 1)


def _lines_backwards(path: Path, block: int, limit: int) -> Iterator[bytes]:
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        first, rest = max(0, end - limit), b""
        while end > first:
            begin = max(first, end - block)
            file.seek(begin)
            lines = (file.read(end - begin) + rest).split(b"\n")
            end, rest = begin, lines[0]
            yield from reversed(lines[1:])
        if first == 0:
            yield rest


def _total_steps(folder: Path) -> int | None:
    try:
        train = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["train"]
        return min(int(train["steps"]), int(train.get("stop_at_step") or train["steps"]))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _state_without_file(end: list[dict[str, Any]], folder: Path, now: float) -> str:
    if end:
        return LOCAL_END.get(str(end[0].get("reason")), states.STOPPED)
    age = _age(folder / "metrics.jsonl", now)
    if age is None:
        return "new"
    return states.RUNNING if age < SILENT_SECONDS else DEAD


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: list[object]) -> float | None:
    numbers = [number for number in map(_number, values) if number is not None]
    return sum(numbers) / len(numbers) if numbers else None
