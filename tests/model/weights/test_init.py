"""Initialisation.

Variances by role, independence from the parallel layout, padding, and the scale of logits.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.depth.scheme import LAYER_ROLES
from model.depth.schemes import SCHEMES
from model.parameters.shards import WHOLE, Shard, full_shape, put, take
from model.theory import (
    causal_attention,
    deepscale_plan,
    published_attention,
    second_moment,
    zipf_correlation,
)
from model.theory.recursion import Sizes
from model.weights.init import Deviations, initialize_, logit_scale, standard_deviations
from tests.model.hf.tiny import shape_of
from tests.reference import gpt

LENGTH = 32


def _config(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "scheme": "pre_ln",
        "num_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    }
    return ModelConfig.model_validate(settings | changes)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return gpt.parameter_shapes(
        shape_of(config, logit_scale(config)),
        config.hidden_size,
        config.ffn_size,
        config.padded_vocab,
        LENGTH,
        config.kv_channels,
        config.bias,
        config.tie_embeddings,
    )


def _whole(config: ModelConfig, seed: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    parameters = {name: torch.full(shape, math.nan, dtype=dtype) for name, shape in _shapes(config).items()}
    initialize_([(name, value, WHOLE) for name, value in parameters.items()], config, LENGTH, seed)
    return parameters


def _variances(plan: Deviations, layer: int = 0) -> dict[str, float]:
    return {str(role): plan.layers[layer][role] ** 2 for role in LAYER_ROLES}


# ---- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard_of",
    [lambda i: Shard(0, i, 4), lambda i: Shard(1, i, 4), lambda i: Shard(0, i, 2, stride=2), lambda i: WHOLE],
)
def test_take_and_put_are_inverse(shard_of: Any) -> None:
    full = torch.arange(96.0).view(8, 12)
    rebuilt = torch.full_like(full, math.nan)
    for index in range(shard_of(0).count):
        local = take(full, shard_of(index))
        assert full_shape(local.shape, shard_of(index)) == (8, 12)
        put(rebuilt, local, shard_of(index))
    assert torch.equal(rebuilt, full)


def test_stride_two_keeps_gate_and_up_apart() -> None:
    full = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    assert take(full, Shard(0, 1, 2, stride=2)).tolist() == [2, 3, 12, 13]


def test_bad_shards_are_refused() -> None:
    for arguments in ((0, 2, 2), (0, -1, 2), (0, 0, 0), (None, 0, 2)):
        with pytest.raises(ValueError):
            Shard(*arguments)
    with pytest.raises(ValueError, match="divide"):
        take(torch.zeros(6), Shard(0, 0, 4))


# ---- standard deviations -------------------------------------------------------------------------


def test_xavier_variances() -> None:
    plan = standard_deviations(_config(hidden_dropout=0.1), LENGTH)
    square, feed_forward = 1 / 64, 2 / (64 + 256)
    assert _variances(plan) == pytest.approx(
        dict.fromkeys("qkvo", square) | {"fc1": feed_forward, "fc2": feed_forward}
    )
    assert (plan.word**2, (plan.position or 0) ** 2) == pytest.approx((0.45, 0.45))
    assert standard_deviations(_config(position="rotary"), LENGTH).word == 1.0
    assert standard_deviations(_config(position="rotary"), LENGTH).position is None


def test_xavier_fans_of_grouped_queries_and_wide_heads() -> None:
    variances = _variances(
        standard_deviations(
            _config(num_query_groups=2, head_dim=32, activation="swiglu", ffn_hidden_size=96), LENGTH
        )
    )
    square, narrow = 2 / (64 + 128), 2 / (64 + 64)
    assert variances == pytest.approx(
        {"q": square, "k": narrow, "v": narrow, "o": square, "fc1": 2 / 160, "fc2": 2 / 160}
    )


def test_fairseq_variances_and_rescaling() -> None:
    plain = standard_deviations(_config(scheme="b2t", scheme_options={"rescale": False}), LENGTH)
    expected = dict.fromkeys("qkv", 1 / 128) | {"o": 1 / 64, "fc1": 1 / (3 * 64), "fc2": 1 / (12 * 64)}
    assert _variances(plain) == pytest.approx(expected)
    rescaled = standard_deviations(_config(scheme="b2t"), LENGTH)
    assert _variances(rescaled) == pytest.approx({role: value / 3 for role, value in expected.items()})
    assert rescaled.word == plain.word == 1.0
    assert rescaled.logit_scale == pytest.approx(64**-0.5)


def test_normal_variances() -> None:
    plan = standard_deviations(_config(init={"base": "normal", "std": 0.01}), LENGTH)
    assert _variances(plan) == pytest.approx(
        dict.fromkeys(("q", "k", "v", "fc1"), 1e-4) | dict.fromkeys(("o", "fc2"), 1e-4 / 6)
    )
    assert (plan.word, plan.position, plan.logit_scale) == (0.01, 0.01, 1.0)
    assert standard_deviations(_config(init={"base": "normal"}, tie_embeddings=False), LENGTH).output == 0.02


def test_deepnorm_gains() -> None:
    plan = standard_deviations(_config(scheme="deepnorm"), LENGTH)
    square, feed_forward, gain = 1 / 64, 2 / (64 + 256), 1 / math.sqrt(24)
    expected = {
        "q": square,
        "k": square,
        "v": square * gain,
        "o": square * gain,
        "fc1": feed_forward * gain,
        "fc2": feed_forward * gain,
    }
    assert _variances(plan, layer=2) == pytest.approx(expected)


@pytest.mark.parametrize("causal", [True, False])
def test_deepscale_variances(causal: bool) -> None:
    config = _config(
        scheme="deepscalelm_post_ln",
        hidden_dropout=0.1,
        attention_dropout=0.2,
        init={"causal_correction": causal},
    )
    plan = standard_deviations(config, LENGTH)
    law = causal_attention(LENGTH, 0.2) if causal else published_attention
    planned = deepscale_plan(
        SCHEMES[config.scheme].plan(3), Sizes(64, 64, 256, "gelu"), zipf_correlation(1000) / 2, 0.1, law
    )
    for layer, expected in zip(plan.layers, planned, strict=True):
        assert [layer[role] ** 2 for role in ("q", "k", "v", "o")] == pytest.approx(
            [expected.qk, expected.qk, expected.v, expected.o]
        )
        assert [layer["fc1"] ** 2, layer["fc2"] ** 2] == pytest.approx(
            [1 / 64, 0.9 / (256 * second_moment("gelu"))]
        )
    assert plan.word**2 == pytest.approx(0.45)
    assert plan.logit_scale == pytest.approx(1 / math.sqrt(0.45 * 64))


def test_given_token_correlation_is_used() -> None:
    low, high = (
        standard_deviations(_config(scheme="deepscalelm_pre_ln", init={"token_correlation": r}), LENGTH)
        for r in (0.01, 0.3)
    )
    assert low.layers[0]["v"] > high.layers[0]["v"]


@pytest.mark.parametrize("scheme", ["pre_ln", "deepscalelm_pre_ln", "b2t"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_start_near_unit_variance(scheme: str, tied: bool) -> None:
    config = _config(scheme=scheme, tie_embeddings=tied, hidden_size=128, vocab_size=500)
    tokens = torch.randint(500, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = gpt.logits(_whole(config), shape_of(config, logit_scale(config)), tokens)[..., :500]
    assert 0.8 < float(logits.var()) < 1.3


# ---- values --------------------------------------------------------------------------------------

MODELS = [
    {"scheme": "peri_ln"},
    {
        "scheme": "deepscalelm_post_ln",
        "num_query_groups": 2,
        "activation": "swiglu",
        "position": "rotary",
        "normalization": "rmsnorm",
    },
    {"scheme": "b2t", "tie_embeddings": False, "bias": False},
    {"scheme": "mix_ln", "num_layers": 4},
]


@pytest.mark.parametrize("changes", MODELS, ids=lambda changes: str(changes["scheme"]))
def test_every_parameter_has_its_planned_spread(changes: dict[str, Any]) -> None:
    config = _config(**changes)
    plan, parameters = standard_deviations(config, LENGTH), _whole(config)
    for name, value in parameters.items():
        assert torch.isfinite(value).all()
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(
                value, torch.full_like(value, float("norm" in name and name.endswith("weight")))
            )
    for layer in range(config.num_layers):
        weights = gpt.layer_weights(parameters, layer, shape_of(config, logit_scale(config)), {})
        for role in LAYER_ROLES:
            spread = float(weights[role].std())
            assert spread == pytest.approx(
                plan.layers[layer][role], rel=5 / math.sqrt(2 * weights[role].numel())
            )
    assert float(parameters["embedding.word_embeddings.weight"][:1000].std()) == pytest.approx(
        plan.word, rel=0.02
    )


def _shard(name: str, gated: bool, rank: int, size: int) -> Shard:
    """Tensor-parallel cut of a parameter.

    Columns of the first matrix of a pair, rows of the second, the vocabulary.
    """
    if "norm" in name or "position" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
        return WHOLE
    if "linear_proj" in name or "linear_fc2" in name:
        return Shard(1, rank, size)
    return Shard(0, rank, size, 2 if gated and "linear_fc1" in name else 1)


@pytest.mark.parametrize("changes", MODELS, ids=lambda changes: str(changes["scheme"]))
@pytest.mark.parametrize("ranks", [2])
def test_shards_are_cuts_of_the_same_model(changes: dict[str, Any], ranks: int) -> None:
    config = _config(**changes)
    whole = _whole(config)
    for rank in range(ranks):
        # Another order and only some of the layers, as on a pipeline stage.
        names = [name for name in reversed(whole) if not name.startswith("decoder.layers.0.")]
        shards = {name: _shard(name, config.gated, rank, ranks) for name in names}
        local = {name: torch.empty_like(take(whole[name], shards[name])) for name in names}
        initialize_([(name, local[name], shards[name]) for name in names], config, LENGTH, seed=7)
        for name in names:
            assert torch.equal(local[name], take(whole[name], shards[name])), name


def test_seed_and_name_key_the_values() -> None:
    first, again, other = _whole(_config()), _whole(_config()), _whole(_config(), seed=8)
    name = "decoder.layers.{}.self_attention.linear_proj.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name.format(0)], other[name.format(0)])
    assert not torch.equal(first[name.format(0)], first[name.format(1)])


def test_padding_rows_are_zero_and_do_not_shift_the_rest() -> None:
    config, unpadded = _config(tie_embeddings=False), _config(tie_embeddings=False, vocab_multiple=1)
    padded, exact = _whole(config), _whole(unpadded)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert padded[name].shape[0] == 1024
        assert torch.equal(padded[name][:1000], exact[name])
        assert torch.count_nonzero(padded[name][1000:]) == 0
        assert torch.count_nonzero(exact[name][-1]) == exact[name].shape[1]


def test_lower_precision_is_the_rounded_model() -> None:
    single, half = _whole(_config()), _whole(_config(), dtype=torch.bfloat16)
    assert all(torch.equal(single[name].bfloat16(), half[name]) for name in single)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.3.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc3.weight",
        "decoder.layers.0.mlp.linear_fc1.scale",
        "decoder.layers.0.extra_norm.weight",
        "output_layer.weight",
        "embedding.word_embeddings.bias",
    ],
)
def test_a_name_that_is_not_in_the_table_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        initialize_([(name, torch.empty(4, 4), WHOLE)], _config(), LENGTH, 1)


def test_meta_parameters_and_wrong_shapes_are_refused() -> None:
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    with pytest.raises(ValueError, match="meta"):
        initialize_([(name, torch.empty(192, 64, device="meta"), WHOLE)], _config(), LENGTH, 1)
    with pytest.raises(ValueError, match=r"shape \(96, 64\), the configuration gives \(192, 64\)"):
        initialize_([(name, torch.empty(96, 64), WHOLE)], _config(), LENGTH, 1)
