"""Slurm's client commands as functions: what a job is doing, the queue, submit, requeue."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from model.errors import UserError
from model.words import printable

CLIENT_SECONDS = 60.0
"""Longer than slurmctld's own message time-out with its retries, so that a slow controller is not
taken for a missing one.
"""

FOR_SHOW = ("SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN", "SCONTROL_", "SQUEUE_")
"""Beginnings of variables by which users choose what Slurm's clients show, and in which form."""

ACTIVE = ("RUNNING", "CONFIGURING", "SUSPENDED", "COMPLETING", "STOPPED")
"""States of a job that holds nodes."""


@dataclass(frozen=True)
class Job:
    """What slurmctld says about one job."""

    state: str
    reason: str = ""
    restarts: int = 0
    """Counts a requeue as soon as it is decided."""
    end_time: float | None = None
    """Seconds since 1970."""
    preempted: bool = False
    nodes: str = ""


@dataclass(frozen=True)
class Queued:
    """One line of squeue."""

    job: str
    state: str
    reason: str
    start: str
    """Expected or actual start, as squeue prints it."""
    nodes: str


def job_handle(env: Mapping[str, str]) -> str | None:
    """The name under which Slurm's commands know this job alone; None outside of a job.

    For an array element that is ARRAY_INDEX: the plain id of one element equals that of the whole
    array, and a requeue of it would requeue all.
    """
    if env.get("SLURM_ARRAY_JOB_ID") and env.get("SLURM_ARRAY_TASK_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID") or None


def parse_job(text: str) -> Job | None:
    """Reads one line of `scontrol show job -o`; None where it is no job."""
    fields = dict(re.findall(r"(?:^|\s)(\w[\w/]*)=(\S*)", text))
    if "JobState" not in fields:
        return None
    return Job(
        state=fields["JobState"],
        reason="" if fields.get("Reason") in (None, "None") else fields["Reason"],
        restarts=int(fields.get("Restarts", "0")),
        end_time=_seconds(fields.get("EndTime", "")),
        preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
    )


def show_job(handle: str) -> Job | None:
    """What slurmctld knows about a job; None where scontrol is missing, does not answer in time, or
    the job is forgotten.
    """
    answer = _call("scontrol", "show", "job", "-o", handle)
    return (
        parse_job(answer.stdout.partition("\n")[0]) if answer is not None and answer.returncode == 0 else None
    )


def requeue(handle: str, hold: bool = False) -> str | None:
    """Puts a running or timed-out job back into the queue. hold: not to start before `release`.

    Returns Slurm's refusal, or None when it was accepted.
    """
    return _refusal("scontrol", "requeuehold" if hold else "requeue", handle)


def exclude_nodes(handle: str, nodes: Sequence[str]) -> str | None:
    """Keeps a waiting job off some nodes. Returns Slurm's refusal, or None when it was accepted."""
    return _refusal("scontrol", "update", f"JobId={handle}", f"ExcNodeList={','.join(nodes)}")


def release(handle: str) -> str | None:
    """Lets a held job start. Returns Slurm's refusal, or None when it was accepted."""
    return _refusal("scontrol", "release", handle)


def _refusal(*command: str) -> str | None:
    answer = _call(*command)
    if answer is None:
        return "scontrol is missing or slurmctld does not answer"
    return (
        None
        if answer.returncode == 0
        else (answer.stderr.strip() or f"{' '.join(command)} ended with {answer.returncode}")
    )


def queue() -> dict[str, Queued] | None:
    """All jobs of this user that have not ended, by handle; None where squeue is missing or does
    not answer.
    """
    answer = _call("squeue", "--noheader", "--me", "--array", "--format=%i|%T|%r|%S|%N")
    if answer is None or answer.returncode != 0:
        return None
    rows = (line.split("|", 4) for line in answer.stdout.splitlines() if line.count("|") >= 4)
    return {
        row[0]: Queued(row[0], row[1], "" if row[2] == "None" else row[2], row[3], row[4]) for row in rows
    }


def sbatch(arguments: Sequence[str]) -> str:
    """Submits and returns the job id.

    Raises UserError with Slurm's own words when it refuses, and when there is no sbatch here.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not installed on this machine: submit from a login node of the cluster, "
            "or use --dry-run to see the script"
        )
    answer = _call("sbatch", "--parsable", *arguments)
    if answer is None:
        raise UserError(
            f"sbatch did not answer within {CLIENT_SECONDS:.0f} s: check `sinfo`, "
            "and `squeue --me` before trying again"
        )
    if answer.returncode != 0:
        words = " ".join(
            line.removeprefix("sbatch: ").removeprefix("error: ")
            for line in answer.stderr.strip().splitlines()
        )
        raise UserError(f"Slurm refused the job: {words or 'no reason given'}")
    job = (answer.stdout.strip().splitlines() or [""])[-1].partition(";")[0]
    if not re.fullmatch(r"[0-9]+", job):
        raise UserError(
            f"sbatch answered {printable(job)!r} in place of the number of a job: "
            "look for it with `squeue --me`"
        )
    return job


def _call(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Runs a client. What it prints is read by machine, whatever the user likes to be shown."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOR_SHOW)} | {
        "LC_ALL": "C"
    }
    if command[0] == "sbatch":  # which hands its environment on to the job
        env = dict(os.environ)
    try:
        return subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CLIENT_SECONDS,
            env=env,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
