"""Whole runs through the command line.

They finish, stop and continue, are interrupted, and meet values that are not finite.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.launch.exit_codes import ExitCode
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.token_files import BLOCK_BYTES, SAMPLE_BLOCKS
from pretrain.rundir.metrics import read_metrics
from tests import forks, running
from tests.pretrain.small import small_data
from tools.cli import main

CONFIG = """
name: tiny
model: {scheme: b2t, num_layers: 3, hidden_size: 16, num_attention_heads: 2, \
hidden_dropout: 0.1, attention_dropout: 0.1}
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
    # Other tests of this process may have made it a rank of its own.
    # The run must not take that for a launcher.
    env = forks.shell_environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)


def run(config: Path, runs: Path, *overrides: str) -> tuple[int, str]:
    done = running.run("pretrain", config, f"runs_dir={runs}", *overrides, limit=240)
    return done.code, done.err


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


def beside_preflight(errors: str) -> list[str]:
    """What a run said, without the lines of its check before the first step."""
    return [line for line in errors.splitlines() if not line.startswith("preflight: ")]


ENDLESS = "train.steps=100000", "train.micro_batch_size=1"


def wait_for_steps(runs: Path) -> None:
    metrics = runs / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.is_file() and metrics.read_text().count('"train"') > 3):
        assert time.monotonic() < deadline, "no four steps in ten minutes"
        time.sleep(0.1)


@contextmanager
def training(config: Path, runs: Path, *overrides: str) -> Iterator[running.Started]:
    """A run of two processes without end, while it takes steps."""
    with running.start_ranks(2, "pretrain", config, f"runs_dir={runs}", *ENDLESS, *overrides) as started:
        wait_for_steps(runs)
        yield started


