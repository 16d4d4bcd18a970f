"""Who is late, what is left behind, and that a rank which stands still is ended by the others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from parallel.launch.exit_codes import ExitCode
from pretrain.rundir.state import Owner, read_failures, read_state
from pretrain.train.callbacks.watchdog import (
    BACKWARD,
    BETWEEN,
    UNMEASURED_SECONDS,
    UPDATE,
    Report,
    Watchdog,
    late_ranks,
    timed_out,
)
from tests.pretrain.small import step_record

HOSTS = ["node1", "node1", "node2", "node2"]
OWNER = Owner("7", 1)


def report(rank: int, step: int = 12, phase: int = BACKWARD, waiting: bool = True) -> Report:
    return Report(rank, HOSTS[rank], step, phase, waiting, f"file.py:{rank} in there")


@pytest.mark.parametrize(
    ("reports", "words", "host"),
    [
        ([report(0), report(1), report(3)], "rank 2 on node2 gave no sign of life", "node2"),
        ([report(0), report(1)], "rank 2 on node2, rank 3 on node2 gave no sign of life", "node2"),
        ([report(1)], "rank 0 on node1, rank 2 on node2, rank 3 on node2 gave no sign of life", None),
        (
            [report(0), report(1, phase=BETWEEN), report(2), report(3)],
            "rank 1 on node1 held up the others, in step 12, before its forward pass",
            "node1",
        ),
        (
            [report(0, 13), report(1, 13), report(2, 13), report(3, 12, UPDATE)],
            "rank 3 on node2 held up the others, in step 12, norm, optimizer",
            "node2",
        ),
        (
            [report(0), report(1), report(2, waiting=False), report(3)],
            "rank 2 on node2 held up the others, in step 12, forward .* at file.py:2 in there",
            "node2",
        ),
        ([report(rank) for rank in range(4)], "no rank is behind the others: step 12, forward", None),
        ([report(rank, waiting=False) for rank in range(4)], "no rank is behind the others", None),
    ],
)
def test_late_ranks(reports: list[Report], words: str, host: str | None) -> None:
    late = late_ranks(reports, HOSTS)
    assert re.match(words, late.words)
    assert late.host == host


@pytest.mark.parametrize("hosts", [["node1"] * 4, [""] * 4])
def test_a_node_is_at_fault_only_beside_others(hosts: list[str]) -> None:
    assert late_ranks([report(0)], hosts).host is None


def watchdog(
    folder: Path, step_minutes: float | None = None, rank: int = 0, hosts: list[str] | None = None
) -> Watchdog:
    return Watchdog(folder, rank, hosts or ["node1"], step_minutes, 10.0, OWNER, leave=lambda code: None)


def test_limits(tmp_path: Path) -> None:
    """Only steps that have a usual length are held to one."""

    class Trainer:
        step = 1

    usual = watchdog(tmp_path)
    assert usual.limit(BACKWARD) == usual.limit(BETWEEN) == UNMEASURED_SECONDS
    usual.on_step(Trainer(), step_record(500.0))  # type: ignore[arg-type]
    assert usual.limit(BACKWARD) == UNMEASURED_SECONDS  # the first step of a start compiles
    for seconds, limit in ((2.0, 300.0), (40.0, 400.0), (100.0, 540.0), (400.0, 800.0)):
        usual.on_step(Trainer(), step_record(seconds))  # type: ignore[arg-type]
        assert (usual.limit(BACKWARD), usual.limit(UPDATE), usual.limit(BETWEEN)) == (
            limit,
            limit,
            UNMEASURED_SECONDS,
        )
    explicit = watchdog(tmp_path, 0.5)
    for _ in range(2):
        explicit.on_step(Trainer(), step_record(1.0))  # type: ignore[arg-type]
    assert (explicit.limit(BACKWARD), explicit.limit(BETWEEN)) == (30.0, UNMEASURED_SECONDS)
    assert not watchdog(tmp_path, 0).on


def test_what_is_left_behind(tmp_path: Path) -> None:
    """Two ranks of this process report, a third does not."""
    both = [watchdog(tmp_path, 0.01, rank, HOSTS[:3]) for rank in range(2)]
    ends = [threading.Thread(target=one.end, args=("step 3 did not end within 5 s",)) for one in both]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    failures = read_failures(tmp_path, OWNER)
    assert [failure.rank for failure in sorted(failures, key=lambda failure: failure.rank)] == [0, 1]
    assert {failure.exit_code for failure in failures} == {ExitCode.HUNG}
    assert {failure.at_fault for failure in failures} == {"node2"}
    assert failures[0].reason.startswith(
        "step 3 did not end within 5 s: rank 2 on node2 gave no sign of life; stacks in "
    )
    for rank in range(2):
        assert "test_what_is_left_behind" in both[0].stacks_file(rank).read_text()


def test_a_rank_leaves_when_another_asks(tmp_path: Path) -> None:
    left = threading.Event()
    one = Watchdog(tmp_path, 0, ["node1"], 0.001, 10.0, OWNER, leave=lambda code: left.set())
    one.start()
    assert not left.wait(1.0)  # no step has a limit yet
    one.trigger.write_text("another rank waits")
    assert left.wait(240)
    assert read_failures(tmp_path, OWNER)[0].reason.startswith("another rank waits: ")


def test_nothing_is_left_of_a_run_in_order(tmp_path: Path) -> None:
    one = watchdog(tmp_path, 0.001)
    one.start()
    while not one.stacks_file(0).exists():
        time.sleep(0.01)
    one.stop()
    assert not list((tmp_path / "control").iterdir())


def test_errors_of_a_collective_that_takes_too_long() -> None:
    assert timed_out(
        RuntimeError(
            "[gloo/transport/tcp/unbound_buffer.cc:78] "
            "Timed out waiting 600000ms for recv operation to complete"
        )
    )
    assert not timed_out(RuntimeError("Connection closed by peer [127.0.0.1]:1234"))
    assert not timed_out(OSError("Connection timed out"))


RANK = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
from parallel.launch.process_group import init_process_group, open_store
from parallel.launch.ranks import rank_from_environment
from parallel.launch.secret import run_secret
from pretrain.train.callbacks.watchdog import Watchdog
from tests.pretrain.small import step_record

class Trainer: step = 0

folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
info = rank_from_environment(os.environ)
init_process_group(info, 10, open_store(info, 10, run_secret(folder / "control")))
watchdog, trainer = Watchdog(folder, rank, ["here", "there"], 6 / 60, 10.0), Trainer()
watchdog.on_start(trainer)
while True:
    trainer.step += 1
    watchdog.before_step(trainer)
    dist.all_reduce(torch.ones(1))
    watchdog.on_step(trainer, step_record(0.01))
    if trainer.step == 3:
        (folder / f"{rank}.part").write_text(str(os.getpid()))
        (folder / f"{rank}.part").rename(folder / f"{rank}.pid")
    time.sleep(0.01)
"""


def test_a_stopped_rank_ends_the_others(tmp_path: Path) -> None:
    """Two real processes, of which one is stopped.

    The whole start ends with code 78, the stopped one by name.
    """
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    code = (
        "import sys, parallel.launch.local as launch; launch.GRACE_SECONDS = 0.5; "
        f"sys.exit(launch.start_local([{str(script)!r}, {str(tmp_path)!r}], 2))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (tmp_path / "1.pid").exists():
            assert parent.poll() is None, parent.communicate()[1]
            time.sleep(0.05)
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGSTOP)
        _, errors = parent.communicate(timeout=240)
    finally:
        parent.kill()
    assert parent.returncode == ExitCode.HUNG, errors
    assert "did not end within 6 s: rank 1 on there gave no sign of life" in errors
    assert "all_reduce" in (tmp_path / "control" / "local.0.rank00000.stacks").read_text()
    assert "rank 1 on there" in (read_state(tmp_path).get("reason") or "")
