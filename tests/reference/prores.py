"""Progressive residual warm-up (Chen et al. 2026) of pre-, post- and Peri-LN: branches times a.

Written out from the authors' equations, a given for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.parts import Options, Weights, attention, feed_forward, norm


def pre_ln(x: Tensor, layers: Sequence[Weights], o: Options, shares: Sequence[float]) -> Tensor:
    """x <- x + a F(LN(x)), all layers."""
    for w, a in zip(layers, shares, strict=True):
        x = x + a * attention(norm(x, w, "ln1", o), w, o)
        x = x + a * feed_forward(norm(x, w, "ln2", o), w, o)
    return x


def post_ln(
    x: Tensor, layers: Sequence[Weights], o: Options, shares: Sequence[float], residual: float = 1.0
) -> Tensor:
    """x <- LN(r x + a F(x)), all layers; r is DeepNorm's constant, or 1."""
    for w, a in zip(layers, shares, strict=True):
        x = norm(residual * x + a * attention(x, w, o), w, "ln1", o)
        x = norm(residual * x + a * feed_forward(x, w, o), w, "ln2", o)
    return x


def peri_ln(x: Tensor, layers: Sequence[Weights], o: Options, shares: Sequence[float]) -> Tensor:
    """x <- x + a LN_out(F(LN_in(x))), all layers."""
    for w, a in zip(layers, shares, strict=True):
        x = x + a * norm(attention(norm(x, w, "ln1", o), w, o), w, "ln1_out", o)
        x = x + a * norm(feed_forward(norm(x, w, "ln2", o), w, o), w, "ln2_out", o)
    return x
