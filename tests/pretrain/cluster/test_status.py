"""The screen of all runs, from the files that runs leave in every state of life; the queue is given, and real in tests/slurm."""

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
from pretrain.cluster.status import RunStatus, collect, find_runs, last_events, run_status
from pretrain.rundir.metrics import MetricsWriter
from pretrain.rundir.state import Owner, claim
from tools.cli import main
from tools.status import duration, quantity, screen


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def make_run(folder: Path, steps: int = 10, total: int = 100, layers: int = 0) -> Path:
    """A run that has trained some steps at 0.5 s each."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"name: {folder.name}\ntrain: {{steps: {total}, stop_at_step: null}}\n"
    )
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        writer.write("start", 0, world_size=4)
        for step in range(1, steps + 1):
            writer.write(
                "train", step, loss=10.0 / step, tokens=step * 512, tokens_per_s=1024.0, step_time_s=0.5
            )
            if layers:
                writer.write(
                    "signal",
                    step,
                    layers=[
                        {"layer": layer, "residual_rms": 1.0, "grad_norm": 0.1}
                        for layer in range(1, layers + 1)
                    ],
                )
    return folder


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
        writer.write("end", 10, reason="stop_at_step")
    assert run_status(run, None).state == "stopped"


def test_newest_steps_behind_long_lines(tmp_path: Path) -> None:
    """Signals of a deep model are longer than a block, and half a line at the end is being written right now."""
    run = make_run(tmp_path / "a", steps=5, layers=1000)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 6, "lo')
    events = last_events(run / "metrics.jsonl", block=4096)
    assert [event["step"] for event in events["train"]] == [1, 2, 3, 4, 5]
    assert last_events(tmp_path / "nothing") == {"train": [], "end": []}


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
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run in "):
        find_runs(tmp_path / "empty")


def test_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    (make_run(tmp_path / "runs" / "b") / "state.json").write_text("{")
    (make_run(tmp_path / "runs" / "c") / "config.yaml").write_text("train: [")
    statuses = collect(tmp_path / "runs")
    assert [status.state for status in statuses] == ["running", "damaged", "running"]
    assert statuses[2].total is None


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


def test_units() -> None:
    assert [duration(seconds) for seconds in (0, 59.4, 60, 3599, 3600, 86399, 180000)] == [
        "0s",
        "59s",
        "1m00s",
        "59m59s",
        "1h00m",
        "23h59m",
        "2d02h",
    ]
    assert [quantity(number) for number in (0, 999, 1000, 12345, 9.99e6, 2.5e12)] == [
        "0",
        "999",
        "1k",
        "12.3k",
        "9.99M",
        "2.5T",
    ]


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
