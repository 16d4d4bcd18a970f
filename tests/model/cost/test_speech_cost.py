"""Operations and bytes of a model of speech, against counting and what autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from model.config import ModelConfig
from model.cost.activations import Activations
from model.cost.flops import flops_per_token, forward_flops
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.speech import FRAMES_PER_TOKEN
from parallel.launch.one_process import single_process
from tests.model.cost.saved import saved_bytes

SAMPLES, SOURCE, TARGET, FILTERS = 3, 12, 16, 20


@pytest.fixture(scope="module", autouse=True)
def _process() -> None:
    single_process()


def config_of(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "family": "speech",
            "scheme": "deepscalelm_pre_ln",
            "encoder_layers": 3,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "position": "sinusoidal",
            "speech": {"filters": FILTERS, "channels": 24},
            **changes,
        }
    )


def model_of(config: ModelConfig) -> LanguageModel:
    settings = transformer_config(config, dtype=torch.float32)
    return LanguageModel(config, settings, seq_length=TARGET, source_length=SOURCE).train()


def loss_of(model: LanguageModel) -> Tensor:
    """Of rows that one clip and one text fill."""
    return model(
        {
            "frames": torch.randn(SAMPLES, FRAMES_PER_TOKEN * SOURCE, FILTERS),
            "frame_documents": torch.ones(SAMPLES, FRAMES_PER_TOKEN * SOURCE, dtype=torch.int64),
            "source_positions": torch.arange(SOURCE).repeat(SAMPLES, 1),
            "tokens": torch.randint(0, 500, (SAMPLES, TARGET)),
            "documents": torch.ones(SAMPLES, TARGET, dtype=torch.int64),
            "positions": torch.arange(TARGET).repeat(SAMPLES, 1),
            "labels": torch.randint(0, 500, (SAMPLES, TARGET)),
        }
    ).mean()


def test_operations_are_those_that_the_model_computes() -> None:
    """But for the half of the decoder's own scores that its mask hides, which are computed here."""
    config = config_of()

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop(query, key, value)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: attention}) as counter:
        loss_of(model_of(config))
    hidden = config.num_layers * 2 * 2 * config.num_attention_heads * config.kv_channels * TARGET / 2
    found = forward_flops(config, TARGET, source_length=SOURCE)
    assert counter.get_total_flops() == SAMPLES * TARGET * (found.total + hidden)
    count = flops_per_token(config, TARGET, source_length=SOURCE)
    assert count.model == pytest.approx(3 * found.total - found.patches)  # frames have no gradient


@pytest.mark.parametrize("changes", [{}, {"scheme": "b2t", "embedding_norm": True}, {"hidden_dropout": 0.1}])
def test_bytes_are_near_what_autograd_saves(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    model = model_of(config)
    saved = saved_bytes(model, lambda: loss_of(model))
    counted = Activations(config, SAMPLES, TARGET, source_length=SOURCE).whole()
    assert counted == pytest.approx(saved, rel=0.01)
