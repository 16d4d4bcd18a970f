"""Moments and correlations of activations, embeddings and attention, against closed forms."""

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
    relu_kappa,
    second_moment,
    slope_moment,
    stream_correlation,
    zipf_correlation,
)
from model.theory.correlation import POINTWISE, gaussian_product, sinusoid_moments
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
        assert POINTWISE["gelu"].slope(variance) == pytest.approx(
            gaussian_product(slope, variance, 1.0), abs=1e-12
        )


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


# ---- attention -----------------------------------------------------------------------------------


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
