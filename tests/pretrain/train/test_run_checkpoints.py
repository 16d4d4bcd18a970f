"""Checkpoints of a run.

What is saved and when, who may save, and what the next start makes of what it finds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import UserError
from parallel.checkpoint.errors import SaveError
from parallel.checkpoint.folders import leftovers_in, steps_in
from parallel.checkpoint.reader import open_checkpoint
from parallel.launch.exit_codes import ExitCode
from pretrain.config.schema import RunConfig
from pretrain.rundir.state import Owner, StaleStartError, claim
from pretrain.train import run_checkpoints
from pretrain.train.callbacks.base import Callback, RunView, SaveRecord, StepRecord
from pretrain.train.callbacks.metrics_log import MetricsFile
from pretrain.train.callbacks.run_state import RunState
from pretrain.train.loop import Trainer
from tests.pretrain.small import small_config, small_data, small_trainer, step_record


class Records(Callback):
    """Keeps checkpoint records, and the step at which each came."""

    def __init__(self) -> None:
        self.checkpoints: list[SaveRecord] = []
        self.ended: list[tuple[int, str]] = []

    def on_checkpoint(self, trainer: RunView, record: SaveRecord) -> None:
        self.checkpoints.append(record)

    def on_end(self, trainer: RunView, code: ExitCode, reason: str) -> None:
        self.ended.append((int(code), reason))


class TakeOver(Callback):
    """After a step, a newer start claims the run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        if record["step"] == self.step:
            assert isinstance(trainer, Trainer)
            while not trainer.saving.saver.done:
                time.sleep(0.01)
            claim(trainer.run_dir, Owner("12", 1), state="running")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def run_config(data: Path, runs: Path, **checkpoint: Any) -> RunConfig:
    config = small_config(data, runs, 4, signal_interval=0, hidden_dropout=0.1)
    config.train.eval_samples = 0
    config.checkpoint = config.checkpoint.model_copy(update={"interval": 1, **checkpoint})
    return config


def trained(config: RunConfig, *callbacks: Callback) -> Trainer:
    trainer = small_trainer(config)
    trainer.callbacks += callbacks
    trainer.resume()
    trainer.run()
    return trainer


def files(run_dir: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = open_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}").manifest.files
    return found


def test_saving_in_the_background_saves_the_same(data: Path, tmp_path: Path) -> None:
    once, background = Records(), Records()
    trained(run_config(data, tmp_path / "a"), once)
    trained(run_config(data, tmp_path / "b", asynchronous=True), background)
    assert (
        [record["step"] for record in once.checkpoints]
        == [record["step"] for record in background.checkpoints]
        == [1, 2, 3, 4]
    )
    assert (
        steps_in(tmp_path / "a" / "small" / "checkpoints")
        == steps_in(tmp_path / "b" / "small" / "checkpoints")
        == [3, 4]
    )
    for step in (3, 4):
        assert files(tmp_path / "a" / "small", step) == files(tmp_path / "b" / "small", step)
    for record in once.checkpoints:
        assert record["stall_seconds"] == record["seconds"] > 0
    for record in background.checkpoints[:-1]:
        assert 0 < record["stall_seconds"] <= record["seconds"]
        assert record["bytes"] == once.checkpoints[0]["bytes"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_start_that_was_replaced_touches_nothing(data: Path, tmp_path: Path, asynchronous: bool) -> None:
    config = run_config(data, tmp_path, asynchronous=asynchronous)
    folder, records = tmp_path / "small" / "checkpoints", Records()
    with pytest.raises(StaleStartError, match=r"belongs to start 12\.1 now"):
        trained(config, RunState(), TakeOver(3), records)
    assert steps_in(folder) == [1, 2]
    assert not leftovers_in(folder)
    assert (folder / "latest").read_text() == "step_00000002\n"
    assert records.ended == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_place_that_cannot_be_written_is_one_line(data: Path, tmp_path: Path, asynchronous: bool) -> None:
    config, records = run_config(data, tmp_path, asynchronous=asynchronous), Records()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "checkpoints").write_text("in the way")
    with pytest.raises(SaveError) as said:
        trained(config, records)
    assert str(said.value).startswith("checkpoint not saved, rank 0: ")
    assert "\n" not in str(said.value)
    assert records.ended == [(ExitCode.CRASH, str(said.value))]


def test_the_next_start_says_what_it_found(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(data, tmp_path)
    config.train.stop_at_step = 2
    trained(config)
    folder = tmp_path / "small" / "checkpoints"
    (folder / ".step_00000003.local.0.partial").mkdir()
    capsys.readouterr()
    trainer = small_trainer(config)
    trainer.resume()
    assert (
        capsys.readouterr().err
        == "small: step_00000003 is incomplete (killed while saving); continuing from step_00000002\n"
    )
    (folder / "latest").write_text("step_00000001\n")
    trainer.resume()
    assert trainer.step == 1
    assert (
        "step_00000002 was not confirmed (killed before `latest` named it); continuing from step_00000001\n"
        in capsys.readouterr().err
    )


def test_random_streams_on_another_layout(data: Path, tmp_path: Path) -> None:
    """Not the saved ones, not those of the beginning, and the same at every start."""
    config = run_config(data, tmp_path)
    config.train.stop_at_step = 2
    trained(config)
    saved = torch.get_rng_state()
    config.parallel.zero = 2
    states = []
    for _ in range(2):
        trainer = small_trainer(config)
        first = torch.get_rng_state()
        trainer.resume()
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], first)
    assert not torch.equal(states[0], saved)