def test_interrupt_saves_and_the_same_command_continues(config: Path, tmp_path: Path) -> None:
    """Sent to the process that has started the ranks, as users do."""
    process = start(config, tmp_path, "parallel.processes=2", *ENDLESS)
    try:
        wait_for_steps(tmp_path)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == ExitCode.STOPPED_BY_USER, errors
    last = max(losses(tmp_path))
    assert (tmp_path / "tiny" / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"


def test_a_run_folder_that_is_moved_takes_the_run_along(config: Path, tmp_path: Path) -> None:
    """Saved where it is now, by both processes; nothing appears at its old place."""
    with training(config, tmp_path, "log.interval=1") as started:
        (tmp_path / "tiny").rename(tmp_path / "moved")
        done = started.outcome(limit=240)
    assert done.code == ExitCode.STOPPED_BY_USER, done.err
    assert f"tiny: {tmp_path}/tiny was moved while it trained, and is saved in {tmp_path}/moved" in done.err
    assert not (tmp_path / "tiny").exists()
    end = read_metrics(tmp_path / "moved" / "metrics.jsonl").finished
    assert end is not None
    assert (tmp_path / "moved" / "checkpoints" / "latest").read_text() == f"step_{end.step:08d}\n"
    assert (
        json.loads((tmp_path / "moved" / "state.json").read_text())["exit_code"] == ExitCode.STOPPED_BY_USER
    )


@pytest.mark.parametrize("interval", [4, 0])
def test_a_full_disk_is_one_line_and_is_told(config: Path, tmp_path: Path, interval: int) -> None:
    """Whether the next checkpoint is the first that meets it, or the next line of metrics."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with training(config, disk, f"checkpoint.interval={interval}", "train.eval_interval=0") as started:
            end = time.monotonic() + 240
            while interval and not read_metrics(disk / "tiny" / "metrics.jsonl").checkpoint:
                assert not started.ended, "it ended before its first checkpoint"
                assert time.monotonic() < end, "no checkpoint in four minutes"
                time.sleep(0.02)
            with suppress(OSError), (disk / "large").open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 1024)
            done = started.outcome(limit=240)
        assert done.code in (ExitCode.CRASH, ExitCode.USER_ERROR), done.err
        assert len(beside_preflight(done.err)) == 1, done.err
        assert "No space left on device" in done.err
        assert f"{disk}/tiny" in done.err
        state = json.loads((disk / "tiny" / "state.json").read_text())
        assert (state["state"], state["exit_code"]) == ("failed", done.code)
        assert "No space left on device" in state["reason"]
        (disk / "large").unlink()
        saved = read_metrics(disk / "tiny" / "metrics.jsonl").checkpoint
        assert bool(saved) is bool(interval)
        code, errors = run(config, disk, f"train.steps={saved[-1].step + 20 if saved else 3}")
        assert code == ExitCode.FINISHED, errors
        assert read_metrics(disk / "tiny" / "metrics.jsonl").damaged == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refused_start_leaves_no_folder_where_there_was_none(
    config: Path, tmp_path: Path, processes: int
) -> None:
    overrides = [
        f"parallel.processes={processes}",
        "train.micro_batch_size=1",
        f"checkpoint.load={tmp_path}/nowhere",
    ]
    code, errors = run(config, tmp_path / "runs", *overrides)
    assert (code, len(beside_preflight(errors))) == (ExitCode.USER_ERROR, 1), errors
    assert f"{tmp_path}/nowhere holds no checkpoint" in errors
    assert not list(tmp_path.iterdir())


def test_a_refused_start_leaves_the_runs_description(config: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "tiny", tmp_path / "tiny")
    before = (tmp_path / "tiny" / "config.yaml").read_text()
    code, errors = run(config, tmp_path, "model.num_layers=4")
    assert (code, errors.count("\n")) == (ExitCode.USER_ERROR, 1), errors
    assert "was trained with model.num_layers=3" in errors
    assert (tmp_path / "tiny" / "config.yaml").read_text() == before


def test_a_start_that_takes_no_step_leaves_the_runs_description(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    """One that does take a step says with what."""
    shutil.copytree(whole / "tiny", tmp_path / "tiny")
    described = [tmp_path / "tiny" / name for name in ("config.yaml", "environment.json")]
    described[1].write_text("{}")
    before = [path.read_text() for path in described]
    assert run(config, tmp_path, "optimizer.lr=1e-4", "train.eval_samples=0")[0] == ExitCode.FINISHED
    assert [path.read_text() for path in described] == before
    assert run(config, tmp_path, "optimizer.lr=1e-4", "train.steps=9")[0] == ExitCode.FINISHED
    assert "lr: 0.0001" in described[0].read_text()
    assert "packages" in described[1].read_text()


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


def test_tokens_beyond_the_vocabulary_end_all_ranks_in_one_line(config: Path, tmp_path: Path) -> None:
    """Where only some rank meets them, in a place that no start compares."""
    words, first = random.Random(0), config.parent
    (tmp_path / "in.txt").write_text("".join(words.choices("abcdefghijklmnop ", k=250_000)))
    options = PrepareOptions(
        inputs=[str(tmp_path / "in.txt")],
        out=tmp_path / "data",
        tokenizer=first / "tokenizer.model",
        split=(1.0, 0.0, 0.0),
        workers=1,
    )
    prepare(options)
    damage_unseen(tmp_path / "data" / "train.bin")
    done = running.run_ranks(
        2,
        "pretrain",
        config,
        f"runs_dir={tmp_path / 'runs'}",
        f"data.corpora.0.path={tmp_path / 'data'}",
        "train.eval_samples=0",
        "train.eval_interval=0",
        "train.steps=50",
        limit=240,
    )
    (line,) = beside_preflight(done.err)
    assert (done.code, "token 65535 in a vocabulary of 300, in sample" in line) == (ExitCode.USER_ERROR, True)
    assert f"fathom data verify {tmp_path / 'data'}" in line


def damage_unseen(path: Path) -> None:
    """Overwrites the first token after each block that a start compares."""
    tokens = np.memmap(path, dtype=np.uint16, mode="r+")
    size = tokens.nbytes
    assert size > 1.2 * SAMPLE_BLOCKS * BLOCK_BYTES
    for number in range(SAMPLE_BLOCKS - 1):
        begin = (size - BLOCK_BYTES) * number // (SAMPLE_BLOCKS - 1) // 4 * 4
        tokens[(begin + BLOCK_BYTES) // 2 :][:1000:10] = 65535
    tokens.flush()


def test_not_finite_ends_the_run_without_a_checkpoint_of_it(config: Path, tmp_path: Path) -> None:
    code, errors = run(config, tmp_path, "optimizer.lr=1e30", "schedule.warmup_steps=0")
    assert code == ExitCode.DIVERGED, errors
    assert "not finite" in errors
    assert not (tmp_path / "tiny" / "checkpoints").exists()


def test_a_mistake_is_one_line_and_exit_code_2(config: Path, tmp_path: Path) -> None:
    code, errors = run(config, tmp_path, "model.num_layer=12")
    assert code == ExitCode.USER_ERROR
    assert errors == (
        "fathom: error: model.num_layer is not a known key (command line); did you mean model.num_layers?\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_one_line_and_exit_code_2(config: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "metrics.jsonl").mkdir(parents=True)
    code, errors = run(config, tmp_path, "parallel.preflight=false")
    assert code == ExitCode.USER_ERROR, errors
    assert errors == (f"fathom: error: {tmp_path}/tiny/metrics.jsonl is no regular file: move it away\n")


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
            ["parallel.processes=1000", "train.global_batch_size=2000"],
            "parallel.processes=1000 is too much",
        ),
        (["parallel.processes=1000000"], "parallel.processes=1000000 must be at most 1024"),
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
    for name in forks.OF_A_RUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pretrain.train.run.start_local", pytest.fail)
    monkeypatch.setattr("pretrain.train.run.run_rank", pytest.fail)
    with pytest.raises(SystemExit) as leaving:
        main(["pretrain", str(config), f"runs_dir={tmp_path}", f"parallel.processes={processes}", *overrides])
    assert leaving.value.code == ExitCode.USER_ERROR
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())
