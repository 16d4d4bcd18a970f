"""Theory against closed forms, Monte Carlo, simulation in the plain reference model, and numbers measured elsewhere."""

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
from model.depth.scheme import SCHEMES
from model.errors import UserError
from model.parameters.shards import WHOLE
from model.theory import (
    Sizes,
    Stream,
    b2t_factor,
    bidirectional_attention,
    causal_attention,
    correlation_map,
    deepscale_gradient_bound,
    deepscale_plan,
    fixed_point,
    geometric_gradient_variance,
    moments,
    post_ln_factor,
    pre_ln_variance,
    pre_ln_weight_gradient_norm,
    predict,
    propagate,
    published_attention,
    relu_kappa,
    second_moment,
    slope_moment,
    spannorm_factor,
    stream_correlation,
    zipf_correlation,
)
from model.theory.__main__ import signal_table
from model.theory.correlation import POINTWISE, gaussian_expectation, gaussian_product
from model.theory.propagation import attention_branch, backward_factor, feed_forward_branch, sublayer_step
from model.theory.recursion import feed_forward_variances
from model.weights.init import initialize_, logit_scale
from tests.reference import gpt, oracle

P = 0.1
Function = Callable[[torch.Tensor], torch.Tensor]
RELU: Function = F.relu
GELU: Function = F.gelu
SILU: Function = F.silu


# ---- activations and correlations -------------------------------------------------------------------------------------------------------------


def test_relu_correlation_map_at_its_ends() -> None:
    assert relu_kappa(0.0) == pytest.approx(1 / math.pi, abs=1e-15)
    assert relu_kappa(1.0) == 1.0
    assert correlation_map("relu", 0.37) == pytest.approx(relu_kappa(0.37), abs=1e-14)


@pytest.mark.parametrize(
    ("activation", "second", "slope"),
    [
        ("relu", 0.5, 0.5),
        ("gelu", 0.4252, 0.4559),
        ("gelu_tanh", 0.4252, 0.4558),
        ("silu", 0.3558, 0.3795),
        ("relu2", 1.5, 2.0),
    ],
)
def test_activation_moments_at_unit_variance(activation: str, second: float, slope: float) -> None:
    assert second_moment(activation) == pytest.approx(second, abs=5e-5)
    assert slope_moment(activation) == pytest.approx(slope, abs=5e-5)


def test_gated_backward_gain() -> None:
    assert slope_moment("swiglu") / second_moment("swiglu") == pytest.approx(2.07, abs=0.005)
    assert slope_moment("gelu") / second_moment("gelu") == pytest.approx(1.07, abs=0.005)


def test_gelu_closed_forms_equal_quadrature() -> None:
    erf = np.vectorize(math.erf)

    def gelu(x: Any) -> Any:
        return 0.5 * x * (1 + erf(x / math.sqrt(2)))

    def slope(x: Any) -> Any:
        return 0.5 * (1 + erf(x / math.sqrt(2))) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    for variance in (0.02, 0.5, 1.0):
        for r in (0.0, 0.3, 0.9, 1.0):
            assert POINTWISE["gelu"].product(variance, r) == pytest.approx(
                gaussian_product(gelu, variance, r), abs=1e-12
            )
            assert moments.gelu_gradient(variance, r, 1.0, 1.0).covariance == pytest.approx(
                gaussian_product(slope, variance, r), abs=1e-12
            )
        out = moments.gelu(variance, 0.3)
        assert out.mean == pytest.approx(gaussian_expectation(gelu, variance), abs=1e-12)
        assert out.variance + out.mean**2 == pytest.approx(gaussian_product(gelu, variance, 1.0), abs=1e-12)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_moments_by_quadrature_equal_fine_sums(activation: str) -> None:
    """Riemann sums of a smooth function that falls off on both sides converge faster than any power of the step; the slopes are torch's."""
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64, requires_grad=True)
    function: Function = {"gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": SILU}[activation]
    value = function(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    weights = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * 1e-3
    assert second_moment(activation) == pytest.approx(float((weights * value**2).sum().detach()), abs=1e-12)
    assert slope_moment(activation) == pytest.approx(float((weights * slope**2).sum().detach()), abs=1e-12)
    r = 0.4
    noise = x[::40].detach()
    joint = torch.outer(weights[::40] * 40, weights[::40] * 40).detach()
    product = float(
        (joint * function(noise)[:, None] * function(r * noise[:, None] + math.sqrt(1 - r * r) * noise)).sum()
    )
    assert POINTWISE[activation].product(1.0, r) == pytest.approx(product, abs=1e-12)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "relu2", "swiglu", "geglu"])
