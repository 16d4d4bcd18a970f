"""Layers that see a window of the sequence, in a decoder and an encoder without documents, in fp64.

Encoders with documents are among the variants of `tests/model/network/test_encoder.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.network.language_model import LanguageModel
from tests.model.network.references import assert_same_logits, random_model

SEQ, VOCAB = 12, 32
ROTARY = {"position": "rotary", "num_query_groups": 2, "normalization": "rmsnorm", "window": 3}
MODELS: dict[str, dict[str, Any]] = {
    "decoder, all layers": {"window": 2},
    "decoder, alternating": {**ROTARY, "global_every": 2, "rotary_base_local": 50},
    "decoder, a window first": {**ROTARY, "global_every": 3, "global_first": 1},
    "encoder, all layers": {**ROTARY, "family": "bert"},
    "encoder, alternating": {"family": "bert", "window": 1, "global_every": 3},
}


def build(**fields: Any) -> tuple[LanguageModel, ModelConfig]:
    sizes = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24}
    vocabulary = {"vocab_size": VOCAB, "vocab_multiple": VOCAB, "max_position_embeddings": SEQ}
    config = ModelConfig.model_validate({"scheme": "pre_ln", **sizes, **vocabulary, **fields})
    return random_model(config, SEQ), config


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_references(name: str) -> None:
    chunk, config = build(**MODELS[name])
    tokens = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))
    assert_same_logits(chunk, config, tokens)


def test_what_a_token_sees_grows_by_the_window_from_layer_to_layer() -> None:
    chunk, config = build(window=2)
    assert config.window is not None
    tokens = torch.zeros(1, SEQ, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 0] = 1
    reach = config.window * config.num_layers
    moved = (chunk({"tokens": changed}) - chunk({"tokens": tokens})).abs().amax(-1)[0]
    assert bool((moved[: reach + 1] > 0).all())
    assert not moved[reach + 1 :].any()


def test_a_layer_without_the_mask_of_its_window_is_refused() -> None:
    chunk, _ = build(window=2)
    with pytest.raises(ValueError, match="needs its mask"):
        chunk.decoder.layers[0](torch.zeros(SEQ, 1, 16, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"global_every": 2}, "model.global_every=2 has no effect without model.window"),
        ({"window": 2, "global_first": 1}, "model.global_first=1 has no effect without model.global_every"),
        ({"window": 2, "global_every": 2, "global_first": 2}, "model.global_first=2 must be below"),
        (
            {"window": 2, "rotary_base_local": 5},
            "rotary_base_local=5 has no effect without model.global_every",
        ),
        (
            {"window": 2, "global_every": 2, "rotary_base_local": 5},
            "rotary_base_local=5 has no effect with model.position=learned",
        ),
        ({"window": 2, "global_every": 2, "num_layers": 1}, "model.window=2 has no effect"),
    ],
)
def test_options_without_effect_are_refused(fields: dict[str, Any], problem: str) -> None:
    sizes = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=problem):
        ModelConfig.model_validate({**sizes, **fields})
