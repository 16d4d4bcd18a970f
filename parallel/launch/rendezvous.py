"""The meeting of the ranks: who knows the run's secret comes in, then the door is closed.

PyTorch's store asks nobody who he is.
Whoever reaches its port can list, read, set and delete all keys, and take a rank's place.
So rank 0 first listens at a gate (`gate.py`).
When all ranks are there, they connect to a store at a port that only they are told.
Then its listening socket is closed: nobody else can connect any more.
Should anybody have slipped in between, there is one connection or one key too many,
and the start ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.launch.gate import COME_IN, Gate, RendezvousError, StrangerError, knock, read_exactly
from parallel.launch.ranks import RankInfo

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that mean this machine on every machine."""
CONNECT_SECONDS = 60.0
"""How long a rank may take to connect to the store."""


def meet(info: RankInfo, secret: str, minutes: float) -> TCPStore:
    """The store of a run's ranks, when all of them are there.

    Raises RendezvousError for a port that is taken and for ranks that do not come in time,
    StrangerError where secrets differ.
    """
    key, end = secret.encode(), time.monotonic() + 60 * minutes
    if info.rank:
        return _come(info, key, minutes, end)
    with _listen(info) as listener, Gate(listener, key, info.world_size) as gate:
        guests = gate.wait(end)
        late = next((rank for rank in range(1, info.world_size) if rank not in guests), None)
        if late is not None:
            raise RendezvousError(
                f"rank {late} did not come within {minutes:g} minutes (parallel.timeout_minutes): "
                "see the log of its node"
            )
        return _receive(listener.getsockname()[0], guests, minutes)


def _listen(info: RankInfo) -> socket.socket:
    """The gate's socket: handed down, or opened at the port that all ranks know.

    At an address that means this machine, it is open to this machine alone.
    """
    if info.gate is not None:
        gate = socket.socket(fileno=info.gate)
        gate.set_inheritable(False)
        return gate
    host = {"localhost": "127.0.0.1"}.get(info.master_addr, info.master_addr)
    try:
        return _bind(host if info.master_addr in LOOPBACK else "", info.master_port)
    except OSError as error:
        why, advice = "", "MASTER_PORT sets another one"
        if info.derived:
            why = ", which follows from job id and restart count,"
            advice = "a restart takes another one, and FATHOM_MASTER_PORT sets one"
        raise RendezvousError(
            f"port {info.master_port} on {info.master_addr}{why} is not to be had ({error.strerror}): "
            f"{advice}"
        ) from None


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket: at one address, or at all that this machine has."""
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=both)


def _receive(here: str, guests: Mapping[int, socket.socket], minutes: float) -> TCPStore:
    """Opens the store, lets the guests connect, closes its door and counts.

    here: the gate's address.
    """
    from torch.distributed import TCPStore

    everywhere = here in ("0.0.0.0", "::")
    door = _bind("" if everywhere else here, 0)
    port, number = door.getsockname()[1], door.detach()  # the store's from here on
    address, limit = "127.0.0.1" if everywhere else here, timedelta(minutes=minutes)
    store = TCPStore(address, port, None, True, limit, wait_for_workers=False, master_listen_fd=number)
    for guest in guests.values():
        guest.settimeout(CONNECT_SECONDS)
        with contextlib.suppress(OSError):  # told below
            guest.sendall(struct.pack("!H", port))
    for rank, guest in guests.items():
        with contextlib.suppress(OSError):
            if read_exactly(guest, 1) == COME_IN:
                continue
        raise RendezvousError(f"rank {rank} left before all ranks were there: see the log of its node")
    _close_door(number)
    strangers = (_connections(port) or 1 + len(guests)) - 1 - len(guests)
    if strangers or store.num_keys():
        raise StrangerError(
            "somebody from outside of the run has connected to the ranks' store: start again, "
            "and close the ports of the nodes to others (docs/slurm.md)"
        )
    for guest in guests.values():
        with contextlib.suppress(OSError):  # a rank that has left now is missed soon
            guest.sendall(COME_IN)
    return store


def _close_door(number: int) -> None:
    """Closes a listening socket that another library watches.

    A file takes its place, at which nobody ever comes.
    """
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, number, inheritable=False)
    os.close(nothing)


def _connections(port: int) -> int | None:
    """Connections that this process has accepted at one of its ports.

    None where the system does not tell.
    """
    count = 0
    try:
        numbers = os.listdir("/proc/self/fd")
    except OSError:
        return None
    for name in numbers:
        with contextlib.suppress(OSError):
            if os.readlink(Path("/proc/self/fd", name)).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    one.getpeername()  # raises for what is not connected
                    inet = one.family in (socket.AF_INET, socket.AF_INET6)
                    count += inet and one.getsockname()[1] == port
    return count


def _come(info: RankInfo, key: bytes, minutes: float, end: float) -> TCPStore:
    """The part of every other rank."""
    from torch.distributed import TCPStore

    where = f"{info.master_addr}:{info.master_port}"
    with knock(info, key, end) as gate:
        gate.settimeout(max(0.0, end - time.monotonic()) + 2 * CONNECT_SECONDS)
        try:
            (port,) = struct.unpack("!H", read_exactly(gate, 2))
            address, limit = gate.getpeername()[0], timedelta(minutes=minutes)
            store = TCPStore(address, port, None, False, limit, wait_for_workers=False)
            gate.sendall(COME_IN)
            read_exactly(gate, 1)
        except TimeoutError:
            raise RendezvousError(
                f"the ranks did not come together at {where} within {minutes:g} minutes "
                "(parallel.timeout_minutes): see the log of rank 0"
            ) from None
        except OSError:
            raise RendezvousError(
                f"rank 0 at {where} left before all ranks were there: see its log"
            ) from None
    return store
