"""Ranks from the environment, and local processes: exit codes, signals, the end of all when one fails."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.errors import UserError
from parallel.launch.launch import rank_from_environment, reserve_port, start_local

COMPLETE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "1234"}


def test_rank_of_torchrun() -> None:
    info = rank_from_environment(COMPLETE)
    assert info is not None
    assert (info.rank, info.world_size, info.local_rank, info.master_addr, info.master_port) == (
        3,
        4,
        1,
        "node7",
        1234,
    )


def test_no_launcher_means_none() -> None:
    assert rank_from_environment({"PATH": "/bin"}) is None


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT is not"):
        rank_from_environment({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_reserved_port_is_given_to_nobody_but_the_server_that_names_it() -> None:
    with reserve_port() as holder:
        address = holder.getsockname()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PyTorch's store does
            server.bind(address)
            server.listen()
            with socket.create_connection(address):
                pass


def script(folder: Path, text: str) -> str:
    path = folder / "rank.py"
    path.write_text(text)
    return str(path)


def test_every_rank_gets_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, pathlib; pathlib.Path(os.environ['OUT'], os.environ['RANK']).write_text(os.environ['WORLD_SIZE'] + os.environ['MASTER_PORT'])"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert start_local([script(tmp_path, code)], 3) == 0
    assert len({(tmp_path / str(rank)).read_text() for rank in range(3)}) == 1


def test_the_first_failure_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.launch.launch.GRACE_SECONDS", 0.2)
    text = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)"
    begin = time.monotonic()
    assert start_local([script(tmp_path, text)], 2) == 7
    assert time.monotonic() - begin < 30


def test_a_killed_rank_counts_as_128_plus_signal(tmp_path: Path) -> None:
    assert (
        start_local([script(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")], 1) == 137
    )


@pytest.mark.parametrize(("name", "hint"), [("SIGKILL", " (out of memory?)"), ("SIGSEGV", "")])
def test_a_rank_that_a_signal_ended_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, hint: str
) -> None:
    """Once, and not those that are ended because of it."""
    monkeypatch.setattr("parallel.launch.launch.GRACE_SECONDS", 0.2)
    text = (
        "import os, resource, signal, time\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        f"if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.{name})\ntime.sleep(60)"
    )
    assert start_local([script(tmp_path, text)], 3) == 128 + signal.Signals[name]
    assert capsys.readouterr().err == f"fathom: error: rank 1 was ended by {name}{hint}\n"


def test_ranks_that_are_ended_with_a_failed_one_are_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("parallel.launch.launch.GRACE_SECONDS", 0.2)
    assert (
        start_local(
            [
                script(
                    tmp_path,
                    "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)",
                )
            ],
            2,
        )
        == 7
    )
    assert capsys.readouterr().err == ""


PARENT = "import signal, sys; signal.signal(signal.SIGHUP, signal.{}); from parallel.launch.launch import start_local; sys.exit(start_local([{!r}], 1))"


def wait_for(path: Path, parent: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert parent.poll() is None
        time.sleep(0.05)


def test_a_signal_that_was_passed_on_is_no_news(tmp_path: Path) -> None:
    rank = script(
        tmp_path,
        f"import pathlib, time\npathlib.Path({str(tmp_path)!r}, 'ready').write_text('')\ntime.sleep(60)",
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format("SIG_DFL", rank)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(tmp_path / "ready", parent)
        parent.send_signal(signal.SIGTERM)
        assert parent.communicate(timeout=60)[1] == ""
        assert parent.returncode == 128 + signal.SIGTERM
    finally:
        parent.kill()


def test_nohup_is_respected(tmp_path: Path) -> None:
    text = f"import pathlib, time\nfolder = pathlib.Path({str(tmp_path)!r})\n(folder / 'ready').touch()\nwhile not (folder / 'go').exists(): time.sleep(0.05)"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format("SIG_IGN", script(tmp_path, text))],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(tmp_path / "ready", parent)
        parent.send_signal(signal.SIGHUP)
        (tmp_path / "go").touch()
        assert parent.communicate(timeout=60) == (None, "")
        assert parent.returncode == 0
    finally:
        parent.kill()


def test_a_terminal_that_is_gone_can_be_written_to(tmp_path: Path) -> None:
    """Every write to it would fail otherwise, the parent's and the ranks'."""
    text = (
        "import pathlib, signal, sys, time\nfrom pretrain.train.stop_signals import StopRequest\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\nstop = StopRequest(folder, {{}})\nstop.install()\n(folder / 'ready').touch()\n"
        "while not stop.code(): time.sleep(0.05)\n"
        "print('words', flush=True)\nprint('words', file=sys.stderr, flush=True)\n(folder / 'reason').write_text(stop.reason())\nsys.exit(stop.code())"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format("SIG_DFL", script(tmp_path, text))],
        stdout=theirs,
        stderr=theirs,
        text=True,
        env=env,
    )
    try:
        wait_for(tmp_path / "ready", parent)
        os.close(theirs)
        os.close(ours)  # from here on a write is an error
        parent.send_signal(signal.SIGHUP)
        assert parent.wait(timeout=60) == 75
    finally:
        parent.kill()
    assert (tmp_path / "reason").read_text() == "the terminal it was started from is gone"


def test_signals_are_passed_on(tmp_path: Path) -> None:
    rank = script(
        tmp_path,
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGUSR1, lambda *a: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready').write_text('')\n"
        "time.sleep(60)",
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; from parallel.launch.launch import start_local; sys.exit(start_local([{rank!r}], 1))",
        ]
    )
    try:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        parent.send_signal(signal.SIGUSR1)
        assert parent.wait(timeout=30) == 75
    finally:
        parent.kill()
