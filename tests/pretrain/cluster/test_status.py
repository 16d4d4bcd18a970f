"""The screen of all runs, from the files that runs leave in every state of life.

The queue is given here, and real in tests/slurm.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from model.errors import UserError
from parallel.launch.slurm_client import Queued
from pretrain.cluster import status
from pretrain.cluster.status import Recent, RunStatus, collect, find_runs, recent_events, run_status
from pretrain.rundir.metrics import MetricsWriter
from pretrain.rundir.state import Owner, claim
from tests.pretrain.cluster.starts import make_run
from tools.cli import main
from tools.runs.status import screen


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_running(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    claim(run, Owner("12", 2), state="running", restarts=2, nodes="node[1-2]")
    checkpoint = run / "checkpoints" / "step_00000008"
    checkpoint.mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step_00000008\n")
    (checkpoint / "manifest.json").write_text("{}")
    os.utime(checkpoint / "manifest.json", (1000, 1000))
    os.utime(run / "metrics.jsonl", (1090, 1090))
    queue = {"12": Queued("12", "RUNNING", "", "", "node[1-2]")}
    status = run_status(run, queue, now=1100)
    assert status == RunStatus(
        "a", str(run), "running", "", 10, 100, 1.0, 1024.0, 45.0, 2, 8, 100.0, "12", "node[1-2]"
    )
    assert run_status(run, queue, now=1090 + 600).reason == "no step for 10 min"


def test_waiting(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=0)
    claim(run, Owner(None, 0), state="queued")
    (run / "submitted.json").write_text(json.dumps({"jobs": ["12"]}))
    status = run_status(run, {"12": Queued("12", "PENDING", "Priority", "2026-11-22T08:00:00", "")})
    assert (status.state, status.job, status.reason, status.loss, status.left_s) == (
        "queued",
        "12",
        "waits: Priority, expected start 2026-11-22T08:00:00",
        None,
        None,
    )


def test_job_that_is_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    claim(run, Owner("12", 0), state="running")
    status = run_status(run, {})
    assert (status.state, status.reason, status.left_s) == (
        "dead",
        "job 12 is not in the queue any more; the run left no word",
        None,
    )
    assert run_status(run, None).state == "running"  # not on the cluster: nobody can know better


@pytest.mark.parametrize(
    ("answer", "state", "reason"),
    [
        ("JobState=CANCELLED Reason=None Restarts=0", "cancelled", "cancelled with scancel"),
        (
            "JobState=NODE_FAIL Reason=None Restarts=0",
            "dead",
            "job 12 ended as NODE_FAIL; the run left no word",
        ),
        ("JobState=RUNNING Reason=None Restarts=0", "running", ""),  # another user's
    ],
)
def test_what_slurm_remembers(tmp_path: Path, answer: str, state: str, reason: str) -> None:
    run = make_run(tmp_path / "a")
    claim(run, Owner("12", 0), state="running")
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho 'JobId=12 {answer} '\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert (run_status(run, {}).state, run_status(run, {}).reason) == (state, reason)


def test_stopped_to_be_continued_but_nobody_will(tmp_path: Path) -> None:
    """A batch script that was killed before it could say what happened."""
    run = make_run(tmp_path / "a")
    claim(run, Owner("12", 0), state="stopped", reason="ended from outside", exit_code=75)
    assert (
        run_status(run, {}).reason
        == "ended from outside; it saved, but no job is there to go on: submit it again"
    )
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'JobId=12 JobState=CANCELLED Reason=None '\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert run_status(run, {}).state == "cancelled"


@pytest.mark.parametrize("state", ["finished", "failed", "cancelled", "stopped"])
def test_ended(tmp_path: Path, state: str) -> None:
    run = make_run(tmp_path / "a")
    claim(run, Owner("12", 0), state=state, reason="why")
    (run / "submitted.json").write_text(json.dumps({"jobs": ["12", "13"]}))
    status = run_status(run, {"13": Queued("13", "PENDING", "Dependency", "", "")})
    assert (status.state, status.reason, status.left_s) == (state, "why", None)


def test_local_process(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    claim(run, Owner(None, 0), state="running")
    assert run_status(run, None).state == "running"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    content: dict[str, Any] = json.loads((run / "state.json").read_text())
    (run / "state.json").write_text(json.dumps({**content, "host": socket.gethostname(), "pid": gone.pid}))
    assert (run_status(run, None).state, run_status(run, None).reason) == (
        "dead",
        f"process {gone.pid} is gone; it left no word",
    )


def test_run_without_a_state_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert (run_status(run, None).state, run_status(run, None, now=time.time() + 3600).state) == (
        "running",
        "dead",
    )
    with MetricsWriter(run / "metrics.jsonl") as writer:
        writer.write("end", 10, reason="train.stop_at_step=10 is reached", exit_code=76)
    assert run_status(run, None).state == "stopped"


def test_a_start_that_ends_early_is_part_of_its_run(tmp_path: Path) -> None:
    """As the run's own lines count: `step 10/100`."""
    run = make_run(tmp_path / "a")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("stop_at_step: null", "stop_at_step: 10"))
    with MetricsWriter(run / "metrics.jsonl") as writer:
        writer.write("end", 10, reason="train.stop_at_step=10 is reached", exit_code=76)
    status = run_status(run, None)
    assert (status.state, status.step, status.total) == ("stopped", 10, 100)


