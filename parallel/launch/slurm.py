"""Ranks and the meeting point of a job, from the environment of the tasks of `srun`."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import UserError

FIRST_PORT, PORTS = 20_000, 10_000
"""Below the range Linux hands out to outgoing connections (32768 and up), and above the well-known
services.
"""

_LARGEST_STEP = 4_000_000_000
"""Slurm numbers its special steps (batch, extern, interactive) just below 2^32; tasks of srun count
from 0.
"""


@dataclass(frozen=True)
class SlurmTask:
    """One task of a job step."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Tasks on this task's node."""
    node_rank: int
    num_nodes: int
    master_addr: str
    master_port: int
    job_id: int
    restart_count: int
    """How often Slurm started this job again."""


def slurm_environment(env: Mapping[str, str]) -> SlurmTask | None:
    """Reads rank, sizes and meeting point of this task; None where this process is no task of srun.

    A batch script, an `salloc` shell and `srun --pty` are no tasks: the variables are set there
    too, but describe a job that nobody launched.
    FATHOM_MASTER_ADDR and FATHOM_MASTER_PORT win over what is derived.
    Raises UserError for a variable that is missing or no number, and for a first node that has no
    usable address.
    """
    if "SLURM_PROCID" not in env or "SLURM_PTY_PORT" in env or "SLURM_STEP_ID" not in env:
        return None
    if _number(env, "SLURM_STEP_ID") >= _LARGEST_STEP:
        return None
    job_id = _number(env, "SLURM_JOB_ID")
    restart_count = _number(env, "SLURM_RESTART_COUNT") if env.get("SLURM_RESTART_COUNT") else 0
    world_size, node_rank = _number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), _number(env, "SLURM_NODEID")
    tasks = expand_counts(_text(env, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if sum(tasks) != world_size or node_rank >= len(tasks):
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={_text(env, 'SLURM_STEP_TASKS_PER_NODE', 'SLURM_TASKS_PER_NODE')} "
            f"does not fit {world_size} tasks: start with srun"
        )
    return SlurmTask(
        rank=_number(env, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_world_size=tasks[node_rank],
        node_rank=node_rank,
        num_nodes=len(tasks),
        master_addr=env.get("FATHOM_MASTER_ADDR") or master_address(env),
        master_port=_number(env, "FATHOM_MASTER_PORT")
        if env.get("FATHOM_MASTER_PORT")
        else master_port(job_id, restart_count),
        job_id=job_id,
        restart_count=restart_count,
    )


def master_port(job_id: int, restart_count: int) -> int:
    """The port rank 0 listens on: every task computes the same one, jobs that share a node and
    restarts of one job get different ones.
    """
    return FIRST_PORT + (job_id * 37 + restart_count * 1009) % PORTS


def expand_hosts(text: str) -> list[str]:
    """Node names of a Slurm host list such as `gpu[01-03,7],login1` or `rack[1-2]n[0-1]`, in order,
    zero padding kept.

    Raises UserError for text that is no host list.
    """
    names: list[str] = []
    for part in _split_outside_brackets(text):
        names.extend(_expand_part(part, text))
    if not names:
        raise UserError(f"SLURM_JOB_NODELIST={text!r} names no node")
    return names


def expand_counts(text: str) -> list[int]:
    """Numbers of a repeat list: `2(x3),1` is [2, 2, 2, 1]. Raises UserError for anything else."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part.strip())
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={text!r} is not of the form 2(x3),1")
        counts.extend([int(match[1])] * int(match[2] or 1))
    return counts


def master_address(env: Mapping[str, str]) -> str:
    """An address of the step's first node that this host can use.

    The node's name where it resolves; else the address Slurm itself uses for it (`scontrol show
    node`); else the host of srun, which in a batch job is the first node. Raises UserError where
    none of them is known.
    """
    first = expand_hosts(_text(env, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))[0]
    address = first if resolves(first) else node_address(first)
    if address is None:
        launch = env.get("SLURM_LAUNCH_NODE_IPADDR", "")
        address = launch if launch and resolves(launch) else None
    if address is None:
        raise UserError(
            f"the name of the first node, {first}, does not resolve on "
            f"{env.get('SLURMD_NODENAME', socket.gethostname())} and `scontrol show node` gives no usable "
            "address for it: export FATHOM_MASTER_ADDR in the `setup` lines of the site file"
        )
    return address


def resolves(name: str) -> bool:
    """Whether the resolver of this host knows the name or it is an address."""
    try:
        return bool(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
    except OSError:
        return False


def node_address(node: str) -> str | None:
    """NodeAddr of a node as slurmctld has it, where scontrol is there, knows it and the address can
    be used here.
    """
    try:
        answer = subprocess.run(
            ["scontrol", "show", "node", "-o", node], check=False, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return match[1] if answer.returncode == 0 and match and resolves(match[1]) else None


def _text(env: Mapping[str, str], *keys: str) -> str:
    for key in keys:
        if env.get(key):
            return env[key]
    raise UserError(f"{keys[-1]} is not set although SLURM_PROCID is: start the tasks with srun")


def _number(env: Mapping[str, str], *keys: str) -> int:
    text = _text(env, *keys)
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError(f"{keys[-1]}={text!r} must be a whole number")
    return int(text)


def _split_outside_brackets(text: str) -> list[str]:
    return [part for part in re.split(r",(?![^\[\]]*\])", text.strip()) if part]


def _expand_part(part: str, whole: str) -> list[str]:
    names = [""]
    for fixed, group in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
        names = [
            name + choice for name in names for choice in ([fixed] if fixed else _expand_group(group, whole))
        ]
    if part.count("[") != part.count("]") or not re.fullmatch(r"(?:[^\[\]]+|\[[^\[\]]+\])+", part):
        raise UserError(f"SLURM_JOB_NODELIST={whole!r} is not a Slurm host list")
    return names


def _expand_group(group: str, whole: str) -> list[str]:
    choices: list[str] = []
    for item in group.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", item)
        if match is None:
            raise UserError(
                f"SLURM_JOB_NODELIST={whole!r} is not a Slurm host list: {item!r} is no number or range"
            )
        first, last = match[1], match[2] or match[1]
        choices.extend(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return choices
