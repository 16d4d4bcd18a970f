"""Who am I: the rank of this process, from whatever started it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import UserError
from model.words import printable

GATE_VARIABLE = "FATHOM_GATE"
"""Number of the open socket that our own start hands to rank 0."""


@dataclass(frozen=True)
class RankInfo:
    """One process among all."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    local_world_size: int = 1
    """Processes on this process's node."""
    derived: bool = False
    """Whether the port was computed from a job id, so that another process may have it."""
    gate: int | None = None
    """A socket that listens at the master's port already, of rank 0 where our own start made it."""


ALONE = RankInfo(0, 1, 0, "127.0.0.1", 29500)
"""A process that is a world of its own."""


def rank_from_environment(env: Mapping[str, str]) -> RankInfo | None:
    """The rank that torchrun, deepspeed, srun or our own start gave, or None where nothing did.

    Raises UserError for an environment that is half set or holds no numbers.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not env.get(key)]
        if missing:
            raise UserError(
                f"environment: RANK or WORLD_SIZE is set but {', '.join(missing)} is not: "
                "start through fathom, torchrun, deepspeed or srun, or unset them"
            )
        world = _number(env, "WORLD_SIZE", 1, 1 << 20)
        local = next((key for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if env.get(key)), "WORLD_SIZE")
        return RankInfo(
            _number(env, "RANK", 0, world - 1),
            world,
            _number(env, "LOCAL_RANK", 0, world - 1) if env.get("LOCAL_RANK") else 0,
            env["MASTER_ADDR"],
            _number(env, "MASTER_PORT", 1, 65535),
            local_world_size=_number(env, local, 1, world),
            gate=_number(env, GATE_VARIABLE, 0, 1 << 20) if env.get(GATE_VARIABLE) else None,
        )
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        from parallel.launch.slurm import slurm_environment

        task = slurm_environment(env) if env.get("SLURM_NTASKS", "1") != "1" else None
        if task is not None:
            return RankInfo(
                task.rank,
                task.world_size,
                task.local_rank,
                task.master_addr,
                task.master_port,
                local_world_size=task.local_world_size,
                derived=not env.get("FATHOM_MASTER_PORT"),
            )
    return None


def _number(env: Mapping[str, str], key: str, least: int, most: int) -> int:
    text = env[key]
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise UserError(
            f"environment: {key}={printable(text, 40)!r} must be a whole number from {least} to {most}"
        )
    return int(text)
