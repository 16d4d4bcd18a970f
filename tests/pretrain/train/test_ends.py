"""What a run leaves when it ends: nothing trained is lost, and every file tells the same end."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import UserError
from parallel.checkpoint.errors import SaveError
from parallel.checkpoint.folders import steps_in
from parallel.launch.exit_codes import ExitCode
from pretrain.cluster.status import run_status
from pretrain.config.schema import RunConfig
from pretrain.report.run import read_run
from pretrain.report.run_report import status as report_status
from pretrain.rundir.metrics import read_metrics
from pretrain.rundir.state import StaleStartError, read_state
from pretrain.train.callbacks.base import Callback, RunView, StepRecord
from pretrain.train.callbacks.metrics_log import MetricsFile
from pretrain.train.callbacks.run_state import RunState
from pretrain.train.loop import Trainer
from pretrain.train.run_checkpoints import way_back
from tests.pretrain.small import small_config, small_data, small_trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def run_config(data: Path, runs: Path, steps: int = 3, **train: Any) -> RunConfig:
    config = small_config(data, runs, steps, signal_interval=0)
    config.train = config.train.model_copy(update=train)
    return config


def trained(config: RunConfig, *callbacks: Callback, wanted: type[BaseException] | None = None) -> Trainer:
    """A run with what `fathom pretrain` writes. wanted: what it has to end with."""
    trainer = small_trainer(config)
    trainer.callbacks += [RunState(), MetricsFile(1), *callbacks]
    trainer.resume()
    with pytest.raises(wanted) if wanted is not None else contextlib.nullcontext():
        trainer.run()
    return trainer


def told(run_dir: Path) -> tuple[str | None, int | None, str, str]:
    """What state.json, metrics.jsonl, `fathom status` and the report say: (state, exit code, state
    shown, colour).
    """
    end = read_metrics(run_dir / "metrics.jsonl").finished
    assert end is not None
    state = read_state(run_dir)
    assert state["exit_code"] == end.exit_code
    assert state["reason"] == end.reason
    return state["state"], end.exit_code, run_status(run_dir, None).state, report_status(read_run(run_dir))[0]


def reason(run_dir: Path) -> str:
    return read_state(run_dir)["reason"] or ""


class At(Callback):
    """Does something at one moment of one step."""

    def __init__(self, moment: str, step: int, action: Any) -> None:
        def act(trainer: Trainer, *args: Any) -> None:
            if trainer.step == step:
                action(trainer)

        setattr(self, moment, act)


class Broken(Callback):
    """Multiplies the weights after a step, so that the next loss is not finite."""

    def __init__(self, step: int, factor: float = math.nan) -> None:
        self.step, self.factor = step, factor

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        if trainer.step == self.step:
            with torch.no_grad():
                for named in trainer.engine.parameters:
                    named.parameter.mul_(self.factor)


def ask(name: str) -> Any:
    return lambda trainer: trainer.requests.stop.ask(name)


# ---- saved first


@pytest.mark.parametrize(("interval", "stop"), [(0, None), (2, None), (2, 2)])
def test_a_failed_evaluation_loses_no_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int, stop: int | None
) -> None:
    """checkpoint.interval is 0: the one at the end is the only one there is."""

    def out_of_memory(self: Any, *args: Any) -> float:
        raise RuntimeError("CUDA out of memory")

    config = run_config(data, tmp_path, steps=3, eval_interval=interval, stop_at_step=stop)
    monkeypatch.setattr("pretrain.train.validation.Validation.measure", out_of_memory)
    if interval and stop is None:
        config.checkpoint.interval = 2
    trained(config, wanted=RuntimeError)
    last = 2 if interval else 3
    assert steps_in(tmp_path / "small" / "checkpoints") == [last]
    assert told(tmp_path / "small") == ("failed", 1, "failed", "bad")
    assert read_state(tmp_path / "small")["step"] == last
    monkeypatch.undo()
    config.train.stop_at_step = None
    assert trained(config).exit_code is ExitCode.FINISHED
    assert told(tmp_path / "small") == ("finished", 0, "finished", "good")
    assert [event.step for event in read_metrics(tmp_path / "small" / "metrics.jsonl").eval][-1] == 3


@pytest.mark.parametrize(("name", "code"), [("TERM", ExitCode.STOPPED), ("INT", ExitCode.STOPPED_BY_USER)])
def test_told_to_leave_it_saves_and_evaluates_never(
    data: Path, tmp_path: Path, name: str, code: ExitCode
) -> None:
    config = run_config(data, tmp_path, steps=4, eval_interval=2)
    trainer = trained(config, At("before_step", 2, ask(name)))
    assert trainer.exit_code is code
    assert steps_in(tmp_path / "small" / "checkpoints") == [2]
    assert not read_metrics(tmp_path / "small" / "metrics.jsonl").eval
    assert told(tmp_path / "small")[:2] == ("stopped", int(code))


@pytest.mark.parametrize("moment", ["on_step", "on_checkpoint"])
def test_told_to_leave_at_the_end_the_last_evaluation_is_the_next_starts(
    data: Path, tmp_path: Path, moment: str
) -> None:
    """Asked in the last step, or while the last checkpoint is written."""
    config = run_config(data, tmp_path, steps=2)
    trainer = trained(config, At(moment, 2, ask("TERM")))
    assert trainer.exit_code is ExitCode.STOPPED
    assert told(tmp_path / "small")[:2] == ("stopped", 75)
    assert "the last evaluation is left to the next start" in (read_state(tmp_path / "small")["reason"] or "")
    assert not read_metrics(tmp_path / "small" / "metrics.jsonl").eval
    assert trained(config).exit_code is ExitCode.FINISHED
    assert [event.step for event in read_metrics(tmp_path / "small" / "metrics.jsonl").eval] == [2]


def test_an_error_does_not_give_up_the_checkpoint_that_is_being_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parallel.checkpoint import background

    write = background.write

    def slow(*args: Any, **keywords: Any) -> int:
        time.sleep(0.5)
        return write(*args, **keywords)

    def fails(trainer: Trainer) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(background, "write", slow)
    config = run_config(data, tmp_path)
    config.checkpoint = config.checkpoint.model_copy(update={"interval": 1, "asynchronous": True})
    trained(config, At("before_step", 2, fails), wanted=RuntimeError)
    assert steps_in(tmp_path / "small" / "checkpoints") == [1]


# ---- diverged


@pytest.mark.parametrize("last", [False, True])
def test_a_diverged_run_is_never_finished(data: Path, tmp_path: Path, last: bool) -> None:
    trainer = trained(run_config(data, tmp_path, steps=3 if last else 5), Broken(2))
    assert (trainer.exit_code, trainer.step) == (ExitCode.DIVERGED, 3)
    assert told(tmp_path / "small") == ("failed", 77, "failed", "bad")
    assert "diverged at step 3" in report_status(read_run(tmp_path / "small"))[1]
    assert reason(tmp_path / "small").endswith(
        "; no checkpoint is saved: begin again with a lower optimizer.lr, say"
    )


def test_a_last_step_that_breaks_the_weights_is_seen_by_the_last_evaluation(
    data: Path, tmp_path: Path
) -> None:
    """Its own loss was finite. The checkpoint before it stays, whatever keep_last says."""
    config = run_config(data, tmp_path)
    config.checkpoint = config.checkpoint.model_copy(update={"interval": 1, "keep_last": 1})
    trainer = trained(config, Broken(3))
    assert trainer.exit_code is ExitCode.DIVERGED
    assert told(tmp_path / "small") == ("failed", 77, "failed", "bad")
    folder = tmp_path / "small" / "checkpoints"
    assert steps_in(folder) == [2, 3]
    assert reason(tmp_path / "small") == (
        "the validation loss is not finite after step 3; step_00000002 is the last checkpoint after which "
        f"steps were taken: move step_00000003 out of {folder} and start again with a lower optimizer.lr, say"
    )
    assert "the run goes on from step_00000003" in way_back(folder, 3)
    assert way_back(folder, 1).startswith(
        "; no step was taken after step_00000002, which may be broken: start"
    )


def test_a_save_that_fails_does_not_hide_that_the_run_diverged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **keywords: Any) -> int:
        time.sleep(0.3)
        raise SaveError("checkpoint not saved, rank 0: No space left on device")

    monkeypatch.setattr("parallel.checkpoint.background.write", fails)
    config = run_config(data, tmp_path, steps=5)
    config.checkpoint = config.checkpoint.model_copy(update={"interval": 2, "asynchronous": True})
    assert trained(config, Broken(2)).exit_code is ExitCode.DIVERGED
    assert "; checkpoint not saved, rank 0" in (read_state(tmp_path / "small")["reason"] or "")


@pytest.mark.parametrize(("limit", "steps"), [(None, 10), (3, 3)])
def test_skipping_ends_after_a_number_of_steps_in_a_row(
    data: Path, tmp_path: Path, limit: int | None, steps: int
) -> None:
    config = run_config(data, tmp_path, steps=30, nan_guard="skip", skip_limit=limit)
    config.checkpoint = config.checkpoint.model_copy(update={"interval": 1, "keep_last": 2})
    trainer = trained(config, Broken(2))
    assert (trainer.exit_code, trainer.step) == (ExitCode.DIVERGED, 2 + steps)
    assert told(tmp_path / "small") == ("failed", 77, "failed", "bad")
    assert f"{steps} steps in a row" in (read_state(tmp_path / "small")["reason"] or "")
    assert steps_in(tmp_path / "small" / "checkpoints")[:2] == [1, 2], "the last good ones are not pruned"
    assert "; step_00000001 is the last checkpoint after" in reason(tmp_path / "small")
    assert ": move step_00000002 and what is newer out of " in reason(tmp_path / "small")


def test_single_steps_are_skipped_without_end(data: Path, tmp_path: Path) -> None:
    """The count begins anew with every step that is applied, and is kept over a restart."""

    class Now(Callback):
        def before_step(self, trainer: RunView) -> None:
            weight = trainer.engine.parameters[0].parameter
            with torch.no_grad():
                if trainer.step % 3:
                    self.value = weight[0, 0].clone()
                    weight[0, 0] = math.nan

        def on_gradients(self, trainer: RunView) -> None:
            weight = trainer.engine.parameters[0].parameter
            with torch.no_grad():
                if trainer.step % 3:
                    weight[0, 0] = self.value

    config = run_config(data, tmp_path, steps=7, nan_guard="skip", skip_limit=3)
    config.train.stop_at_step = 5
    assert trained(config, Now()).skipped_in_row == 2
    config.train.stop_at_step = None
    trainer = small_trainer(config)
    trainer.resume()
    assert (trainer.skipped_in_row, trainer.applied_steps) == (2, 1)
    assert trained(config, Now()).exit_code is ExitCode.FINISHED
    config.train.skip_limit = 2
    shutil.rmtree(tmp_path / "small")
    assert trained(config, Now()).exit_code is ExitCode.DIVERGED


def test_a_run_of_nothing_but_skipped_steps_has_not_finished(data: Path, tmp_path: Path) -> None:
    config = run_config(data, tmp_path, steps=3, nan_guard="skip", eval_samples=0)
    trainer = small_trainer(config)
    trainer.callbacks += [RunState(), MetricsFile(1)]
    with torch.no_grad():
        trainer.engine.parameters[0].parameter.fill_(math.nan)
    assert trainer.run()[0] is ExitCode.DIVERGED


# ---- resumed


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_began_from_anothers_checkpoint_resumes_bit_for_bit(
    data: Path, tmp_path: Path, stop: int
) -> None:
    """Adam's count goes on from the other run's, in every start."""
    first = run_config(data, tmp_path / "first", steps=40)
    first.train.stop_at_step = 20
    trained(first)

    def losses(runs: Path, *stops: int | None) -> list[float]:
        config = run_config(data, runs, steps=5)
        config.checkpoint.load = str(tmp_path / "first" / "small")
        for at in stops:
            config.train.stop_at_step = at
            trained(config)
        return [event.loss for event in read_metrics(runs / "small" / "metrics.jsonl").train]

    assert losses(tmp_path / "resumed", stop, None) == losses(tmp_path / "straight", None)


# ---- what cannot be written


def full(trainer: Trainer) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(trainer.run_dir / "metrics.jsonl"))


@pytest.mark.parametrize("step", [2, 3])
def test_what_a_callback_cannot_write_ends_the_run_with_the_next_vote(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    trainer = trained(run_config(data, tmp_path), At("on_step", step, full), wanted=UserError)
    assert trainer.step == 3
    state, code, *_ = told(tmp_path / "small")
    assert (state, code) == ("failed", 2)
    assert (read_state(tmp_path / "small")["reason"] or "").startswith(
        f"{tmp_path}/small/metrics.jsonl: No space left on"
    )
    assert steps_in(tmp_path / "small" / "checkpoints") == ([3] if step == 3 else [])


def test_a_state_is_told_on_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.rundir import state as states

    states.claim(tmp_path, state="running", reason="a reason of some length")
    inode = (tmp_path / "state.json").stat().st_ino

    def no_room(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(states, "atomic_write_text", no_room)
    for reason in ("no", "the disk is full, and this is a longer reason than the one before it"):
        states.write_state(tmp_path, state="failed", reason=reason)
        assert (read_state(tmp_path)["state"], read_state(tmp_path)["reason"]) == ("failed", reason)
    assert (tmp_path / "state.json").stat().st_ino == inode
    with pytest.raises(OSError, match="No space left"):
        states.write_state(tmp_path, reason="x" * 100_000)
    assert read_state(tmp_path)["state"] == "failed"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_folder_that_is_moved_is_followed_and_left(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    monkeypatch.setattr("pretrain.train.votes.LOOK_SECONDS", 0.0)
    config = run_config(data, tmp_path, steps=5)
    config.checkpoint = config.checkpoint.model_copy(update={"interval": 2, "asynchronous": asynchronous})
    trainer = trained(
        config, At("before_step", 2, lambda trainer: trainer.run_dir.rename(tmp_path / "moved"))
    )
    assert trainer.exit_code is ExitCode.STOPPED_BY_USER
    assert not (tmp_path / "small").exists()
    assert steps_in(tmp_path / "moved" / "checkpoints")[-1] == trainer.step
    assert told(tmp_path / "moved")[:2] == ("stopped", 76)
    assert f"moved while it trained, and is saved in {tmp_path}/moved" in (
        read_state(tmp_path / "moved")["reason"] or ""
    )
    config.name = "moved"
    assert trained(config).exit_code is ExitCode.FINISHED


def test_a_run_folder_that_is_removed_is_not_made_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.train.votes.LOOK_SECONDS", 0.0)
    remove = At("before_step", 2, lambda trainer: shutil.rmtree(trainer.run_dir))
    trained(run_config(data, tmp_path, steps=5), remove, wanted=StaleStartError)
    assert not (tmp_path / "small").exists()


def test_metrics_that_are_removed_go_on_in_a_new_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remove = At("before_step", 3, lambda trainer: (trainer.run_dir / "metrics.jsonl").unlink())
    assert trained(run_config(data, tmp_path, steps=4), remove).exit_code is ExitCode.FINISHED
    metrics = read_metrics(tmp_path / "small" / "metrics.jsonl")
    assert ([event.step for event in metrics.train], len(metrics.starts)) == ([3, 4], 1)
    assert capsys.readouterr().err.count("metrics.jsonl was removed or replaced") == 1


def test_a_state_that_is_removed_is_written_again(data: Path, tmp_path: Path) -> None:
    """As the message about a damaged one advises."""
    remove = At("before_step", 2, lambda trainer: (trainer.run_dir / "state.json").unlink())
    assert trained(run_config(data, tmp_path), remove).exit_code is ExitCode.FINISHED
    assert json.loads((tmp_path / "small" / "state.json").read_text())["state"] == "finished"
