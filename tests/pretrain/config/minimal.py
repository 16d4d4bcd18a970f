"""A small configuration, and the line that a mistake in it gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.config.load import load_config

MINIMAL = """\
name: tiny
model:
  num_layers: 2
  hidden_size: 8
  num_attention_heads: 2
data:
  corpora:
    - path: somewhere
  seq_length: 16
optimizer:
  lr: 1e-3
train:
  steps: 4
  global_batch_size: 2
  micro_batch_size: 1
"""


def message(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text
