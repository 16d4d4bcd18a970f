"""Whole runs through the command line: finish, stop and continue, interrupts, values that are not finite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from parallel.launch.exit_codes import ExitCode
from pretrain.rundir.metrics import read_metrics
from tests.pretrain.small import small_data
from tools.cli import main

CONFIG = """
name: tiny
model: {scheme: b2t, num_layers: 3, hidden_size: 16, num_attention_heads: 2, hidden_dropout: 0.1, attention_dropout: 0.1}
data: {corpora: [{path: DATA}], seq_length: 16}
optimizer: {lr: 1.0e-2}
schedule: {warmup_steps: 2}
train: {steps: 8, global_batch_size: 4, micro_batch_size: 2, eval_interval: 4, eval_samples: 4}
log: {signal_interval: 4, progress: none, tensorboard: false}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with a data set of its own."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("DATA", str(small_data(folder))))
    return path


def start(config: Path, runs: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.cli", "pretrain", str(config), f"runs_dir={runs}", *overrides]
    # Other tests of this process may have made it a rank of its own; the run must not take that for a launcher.
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(env, OMP_NUM_THREADS="1"))


def run(config: Path, runs: Path, *overrides: str) -> tuple[int, str]:
    process = start(config, runs, *overrides)
    _, errors = process.communicate(timeout=240)
    return process.returncode, errors


def losses(runs: Path) -> dict[int, tuple[float, float]]:
    return {
        event.step: (event.loss, event.grad_norm)
        for event in read_metrics(runs / "tiny" / "metrics.jsonl").train
    }


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    runs = tmp_path_factory.mktemp("whole")
    code, errors = run(config, runs)
    assert code == ExitCode.FINISHED, errors
    return runs


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refused_run_leaves_nothing(config: Path, tmp_path: Path, processes: int) -> None:
    code, errors = run(
        config, tmp_path / "runs", "data.seq_length=1000000", f"parallel.processes={processes}"
    )
    assert (code, "one sample needs seq_length + 1 = 1000001" in errors) == (ExitCode.USER_ERROR, True), (
        errors
    )
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_leaves_everything(whole: Path) -> None:
    folder = whole / "tiny"
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [event.step for event in metrics.train] == list(range(1, 9))
    assert [event.step for event in metrics.eval] == [4, 8]
    assert [event.step for event in metrics.signal] == [1, 4, 8]
    assert len(metrics.signal[0].layers) == 3
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000008\n"
    assert json.loads((folder / "state.json").read_text())["state"] == "finished"
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"]


def test_stopped_and_continued_is_the_same_run(config: Path, whole: Path, tmp_path: Path) -> None:
    """With dropout on, bit for bit."""
    assert run(config, tmp_path, "train.stop_at_step=5")[0] == ExitCode.STOPPED_BY_USER
    assert run(config, tmp_path)[0] == ExitCode.FINISHED
    assert losses(tmp_path) == losses(whole)


def test_interrupt_saves_and_the_same_command_continues(config: Path, tmp_path: Path) -> None:
    process = start(
        config, tmp_path, "train.steps=100000", "parallel.processes=2", "train.micro_batch_size=1"
    )
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (
        metrics.is_file() and metrics.read_text().count('"train"') > 3
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitCode.STOPPED_BY_USER, errors
    last = max(losses(tmp_path))
    assert (tmp_path / "tiny" / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"


def test_a_refused_start_leaves_the_runs_description(config: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "tiny", tmp_path / "tiny")
    before = (tmp_path / "tiny" / "config.yaml").read_text()
    code, errors = run(config, tmp_path, "model.num_layers=4")
    assert (code, errors.count("\n")) == (ExitCode.USER_ERROR, 1), errors
    assert "was trained with model.num_layers=3" in errors
    assert (tmp_path / "tiny" / "config.yaml").read_text() == before


@pytest.mark.parametrize("ignored", [False, True])
def test_interrupt_while_a_rank_imports_is_quiet(ignored: bool) -> None:
    action = signal.SIG_IGN if ignored else signal.default_int_handler
    previous = signal.signal(signal.SIGINT, action)  # ignoring is inherited
    try:
        env = dict(os.environ, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "pretrain.train.run", "no/such.yaml"],
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith("model.errors\n"):  # long before PyTorch is loaded
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode > 0, "there is no such file"
    assert (process.returncode == 130) is not ignored
    assert "KeyboardInterrupt" not in errors


def test_not_finite_ends_the_run_without_a_checkpoint_of_it(config: Path, tmp_path: Path) -> None:
    code, errors = run(config, tmp_path, "optimizer.lr=1e30", "schedule.warmup_steps=0")
    assert code == ExitCode.DIVERGED, errors
    assert "not finite" in errors
    assert not (tmp_path / "tiny" / "checkpoints").exists()


def test_a_mistake_is_one_line_and_exit_code_2(config: Path, tmp_path: Path) -> None:
    code, errors = run(config, tmp_path, "model.num_layer=12")
    assert code == ExitCode.USER_ERROR
    assert (
        errors
        == "fathom: error: model.num_layer is not a known key (command line); did you mean model.num_layers?\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_one_line_and_exit_code_2(config: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "metrics.jsonl").mkdir(parents=True)
    code, errors = run(config, tmp_path, "parallel.preflight=false")
    assert code == ExitCode.USER_ERROR, errors
    assert (
        errors
        == f"fathom: error: {tmp_path}/tiny/metrics.jsonl: Is a directory, where a file is meant: check the path\n"
    )


def test_a_rank_says_a_mistake_in_one_line() -> None:
    env = dict(os.environ, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.train.run", "quickstart", "train.step=3"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == ExitCode.USER_ERROR
    assert (
        done.stderr
        == "fathom: error: train.step is not a known key (command line); did you mean train.steps?\n"
    )


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="with GPUs, the processes find out what these cannot do"
)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.scheme=b3t"], "b3t"),
        (["optimizer.betas=[1.0, 2.0]"], "optimizer.betas"),
        (["train.global_batch_size=3"], "train.global_batch_size=3"),
        (["data.corpora.0.path=nowhere"], "nowhere is no prepared data set"),
        (["train.fp8.recipe=delayed"], "train.fp8.recipe=delayed needs a GPU"),
        (["train.kernels=te"], "train.kernels=te"),
        (
            ["parallel.processes=1000000", "train.global_batch_size=2000000"],
            "parallel.processes=1000000 is too much",
        ),
    ],
)
def test_mistakes_are_said_before_anything_starts(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
    processes: int,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("pretrain.train.run.start_local", pytest.fail)
    monkeypatch.setattr("pretrain.train.run.run_rank", pytest.fail)
    with pytest.raises(SystemExit) as leaving:
        main(["pretrain", str(config), f"runs_dir={tmp_path}", f"parallel.processes={processes}", *overrides])
    assert leaving.value.code == ExitCode.USER_ERROR
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())
