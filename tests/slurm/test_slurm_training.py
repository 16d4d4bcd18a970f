"""Training itself on a real Slurm: two nodes with two ranks each, and what happens to it there.

Every step is in the final history, once and in order.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.launch.exit_codes import ExitCode
from parallel.launch.slurm import expand_hosts
from pretrain.cluster.status import collect
from pretrain.data.tokens.train import special_names
from pretrain.rundir.metrics import read_metrics
from tests.pretrain.pictures import picture_data
from tests.pretrain.small import small_data, small_pairs
from tests.running import run
from tests.slurm.slurm_cluster import PATIENCE, Cluster
from tests.slurm.slurm_runs import Runs, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

STEPS = 30
QUICK_START = f"""
include: [{Path(__file__).resolve().parents[2]}/configs/quickstart.yaml]
name: demo
runs_dir: {{folder}}/runs
{{data}}
parallel: {{{{tensor: 2, pipeline: 2}}}}
schedule: {{{{warmup_steps: 5}}}}
train: {{{{steps: 10, micro_batch_size: 4, eval_samples: 0}}}}
log: {{{{signal_interval: 0, progress: none, tensorboard: false}}}}
"""
FAMILY = """
name: demo
runs_dir: {folder}/runs
model: {{family: {family}, num_layers: 4, hidden_size: 16, num_attention_heads: 2, {model}}}
data: {{corpora: [{{path: {data}}}], cache: {folder}/cache, {lengths}}}
parallel: {{pipeline: 2}}
optimizer: {{lr: 0.001}}
schedule: {{kind: constant}}
train: {{steps: {steps}, global_batch_size: 16, micro_batch_size: 1, eval_samples: 0, label_smoothing: 0.1}}
log: {{signal_interval: 0, progress: none, tensorboard: false}}
"""
FAMILIES: dict[str, tuple[Callable[[Path], Path], dict[str, str]]] = {
    "seq2seq": (small_pairs, {"model": "encoder_layers: 2", "lengths": "source_length: 24, seq_length: 20"}),
    "bert": (
        lambda folder: small_data(folder, special_names("all")),
        {"model": "max_position_embeddings: 24", "lengths": "seq_length: 24"},
    ),
    "vit": (
        picture_data,
        {
            "model": "tie_embeddings: false, vocab_multiple: 2, image: {height: 8, patch: 4}",
            "lengths": "seq_length: 5",
        },
    ),
}
CHECKPOINTS = "checkpoint.interval=5"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of a few thousand tokens."""
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path, data: Path) -> Runs:
    return Runs(cluster, tmp_path, data)


def alone(runs: Runs) -> list[float]:
    """Losses of the same run in one process without Slurm."""
    options = [
        f"runs_dir={runs.folder}/alone",
        "parallel.tensor=1",
        "parallel.pipeline=1",
        "parallel.processes=1",
    ]
    done = run("pretrain", runs.config_file, *options, limit=PATIENCE)
    assert done.code == ExitCode.FINISHED, done.err
    return [event.loss for event in read_metrics(runs.folder / "alone" / "demo" / "metrics.jsonl").train]


def test_signal_save_requeue_resume(runs: Runs) -> None:
    """Tensor and pipeline parallel over two nodes, interrupted by the warning before a time limit.

    The curve is that of one process that was left in peace.
    """
    (job,) = runs.submit()
    runs.cluster.wait_text(runs.run_dir / "metrics.jsonl", '"step": 1,')
    runs.cluster.signal_batch(job)
    assert runs.cluster.wait(job) == "COMPLETED", runs.log.read_text()
    assert runs.cluster.job(job)["Restarts"] == "1"
    assert runs.steps() == list(range(1, STEPS + 1))  # no step lost, none done twice
    state = runs.state()
    assert (state["state"], state["step"], state["restarts"], state["stalled"], state["exit_code"]) == (
        "finished",
        STEPS,
        1,
        0,
        ExitCode.FINISHED,
    )
    assert runs.count("requeued: the time limit is near, or the job is preempted") == 1
    assert runs.count(r"preflight: 4 ranks on 2 nodes, no GPU") == 2
    assert runs.losses() == pytest.approx(alone(runs), rel=2e-6)


