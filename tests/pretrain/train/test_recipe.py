"""What recipes are for: post-norm stacks in which every layer learns, and the same without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parallel.launch.exit_codes import ExitCode
from pretrain.config.compose import SHIPPED
from tests.pretrain.small import small_data
from tests.running import run

CONFIG = """
include:
  - {piece}
name: run
runs_dir: {runs}
model: {{num_layers: 48, hidden_size: 32, num_attention_heads: 2}}
data: {{corpora: [{{path: {data}}}], seq_length: 64}}
optimizer: {{lr: 4.0e-3}}
schedule: {{warmup_steps: 20}}
train: {{steps: 200, stop_at_step: 50, global_batch_size: 8, micro_batch_size: 8, eval_samples: 0}}
log: {{signal_interval: 50, tensorboard: false, progress: none}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def layers_at_step_50(piece: str, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Signals of every layer of 48, a quarter into a run at the rate that its warm-up ended at."""
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(piece=SHIPPED / f"{piece}.yaml", runs=folder / "runs", data=data))
    done = run("pretrain", path, limit=400)
    assert done.code == ExitCode.STOPPED_BY_USER, done.err
    lines = (folder / "runs/run/metrics.jsonl").read_text().splitlines()
    signals = [event for event in map(json.loads, lines) if event["event"] == "signal"]
    assert signals[-1]["step"] == 50
    layers: list[dict[str, Any]] = signals[-1]["layers"]
    return layers


def evenness(layers: list[dict[str, Any]]) -> float:
    """The smallest gradient norm of a layer over the largest."""
    norms = [layer["grad_norm"] for layer in layers]
    return float(min(norms) / max(norms))


@pytest.mark.parametrize("recipe", ["b2t", "post_ln", "deepscalelm_post_ln"])
def test_every_layer_of_a_post_norm_recipe_learns(recipe: str, data: Path, tmp_path: Path) -> None:
    layers = layers_at_step_50(f"recipe/{recipe}", data, tmp_path)
    assert evenness(layers) > 0.2
    # The last norm's bias, by which logits start at the token frequencies, is common to all tokens.
    assert max(layer["common_share"] for layer in layers[:-1]) < 0.6


@pytest.mark.parametrize("scheme", ["b2t", pytest.param("deepscalelm_post_ln", marks=pytest.mark.slow)])
def test_without_it_the_stack_is_one_vector_and_its_first_layers_are_out_of_reach(
    scheme: str, data: Path, tmp_path: Path
) -> None:
    layers = layers_at_step_50(f"scheme/{scheme}", data, tmp_path)
    assert evenness(layers) < 1e-3
    assert layers[-1]["common_share"] > 0.99
