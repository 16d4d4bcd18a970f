"""Activations under Gaussian inputs, and the token correlation of embeddings.

Of activations: second moments and token-correlation maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from model.families.family import PLAIN, Sinusoid

Array = NDArray[np.float64]
# 80 nodes a dimension: the quadrature of smooth activations is exact to 1e-12 at unit variance.
QUADRATURE_NODES = 80
# x Phi(x) ~ x / 2 (1 + tanh(scale (x + cube x^3))), Hendrycks & Gimpel 2016.
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


@dataclass(frozen=True)
class Activation:
    """Moments of a pointwise function a(x), x zero-mean Gaussian of variance s2."""

    product: Callable[[float, float], float]
    """product(s2, r): E[a(x) a(y)] for inputs of correlation r; r = 1 gives E[a(x)^2]."""
    slope: Callable[[float], float]
    """slope(s2): E[a'(x)^2]."""


@lru_cache(maxsize=1)
def _nodes() -> tuple[Array, Array]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
    return nodes, weights / math.sqrt(2 * math.pi)


def gaussian_expectation(function: Callable[[Array], Array], variance: float) -> float:
    """E[function(x)], x ~ N(0, variance), by Gauss-Hermite quadrature; for smooth functions."""
    nodes, weights = _nodes()
    return float(weights @ function(math.sqrt(variance) * nodes))


def gaussian_product(function: Callable[[Array], Array], variance: float, correlation: float) -> float:
    """E[function(x) function(y)] for x, y ~ N(0, variance) of the given correlation.

    By Gauss-Hermite quadrature; for smooth functions.
    """
    nodes, weights = _nodes()
    s = math.sqrt(variance)
    other = correlation * nodes[:, None] + math.sqrt(max(0.0, 1 - correlation**2)) * nodes[None, :]
    return float((weights * function(s * nodes)) @ function(s * other) @ weights)


def _relu_product(s2: float, r: float) -> float:
    """Arc-cosine kernel of degree 1 (Cho & Saul 2009)."""
    angle = math.acos(r)
    return s2 * (math.sin(angle) + (math.pi - angle) * r) / (2 * math.pi)


def _relu2_product(s2: float, r: float) -> float:
    """Arc-cosine kernel of degree 2 (Cho & Saul 2009)."""
    angle = math.acos(r)
    return s2**2 * (3 * math.sin(angle) * r + (math.pi - angle) * (1 + 2 * r * r)) / (2 * math.pi)


def _gelu_product(s2: float, r: float) -> float:
    """Of x Phi(x), the exact form (Kedia et al. 2024)."""
    a = s2 / (1 + s2)
    ratio = (s2 * (1 - r * r) + 1 + r * r) / ((s2 + 1) * math.sqrt((s2 + 1) ** 2 - (r * s2) ** 2))
    return s2 / 4 * (r + 2 / math.pi * r * math.asin(r * a) + 2 / math.pi * s2 * ratio)


def _gelu_slope(s2: float) -> float:
    """As `_gelu_product`; their form for two tokens at correlation 1."""
    a = s2 / (1 + s2)
    bump: float = a * (5 * s2 + 3) / (2 * s2 + 1) ** 1.5
    return 0.5 + (bump - math.acos(a)) / (2 * math.pi)


def _silu(x: Array) -> Array:
    gated: Array = x / (1 + np.exp(-x))
    return gated


def _silu_slope(x: Array) -> Array:
    gate: Array = 1 / (1 + np.exp(-x))
    return gate * (1 + x * (1 - gate))


def _gelu_tanh(x: Array) -> Array:
    t: Array = np.tanh(_TANH_SCALE * (x + _TANH_CUBE * x**3))
    return 0.5 * x * (1 + t)


def _gelu_tanh_slope(x: Array) -> Array:
    t: Array = np.tanh(_TANH_SCALE * (x + _TANH_CUBE * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * x**2)


POINTWISE: dict[str, Activation] = {
    "relu": Activation(_relu_product, lambda s2: 0.5),
    "relu2": Activation(_relu2_product, lambda s2: 2 * s2),
    "gelu": Activation(_gelu_product, _gelu_slope),
    "gelu_tanh": Activation(
        lambda s2, r: gaussian_product(_gelu_tanh, s2, r),
        lambda s2: gaussian_expectation(lambda x: _gelu_tanh_slope(x) ** 2, s2),
    ),
    "silu": Activation(
        lambda s2, r: gaussian_product(_silu, s2, r),
        lambda s2: gaussian_expectation(lambda x: _silu_slope(x) ** 2, s2),
    ),
}
# Gated activations: a(gate) * up, gate and up independent of each other.
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


def second_moment(activation: str, variance: float = 1.0) -> float:
    """E[hidden^2] of the feed-forward's hidden entries.

    variance: of the pre-activations, gate and up alike.
    """
    return product_moment(activation, variance, 1.0)


def product_moment(activation: str, variance: float, correlation: float) -> float:
    """E[hidden hidden'] between two tokens. Derived; see `Activation`.

    variance, correlation: of their pre-activations.
    """
    r = min(1.0, max(-1.0, correlation))
    if activation in GATES:
        return POINTWISE[GATES[activation]].product(variance, r) * variance * r
    return POINTWISE[activation].product(variance, r)


def slope_moment(activation: str, variance: float = 1.0) -> float:
    """Sum over pre-activations of E[(d hidden / d pre-activation)^2].

    That is E[a'^2], or E[a'^2] variance + E[a^2] with a gate.
    """
    if activation in GATES:
        gate = POINTWISE[GATES[activation]]
        return gate.slope(variance) * variance + gate.product(variance, 1.0)
    return POINTWISE[activation].slope(variance)


def correlation_map(activation: str, correlation: float, variance: float = 1.0) -> float:
    """Token correlation after a feed-forward block, from the correlation before it.

    E[hidden hidden'] / E[hidden^2]. Dropout is not included.
    """
    return product_moment(activation, variance, correlation) / second_moment(activation, variance)


def relu_kappa(correlation: float) -> float:
    """kappa(r) = r + (sqrt(1 - r^2) - r arccos r) / pi, the correlation map of ReLU.

    Kedia et al. 2024; Cho & Saul 2009.
    """
    r = correlation
    return r + (math.sqrt(1 - r * r) - r * math.acos(r)) / math.pi


def fixed_point(activation: str, p: float) -> float:
    """Token correlation r* that a very deep stack approaches (derived).

    Its attention and feed-forward branches are equal.
    Solves r = (1 - p)(1 + map(r)) / 2: attention emits fully correlated tokens, the feed-forward
    map(r), and dropout p of either divides correlation by 1 / (1 - p).
    1 without dropout: rank collapse.
    """
    if p == 0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 - p) * (1 + correlation_map(activation, middle)) / 2 > middle:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@lru_cache(maxsize=64)
def zipf_correlation(vocab_size: int) -> float:
    """Sum of squared unigram probabilities under p_i ~ 1/i, i = 1..vocab_size (exact sums).

    It is the chance that two tokens are the same word.
    """
    inverse = 1 / np.arange(1, vocab_size + 1, dtype=np.float64)
    return float(np.sum(inverse**2) / np.sum(inverse) ** 2)


def stream_correlation(
    word_correlation: float,
    *,
    positions: bool,
    segments: bool = False,
    fixed: tuple[float, float] | None = None,
) -> float:
    """Token correlation of a sum of equal-variance embedding tables, before dropout (derived).

    Two positions of a learned table have correlation 0; two segments split at a uniform cut give
    the same segment with probability 2/3.
    fixed: (variance, covariance) of positions that are not drawn, in units of a table's variance.
    """
    own, shared = fixed or (1.0, 0.0)
    covariance = word_correlation + shared * positions + (2 / 3 if segments else 0.0)
    return covariance / (1 + own * positions + segments)


@lru_cache(maxsize=64)
def sinusoid_moments(length: int, width: int, centred: bool, form: Sinusoid = PLAIN) -> tuple[float, float]:
    """(variance, covariance of two places) of sines and cosines, over the mean square (derived).

    Means over the `length` positions of a sequence. Positions i and j have the mean over
    frequencies f of cos(f (i - j)), and most frequencies are so low that a short sequence does not
    see them turn.
    centred: a norm takes the mean over a vector's entries away. Slow cosines stay at 1 and slow
    sines at 0, so this mean holds 0.29 of the power over 64 positions, and 0.15 over 512.
    """
    return _moments(_sinusoids(length, width, form), centred)


@lru_cache(maxsize=64)
def grid_moments(rows: int, columns: int, width: int, centred: bool) -> tuple[float, float]:
    """The same of places of a grid, row by row.

    One half of a vector tells the row and the other the column, each as a vector of half the width.
    """
    row, column = (_sinusoids(count, width // 2, PLAIN) for count in (rows, columns))
    return _moments(np.hstack((np.repeat(row, columns, axis=0), np.tile(column, (rows, 1)))), centred)


def _sinusoids(length: int, width: int, form: Sinusoid) -> Array:
    """Sines of all frequencies, then cosines: [length, width]."""
    frequency = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / form.steps(width))
    angles = np.outer(form.first + np.arange(length, dtype=np.float64), frequency)
    return np.hstack((np.sin(angles), np.cos(angles)))


def _moments(table: Array, centred: bool) -> tuple[float, float]:
    """Over the mean square of the table, [length, width]; one place alone is like itself."""
    length = len(table)
    size = float(np.square(table).sum())
    if centred:
        table = table - table.mean(1, keepdims=True)
    own = float(np.square(table).sum())
    pairs = float(np.square(table.sum(0)).sum()) - own
    return own / size, (pairs / (length - 1) if length > 1 else own) / size