def test_other_settings_of_the_data_order_are_refused(data: Path, tmp_path: Path) -> None:
    config = run_config(data, tmp_path)
    config.train.stop_at_step = 1
    trained(config)
    config.train.global_batch_size = 8
    with pytest.raises(
        UserError,
        match=r"was trained with train\.global_batch_size=4, the configuration has 8: "
        r"change it back, or start a run with another",
    ):
        small_trainer(config).resume()


def test_fewer_steps_than_were_done_are_refused_and_more_are_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(data, tmp_path)
    trained(config)
    config.train.steps = 3
    with pytest.raises(
        UserError, match=r"train\.steps=3: the run has done 4 steps .*: set train\.steps=4 or more"
    ):
        small_trainer(config).resume()
    capsys.readouterr()
    config.train.steps, config.schedule.kind = 6, "cosine"
    small_trainer(config).resume()
    said = capsys.readouterr().err
    assert said.startswith(
        "small: differs from step_00000004: schedule.kind constant -> cosine, train.steps 4 -> 6, "
    )
    assert "learning rate of step 5 0.01 -> 0.0016" in said
    assert said.count("\n") == 1


def test_another_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    config = run_config(data, tmp_path)
    config.train.stop_at_step = 1
    trained(config)
    shutil.copytree(data, tmp_path / "other")
    model, described = tmp_path / "other" / "tokenizer.model", tmp_path / "other" / "dataset.json"
    model.write_bytes(model.read_bytes() + b"\0")
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    described.write_text(json.dumps({**json.loads(described.read_text()), "tokenizer_sha256": digest}))
    config.data.corpora[0].path = str(tmp_path / "other")
    with pytest.raises(
        UserError,
        match=r"other/tokenizer\.model is not the tokenizer the run was trained with, "
        r".*step_00000001/tokenizer\.model: name data",
    ):
        small_trainer(config).resume()


@pytest.mark.parametrize("witness", ["latest", "metrics.jsonl"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(
    data: Path, tmp_path: Path, witness: str
) -> None:
    config = run_config(data, tmp_path)
    config.train.stop_at_step = 2
    trained(config, *([] if witness == "latest" else [MetricsFile(1)]))
    folder = tmp_path / "small" / "checkpoints"
    if witness == "latest":
        for manifest in folder.glob("*/manifest.json"):
            manifest.unlink()
    else:
        shutil.rmtree(folder)
    config.checkpoint.load = str(tmp_path / "another")
    for _ in range(2):
        with pytest.raises(
            UserError,
            match="had saved step_00000002, but .*checkpoints holds no complete checkpoint: "
            "restore it .* or begin again under",
        ):
            small_trainer(config).resume()
        config.checkpoint.load = None


def test_a_run_that_ended_before_its_first_save_begins_again(data: Path, tmp_path: Path) -> None:
    config = run_config(data, tmp_path, interval=100)
    (tmp_path / "small" / "checkpoints" / ".step_00000003.local.0.partial").mkdir(parents=True)
    metrics = MetricsFile(1)
    trainer = small_trainer(config)
    trainer.callbacks.append(metrics)
    metrics.on_start(trainer)
    metrics.on_step(trainer, step_record())
    trainer.resume()
    assert trainer.step == 0


def test_a_damaged_checkpoint_says_how_to_go_back(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(data, tmp_path)
    config.train.stop_at_step = 2
    trained(config)
    newest, older = (tmp_path / "small" / "checkpoints" / f"step_{step:08d}" for step in (2, 1))
    weights = newest / "rank_00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(
        UserError,
        match=f"is damaged.*To go back, move {newest} away and start again: "
        f"the run goes on from {older.name}$",
    ):
        small_trainer(config).resume()
    newest.rename(tmp_path / "away")
    config.checkpoint.load = str(tmp_path / "away")
    capsys.readouterr()
    trainer = small_trainer(config)
    trainer.resume()
    assert trainer.step == 1
    assert (
        "step_00000002, the newest, is gone, checkpoint.load is not used, "
        "as the run has checkpoints of its own; continuing from" in capsys.readouterr().err
    )


def test_the_state_of_fp8_goes_with_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its content is tested where Transformer Engine is.

    Here, that it is asked for and given back.
    """
    brought: list[Path] = []
    monkeypatch.setattr(
        run_checkpoints, "checkpoint_file", lambda chunks, topology: {"fp8_state.safetensors": b"state"}
    )
    monkeypatch.setattr(run_checkpoints, "restore", lambda chunks, folder: brought.append(folder))
    config = run_config(data, tmp_path)
    config.train.stop_at_step = 1
    trained(config)
    folder = tmp_path / "small" / "checkpoints" / "step_00000001"
    assert (folder / "fp8_state.safetensors").read_bytes() == b"state"
    assert "fp8_state.safetensors" in files(tmp_path / "small", 1)
    assert not brought
    small_trainer(config).resume()
    assert brought == [folder]


def test_the_start_record_names_precision_and_device(data: Path, tmp_path: Path) -> None:
    trainer = small_trainer(run_config(data, tmp_path))
    assert {key: trainer.start_record()[key] for key in ("precision", "device")} == {
        "precision": "float32",
        "device": "cpu",
    }
    trainer.config.train.fp8.recipe = "delayed"
    assert trainer.start_record()["precision"] == "fp8"