def test_newest_steps_behind_long_lines(tmp_path: Path) -> None:
    """Signals of a deep model are longer than a block.

    Half a line at the end is being written right now.
    """
    run = make_run(tmp_path / "a", steps=5, layers=1000)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 6, "lo')
    assert [event.step for event in recent_events(run / "metrics.jsonl", block=4096).train] == [1, 2, 3, 4, 5]
    assert recent_events(tmp_path / "nothing") == Recent([], None)


def test_finding_runs(tmp_path: Path) -> None:
    for name in ("b", "a", "sweep/sweep-0", "sweep/sweep-1"):
        make_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "a" / "code" / "configs").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "code" / "configs" / "config.yaml").write_text("")
    assert [run.name for run in find_runs(tmp_path / "runs")] == ["a", "b", "sweep-0", "sweep-1"]
    assert [run.name for run in find_runs(tmp_path / "runs" / "a")] == ["a"]
    with pytest.raises(
        UserError, match="nowhere does not exist: give a run directory or the folder of several"
    ):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(
        UserError, match=r"a\.yaml is no folder: give a run directory or the folder of several"
    ):
        find_runs(tmp_path / "a.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run in "):
        find_runs(tmp_path / "empty")


DAMAGE = [
    (
        "metrics.jsonl",
        '{"event": "train", "loss": 1}\n"train"\n["train"]\n{"event":"train","step":"x","loss":1}\n',
        "running",
    ),
    ("metrics.jsonl", "[" * 100_000 + '"train"', "running"),
    ("metrics.jsonl", b'\xff\xfe\x00 "train" \n', "running"),
    ("config.yaml", "train: [", "running"),
    ("config.yaml", "train: {steps: many}", "running"),
    ("config.yaml", "&a [*a]", "running"),
    ("state.json", "{", "damaged"),
    ("state.json", "[1]", "damaged"),
    ("state.json", '{"restarts": "x"}', "damaged"),
    ("state.json", '{"state": "running", "pid": 9223372036854775808}', "damaged"),
    ("state.json", '{"state": "running", "pid": 2147483648, "host": "HOST"}', "dead"),
    ("state.json", '{"state": "running", "pid": 0, "host": "HOST"}', "running"),
    ("state.json", '{"job_id": 5}', "damaged"),
    ("state.json", '{"state": "running", "job_id": "--help"}', "damaged"),
    ("state.json", '{"state": {}, "step": []}', "damaged"),
    ("submitted.json", '{"jobs": null}', "running"),
    ("submitted.json", '{"jobs": 7}', "damaged"),
    ("checkpoints/latest", b"\xff\xfe", "running"),
    ("checkpoints/step_9999999999999999999999/manifest.json", "{}", "running"),
]


@pytest.mark.parametrize(("name", "content", "state"), DAMAGE)
def test_a_damaged_run_hides_no_other(tmp_path: Path, name: str, content: str | bytes, state: str) -> None:
    make_run(tmp_path / "runs" / "a")
    path = make_run(tmp_path / "runs" / "b") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.replace("HOST", socket.gethostname()).encode()
    path.write_bytes(data)
    first, second = collect(tmp_path / "runs")
    assert (first.state, second.state) == ("running", state)
    if state == "damaged":
        assert str(path) in second.reason
    json.dumps(second.step)
    screen([first, second])


@pytest.mark.parametrize("name", ["metrics.jsonl", "state.json", "config.yaml"])
def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "runs" / "a")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    (status_of_a,) = collect(tmp_path / "runs")
    assert status_of_a.state == ("running" if name == "config.yaml" else "damaged")


def test_what_cannot_be_foreseen_is_the_damage_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b")
    usual = status.run_status

    def sometimes(folder: Path, *args: Any) -> RunStatus:
        if folder.name == "a":
            raise LookupError("a fault of the program")
        return usual(folder, *args)

    monkeypatch.setattr(status, "run_status", sometimes)
    first, second = collect(tmp_path / "runs")
    assert (first.state, first.reason, second.state) == (
        "damaged",
        "LookupError: a fault of the program",
        "running",
    )
    monkeypatch.setenv("FATHOM_DEBUG", "1")
    with pytest.raises(LookupError):
        collect(tmp_path / "runs")


