"""The gate before the ranks' store.

Both sides show that they know the run's secret, without telling it.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import struct
import sys
import threading
import time

from parallel.launch.exit_codes import ExitCode
from parallel.launch.ranks import RankInfo

NONCE = PROOF = 32
"""Bytes of a random challenge, and of the proof that answers it."""
HANDSHAKE_SECONDS = 10.0
"""How long the other side may take for its part of a handshake."""
HANDSHAKES = 64
"""Handshakes at the same time. Who comes when there are more is sent away, and ranks try again."""
RETRY_SECONDS = 0.2
COME_IN, GO_AWAY, NO_PLACE = b"+", b"-", b"="


class RendezvousError(RuntimeError):
    """The ranks did not come together."""


class StrangerError(RendezvousError):
    """Somebody at the meeting does not have the run's secret: this process, or the one it met."""

    exit_code = ExitCode.BAD_NODE


class Gate:
    """Lets in those who know the secret, one for each rank but 0.

    listener: stays open when the gate is closed.
    """

    def __init__(self, listener: socket.socket, key: bytes, world: int) -> None:
        self._listener, self._key, self._world = listener, key, world
        self._guests: dict[int, socket.socket] = {}
        self._lock, self._places = threading.Lock(), threading.Semaphore(HANDSHAKES)
        self._said = False

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            for guest in self._guests.values():
                guest.close()

    def wait(self, end: float) -> dict[int, socket.socket]:
        """The connections of the ranks that have come, when the last one has or time is over."""
        self._listener.settimeout(RETRY_SECONDS)
        while time.monotonic() < end:
            with self._lock:
                if len(self._guests) == self._world - 1:
                    break
            with contextlib.suppress(TimeoutError, ConnectionError):
                visitor, address = self._listener.accept()
                if not self._places.acquire(blocking=False):
                    visitor.close()
                    continue
                threading.Thread(target=self._admit, args=(visitor, address[0]), daemon=True).start()
        with self._lock:
            return dict(self._guests)

    def _admit(self, visitor: socket.socket, address: str) -> None:
        """One handshake.

        Whatever a stranger sends or leaves out takes a while of this thread at most.
        """
        try:
            visitor.settimeout(HANDSHAKE_SECONDS)
            challenge = secrets.token_bytes(NONCE)
            visitor.sendall(challenge)
            size = struct.calcsize("!II") + NONCE + PROOF
            rank, world, answer, proof = struct.unpack(f"!II{NONCE}s{PROOF}s", read_exactly(visitor, size))
            if not hmac.compare_digest(proof, _proof(self._key, b"rank", challenge, answer, rank, world)):
                visitor.sendall(GO_AWAY)
                visitor.close()
                self._say(address)
            elif not self._seated(rank, world, visitor):
                visitor.sendall(NO_PLACE)
                visitor.close()
            else:
                visitor.sendall(COME_IN + _proof(self._key, b"gate", challenge, answer, rank, world))
        except OSError:  # it left, or says nothing
            visitor.close()
        finally:
            self._places.release()

    def _seated(self, rank: int, world: int, visitor: socket.socket) -> bool:
        """Whether a rank got its place, which one that left again has given up."""
        with self._lock:
            before = self._guests.get(rank)
            if world != self._world or not 0 < rank < world or (before is not None and not _gone(before)):
                return False
            self._guests[rank] = visitor
            return True

    def _say(self, address: str) -> None:
        if not self._said:
            self._said = True
            line = (
                f"fathom: a process on {address} asked to be one of the ranks "
                "without knowing the run's secret: refused"
            )
            print(line, file=sys.stderr, flush=True)


def knock(info: RankInfo, key: bytes, end: float) -> socket.socket:
    """A connection to rank 0, when both have shown that they know the secret.

    end: when to give up, by the monotonic clock.
    Raises RendezvousError where rank 0 does not answer or has no place,
    StrangerError where the secrets differ.
    """
    while True:
        try:
            gate = socket.create_connection((info.master_addr, info.master_port), timeout=HANDSHAKE_SECONDS)
        except OSError as error:  # not there yet
            _give_up_or_wait(info, end, error)
            continue
        try:
            _introduce(gate, info, key)
            return gate
        except OSError as error:  # busy
            gate.close()
            _give_up_or_wait(info, end, error)
        except BaseException:
            gate.close()
            raise


def _give_up_or_wait(info: RankInfo, end: float, error: OSError) -> None:
    if time.monotonic() > end:
        where = f"{info.master_addr}:{info.master_port}"
        raise RendezvousError(
            f"rank 0 did not answer at {where} in the time of parallel.timeout_minutes ({error}): see its log"
        ) from None
    time.sleep(RETRY_SECONDS)


def _introduce(gate: socket.socket, info: RankInfo, key: bytes) -> None:
    """This side's part of a handshake."""
    where, rank, world = f"{info.master_addr}:{info.master_port}", info.rank, info.world_size
    challenge, answer = read_exactly(gate, NONCE), secrets.token_bytes(NONCE)
    gate.sendall(
        struct.pack("!II", rank, world) + answer + _proof(key, b"rank", challenge, answer, rank, world)
    )
    reply = read_exactly(gate, 1)
    if reply == NO_PLACE:
        raise RendezvousError(
            f"rank 0 at {where} has no place for rank {rank} of {world}: another process has it, "
            "or the run has another number of processes. Are these two starts of one run?"
        )
    if reply == GO_AWAY:
        raise StrangerError(
            f"rank 0 at {where} does not take this process for rank {rank}: their secrets differ. "
            "runs_dir must be on a file system that all nodes share"
        )
    own = _proof(key, b"gate", challenge, answer, rank, world)
    if reply != COME_IN or not hmac.compare_digest(read_exactly(gate, PROOF), own):
        raise StrangerError(
            f"what answers at {where} is not rank 0 of this run: another program has the port"
        )


def _proof(key: bytes, side: bytes, challenge: bytes, answer: bytes, rank: int, world: int) -> bytes:
    """What only who has the key can say to both challenges."""
    return hmac.digest(key, side + challenge + answer + struct.pack("!II", rank, world), "sha256")


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes. Raises OSError where they do not come."""
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionError("the other side left")
        found += part
    return found


def _gone(connection: socket.socket) -> bool:
    """Whether the other side of a connection has left. It has nothing to say yet."""
    try:
        return bool(select.select([connection], [], [], 0)[0])
    except (OSError, ValueError):
        return True
