"""How mean, variance and token correlation pass through single components, forward and backward.

Conventions: a stream x has entries of mean `mean` and variance `variance`.
The vectors of two different tokens have entrywise covariance `correlation x variance`.
An incoming gradient has zero mean, variance `gradient` and, between two tokens, covariance
`gradient_correlation x gradient`.
Weights are zero-mean and independent of the data.
Forms are those of Kedia et al. 2024, "Transformers Get Stable" (component tables and the authors'
simulation code), unless a docstring says otherwise; tests compare each one with a simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Moments:
    """Entrywise mean, variance and covariance between two tokens, of a component's output."""

    mean: float
    variance: float
    covariance: float


@dataclass(frozen=True)
class GradientMoments:
    """Moments of the gradient at a component's input, entry by entry."""

    variance: float
    covariance: float
    """Between two tokens."""


def linear(mean: float, variance: float, correlation: float, fan_in: int, weight_variance: float) -> Moments:
    """y = W x, W: [fan_out, fan_in]."""
    gain = fan_in * weight_variance
    return Moments(0.0, gain * (variance + mean**2), gain * (mean**2 + correlation * variance))


def linear_gradient(
    gradient: float, gradient_correlation: float, fan_out: int, weight_variance: float
) -> GradientMoments:
    """Gradient at the input of y = W x, W: [fan_out, fan_in]."""
    gain = fan_out * weight_variance * gradient
    return GradientMoments(gain, gradient_correlation * gain)


def dropout(mean: float, variance: float, correlation: float, p: float) -> Moments:
    """Inverted dropout with probability p.

    Entries are zeroed or divided by 1 - p, independently for every token.
    """
    return Moments(mean, (variance + p * mean**2) / (1 - p), correlation * variance)


def dropout_gradient(gradient: float, gradient_correlation: float, p: float) -> GradientMoments:
    """Gradient at the input of dropout."""
    return GradientMoments(gradient / (1 - p), gradient_correlation * gradient)


def relu(variance: float, correlation: float) -> Moments:
    """max(x, 0) of zero-mean Gaussian x."""
    r = correlation
    covariance = variance * (math.pi * r + math.sqrt(1 - r * r) - r * math.acos(r) - 1) / (2 * math.pi)
    return Moments(math.sqrt(variance / (2 * math.pi)), variance * (math.pi - 1) / (2 * math.pi), covariance)


def relu_gradient(gradient: float, gradient_correlation: float, correlation: float) -> GradientMoments:
    """Gradient at the input of max(x, 0), whose inputs have token correlation `correlation`."""
    return GradientMoments(
        gradient / 2, gradient_correlation * gradient * (0.25 + math.asin(correlation) / (2 * math.pi))
    )


def gelu(variance: float, correlation: float) -> Moments:
    """x Phi(x) of zero-mean Gaussian x (the exact, erf form)."""
    s2, r = variance, correlation
    a = s2 / (1 + s2)
    mean = math.sqrt(s2 * a / (2 * math.pi))
    own = s2 / (2 * math.pi) * (math.pi - a - math.acos(a) + 2 * a * math.sqrt((1 - a) / (1 + a)))
    ratio = (s2 * (1 - r * r) + 1 + r * r) / ((s2 + 1) * math.sqrt((s2 + 1) ** 2 - (r * s2) ** 2))
    product = s2 / 4 * (r + 2 / math.pi * r * math.asin(r * a) + 2 / math.pi * s2 * ratio)
    return Moments(mean, own, product - mean**2)


def gelu_gradient(
    variance: float, correlation: float, gradient: float, gradient_correlation: float
) -> GradientMoments:
    """Gradient at the input of x Phi(x).

    variance, correlation: of the inputs, the latter between tokens.
    """

    def overlap(r: float) -> float:
        s2 = variance
        a, square = s2 / (1 + s2), (s2 + 1) ** 2 - (r * s2) ** 2
        bump: float = r * a * ((s2 + 1) * (2 * s2 + 3) - 2 * (r * s2) ** 2) / square**1.5
        return 0.5 + (bump - math.acos(r * a)) / (2 * math.pi)

    return GradientMoments(gradient * overlap(1.0), gradient_correlation * gradient * overlap(correlation))


def layer_norm(correlation: float, width: int) -> Moments:
    """LayerNorm over `width` features, gain 1, bias 0: unit variance whatever the input's."""
    return Moments(0.0, 1.0, correlation * (1 - 1 / width))


def layer_norm_gradient(variance: float, gradient: float, gradient_correlation: float) -> GradientMoments:
    """Gradient at the input of LayerNorm or RMSNorm whose input has variance `variance`."""
    return GradientMoments(gradient / variance, gradient_correlation * gradient / variance)


def softmax(variance: float, correlation: float, length: int) -> Moments:
    """Softmax over `length` Gaussian scores that share a row.

    variance: of the scores; correlation: within the row.
    The covariance field is the one within a row, -variance / (length - 1),
    because a row sums to 1.
    """
    spread = (1 - correlation) * variance
    e = math.exp(spread * length / (length - 1))
    own = (e - 1) * e**2 / ((length - 1) * math.exp(spread) + 1) ** 2
    return Moments(1 / length, own, -own / (length - 1))


def softmax_gradient(variance: float, correlation: float, length: int, gradient: float) -> float:
    """Variance of the gradient at the scores.

    gradient: variance of the independent gradients at the probabilities.
    Large-`length` form: gradient x (variance of a probability + 1 / length^2).
    """
    return gradient * (softmax(variance, correlation, length).variance + 1 / length**2)


def attention_head(
    variance: float,
    correlation: float,
    width: int,
    length: int,
    qk_product: float,
    v_variance: float,
    p: float,
) -> Moments:
    """One bidirectional attention head without its output projection.

    The input is the stream [length, width].
    qk_product: variance of a query weight times variance of a key weight.
    v_variance: variance of a value weight.
    p: dropout on the attention probabilities.
    Scores are divided by the square root of the head width.
    """
    s2, r, d = variance, correlation, width
    w = d * s2 * qk_product
    peaked = math.exp((1 - r) * d * w * s2) / (1 - p)
    drift = (1 - r) ** 2 * (length - 1) * w * s2**2
    own = (drift + peaked * (4 * (1 - r) ** 2 * w * s2**2 + (1 - r) * s2)) / length + r * s2
    across = r * s2 + (2 * (1 - r) ** 2 * d * qk_product * s2**3 + (1 - r) * s2) / length
    return Moments(0.0, d * v_variance * own, d * v_variance * across)


def attention_head_gradient(
    gradient: float, gradient_correlation: float, head_width: int, length: int, v_variance: float, p: float
) -> GradientMoments:
    """Gradient at the stream under one bidirectional head, through the values only.

    The path through queries and keys is missing from this form.
    Where score variance is of order 1 the true gradient is larger, several times so for nearly
    uncorrelated gradients. It is a lower bound.
    """
    q, gain = gradient_correlation, gradient * head_width * v_variance / length
    return GradientMoments(gain * (1 + (length - 1) * q * (1 - p)) / (1 - p), gain * (1 + (length - 1) * q))