@pytest.mark.parametrize(
    ("state", "end", "shown"),
    [
        ({}, {"reason": "loss or gradient is not finite at step 10", "exit_code": 77}, "failed"),
        ({}, {"reason": "loss or gradient is not finite at step 10"}, "failed"),
        ({}, {"reason": "all steps are done"}, "finished"),
        ({}, {"reason": "not_finite"}, "failed"),
        ({}, {"reason": "stopped", "exit_code": 75}, "stopped"),
        ({"state": "finished", "reason": "ended by an error"}, {"reason": "ended by an error"}, "failed"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, state: dict[str, Any], end: dict[str, Any], shown: str) -> None:
    """Also of runs that earlier versions wrote."""
    run = make_run(tmp_path / "a", total=10)
    with MetricsWriter(run / "metrics.jsonl") as writer:
        writer.write("end", 10, **end)
    if state:
        (run / "state.json").write_text(json.dumps(state))
    assert run_status(run, None).state == shown
    with MetricsWriter(run / "metrics.jsonl") as writer:
        writer.write("start", 10)
    assert run_status(run, None).state == (shown if state else "running"), (
        "an end before the newest start is over"
    )


def test_foreign_text_does_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs" / "a\x1b[2J")
    (run / "state.json").write_text(
        json.dumps({"state": "fai\x1b[2Jled", "reason": "\x1b]0;title\x07\x1b[2J"})
    )
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path / "runs")])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b]0;title\\x07" in shown


def test_screen(tmp_path: Path) -> None:
    statuses = [
        RunStatus(
            "deep1000",
            "x",
            "running",
            "",
            1200,
            5000,
            3.21987,
            1.234e6,
            11100.0,
            2,
            1000,
            754.0,
            "4711",
            "n[1-2]",
        ),
        RunStatus("sweep-0", "x", "failed", "rank 3 on node2: out of memory", 0, None),
    ]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(screen(statuses))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == ["RUN", "STATE", "STEP", "LOSS", "TOKENS/S", "LEFT", "RESTARTS", "CHECKPOINT", "JOB"]
    assert lines[1] == [
        "deep1000",
        "running",
        "1200/5000",
        "3.2199",
        "1.23M",
        "3h05m",
        "2",
        "1000,",
        "12m34s",
        "ago",
        "4711",
    ]
    assert lines[2] == ["sweep-0", "failed", "0/?", "none"]
    assert " ".join(lines[3]) == "sweep-0: rank 3 on node2: out of memory"


def shown(statuses: list[RunStatus], width: int) -> list[str]:
    """Lines of the screen on a console of so many columns."""
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(screen(statuses, width))
    return captured.get().splitlines()


def test_narrow_screen() -> None:
    """Names and jobs are whole, whatever has to go for them."""
    long = "a_run_of_a_name_longer_than_anybody_would_type"
    statuses = [
        RunStatus(
            "deep1000",
            "x",
            "requeued",
            "",
            123456,
            500000,
            3.21987,
            1.234e6,
            11100.0,
            2,
            123000,
            754.0,
            "47112345",
        ),
        RunStatus(long, "x", "finished", "", 400, 400, 6.0636, checkpoint_step=400, checkpoint_age_s=5.0),
    ]
    lines = shown(statuses[:1], 80)
    assert lines[0].split() == ["RUN", "STATE", "STEP", "LOSS", "LEFT", "CHECKPOINT", "JOB"]
    assert lines[1].split() == [
        "deep1000",
        "requeued",
        "123456/500000",
        "3.2199",
        "3h05m",
        "123000,",
        "12m34s",
        "ago",
        "47112345",
    ]
    assert len(lines) == 2
    lines = shown(statuses, 80)
    assert "".join(line.split(" ")[0] for line in lines[2:]) == long
    assert all(text in lines[2] for text in ("finished", "400/400", "6.0636", "400, 5s ago"))
    assert lines[1].endswith("47112345")
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["RUN", "STATE", "STEP", "LOSS", "CHECKPOINT", "JOB"]


@pytest.mark.parametrize("width", [36, 45, 60, 79, 100, 140, 200])
def test_no_width_cuts_names_or_jobs(width: int) -> None:
    status = RunStatus("abcdefghijklmnopqrstuvwxyz", "x", "RUN", "", 0, 0, job="47112345_1234")
    lines = shown([status], width)
    place = lines[0].index("JOB")
    assert "".join(line[:place].split(" ")[0] for line in lines[1:]) == status.name
    assert "".join(line[place:].strip() for line in lines[1:]) == status.job


def test_a_pipe_has_room_for_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    make_run(tmp_path / "runs" / ("a" * 60))
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    assert "a" * 60 in out
    assert "TOKENS/S" in out


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "a")
    with pytest.raises(SystemExit) as left:
        main(["status", str(tmp_path / "runs"), "--json"])
    assert left.value.code == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert (status["name"], status["step"], status["total"]) == ("a", 10, 100)
    with pytest.raises(SystemExit) as left:
        main(["status", str(tmp_path / "runs")])
    assert "10/100" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["status", str(tmp_path / "nowhere")])
    assert left.value.code == 2
