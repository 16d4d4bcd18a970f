"""A configuration that cells of a duel train in a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.small import small_data

CONFIG = """
name: small
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2}
data: {corpora: [{path: DATA}], seq_length: 16}
optimizer: {lr: 1.0e-2}
schedule: {warmup_steps: 2}
train: {steps: 10, global_batch_size: 4, micro_batch_size: 2, eval_samples: 8}
parallel: {processes: 1, zero: 1}
log: {interval: 10}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("duel")
    path = folder / "duel.yaml"
    path.write_text(CONFIG.replace("DATA", str(small_data(folder))))
    return path
