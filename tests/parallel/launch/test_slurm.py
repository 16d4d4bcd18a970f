"""Ranks from Slurm's variables, as a 2 x 2 step of a real cluster has them.

No Slurm is needed here.
"""

from __future__ import annotations

import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from parallel.launch.exit_codes import ExitCode, as_exit_code
from parallel.launch.slurm import (
    FIRST_PORT,
    PORTS,
    SlurmTask,
    expand_counts,
    expand_hosts,
    master_address,
    master_port,
    slurm_environment,
)
from parallel.launch.slurm_client import Job, job_handle, parse_job, queue, sbatch, show_job

STEP = {
    "SLURMD_NODENAME": "node2",
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with no scontrol on it; tests put their own there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[08-11],login1", ["gpu08", "gpu09", "gpu10", "gpu11", "login1"]),
        ("a[1,3-4]b", ["a1b", "a3b", "a4b"]),
        ("rack[1-2]n[0-1]", ["rack1n0", "rack1n1", "rack2n0", "rack2n1"]),
        (
            "x-y.cluster[001,010-011].edu,z",
            ["x-y.cluster001.edu", "x-y.cluster010.edu", "x-y.cluster011.edu", "z"],
        ),
    ],
)
def test_host_lists(text: str, names: list[str]) -> None:
    assert expand_hosts(text) == names


@pytest.mark.parametrize("text", ["", "node[1-", "node[a-b]", "node[1-2]]", "node[]"])
def test_host_lists_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST"):
        expand_hosts(text)


def test_counts() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match="SLURM_TASKS_PER_NODE='2x3'"):
        expand_counts("2x3")


def test_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.launch.slurm.resolves", lambda name: True)
    expected = SlurmTask(3, 4, 1, 2, 1, 2, "node1", master_port(17, 0), 17, 0)
    assert slurm_environment(STEP) == expected
    again = slurm_environment({**STEP, "SLURM_RESTART_COUNT": "2"})
    assert again is not None
    assert (again.restart_count, again.master_port != expected.master_port) == (2, True)


def test_a_step_on_fewer_nodes_than_the_job() -> None:
    env = {
        **STEP,
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_NTASKS": "6",
        "SLURM_TASKS_PER_NODE": "2(x3)",
        "FATHOM_MASTER_ADDR": "10.0.0.7",
        "FATHOM_MASTER_PORT": "2345",
    }
    info = slurm_environment(env)
    assert info is not None
    assert (info.world_size, info.num_nodes, info.master_addr, info.master_port) == (4, 2, "10.0.0.7", 2345)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": None},
        {"SLURM_STEP_ID": "4294967291"},
        {"SLURM_PTY_PORT": "1234"},
        {"SLURM_PROCID": None},
    ],
)
def test_what_is_no_task(change: dict[str, str | None]) -> None:
    env = {key: value for key, value in {**STEP, **change}.items() if value is not None}
    assert slurm_environment(env) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_NODEID": ""}, "SLURM_NODEID is not set although SLURM_PROCID is: start the tasks with srun"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID='x' must be a whole number"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, r"SLURM_STEP_TASKS_PER_NODE=2,1 does not fit 4 tasks"),
        ({"FATHOM_MASTER_PORT": "http"}, "FATHOM_MASTER_PORT='http' must be a whole number"),
    ],
)
def test_damaged_environment(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        slurm_environment({**STEP, **change})


def test_address_where_names_do_not_resolve(no_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(
        name: str, *rest: Any, **more: Any
    ) -> list[Any]:  # whatever the name server here would answer, and however late
        if name.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, f"{name} is not known")
        return real(name, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    env = {**STEP, "SLURM_STEP_NODELIST": "nosuchnode[1-2].invalid"}
    assert master_address(env) == "127.0.0.1"  # the host of srun
    with pytest.raises(
        UserError,
        match=r"the first node, nosuchnode1\.invalid, does not resolve on node2 .* export FATHOM_MASTER_ADDR",
    ):
        master_address({**env, "SLURM_LAUNCH_NODE_IPADDR": ""})
    scontrol = no_slurm / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\necho "NodeName=$4 Arch=x86_64 NodeAddr=127.0.0.9 NodeHostName=vm Version=22"\n'
    )
    scontrol.chmod(0o755)
    assert master_address(env) == "127.0.0.9"


def test_ports() -> None:
    ports = [master_port(job, restart) for job in range(1000, 1020) for restart in range(5)]
    assert len(set(ports)) == len(ports)
    assert all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)


def test_job_handles() -> None:
    assert job_handle({}) is None
    assert job_handle({"SLURM_JOB_ID": "12"}) == "12"
    assert (
        job_handle({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
    )


def test_scontrol_output() -> None:
    line = (
        "JobId=8 JobName=a b JobState=COMPLETING Reason=TimeLimit Dependency=(null) Requeue=1 Restarts=2 "
        "EndTime=2026-11-21T21:43:14 PreemptTime=None NodeList=node1 "
    )
    job = parse_job(line)
    assert job is not None
    assert (job.state, job.reason, job.restarts, job.preempted, job.nodes) == (
        "COMPLETING",
        "TimeLimit",
        2,
        False,
        "node1",
    )
    assert job.end_time is not None
    assert parse_job(
        "JobState=PENDING Reason=None EndTime=Unknown PreemptTime=2026-11-21T21:43:14 NodeList=(null)"
    ) == Job("PENDING", preempted=True)
    assert parse_job("slurm_load_jobs error: Invalid job id specified") is None


def test_how_a_user_likes_to_be_shown_things_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scontrol writes times as SLURM_TIME_FORMAT says.

    squeue leaves out what SQUEUE_STATES does not name.
    """
    scontrol, squeue = tmp_path / "scontrol", tmp_path / "squeue"
    scontrol.write_text(
        '#!/bin/sh\necho "JobState=RUNNING EndTime=${SLURM_TIME_FORMAT:-2026-11-21T21:43:14} $LC_ALL"\n'
    )
    squeue.write_text('#!/bin/sh\n[ -n "$SQUEUE_STATES" ] || echo "12|PENDING|None|N/A|"\n')
    for command in (scontrol, squeue):
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    job = show_job("12")
    assert job is not None
    assert job.end_time == datetime(2026, 11, 21, 21, 43, 14).timestamp()
    assert list(queue() or {}) == ["12"]


def test_an_answer_of_sbatch_that_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch_command = tmp_path / "sbatch"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for answer, expected in {"12;cluster": "12", "Welcome\n13": "13"}.items():
        sbatch_command.write_text(f'#!/bin/sh\necho "{answer}"\n')
        sbatch_command.chmod(0o755)
        assert sbatch(["x"]) == expected
    sbatch_command.write_text("#!/bin/sh\n")
    with pytest.raises(UserError, match="sbatch answered '' in place of the number of a job"):
        sbatch(["x"])


def test_exit_codes() -> None:
    assert [as_exit_code(code) for code in (0, 2, 75, 137, 1, -9)] == [
        ExitCode.FINISHED,
        ExitCode.USER_ERROR,
        ExitCode.STOPPED,
        ExitCode.CRASH,
        ExitCode.CRASH,
        ExitCode.CRASH,
    ]
