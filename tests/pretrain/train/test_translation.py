"""Encoder-decoders on pairs: stopped, gone on with in another layout, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.launch.exit_codes import ExitCode
from pretrain.config.schema import Corpus
from pretrain.data.pairs.samples import open_pairs
from pretrain.report.run import read_run
from pretrain.report.run_numbers import facts
from pretrain.rundir.metrics import read_metrics
from tests.pretrain.small import small_pairs
from tests.running import run_ranks

SEED, LENGTHS, STEPS, BATCH = 5, (24, 20), 6, 8
CONFIG = f"""
name: tiny
model: {{family: seq2seq, num_layers: 4, encoder_layers: 2, hidden_size: 16, num_attention_heads: 2, \
hidden_dropout: 0.1, attention_dropout: 0.1}}
data: {{corpora: [{{path: DATA}}], source_length: {LENGTHS[0]}, seq_length: {LENGTHS[1]}}}
optimizer: {{lr: 1.0e-2}}
schedule: {{warmup_steps: 2}}
train: {{steps: {STEPS}, global_batch_size: {BATCH}, micro_batch_size: 2, eval_interval: 3, eval_samples: 4, \
seed: {SEED}, label_smoothing: 0.1}}
log: {{signal_interval: 0, progress: none, tensorboard: false}}
"""
PLAIN = "model.hidden_dropout=0", "model.attention_dropout=0"
TWO = 2, "parallel.tensor=2", "parallel.sequence_parallel=true"
STAGES = 2, "parallel.pipeline=2"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translation")
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("DATA", str(small_pairs(folder))))
    return path


def pretrain(config: Path, runs: Path, world: int, *overrides: str) -> list[dict[str, Any]]:
    """A start that ends as it should. Returns the lines of all steps so far."""
    done = run_ranks(world, "pretrain", config, f"runs_dir={runs}", *overrides, limit=400)
    assert done.code in (ExitCode.FINISHED, ExitCode.STOPPED_BY_USER), done.err
    lines = (runs / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] in ("train", "eval")]


def counted(lines: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """What of the lines no clock decides."""
    keys = ("step", "loss", "grad_norm", "tokens")
    return [tuple(line[key] for key in keys if key in line) for line in lines]


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("whole")
    pretrain(config, runs, *STAGES)
    return runs


def test_a_pipeline_that_stops_goes_on_bit_for_bit(config: Path, whole: Path, tmp_path: Path) -> None:
    """With dropout, whose streams the stages keep."""
    pretrain(config, tmp_path, *STAGES, "train.stop_at_step=3", "train.eval_samples=0")
    events = counted(pretrain(config, tmp_path, *STAGES))
    lines = (whole / "tiny" / "metrics.jsonl").read_text().splitlines()
    wanted = [line for line in map(json.loads, lines) if line["event"] in ("train", "eval")]
    early = [line for line in wanted if line["event"] == "train" or line["step"] == STEPS]
    assert events == counted(early)


def test_a_run_goes_on_in_another_layout(config: Path, tmp_path: Path) -> None:
    expected = counted(pretrain(config, tmp_path / "one", 1, *PLAIN))
    pretrain(config, tmp_path / "cut", *STAGES, *PLAIN, "train.stop_at_step=3")
    found = counted(pretrain(config, tmp_path / "cut", *TWO, *PLAIN))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6)


def test_tokens_are_those_of_targets(config: Path, whole: Path) -> None:
    """Of all ranks, and without padding; how much that is, is told."""
    corpora = [Corpus(path=str(config.parent / "data"))]
    blend = open_pairs(corpora, "train", LENGTHS, SEED, config.parent / "cache")
    metrics = read_metrics(whole / "tiny" / "metrics.jsonl")
    labels = [
        int(blend.batch(range(step * BATCH, (step + 1) * BATCH))["weights"].sum()) for step in range(STEPS)
    ]
    assert [event.tokens for event in metrics.train] == np.cumsum(labels).tolist()
    for event, own in zip(metrics.train, labels, strict=True):
        assert event.tokens_per_s * event.step_time_s == pytest.approx(own)
    batch = blend.batch(range(blend.samples_per_epoch[0]))
    places = [batch[name] for name in ("documents", "source_documents")]
    empty = sum(int((place == 0).sum()) for place in places) / sum(place.numel() for place in places)
    assert metrics.starts[0].padding == pytest.approx(empty)
    told = dict(facts(read_run(whole / "tiny")))
    assert told["Batch"] == f"{BATCH} × {LENGTHS[0]} + {LENGTHS[1]} tokens, {empty:.1%} of them padding"
