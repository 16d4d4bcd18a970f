"""Where and with what a run was done: commit, versions, machine, command line.

Cheap to call; imports none of the packages it reports.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TypedDict

from model import __version__
from model.errors import UserError
from pretrain.rundir.git import git_output

PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "triton",
    "liger-kernel",
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
GIT_S = 20.0
"""Longest time that one question to git takes."""
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


def environment() -> dict[str, object]:
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
    """Versions of Fathom and of the packages that matter to a run.

    Null for one that is not installed.
    """
    found: dict[str, str | None] = {"fathom": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


class Commit(TypedDict):
    """Which code it was."""

    commit: str
    dirty: bool
    """Whether files differ from the commit."""


def git(folder: Path = ROOT) -> Commit | None:
    """The commit of the code in `folder`.

    Of a submitted run's copy of the code: what was copied, wherever the copy lies.
    Of a checkout: HEAD, and whether tracked files differ.
    None without git, where git does not want to read the folder, and where the checkout around it
    does not hold its files.
    """
    copied = read_snapshot(folder)
    if copied is not None:
        return Commit(commit=copied.commit, dirty=bool(copied.changed)) if copied.commit else None
    try:
        # An installed package, or any other folder that git ignores, is not of the commit around
        # it.
        if not git_output(folder, "ls-files", "--", ".", timeout_s=GIT_S):
            return None
        commit = git_output(folder, "rev-parse", "HEAD", timeout_s=GIT_S)
        changes = git_output(folder, "status", "--porcelain", "--untracked-files=no", timeout_s=GIT_S)
    except UserError:
        return None
    return Commit(commit=commit.strip(), dirty=bool(changes)) if commit is not None else None


class Cpu(TypedDict):
    """The processors of this host."""

    model: str
    cores: int | None
    usable_cores: int
    """Those that this process may use."""
    memory_bytes: int | None


class Gpu(TypedDict):
    """One NVIDIA GPU of this host."""

    name: str
    memory_bytes: int | None
    driver: str


def cpu() -> Cpu:
    """The processors of this host, as far as it tells."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    except OSError:
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = None
    return {"model": model, "cores": os.cpu_count(), "usable_cores": usable, "memory_bytes": memory}


def gpus() -> list[Gpu]:
    """Each NVIDIA GPU of the host, as nvidia-smi tells; empty without it."""
    rows = [[part.strip() for part in line.split(",")] for line in _nvidia_smi().splitlines()]
    return [
        {"name": row[0], "memory_bytes": int(row[1]) * 2**20 if row[1].isdigit() else None, "driver": row[2]}
        for row in rows
        if len(row) == 3
    ]


def _wanted(name: str) -> bool:
    return (name in VARIABLES or name.startswith(PREFIXES)) and not any(word in name for word in HIDDEN)


def _nvidia_smi() -> str:
    command = (
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader,nounits",
    )
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
