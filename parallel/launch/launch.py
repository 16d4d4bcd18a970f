"""Who am I: the rank of this process, from whatever started it, and the start of local processes where nothing did."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from model.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class RankInfo:
    """One process among all."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    derived: bool = False
    """Whether the port was computed from a job id, so that another process may have it."""


def rank_from_environment(env: Mapping[str, str]) -> RankInfo | None:
    """The rank that torchrun, deepspeed, srun or our own start gave, or None where nothing did. Raises UserError for a half-set environment."""
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in env]
        if missing:
            raise UserError(
                f"environment: RANK or WORLD_SIZE is set but {', '.join(missing)} is not: start through fathom, torchrun, deepspeed or srun, or unset them"
            )
        return RankInfo(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", "0")),
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
        )
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        from parallel.launch.slurm import slurm_environment

        info = slurm_environment(env)
        if info is not None:
            return RankInfo(
                info.rank, info.world_size, info.local_rank, info.master_addr, info.master_port, derived=True
            )
    return None


def has_gpu() -> bool:
    """Whether CUDA works here."""
    import torch

    return torch.cuda.is_available()


def open_store(info: RankInfo, timeout_minutes: float) -> Store:
    """Joins the processes' common store of small texts, all that exists before the process group, so that a sick GPU or network cannot hang it.

    Sets the environment that DeepSpeed reads. Raises RuntimeError when the port is taken or the others do not come in time.
    """
    os.environ.update(
        RANK=str(info.rank),
        WORLD_SIZE=str(info.world_size),
        LOCAL_RANK=str(info.local_rank),
        MASTER_ADDR=info.master_addr,
        MASTER_PORT=str(info.master_port),
    )
    from torch.distributed import rendezvous

    if info.derived and info.rank == 0:
        from parallel.launch.slurm import check_port

        check_port(info.master_addr, info.master_port)
    # The launcher's own store, where it has one (torchrun).
    store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))
    store.set_timeout(timedelta(minutes=timeout_minutes))
    return store  # type: ignore[no-any-return]


def init_process_group(info: RankInfo, timeout_minutes: float, store: Store | None = None) -> None:
    """Joins the processes: NCCL with GPUs, gloo without. Sets the environment DeepSpeed reads. Raises RuntimeError when the others do not come."""
    store = store or open_store(info, timeout_minutes)
    gpu = has_gpu()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    if gpu:
        torch.cuda.set_device(info.local_rank % torch.cuda.device_count())
        # Where a task sees its own GPU only, DeepSpeed would look for another one under the local rank.
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", info.world_size))))
        )
    # What the libraries say about themselves on every start and every rank is not for users of this one.
    for module in ("megatron", "deepspeed", "torch.distributed"):
        warnings.filterwarnings("ignore", module=module.replace(".", r"\."))
    from parallel.launch.startup import load_libraries

    load_libraries()  # before `enable`, which changes loaded modules
    if not gpu:
        from parallel.launch import cpu

        cpu.enable()
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo",
        store=torch.distributed.PrefixStore("group", store),
        rank=info.rank,
        world_size=info.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    if gpu and info.world_size == 1:
        # NCCL takes its memory at the first collective, which would otherwise be when a first step has filled the GPU. More processes test their network.
        torch.distributed.all_reduce(torch.zeros(1, device="cuda"))


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with reserve_port() as holder:
        return int(holder.getsockname()[1])


def reserve_port() -> socket.socket:
    """A socket that holds a free TCP port until it is closed: nobody is given it, but a server that asks for it by number may listen on it.

    Ranks take seconds to load their libraries before one of them listens, and a port that was merely free would be given away meanwhile.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask a run to save and leave. SIGHUP is none where it is ignored: under nohup a run outlives its terminal."""
    return tuple(
        number
        for number in FORWARDED
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


def leave_terminal() -> None:
    """Sends what this process still says at its terminal nowhere: every write to a terminal that is gone is an error, and would end it before it saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # os.isatty does not know a terminal that is gone
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def start_local(arguments: Sequence[str], processes: int) -> int:
    """Runs `python arguments...` as local ranks; returns the first non-zero exit code, or 0.

    Signals for a clean stop are passed on to every rank. When a rank fails, the others get a moment to notice and are then ended.
    """
    holder = reserve_port()
    port = holder.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    ranks: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGHUP:
            leave_terminal()
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        for index in range(processes):
            env = dict(
                os.environ,
                RANK=str(index),
                LOCAL_RANK=str(index),
                WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes),
            )
            env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            env.setdefault("OMP_NUM_THREADS", threads)
            # A session of its own: a terminal's ctrl-C reaches a rank once, through us.
            ranks.append(subprocess.Popen([sys.executable, *arguments], env=env, start_new_session=True))
        return _wait(ranks, received)
    finally:
        holder.close()
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], received: Collection[int]) -> int:
    failed_at: float | None = None
    code, said = 0, False
    while None in (codes := [rank.poll() for rank in ranks]):
        said = said or _say_killed(codes, received)
        if code == 0 and any(codes):
            code, failed_at = next(one for one in codes if one), time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            said = True  # the signals from here on are ours
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(0.05)
    if not said:
        _say_killed([rank.returncode for rank in ranks], received)
    code = code or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return 128 - code if code < 0 else code


def _say_killed(codes: Sequence[int | None], received: Collection[int]) -> bool:
    """Names the first rank that a signal nobody asked for has ended, as it could not do so itself. Returns whether there is one."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and -code not in received:
            known = -code in set(signal.Signals)
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            print(
                f"fathom: error: rank {rank} was ended by {signal.Signals(-code).name if known else f'signal {-code}'}{hint}",
                file=sys.stderr,
                flush=True,
            )
            return True
    return False
