"""The cluster side of a run on a real Slurm: what happens to it.

Also what is said about it afterwards. The training itself is stood in for.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from parallel.launch.slurm import expand_hosts
from pretrain.cluster.status import collect
from pretrain.rundir.state import read_submitted
from tests.slurm.slurm_cluster import Cluster
from tests.slurm.slurm_runs import Runs, wait_for
from tools.runs.submit import follow_log

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path) -> Runs:
    return Runs(cluster, tmp_path)


def test_two_nodes_signal_requeue_resume(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks and the meeting point from Slurm alone.

    The warning before a time limit saves, requeues and loses no step.
    """
    monkeypatch.setenv(
        "SLURM_TIME_FORMAT", "relative"
    )  # how a user likes times to be shown, here and in the job
    (job,) = runs.submit("--steps", "20", "--hold-at", "5", "--collective")
    for rank, local, node in ((0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)):
        line = rf"rank {rank}/4 local {local}/2 node {node}/2 \(node{node + 1}\) from step 0"
        runs.says(line)  # in whatever order they come
        assert runs.count(line) == 1
    runs.cluster.wait_text(runs.run_dir / "metrics.jsonl", '"step": 3')
    assert (runs.state()["ends_at"] or 0) > time.time()
    runs.cluster.signal_batch(job)
    assert runs.cluster.wait(job) == "COMPLETED"
    assert runs.cluster.job(job)["Restarts"] == "1"
    state = runs.state()
    assert (state["state"], state["step"], state["restarts"], state["job_id"], state["exit_code"]) == (
        "finished",
        20,
        1,
        job,
        0,
    )
    assert runs.steps() == list(range(1, 21))
    assert runs.count("requeued: the time limit is near, or the job is preempted") == 1
    assert runs.count(r"rank \d/4 .* from step [1-9]") == 4


def test_nodes_with_addresses_of_their_own(separate_cluster: Cluster, tmp_path: Path) -> None:
    runs = Runs(separate_cluster, tmp_path)
    (job,) = runs.submit(
        "--steps",
        "3",
        "--collective",
        site={"environment": {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}},
    )
    assert separate_cluster.wait(job) == "COMPLETED"
    assert runs.count(r"rank \d/4 local \d/2 node \d/2 \(node\d\) from step 0") == 4
    assert (runs.state()["state"], runs.steps()) == ("finished", [1, 2, 3])


def test_asked_to_stop_for_good(runs: Runs) -> None:
    (job,) = runs.submit("--steps", "1000", nodes="1")
    runs.says("rank 0/2")
    runs.cluster.signal_batch(job, "USR2")
    assert runs.cluster.wait(job) == "COMPLETED"
    assert runs.cluster.job(job)["Restarts"] == "0"
    state = runs.state()
    assert (state["state"], state["reason"], state["step"]) == (
        "stopped",
        "asked to save and stop for good",
        runs.steps()[-1],
    )


