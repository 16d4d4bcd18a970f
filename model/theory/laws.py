"""Closed forms: how variance and gradients grow with depth under the classical schemes."""

from __future__ import annotations

import math


def post_ln_factor(s_a: float, s_f: float, g_a: float, g_f: float) -> float:
    """Gradient variance at a post-LN layer's input over that at its output (derived).

    s_a, s_f: output variance of the attention and feed-forward branch after dropout,
        for unit-variance input.
    g_a, g_f: their backward gains.
    Late tokens of a causal stack have g_a = 0 and lose 1 / (1 + s_a) a layer when g_f = s_f.
    """
    return (1 + g_a) * (1 + g_f) / ((1 + s_a) * (1 + s_f))


def b2t_factor(s_a: float, s_f: float, g_a: float, g_f: float) -> float:
    """The same for the B2T connection, y = LN(x + h + F(h)), h = LN(x + A(x)).

    Takase et al. 2023; factor derived.
    """
    c = 1 / math.sqrt(1 + s_a)
    return ((1 + c) ** 2 + g_f * c**2 + g_a * (1 + g_f) * c**2) / (2 + s_f + 2 * c)


def spannorm_factor(s_a: float, s_f: float, g_a: float, g_f: float) -> float:
    """The same for SpanNorm, y = LN(x + F(h)), h = LN(x + A(x)) (derived)."""
    return (1 + g_f * (1 + g_a) / (1 + s_a)) / (1 + s_f)


def pre_ln_variance(layer: int, s_a: float, s_f: float, start: float = 1.0) -> float:
    """Stream variance after `layer` pre-LN layers: linear in depth (Kedia et al. 2024).

    s_a: at the correlation the stack settles to.
    """
    return start + layer * (s_a + s_f)


def pre_ln_weight_gradient_norm(layer: int) -> float:
    """Weight-gradient norm of pre-LN layer `layer` (from 1) up to a common factor.

    1 / sqrt(layer + 1), the authors' plotting law in Kedia et al.'s code.
    Holds where branches conserve gradient variance; with Xavier weights the decline is slower.
    """
    return 1 / math.sqrt(layer + 1)


def geometric_gradient_variance(factor: float, layers: int) -> float:
    """Gradient variance after passing down through `layers` layers (post-norm stacks).

    factor: what each layer multiplies it by.
    """
    return factor**layers


def deepscale_gradient_bound(k: float) -> float:
    """Lower bound on late-token gradient variance at the bottom of a DeepScaleLM stack.

    Relative to the top of the stack: exp(-k / 2) (derived).
    Reached when attention returns no gradient: its sublayers each lose beta^2 = k / (2N), N of
    them. Independent of depth.
    """
    return math.exp(-k / 2)