def test_correlation_map_against_sampling(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    r, samples = 0.4, 400_000
    common, a, b, c, d, e = torch.randn(6, samples, generator=generator, dtype=torch.float64)
    x, y = (math.sqrt(r) * common + math.sqrt(1 - r) * noise for noise in (a, b))
    functions: dict[str, Function] = {
        "relu": RELU, "gelu": GELU, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": SILU, "relu2": lambda z: F.relu(z) ** 2,
        "swiglu": SILU, "geglu": GELU,
    }  # fmt: skip
    pointwise = functions[activation]
    u, v = pointwise(x), pointwise(y)
    if activation in ("swiglu", "geglu"):
        u, v = u * (math.sqrt(r) * c + math.sqrt(1 - r) * d), v * (math.sqrt(r) * c + math.sqrt(1 - r) * e)
    measured = float((u * v).mean() / ((u * u).mean() + (v * v).mean()) * 2)
    assert correlation_map(activation, r) == pytest.approx(measured, abs=0.006)


def test_fixed_point_of_the_correlation() -> None:
    assert fixed_point("relu", P) == pytest.approx(0.83481, abs=5e-6)
    assert fixed_point("relu", 0.0) == 1.0
    r = fixed_point("gelu", P)
    assert r == pytest.approx((1 - P) * (1 + correlation_map("gelu", r)) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("vocab", "expected"), [(4096, 0.0208), (32000, 0.01372), (50257, 0.01265), (128000, 0.01081)]
)
def test_zipf_correlation(vocab: int, expected: float) -> None:
    assert zipf_correlation(vocab) == pytest.approx(expected, abs=5e-5)


def test_stream_correlation_of_embedding_tables() -> None:
    word = zipf_correlation(30522)
    assert stream_correlation(word, positions=False) == word
    assert stream_correlation(word, positions=True) == word / 2
    assert stream_correlation(word, positions=True, segments=True) == pytest.approx(0.2268, abs=5e-5)


# ---- components -------------------------------------------------------------------------------------------------------------------------------


def _pair(
    variance: float, r: float, mean: float = 0.0, samples: int = 400_000
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    common, a, b = torch.randn(3, samples, generator=generator, dtype=torch.float64)
    x, y = (
        mean + math.sqrt(variance) * (math.sqrt(r) * common + math.sqrt(1 - r) * noise) for noise in (a, b)
    )
    return x, y


def _covariance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(((x - x.mean()) * (y - y.mean())).mean())


@pytest.mark.parametrize("component", ["relu", "gelu", "dropout"])
def test_pointwise_components_against_sampling(component: str) -> None:
    variance, r, mean = 1.7, 0.45, 0.6 if component == "dropout" else 0.0
    x, y = _pair(variance, r, mean)
    torch.manual_seed(2)
    functions: dict[str, Function] = {"relu": RELU, "gelu": GELU, "dropout": lambda z: F.dropout(z, P)}
    predicted = {
        "relu": moments.relu(variance, r),
        "gelu": moments.gelu(variance, r),
        "dropout": moments.dropout(mean, variance, r, P),
    }[component]
    u, v = functions[component](x), functions[component](y)
    assert predicted.mean == pytest.approx(float(u.mean()), abs=0.005)
    assert predicted.variance == pytest.approx(_covariance(u, u), rel=0.008)
    assert predicted.covariance == pytest.approx(_covariance(u, v), rel=0.015)


@pytest.mark.parametrize("component", ["relu", "gelu"])
def test_pointwise_gradients_against_sampling(component: str) -> None:
    variance, r, q = 1.7, 0.45, 0.3
    x, y = (z.requires_grad_() for z in _pair(variance, r))
    generator = torch.Generator().manual_seed(3)
    common, a, b = torch.randn(3, x.numel(), generator=generator, dtype=torch.float64)
    gx, gy = (math.sqrt(q) * common + math.sqrt(1 - q) * noise for noise in (a, b))
    function = {"relu": RELU, "gelu": GELU}[component]
    du, dv = torch.autograd.grad([function(x), function(y)], [x, y], [gx, gy])
    predicted = (
        moments.relu_gradient(1.0, q, r)
        if component == "relu"
        else moments.gelu_gradient(variance, r, 1.0, q)
    )
    assert predicted.variance == pytest.approx(float((du * du).mean()), rel=0.01)
    assert predicted.covariance == pytest.approx(float((du * dv).mean()), rel=0.03)


def test_linear_and_norm_against_sampling() -> None:
    torch.manual_seed(4)
    width, out, variance, r, mean = 256, 512, 1.3, 0.4, 0.5
    common = torch.randn(1, width, dtype=torch.float64)
    x = mean + math.sqrt(variance) * (
        math.sqrt(r) * common + math.sqrt(1 - r) * torch.randn(64, width, dtype=torch.float64)
    )
    y = x @ torch.randn(8 * out, width, dtype=torch.float64).T * 0.05
    predicted = moments.linear(mean, variance, r, width, 0.05**2)
    cross = float((y.sum(0).square().sum() - y.square().sum()) / (64 * 63 * y.shape[1]))
    assert predicted.variance == pytest.approx(float(y.square().mean()), rel=0.05)
    assert predicted.covariance == pytest.approx(cross, rel=0.05)
    back = moments.linear_gradient(1.0, 0.2, out, 0.05**2)
    assert (back.variance, back.covariance) == pytest.approx((out * 0.05**2, 0.2 * out * 0.05**2))
    z = (math.sqrt(3.0) * torch.randn(400, width, dtype=torch.float64)).requires_grad_()
    (dz,) = torch.autograd.grad(F.layer_norm(z, (width,)), z, torch.randn(400, width, dtype=torch.float64))
    assert moments.layer_norm_gradient(3.0, 1.0, 0.2).variance == pytest.approx(
        float(dz.square().mean()), rel=0.02
    )
    assert moments.layer_norm(0.4, width).variance == 1.0


def test_softmax_against_sampling() -> None:
    rng = np.random.default_rng(5)
    variance, r, length = 0.25, 0.5, 400
    scores = math.sqrt(variance) * (
        math.sqrt(r) * rng.normal(size=(2000, 1)) + math.sqrt(1 - r) * rng.normal(size=(2000, length))
    )
    probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert moments.softmax(variance, r, length).variance == pytest.approx(probability.var(), rel=0.02)
    g = rng.normal(size=probability.shape)
    back = probability * (g - (probability * g).sum(1, keepdims=True))
    assert moments.softmax_gradient(variance, r, length, 1.0) == pytest.approx(back.var(), rel=0.02)


def test_attention_head_against_sampling() -> None:
    torch.manual_seed(6)
    width, length, head, r, q, qk, v = 64, 48, 64, 0.2, 0.2, 0.25 / 64, 1 / 64
    sums = np.zeros(4)
    repeats = 150
    for _ in range(repeats):
        x = (
            math.sqrt(r) * torch.randn(1, width) + math.sqrt(1 - r) * torch.randn(length, width)
        ).requires_grad_()
        query, key = (x @ torch.randn(width, head) * math.sqrt(qk) for _ in range(2))
        probability = F.dropout(torch.softmax(query @ key.T / math.sqrt(head), -1), P)
        y = probability @ (x @ torch.randn(width, head) * math.sqrt(v))
        (dx,) = torch.autograd.grad(
            y, x, math.sqrt(q) * torch.randn(1, head) + math.sqrt(1 - q) * torch.randn(length, head)
        )
        for index, z in ((0, y.detach()), (2, dx)):
            square = z.square().sum()
            sums[index] += float(square) / z.numel()
            sums[index + 1] += float(
                (z.sum(0).square().sum() - square) / (length * (length - 1) * z.shape[1])
            )
    forward, backward = (
        moments.attention_head(1.0, r, width, length, qk * qk, v, P),
        moments.attention_head_gradient(1.0, q, head, length, v, P),
    )
    predicted = (forward.variance, forward.covariance, backward.variance, backward.covariance)
    # The gradient form lacks the path through queries and keys, a few per cent at these small query weights.
    assert sums / repeats == pytest.approx(predicted, rel=0.08)


def test_causal_attention_counts_pairs_exactly_when_scores_are_zero() -> None:
    length, r = 37, 0.3
    average = np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]
    gram = average @ (np.full((length, length), r) + (1 - r) * np.eye(length)) @ average.T
    law = causal_attention(length, 0.0)(r, 0.0)
    assert law.second == pytest.approx(np.trace(gram) / length, abs=1e-12)
    assert law.covariance == pytest.approx((gram.sum() - np.trace(gram)) / (length * (length - 1)), abs=1e-12)
    assert law.late == pytest.approx(np.diag(gram)[length // 2 :].mean(), abs=1e-12)
    assert law.late_query == 0.0
    squares = (average**2).sum(0)[length // 2 :].mean()
    assert law.late_value == pytest.approx(squares, abs=1e-12)


# ---- DeepScaleLM recursion --------------------------------------------------------------------------------------------------------------------


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


# ---- whole stacks -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "closed_form"),
    [("post_ln", post_ln_factor), ("b2t", b2t_factor), ("spannorm", spannorm_factor)],
)
def test_backward_factor_equals_the_closed_forms(scheme: str, closed_form: Any) -> None:
    sizes = Sizes(64, 64, 256, "relu")
    weights: Any = {"q": 0.01, "k": 0.02, "v": 0.012, "o": 0.02, "fc1": 0.01, "fc2": 0.006}
    layer, x = SCHEMES[scheme].plan(1)[0], Stream(1.0, 0.2, 1.0)
    # Bidirectional moments have no separate late positions; the gain stands in for any backward gain of attention.
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
    # 237.3 and 246.3 start from a variance of 1 / (1 - p); here dropout is counted in the embedding, which shifts the track a little.
    assert predict(_config("pre_ln", 192), 128)[-1].forward_variance == pytest.approx(237.3, abs=1.5)
    assert predict(_config("pre_ln", 192), 128, causal=False, stream_correlation=0.2)[
        -1
    ].forward_variance == pytest.approx(246.3, abs=1.5)


# Measured late-position gradient ratios, layer 1 over layer N, of an independent simulation at width 128, 128 tokens, dropout 0.1 (as a factor per
# layer), with the tolerance of the prediction.
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
    # fc2 fc1 are homogeneous; attention also loses the sharpening of its scores, so only the feed-forward ratio is exact.
    assert plain.mlp_variance / scaled.mlp_variance == pytest.approx(1e4, rel=1e-9)
    assert plain.attention_variance / scaled.attention_variance > 1e4


def test_unknown_vocabulary_is_a_user_error() -> None:
    config = _config("deepscalelm_pre_ln", 4).model_copy(update={"vocab_size": None})
    with pytest.raises(UserError, match="vocab_size"):
        predict(config, 128)


# ---- against simulation -----------------------------------------------------------------------------------------------------------------------


def _simulate(config: ModelConfig, length: int, seeds: int) -> oracle.Measured:
    """Mean over seeds of the reference model's measured signals, float64; gradients as geometric means."""
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
    # Fully correlated tokens: attention copies, 100^2 0.01^2 = 1; feed-forward 100 400 0.01^2 / 2 = 2.
    assert [signal.forward_variance for signal in signals] == pytest.approx([4.0, 7.0, 10.0])
    assert [signal.attention_variance for signal in signals] == pytest.approx([1.0] * 3)
    assert [signal.mlp_variance for signal in signals] == pytest.approx([2.0] * 3)


def test_documented_table_is_the_computed_one() -> None:
    document = Path(__file__).parents[3] / "docs" / "theory.md"
    assert signal_table(192) in document.read_text()
