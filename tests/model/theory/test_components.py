"""Moments, correlations and components of a layer against closed forms and sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.network.embedding import Sinusoids
from model.theory import (
    causal_attention,
    correlation_map,
    fixed_point,
    moments,
    relu_kappa,
    second_moment,
    slope_moment,
    stream_correlation,
    zipf_correlation,
)
from model.theory.correlation import POINTWISE, gaussian_expectation, gaussian_product, sinusoid_moments
from tests.reference import oracle

P = 0.1
Function = Callable[[torch.Tensor], torch.Tensor]
RELU: Function = F.relu
GELU: Function = F.gelu
SILU: Function = F.silu


# ---- activations and correlations ----------------------------------------------------------------


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
    """Against Riemann sums, with torch's slopes.

    The function is smooth and falls off on both sides.
    There the sums converge faster than any power of the step.
    """
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


@pytest.mark.parametrize(
    "activation", ["relu", "gelu", "gelu_tanh", "silu", "relu2", "swiglu", "geglu", "geglu_tanh"]
)
def test_correlation_map_against_sampling(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    r, samples = 0.4, 400_000
    common, a, b, c, d, e = torch.randn(6, samples, generator=generator, dtype=torch.float64)
    x, y = (math.sqrt(r) * common + math.sqrt(1 - r) * noise for noise in (a, b))
    functions: dict[str, Function] = {
        "relu": RELU, "gelu": GELU, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": SILU,
        "relu2": lambda z: F.relu(z) ** 2,
        "swiglu": SILU, "geglu": GELU, "geglu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    }  # fmt: skip
    pointwise = functions[activation]
    u, v = pointwise(x), pointwise(y)
    if activation in ("swiglu", "geglu", "geglu_tanh"):
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
    assert stream_correlation(0.1, positions=True, fixed=(0.7, 0.35)) == pytest.approx(0.45 / 1.7)


@pytest.mark.parametrize("centred", [True, False])
def test_sinusoids_moments_are_those_of_the_table_in_the_model(centred: bool) -> None:
    table = Sinusoids(64, 128, math.sqrt(2), torch.float64)(torch.arange(64)[None])
    if centred:
        table = table - table.mean(-1, keepdim=True)
    variance, covariance = sinusoid_moments(64, 128, centred)
    assert float(table.square().mean()) == pytest.approx(variance, abs=1e-12)
    assert oracle.token_correlation(table) == pytest.approx(covariance / variance, abs=1e-12)


# ---- components ----------------------------------------------------------------------------------


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
    # The gradient form lacks the path through queries and keys.
    # That is a few per cent at these small query weights.
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
