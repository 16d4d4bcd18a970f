"""Local ranks: started, told of signals, waited for, and ended with whoever started them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Collection, Sequence

from parallel.launch.host import same_code, threads_per_process
from parallel.launch.ranks import GATE_VARIABLE
from parallel.launch.secret import VARIABLE, new_secret

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
LIKELY: dict[int, str] = {
    signal.SIGKILL: "out of memory?",
    signal.SIGBUS: "a file of the data was cut?",  # files that are mapped into memory end their reader so
}
"""What mostly sends a signal that ends a rank without a word."""
GRACE_SECONDS = 30.0
PR_SET_PDEATHSIG = 1

FOLLOW = f"""
import ctypes, os, signal, sys
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a quiet end
try:
    ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}, 0, 0, 0)
except AttributeError:
    pass  # no Linux
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes another program that the kernel kills when its parent dies, however that dies.

The look at the parent comes second: one that died before the kernel was told is noticed there.
"""


def listen_here() -> socket.socket:
    """A socket that listens at a free port of this machine, for this machine alone."""
    return socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN)


def reserve_port() -> socket.socket:
    """A socket that holds a free TCP port until it is closed.

    Nobody is given the port, but a server that asks for it by number may listen on it.
    For those who start ranks by other means than `start_local`.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask a run to save and leave.

    SIGHUP is none where it is ignored: under nohup a run outlives its terminal.
    """
    return tuple(
        number
        for number in FORWARDED
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


def leave_terminal() -> None:
    """Sends what this process still says at its terminal nowhere.

    Every write to a terminal that is gone is an error, and would end it before it saved.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # os.isatty does not know a terminal that is gone
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def start_local(arguments: Sequence[str], processes: int) -> int:
    """Runs `python arguments...` as local ranks; returns the first non-zero exit code, or 0.

    Signals for a clean stop are passed on to every rank.
    When a rank fails, the others get a moment to notice and are then ended.
    When this process is killed, the kernel kills them.
    """
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
        with listen_here() as gate:  # rank 0 has its own copy
            shared = _environment(processes, gate)
            for rank in range(processes):
                ranks.append(_start_rank(arguments, rank, gate, shared))
        return _wait(ranks, received)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _environment(processes: int, gate: socket.socket) -> dict[str, str]:
    """What all ranks are told."""
    return {
        "OMP_NUM_THREADS": str(threads_per_process(processes, {})),
        **os.environ,
        **same_code(),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(gate.getsockname()[1]),
        VARIABLE: new_secret(),
    }


def _start_rank(
    arguments: Sequence[str], rank: int, gate: socket.socket, shared: dict[str, str]
) -> subprocess.Popen[bytes]:
    env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank == 0:
        env[GATE_VARIABLE] = str(gate.fileno())
    follow = [sys.executable, "-I", "-S", "-c", FOLLOW, str(os.getpid())]
    return subprocess.Popen(
        [*follow, sys.executable, *arguments],
        env=env,
        pass_fds=(gate.fileno(),) if rank == 0 else (),
        start_new_session=True,  # so that a terminal's ctrl-C reaches a rank once, through us
    )


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
    """Names the first rank that a signal nobody asked for has ended, as it could not do so itself.

    Returns whether there is one.
    """
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and -code not in received:
            known = -code in set(signal.Signals)
            hint = f" ({LIKELY[-code]})" if -code in LIKELY else ""
            print(
                f"fathom: error: rank {rank} was ended by "
                f"{signal.Signals(-code).name if known else f'signal {-code}'}{hint}",
                file=sys.stderr,
                flush=True,
            )
            return True
    return False
