"""Operations and bytes of a classifier of images, against counting and what autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.cost.activations import Activations
from model.cost.flops import flops_per_token, forward_flops
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from parallel.launch.one_process import single_process
from tests.model.cost.saved import saved_bytes

SAMPLES = 3


def config_of(pool: str, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "family": "vit",
            "scheme": "pre_ln",
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": 10,
            "vocab_multiple": 2,
            "tie_embeddings": False,
            "image": {"height": 8, "channels": 3, "patch": 2, "pool": pool},
            **changes,
        }
    )


@pytest.mark.parametrize("pool", ["class_token", "mean"])
def test_operations_are_those_of_patches_layers_and_one_row_of_logits(pool: str) -> None:
    config = config_of(pool)
    assert config.image is not None
    tokens = config.image.tokens
    found = forward_flops(config, tokens, targets=1 / tokens)
    assert tokens * found.patches == pytest.approx(2 * 16 * 12 * 32)
    assert tokens * found.vocabulary == pytest.approx(2 * 32 * 10)
    count = flops_per_token(config, tokens, targets=1 / tokens)
    assert count.model == pytest.approx(3 * found.total - found.patches)  # pixels have no gradient
    whole = flops_per_token(config, tokens, targets=1 / tokens, recompute="full")
    assert whole.hardware - whole.model == pytest.approx(found.total - found.patches - found.vocabulary)


@pytest.mark.parametrize("pool", ["class_token", "mean"])
def test_bytes_are_near_what_autograd_saves(pool: str) -> None:
    single_process()
    config = config_of(pool)
    assert config.image is not None
    tokens = config.image.tokens
    model = LanguageModel(config, transformer_config(config, dtype=torch.float32), seq_length=tokens)
    batch = {"images": torch.randn(SAMPLES, 3, 8, 8), "labels": torch.zeros(SAMPLES, 1, dtype=torch.int64)}
    saved = saved_bytes(model, lambda: model(batch).mean())
    counted = Activations(config, SAMPLES, tokens, targets=1 / tokens).whole()
    assert counted == pytest.approx(saved, rel=0.01)
