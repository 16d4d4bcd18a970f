"""The meeting of the ranks, and strangers who know its port and would like to take part."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from parallel.launch import gate, rendezvous
from parallel.launch.gate import Gate, RendezvousError, StrangerError, knock
from parallel.launch.local import listen_here, reserve_port
from parallel.launch.ranks import RankInfo
from parallel.launch.rendezvous import meet

SECRET = "known to the ranks"
MINUTES = 2.0


def meeting(world: int, *, handed: bool = True) -> Callable[[int], RankInfo]:
    """Ranks of a start: with an open gate that rank 0 is handed, or a port that it opens itself."""
    opened = listen_here() if handed else reserve_port()
    port = opened.getsockname()[1]
    number = opened.detach()
    return lambda rank: RankInfo(
        rank, world, rank, "127.0.0.1", port, gate=number if handed and rank == 0 else None
    )


def refuses(port: int) -> bool:
    """Whether nobody listens at a port of this machine."""
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("handed", [True, False])
def test_ranks_meet_and_the_door_is_closed(handed: bool) -> None:
    rank = meeting(4, handed=handed)
    with ThreadPoolExecutor(4) as ranks:
        stores: list[TCPStore] = list(ranks.map(lambda one: meet(rank(one), SECRET, MINUTES), range(4)))
    for one, store in enumerate(stores):
        store.set(f"from {one}", str(one))
    assert [stores[(one + 1) % 4].get(f"from {one}") for one in range(4)] == [b"0", b"1", b"2", b"3"]
    assert refuses(stores[0].port)
    if handed:
        assert refuses(rank(0).master_port)


def strangers(info: RankInfo) -> dict[str, Callable[[], object]]:
    """What somebody does who knows everything but the secret.

    Each ends by an error, or is left hanging.
    """
    address = (info.master_addr, info.master_port)

    def silent() -> None:
        opened.append(socket.create_connection(address))

    def garbage() -> None:
        with contextlib.suppress(ConnectionError), socket.create_connection(address) as connection:
            connection.sendall(b"\xff" * 5000)
            while connection.recv(1000):
                pass

    def half() -> None:
        with socket.create_connection(address) as connection:
            connection.recv(32)
            connection.sendall(b"\x00")

    def replayed() -> bytes:
        """The challenge as its own answer."""
        with socket.create_connection(address) as connection:
            challenge = connection.recv(32)
            connection.sendall(bytes(3) + b"\x01" + bytes(3) + b"\x02" + challenge + challenge)
            return connection.recv(1)

    def by_store() -> None:
        """As a rank of PyTorch's would come, in a process of its own."""
        code = (
            "import sys; from datetime import timedelta; from torch.distributed import TCPStore\n"
            "store = TCPStore('127.0.0.1', int(sys.argv[1]), 2, False, timedelta(seconds=3))\n"
            "print(store.list_keys()); store.set('preflight/verdict', '{}')"
        )
        done = subprocess.run([sys.executable, "-c", code, str(address[1])], capture_output=True, text=True)
        assert (done.returncode != 0, done.stdout) == (True, ""), done.stderr

    def by_our_own_code() -> None:
        with pytest.raises(
            StrangerError, match="does not take this process for rank 1: their secrets differ"
        ):
            knock(info, b"guessed", time.monotonic() + 60)

    opened: list[socket.socket] = []
    return {one.__name__: one for one in (silent, garbage, half, replayed, by_store, by_our_own_code)}


def test_strangers_are_refused_and_the_ranks_meet_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "HANDSHAKE_SECONDS", 2.0)
    rank = meeting(2)
    with ThreadPoolExecutor(1) as pool:
        first: Future[TCPStore] = pool.submit(meet, rank(0), SECRET, MINUTES)
        for name, stranger in strangers(rank(1)).items():
            found = stranger()
            assert found in (None, b"-"), name
            assert not first.done(), name
        second = meet(rank(1), SECRET, MINUTES)
        store = first.result()
    assert store.list_keys() == []
    second.set("key", "value")
    assert store.get("key") == b"value"
    said = capsys.readouterr().err
    assert said.count("asked to be one of the ranks without knowing the run's secret: refused") == 1
    assert SECRET not in said


@pytest.mark.parametrize("act", ["connects", "sets a key and leaves"])
def test_who_slips_in_before_the_door_is_closed_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    rank, close = meeting(2), rendezvous._close_door
    inside: list[Any] = []

    def slip_in(number: int) -> None:
        with socket.socket(fileno=number) as door:
            port = door.getsockname()[1]
            door.detach()
        if act == "connects":
            inside.append(
                TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60), wait_for_workers=False)
            )
        else:
            TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60), wait_for_workers=False).set(
                "a", "b"
            )
            time.sleep(0.5)  # until its end is seen
        close(number)

    monkeypatch.setattr(rendezvous, "_close_door", slip_in)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(meet, rank(one), SECRET, MINUTES) for one in range(2)]
        with pytest.raises(StrangerError, match="somebody from outside of the run has connected"):
            both[0].result()
        with pytest.raises(RendezvousError, match="left before all ranks were there"):
            both[1].result()


