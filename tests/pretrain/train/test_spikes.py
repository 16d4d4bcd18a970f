"""Steps that would harm are left out, counted and limited, also by a run that goes on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from parallel.launch.exit_codes import ExitCode
from pretrain.config.schema import RunConfig, TrainConfig
from pretrain.config.sections.spikes import SpikeConfig
from pretrain.rundir.metrics import read_metrics
from pretrain.rundir.state import read_state
from pretrain.train.callbacks.base import Callback, RunView, StepRecord
from pretrain.train.callbacks.metrics_log import MetricsFile
from pretrain.train.callbacks.run_state import RunState
from pretrain.train.loop import Trainer
from pretrain.train.spikes import SpikeGuard
from tests.pretrain.small import small_config, small_data, small_trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


class Harm(Callback):
    """Gradients of some steps a thousand times too large, and the losses of all steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.losses: dict[int, tuple[float, float, bool]] = {}
        self.warnings: list[str] = []

    def on_gradients(self, trainer: RunView) -> None:
        if trainer.step in self.steps:
            for buffer in trainer.engine.buffers:
                buffer.partition.mul_(1000)

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        self.losses[record["step"]] = record["loss"], record["grad_norm"], record["skipped"]

    def on_warning(self, trainer: RunView, text: str) -> None:
        self.warnings.append(text)


def config_of(data: Path, runs: Path, steps: int, **spikes: Any) -> RunConfig:
    config = small_config(data, runs, steps, signal_interval=0)
    config.train = config.train.model_copy(
        update={"spikes": SpikeConfig(sigma=20.0, window=8, **spikes), "eval_samples": 0}
    )
    return config


def trained(config: RunConfig, harm: Harm) -> Trainer:
    trainer = small_trainer(config)
    trainer.callbacks += [RunState(), MetricsFile(1), harm]
    trainer.resume()
    trainer.run()
    return trainer


def test_a_spike_is_left_out_and_reported(data: Path, tmp_path: Path) -> None:
    harm = Harm(7)
    trainer = trained(config_of(data, tmp_path, 9), harm)
    assert trainer.exit_code is ExitCode.FINISHED
    assert (trainer.applied_steps, trainer.skipped_in_row) == (8, 0)
    assert [step for step, (_, _, skipped) in harm.losses.items() if skipped] == [7]
    (warning,) = harm.warnings
    assert warning.startswith("gradient norm ")
    assert warning.endswith("the median of 6 steps; the step was not applied")
    events = read_metrics(tmp_path / "small" / "metrics.jsonl").train
    assert [event.step for event in events if event.skipped] == [7]
    without = small_trainer(config_of(data, tmp_path / "other", 9))
    without.callbacks.append(again := Harm())
    without.run()
    assert {step: again.losses[step] for step in range(1, 7)} == {
        step: harm.losses[step] for step in range(1, 7)
    }
    assert again.losses[7][0] == harm.losses[7][0]
    assert again.losses[8][0] != harm.losses[8][0]


def test_many_in_a_row_end_the_run_with_one_line(data: Path, tmp_path: Path) -> None:
    trainer = trained(config_of(data, tmp_path, 20, limit=3), Harm(*range(7, 20)))
    assert (trainer.exit_code, trainer.step) == (ExitCode.DIVERGED, 9)
    reason = read_state(tmp_path / "small")["reason"] or ""
    assert "3 steps in a row were left out (train.spikes.limit), the last of them step 9" in reason
    assert "\n" not in reason


def test_a_run_that_goes_on_decides_as_without_the_stop(data: Path, tmp_path: Path) -> None:
    whole = Harm(8)
    trained(config_of(data, tmp_path / "whole", 12), whole)
    config = config_of(data, tmp_path / "halves", 12)
    config.train = config.train.model_copy(update={"stop_at_step": 7})
    first, second = Harm(8), Harm(8)
    stopped = trained(config, first)
    config.train = config.train.model_copy(update={"stop_at_step": None})
    again = small_trainer(config)
    again.resume()
    assert list(again.spikes.recent) == list(stopped.spikes.recent)
    trained(config, second)
    assert first.losses | second.losses == whole.losses
    assert whole.losses[8][2]


def test_noise_is_no_spike_and_a_new_level_is_taken_up() -> None:
    generator = random.Random(0)
    guard = SpikeGuard(SpikeConfig(sigma=6.0, window=32))
    accepted = [guard.accepts(4 + generator.gauss(0, 0.1), 1 + generator.gauss(0, 0.1)) for _ in range(500)]
    assert all(accepted)
    level = [guard.accepts(5 + generator.gauss(0, 0.1), 1.0) for _ in range(40)]
    assert not any(level[:6])
    assert all(level[-16:])


def test_equal_losses_make_no_noise_a_spike() -> None:
    guard = SpikeGuard(SpikeConfig(sigma=6.0, window=8))
    assert all(guard.accepts(2.0, 1.0) for _ in range(8))
    assert guard.accepts(2.01, 1.0)
    assert not guard.accepts(2.02, 1.0)


@pytest.mark.parametrize(
    ("spikes", "problem"),
    [
        ({"window": 64}, "train.spikes.window=64 has no effect without train.spikes.sigma"),
        ({"sigma": 6.0}, "train.spikes.window=128 has no effect with train.steps=20"),
    ],
)
def test_settings_without_effect_are_refused(spikes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TrainConfig(steps=20, global_batch_size=1, micro_batch_size=1, spikes=SpikeConfig(**spikes))


def test_without_it_nothing_is_kept() -> None:
    guard = SpikeGuard(SpikeConfig())
    assert guard.accepts(1.0, 1.0)
    assert guard.accepts(1e9, 1e9)
    assert (guard.state(), len(guard.recent)) == ({}, 0)