@pytest.mark.slow
def test_quick_start_model(runs: Runs) -> None:
    """The same with the 48 layers of the quick start."""
    small = f"data: {{corpora: [{{path: {runs.data}}}], seq_length: 32, cache: {runs.folder}/cache}}"
    runs.config_file.write_text(QUICK_START.format(folder=runs.folder, data=small))
    (job,) = runs.submit()
    runs.cluster.wait_text(runs.run_dir / "metrics.jsonl", '"step": 3,')
    runs.cluster.signal_batch(job)
    assert runs.cluster.wait(job) == "COMPLETED", runs.log.read_text()
    assert runs.cluster.job(job)["Restarts"] == "1"
    assert runs.steps() == list(range(1, 11))
    assert runs.losses() == pytest.approx(alone(runs), rel=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(runs: Runs, family: str) -> None:
    """Begun again between two stages; a translator's first one holds layers of both kinds."""
    prepare, settings = FAMILIES[family]
    made = prepare(runs.folder / "made")
    runs.config_file.write_text(
        FAMILY.format(folder=runs.folder, family=family, data=made, steps=STEPS, **settings)
    )
    (job,) = runs.submit(nodes="1")
    runs.cluster.wait_text(runs.run_dir / "metrics.jsonl", '"step": 1,')
    runs.cluster.signal_batch(job)
    assert runs.cluster.wait(job) == "COMPLETED", runs.log.read_text()
    assert runs.cluster.job(job)["Restarts"] == "1"
    assert runs.steps() == list(range(1, STEPS + 1))
    assert runs.losses() == pytest.approx(alone(runs), rel=2e-6)


def test_stopped_rank_is_named(runs: Runs) -> None:
    """A rank that stands still makes all others wait: the watchdog ends them.

    It says which one it was; nobody asks the stopped one.
    """
    (job,) = runs.submit(
        nodes="1",
        overrides=["parallel.pipeline=1", "train.steps=100000", "parallel.step_timeout_minutes=0.25"],
    )
    runs.cluster.wait_text(runs.run_dir / "metrics.jsonl", '"step": 3,')
    os.kill(runs.rank_process(1), signal.SIGSTOP)
    wait_for(lambda: runs.state()["state"] == "requeued")
    state = runs.state()
    assert "did not end within 15 s: rank 1 on node1 gave no sign of life" in (state["reason"] or "")
    stacks = (runs.run_dir / "control" / f"{job}.0.rank00000.stacks").read_text()
    assert "most recent call first" in stacks
    assert "loop.py" in stacks
    assert runs.steps() == list(range(1, runs.steps()[-1] + 1))


@pytest.mark.slow
def test_stopped_rank_and_on(runs: Runs) -> None:
    """The same on two nodes, to the end of the run."""
    (job,) = runs.submit(overrides=[CHECKPOINTS, "parallel.step_timeout_minutes=0.25"])
    runs.cluster.wait_text(runs.run_dir / "checkpoints" / "latest", "step_00000005")
    os.kill(runs.rank_process(3), signal.SIGSTOP)
    assert runs.cluster.wait(job) == "COMPLETED", runs.log.read_text()
    assert (runs.cluster.job(job)["Restarts"], runs.state()["state"]) == ("1", "finished")
    assert (
        runs.count(r"requeued: step \d+ did not end within 15 s: rank 3 on node2 gave no sign of life") == 1
    )
    assert runs.history() == list(range(1, STEPS + 1))
    assert runs.losses() == pytest.approx(alone(runs), rel=2e-6)


@pytest.mark.slow
def test_killed_rank(runs: Runs) -> None:
    (job,) = runs.submit(overrides=[CHECKPOINTS])
    runs.cluster.wait_text(runs.run_dir / "checkpoints" / "latest", "step_00000005")
    os.kill(runs.rank_process(2), signal.SIGKILL)
    assert runs.cluster.wait(job) == "COMPLETED", runs.log.read_text()
    assert (runs.cluster.job(job)["Restarts"], runs.state()["state"]) == ("1", "finished")
    assert runs.count(r"requeued: rank 2 on node2 died without a word") == 1
    assert runs.history() == list(range(1, STEPS + 1))
    assert runs.losses() == pytest.approx(alone(runs), rel=2e-6)


@pytest.mark.slow
def test_node_off_and_on_fewer(runs: Runs) -> None:
    """Data parallel on two to four nodes: three at first, two after a node is gone.

    The global batch stays, and with it the curve.
    """
    runs.config_file.write_text(
        runs.config_file.read_text().replace("global_batch_size: 16", "global_batch_size: 12")
    )
    (job,) = runs.submit(nodes="2-4", overrides=[CHECKPOINTS, "parallel.pipeline=1"])
    runs.cluster.wait_text(runs.run_dir / "checkpoints" / "latest", "step_00000005")
    runs.cluster.node_off("node3")
    assert runs.cluster.wait(job) == "COMPLETED", runs.log.read_text()
    assert "node3" not in expand_hosts(runs.cluster.job(job)["NodeList"])
    starts = read_metrics(runs.run_dir / "metrics.jsonl").starts
    assert [start.layout["dp"] for start in starts] == [3, 2]
    assert runs.history() == list(range(1, STEPS + 1))
    assert runs.losses() == pytest.approx(alone(runs), rel=2e-6)


@pytest.mark.slow
def test_crash_loop(runs: Runs) -> None:
    """No start can write its checkpoint (a limit on the size of files, as a quota would).

    It is given up after the restarts that were allowed, in words.
    """
    (job,) = runs.submit(
        nodes="1",
        overrides=["parallel.pipeline=1", CHECKPOINTS],
        max_restarts=1,
        site={"setup": ["ulimit -f 64"]},
    )
    assert runs.cluster.wait(job) == "FAILED", runs.log.read_text()
    assert (runs.cluster.job(job)["Restarts"], runs.state()["state"]) == ("1", "failed")
    assert "checkpoint not saved" in (runs.state()["reason"] or "")
    assert "no new checkpoint in 2 starts in a row (the newest is none): not started again" in (
        runs.state()["reason"] or ""
    )
    assert (runs.steps(), runs.history()) == ([1, 2, 3, 4, 5] * 2, [1, 2, 3, 4, 5])


@pytest.mark.slow
def test_node_that_fails_its_check_is_left_out(separate_cluster: Cluster, tmp_path: Path, data: Path) -> None:
    """One node does not see the data: it is named, excluded, and the run is done by the others."""
    runs = Runs(separate_cluster, tmp_path, data)
    separate_cluster.run("@node2", "mount", "-t", "tmpfs", "none", data)
    try:
        (job,) = runs.submit(
            overrides=["parallel.pipeline=1"],
            site={
                "exclude_bad_nodes": True,
                "environment": {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
            },
        )
        assert separate_cluster.wait(job) == "COMPLETED", runs.log.read_text()
    finally:
        separate_cluster.run("@node2", "umount", data)
    assert (separate_cluster.job(job)["Restarts"], separate_cluster.job(job)["ExcNodeList"]) == ("1", "node2")
    assert expand_hosts(separate_cluster.job(job)["NodeList"]) == ["node1", "node3"]
    assert runs.count(r"requeued: rank 2 on node2: .* is no prepared data set") == 1
    assert (runs.state()["state"], runs.state()["excluded"], runs.history()) == (
        "finished",
        ["node2"],
        list(range(1, STEPS + 1)),
    )
    nodes = json.loads((runs.run_dir / "preflight.json").read_text())["nodes"]
    assert sorted(nodes) == ["node1", "node3"]
    assert [status.state for status in collect(runs.run_dir)] == ["finished"]
