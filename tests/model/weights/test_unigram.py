"""Initial values that make the logits the log frequencies of the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.hf.reference import Evaluation
from model.parameters.shards import WHOLE, Shard, take
from model.parameters.table import parameter_table
from model.weights.init import initialize_, logit_scale, standard_deviations
from model.weights.prediction import predict
from model.weights.unigram import word_moments
from pretrain.probe.measure import zipf_log_frequencies

VOCAB, LENGTH, WORD = 100, 8, "embedding.word_embeddings.weight"
LOG_P = zipf_log_frequencies(VOCAB)[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))]
UNTIED: dict[str, Any] = {"tie_embeddings": False, "logit_bias": True}
RMSNORM: dict[str, Any] = {"normalization": "rmsnorm", "logit_bias": True}
MODELS: list[dict[str, Any]] = [
    *({"scheme": scheme} for scheme in SCHEMES),
    {"init": {"base": "normal", "unigram": True}},
    {"position": "rotary"},
    UNTIED,
    RMSNORM,
    {"logit_bias": True},
]


def _config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "scheme": "pre_ln",
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": LENGTH,
        "init": {"unigram": True},
    }
    return ModelConfig.model_validate(base | changes)


def _drawn(config: ModelConfig) -> dict[str, Tensor]:
    values = {row.name: torch.empty(row.shape) for row in parameter_table(config)}
    initialize_([(name, value, WHOLE) for name, value in values.items()], config, LENGTH, 3, LOG_P)
    return values


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_what_is_constant_in_the_logits_is_log_p(changes: dict[str, Any]) -> None:
    config = _config(**changes)
    values = _drawn(config)
    if not config.logit_bias:
        values[f"{config.depth_plan().last_norm}.weight"].zero_()  # nothing of the stream is left
        values[WORD][:, 1:] = 0
    evaluation = Evaluation(values, config, logit_scale=logit_scale(config), dtype=torch.float64)
    logits = evaluation(torch.arange(LENGTH)[None])[0, -1]
    if config.logit_bias:
        values["output_layer.bias"].zero_()
        logits = logits - evaluation(torch.arange(LENGTH)[None])[0, -1]
    torch.testing.assert_close(logits.log_softmax(-1), LOG_P, rtol=0, atol=3e-6)
    assert float((LOG_P.exp() * logits).sum()) == pytest.approx(0, abs=1e-5), "their mean is not 0"


@pytest.mark.parametrize("changes", [{}, UNTIED], ids=str)
def test_only_what_has_to_be_is_another_value(changes: dict[str, Any]) -> None:
    config = _config(**changes)
    plain = _drawn(config.model_copy(update={"init": config.init.model_copy(update={"unigram": False})}))
    changed = {name: value != plain[name] for name, value in _drawn(config).items()}
    places = {name: int(where.sum()) for name, where in changed.items() if where.any()}
    if config.logit_bias:
        assert places == {"output_layer.bias": VOCAB}
        assert not changed["output_layer.bias"][VOCAB:].any()
        return
    assert places == {WORD: VOCAB, "decoder.final_layernorm.bias": 1}
    assert changed[WORD][:VOCAB, 0].all()
    assert changed["decoder.final_layernorm.bias"][0]


def test_a_rank_has_its_cut_of_the_same_values() -> None:
    config = _config(**RMSNORM)
    name = "output_layer.bias"
    whole = _drawn(config)[name]
    for rank in range(2):
        shard = Shard(0, rank, 2)
        local = torch.empty_like(take(whole, shard))
        initialize_([(name, local, shard)], config, LENGTH, 3, LOG_P)
        assert torch.equal(local, take(whole, shard))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"tie_embeddings": False}, "model.tie_embeddings=false"),
        ({"normalization": "rmsnorm"}, "model.normalization=rmsnorm"),
    ],
)
def test_models_without_a_place_for_it_are_told_to_take_a_bias(changes: dict[str, Any], found: str) -> None:
    line = f"model.init.unigram=true needs model.logit_bias=true with {found}: "
    with pytest.raises(ValidationError, match=line):
        _config(**changes)


def test_frequencies_have_to_be_there_and_fit() -> None:
    values = [(WORD, torch.empty(128, 16), WHOLE)]
    with pytest.raises(ValueError, match="needs the log frequencies"):
        initialize_(values, _config(), LENGTH, 3)
    with pytest.raises(ValueError, match=r"shape \(99,\), vocabulary 100"):
        initialize_(values, _config(), LENGTH, 3, LOG_P[1:])


@pytest.mark.parametrize("base", ["xavier", "normal"])
def test_theory_knows_the_column(base: str) -> None:
    """Means over tokens as they occur, of 16 draws of the table."""
    config = _config(hidden_size=64, position="none", init={"unigram": True, "base": base})
    scale, p = logit_scale(config), LOG_P.exp()
    squares, pairs = [], []
    for seed in range(16):
        table = torch.empty(128, 64)
        initialize_([(WORD, table, WHOLE)], config, LENGTH, seed, LOG_P)
        rows = table[:VOCAB].double()
        squares.append(float(p @ rows.square().mean(1)))
        pairs.append(float((p @ rows).square().mean()))  # of two tokens drawn independently
    square, equal = word_moments(config, standard_deviations(config, LENGTH).word ** 2, scale, LOG_P)
    assert sum(squares) / 16 == pytest.approx(square, rel=0.03)
    assert sum(pairs) / 16 == pytest.approx(equal * float(p.square().sum()), rel=0.1)
    layers = predict(config, 64, coincidence=0.0, log_p_v=LOG_P)
    assert layers[0].forward_variance > predict(config, 64, coincidence=0.0)[0].forward_variance