def test_another_program_at_the_port_learns_nothing() -> None:
    """It cannot even take what it is told to rank 0 and pass for a rank.

    The challenge is its own.
    """
    heard: list[bytes] = []
    with listen_here() as listener, ThreadPoolExecutor(1) as pool:

        def pretend() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(bytes(32))
                heard.append(connection.recv(1000))
                connection.sendall(b"+" + bytes(32))

        pool.submit(pretend)
        info = RankInfo(1, 2, 1, *listener.getsockname())
        with pytest.raises(StrangerError, match="is not rank 0 of this run: another program has the port"):
            meet(info, SECRET, MINUTES)
    assert len(heard[0]) == 8 + 32 + 32
    assert SECRET.encode() not in heard[0]


def test_who_does_not_come_is_named() -> None:
    rank = meeting(4)
    with ThreadPoolExecutor(2) as pool:
        there = pool.submit(meet, rank(1), SECRET, MINUTES)
        with pytest.raises(
            RendezvousError, match=r"rank 2 did not come within 0.05 minutes \(parallel.timeout_minutes\)"
        ):
            meet(rank(0), SECRET, 0.05)
        with pytest.raises(RendezvousError, match="left before all ranks were there: see its log"):
            there.result()
    with pytest.raises(
        RendezvousError, match="rank 0 did not answer at .* in the time of parallel.timeout_minutes"
    ):
        meet(rank(1), SECRET, 0.01)


def test_a_rank_has_one_place_until_it_leaves() -> None:
    info = meeting(3)
    with listen_here() as listener, ThreadPoolExecutor(1) as pool, Gate(listener, b"key", 3) as door:
        port, end = listener.getsockname()[1], time.monotonic() + 60
        ranks = {one: RankInfo(one, 3, one, "127.0.0.1", port) for one in (1, 2)}
        seats = pool.submit(door.wait, end)
        first = knock(ranks[1], b"key", end)
        with pytest.raises(RendezvousError, match="has no place for rank 1 of 3: another process has it"):
            knock(ranks[1], b"key", end)
        with pytest.raises(
            RendezvousError, match="has no place for rank 1 of 4: .* another number of processes"
        ):
            knock(RankInfo(1, 4, 1, "127.0.0.1", port), b"key", end)
        first.close()
        again, second = knock(ranks[1], b"key", end), knock(ranks[2], b"key", end)
        assert set(seats.result()) == {1, 2}
        assert seats.result()[1].getpeername() == again.getsockname()
        again.close()
        second.close()
    socket.socket(fileno=info(0).gate).close()


@pytest.mark.parametrize("derived", [True, False])
def test_a_port_that_is_taken(derived: bool) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        why = ", which follows from job id and restart count," if derived else ""
        with pytest.raises(
            RendezvousError, match=f"port {port} on node1{why} is not to be had .Address already in use"
        ):
            meet(RankInfo(0, 2, 0, "node1", port, derived=derived), SECRET, MINUTES)


LISTENERS = """
import json, os, pathlib, sys, time
import torch.distributed as dist
from parallel.launch.process_group import open_store
from parallel.launch.ranks import rank_from_environment
info = rank_from_environment(os.environ)
store = open_store(info, 2, os.environ["FATHOM_SECRET"])
dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=info.rank, \
world_size=info.world_size)
group = dist.new_group([0, 1])
dist.barrier(group)
own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") \
if os.path.exists(f"/proc/self/fd/{fd}")}
listening = []
for table in ("tcp", "tcp6"):
    for line in pathlib.Path("/proc/self/net", table).read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
            listening.append(fields[1])
pathlib.Path(sys.argv[1], str(info.rank)).write_text(json.dumps(listening))
dist.barrier(group)
"""


def test_local_ranks_listen_to_this_machine_alone(tmp_path: Path) -> None:
    """The store to nobody at all any more.

    gloo's sockets, which ask nobody who he is, at the loopback interface.
    """
    (tmp_path / "rank.py").write_text(LISTENERS)
    code = (
        "import sys; from parallel.launch.local import start_local; "
        f"sys.exit(start_local([{str(tmp_path / 'rank.py')!r}, {str(tmp_path)!r}], 2))"
    )
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=env)
    listening = [json.loads((tmp_path / rank).read_text()) for rank in ("0", "1")]
    assert all(listening), "gloo listens"
    assert {address.partition(":")[0] for one in listening for address in one} == {"0100007F"}
