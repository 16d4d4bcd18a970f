"""Options of attention and logits: logits and gradients of models that have them, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.network.language_model import LanguageModel
from tests.model.hf.tiny import make_config, make_tokens
from tests.model.network.references import assert_same_logits, random_model

SEQ = 12
ROTARY = {"position": "rotary", "num_query_groups": 2, "normalization": "rmsnorm"}
LLAMA3 = {"scaling": "llama3", "factor": 4.0, "original_positions": 20}
YARN = {"scaling": "yarn", "factor": 4.0, "original_positions": 20, "beta_fast": 3.0, "share": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "part of a head turns": {**ROTARY, "rotary": {"share": 0.25}},
    "linear scaling": {**ROTARY, "rotary": {"scaling": "linear", "factor": 3.0}},
    "Llama 3": {**ROTARY, "rotary": LLAMA3},
    "YaRN, an encoder": {**ROTARY, "rotary": YARN, "family": "bert"},
    "norms of queries and keys": {**ROTARY, "attention": {"qk_norm": True}},
    "norms of queries and keys, an encoder": {
        "attention": {"qk_norm": True, "soft_cap": 0.7},
        "family": "bert",
        "logit_soft_cap": 1.5,
    },
    "biases of queries, keys and values": {**ROTARY, "attention": {"qkv_bias": True}, "bias": False},
    "capped scores": {**ROTARY, "attention": {"soft_cap": 0.5}, "logit_soft_cap": 2.0},
    "capped scores, windows, heads that span more": {
        "attention": {"soft_cap": 1.5},
        "window": 3,
        "global_every": 2,
        "head_dim": 12,
    },
    "YaRN beside a window": {
        **ROTARY,
        "rotary": YARN,
        "window": 3,
        "global_every": 2,
        "rotary_base_local": 50,
    },
}


def build(**fields: Any) -> tuple[LanguageModel, ModelConfig]:
    config = make_config(**{"hidden_size": 32, "max_position_embeddings": SEQ, **fields})
    return random_model(config, SEQ), config


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"attention": {"qk_norm": True}, "scheme": "hybridnorm"},
            "qk_norm=true has no effect with a scheme that norms queries and keys itself",
        ),
        ({"attention": {"qkv_bias": True}}, "qkv_bias=true has no effect with model.bias=true"),
        (
            {"attention": {"soft_cap": 5.0}, "family": "seq2seq", "max_source_positions": 8},
            "model.attention.soft_cap does not combine with model.family=seq2seq",
        ),
        ({"init": {"unigram": True}, "logit_soft_cap": 5.0}, "which bends the frequencies"),
    ],
)
def test_options_without_effect_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_config(**fields)


def test_dropout_on_capped_scores_keeps_their_mean() -> None:
    """A cap beyond all scores changes nothing, so that both kinds drop from equal probabilities."""
    results = []
    for cap in (None, 1e6):
        chunk, config = build(attention={"soft_cap": cap}, attention_dropout=0.3)
        torch.manual_seed(0)
        tokens = make_tokens(config, batch=256, length=4)[:1].expand(4096, 4)
        results.append(chunk.train()({"tokens": tokens}).mean(0))
        assert not torch.equal(results[-1], chunk.eval()({"tokens": tokens[:1]})[0])
    spread = float((results[0] - results[1]).abs().max() / results[0].std())
    assert spread < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_references(name: str) -> None:
    chunk, config = build(**MODELS[name])
    assert_same_logits(chunk, config, make_tokens(config, length=SEQ))
