"""DeepScaleLM's correlation recursion against a simulation of two tokens' vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from model.depth.schemes import SCHEMES
from model.depth.sublayer import Sublayer
from model.theory import Sizes, causal_attention, correlation_map, deepscale_plan

WIDTH = 60_000
LAYERS = 6
P = 0.1
Array = NDArray[np.float64]


def correlated(generator: np.random.Generator, correlation: float, variance: float = 1.0) -> Array:
    """Two tokens' vectors of the given variance and correlation, [2, WIDTH]."""
    first, second = generator.standard_normal((2, WIDTH))
    other = correlation * first + math.sqrt(1 - correlation**2) * second
    return math.sqrt(variance) * np.stack([first, other])


def correlation_of(x: Array) -> float:
    return float((x[0] * x[1]).mean() / np.square(x).mean())


def normed(x: Array, apply: bool) -> Array:
    return x / np.sqrt(np.square(x).mean(1, keepdims=True)) if apply else x


def dropped(generator: np.random.Generator, x: Array) -> Array:
    return x * (generator.random(x.shape) >= P) / (1 - P)


def passed(
    generator: np.random.Generator, x: Array, layer_input: Array, plan: Sublayer, correlation: float
) -> Array:
    """The sublayer equation of `model/depth/scheme.py` on vectors.

    The branch has variance 1 - P, as the weights are planned, and the given correlation.
    """
    branch = normed(correlated(generator, correlation, 1 - P), plan.norm_branch)
    residual = normed(x, plan.residual_from_norm) * plan.residual_scale
    added = dropped(generator, plan.branch_scale * branch)
    return normed(residual + added + plan.skip_scale * layer_input, plan.norm_out)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_planned_correlations_are_those_of_vectors(scheme: str) -> None:
    """Branches of variance 1 and of the correlation that attention and feed-forward make of x."""
    attention, generator = causal_attention(64, P), np.random.default_rng(7)
    plan = SCHEMES[scheme].plan(LAYERS)
    planned = deepscale_plan(plan, Sizes(64, 64, 256, "relu"), 0.2, P, attention)
    x = dropped(generator, correlated(generator, 0.2, 1 - P))
    for layer, expected in zip(plan, planned, strict=True):
        assert expected.token_correlation == pytest.approx(correlation_of(x), abs=0.01)
        entered, out = x, attention(correlation_of(x), 1.0)
        x = passed(generator, x, entered, layer.attention, out.covariance / out.second)
        x = passed(generator, x, entered, layer.mlp, correlation_map("relu", correlation_of(x)))
