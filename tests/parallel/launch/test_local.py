"""Local processes: exit codes, signals, the end of all of them.

All end when one fails or whoever started them is gone.
"""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from parallel.launch.local import FOLLOW, reserve_port, start_local


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
    code = (
        "import os, pathlib; pathlib.Path(os.environ['OUT'], os.environ['RANK'])"
        ".write_text(os.environ['WORLD_SIZE'] + os.environ['MASTER_PORT'])"
    )
    monkeypatch.setenv("OUT", str(tmp_path))
    assert start_local([script(tmp_path, code)], 3) == 0
    assert len({(tmp_path / str(rank)).read_text() for rank in range(3)}) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks into the working folder")
def test_ranks_take_no_file_of_the_working_folder_for_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parallel.py").write_text("raise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    assert start_local(["-m", "parallel.launch.exit_codes"], 1) == 0


def test_ranks_share_a_secret_and_rank_0_has_the_open_gate(tmp_path: Path) -> None:
    """A new secret at every start. What the environment is told, other users do not see."""
    code = (
        "import os, pathlib, socket\nrank = os.environ['RANK']\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / rank).write_text(os.environ['FATHOM_SECRET'])\n"
        "assert ('FATHOM_GATE' in os.environ) == (rank == '0')\n"
        "if rank == '0':\n"
        "    gate = socket.socket(fileno=int(os.environ['FATHOM_GATE']))\n"
        "    assert gate.getsockname() == ('127.0.0.1', int(os.environ['MASTER_PORT']))\n"
        "    socket.create_connection(gate.getsockname())"
    )
    secrets = []
    for _ in range(2):
        assert start_local([script(tmp_path, code)], 2) == 0
        first, second = (tmp_path / "0").read_text(), (tmp_path / "1").read_text()
        assert first == second
        assert len(first) == 64
        secrets.append(first)
    assert secrets[0] != secrets[1]


def test_ranks_go_with_whoever_started_them(tmp_path: Path) -> None:
    """Also where it is killed and can tell them nothing."""
    text = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(600)"
    )
    code = (
        "import sys; from parallel.launch.local import start_local; "
        f"start_local([{script(tmp_path, text)!r}], 2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], text=True)
    try:
        for rank in ("0", "1"):
            wait_for(tmp_path / rank, parent)
    finally:
        parent.kill()
    parent.wait()
    ranks = [int((tmp_path / rank).read_text()) for rank in ("0", "1")]
    end = time.monotonic() + 120
    while any(map(alive, ranks)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, ranks))


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent to look."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_rank_whose_parent_was_gone_before_it_began_does_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", "-c", FOLLOW]
    run = [sys.executable, "-c", f"import pathlib; pathlib.Path({str(tmp_path)!r}, 'ran').touch()"]
    subprocess.run([*command, str(os.getpid() + 1), *run], check=True)
    assert not (tmp_path / "ran").exists()
    subprocess.run([*command, str(os.getpid()), *run], check=True)
    assert (tmp_path / "ran").exists()


def test_the_first_failure_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.launch.local.GRACE_SECONDS", 0.2)
    text = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(600)"
    begin = time.monotonic()
    assert start_local([script(tmp_path, text)], 2) == 7
    assert time.monotonic() - begin < 300


def test_a_killed_rank_counts_as_128_plus_signal(tmp_path: Path) -> None:
    assert (
        start_local([script(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")], 1) == 137
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [("SIGKILL", " (out of memory?)"), ("SIGBUS", " (a file of the data was cut?)"), ("SIGSEGV", "")],
)
def test_a_rank_that_a_signal_ended_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, hint: str
) -> None:
    """Once, and not those that are ended because of it."""
    monkeypatch.setattr("parallel.launch.local.GRACE_SECONDS", 0.2)
    text = (
        "import os, resource, signal, time\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        f"if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.{name})\ntime.sleep(600)"
    )
    assert start_local([script(tmp_path, text)], 3) == 128 + signal.Signals[name]
    assert capsys.readouterr().err == f"fathom: error: rank 1 was ended by {name}{hint}\n"


def test_ranks_that_are_ended_with_a_failed_one_are_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("parallel.launch.local.GRACE_SECONDS", 0.2)
    assert (
        start_local(
            [
                script(
                    tmp_path,
                    "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(600)",
                )
            ],
            2,
        )
        == 7
    )
    assert capsys.readouterr().err == ""


PARENT = (
    "import signal, sys; signal.signal(signal.SIGHUP, signal.{}); "
    "from parallel.launch.local import start_local; sys.exit(start_local([{!r}], 1))"
)


def wait_for(path: Path, parent: subprocess.Popen[Any]) -> None:
    while not path.exists():
        assert parent.poll() is None
        time.sleep(0.05)


def test_a_signal_that_was_passed_on_is_no_news(tmp_path: Path) -> None:
    rank = script(
        tmp_path,
        f"import pathlib, time\npathlib.Path({str(tmp_path)!r}, 'ready').write_text('')\ntime.sleep(600)",
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format("SIG_DFL", rank)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(tmp_path / "ready", parent)
        parent.send_signal(signal.SIGTERM)
        assert parent.communicate(timeout=240)[1] == ""
        assert parent.returncode == 128 + signal.SIGTERM
    finally:
        parent.kill()


def test_nohup_is_respected(tmp_path: Path) -> None:
    text = (
        f"import pathlib, time\nfolder = pathlib.Path({str(tmp_path)!r})\n(folder / 'ready').touch()\n"
        "while not (folder / 'go').exists(): time.sleep(0.05)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format("SIG_IGN", script(tmp_path, text))],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(tmp_path / "ready", parent)
        parent.send_signal(signal.SIGHUP)
        (tmp_path / "go").touch()
        assert parent.communicate(timeout=240) == (None, "")
        assert parent.returncode == 0
    finally:
        parent.kill()


def test_a_terminal_that_is_gone_can_be_written_to(tmp_path: Path) -> None:
    """Every write to it would fail otherwise, the parent's and the ranks'."""
    text = (
        "import pathlib, signal, sys, time\nfrom pretrain.train.stop_signals import StopRequest\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\nstop = StopRequest(folder, {{}})\nstop.install()\n"
        "(folder / 'ready').touch()\n"
        "while not stop.code(): time.sleep(0.05)\n"
        "print('words', flush=True)\nprint('words', file=sys.stderr, flush=True)\n"
        "(folder / 'reason').write_text(stop.reason())\nsys.exit(stop.code())"
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
        assert parent.wait(timeout=240) == 75
    finally:
        parent.kill()
    assert (tmp_path / "reason").read_text() == "the terminal it was started from is gone"


def test_signals_are_passed_on(tmp_path: Path) -> None:
    rank = script(
        tmp_path,
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGUSR1, lambda *a: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready').write_text('')\n"
        "time.sleep(600)",
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from parallel.launch.local import start_local; "
            f"sys.exit(start_local([{rank!r}], 1))",
        ]
    )
    try:
        wait_for(tmp_path / "ready", parent)
        parent.send_signal(signal.SIGUSR1)
        assert parent.wait(timeout=240) == 75
    finally:
        parent.kill()
