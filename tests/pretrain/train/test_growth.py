"""Runs whose batches and sequences grow: which samples a step takes, what is told, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.errors import UserError
from parallel.launch.one_process import single_process
from pretrain.config.schema import RunConfig
from pretrain.data.samples import open_samples
from pretrain.report.run import read_run
from pretrain.report.run_numbers import _batch
from pretrain.rundir.metrics import read_metrics
from pretrain.train.batches import StepBatches
from pretrain.train.callbacks.metrics_log import MetricsFile
from tests.pretrain.small import small_config, small_data, small_trainer

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("growth"))


def growing(data: Path, runs: Path, **rampup: int) -> RunConfig:
    config = small_config(data, runs, STEPS, signal_interval=0, position="rotary")
    config.train.global_batch_size, config.data.document_mask = 8, True
    config.schedule.batch_rampup.__dict__.update(start=4, increment=2, steps=5, **rampup)
    config.schedule.seq_length_warmup.__dict__.update(start=4, steps=6)
    return RunConfig.model_validate(config.model_dump())


def test_every_sample_is_read_once_in_its_order(data: Path, tmp_path: Path) -> None:
    config = growing(data, tmp_path)
    samples = open_samples(config, "next_token", "train")
    batches = StepBatches(config, samples, single_process(), torch.device("cpu"))
    assert [batches.number(step) for step in range(STEPS)] == [2, 2, 2, 3, 3, 4, 4, 4]
    found = [batch for step in range(STEPS) for batch in batches.fetch(step)]
    tokens = torch.cat([batch["tokens"].reshape(-1, 16) for batch in found])
    assert torch.equal(tokens, samples.batch(range(len(tokens)))["tokens"])
    assert [len(batch["tokens"][0]) for batch in found][:: len(found) - 1] == [4, 16]


def test_a_run_goes_on_exactly_and_tells_what_grows(data: Path, tmp_path: Path) -> None:
    losses = []
    for runs, parts in ((tmp_path / "whole", [STEPS]), (tmp_path / "parts", [2, 4, STEPS])):
        config = growing(data, runs)
        for stop in parts:
            config.train.stop_at_step = stop
            trainer = small_trainer(config)
            trainer.callbacks.append(MetricsFile(1))
            trainer.resume()
            trainer.run()
        found = read_metrics(runs / "small" / "metrics.jsonl").train
        losses.append([event.loss for event in found])
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    assert [event.batch_size for event in found] == [4, 4, 4, 6, 6, 8, 8, 8]
    assert [event.seq_length for event in found] == [4, 4, 4, 8, 8, 8, 16, 16]
    assert [event.tokens for event in found] == [16 * n for n in (4, 8, 12, 18, 24, 32, 40, 48)]
    (tmp_path / "parts" / "small" / "config.yaml").write_text(config.model_dump_json())
    planned, words = _batch(read_run(tmp_path / "parts" / "small"))
    assert planned == 16 * 48
    assert words == "4 to 8 over 5 steps × 4 to 16 over 6 steps tokens"
    other = growing(data, tmp_path / "parts")
    other.schedule.batch_rampup.steps = 4
    with pytest.raises(UserError, match="was trained with schedule.batch_rampup="):
        small_trainer(other).resume()
