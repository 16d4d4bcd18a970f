"""Where and with what a run was done: commit, versions, machine, command line.

Cheap to call; imports none of the packages it reports.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "fathom",
    "torch",
    "deepspeed",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "triton",
    "numpy",
    "transformers",
    "datasets",
    "sentencepiece",
    "safetensors",
    "pydantic",
)
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
PREFIXES = ("SLURM_", "NCCL_", "GLOO_", "DS_", "FATHOM_", "CUBLAS_", "NVTE_")
HIDDEN = ("TOKEN", "SECRET", "PASSWORD", "KEY", "JWT")
"""Variables with these words in their names are left out: the file may be shared."""
ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT_FILE = "SNAPSHOT.json"
"""In a copy of the code: where it came from."""


@dataclass(frozen=True)
class CodeCopy:
    """Where the copied code came from."""

    source: str
    """Folder that was copied."""
    commit: str | None
    """HEAD of the checkout; null outside of git."""
    changed: list[str]
    """Files that differ from the commit, new ones included."""
    files: int
    """Number of copied files."""


def read_snapshot(folder: Path) -> CodeCopy | None:
    """What a copy of the code says of itself; None for a folder that is no copy, or whose
    description is damaged.
    """
    try:
        content = json.loads((folder / SNAPSHOT_FILE).read_text(encoding="utf-8"))
        commit, changed = content["commit"], content["changed"]
        if not (commit is None or isinstance(commit, str)) or not isinstance(changed, list):
            return None
        return CodeCopy(
            str(content["source"]), commit, [str(name) for name in changed], int(content["files"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def environment() -> dict[str, Any]:
    """Facts for environment.json, as plain JSON values; what a machine does not tell is null.

    Memory is in bytes.
    Raises nothing of its own.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(sys.orig_argv),
        "folder": os.getcwd(),
        "git": git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "host": socket.gethostname(),
        "cpu": cpu(),
        "gpus": gpus(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if _wanted(name)},
    }


def versions() -> dict[str, str | None]:
    """Versions of the packages that matter to a run; null for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git(folder: Path = ROOT) -> dict[str, Any] | None:
    """The commit of the code in `folder`, and whether files differ from it: {"commit", "dirty"}.

    Of a submitted run's copy of the code: what was copied, wherever the copy lies.
    Of a checkout: HEAD, and whether tracked files differ.
    None without git, and where the checkout around the folder does not hold its files.
    """
    copied = read_snapshot(folder)
    if copied is not None:
        return {"commit": copied.commit, "dirty": bool(copied.changed)} if copied.commit else None
    # An installed package, or any other folder that git ignores, is not of the commit around it.
    if not _output("git", "-C", str(folder), "ls-files", "--", "."):
        return None
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None
    return {
        "commit": commit,
        "dirty": bool(_output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")),
    }


def cpu() -> dict[str, Any]:
    """Model name, cores of the host, cores this process may use, and memory in bytes."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    except OSError:
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = None
    return {"model": model, "cores": os.cpu_count(), "usable_cores": usable, "memory_bytes": memory}


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and driver of each NVIDIA GPU of the host, as nvidia-smi tells; empty
    without it.
    """
    text = (
        _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
        if shutil.which("nvidia-smi")
        else None
    )
    rows = [[part.strip() for part in line.split(",")] for line in (text or "").splitlines()]
    return [
        {"name": row[0], "memory_bytes": int(row[1]) * 2**20 if row[1].isdigit() else None, "driver": row[2]}
        for row in rows
        if len(row) == 3
    ]


def _wanted(name: str) -> bool:
    return (name in VARIABLES or name.startswith(PREFIXES)) and not any(word in name for word in HIDDEN)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
