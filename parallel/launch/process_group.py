"""From a rank to a process group that PyTorch, Megatron-core and DeepSpeed use."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

from parallel.launch.host import threads_per_process
from parallel.launch.ranks import RankInfo
from parallel.launch.rendezvous import LOOPBACK, meet

if TYPE_CHECKING:
    from torch.distributed import Store


def has_gpu() -> bool:
    """Whether CUDA works here."""
    import torch

    return torch.cuda.is_available()


def has_own_store() -> bool:
    """Whether the launcher has a store for its ranks, as torchrun does. It has no gate."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(info: RankInfo, timeout_minutes: float, secret: str = "") -> Store:
    """Joins the processes' common store of small texts.

    It is all that exists before the process group, so that a sick GPU or network cannot hang it.
    secret: what all ranks know and nobody else;
    not used by a process alone, nor with a store of the launcher's.
    Sets the environment that DeepSpeed reads.
    Raises RendezvousError as `meet` does.
    """
    os.environ.update(
        RANK=str(info.rank),
        WORLD_SIZE=str(info.world_size),
        LOCAL_RANK=str(info.local_rank),
        LOCAL_WORLD_SIZE=str(info.local_world_size),
        MASTER_ADDR=info.master_addr,
        MASTER_PORT=str(info.master_port),
    )
    if info.master_addr in LOOPBACK and _has_loopback():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else's machine need reach its sockets
    from torch.distributed import HashStore, rendezvous

    if info.world_size == 1:
        return HashStore()
    if has_own_store():
        limit = timedelta(minutes=timeout_minutes)
        store, _, _ = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        return store  # type: ignore[no-any-return]
    return meet(info, secret, timeout_minutes)


def init_process_group(info: RankInfo, timeout_minutes: float, store: Store) -> None:
    """Joins the processes: NCCL with GPUs, gloo without.

    Raises RuntimeError when the others do not come.
    """
    gpu = has_gpu()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    if gpu:
        torch.cuda.set_device(info.local_rank % torch.cuda.device_count())
        # Where a task sees its own GPU only, DeepSpeed would look for another under the local rank.
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_process(info.local_world_size, os.environ))
    # What the libraries say about themselves on every start and rank is not for our users.
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
        # NCCL takes its memory at the first collective.
        # Otherwise that would be when a first step has filled the GPU.
        # More processes test their network.
        torch.distributed.all_reduce(torch.zeros(1, device="cuda"))


def _has_loopback() -> bool:
    """Whether this machine has the interface `lo`, and it is up."""
    try:
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
        return any(name == "lo" for _, name in socket.if_nameindex())
    except OSError:
        return False
