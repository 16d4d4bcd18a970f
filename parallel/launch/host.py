"""What this machine has for the processes of a run: cores and memory."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from model.errors import UserError

PER_CORE, LEAST = 8, 16
"""Processes that may share a core, and how many any machine may have.

More is no training.
But layouts are tried out on laptops, where 16 processes of a small model share two cores.
"""
PROCESS_BYTES = 256 << 20
"""Of one process that has loaded its libraries and no model yet; measured, 270 MiB."""
CGROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that this process may use.

    Those it is bound to, or fewer where a container's share is smaller.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [bound]
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            quota, period = (group / "cpu.max").read_text().split()
            shares.append(max(1, math.ceil(int(quota) / int(period))))
    return min(shares)


def threads_per_process(local_processes: int, env: Mapping[str, str]) -> int:
    """Threads for each of the processes that share this machine.

    Where Slurm gives every task cores of its own, they are not shared.
    """
    own = env.get("SLURM_CPUS_PER_TASK", "")
    if own.isascii() and own.isdecimal():
        return max(1, min(cores(), int(own)))
    return max(1, cores() // max(1, local_processes))


def same_code() -> dict[str, str]:
    """Variables with which `python -m` finds what this process imports.

    Without them it looks into the working folder first, where a user's `model.py` may lie.
    Python 3.10 looks there all the same: it does not know the second one.
    """
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}


def free_memory() -> int | None:
    """Bytes that new processes can have here; None where that is not told.

    By what the machine and its containers' limits leave.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            found.append(max(0, limit - used))
    return min(found, default=None)


def check_processes(processes: int, gpus: int) -> None:
    """Raises UserError for more local processes than this machine can run.

    gpus: of this machine, 0 without.
    """
    if gpus and processes > gpus:
        raise UserError(
            f"parallel.processes={processes}: this machine has {gpus} GPUs, and each process needs its own: "
            f"set parallel.processes={gpus} or less"
        )
    most = max(LEAST, PER_CORE * cores())
    if processes > most:
        raise UserError(
            f"parallel.processes={processes} is too much for this machine: "
            f"its {cores()} cores take up to {most} processes. Lower it, "
            "or start the run on more machines (fathom submit)"
        )
    free = free_memory()
    if free is not None and processes * PROCESS_BYTES > free:
        raise UserError(
            f"parallel.processes={processes} needs {processes * PROCESS_BYTES / 2**30:.1f} GiB before there "
            f"is a model, {free / 2**30:.1f} GiB of memory are free: lower it"
        )


def _cgroups() -> Iterator[Path]:
    """The control groups that this process is in, innermost first. Version 2 only."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                inner = CGROUPS / line[3:].lstrip("/")
                yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(CGROUPS))