def test_signal_while_tasks_are_starting(runs: Runs) -> None:
    """A request that comes before Python has handlers is neither lost nor deadly."""
    python, started, asked = (
        runs.folder / "slow_python",
        runs.folder / "started",
        f"{runs.run_dir}/control/*.stop",
    )
    slow = f"echo >>{started}; until ls {asked}; do sleep 0.1; done >/dev/null 2>&1"
    python.write_text(
        f'#!/bin/bash\nif [ -n "$SLURM_STEP_ID" ]; then {slow}; fi\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (job,) = runs.submit("--steps", "1000", nodes="1", site={"python": str(python)})
    runs.cluster.wait_text(started, "\n")
    runs.cluster.signal_batch(job, "USR2")
    assert runs.cluster.wait(job) == "COMPLETED"
    assert runs.state()["state"] == "stopped"
    assert len(runs.steps()) <= 1


def test_crash_loop_ends(runs: Runs) -> None:
    (job,) = runs.submit("--fail-with", "1", max_restarts=1)
    assert runs.cluster.wait(job) == "FAILED"
    assert runs.cluster.job(job)["Restarts"] == "1"
    state = runs.state()
    assert state["state"] == "failed"
    assert (state["reason"] or "").startswith(
        "rank 3 on node2: a failure on purpose; no new checkpoint in 2 starts in a row (the newest is none)"
    )


def test_bad_node_is_left_out(runs: Runs) -> None:
    """The node that failed its check is excluded from the job, and the others do the run."""
    (job,) = runs.submit("--steps", "3", "--bad-node", "node2", site={"exclude_bad_nodes": True})
    assert runs.cluster.wait(job) == "COMPLETED"
    found = runs.cluster.job(job)
    assert (found["Restarts"], found["ExcNodeList"], expand_hosts(found["NodeList"])) == (
        "1",
        "node2",
        ["node1", "node3"],
    )
    assert runs.count("requeued: rank 2 on node2: GPU 1 computes wrong products") == 1
    assert (runs.state()["state"], runs.state()["excluded"], runs.steps()) == (
        "finished",
        ["node2"],
        [1, 2, 3],
    )


def test_user_error_is_not_repeated(runs: Runs) -> None:
    options = {"sbatch": ["--comment='two words, --time=1 # and more'"], "srun": ["--job-name='a b;exit 7'"]}
    with pytest.raises(ValidationError, match="set by the batch script itself"):
        runs.submit("--fail-with", "2", nodes="1", site=options)
    options["srun"] = ["--comment='a b;exit 7 # c'"]
    (job,) = runs.submit("--fail-with", "2", nodes="1", site=options)
    assert runs.cluster.wait(job) == "FAILED"
    assert (runs.cluster.job(job)["Restarts"], runs.state()["state"]) == ("0", "failed")
    assert " Comment=two words, --time=1 # and more " in runs.cluster.run(
        "scontrol", "show", "job", "-o", job
    )


def test_killed_rank_restarts_from_the_checkpoint(runs: Runs) -> None:
    """A rank that dies without a word takes the others along.

    The run goes on from its newest checkpoint.
    """
    (job,) = runs.submit("--steps", "40", "--hold-at", "8", "--save-every", "5")
    runs.cluster.wait_text(runs.run_dir / "checkpoints" / "latest", "step_00000005")
    victim = subprocess.run(
        ["pgrep", "-f", f"^{sys.executable} .*standin.py {runs.run_dir}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[0]
    subprocess.run(["kill", "-KILL", victim], check=True)
    assert runs.cluster.wait(job) == "COMPLETED"
    assert runs.cluster.job(job)["Restarts"] == "1"
    assert runs.count(r"requeued: a rank was killed by SIGKILL") == 1
    # Where the victim was not rank 0, srun's SIGTERM made rank 0 save once more on the way out.
    assert runs.count(r"rank 0/4 .* from step [5-8]$") == 1
    assert sorted(set(runs.steps())) == list(range(1, 41))


def test_scancel_is_final(runs: Runs) -> None:
    (job,) = runs.submit("--steps", "1000")
    runs.says("rank 0/4")
    runs.cluster.run("scancel", job)
    assert runs.cluster.wait(job) == "CANCELLED"
    wait_for(lambda: runs.state()["state"] == "cancelled")
    assert (runs.cluster.job(job)["JobState"], runs.cluster.job(job)["Restarts"]) == ("CANCELLED", "0")
    assert [(status.state, status.job) for status in collect(runs.folder / "runs")] == [("cancelled", job)]


def test_preemption(runs: Runs) -> None:
    """A job of a higher partition takes the nodes; the run saves, waits, goes on.

    None of it counts as a failure.
    """
    (job,) = runs.submit(
        "--steps",
        "40",
        "--hold-at",
        "5",
        nodes="3",
        site={"partition": "low", "exclusive": True},
        overrides=["train.global_batch_size=12"],
    )
    runs.cluster.wait_text(runs.run_dir / "metrics.jsonl", '"step": 3')
    urgent = runs.cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 1"
    ).strip()
    assert runs.cluster.wait(urgent) == "COMPLETED"
    assert runs.cluster.wait(job) == "COMPLETED"
    state = runs.state()
    assert (state["state"], state["step"], state["restarts"], state["stalled"]) == ("finished", 40, 1, 0)
    assert runs.steps() == list(range(1, 41))


@pytest.mark.slow
def test_time_limit(runs: Runs) -> None:
    """Slurm's own clock: the warning, a save, and on in a second start.

    Takes a minute or two, as limits are whole minutes and the clock is coarse.
    """
    (job,) = runs.submit("--steps", "40", "--hold-at", "5", nodes="1", time="2", site={"signal_margin": 60})
    assert runs.cluster.wait(job) == "COMPLETED"
    assert runs.cluster.job(job)["Restarts"] == "1"
    assert runs.steps() == list(range(1, 41))


@pytest.mark.parametrize(("node", "nodes", "before", "after"), [("node1", "2", 4, 4), ("node2", "2-3", 6, 4)])
def test_power_off(runs: Runs, node: str, nodes: str, before: int, after: int) -> None:
    """A node that is gone, of the batch script or not: the run goes on on what is left.

    It goes on from its newest checkpoint.
    """
    (job,) = runs.submit(
        "--steps",
        "40",
        "--hold-at",
        "8",
        "--save-every",
        "5",
        nodes=nodes,
        overrides=["train.global_batch_size=12"],
    )
    runs.cluster.wait_text(runs.run_dir / "checkpoints" / "latest", "step_00000005")
    runs.cluster.node_off(node)
    assert runs.cluster.wait(job) == "COMPLETED"
    assert runs.cluster.job(job)["Restarts"] == "1"
    assert node not in expand_hosts(runs.cluster.job(job)["NodeList"])
    assert (
        runs.count(rf"rank 0/{before} .* from step 0$")
        == runs.count(rf"rank 0/{after} .* from step [1-9][0-9]?$")
        == 1
    )
    state = runs.state()
    assert (state["state"], state["step"], state["restarts"]) == ("finished", 40, 1)
    assert sorted(set(runs.steps())) == list(range(1, 41))


def test_range_of_nodes(runs: Runs) -> None:
    """Slurm gives all three; eight samples do not divide over six processes, so two are used."""
    (job,) = runs.submit("--steps", "2", nodes="1-4")
    assert runs.cluster.wait(job) == "COMPLETED"
    assert (runs.cluster.job(job)["NumNodes"], runs.count(r"rank \d/4 .* node \d/2 ")) == ("3", 4)


def test_chain(runs: Runs) -> None:
    """At a time limit the next job goes on instead of a requeue.

    A job that is left over leaves at once.
    """
    first, second, third = runs.submit("--steps", "40", "--hold-at", "5", nodes="1", chain=3)
    runs.says("rank 0/2")
    runs.cluster.signal_batch(first)
    assert [runs.cluster.wait(job) for job in (first, second, third)] == ["COMPLETED"] * 3
    assert [runs.cluster.job(job)["Restarts"] for job in (first, second, third)] == ["0"] * 3
    assert (runs.state()["state"], runs.state()["job_id"], runs.steps()) == (
        "finished",
        second,
        list(range(1, 41)),
    )
    assert read_submitted(runs.run_dir)["jobs"] == [first, second, third]
    assert "the run is finished" in (runs.run_dir / f"slurm-{third}.out").read_text()


def test_dependency_and_log(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Waits for another job; status says so; --follow shows the whole log and ends with the job."""
    over = runs.folder / "over"
    other = runs.cluster.run(
        "sbatch", "--parsable", f"--wrap=until [ -e {over} ]; do sleep 0.1; done"
    ).strip()
    (job,) = runs.submit("--steps", "2", nodes="1", dependency=f"afterok:{other}")
    (status,) = collect(runs.run_dir)
    assert (status.state, status.job, status.reason.split(",")[0]) == ("queued", job, "waits: Dependency")
    over.touch()
    monkeypatch.setattr("tools.runs.submit.QUEUE_SECONDS", 1.0)
    follow_log(runs.log, job)
    assert capsys.readouterr().out == runs.log.read_text()
    assert (runs.cluster.wait(job), runs.cluster.job(other)["JobState"]) == ("COMPLETED", "COMPLETED")
    assert [status.state for status in collect(runs.run_dir)] == ["finished"]


def test_array(runs: Runs) -> None:
    """Two runs of one array; stopping one for a requeue leaves the other alone."""
    (job,) = runs.submit(
        "--steps",
        "40",
        "--hold-at",
        "5",
        nodes="1",
        array=["optimizer.lr=0.01", "optimizer.lr=0.1 train.seed=7"],
    )
    folders = [runs.run_dir / f"demo-{index}" for index in range(2)]
    for index, folder in enumerate(folders):
        runs.cluster.wait_text(folder / "metrics.jsonl", '"step": 3')
        assert f"seed: {(1234, 7)[index]}" in (folder / "config.yaml").read_text()
    # The element that Slurm started last has the id of the array.
    # A requeue by that id would restart both.
    runs.cluster.signal_batch(f"{job}_1")
    for index in range(2):
        assert runs.cluster.wait(f"{job}_{index}") == "COMPLETED"
    assert [runs.state(folder)["state"] for folder in folders] == ["finished"] * 2
    assert [runs.state(folder)["restarts"] for folder in folders] == [0, 1]
    assert [runs.cluster.job(f"{job}_{index}")["Restarts"] for index in range(2)] == ["0", "1"]


def test_second_submission_is_refused_while_a_job_is_at_it(runs: Runs) -> None:
    (job,) = runs.submit("--steps", "1000", nodes="1")
    with pytest.raises(
        ValueError,
        match=rf"job {job} \((pending|configuring|running)\) is at .*demo already: "
        rf"scancel {job}, or choose another name",
    ):
        runs.submit("--steps", "1000", nodes="1")


def test_slurm_refuses(runs: Runs) -> None:
    with pytest.raises(ValueError, match="Slurm refused the job: .*invalid partition"):
        runs.submit(site={"partition": "nosuch"})
    assert runs.state()["state"] == "failed"
