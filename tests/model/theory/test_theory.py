"""Theory against closed forms, Monte Carlo, simulation and numbers measured elsewhere.

The simulation is in the plain reference model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.parameters.shards import WHOLE
from model.theory import (
    Sizes,
    Stream,
    b2t_factor,
    bidirectional_attention,
    causal_attention,
    deepscale_gradient_bound,
    deepscale_plan,
    geometric_gradient_variance,
    post_ln_factor,
    pre_ln_variance,
    pre_ln_weight_gradient_norm,
    propagate,
    published_attention,
    spannorm_factor,
)
from model.theory.propagation import attention_branch, backward_factor, feed_forward_branch
from model.theory.recursion import feed_forward_variances
from model.theory.step import sublayer_step
from model.weights.__main__ import signal_table
from model.weights.init import initialize_, logit_scale
from model.weights.prediction import predict
from tests.reference import gpt, oracle

P = 0.1
Function = Callable[[torch.Tensor], torch.Tensor]
RELU: Function = F.relu
GELU: Function = F.gelu
SILU: Function = F.silu

# ---- DeepScaleLM recursion -----------------------------------------------------------------------


def _published(layers: int, k: float = 2.0, r0: float = 0.221) -> list[Any]:
    return deepscale_plan(
        SCHEMES["deepscalelm_pre_ln"].plan(layers, {"k": k}),
        Sizes(1024, 1024, 4096, "relu"),
        r0,
        P,
        published_attention,
    )


def test_published_recursion() -> None:
    plan = _published(192)
    assert SCHEMES["deepscalelm_pre_ln"].plan(192)[0].attention.branch_scale ** 2 == pytest.approx(
        0.005208, abs=5e-7
    )
    assert 1024 * plan[0].v == pytest.approx(2.127, abs=5e-4)
    assert 1024 * plan[-1].v == pytest.approx(1.161, abs=5e-4)
    assert plan[0].token_correlation == pytest.approx(0.1989)
    assert plan[-1].token_correlation == pytest.approx(0.669, abs=0.002)
    assert _published(192, k=4.0)[-1].token_correlation == pytest.approx(0.789, abs=0.001)
    assert all(layer.v == layer.o and layer.qk == 1 / 1024 for layer in plan)


def test_causal_recursion_track() -> None:
    plan = deepscale_plan(
        SCHEMES["deepscalelm_pre_ln"].plan(192),
        Sizes(128, 128, 512, "relu"),
        0.0104,
        P,
        causal_attention(128, P),
    )
    assert plan[96].token_correlation == pytest.approx(0.325, abs=0.001)
    assert plan[-1].token_correlation == pytest.approx(0.553, abs=0.003)


def test_pre_and_post_norm_share_a_plan() -> None:
    sizes, law = Sizes(128, 96, 320, "swiglu"), causal_attention(64, 0.0)
    pre, post = (
        deepscale_plan(SCHEMES[f"deepscalelm_{kind}_ln"].plan(12), sizes, 0.02, 0.0, law)
        for kind in ("pre", "post")
    )
    assert pre == post


def test_feed_forward_weights_give_a_unit_branch() -> None:
    assert feed_forward_variances(Sizes(512, 512, 2048, "relu"), P) == pytest.approx(
        [math.sqrt((1 - P) / 2) / 512] * 2
    )
    for activation in ("relu", "gelu", "gelu_tanh", "silu", "relu2", "swiglu", "geglu"):
        sizes = Sizes(96, 96, 200, activation)
        fc1, fc2 = feed_forward_variances(sizes, P)
        branch = feed_forward_branch(Stream(1.0, 0.3, 1.0), {"fc1": fc1, "fc2": fc2}, sizes)
        assert branch.output.variance / (1 - P) == pytest.approx(1.0, abs=1e-12)
        if activation == "relu":
            assert branch.backward / (1 - P) == pytest.approx(1.0, abs=1e-12)


def test_zero_correlation_has_no_published_plan() -> None:
    with pytest.raises(ValueError, match="positive"):
        _published(4, r0=0.0)


# ---- whole stacks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "closed_form"),
    [("post_ln", post_ln_factor), ("b2t", b2t_factor), ("spannorm", spannorm_factor)],
)
def test_backward_factor_equals_the_closed_forms(scheme: str, closed_form: Any) -> None:
    sizes = Sizes(64, 64, 256, "relu")
    weights: Any = {"q": 0.01, "k": 0.02, "v": 0.012, "o": 0.02, "fc1": 0.01, "fc2": 0.006}
    layer, x = SCHEMES[scheme].plan(1)[0], Stream(1.0, 0.2, 1.0)
    # Bidirectional moments have no separate late positions.
    # The gain stands in for any backward gain of attention.
    attention = bidirectional_attention(32, P)
    first = attention_branch(x, weights, sizes, attention)
    gain = 0.07

    def law(u: Stream) -> Any:
        return type(first)(attention_branch(u, weights, sizes, attention).output, gain * (1 - P))

    one = sublayer_step(x, x, 1.0, layer.attention, law, P)
    two = sublayer_step(
        one.stream, x, one.layer_share, layer.mlp, lambda u: feed_forward_branch(u, weights, sizes), P
    )
    s_f = feed_forward_branch(x, weights, sizes)
    expected = closed_form(
        first.output.variance / (1 - P), s_f.output.variance / (1 - P), gain, s_f.backward / (1 - P)
    )
    assert backward_factor((one, two)) == pytest.approx(expected, rel=1e-12)


def test_growth_laws() -> None:
    assert pre_ln_variance(192, 1.78, 0.36) == pytest.approx(409, abs=4)
    assert pre_ln_weight_gradient_norm(1) / pre_ln_weight_gradient_norm(192) == pytest.approx(
        math.sqrt(193 / 2)
    )
    assert geometric_gradient_variance(0.5, 10) == 2**-10
    assert deepscale_gradient_bound(2.0) == pytest.approx(0.3679, abs=1e-4)


def _config(
    scheme: str,
    layers: int,
    base: str = "scheme",
    options: dict[str, Any] | None = None,
    width: int = 128,
    dropout: float = P,
) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "scheme": scheme,
            "num_layers": layers,
            "hidden_size": width,
            "num_attention_heads": 4,
            "vocab_size": 4096,
            "activation": "relu",
            "hidden_dropout": dropout,
            "attention_dropout": dropout,
            "scheme_options": options or {},
            "init": {"base": base},
            "bias": False,
        }
    )


def test_pre_ln_variance_at_192_layers() -> None:
    # 237.3 and 246.3 start from a variance of 1 / (1 - p).
    # Here dropout is counted in the embedding, which shifts the track a little.
    assert predict(_config("pre_ln", 192), 128)[-1].forward_variance == pytest.approx(237.3, abs=1.5)
    assert predict(_config("pre_ln", 192), 128, causal=False, coincidence=0.4)[
        -1
    ].forward_variance == pytest.approx(246.3, abs=1.5)


# Measured late-position gradient ratios, layer 1 over layer N, of an independent simulation at
# width 128, 128 tokens, dropout 0.1 (as a factor per layer), with the tolerance of the prediction.
MEASURED_FACTORS = [
    ("post_ln", 96, "scheme", {}, 0.543, 0.02),
    ("post_ln", 192, "scheme", {}, 0.536, 0.02),
    ("b2t", 96, "xavier", {"rescale": False}, 0.847, 0.01),
    ("b2t", 192, "xavier", {"rescale": False}, 0.838, 0.01),
    ("post_ln", 192, "fairseq", {}, 0.701, 0.025),
    ("b2t", 192, "scheme", {"rescale": False}, 0.921, 0.01),
]


@pytest.mark.parametrize(("scheme", "layers", "base", "options", "factor", "tolerance"), MEASURED_FACTORS)
def test_late_gradient_factor_of_deep_stacks(
    scheme: str, layers: int, base: str, options: dict[str, Any], factor: float, tolerance: float
) -> None:
    ratio = predict(_config(scheme, layers, base, options), 128)[0].grad_variance_late
    assert ratio ** (1 / (layers - 1)) == pytest.approx(factor, abs=tolerance)


MEASURED_RATIOS = [
    ("pre_ln", 192, {}, 10.9, 0.15),
    ("pre_ln", 18, {}, 4.4, 0.1),
    ("b2t", 18, {"rescale": False}, 0.685, 0.1),
    ("b2t", 192, {}, 0.907, 0.05),
    ("post_ln", 192, {"rescale": True}, 1.0, 0.1),
    ("deepscalelm_pre_ln", 96, {}, 0.46, 0.1),
    ("deepscalelm_pre_ln", 192, {}, 0.45, 0.1),
    ("deepscalelm_post_ln", 192, {}, 0.48, 0.1),
    ("deepscalelm_pre_ln", 192, {"k": 4.0}, 0.17, 0.1),
]


@pytest.mark.parametrize(("scheme", "layers", "options", "ratio", "tolerance"), MEASURED_RATIOS)
def test_late_gradient_ratio(
    scheme: str, layers: int, options: dict[str, Any], ratio: float, tolerance: float
) -> None:
    assert predict(_config(scheme, layers, options=options), 128)[0].grad_variance_late == pytest.approx(
        ratio, rel=tolerance
    )


def test_deepscale_keeps_unit_variance_at_any_depth() -> None:
    for layers in (6, 100, 1000):
        for signal in predict(_config("deepscalelm_pre_ln", layers), 128):
            assert signal.forward_variance == pytest.approx(1.0, abs=1e-9)


def test_published_gain_overshoots_in_a_decoder() -> None:
    config = _config("deepscalelm_pre_ln", 192)
    config.init.causal_correction = False
    variances = [signal.forward_variance for signal in predict(config, 128)]
    assert 1.2 < max(variances) < 1.32


def test_rescaling_divides_branch_variance_by_layers_squared() -> None:
    plain, scaled = (
        predict(_config("b2t", 100, "xavier", {"rescale": rescale}), 128)[0] for rescale in (False, True)
    )
    # fc2 fc1 are homogeneous; attention also loses the sharpening of its scores.
    # So only the feed-forward ratio is exact.
    assert plain.mlp_variance / scaled.mlp_variance == pytest.approx(1e4, rel=1e-9)
    assert plain.attention_variance / scaled.attention_variance > 1e4


def test_unknown_vocabulary_is_a_user_error() -> None:
    config = _config("deepscalelm_pre_ln", 4).model_copy(update={"vocab_size": None})
    with pytest.raises(UserError, match="vocab_size"):
        predict(config, 128)


# ---- against simulation --------------------------------------------------------------------------


def _simulate(config: ModelConfig, length: int, seeds: int) -> oracle.Measured:
    """Mean over seeds of the reference model's measured signals, float64.

    Gradients are averaged as geometric means.
    """
    p = config.hidden_dropout
    shape = gpt.Shape(
        config.scheme,
        config.num_layers,
        config.num_attention_heads,
        activation=config.activation,
        logit_scale=logit_scale(config),
        options=config.scheme_options,
        drop=lambda x: F.dropout(x, p),
        drop_attention=lambda x: F.dropout(x, p),
    )
    runs = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        shapes = gpt.parameter_shapes(
            shape, config.hidden_size, config.ffn_size, config.padded_vocab, length, bias=False
        )
        parameters = {name: torch.empty(size, dtype=torch.float64) for name, size in shapes.items()}
        initialize_([(name, value, WHOLE) for name, value in parameters.items()], config, length, seed)
        tokens = oracle.zipf_tokens(4096, 2, length + 1, torch.Generator().manual_seed(seed))
        runs.append(oracle.measure(parameters, shape, tokens, 4096))
    return oracle.Measured(
        [float(np.mean(values)) for values in zip(*(run.forward for run in runs), strict=True)],
        [float(np.mean(values)) for values in zip(*(run.correlation for run in runs), strict=True)],
        [float(np.exp(np.mean(np.log(values)))) for values in zip(*(run.late for run in runs), strict=True)],
    )


@pytest.mark.parametrize(
    ("scheme", "base", "options", "width", "drift"),
    [
        ("pre_ln", "scheme", {}, 96, 0.04),
        # Vanishing is slower in a narrow stack, by 0.1 a layer in the logarithm at width 96.
        ("post_ln", "scheme", {}, 256, 0.08),
        ("b2t", "scheme", {"rescale": False}, 96, 0.04),
        ("b2t", "scheme", {}, 96, 0.04),
        ("deepscalelm_pre_ln", "scheme", {}, 96, 0.04),
        ("deepscalelm_post_ln", "scheme", {}, 96, 0.04),
        ("layernorm_scaling", "scheme", {}, 96, 0.04),
        ("peri_ln", "scheme", {}, 96, 0.04),
        ("spannorm", "scheme", {}, 96, 0.04),
        ("keel", "scheme", {}, 96, 0.04),
        ("keel", "scheme", {"alpha": 4.0}, 96, 0.04),
        ("hybridnorm", "scheme", {}, 256, 0.04),
        ("subln", "scheme", {}, 96, 0.04),
        ("subln", "normal", {}, 96, 0.04),
        ("hybridnorm", "normal", {"star": True}, 96, 0.04),
        ("pre_ln", "normal", {}, 96, 0.04),
    ],
)
def test_prediction_against_simulation(
    scheme: str, base: str, options: dict[str, Any], width: int, drift: float
) -> None:
    config = _config(scheme, 10, base, options, width=width)
    measured, predicted = _simulate(config, 64, 2), predict(config, 64)
    for index, signal in enumerate(predicted):
        assert measured.forward[index] == pytest.approx(signal.forward_variance, rel=0.2)
        assert measured.correlation[index] == pytest.approx(signal.token_correlation, abs=0.09)
        # Errors of the factor a layer add up downwards.
        below = len(predicted) - signal.layer
        assert abs(math.log(measured.late[index] / signal.grad_variance_late)) < 0.12 + drift * below


def test_branch_share_of_the_stream_is_what_the_stack_adds() -> None:
    signals = propagate(
        SCHEMES["pre_ln"].plan(3),
        [{"q": 0.0, "k": 0.0, "v": 0.01, "o": 0.01, "fc1": 0.01, "fc2": 0.01}] * 3,
        Sizes(100, 100, 400, "relu"),
        Stream(1.0, 1.0, 1.0),
        attention=published_attention,
    )
    # Fully correlated tokens: attention copies, 100^2 0.01^2 = 1.
    # Feed-forward: 100 400 0.01^2 / 2 = 2.
    assert [signal.forward_variance for signal in signals] == pytest.approx([4.0, 7.0, 10.0])
    assert [signal.attention_variance for signal in signals] == pytest.approx([1.0] * 3)
    assert [signal.mlp_variance for signal in signals] == pytest.approx([2.0] * 3)


def test_documented_table_is_the_computed_one() -> None:
    document = Path(__file__).parents[3] / "docs" / "theory.md"
    assert signal_table(192) in document.read_text()
